//! Which headers are passed on.
//!
//! Invariants: what concerns one connection stays on it; how a body is framed is said by whoever frames it; what a program
//! reads of its client's address and scheme is what the ingress saw, unless clients are trusted with it.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::host::Host;

/// The most headers of a request. (hyper's own bound for HTTP/1.)
pub(crate) const MOST: usize = 100;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");

/// Headers of one connection, besides those that `Connection` names.
const OF_A_CONNECTION: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Takes what concerned the one connection out of a message.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        for name in named_by_connection(headers) {
            headers.remove(name);
        }
    }
    for name in OF_A_CONNECTION {
        headers.remove(name);
    }
}

fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect()
}

/// Whether a header's comma-separated words have one, whatever its case.
pub(crate) fn has_word(headers: &HeaderMap, name: HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|one| one.trim().eq_ignore_ascii_case(word))
}

/// Says whom the request is from, and what it was before it came here.
pub(crate) fn set_forwarded(headers: &mut HeaderMap, peer: IpAddr, host: &Host, trusts: bool) {
    let before = if trusts { joined(headers, &FORWARDED_FOR) } else { None };
    if !trusts {
        drop_claims(headers);
    }
    let chain = match before {
        Some(before) => format!("{before}, {peer}"),
        None => peer.to_string(),
    };
    if let Ok(chain) = HeaderValue::try_from(chain) {
        headers.insert(FORWARDED_FOR, chain);
    }
    if !(trusts && headers.contains_key(&FORWARDED_PROTO)) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("https"));
    }
    if !(trusts && headers.contains_key(&FORWARDED_HOST))
        && let Ok(host) = HeaderValue::from_str(host.authority.as_str())
    {
        headers.insert(FORWARDED_HOST, host);
    }
    if !(trusts && headers.contains_key(&FORWARDED_PORT))
        && let Some(port) = host.authority.port_u16()
    {
        headers.insert(FORWARDED_PORT, HeaderValue::from(port));
    }
}

/// Takes out whatever a program could read as the word of a proxy. `X_Forwarded_For` is the same to those that know
/// headers as variables.
fn drop_claims(headers: &mut HeaderMap) {
    let is_claim = |name: &HeaderName| {
        let name = name.as_str();
        let same = |wanted: &str| {
            name.len() >= wanted.len()
                && name.bytes().zip(wanted.bytes()).all(|(a, b)| a == b || (a == b'_' && b == b'-'))
        };
        same("x-forwarded-") || (name.len() == 9 && same("forwarded")) || (name.len() == 9 && same("x-real-ip"))
    };
    let claims: Vec<HeaderName> = headers.keys().filter(|name| is_claim(name)).cloned().collect();
    for claim in claims {
        headers.remove(claim);
    }
}

fn joined(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let values: Vec<&str> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    (!values.is_empty()).then(|| values.join(", "))
}

/// HTTP/2 may say its cookies one by one; HTTP/1 says them all at once.
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(all) = HeaderValue::from_bytes(&cookies.join(&b"; "[..])) {
        headers.insert(header::COOKIE, all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn host() -> Host {
        Host { authority: "a.vm.localhost:3443".parse().unwrap(), name: "a.vm.localhost".into() }
    }

    #[test]
    fn what_concerns_one_connection_is_not_passed_on() {
        let mut given = headers(&[
            ("connection", "keep-alive, X-Secret"),
            ("keep-alive", "timeout=5"),
            ("x-secret", "1"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA"),
            ("proxy-connection", "keep-alive"),
            ("accept", "*/*"),
        ]);
        strip_hop_by_hop(&mut given);
        assert_eq!(given, headers(&[("accept", "*/*")]));
    }

    #[test]
    fn what_a_stranger_says_of_whom_it_speaks_for_is_replaced() {
        let mut given = headers(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-for", "5.6.7.8"),
            ("x_forwarded_for", "1.2.3.4"),
            ("x-forwarded-prefix", "/x"),
            ("forwarded", "for=1.2.3.4"),
            ("x-real-ip", "1.2.3.4"),
            ("x-forwarded", "kept: nobody reads it"),
        ]);
        set_forwarded(&mut given, "192.0.2.7".parse().unwrap(), &host(), false);
        let expected = headers(&[
            ("x-forwarded", "kept: nobody reads it"),
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a.vm.localhost:3443"),
            ("x-forwarded-port", "3443"),
        ]);
        assert_eq!(given, expected);
    }

    #[test]
    fn a_trusted_proxys_word_is_continued() {
        let mut given = headers(&[("x-forwarded-for", "1.2.3.4"), ("x-forwarded-host", "outside.example")]);
        set_forwarded(&mut given, "192.0.2.7".parse().unwrap(), &host(), true);
        assert_eq!(given["x-forwarded-for"], "1.2.3.4, 192.0.2.7");
        assert_eq!(given["x-forwarded-host"], "outside.example");
        assert_eq!(given["x-forwarded-proto"], "https");
    }

    #[test]
    fn cookies_are_joined_as_http_1_has_them() {
        let mut given = headers(&[("cookie", "a=1"), ("cookie", "b=2")]);
        join_cookies(&mut given);
        assert_eq!(given, headers(&[("cookie", "a=1; b=2")]));
    }
}
