//! The packet filters, as nftables rules: one set of rules in each VM's gateway, one table on the host.
//!
//! Fail closed: every chain of a gateway drops what no rule accepts, and the rules stand before the guest runs. The host's
//! table is the second fence: whatever a gateway lets through by mistake still can't reach the host itself or another VM.

use std::{collections::BTreeSet, fmt::Write, net::IpAddr, process::Command};

use ipnet::{IpNet, Ipv4Net};
use tiffin_types::{
    id::VmId,
    network::{EgressPolicy, guarded, never},
};

use super::{
    network::{GATEWAY_LINK, GUEST_V4, GUEST_V6, UPLINK, host_link},
    process::{self, ToolError},
};

/// The netlink group that denied packets are copied to, in the gateway's namespace.
pub const DENIED_GROUP: u16 = 1;

/// The host's table.
const HOST_TABLE: &str = "tiffin";

/// What the egress chain of a gateway looks up, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sets {
    never: BTreeSet<IpNet>,
    named: BTreeSet<IpNet>,
    guarded: BTreeSet<IpNet>,
    public: BTreeSet<IpNet>,
}

impl Sets {
    /// The host's own addresses are guarded one by one: only an entry of exactly that address opens one.
    fn new(policy: &EgressPolicy, host: &[IpAddr]) -> Self {
        let mut sets = Self {
            never: never().collect(),
            named: BTreeSet::new(),
            guarded: guarded().collect(),
            public: BTreeSet::new(),
        };
        if policy.outbound_internet {
            sets.named.extend(policy.named());
            sets.public.extend(policy.public().flat_map(halves));
        }
        for address in host.iter().copied().map(IpNet::from) {
            if policy.outbound_internet && policy.allow.contains(&address) {
                sets.named.insert(address);
            } else {
                sets.never.insert(address);
            }
        }
        sets
    }
}

/// The whole of an address family as its two halves: sets of intervals don't take a prefix of length 0.
fn halves(net: IpNet) -> Vec<IpNet> {
    match (net, net.prefix_len()) {
        (IpNet::V4(_), 0) => ["0.0.0.0/1", "128.0.0.0/1"].map(|half| half.parse().expect("a network")).to_vec(),
        (IpNet::V6(_), 0) => ["::/1", "8000::/1"].map(|half| half.parse().expect("a network")).to_vec(),
        _ => vec![net],
    }
}

/// The rules of a gateway. `host` are the host's own addresses. Every packet is judged by the policy, that of an open
/// connection too, in both directions: so a policy that changes changes what is open. What a guest still sends on connections to
/// the gateway that it was saved with is answered by a reset, and is no denied attempt.
pub fn gateway_rules(policy: &EgressPolicy, host: &[IpAddr]) -> String {
    let sets = Sets::new(policy, host);
    let mut rules = String::from("table inet tiffin {\n");
    for (name, nets) in
        [("never", &sets.never), ("named", &sets.named), ("guarded", &sets.guarded), ("public", &sets.public)]
    {
        for (family, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
            let elements: Vec<String> = nets
                .iter()
                .filter(|net| matches!((net, family), (IpNet::V4(_), 4) | (IpNet::V6(_), 6)))
                .map(ToString::to_string)
                .collect();
            let _ = writeln!(rules, " set {name}{family} {{ type {kind}; flags interval; auto-merge;");
            if !elements.is_empty() {
                let _ = writeln!(rules, "  elements = {{ {} }}", elements.join(", "));
            }
            rules += " }\n";
        }
    }
    let dns = if policy.allows_something() {
        format!("  iifname {GATEWAY_LINK} udp dport 53 accept\n  iifname {GATEWAY_LINK} tcp dport 53 accept\n")
    } else {
        String::new()
    };
    let _ = write!(
        rules,
        " chain denied {{
  limit rate 50/second burst 100 packets log group {DENIED_GROUP} snaplen 128
  counter
  meta l4proto tcp reject with tcp reset
  limit rate 50/second burst 100 packets reject with icmpx type admin-prohibited
  drop
 }}
 chain egress {{
  ip daddr @never4 goto denied
  ip6 daddr @never6 goto denied
  ip daddr @named4 accept
  ip6 daddr @named6 accept
  ip daddr @guarded4 goto denied
  ip6 daddr @guarded6 goto denied
  ip daddr @public4 accept
  ip6 daddr @public6 accept
  goto denied
 }}
 chain ingress {{
  ct state related accept
  ct state != established drop
  ip saddr @never4 drop
  ip6 saddr @never6 drop
  ip saddr @named4 accept
  ip6 saddr @named6 accept
  ip saddr @guarded4 drop
  ip6 saddr @guarded6 drop
  ip saddr @public4 accept
  ip6 saddr @public6 accept
 }}
 chain input {{
  type filter hook input priority filter; policy drop;
  iifname lo accept
  ct state established,related ct direction reply accept
  icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
  icmpv6 type {{ nd-router-solicit, mld-listener-report, mld2-listener-report, mld-listener-done }} drop
  iifname {GATEWAY_LINK} ip saddr != {GUEST_V4} drop
  iifname {GATEWAY_LINK} ip6 saddr != {GUEST_V6} drop
{dns}  iifname {GATEWAY_LINK} icmp type echo-request accept
  iifname {GATEWAY_LINK} icmpv6 type echo-request accept
  iifname {GATEWAY_LINK} tcp flags & (fin | syn | rst | ack) != syn reject with tcp reset
  iifname {GATEWAY_LINK} goto denied
 }}
 chain forward {{
  type filter hook forward priority filter; policy drop;
  iifname {UPLINK} goto ingress
  iifname {GATEWAY_LINK} ip saddr != {GUEST_V4} goto denied
  iifname {GATEWAY_LINK} ip6 saddr != {GUEST_V6} goto denied
  iifname {GATEWAY_LINK} ct state new limit rate over 200/second burst 1000 packets drop
  iifname {GATEWAY_LINK} oifname {UPLINK} goto egress
  iifname {GATEWAY_LINK} goto denied
 }}
 chain postrouting {{
  type nat hook postrouting priority srcnat; policy accept;
  oifname {UPLINK} masquerade
 }}
}}
"
    );
    rules
}

/// The host's table: VMs reach neither the host nor each other, their packets leave under the host's address, and
/// nothing but answers comes to them. `uplinks` is the range of the links' addresses.
fn host_rules(uplinks: Ipv4Net) -> String {
    format!(
        "table inet {HOST_TABLE} {{
 set host_allowed4 {{ type ifname . ipv4_addr; }}
 set host_allowed6 {{ type ifname . ipv6_addr; }}
 chain from_vm {{
  ct state established,related accept
  icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
  iifname . ip daddr @host_allowed4 accept
  iifname . ip6 daddr @host_allowed6 accept
  drop
 }}
 chain input {{
  type filter hook input priority filter - 10; policy accept;
  iifname \"tf*\" goto from_vm
 }}
 chain forward {{
  type filter hook forward priority filter - 10; policy accept;
  iifname \"tf*\" oifname \"tf*\" drop
  oifname \"tf*\" ct state established,related accept
  oifname \"tf*\" drop
 }}
 chain postrouting {{
  type nat hook postrouting priority srcnat; policy accept;
  oifname \"tf*\" accept
  ip saddr {uplinks} masquerade
  ip6 saddr fd74:6966:666a::/48 masquerade
 }}
}}
"
    )
}

/// Puts a gateway's rules in force, in the calling thread's namespace, in place of those that were: in one transaction.
///
/// # Errors
/// What `nft` said.
pub fn apply_gateway(policy: &EgressPolicy, host: &[IpAddr]) -> Result<(), ToolError> {
    // `add` first makes the `delete` succeed whether or not the table was there.
    nft(&format!("add table inet tiffin\ndelete table inet tiffin\n{}", gateway_rules(policy, host))).map(drop)
}

/// Puts the host's table in force in the calling thread's namespace, in place of the rules that an earlier server left.
/// What its sets hold for running VMs stays.
///
/// # Errors
/// What `nft` said.
pub fn apply_host(uplinks: Ipv4Net) -> Result<(), ToolError> {
    // In one transaction, so that there is no moment without rules; the sets keep what VMs that run have in them.
    nft(&format!("add table inet {HOST_TABLE}\nflush table inet {HOST_TABLE}\n{}", host_rules(uplinks))).map(drop)
}

/// Puts the host's table in force again if something has taken it away: reloading a host's firewall mostly begins by
/// flushing everything.
///
/// # Errors
/// What `nft` said.
pub fn ensure_host(uplinks: Ipv4Net) -> Result<(), ToolError> {
    if nft(&format!("list table inet {HOST_TABLE}")).is_ok() { Ok(()) } else { apply_host(uplinks) }
}

/// Removes the host's table; absent is fine.
///
/// # Errors
/// What `nft` said.
pub fn remove_host() -> Result<(), ToolError> {
    // `add` first makes the `delete` succeed whether or not the table was there.
    nft(&format!("add table inet {HOST_TABLE}\ndelete table inet {HOST_TABLE}\n")).map(drop)
}

/// Lets the VM reach those of the host's own addresses that its policy names exactly.
///
/// # Errors
/// What `nft` said.
pub fn open_host(id: &VmId, policy: &EgressPolicy) -> Result<(), ToolError> {
    change_host("add", id, policy)
}

/// Takes back what [`open_host`] opened; nothing there is fine.
///
/// # Errors
/// What `nft` said.
pub fn close_host(id: &VmId, policy: &EgressPolicy) -> Result<(), ToolError> {
    // `add` first makes the `delete` succeed whether or not the entry was there.
    change_host("add", id, policy).and_then(|()| change_host("delete", id, policy))
}

/// Takes back all that [`open_host`] ever opened for the VM, where the host's table is there.
///
/// # Errors
/// What `nft` said.
pub fn close_host_wholly(id: &VmId) -> Result<(), ToolError> {
    let mut script = String::new();
    for set in ["host_allowed4", "host_allowed6"] {
        let listed = nft(&format!("list set inet {HOST_TABLE} {set}")).unwrap_or_default();
        for entry in entries_of(&listed, &host_link(id)) {
            let _ = writeln!(script, "delete element inet {HOST_TABLE} {set} {{ {entry} }}");
        }
    }
    if script.is_empty() { Ok(()) } else { nft(&script).map(drop) }
}

/// The entries of a listed set that begin with `link`.
fn entries_of<'a>(listed: &'a str, link: &str) -> Vec<&'a str> {
    let beginning = format!("\"{link}\" . ");
    listed.split(['{', ',', '}']).map(str::trim).filter(|entry| entry.starts_with(&beginning)).collect()
}

fn change_host(verb: &str, id: &VmId, policy: &EgressPolicy) -> Result<(), ToolError> {
    let link = host_link(id);
    let mut script = String::new();
    if policy.outbound_internet {
        for entry in policy.allow.iter().filter(|net| net.prefix_len() == net.max_prefix_len()) {
            let family = if entry.addr().is_ipv4() { 4 } else { 6 };
            let _ = writeln!(
                script,
                "{verb} element inet {HOST_TABLE} host_allowed{family} {{ \"{link}\" . {} }}",
                entry.addr()
            );
        }
    }
    if script.is_empty() { Ok(()) } else { nft(&script).map(drop) }
}

fn nft(script: &str) -> Result<String, ToolError> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]);
    process::run(command, script)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the egress chain does with a destination.
    fn passes(sets: &Sets, to: IpAddr) -> bool {
        let has = |set: &BTreeSet<IpNet>| set.iter().any(|net| net.contains(&to));
        !has(&sets.never) && (has(&sets.named) || (!has(&sets.guarded) && has(&sets.public)))
    }

    fn entry() -> impl Strategy<Value = IpNet> {
        let v4 = (any::<u32>(), 0u8..=32)
            .prop_map(|(bits, length)| IpNet::new(IpAddr::V4(bits.into()), length).expect("length in range"));
        let private = (any::<u16>(), 8u8..=32).prop_map(|(bits, length)| {
            IpNet::new(IpAddr::from([10, (bits >> 8) as u8, bits as u8, 1]), length).expect("length in range")
        });
        prop_oneof![v4, private].prop_map(|net| net.trunc())
    }

    proptest! {
        #[test]
        fn the_filter_decides_as_the_policy_says(
            entries in proptest::collection::vec(entry(), 0..6),
            on in any::<bool>(),
            to in prop_oneof![any::<u32>(), (any::<u16>()).prop_map(|low| 0x0a00_0000 | u32::from(low))],
        ) {
            let policy = EgressPolicy { outbound_internet: on, allow: entries };
            let to = IpAddr::V4(to.into());
            prop_assert_eq!(passes(&Sets::new(&policy, &[]), to), policy.allows(to));
        }
    }

    #[test]
    fn the_hosts_own_address_opens_only_when_named_exactly() {
        let host: IpAddr = "203.0.113.9".parse().unwrap();
        let reaches = |entry: &str| {
            let policy = EgressPolicy { outbound_internet: true, allow: vec![entry.parse().unwrap()] };
            passes(&Sets::new(&policy, &[host]), host)
        };
        assert!(!reaches("0.0.0.0/0"));
        assert!(!reaches("203.0.113.0/24"));
        assert!(reaches("203.0.113.9/32"));
    }

    #[test]
    fn no_rule_of_a_gateway_lets_a_packet_pass_for_being_of_an_open_connection_alone() {
        let policy = EgressPolicy { outbound_internet: true, allow: vec!["192.0.2.0/24".parse().unwrap()] };
        for rule in gateway_rules(&policy, &[]).lines().filter(|rule| rule.contains("established")) {
            assert!(rule.contains("direction reply") || rule.trim() == "ct state != established drop", "{rule}");
        }
    }

    #[test]
    fn a_vms_entries_are_told_from_anothers() {
        let listed = "table inet tiffin {\n\tset host_allowed4 {\n\t\ttype ifname . ipv4_addr\n\t\telements = { \"tfa\" . 10.0.0.1,\n\t\t\t     \"tfb\" . 10.0.0.2, \"tfa\" . 10.0.0.3 }\n\t}\n}\n";
        assert_eq!(entries_of(listed, "tfa"), ["\"tfa\" . 10.0.0.1", "\"tfa\" . 10.0.0.3"]);
        assert_eq!(entries_of(listed, "tf"), Vec::<&str>::new());
    }

    #[test]
    fn every_refused_connection_is_reset_however_many_there_are() {
        // A retry of a connection that got no answer would come when the guest is about to be saved.
        let rules = gateway_rules(&EgressPolicy::default(), &[]);
        let reset = rules.lines().find(|rule| rule.contains("reject with tcp reset")).unwrap();
        assert!(!reset.contains("limit"), "{reset}");
        let logged = rules.lines().find(|rule| rule.contains("log group")).unwrap();
        assert!(logged.contains("limit rate"), "{logged}");
    }

    #[test]
    fn dns_is_answered_exactly_when_something_is_allowed() {
        let nothing = gateway_rules(&EgressPolicy::default(), &[]);
        assert!(!nothing.contains("dport 53"));
        let empty = gateway_rules(&EgressPolicy { outbound_internet: true, allow: vec![] }, &[]);
        assert!(!empty.contains("dport 53"));
        let something =
            gateway_rules(&EgressPolicy { outbound_internet: true, allow: vec!["192.0.2.0/24".parse().unwrap()] }, &[]);
        assert!(something.contains("dport 53"));
    }
}
