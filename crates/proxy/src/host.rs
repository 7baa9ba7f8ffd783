//! Whom a request is for.
//!
//! Invariant: a request that names its host in two ways that differ, or on a connection that was made for another name, is
//! refused: what one party takes for the host, so does the next.

use http::{HeaderMap, Uri, header, uri::Authority};

use crate::answer::Refusal;

/// The host that a request names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// As the client wrote it, port included.
    pub(crate) authority: Authority,
    /// Lower case, without port and without a dot at the end.
    pub(crate) name: String,
}

impl Host {
    /// The host of a request on a connection that was made for `sni`.
    pub(crate) fn of(uri: &Uri, headers: &HeaderMap, sni: Option<&str>) -> Result<Self, Refusal> {
        let mut given = headers.get_all(header::HOST).iter();
        let (host, more) = (given.next(), given.next());
        if more.is_some() {
            return Err(Refusal::BadRequest("more than one Host"));
        }
        let host = match host {
            None => None,
            Some(value) => Some(Authority::try_from(value.as_bytes()).map_err(|_| Refusal::BadRequest("a bad Host"))?),
        };
        let authority = match (uri.authority(), host) {
            (Some(target), Some(host)) if !target.as_str().eq_ignore_ascii_case(host.as_str()) => {
                return Err(Refusal::BadRequest("a Host that differs from the request's target"));
            }
            (Some(target), _) => target.clone(),
            (None, Some(host)) => host,
            (None, None) => return Err(Refusal::BadRequest("no Host")),
        };
        if authority.as_str().contains('@') {
            return Err(Refusal::BadRequest("a user in the host"));
        }
        let name = without_dot(authority.host());
        if sni.is_some_and(|sni| !without_dot(sni).eq_ignore_ascii_case(name)) {
            return Err(Refusal::Misdirected);
        }
        let name = name.to_ascii_lowercase();
        Ok(Self { authority, name })
    }
}

fn without_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn host(uri: &str, hosts: &[&str], sni: Option<&str>) -> Result<String, Refusal> {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(header::HOST, HeaderValue::from_str(host).unwrap());
        }
        Host::of(&uri.parse().unwrap(), &headers, sni).map(|host| host.name)
    }

    #[test]
    fn a_host_is_found_however_it_is_written() {
        for (uri, hosts) in [
            ("/", &["a.vm.localhost"][..]),
            ("/x", &["A.VM.localhost:3443"]),
            ("/", &["a.vm.localhost."]),
            ("https://a.vm.localhost/", &[]),
            ("https://a.vm.localhost/", &["A.vm.localhost"]),
        ] {
            assert_eq!(host(uri, hosts, Some("a.vm.localhost")).unwrap(), "a.vm.localhost");
        }
    }

    #[test]
    fn a_host_that_is_missing_double_contradictory_or_odd_is_refused() {
        for (uri, hosts) in [
            ("/", &[][..]),
            ("/", &["a", "a"]),
            ("/", &["a b"]),
            ("/", &["user@a"]),
            ("/", &[""]),
            ("https://a/", &["b"]),
        ] {
            assert!(matches!(host(uri, hosts, None), Err(Refusal::BadRequest(_))), "{uri} {hosts:?}");
        }
    }

    #[test]
    fn a_connection_that_was_made_for_another_name_is_the_wrong_one() {
        assert_eq!(host("/", &["b"], Some("a")), Err(Refusal::Misdirected));
        assert_eq!(host("/", &["a"], Some("A.")).unwrap(), "a");
        assert_eq!(host("/", &["a"], None).unwrap(), "a");
    }
}
