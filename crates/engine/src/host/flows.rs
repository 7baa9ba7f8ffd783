//! Which TCP connections a guest has, seen from its gateway: those to the gateway itself and the dials into the guest by
//! the gateway's own sockets, those to the world by what the packet filter remembers of them (conntrack).
//!
//! What is asked is whether the guest's own end is gone. Both views belong to the calling thread's network namespace.
//! Nothing is changed here.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

/// How long a closed connection counts, in seconds: gVisor keeps one that the guest closed for 60.
const TIME_WAIT_SECONDS: &str = "62";

/// From linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
const NETLINK_NETFILTER: i32 = 12;
const CT_GET: u16 = (1 << 8) | 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_PROTOINFO: u16 = 4;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_TCP_STATE: u16 = 1;
const CTA_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_TCP_FLAGS_REPLY: u16 = 5;
const CLOSE_INIT: u8 = 0x04;

/// `enum tcp_conntrack` of linux/netfilter/nf_conntrack_tcp.h.
const CT_NONE: u8 = 0;
const CT_TIME_WAIT: u8 = 7;
const CT_CLOSE: u8 = 8;

/// States of a socket of ours (linux/tcp_states.h) whose other end is gone, or never was.
const SOCKET_OVER: [&str; 3] = ["06", "07", "0A"];

/// From linux/netlink.h: NLM_F_DUMP_INTR.
const DUMP_INTERRUPTED: u16 = 0x10;

/// How often the table is read before it is taken as too busy.
const DUMPS: usize = 8;

/// The longest answer of the kernel's at once.
const MESSAGE: usize = 256 * 1024;

/// Makes the filter forget closed connections about when gVisor does. Where the kernel has no such setting they count
/// longer.
pub fn configure() {
    let _ = fs::write(Path::new("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait"), TIME_WAIT_SECONDS);
}

/// Whether a guest with these addresses has an end of a TCP connection that leads out of it.
///
/// # Errors
/// When the kernel doesn't tell.
pub fn has_open(guest: Ipv4Addr, guest_v6: Ipv6Addr) -> io::Result<bool> {
    let sockets = fs::read_to_string("/proc/thread-self/net/tcp")?;
    Ok(has_socket_to(&sockets, guest) || has_tracked(&[&guest.octets(), &guest_v6.octets()])?)
}

/// Whether the gateway has a connection into a guest with this address. Where the kernel doesn't tell, it has none.
pub fn is_dialled(guest: Ipv4Addr) -> bool {
    fs::read_to_string("/proc/thread-self/net/tcp").is_ok_and(|sockets| has_socket_to(&sockets, guest))
}

/// How many packets have passed so far between the guest and the gateway. Where none has since [`has_open`] looked, no
/// connection was opened: looking again takes as long as the host's table of connections is large.
///
/// # Errors
/// When the kernel doesn't tell.
pub fn packets(link: &str) -> io::Result<u64> {
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    packets_of(&table, link).ok_or_else(|| io::Error::other(format!("no link {link}")))
}

/// The packets of a line of `/proc/net/dev`: received, and sent.
fn packets_of(table: &str, link: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(link)?.strip_prefix(':'))?;
    let field = |at| line.split_whitespace().nth(at)?.parse::<u64>().ok();
    field(1)?.checked_add(field(9)?)
}

/// Whether `/proc/net/tcp` shows a socket that is connected to `guest`.
fn has_socket_to(table: &str, guest: Ipv4Addr) -> bool {
    let wanted = format!("{:08X}:", u32::from(guest).swap_bytes());
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(2);
        let (remote, state) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        remote.starts_with(&wanted) && !SOCKET_OVER.contains(&state)
    })
}

/// Whether the filter remembers a connection whose end in the guest is still there.
fn has_tracked(guest: &[&[u8]]) -> io::Result<bool> {
    for _ in 0..DUMPS {
        let dumped = dump_tracked(guest)?;
        if dumped.open || !dumped.interrupted {
            return Ok(dumped.open);
        }
    }
    // The table changes all the time: somebody is talking.
    Ok(true)
}

fn dump_tracked(guest: &[&[u8]]) -> io::Result<Dumped> {
    // SAFETY: socket(2) gives a new descriptor that nobody else owns, or -1, which is checked.
    let socket = unsafe {
        match libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_NETFILTER) {
            fd if fd >= 0 => OwnedFd::from_raw_fd(fd),
            _ => return Err(io::Error::last_os_error()),
        }
    };
    let request = dump_request();
    // SAFETY: send(2) from a buffer of the length given, on an open socket.
    if unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let (mut buffer, mut dumped) = (vec![0; MESSAGE], Dumped::default());
    loop {
        // SAFETY: recv(2) into a buffer of the length given, on an open socket.
        let received = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        let (part, is_last) = match read_answer(&buffer[..received], guest)? {
            Answer::More(part) => (part, false),
            Answer::Last(part) => (part, true),
        };
        dumped = Dumped { open: dumped.open | part.open, interrupted: dumped.interrupted | part.interrupted };
        if is_last {
            return Ok(dumped);
        }
    }
}

/// All entries of IPv4 and IPv6.
fn dump_request() -> Vec<u8> {
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).unwrap_or_default();
    let mut message = 20u32.to_ne_bytes().to_vec();
    message.extend_from_slice(&CT_GET.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[0; 4]);
    message
}

/// What the entries of a dump say.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Dumped {
    open: bool,
    /// The table changed meanwhile, so that entries may be missing.
    interrupted: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    More(Dumped),
    Last(Dumped),
}

/// Netlink messages, one after the other.
fn read_answer(mut bytes: &[u8], guest: &[&[u8]]) -> io::Result<Answer> {
    let mut dumped = Dumped::default();
    while let Some(header) = bytes.get(..16) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let Some(message) = bytes.get(16..length) else { break };
        dumped.interrupted |= u16::from_ne_bytes([header[6], header[7]]) & DUMP_INTERRUPTED != 0;
        match u16::from_ne_bytes([header[4], header[5]]) {
            // NLMSG_ERROR
            2 => {
                let code = message.get(..4).map_or(0, |code| i32::from_ne_bytes([code[0], code[1], code[2], code[3]]));
                return if code == 0 { Ok(Answer::Last(dumped)) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
            // NLMSG_DONE
            3 => return Ok(Answer::Last(dumped)),
            _ => dumped.open |= message.get(4..).is_some_and(|entry| is_open(entry, guest)),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Answer::More(dumped))
}

/// Whether an entry's attributes are those of a TCP connection whose end in the guest is still there: until it is reset
/// or both have closed it, and a while longer at the end that closed it first.
fn is_open(entry: &[u8], guest: &[&[u8]]) -> bool {
    let tuple = |kind| attribute(entry, CTA_TUPLE_ORIG).and_then(|tuple| attribute(tuple, kind));
    let protocol = tuple(CTA_TUPLE_PROTO).and_then(|protocol| attribute(protocol, CTA_PROTO_NUM)?.first().copied());
    if protocol != Some(6) {
        return false;
    }
    let Some(tcp) = attribute(entry, CTA_PROTOINFO).and_then(|info| attribute(info, CTA_PROTOINFO_TCP)) else {
        return true;
    };
    let source =
        tuple(CTA_TUPLE_IP).and_then(|ip| attribute(ip, CTA_IP_V4_SRC).or_else(|| attribute(ip, CTA_IP_V6_SRC)));
    let is_guests = source.is_some_and(|source| guest.contains(&source));
    let flags = attribute(tcp, if is_guests { CTA_TCP_FLAGS_ORIGINAL } else { CTA_TCP_FLAGS_REPLY });
    match attribute(tcp, CTA_TCP_STATE).and_then(|state| state.first().copied()) {
        Some(CT_NONE | CT_CLOSE) => false,
        Some(CT_TIME_WAIT) => flags.and_then(|flags| flags.first()).is_none_or(|flags| flags & CLOSE_INIT != 0),
        Some(_) | None => true,
    }
}

fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(header) = bytes.get(..4) {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn entry(protocol: u8, from: Ipv4Addr, state: u8, (original, reply): (u8, u8)) -> Vec<u8> {
        let ip = attr(CTA_TUPLE_IP, &attr(CTA_IP_V4_SRC, &from.octets()));
        let tuple = [ip, attr(CTA_TUPLE_PROTO, &attr(CTA_PROTO_NUM, &[protocol]))].concat();
        let flags = [attr(CTA_TCP_FLAGS_ORIGINAL, &[original, 0]), attr(CTA_TCP_FLAGS_REPLY, &[reply, 0])].concat();
        let tcp = [attr(CTA_TCP_STATE, &[state]), flags].concat();
        [attr(CTA_TUPLE_ORIG, &tuple), attr(CTA_PROTOINFO, &attr(CTA_PROTOINFO_TCP, &tcp))].concat()
    }

    #[test]
    fn a_connection_counts_until_the_guests_end_is_gone() {
        let gateway = Ipv4Addr::new(172, 16, 0, 1);
        let counts = |entry: Vec<u8>| is_open(&entry, &[&GUEST.octets()]);
        for open in [1, 2, 3, 4, 5, 6] {
            assert!(counts(entry(6, GUEST, open, (0, 0))), "{open}");
        }
        for (from, guest_first, other_first) in
            [(GUEST, (CLOSE_INIT, 0), (0, CLOSE_INIT)), (gateway, (0, CLOSE_INIT), (CLOSE_INIT, 0))]
        {
            assert!(counts(entry(6, from, CT_TIME_WAIT, guest_first)), "the guest closed first: its end waits");
            assert!(!counts(entry(6, from, CT_TIME_WAIT, other_first)), "the guest's end is gone");
        }
        assert!(!counts(entry(6, GUEST, CT_CLOSE, (0, 0))));
        assert!(!counts(entry(17, GUEST, 3, (0, 0))), "datagrams are no connection");
    }

    #[test]
    fn a_dump_that_was_interrupted_says_so_and_is_no_last_word() {
        let done = |flags: u16| {
            let mut bytes = 20u32.to_ne_bytes().to_vec();
            bytes.extend([3u16, flags].map(u16::to_ne_bytes).concat());
            bytes.resize(20, 0);
            bytes
        };
        let last = |interrupted| Answer::Last(Dumped { open: false, interrupted });
        assert_eq!(read_answer(&done(0x2), &[]).unwrap(), last(false));
        assert_eq!(read_answer(&done(0x2 | DUMP_INTERRUPTED), &[]).unwrap(), last(true));
    }

    #[test]
    fn packets_are_counted_both_ways() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes    packets errs\n    lo:       9       9    0    0    0     0          0         0        9       9    0    0    0     0       0          0\n   gw0:     270       3    0    0    0     0          0         0      520       4    0    0    0     0       0          0\n";
        assert_eq!(packets_of(table, "gw0"), Some(7));
        assert_eq!(packets_of(table, "gw"), None);
        assert_eq!(packets_of("", "gw0"), None);
    }

    #[test]
    fn a_socket_to_the_guest_counts_unless_it_is_over() {
        let table = |state: &str| {
            format!(
                "  sl  local_address rem_address   st\n   0: 010010AC:C9B4 020010AC:0001 {state} 00000000:00000000\n"
            )
        };
        assert!(has_socket_to(&table("01"), GUEST));
        assert!(has_socket_to(&table("04"), GUEST));
        assert!(!has_socket_to(&table("06"), GUEST));
        assert!(!has_socket_to(&table("01"), Ipv4Addr::new(172, 16, 0, 3)));
    }

    proptest! {
        #[test]
        fn no_bytes_can_hurt(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_answer(&bytes, &[]);
            is_open(&bytes, &[]);
        }
    }
}
