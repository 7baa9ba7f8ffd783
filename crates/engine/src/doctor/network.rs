//! What VMs with outbound access will find: IPv4, IPv6, name servers.

use std::{fs, path::Path};

use super::{Check, DoctorInput};
use crate::host::{dns, network};

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    vec![forwarding(), resolvers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default())]
}

fn forwarding() -> Check {
    let name = "forwarding";
    let state = |path: &str| match fs::read_to_string(Path::new("/proc/sys/net").join(path)) {
        Ok(text) if text.trim() == "1" => "on",
        Ok(_) => "off",
        Err(_) => "unknown",
    };
    let v4 = state("ipv4/ip_forward");
    if !network::has_ipv6() {
        let remedy = "enable IPv6 in the kernel if VMs are to reach IPv6 addresses";
        return Check::warn(name, format!("IPv4 {v4}; the kernel has no IPv6"), remedy);
    }
    let v6 = state("ipv6/conf/all/forwarding");
    Check::ok(name, format!("IPv4 {v4}, IPv6 {v6} (turned on where a VM may reach something outside)"))
}

fn resolvers(conf: &str) -> Check {
    let found: Vec<String> = dns::resolvers_in(conf).iter().map(|address| address.ip().to_string()).collect();
    if found.is_empty() {
        let remedy = "name some with the setting network.resolvers, or VMs with outbound access resolve no names";
        Check::warn("resolvers", "none in /etc/resolv.conf", remedy)
    } else {
        Check::ok("resolvers", found.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_host_without_name_servers_is_warned() {
        assert_eq!(resolvers("nameserver 192.0.2.1\n").found, "192.0.2.1");
        let none = resolvers("search example.org\n");
        assert_eq!(none.level, Level::Warn);
        assert!(none.remedy.is_some());
    }
}
