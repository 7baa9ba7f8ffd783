//! From a client's request to the one that a program gets.

use http::{
    HeaderMap, HeaderValue, Method, Request, Uri, Version, header, request::Parts, uri::PathAndQuery, uri::Scheme,
};
use hyper::{
    body::{Body, Incoming},
    ext::Protocol,
};
use rand::RngExt;

use super::is_extended_connect;
use crate::{
    answer::Refusal,
    headers::{MOST, has_word, join_cookies, strip_hop_by_hop},
    host::Host,
};

/// How a request is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One request of HTTP/1.1, one answer.
    Plain,
    /// A stream of HTTP/2.
    Grpc,
    /// HTTP/1.1 until both agree.
    WebSocket,
}

impl Kind {
    /// What a request is, if it is fit to be passed on.
    pub(super) fn of(request: &Request<Incoming>) -> Result<Self, Refusal> {
        let headers = request.headers();
        if headers.len() > MOST {
            return Err(Refusal::HeadersTooLarge);
        }
        if request.method() == Method::CONNECT {
            return if is_extended_connect(request) { Ok(Self::WebSocket) } else { Err(Refusal::Connect) };
        }
        if asks_for_websocket(request) {
            return Ok(Self::WebSocket);
        }
        if request.version() == Version::HTTP_2 && is_grpc(headers) {
            return Ok(Self::Grpc);
        }
        Ok(Self::Plain)
    }
}

/// An upgrade of HTTP/1.1. No other protocol is passed on: h2c would hide requests from the ingress.
fn asks_for_websocket(request: &Request<Incoming>) -> bool {
    let headers = request.headers();
    request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && request.body().is_end_stream()
        && has_word(headers, header::CONNECTION, "upgrade")
        && has_word(headers, header::UPGRADE, "websocket")
}

/// gRPC itself. gRPC-Web is made for HTTP/1.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let rest = kind.and_then(|kind| kind.strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| rest.first().is_none_or(|next| matches!(next, b'+' | b';' | b' ')))
}

/// Makes a client's request the program's, body and `X-Forwarded-*` aside.
pub(super) fn prepare(head: &mut Parts, kind: Kind, host: &Host) -> Result<(), Refusal> {
    let wants_trailers = has_word(&head.headers, header::TE, "trailers");
    strip_hop_by_hop(&mut head.headers);
    // The ingress itself tells the client to go on, once the program reads.
    head.headers.remove(header::EXPECT);
    head.headers.remove(header::HOST);
    if let Some(length) = head.headers.get(header::CONTENT_LENGTH).cloned() {
        // Of several, which are equal, one.
        head.headers.insert(header::CONTENT_LENGTH, length);
    }
    let path = head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    match kind {
        Kind::Grpc => {
            let uri = Uri::builder().scheme(Scheme::HTTP).authority(host.authority.clone()).path_and_query(path);
            head.uri = uri.build().map_err(|_| Refusal::BadRequest("a bad path"))?;
            if wants_trailers {
                head.headers.insert(header::TE, HeaderValue::from_static("trailers"));
            }
            return Ok(());
        }
        Kind::Plain => {}
        Kind::WebSocket => upgrade(head)?,
    }
    head.uri = Uri::from(path);
    join_cookies(&mut head.headers);
    let host = HeaderValue::from_str(host.authority.as_str()).map_err(|_| Refusal::BadRequest("a bad Host"))?;
    head.headers.insert(header::HOST, host);
    Ok(())
}

/// Asks the program for a WebSocket as HTTP/1.1 does.
fn upgrade(head: &mut Parts) -> Result<(), Refusal> {
    head.headers.remove(header::CONTENT_LENGTH);
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    head.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if head.method == Method::CONNECT {
        head.method = Method::GET;
        let key: [u8; 16] = rand::rng().random();
        let key = HeaderValue::from_str(&base64(&key)).map_err(|_| Refusal::BadRequest("a bad key"))?;
        head.headers.insert(header::SEC_WEBSOCKET_KEY, key);
    }
    Ok(())
}

/// The head as it is sent: the version is the connection's, and what the client's connection noted on it stays there.
pub(super) fn fresh(mut head: Parts) -> Parts {
    head.version = Version::default();
    head.extensions.remove::<Protocol>();
    head.extensions.clear();
    head
}

/// RFC 4648 with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let bits = part.iter().enumerate().fold(0u32, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        for at in 0..4 {
            let digit = char::from(DIGITS[(bits >> (18 - 6 * at) & 63) as usize]);
            text.push(if at <= part.len() { digit } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn grpc_is_told_from_what_only_begins_alike() {
        let with = |kind: &'static str| HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
        for kind in ["application/grpc", "application/grpc+proto", "application/grpc;x=1"] {
            assert!(is_grpc(&with(kind)), "{kind}");
        }
        for kind in ["application/grpc-web", "application/grpc-web+proto", "application/json"] {
            assert!(!is_grpc(&with(kind)), "{kind}");
        }
    }
}
