//! What the ingress answers itself: which of the ways to fail it was, in words that tell the program's owner what to do.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use serde_json::json;

use crate::{body::ResponseBody, metrics, route::DialError};

/// The header with the request's id, in requests and answers.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header by which an answer of the ingress is told from one of the program's.
const ERROR: HeaderName = HeaderName::from_static("x-tiffin-error");
/// Seconds after which trying again makes sense.
const RETRY_S: u32 = 5;

/// Why a request wasn't passed on, or its answer wasn't.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nobody has that name.
    UnknownHost,
    /// The connection was made for another name.
    Misdirected,
    /// The request makes no sense; says why.
    BadRequest(&'static str),
    /// It asks for a tunnel to anywhere.
    Connect,
    /// Too many headers.
    HeadersTooLarge,
    /// The client sends its body too slowly.
    BodyTimeout,
    /// The VM doesn't run; says what it is.
    NotRunning(String),
    /// Too many connections into the VM.
    Busy,
    /// Nothing listens.
    NotListening,
    /// It can't be reached.
    Unreachable,
    /// No connection in time.
    DialTimeout,
    /// No answer in time.
    AnswerTimeout,
    /// The program closed the connection before it answered.
    Closed,
    /// What it answered isn't HTTP.
    BadAnswer,
    /// It gave no answer to a request that takes HTTP/2.
    NoHttp2,
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::UnknownHost => StatusCode::NOT_FOUND,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Connect => StatusCode::NOT_IMPLEMENTED,
            Self::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::NotRunning(_) | Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotListening | Self::Unreachable | Self::Closed | Self::BadAnswer | Self::NoHttp2 => {
                StatusCode::BAD_GATEWAY
            }
            Self::DialTimeout | Self::AnswerTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Its name for programs.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::UnknownHost => "unknown_host",
            Self::Misdirected => "misdirected",
            Self::BadRequest(_) => "bad_request",
            Self::Connect => "not_implemented",
            Self::HeadersTooLarge => "headers_too_large",
            Self::BodyTimeout => "body_timeout",
            Self::NotRunning(_) => "vm_not_running",
            Self::Busy => "vm_busy",
            Self::NotListening => "not_listening",
            Self::Unreachable => "unreachable",
            Self::DialTimeout => "dial_timeout",
            Self::AnswerTimeout => "answer_timeout",
            Self::Closed => "connection_closed",
            Self::BadAnswer => "bad_answer",
            Self::NoHttp2 => "no_http2",
        }
    }

    fn message(&self) -> String {
        match self {
            Self::UnknownHost => "no program has this name: look at its URL, and whether its VM still exists".into(),
            Self::Misdirected => "this connection was made for another name: open a new one".into(),
            Self::BadRequest(what) => format!("the request has {what}"),
            Self::Connect => "CONNECT is for WebSockets only".into(),
            Self::HeadersTooLarge => "the request has more headers than may be".into(),
            Self::BodyTimeout => "nothing of the request's body came for too long".into(),
            Self::NotRunning(state) => format!("the VM is {state}: start it, or wait until it is RUNNING"),
            Self::Busy => "too many connections into this VM are open: try again".into(),
            Self::NotListening => "nothing listens on this port in the VM (yet): start the program, and have it \
                                   listen on 0.0.0.0, not on 127.0.0.1"
                .into(),
            Self::Unreachable => "the program in the VM can't be reached".into(),
            Self::DialTimeout => "the VM didn't take the connection in time".into(),
            Self::AnswerTimeout => "the program took the request and didn't answer in time".into(),
            Self::Closed => "the program closed the connection before it answered; the request may have been \
                             processed, and was not sent again"
                .into(),
            Self::BadAnswer => "what the program answered is not HTTP".into(),
            Self::NoHttp2 => "the program closed the connection, or doesn't speak HTTP/2 without TLS (h2c), which \
                              gRPC takes"
                .into(),
        }
    }

    /// As an answer, in JSON for who prefers that.
    pub(crate) fn answer(&self, wants_json: bool, request_id: &HeaderValue) -> Response<ResponseBody> {
        metrics::refused(self.code());
        let (message, id) = (self.message(), request_id.to_str().unwrap_or_default());
        let (kind, text) = if wants_json {
            let body = json!({ "message": message, "code": self.code(), "requestId": id });
            ("application/json", body.to_string())
        } else {
            let status = self.status();
            ("text/plain; charset=utf-8", format!("{status}: {message}\n({}, request {id})\n", self.code()))
        };
        let mut response = Response::new(ResponseBody::full(Bytes::from(text)));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(ERROR, HeaderValue::from_static(self.code()));
        if self.status() == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_S));
        }
        response
    }

    /// Whether the connection must not be used for another request: where this one ends is not known.
    pub(crate) fn is_end(&self) -> bool {
        matches!(self, Self::BadRequest(_) | Self::BodyTimeout)
    }
}

impl From<DialError> for Refusal {
    fn from(error: DialError) -> Self {
        match error {
            DialError::NotRunning(state) => Self::NotRunning(state),
            DialError::Refused => Self::NotListening,
            DialError::TimedOut => Self::DialTimeout,
            DialError::Busy => Self::Busy,
            DialError::Failed(source) => {
                tracing::warn!(error = chain(&*source), "a program in a VM can't be reached");
                Self::Unreachable
            }
        }
    }
}

/// Whether a client would rather have JSON than text.
pub(crate) fn wants_json(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepts.flat_map(|accept| accept.split(',')).any(|one| {
        let kind = one.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case("application/json")
    })
}

/// An error's text and its sources'.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
