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

/// An image: its manifest, and the blobs that it names.
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
        let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
        let config = json!({
            "os": "linux", "architecture": architecture, "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let mut blobs = vec![config.to_string().into_bytes()];
        blobs.extend(layers.iter().map(|layer| gzip(layer)));
        let described: Vec<Value> = blobs
            .iter()
            .enumerate()
            .map(|(at, blob)| {
                let kind = if at == 0 { CONFIG } else { LAYER };
                json!({ "mediaType": kind, "digest": digest(blob), "size": blob.len() })
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1..],
        });
        Self { manifest, blobs }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.manifest.to_string().into_bytes()
    }
}

/// Debian's `docker-registry` on a port of its own. It ends with this.
pub(crate) struct Registry {
    process: Child,
    pub(crate) host: String,
    password: Option<(&'static str, &'static str)>,
    client: reqwest::Client,
    _folder: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
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
        let dir = folder.path().to_str().context("a path of UTF-8")?.to_owned();
        std::fs::write(format!("{dir}/users"), USERS)?;
        // Free a moment ago; another test that takes it meanwhile is found by the registry, which ends then.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let auth = format!("auth: {{htpasswd: {{realm: test, path: {dir}/users}}}}\n");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {dir}/data}}}}\n\
             http: {{addr: '127.0.0.1:{port}'}}\n{}",
            if password.is_some() { auth.as_str() } else { "" }
        );
        std::fs::write(format!("{dir}/config.yml"), config)?;
        let process = Command::new("docker-registry")
            .args(["serve", &format!("{dir}/config.yml")])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("docker-registry: is it installed?")?;
        let host = format!("127.0.0.1:{port}");
        let client = reqwest::Client::builder().no_proxy().build()?;
        let registry = Self { process, host, password, client, _folder: folder };
        let deadline = Instant::now() + PATIENCE;
        while registry.client.get(format!("http://{}/v2/", registry.host)).send().await.is_err() {
            ensure!(Instant::now() < deadline, "the registry doesn't answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(registry)
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
