//! A registry that does what no real one does: the test scripts it.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::Result;
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};

use crate::registry::{Image, MANIFEST, digest};

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

    pub(crate) fn forgets(&self, path: &str) {
        self.inner.answers.lock().unwrap().remove(path);
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
