//! The kernel's version, and whether it lets a process have namespaces of its own.

use std::{fs, process::Command};

use super::{Check, DoctorInput, tools};

/// Overlay and EROFS as they are used, and control groups v2, are dependable from here on.
const FLOOR: (u32, u32) = (5, 10);

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    vec![version(release.trim()), namespaces()]
}

fn version(release: &str) -> Check {
    let remedy = format!("install a kernel of version {}.{} or newer", FLOOR.0, FLOOR.1);
    match parse(release) {
        Some(version) if version >= FLOOR => Check::ok("kernel", release),
        Some(_) => Check::fail("kernel", format!("{release} is too old"), remedy),
        None => Check::warn("kernel", format!("a version that can't be read: {release:?}"), remedy),
    }
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn namespaces() -> Check {
    let name = "namespaces";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]);
    // A pair of interfaces is what joins a VM to its gateway; it goes with its namespace.
    command.args(["ip", "link", "add", "name", "a", "type", "veth", "peer", "name", "b"]);
    match tools::first_line(&mut command) {
        Ok(_) => Check::ok(name, "pid, mount, network, ipc and uts namespaces and veth work"),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "run on a host (or in a container) that may make namespaces, with veth in its kernel (modprobe veth)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(version("5.10.0-28-amd64").level, Level::Ok);
        assert_eq!(version("6.1").level, Level::Ok);
        assert_eq!(version("5.9.16").level, Level::Fail);
        assert_eq!(version("4.19.0").level, Level::Fail);
        assert_eq!(version("five").level, Level::Warn);
    }
}
