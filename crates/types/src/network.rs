//! What a VM may reach outside: the policy as the API takes it, and the rule that it stands for.
//!
//! The rule, in one sentence: a destination is reachable when some entry of `allowIps` contains it and, if it lies in
//! a guarded range (loopback, link-local with the metadata services, private, carrier-grade, multicast, ...), some
//! entry that contains it lies wholly inside that range. So `0.0.0.0/0` opens the public internet alone, and a private
//! network has to be named. The host's own addresses need an entry of exactly that address (`/32` or `/128`); who
//! knows the host's addresses enforces that (the engine's host layer).

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What a VM may reach outside. Without `outbound_internet`, nothing; with it, what `allow` lists; an empty list is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressPolicy {
    /// Whether anything at all may leave.
    pub outbound_internet: bool,
    /// Destinations, as networks.
    pub allow: Vec<IpNet>,
}

/// The ranges that a wider entry never opens. Source: IANA's special-purpose address registries (RFC 6890 and later
/// entries), and multicast and the former class E.
pub const GUARDED: [&str; 28] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/128",
    "::1/128",
    "::ffff:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/23",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "fc00::/7",
    "fe80::/10",
    "ff00::/8",
];

/// Ranges that no entry opens, named or not: they mean the guest itself or nobody.
pub const NEVER: [&str; 6] = ["0.0.0.0/8", "127.0.0.0/8", "255.255.255.255/32", "::/128", "::1/128", "::ffff:0:0/96"];

impl EgressPolicy {
    /// Whether anything at all is reachable; decides whether DNS works.
    pub fn allows_something(&self) -> bool {
        self.outbound_internet && !self.allow.is_empty()
    }

    /// Whether `to` is reachable by this policy, the host's own addresses aside. The reference that the packet
    /// filter's rules are tested against.
    pub fn allows(&self, to: IpAddr) -> bool {
        if !self.outbound_internet || never().any(|net| net.contains(&to)) {
            return false;
        }
        let guard: Vec<IpNet> = guarded().filter(|net| net.contains(&to)).collect();
        self.allow.iter().any(|entry| entry.contains(&to) && guard.iter().all(|range| range.contains(entry)))
    }

    /// The entries that lie wholly inside a guarded range: they open (their part of) that range.
    pub fn named(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.allow.iter().copied().filter(|entry| guarded().any(|range| range.contains(entry)))
    }

    /// The entries that reach beyond the guarded ranges: they open what they contain of the public internet.
    pub fn public(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.allow.iter().copied().filter(|entry| !guarded().any(|range| range.contains(entry)))
    }
}

/// [`GUARDED`], parsed.
pub fn guarded() -> impl Iterator<Item = IpNet> {
    GUARDED.iter().map(|net| net.parse().expect("GUARDED holds networks"))
}

/// [`NEVER`], parsed.
pub fn never() -> impl Iterator<Item = IpNet> {
    NEVER.iter().map(|net| net.parse().expect("NEVER holds networks"))
}

/// Reads one entry of `allowIps`: a network in CIDR notation, or a bare address. Host bits are cleared.
///
/// # Errors
/// When the text is neither, with the remedy.
pub fn parse_allow_entry(text: &str) -> Result<IpNet, AllowEntryError> {
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => IpNet::from(text.parse::<IpAddr>().map_err(|_| AllowEntryError)?),
    };
    Ok(net.trunc())
}

/// An entry of `allowIps` is no network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a network in CIDR notation, such as 203.0.113.0/24 or 2001:db8::/32")]
pub struct AllowEntryError;

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(entries: &[&str]) -> EgressPolicy {
        EgressPolicy { outbound_internet: true, allow: entries.iter().map(|e| parse_allow_entry(e).unwrap()).collect() }
    }

    fn reaches(entries: &[&str], to: &str) -> bool {
        policy(entries).allows(to.parse().unwrap())
    }

    #[test]
    fn nothing_listed_is_nothing_reachable() {
        assert!(!reaches(&[], "8.8.8.8"));
        assert!(
            !EgressPolicy { outbound_internet: false, ..policy(&["0.0.0.0/0"]) }.allows("8.8.8.8".parse().unwrap())
        );
    }

    #[test]
    fn the_whole_internet_is_not_the_private_networks() {
        for private in ["10.1.2.3", "169.254.169.254", "192.168.0.1", "100.100.100.200", "127.0.0.1", "172.16.0.1"] {
            assert!(!reaches(&["0.0.0.0/0"], private), "{private}");
            assert!(!reaches(&["0.0.0.0/1", "128.0.0.0/1"], private), "{private}");
        }
        for private in ["fd00:ec2::254", "fe80::1", "::1", "::ffff:10.0.0.1"] {
            assert!(!reaches(&["::/0"], private), "{private}");
        }
        assert!(reaches(&["0.0.0.0/0"], "8.8.8.8"));
        assert!(reaches(&["::/0"], "2606:4700::1111"));
        assert!(!reaches(&["0.0.0.0/0"], "2606:4700::1111"));
    }

    #[test]
    fn a_private_network_opens_when_named() {
        assert!(reaches(&["10.1.0.0/16"], "10.1.2.3"));
        assert!(!reaches(&["10.1.0.0/16"], "10.2.2.3"));
        assert!(reaches(&["0.0.0.0/0", "10.1.0.0/16"], "10.1.2.3"));
        assert!(reaches(&["169.254.169.254/32"], "169.254.169.254"));
        assert!(!reaches(&["127.0.0.0/8"], "127.0.0.1"), "the guest's own");
    }

    #[test]
    fn bare_addresses_and_host_bits_are_taken() {
        assert_eq!(parse_allow_entry("192.0.2.7").unwrap().to_string(), "192.0.2.7/32");
        assert_eq!(parse_allow_entry("192.0.2.7/24").unwrap().to_string(), "192.0.2.0/24");
        assert!(parse_allow_entry("example.com").is_err());
        assert!(parse_allow_entry("1.2.3.4/33").is_err());
    }
}
