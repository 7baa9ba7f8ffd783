//! Where connections may lead: the public internet, and what the configuration names besides.

use std::net::IpAddr;

use ipnet::IpNet;
use tiffin_types::network::guarded;
use url::{Host, Url};

/// A service of a cloud that every VM there reaches, on an address that looks public.
const METADATA: [IpAddr; 1] = [IpAddr::V4(std::net::Ipv4Addr::new(168, 63, 129, 16))];

/// What may be connected to.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Whether plain HTTP is fine.
    pub allow_http: bool,
    /// Networks that may be connected to although they are guarded, or the host's own.
    pub allow: Vec<IpNet>,
}

/// A URL or an address that isn't to be connected to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Neither https nor, where that is allowed, http.
    #[error("must be an https URL{}", if *.http_too { " or an http URL" } else { "" })]
    Scheme {
        /// Whether http would have been fine.
        http_too: bool,
    },
    /// No host.
    #[error("must be a URL with a host")]
    NoHost,
    /// A user or a password in the URL.
    #[error("must be a URL without a user and a password")]
    Credentials,
    /// The host is an address, or has only addresses, that isn't public.
    #[error(
        "leads to an address that isn't public ({0}): private, loopback, link-local and other special addresses, and the server's own, are refused unless the server's configuration allows them"
    )]
    Address(Host),
}

impl Policy {
    /// Judges what can be judged without a resolver: scheme, credentials, and a host that is an address.
    ///
    /// # Errors
    /// What is wrong with it; the texts follow a field's name well.
    pub fn check_url(&self, url: &Url) -> Result<(), Refused> {
        let scheme_is_fine = url.scheme() == "https" || (self.allow_http && url.scheme() == "http");
        if !scheme_is_fine {
            return Err(Refused::Scheme { http_too: self.allow_http });
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Refused::Credentials);
        }
        let host = url.host().ok_or(Refused::NoHost)?.to_owned();
        let address = match &host {
            Host::Domain(name) if name.trim_matches('.').is_empty() => return Err(Refused::NoHost),
            Host::Domain(_) => return Ok(()),
            Host::Ipv4(address) => IpAddr::V4(*address),
            Host::Ipv6(address) => IpAddr::V6(*address),
        };
        if self.allows(address, &own_addresses()) { Ok(()) } else { Err(Refused::Address(host)) }
    }

    /// Whether `address` may be connected to, from a host that has the addresses `own`.
    pub(crate) fn allows(&self, address: IpAddr, own: &[IpAddr]) -> bool {
        // An IPv4 address in IPv6's clothes leads where the IPv4 address does.
        let address = address.to_canonical();
        self.allow.iter().any(|net| net.contains(&address)) || (is_public(address) && !own.contains(&address))
    }
}

/// Whether it is somewhere on the internet, the same for everybody.
fn is_public(address: IpAddr) -> bool {
    // What isn't given out yet (everything but 2000::/3) is nobody's public address.
    let is_unicast = match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => address.segments()[0] & 0xe000 == 0x2000,
    };
    is_unicast && !METADATA.contains(&address) && !guarded().any(|net| net.contains(&address))
}

/// The addresses of this host's interfaces: services on them may rely on nobody outside reaching them.
pub(crate) fn own_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let address_of = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    interfaces.filter_map(|interface| interface.address.and_then(address_of)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(policy: &Policy, url: &str) -> Result<(), Refused> {
        policy.check_url(&url.parse().unwrap())
    }

    #[test]
    fn what_is_special_is_refused_in_every_notation() {
        for host in [
            "127.0.0.1",
            "127.1",
            "0x7f.1",
            "2130706433",
            "017700000001",
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.100.100.200",
            "169.254.169.254",
            "172.31.255.255",
            "192.0.0.192",
            "192.168.0.1",
            "198.18.0.1",
            "203.0.113.7",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "168.63.129.16",
            "[::]",
            "[::1]",
            "[::127.0.0.1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::a9fe:a9fe]",
            "[64:ff9b:1::1]",
            "[2002:7f00:1::]",
            "[2001::1]",
            "[2001:db8::1]",
            "[3fff::1]",
            "[100::1]",
            "[4000::1]",
            "[fd00:ec2::254]",
            "[fe80::1]",
            "[ff02::1]",
        ] {
            let refused = check(&Policy::default(), &format!("https://{host}/hook"));
            assert!(matches!(refused, Err(Refused::Address(_))), "{host}: {refused:?}");
        }
    }

    #[test]
    fn the_public_internet_is_open() {
        for host in ["example.com", "8.8.8.8", "[2606:4700::1111]", "[::ffff:8.8.8.8]", "100.128.0.1", "172.32.0.1"] {
            assert_eq!(check(&Policy::default(), &format!("https://{host}:8443/x?y=z")), Ok(()), "{host}");
        }
    }

    #[test]
    fn what_the_configuration_names_is_open_and_its_neighbours_are_not() {
        let policy =
            Policy { allow_http: true, allow: vec!["10.1.0.0/16".parse().unwrap(), "::1/128".parse().unwrap()] };
        for open in ["http://10.1.2.3/", "https://[::ffff:10.1.2.3]/", "http://[::1]:8080/"] {
            assert_eq!(check(&policy, open), Ok(()), "{open}");
        }
        for closed in ["http://10.2.0.1/", "http://127.0.0.1/"] {
            assert!(check(&policy, closed).is_err(), "{closed}");
        }
    }

    #[test]
    fn the_hosts_own_addresses_are_closed_unless_named() {
        let own = ["8.8.8.8".parse().unwrap()];
        assert!(!Policy::default().allows(own[0], &own));
        assert!(Policy { allow: vec!["8.8.8.8/32".parse().unwrap()], ..Policy::default() }.allows(own[0], &own));
        assert!(own_addresses().contains(&IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)));
    }

    #[test]
    fn other_schemes_and_credentials_are_refused() {
        let https = Policy::default();
        assert_eq!(check(&https, "http://example.com/"), Err(Refused::Scheme { http_too: false }));
        assert_eq!(check(&https, "file:///etc/passwd"), Err(Refused::Scheme { http_too: false }));
        assert_eq!(check(&https, "gopher://example.com/"), Err(Refused::Scheme { http_too: false }));
        assert_eq!(check(&https, "https://user@example.com/"), Err(Refused::Credentials));
        assert_eq!(check(&https, "https://:secret@example.com/"), Err(Refused::Credentials));
        assert_eq!(check(&https, "https://./"), Err(Refused::NoHost));
        let http = Policy { allow_http: true, ..https };
        assert_eq!(check(&http, "http://example.com/"), Ok(()));
    }
}
