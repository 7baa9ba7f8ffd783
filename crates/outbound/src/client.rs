//! One request, one answer, whose body is read piece by piece.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body::Body as _;
use http_body_util::Full;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use url::{Position, Url};

use crate::{OutboundError, Policy, Resolve, Roots, SystemResolver, connect};

/// What the head of an answer may come to.
const HEAD_BYTES: usize = 64 << 10;

/// Sends requests as far as its policy lets it.
pub struct Client {
    policy: Policy,
    roots: Roots,
    resolver: Arc<dyn Resolve>,
    connect_limit: Duration,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// Where.
    pub url: Url,
    /// Its headers; `Host` and `Content-Length` are added.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

/// An answer, whose body has yet to be read.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Body,
}

/// A body that comes. Dropping it closes the connection.
pub struct Body {
    incoming: Incoming,
    connection: Option<Connection>,
}

type Connection = Pin<Box<dyn Future<Output = Result<(), hyper::Error>> + Send>>;

impl Client {
    /// A client that has `connect_limit` to resolve, to connect and to agree on TLS.
    pub fn new(policy: Policy, roots: Roots, connect_limit: Duration) -> Self {
        Self { policy, roots, resolver: Arc::new(SystemResolver), connect_limit }
    }

    /// The same with another resolver.
    #[must_use]
    pub fn with_resolver(self, resolver: impl Resolve + 'static) -> Self {
        Self { resolver: Arc::new(resolver), ..self }
    }

    /// Where it may connect to.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Sends a request and waits for the answer's head. How long that may take is for the caller to bound
    /// (`tokio::time::timeout`); dropping the future closes the connection.
    ///
    /// # Errors
    /// When the policy forbids it, nobody answers, or what answers isn't HTTP.
    pub async fn send(&self, request: Request) -> Result<Answer, OutboundError> {
        let url = request.url.clone();
        let connecting = async {
            let stream = connect::connect(&self.policy, &*self.resolver, &url, self.connect_limit).await?;
            Ok::<_, OutboundError>(if url.scheme() == "https" {
                Stream::Tls(Box::new(self.roots.shake_hands(&url, stream).await?))
            } else {
                Stream::Plain(stream)
            })
        };
        let stream = tokio::time::timeout(self.connect_limit, connecting)
            .await
            .map_err(|_| OutboundError::ConnectTimeout(self.connect_limit))??;
        match stream {
            Stream::Plain(stream) => exchange(stream, request).await,
            Stream::Tls(stream) => exchange(stream, request).await,
        }
    }
}

enum Stream {
    Plain(tokio::net::TcpStream),
    Tls(Box<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>),
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request,
) -> Result<Answer, OutboundError> {
    let request = to_http(request)?;
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_BYTES)
        .handshake::<_, Full<Bytes>>(TokioIo::new(stream))
        .await
        .map_err(OutboundError::Http)?;
    let mut connection: Option<Connection> = Some(Box::pin(connection));
    let mut answering = Box::pin(sender.send_request(request));
    let answer = poll_fn(|context| {
        drive(&mut connection, context);
        answering.as_mut().poll(context)
    })
    .await
    .map_err(OutboundError::Http)?;
    let (head, incoming) = answer.into_parts();
    Ok(Answer { status: head.status, headers: head.headers, body: Body { incoming, connection } })
}

/// Lets a connection do its work. How it ended shows in the exchange itself.
fn drive(connection: &mut Option<Connection>, context: &mut std::task::Context<'_>) {
    if connection.as_mut().is_some_and(|working| working.as_mut().poll(context).is_ready()) {
        *connection = None;
    }
}

fn to_http(request: Request) -> Result<http::Request<Full<Bytes>>, OutboundError> {
    let Request { method, url, mut headers, body } = request;
    let refuse = |error: &dyn fmt::Display| OutboundError::Request(error.to_string());
    let host =
        HeaderValue::from_str(&url[Position::BeforeHost..Position::AfterPort]).map_err(|error| refuse(&error))?;
    headers.insert(header::HOST, host);
    let mut made = http::Request::builder()
        .method(method)
        .uri(&url[Position::BeforePath..Position::AfterQuery])
        .body(Full::new(body))
        .map_err(|error| refuse(&error))?;
    *made.headers_mut() = headers;
    Ok(made)
}

impl Body {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Bytes, OutboundError>> {
        loop {
            let frame = poll_fn(|context| {
                drive(&mut self.connection, context);
                Pin::new(&mut self.incoming).poll_frame(context)
            })
            .await?;
            match frame.map_err(OutboundError::Http) {
                // Trailers say nothing here.
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(Ok(data)),
                    Err(_) => continue,
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// All of it, if it is no more than `limit` bytes.
    ///
    /// # Errors
    /// When it is more, or breaks off.
    pub async fn read(mut self, limit: usize) -> Result<Vec<u8>, OutboundError> {
        let mut read = Vec::new();
        while let Some(piece) = self.next().await {
            let piece = piece?;
            if read.len() + piece.len() > limit {
                return Err(OutboundError::TooLarge(limit));
            }
            read.extend_from_slice(&piece);
        }
        Ok(read)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Body")
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("policy", &self.policy).finish_non_exhaustive()
    }
}
