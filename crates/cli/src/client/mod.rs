//! The REST API from the outside: one HTTP exchange per call, errors as [`Failure`], streams of server-sent events.
//!
//! Invariant: every exchange has a time limit and every answer a size limit. It knows paths and JSON, not what they mean.

pub(crate) mod sse;

use std::time::Duration;

use futures_util::TryStreamExt;
use reqwest::{
    Method, Response, Url,
    header::{self, HeaderMap, HeaderValue},
};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{self, client::IntoClientRequest},
};
use tokio_util::io::ReaderStream;

use crate::{
    args::Connection,
    failure::{ApiError, Failure},
};

/// A call that names no limit of its own: a create may wait for a boot.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(120);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const ANSWER_BYTES: usize = 64 << 20;
const KEY_HEADER: &str = "x-api-key";
/// Bytes of a file that are read at once.
const PIECE_BYTES: usize = 256 << 10;

/// One server, one key.
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    api_key: Option<HeaderValue>,
}

/// A request.
pub(crate) struct Call<'a> {
    pub(crate) method: Method,
    /// Path and query, from `/`.
    pub(crate) path: &'a str,
    pub(crate) body: Option<&'a Value>,
    pub(crate) headers: HeaderMap,
    /// From sending to the last byte of the answer.
    pub(crate) limit: Duration,
}

impl<'a> Call<'a> {
    /// A call without body and headers.
    pub(crate) fn new(method: Method, path: &'a str) -> Self {
        Self { method, path, body: None, headers: HeaderMap::new(), limit: CALL_LIMIT }
    }
}

impl Client {
    /// A client for the server and key that the arguments name.
    pub(crate) fn new(connection: &Connection) -> Result<Self, Failure> {
        let base = base_url(&connection.url)?;
        let mut headers = HeaderMap::new();
        if let Some(key) = connection.api_key.as_deref().map(str::trim).filter(|key| !key.is_empty()) {
            let mut value = HeaderValue::from_str(key)
                .map_err(|_| anyhow::anyhow!("the API key has characters that no key has"))?;
            value.set_sensitive(true);
            headers.insert(KEY_HEADER, value);
        }
        let api_key = headers.get(KEY_HEADER).cloned();
        let mut http = reqwest::Client::builder()
            .connect_timeout(CONNECT_LIMIT)
            .default_headers(headers)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("tiffin/", env!("CARGO_PKG_VERSION")));
        if is_loopback(&base) {
            // A proxy for the outside world has no way to this machine's own server.
            http = http.no_proxy();
        }
        Ok(Self { http: http.build().map_err(anyhow::Error::from)?, base, api_key })
    }

    /// The server's port.
    pub(crate) fn port(&self) -> Option<u16> {
        self.base.port_or_known_default()
    }

    /// `GET`, answer as JSON.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.json(Call::new(Method::GET, path)).await
    }

    /// `POST`; the answer is `Null` where there is none (204).
    pub(crate) async fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        self.json(Call { body, ..Call::new(Method::POST, path) }).await
    }

    /// `PUT` without a body.
    pub(crate) async fn put(&self, path: &str) -> Result<Value, Failure> {
        self.json(Call::new(Method::PUT, path)).await
    }

    /// `DELETE`.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), Failure> {
        self.json(Call::new(Method::DELETE, path)).await.map(drop)
    }

    /// `PUT` of so many of a file's bytes, from where it stands; `sent` is told how many have gone, as they go.
    pub(crate) async fn upload(
        &self,
        path: &str,
        headers: HeaderMap,
        file: tokio::fs::File,
        bytes: u64,
        limit: Duration,
        sent: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<(), Failure> {
        let url = self.base.join(path.trim_start_matches('/')).map_err(anyhow::Error::from)?;
        let mut so_far = 0;
        let pieces = ReaderStream::with_capacity(file.take(bytes), PIECE_BYTES).inspect_ok(move |piece| {
            so_far += piece.len() as u64;
            sent(so_far);
        });
        let request = self
            .http
            .request(Method::PUT, url)
            .headers(headers)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_LENGTH, bytes)
            .timeout(limit)
            .body(reqwest::Body::wrap_stream(pieces));
        self.answered(request).await.map(drop)
    }

    /// Any call, its answer as JSON; `Null` where the answer is empty.
    pub(crate) async fn json(&self, call: Call<'_>) -> Result<Value, Failure> {
        let answer = self.send(call).await?;
        let body = self.body(answer).await?;
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|error| Failure::Exchange(format!("the answer is no JSON: {error}")))
    }

    /// Any call; the answer is returned when its head is there, an error answer as the error that it is.
    pub(crate) async fn send(&self, call: Call<'_>) -> Result<Response, Failure> {
        let body = call.body;
        let request = self.request(call)?;
        self.answered(if let Some(body) = body { request.json(body) } else { request }).await
    }

    /// A call with a body that isn't JSON, passed on as it comes; nothing is answered.
    pub(crate) async fn pass(&self, call: Call<'_>, kind: &'static str, body: reqwest::Body) -> Result<(), Failure> {
        let request = self.request(call)?.header(header::CONTENT_TYPE, kind).body(body);
        self.answered(request).await.map(drop)
    }

    /// Opens a WebSocket; a refusal is the error that it is.
    pub(crate) async fn websocket(
        &self,
        path: &str,
    ) -> Result<WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>, Failure> {
        let mut url = self.base.join(path.trim_start_matches('/')).map_err(anyhow::Error::from)?;
        url.set_scheme("ws").map_err(|()| anyhow::anyhow!("{url}: can't be a WebSocket's address"))?;
        let mut request = url.as_str().into_client_request().map_err(anyhow::Error::from)?;
        if let Some(key) = &self.api_key {
            request.headers_mut().insert(KEY_HEADER, key.clone());
        }
        match tokio_tungstenite::connect_async(request).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(answer)) => {
                let (status, headers) = (answer.status().as_u16(), answer.headers());
                let retry_after = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
                let body = answer.body().as_deref().unwrap_or_default();
                Err(ApiError::read(status, body, retry_after.map(str::to_owned)).into())
            }
            Err(tungstenite::Error::Io(error)) => {
                let url = self.base.to_string().trim_end_matches('/').to_owned();
                Err(Failure::Unreachable { url, reason: error.to_string() })
            }
            Err(error) => Err(Failure::Exchange(format!("the server opened no terminal: {error}"))),
        }
    }

    fn request(&self, call: Call<'_>) -> Result<reqwest::RequestBuilder, Failure> {
        let url = self.base.join(call.path.trim_start_matches('/')).map_err(anyhow::Error::from)?;
        Ok(self.http.request(call.method, url).headers(call.headers).timeout(call.limit))
    }

    async fn answered(&self, request: reqwest::RequestBuilder) -> Result<Response, Failure> {
        let answer = request.send().await.map_err(|error| self.failure(&error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let retry_after =
            answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let body = self.body(answer).await.unwrap_or_default();
        Err(ApiError::read(status.as_u16(), &body, retry_after).into())
    }

    /// The rest of an answer, bounded.
    pub(crate) async fn body(&self, mut answer: Response) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk(&mut answer).await? {
            if body.len() + chunk.len() > ANSWER_BYTES {
                return Err(Failure::Exchange("the answer is too large".to_owned()));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// The next bytes of an answer; `None` at its end.
    pub(crate) async fn chunk(&self, answer: &mut Response) -> Result<Option<Vec<u8>>, Failure> {
        let chunk = answer.chunk().await.map_err(|error| self.failure(&error))?;
        Ok(chunk.map(Vec::from))
    }

    fn failure(&self, error: &reqwest::Error) -> Failure {
        let reason = innermost(error);
        if error.is_connect() {
            Failure::Unreachable { url: self.base.to_string().trim_end_matches('/').to_owned(), reason }
        } else if error.is_timeout() {
            Failure::Exchange("the server didn't answer in time".to_owned())
        } else {
            Failure::Exchange(format!("the exchange with the server broke off: {reason}"))
        }
    }
}

/// A path with those parameters.
pub(crate) fn query(path: &str, parameters: &[(&str, &str)]) -> String {
    let mut url = Url::parse("http://host").expect("a URL");
    url.query_pairs_mut().extend_pairs(parameters);
    format!("{path}?{}", url.query().unwrap_or_default())
}

/// The base URL, ending in `/` so that paths are joined below it.
fn base_url(text: &str) -> Result<Url, Failure> {
    let with_slash = format!("{}/", text.trim_end_matches('/'));
    let url = Url::parse(&with_slash).map_err(|error| anyhow::anyhow!("--url {text:?}: {error}"))?;
    match url.scheme() {
        "http" => Ok(url),
        "https" => Err(anyhow::anyhow!(
            "--url {text:?}: this command line speaks plain http only; run it on the server's host, or through a tunnel"
        )
        .into()),
        _ => Err(anyhow::anyhow!("--url {text:?}: must begin with http://").into()),
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_keeps_its_path() {
        let url = base_url("http://host:1/tiffin").unwrap();
        assert_eq!(url.join("v1/vms").unwrap().as_str(), "http://host:1/tiffin/v1/vms");
    }

    #[test]
    fn a_url_that_cannot_work_is_refused_with_the_reason() {
        for (url, reason) in [("https://host", "plain http"), ("host:3000", "http://"), ("", "URL")] {
            let text = base_url(url).unwrap_err().to_string();
            assert!(text.contains(reason), "{url}: {text}");
        }
    }

    #[test]
    fn a_proxy_is_passed_by_only_on_the_way_to_this_machine() {
        for (url, here) in
            [("http://127.0.0.1:3", true), ("http://[::1]:3", true), ("http://localhost", true), ("http://a.b", false)]
        {
            assert_eq!(is_loopback(&base_url(url).unwrap()), here, "{url}");
        }
    }
}
