//! The port: who may connect, and how many at once.
//!
//! Invariant: at most [`MAX_CONNECTIONS`] threads serve, none of them serves the guest itself, and one more is there to close
//! what is beyond.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, bind as bind_to,
    listen, setsockopt, socket, sockopt,
};

use crate::connection::Service;

/// Connections that are served at once; more are closed at once.
pub const MAX_CONNECTIONS: usize = 64;

/// Threads that wait for a connection, at most, besides those that serve one.
const KEPT: usize = 2;

/// Stack of the agent's threads, in bytes.
pub const STACK: usize = 128 * 1024;

/// Listens on every address of the guest, IPv6 and IPv4, or IPv4 alone where there is no IPv6.
///
/// # Errors
/// When the port can't be had.
pub fn bind(port: u16) -> io::Result<TcpListener> {
    let v6 = SockaddrIn6::from(std::net::SocketAddrV6::new(std::net::Ipv6Addr::UNSPECIFIED, port, 0, 0));
    let v4 = SockaddrIn::from(std::net::SocketAddrV4::new(std::net::Ipv4Addr::UNSPECIFIED, port));
    bind_one(AddressFamily::Inet6, &v6).or_else(|_| bind_one(AddressFamily::Inet, &v4)).map_err(io::Error::from)
}

fn bind_one(family: AddressFamily, address: &impl SockaddrLike) -> nix::Result<TcpListener> {
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
    // Not to be used again: gVisor would let root in the guest listen on one of the addresses then, in the agent's place.
    if family == AddressFamily::Inet6 {
        setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    }
    bind_to(socket.as_raw_fd(), address)?;
    listen(&socket, Backlog::new(128)?)?;
    Ok(TcpListener::from(socket))
}

/// Serves connections, each in a thread of its own, from threads that wait for them: starting one would cost each
/// connection more than all else that the agent does for it.
pub fn serve_forever(listener: TcpListener, service: Service) -> ! {
    let pool = Arc::new(Pool { listener, service, idle: AtomicUsize::new(1), open: AtomicUsize::new(0) });
    pool.start_worker();
    loop {
        pool.serve_next();
    }
}

/// Threads that wait for connections or serve one.
struct Pool {
    listener: TcpListener,
    service: Service,
    /// How many wait.
    idle: AtomicUsize,
    /// How many serve.
    open: AtomicUsize,
}

impl Pool {
    fn start_worker(self: &Arc<Self>) {
        self.idle.fetch_add(1, Ordering::Relaxed);
        let pool = Arc::clone(self);
        let started = std::thread::Builder::new().stack_size(STACK).spawn(move || {
            while pool.serve_next() <= KEPT {}
            pool.idle.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = started {
            self.idle.fetch_sub(1, Ordering::Relaxed);
            eprintln!("tiffin-agent: no room for a thread: {error}");
        }
    }

    /// Waits for a connection and serves it; how many threads wait then, this one included.
    fn serve_next(self: &Arc<Self>) -> usize {
        let accepted = self.listener.accept();
        let others = self.idle.fetch_sub(1, Ordering::Relaxed) - 1;
        match accepted {
            Ok((socket, peer)) => {
                let open = self.open.fetch_add(1, Ordering::Relaxed);
                if open < MAX_CONNECTIONS && !is_own(peer, &socket, &self.service.identity().addresses) {
                    if others == 0 {
                        self.start_worker();
                    }
                    self.service.serve(&Arc::new(socket));
                }
                self.open.fetch_sub(1, Ordering::Relaxed);
            }
            // The peer gave up, or there is no descriptor left: neither lasts, and neither may spin.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
        self.idle.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Whether `peer` is the guest itself. IPv6 addresses may have come by themselves (link-local, autoconfigured), so
/// there the kernel is asked: only an own address can be bound.
fn is_own(mut from: SocketAddr, socket: &TcpStream, own: &[IpAddr]) -> bool {
    let peer = from.ip().to_canonical();
    let local = socket.local_addr().map(|address| address.ip().to_canonical());
    if peer.is_loopback() || local.is_ok_and(|local| local == peer) || own.contains(&peer) {
        return true;
    }
    from.set_port(0);
    peer.is_ipv6() && UdpSocket::bind(from).is_ok()
}
