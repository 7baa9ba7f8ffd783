//! A VM's network: two namespaces and what joins them.
//!
//! ```text
//!   guest namespace            gateway namespace (the monitor's)             host namespace
//!   eth0 172.16.0.2  <-veth->  gw0 172.16.0.1     up0 10.213.x.y+1  <-veth->  tfHEX 10.213.x.y
//!   adopted by the engine      packet filter, DNS, dials            only when something is allowed
//! ```
//!
//! The inner addresses are the same for every VM: nothing but its own monitor is there to confuse it with another, and
//! a clone of a snapshot finds the network that it knew. Both namespaces, and with them every interface, vanish with
//! the processes in them. Without anything allowed there is no uplink at all: what a guest sends has nowhere to go but
//! the filter that counts it.

use std::{
    fs::{self, OpenOptions},
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::Path,
    process::Command,
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use tiffin_types::id::VmId;

use super::process::{self, ToolError};

/// The guest's address, in every VM.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);
/// The gateway's address, in every VM.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);
/// The guest's IPv6 address, in every VM (a unique local address, RFC 4193).
pub const GUEST_V6: &str = "fd74:6966:6669::2";
/// The gateway's IPv6 address, in every VM.
pub const GATEWAY_V6: &str = "fd74:6966:6669::1";
/// Bits of the address that guest and gateway share.
pub const PREFIX_V4: u8 = 30;
/// The same in IPv6.
pub const PREFIX_V6: u8 = 126;
/// The gateway's interface towards the guest.
pub const GATEWAY_LINK: &str = "gw0";
/// The gateway's interface towards the host.
pub const UPLINK: &str = "up0";

/// The guest's link's address, in every VM.
pub const GUEST_MAC: &str = "02:74:66:00:00:02";
const GATEWAY_MAC: &str = "02:74:66:00:00:01";

/// The link between a gateway and the host: a pair of addresses that no other VM on the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// Which pair of the range.
    pub index: u32,
    /// The host's end.
    pub host: Ipv4Addr,
    /// The gateway's end.
    pub gateway: Ipv4Addr,
}

impl Uplink {
    /// Pair `index` of `range`; `None` past its end.
    pub fn new(range: Ipv4Net, index: u32) -> Option<Self> {
        if index >= Self::capacity(range) {
            return None;
        }
        let base = u32::from(range.network()) + index * 2;
        Some(Self { index, host: base.into(), gateway: (base + 1).into() })
    }

    /// How many pairs `range` holds.
    pub fn capacity(range: Ipv4Net) -> u32 {
        u32::try_from((1u64 << (32 - u32::from(range.prefix_len()))) / 2).unwrap_or(u32::MAX)
    }

    /// The two ends' IPv6 addresses: host, gateway. They hold the IPv4 ones, and so are as distinct.
    fn v6(self) -> (String, String) {
        let v6 = |v4: Ipv4Addr| {
            let [a, b, c, d] = v4.octets();
            format!("fd74:6966:666a::{:x}:{:x}", u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
        };
        (v6(self.host), v6(self.gateway))
    }
}

/// The name of the VM's interface in the host's namespace: `tf` and the id's digits but the last, as 15 characters are
/// the most that the kernel takes.
pub fn host_link(id: &VmId) -> String {
    format!("tf{}", &id.hex()[..13])
}

/// Whether any VM of any installation has an interface on the host.
///
/// # Errors
/// When the interfaces can't be listed.
pub fn has_vm_links() -> io::Result<bool> {
    let names = fs::read_dir("/sys/class/net")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_ours =
        |name: String| name.len() == 15 && name.starts_with("tf") && name[2..].bytes().all(|b| b.is_ascii_hexdigit());
    Ok(names.into_iter().any(is_ours))
}

/// Whether the kernel has IPv6 at all.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Identifies the network namespace that the calling thread is in.
///
/// # Errors
/// When `/proc` is missing.
pub fn namespace_id() -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata("/proc/thread-self/ns/net")?;
    Ok((meta.dev(), meta.ino()))
}

/// Lets the gateway (the calling thread's namespace) pass packets to the filter, and keeps the kernel from adding
/// addresses and redirects of its own.
///
/// # Errors
/// The kernel's refusal to set one of them.
pub fn configure_gateway_kernel() -> io::Result<()> {
    let mut settings = vec![
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/conf/all/rp_filter", "0"),
    ];
    if has_ipv6() {
        settings.extend([("ipv6/conf/all/forwarding", "1"), ("ipv6/conf/default/accept_ra", "0")]);
    }
    for (key, value) in settings {
        let path = Path::new("/proc/sys/net").join(key);
        fs::write(&path, value)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    }
    Ok(())
}

/// Lets the host pass packets between VMs' links and the world, which Linux doesn't do by itself. A host that forwards
/// stops listening to IPv6 router advertisements unless told otherwise: interfaces that listen go on listening.
///
/// # Errors
/// The kernel's refusal.
pub fn enable_host_forwarding() -> io::Result<()> {
    set_if_other("/proc/sys/net/ipv4/ip_forward", "1")?;
    const ALL_V6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
    if !has_ipv6() || fs::read_to_string(ALL_V6).is_ok_and(|value| value.trim() == "1") {
        return Ok(());
    }
    for interface in fs::read_dir("/proc/sys/net/ipv6/conf")?.filter_map(Result::ok) {
        // What interfaces that come later do is not ours to decide.
        if matches!(interface.file_name().to_str(), Some("all" | "default")) {
            continue;
        }
        let accept_ra = interface.path().join("accept_ra");
        if fs::read_to_string(&accept_ra).is_ok_and(|value| value.trim() == "1") {
            // An interface that went away meanwhile needs nothing.
            let _ = fs::write(&accept_ra, "2");
        }
    }
    set_if_other(ALL_V6, "1")
}

fn set_if_other(path: &str, value: &str) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
    if fs::read_to_string(path).map_err(named)?.trim() == value {
        return Ok(());
    }
    fs::write(path, value).map_err(named)
}

/// Makes the pair between guest and gateway and configures the guest's end. Call from a thread in the guest's
/// namespace; `gateway_pid` is a process in the gateway's.
///
/// # Errors
/// What `ip` said.
pub fn configure_guest(gateway_pid: u32) -> Result<(), ToolError> {
    let mut batch = format!(
        "link add eth0 address {GUEST_MAC} type veth peer name {GATEWAY_LINK} address {GATEWAY_MAC} netns {gateway_pid}\n\
         link set lo up\n\
         link set eth0 addrgenmode none\n\
         addr add {GUEST_V4}/{PREFIX_V4} dev eth0\n\
         link set eth0 up\n\
         route add default via {GATEWAY_V4}\n"
    );
    if has_ipv6() {
        batch += &format!(
            "addr add {GUEST_V6}/{PREFIX_V6} dev eth0 nodad\n\
             route add ::/0 via {GATEWAY_V6} dev eth0\n"
        );
    }
    ip(&batch)
}

/// Makes the link to a guest with a kernel of its own, in the calling thread's namespace, and gives its other end: what is
/// written there, the gateway hears. The link is there as long as the descriptor is open somewhere.
///
/// # Errors
/// The kernel's, or what `ip` said.
pub fn make_tap() -> Result<OwnedFd, ToolError> {
    let opened = || -> io::Result<OwnedFd> {
        let tap = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: all zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(GATEWAY_LINK.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes an ifreq.
        match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } {
            0 => Ok(tap.into()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let tap = opened().map_err(|source| ToolError::Start { tool: "/dev/net/tun".into(), source })?;
    ip(&format!("link set {GATEWAY_LINK} address {GATEWAY_MAC}\n"))?;
    Ok(tap)
}

/// Configures the gateway's end, after [`configure_guest`] or [`make_tap`]. Without an uplink, whatever the guest sends is routed back
/// to where it came from, so that it meets the filter and is counted there.
///
/// # Errors
/// What `ip` said.
pub fn configure_gateway(uplink: bool) -> Result<(), ToolError> {
    let mut batch = format!(
        "link set lo up\n\
         link set {GATEWAY_LINK} addrgenmode none\n\
         addr add {GATEWAY_V4}/{PREFIX_V4} dev {GATEWAY_LINK}\n\
         link set {GATEWAY_LINK} up\n\
         neigh replace {GUEST_V4} lladdr {GUEST_MAC} dev {GATEWAY_LINK} nud permanent\n"
    );
    if has_ipv6() {
        batch += &format!("addr add {GATEWAY_V6}/{PREFIX_V6} dev {GATEWAY_LINK} nodad\n");
    }
    if !uplink {
        batch += &format!("route add default dev {GATEWAY_LINK}\n");
        if has_ipv6() {
            batch += &format!("route add ::/0 dev {GATEWAY_LINK}\n");
        }
    }
    ip(&batch)
}

/// Makes the pair between gateway and host: the host's end from inside the host's namespace, the gateway's end from the
/// calling thread's.
///
/// # Errors
/// What `ip` said, naming an address or interface that is taken.
pub fn configure_uplink(
    id: &VmId,
    uplink: Uplink,
    host_namespace: &fs::File,
    gateway_pid: u32,
) -> Result<(), ToolError> {
    let link = host_link(id);
    let (host_v6, gateway_v6) = uplink.v6();
    let mut batch = format!(
        "link add {link} type veth peer name {UPLINK} netns {gateway_pid}\n\
         link set {link} addrgenmode none\n\
         addr add {}/31 dev {link}\n\
         link set {link} up\n",
        uplink.host
    );
    let ipv6 = has_ipv6();
    if ipv6 {
        batch += &format!("addr add {host_v6}/127 dev {link} nodad\n");
    }
    ip_in(host_namespace, &batch)?;
    let mut batch = format!(
        "link set {UPLINK} addrgenmode none\n\
         addr add {}/31 dev {UPLINK}\n\
         link set {UPLINK} up\n\
         route replace default via {}\n",
        uplink.gateway, uplink.host
    );
    if ipv6 {
        batch += &format!(
            "addr add {gateway_v6}/127 dev {UPLINK} nodad\n\
             route replace ::/0 via {host_v6} dev {UPLINK}\n"
        );
    }
    ip(&batch)
}

/// Takes the pair between gateway and host away, and routes as [`configure_gateway`] does without an uplink. Call from
/// the gateway's namespace; no link there is fine.
///
/// # Errors
/// What `ip` said.
pub fn remove_uplink() -> Result<(), ToolError> {
    let mut batch = String::new();
    if has_link(UPLINK) {
        batch += &format!("link del {UPLINK}\n");
    }
    batch += &format!("route replace default dev {GATEWAY_LINK}\n");
    if has_ipv6() {
        batch += &format!("route replace ::/0 dev {GATEWAY_LINK}\n");
    }
    ip(&batch)
}

/// Whether the calling thread's namespace has that interface.
fn has_link(name: &str) -> bool {
    let devices = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    devices.lines().any(|line| line.trim_start().strip_prefix(name).is_some_and(|rest| rest.starts_with(':')))
}

fn ip(batch: &str) -> Result<(), ToolError> {
    process::run(ip_command(), batch).map(drop)
}

fn ip_in(namespace: &fs::File, batch: &str) -> Result<(), ToolError> {
    let mut command = ip_command();
    let fd = namespace.as_raw_fd();
    // SAFETY: setns(2) is async-signal-safe, and the descriptor is open until the command has been spawned.
    unsafe {
        command.pre_exec(move || match libc::setns(fd, libc::CLONE_NEWNET) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    process::run(command, batch).map(drop)
}

fn ip_command() -> Command {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks_are_distinct_pairs_within_the_range() {
        let range: Ipv4Net = "10.213.0.0/29".parse().unwrap();
        let pairs: Vec<Uplink> = (0..).map_while(|index| Uplink::new(range, index)).collect();
        assert_eq!(pairs.len(), 4);
        assert_eq!(pairs[3].host, Ipv4Addr::new(10, 213, 0, 6));
        assert_eq!(pairs[3].gateway, Ipv4Addr::new(10, 213, 0, 7));
        assert_eq!(pairs[1].v6().1, "fd74:6966:666a::ad5:3");
    }

    #[test]
    fn the_hosts_interface_name_fits_the_kernel() {
        assert!(host_link(&VmId::random()).len() <= 15);
    }
}
