//! Root, with the capabilities that namespaces, mounts and packet filters take.

use std::fs;

use super::{Check, DoctorInput};

const NAME: &str = "privileges";

/// From linux/capability.h.
const NEEDED: [(u32, &str); 9] = [
    (0, "CHOWN"),
    (1, "DAC_OVERRIDE"),
    (5, "KILL"),
    (6, "SETGID"),
    (7, "SETUID"),
    (12, "NET_ADMIN"),
    (19, "SYS_PTRACE"),
    (21, "SYS_ADMIN"),
    (27, "MKNOD"),
];

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    vec![verdict(nix::unistd::geteuid().is_root(), &status)]
}

fn verdict(root: bool, status: &str) -> Check {
    if !root {
        return Check::fail(NAME, "not root", "run it as root (sudo)");
    }
    let missing = missing(status);
    if missing.is_empty() {
        Check::ok(NAME, "root, with every capability needed")
    } else {
        let remedy = "give the process these capabilities (in a container: run it privileged)";
        Check::fail(NAME, format!("root without {}", missing.join(", ")), remedy)
    }
}

fn missing(status: &str) -> Vec<&'static str> {
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or_default();
    NEEDED.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(verdict(true, "CapEff:\t000001ffffffffff\n").level, Level::Ok);
        // What a container engine gives by default.
        let container = verdict(true, "Name:\tx\nCapEff:\t00000000a80425fb\n");
        assert_eq!(container.level, Level::Fail);
        assert_eq!(container.found, "root without NET_ADMIN, SYS_PTRACE, SYS_ADMIN");
        assert_eq!(verdict(false, "CapEff:\t000001ffffffffff\n").level, Level::Fail);
    }
}
