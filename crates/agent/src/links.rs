//! The guest's own links, where no engine has set them up: addresses and routes of `eth0` and `lo`, by the kernel's
//! ioctls (netdevice(7), rtnetlink's older sister), which need no library.

use std::{
    fs, io,
    mem::zeroed,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use tiffin_protocol::Link;

const LINK: &str = "eth0";

/// Brings `lo` up, and `eth0` with the addresses and default routes of `link`. IPv6 is left out where the guest's kernel
/// has none.
///
/// # Errors
/// The kernel's.
pub fn set_up(link: &Link) -> io::Result<()> {
    let v4 = control(AddressFamily::Inet)?;
    bring_up(&v4, "lo")?;
    let name = named(LINK);
    set_v4(&v4, name, libc::SIOCSIFADDR, link.address)?;
    set_v4(&v4, name, libc::SIOCSIFNETMASK, mask(link.prefix))?;
    // Nobody else is on the link: there is no address to be found taken, and nothing to be told by a router.
    for (setting, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("addr_gen_mode", "1")] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{LINK}/{setting}"), value);
    }
    bring_up(&v4, LINK)?;
    default_route_v4(&v4, link.gateway)?;
    let Some((address, prefix, gateway)) = link.v6 else { return Ok(()) };
    let Ok(v6) = control(AddressFamily::Inet6) else { return Ok(()) };
    set_v6(&v6, address, prefix)?;
    default_route_v6(&v6, gateway)
}

fn control(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

fn named(name: &str) -> libc::ifreq {
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn mask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0))
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: both are 16 bytes that begin with the family.
    unsafe { std::mem::transmute(address) }
}

fn ask<T>(socket: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller passes the structure that its request takes, for the duration of the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request as _, std::ptr::from_mut(argument)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn bring_up(socket: &OwnedFd, link: &str) -> io::Result<()> {
    let mut request = named(link);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ask(socket, libc::SIOCSIFFLAGS, &mut request)
}

fn set_v4(socket: &OwnedFd, mut request: libc::ifreq, what: libc::c_ulong, address: Ipv4Addr) -> io::Result<()> {
    request.ifr_ifru.ifru_addr = socket_address(address);
    ask(socket, what, &mut request)
}

fn default_route_v4(socket: &OwnedFd, gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: all zero is a valid rtentry.
    let mut route: libc::rtentry = unsafe { zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ask(socket, libc::SIOCADDRT, &mut route)
}

fn index() -> io::Result<libc::c_int> {
    let text = fs::read_to_string(format!("/sys/class/net/{LINK}/ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}

fn set_v6(socket: &OwnedFd, address: Ipv6Addr, prefix: u8) -> io::Result<()> {
    let mut request = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr { s6_addr: address.octets() },
        ifr6_prefixlen: prefix.into(),
        ifr6_ifindex: index()?,
    };
    ask(socket, libc::SIOCSIFADDR, &mut request)
}

/// `struct in6_rtmsg` of linux/ipv6_route.h; libc's has no fields to set.
#[repr(C)]
struct Route6 {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    destination_bits: u16,
    source_bits: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    link: libc::c_int,
}

fn default_route_v6(socket: &OwnedFd, gateway: Ipv6Addr) -> io::Result<()> {
    let mut route = Route6 {
        destination: [0; 16],
        source: [0; 16],
        gateway: gateway.octets(),
        kind: 0,
        destination_bits: 0,
        source_bits: 0,
        metric: 1024,
        info: 0,
        flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
        link: index()?,
    };
    ask(socket, libc::SIOCADDRT, &mut route)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_a_mask() {
        assert_eq!(mask(30), Ipv4Addr::new(255, 255, 255, 252));
        assert_eq!(mask(0), Ipv4Addr::UNSPECIFIED);
        assert_eq!(mask(32), Ipv4Addr::BROADCAST);
    }
}
