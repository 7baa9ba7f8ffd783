//! Denied packets: heard from the packet filter's log group in a VM's gateway, counted by destination.
//!
//! What arrives is the beginning of a packet that a guest wrote: it is read with bounds and kept in bounded tables.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use super::filter::DENIED_GROUP;
use crate::{Denied, DeniedConnection};

/// Destinations that are told apart; further ones only count.
const MAX_DESTINATIONS: usize = 256;

/// From linux/netfilter/nfnetlink.h and nfnetlink_log.h.
const NETLINK_NETFILTER: i32 = 12;
const NFNL_SUBSYS_ULOG: u16 = 4;
const NFULNL_MSG_PACKET: u16 = 0;
const NFULNL_MSG_CONFIG: u16 = 1;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_TIMEOUT: u16 = 4;
const NFULA_PAYLOAD: u16 = 9;
const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;

/// A denied packet's destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    /// Address.
    pub address: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Port, for TCP, UDP and SCTP.
    pub port: Option<u16>,
}

impl Destination {
    fn protocol_name(&self) -> String {
        match self.protocol {
            1 => "icmp".into(),
            6 => "tcp".into(),
            17 => "udp".into(),
            58 => "icmpv6".into(),
            132 => "sctp".into(),
            other => other.to_string(),
        }
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.protocol_name(), self.address)?;
        self.port.map_or(Ok(()), |port| write!(f, " port {port}"))
    }
}

/// What was denied so far.
#[derive(Debug, Default)]
pub struct Counts {
    total: u64,
    order: Vec<Destination>,
    by_destination: HashMap<Destination, u64>,
}

impl Counts {
    /// Counts one packet; tells whether its destination is new (and worth a line in the log).
    pub fn count(&mut self, destination: Destination) -> bool {
        self.total += 1;
        if let Some(count) = self.by_destination.get_mut(&destination) {
            *count += 1;
            return false;
        }
        if self.order.len() >= MAX_DESTINATIONS {
            return false;
        }
        self.order.push(destination.clone());
        self.by_destination.insert(destination, 1);
        true
    }

    /// The counts as the API shows them.
    pub fn report(&self) -> Denied {
        let destinations = self
            .order
            .iter()
            .map(|destination| DeniedConnection {
                address: destination.address,
                protocol: destination.protocol_name(),
                port: destination.port,
                count: self.by_destination.get(destination).copied().unwrap_or(0),
            })
            .collect();
        Denied { total: self.total, destinations }
    }
}

/// The ear at the filter's log group.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens in the calling thread's namespace, from now on.
    ///
    /// # Errors
    /// When the kernel has no `nfnetlink_log`.
    pub fn open() -> io::Result<Self> {
        // SAFETY: socket(2) gives a new descriptor that nobody else owns, or -1, which is checked.
        let socket = unsafe {
            match libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_NETFILTER) {
                fd if fd >= 0 => OwnedFd::from_raw_fd(fd),
                _ => return Err(io::Error::last_os_error()),
            }
        };
        let listener = Self { socket };
        listener.configure(NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND])?;
        listener.configure(NFULA_CFG_MODE, &[0, 0, 0, 128, NFULNL_COPY_PACKET, 0])?;
        // In hundredths of a second: the kernel gathers packets for a whole second unless told otherwise.
        listener.configure(NFULA_CFG_TIMEOUT, &5u32.to_be_bytes())?;
        Ok(listener)
    }

    /// Sends one setting and waits for the kernel's acknowledgement.
    fn configure(&self, attribute: u16, value: &[u8]) -> io::Result<()> {
        let padded = value.len().next_multiple_of(4);
        let length = 16 + 4 + 4 + padded;
        let mut message = Vec::with_capacity(length);
        message.extend_from_slice(&u32::try_from(length).map_err(io::Error::other)?.to_ne_bytes());
        message.extend_from_slice(&((NFNL_SUBSYS_ULOG << 8) | NFULNL_MSG_CONFIG).to_ne_bytes());
        let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).map_err(io::Error::other)?;
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[0, 0]);
        message.extend_from_slice(&DENIED_GROUP.to_be_bytes());
        message.extend_from_slice(&u16::try_from(4 + value.len()).map_err(io::Error::other)?.to_ne_bytes());
        message.extend_from_slice(&attribute.to_ne_bytes());
        message.extend_from_slice(value);
        message.resize(length, 0);
        // SAFETY: send(2) from a buffer of the length given, on an open socket.
        if unsafe { libc::send(self.socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut buffer = [0; 4096];
        loop {
            let received = self.receive(&mut buffer)?;
            // NLMSG_ERROR carries the result: 0 is the acknowledgement.
            if received >= 20 && u16::from_ne_bytes([buffer[4], buffer[5]]) == 2 {
                let code = i32::from_ne_bytes([buffer[16], buffer[17], buffer[18], buffer[19]]);
                return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: recv(2) into a buffer of the length given, on an open socket.
        let received = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Waits for packets and hands over each one's destination.
    ///
    /// # Errors
    /// When the socket is of no more use. Packets that the kernel dropped for want of room are no error.
    pub fn wait(&self, mut seen: impl FnMut(Destination)) -> io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        match self.receive(&mut buffer) {
            Ok(received) => {
                for packet in packets(&buffer[..received]) {
                    if let Some(destination) = destination(packet) {
                        seen(destination);
                    }
                }
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The packets' beginnings in what the kernel sent: netlink messages, one after the other.
fn packets(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while let Some(header) = bytes.get(..16) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let Some(message) = bytes.get(16..length) else { break };
        if kind == (NFNL_SUBSYS_ULOG << 8) | NFULNL_MSG_PACKET
            && let Some(payload) = message.get(4..).and_then(|attributes| attribute(attributes, NFULA_PAYLOAD))
        {
            found.push(payload);
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
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

/// Where an IP packet was going.
fn destination(packet: &[u8]) -> Option<Destination> {
    let (address, protocol, rest) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 0x0f) * 4;
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (IpAddr::V4(Ipv4Addr::from(to)), *packet.get(9)?, packet.get(header..).unwrap_or_default())
        }
        6 => {
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (IpAddr::V6(Ipv6Addr::from(to)), *packet.get(6)?, packet.get(40..).unwrap_or_default())
        }
        _ => return None,
    };
    let has_ports = matches!(protocol, 6 | 17 | 132);
    let port = rest.get(2..4).filter(|_| has_ports).map(|port| u16::from_be_bytes([port[0], port[1]]));
    Some(Destination { address, protocol, port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_tcp_packets_destination_is_read() {
        let mut packet = vec![0x45, 0, 0, 60, 0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, 2, 8, 8, 4, 4];
        packet.extend([0xc0, 0x00, 0x01, 0xbb, 0, 0]);
        let to = destination(&packet).unwrap();
        assert_eq!(to.to_string(), "tcp to 8.8.4.4 port 443");
    }

    #[test]
    fn destinations_are_bounded_and_the_total_goes_on() {
        let mut counts = Counts::default();
        for n in 0..300u32 {
            counts.count(Destination { address: IpAddr::V4(n.into()), protocol: 1, port: None });
        }
        let report = counts.report();
        assert_eq!((report.total, report.destinations.len()), (300, 256));
    }

    proptest! {
        #[test]
        fn no_bytes_can_hurt(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for packet in packets(&bytes) {
                destination(packet);
            }
            destination(&bytes);
        }
    }
}
