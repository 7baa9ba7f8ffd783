//! A registry to import from: Debian's `docker-registry`; and images for it. Tests of other crates use it too.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::{
    io::Write,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// How long it may take to come up.
const PATIENCE: Duration = Duration::from_secs(30);
/// The user `AWS` with the password `secret-token`, and `reader` with `pass-word`.
const USERS: &str = "AWS:$2y$05$5nPxrQonjQJSn4Bdxgo6Gu0.xvF/AXk0Kxwri5upE0Y1toTWfeJQK\n\
    reader:$2y$05$MaIqlUGKrf1VhkpG8i1QS.GWOdIMU1aSDIXBYIVnCyjrKMOXlbaTW\n";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

pub(crate) fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// An archive with those files.
pub(crate) fn tar(files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content.as_bytes()).expect("memory takes it");
    }
    tar.into_inner().expect("memory takes it")
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory takes it");
    encoder.finish().expect("memory takes it")
}

/// A layer as registries have it.
#[derive(Clone)]
pub(crate) struct Layer {
    diff_id: String,
    pub(crate) blob: Vec<u8>,
    kind: &'static str,
    /// Where it is instead of in the registry.
    urls: Vec<String>,
}

impl Layer {
    /// An archive, packed by gzip.
    pub(crate) fn new(archive: &[u8]) -> Self {
        Self { diff_id: digest(archive), blob: gzip(archive), kind: LAYER, urls: Vec::new() }
    }

    /// An archive, packed as `blob`.
    pub(crate) fn packed(archive: &[u8], blob: Vec<u8>, kind: &'static str) -> Self {
        Self { blob, kind, ..Self::new(archive) }
    }

    /// One that registries don't keep, at that address.
    pub(crate) fn foreign(archive: &[u8], url: String) -> Self {
        let kind = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
        Self { kind, urls: vec![url], ..Self::new(archive) }
    }
}

/// An image: its manifest, and the blobs that it names and registries keep.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) manifest: Value,
    pub(crate) blobs: Vec<Vec<u8>>,
}

impl Image {
    /// Of archives, with that configuration.
    pub(crate) fn new(layers: &[Vec<u8>], config: &Value) -> Self {
        Self::on(architecture(), layers, config)
    }

    pub(crate) fn on(architecture: &str, layers: &[Vec<u8>], config: &Value) -> Self {
        let layers: Vec<Layer> = layers.iter().map(|layer| Layer::new(layer)).collect();
        Self::of(architecture, &layers, config)
    }

    pub(crate) fn of(architecture: &str, layers: &[Layer], config: &Value) -> Self {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "os": "linux", "architecture": architecture, "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = config.to_string().into_bytes();
        let describe = |kind, blob: &[u8]| json!({ "mediaType": kind, "digest": digest(blob), "size": blob.len() });
        let mut described: Vec<Value> = layers.iter().map(|layer| describe(layer.kind, &layer.blob)).collect();
        for (described, layer) in described.iter_mut().zip(layers).filter(|(_, layer)| !layer.urls.is_empty()) {
            described["urls"] = json!(layer.urls);
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": describe(CONFIG, &config), "layers": described,
        });
        let kept = layers.iter().filter(|layer| layer.urls.is_empty());
        let blobs = std::iter::once(config).chain(kept.map(|layer| layer.blob.clone())).collect();
        Self { manifest, blobs }
    }

    /// The same layers with another configuration.
    pub(crate) fn configure(&mut self, config: &Value) {
        self.blobs[0] = config.to_string().into_bytes();
        self.manifest["config"]["digest"] = json!(digest(&self.blobs[0]));
        self.manifest["config"]["size"] = json!(self.blobs[0].len());
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.manifest.to_string().into_bytes()
    }
}

/// Debian's `docker-registry` on a port of its own. It ends with this.
pub(crate) struct Registry {
    _process: Process,
    pub(crate) host: String,
    password: Option<(&'static str, &'static str)>,
    client: reqwest::Client,
    folder: tempfile::TempDir,
}

/// It ends with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Another door to a registry's images, by TLS.
pub(crate) struct Secured {
    _process: Process,
    pub(crate) host: String,
}

impl Registry {
    pub(crate) async fn open() -> Result<Self> {
        Self::start(None).await
    }

    /// One that wants a password.
    pub(crate) async fn closed() -> Result<Self> {
        Self::start(Some(("AWS", "secret-token"))).await
    }

    async fn start(password: Option<(&'static str, &'static str)>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let dir = folder.path().to_str().context("a path of UTF-8")?;
        std::fs::write(format!("{dir}/users"), USERS)?;
        let auth = format!("auth: {{htpasswd: {{realm: test, path: {dir}/users}}}}\n");
        let (process, host) = serve(dir, "", if password.is_some() { &auth } else { "" }).await?;
        let client = reqwest::Client::builder().no_proxy().build()?;
        Ok(Self { _process: process, host, password, client, folder })
    }

    /// The same images, by TLS with that certificate and key (PEM).
    pub(crate) async fn secured(&self, certificate: &str, key: &str) -> Result<Secured> {
        let dir = self.folder.path().to_str().context("a path of UTF-8")?;
        std::fs::write(format!("{dir}/certificate.pem"), certificate)?;
        std::fs::write(format!("{dir}/key.pem"), key)?;
        let tls = format!(", tls: {{certificate: {dir}/certificate.pem, key: {dir}/key.pem}}");
        let (process, host) = serve(dir, &tls, "").await?;
        Ok(Secured { _process: process, host })
    }

    /// Turns a byte of a blob over, as a disk might.
    pub(crate) fn damage(&self, blob: &[u8]) -> Result<()> {
        let digest = digest(blob);
        let hex = digest.trim_start_matches("sha256:");
        let kept = format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]);
        let path = self.folder.path().join(kept);
        let mut bytes = std::fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Ok(std::fs::write(path, bytes)?)
    }

    fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, url);
        match self.password {
            Some((user, password)) => request.basic_auth(user, Some(password)),
            None => request,
        }
    }

    /// Pushes an image; the digest of its manifest.
    pub(crate) async fn push(&self, repository: &str, tag: &str, image: &Image) -> Result<String> {
        for blob in &image.blobs {
            let begun =
                self.request(reqwest::Method::POST, &format!("http://{}/v2/{repository}/blobs/uploads/", self.host));
            let begun = begun.send().await?.error_for_status()?;
            let to = begun.headers()["location"].to_str()?.to_owned();
            let put = self.request(reqwest::Method::PUT, &to).query(&[("digest", digest(blob))]).body(blob.clone());
            put.send().await?.error_for_status()?;
        }
        self.push_manifest(repository, tag, MANIFEST, image.bytes()).await
    }

    pub(crate) async fn push_manifest(
        &self,
        repository: &str,
        tag: &str,
        kind: &str,
        bytes: Vec<u8>,
    ) -> Result<String> {
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.host);
        let digest = digest(&bytes);
        let put = self.request(reqwest::Method::PUT, &url).header("Content-Type", kind).body(bytes).send().await?;
        ensure!(put.status().is_success(), "{}", put.text().await?);
        Ok(digest)
    }

    /// A reference to an image in it.
    pub(crate) fn image(&self, rest: &str) -> String {
        format!("{}/{rest}", self.host)
    }
}

/// A registry with what is in that folder, once it takes connections.
async fn serve(dir: &str, tls: &str, more: &str) -> Result<(Process, String)> {
    // Free a moment ago; another test that takes it meanwhile is found by the registry, which ends then.
    let host = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {dir}/data}}}}\n\
         validation: {{manifests: {{urls: {{allow: ['^http']}}}}}}\nhttp: {{addr: '{host}'{tls}}}\n{more}"
    );
    let file = format!("{dir}/{}.yml", host.replace(':', "-"));
    std::fs::write(&file, config)?;
    let process = Command::new("docker-registry")
        .args(["serve", &file])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("docker-registry: is it installed?")?;
    let process = Process(process);
    let deadline = Instant::now() + PATIENCE;
    while tokio::net::TcpStream::connect(&host).await.is_err() {
        ensure!(Instant::now() < deadline, "the registry doesn't answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok((process, host))
}
