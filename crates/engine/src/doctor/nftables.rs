//! The packet filter: a VM's own rules, loaded in a namespace that ends with the probe, the log that counts what they
//! deny, and the connections that it tracks.

use nix::sched::{CloneFlags, unshare};
use tiffin_types::network::EgressPolicy;

use super::{Check, DoctorInput};
use crate::host::{denied, filter, flows, network};

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    // This thread's alone; the namespace ends with the thread.
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        let remedy = "see the line on namespaces";
        return vec![Check::fail("nftables", format!("no network namespace to try it in: {error}"), remedy)];
    }
    let everything = EgressPolicy {
        outbound_internet: true,
        allow: ["0.0.0.0/0", "::/0"].iter().filter_map(|net| net.parse().ok()).collect(),
    };
    let rules = match filter::apply_gateway(&everything, &[]) {
        Ok(()) => Check::ok("nftables", "a VM's rules (sets, counters, limits, reject, log) can be loaded"),
        Err(error) => Check::fail(
            "nftables",
            error.to_string(),
            "apt-get install nftables, and a kernel with nf_tables and its inet, set, limit, log and reject parts",
        ),
    };
    let log = match denied::Listener::open() {
        Ok(_) => Check::ok("nfnetlink_log", "denied connections can be counted"),
        Err(error) => Check::fail("nfnetlink_log", error.to_string(), "modprobe nfnetlink_log"),
    };
    let connections = match flows::has_open(network::GUEST_V4, std::net::Ipv6Addr::UNSPECIFIED) {
        Ok(_) => Check::ok("nf_conntrack_netlink", "a VM's open connections can be told"),
        Err(error) => Check::warn(
            "nf_conntrack_netlink",
            format!("a VM's open connections can't be told ({error}), so none can be saved as a snapshot"),
            "modprobe nf_conntrack_netlink",
        ),
    };
    vec![rules, log, connections]
}
