//! Registries to import from: a real one, and one that does what no real one does.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::{
    collections::HashMap,
    io::Write,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result, ensure};
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::harness::until;

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
        until("the registry answers", async || {
            Ok(registry.client.get(format!("http://{}/v2/", registry.host)).send().await.is_ok())
        })
        .await?;
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

/// How an odd registry answers a request; `None`: as it should.
type Oddity = dyn Fn(&Request, usize) -> Option<Response> + Send + Sync;

/// A registry that the test scripts.
pub(crate) struct Odd {
    pub(crate) host: String,
    inner: Arc<Inner>,
    server: tokio::task::JoinHandle<()>,
}

struct Inner {
    answers: Mutex<HashMap<String, (String, Vec<u8>)>>,
    oddity: Box<Oddity>,
    /// Requests for layers.
    layers: AtomicUsize,
    seen: Mutex<Vec<(String, Option<String>)>>,
}

impl Drop for Odd {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Odd {
    pub(crate) async fn start(
        oddity: impl Fn(&Request, usize) -> Option<Response> + Send + Sync + 'static,
    ) -> Result<Self> {
        let inner = Arc::new(Inner {
            answers: Mutex::default(),
            oddity: Box::new(oddity),
            layers: AtomicUsize::new(0),
            seen: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let host = listener.local_addr()?.to_string();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&inner));
        #[allow(clippy::disallowed_methods, reason = "it ends with the test")]
        let server = tokio::spawn(async move { drop(axum::serve(listener, router).await) });
        Ok(Self { host, inner, server })
    }

    /// It has that image, as `app:1`.
    pub(crate) fn has(&self, image: &Image) {
        self.says("/v2/app/manifests/1", MANIFEST, image.bytes());
        for blob in &image.blobs {
            self.says(&format!("/v2/app/blobs/{}", digest(blob)), "application/octet-stream", blob.clone());
        }
    }

    pub(crate) fn says(&self, path: &str, kind: &str, bytes: Vec<u8>) {
        self.inner.answers.lock().unwrap().insert(path.to_owned(), (kind.to_owned(), bytes));
    }

    pub(crate) fn image(&self) -> String {
        format!("{}/app:1", self.host)
    }

    /// Paths that were asked for, and what authorized that.
    pub(crate) fn seen(&self) -> Vec<(String, Option<String>)> {
        self.inner.seen.lock().unwrap().clone()
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
    inner.seen.lock().unwrap().push((path.clone(), authorization));
    let nth = if path.contains("/blobs/") { inner.layers.fetch_add(1, Ordering::Relaxed) } else { 0 };
    if let Some(odd) = (inner.oddity)(&request, nth) {
        return odd;
    }
    let Some((kind, bytes)) = inner.answers.lock().unwrap().get(&path).cloned() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let from = request
        .headers()
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        Some(from) => Response::builder()
            .status(206)
            .header("content-range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()))
            .body(Body::from(bytes[from..].to_vec()))
            .unwrap(),
        None => ([(header::CONTENT_TYPE, kind)], bytes).into_response(),
    }
}
