//! Name resolution for a guest: a forwarder on the gateway's address that asks the host's resolvers.
//!
//! It reads nothing in a query but its id: what a guest asks goes on as it is, bounded in size and number. A query that
//! can't be served is dropped, as resolvers do; the guest asks again.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use nix::sched::{CloneFlags, setns};

/// The largest query or answer over UDP.
const MAX_DATAGRAM: usize = 4096;
/// Queries in work at once, per VM.
const WORKERS: usize = 8;
/// Queries that wait, per VM.
const WAITING: usize = 32;
/// How long one resolver has.
const PATIENCE: Duration = Duration::from_secs(2);
/// Threads here hold a datagram and little else.
const STACK: usize = 128 * 1024;

enum Job {
    Datagram { query: Vec<u8>, from: SocketAddr },
    Stream(TcpStream),
}

/// Serves names on `at`, port 53, in the calling thread's namespace, asking `resolvers` from `host_namespace`.
///
/// # Errors
/// When the port can't be had or a thread can't be started.
pub fn serve(at: Ipv4Addr, resolvers: Vec<SocketAddr>, host_namespace: &File) -> io::Result<()> {
    let socket = UdpSocket::bind((at, 53))?;
    let listener = TcpListener::bind((at, 53))?;
    let (jobs, queue) = sync_channel(WAITING);
    let queue = Arc::new(Mutex::new(queue));
    let resolvers: Arc<[SocketAddr]> = resolvers.into();
    for _ in 0..WORKERS {
        let (queue, resolvers) = (Arc::clone(&queue), Arc::clone(&resolvers));
        let (answers, namespace) = (socket.try_clone()?, host_namespace.try_clone()?);
        spawn(move || work(&queue, &resolvers, &answers, &namespace))?;
    }
    let datagrams = jobs.clone();
    spawn(move || take_datagrams(&socket, &datagrams))?;
    spawn(move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            // A full queue means that the guest asks faster than it is served: the connection is dropped.
            let _ = jobs.try_send(Job::Stream(stream));
        }
    })
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("dns".into()).stack_size(STACK).spawn(work).map(drop)
}

fn take_datagrams(socket: &UdpSocket, jobs: &SyncSender<Job>) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = jobs.try_send(Job::Datagram { query: buffer[..length].to_vec(), from });
        }
    }
}

fn work(queue: &Mutex<Receiver<Job>>, resolvers: &[SocketAddr], answers: &UdpSocket, host: &File) {
    if setns(host, CloneFlags::CLONE_NEWNET).is_err() {
        return;
    }
    loop {
        let job = match queue.lock() {
            Ok(queue) => queue.recv(),
            Err(_) => return,
        };
        match job {
            Ok(Job::Datagram { query, from }) => {
                if let Some(answer) = resolvers.iter().find_map(|resolver| ask(*resolver, &query).ok()) {
                    let _ = answers.send_to(&answer, from);
                }
            }
            Ok(Job::Stream(client)) => {
                let _ = relay(client, resolvers);
            }
            Err(_) => return,
        }
    }
}

/// One question to one resolver. Only an answer from the resolver's address with the question's id counts.
fn ask(resolver: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(resolver)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(query)?;
    let mut buffer = vec![0; MAX_DATAGRAM];
    for _ in 0..4 {
        let length = socket.recv(&mut buffer)?;
        if length >= 12 && buffer.get(..2) == query.get(..2) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
    Err(io::Error::other("no answer with the question's id"))
}

/// One question and answer over TCP (RFC 1035, 4.2.2: two bytes of length first).
fn relay(mut client: TcpStream, resolvers: &[SocketAddr]) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let query = read_message(&mut client)?;
    for resolver in resolvers {
        let asked = TcpStream::connect_timeout(resolver, PATIENCE).and_then(|mut server| {
            server.set_read_timeout(Some(PATIENCE))?;
            server.set_write_timeout(Some(PATIENCE))?;
            server.write_all(&query)?;
            read_message(&mut server)
        });
        if let Ok(answer) = asked {
            return client.write_all(&answer);
        }
    }
    Ok(())
}

/// A message with its length.
fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = length.to_vec();
    message.resize(2 + usize::from(u16::from_be_bytes(length)), 0);
    stream.read_exact(&mut message[2..])?;
    Ok(message)
}

/// The resolvers named in a `resolv.conf`.
pub fn resolvers_in(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().split('%').next()?.parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, 53))
        .take(3)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolv_conf_is_read() {
        let text = "# a comment\nsearch example.test\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\noptions edns0\n";
        assert_eq!(resolvers_in(text), ["127.0.0.53:53".parse().unwrap(), "[fe80::1]:53".parse().unwrap()]);
    }

    #[test]
    fn an_answer_with_another_id_is_not_taken() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let resolver = server.local_addr().unwrap();
        let answering = std::thread::spawn(move || {
            let mut buffer = [0; 512];
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            let mut forged = buffer[..length].to_vec();
            forged[0] ^= 0xff;
            server.send_to(&forged, from).unwrap();
            server.send_to(&buffer[..length], from).unwrap();
        });
        let query = [7u8; 20];
        assert_eq!(ask(resolver, &query).unwrap(), query);
        answering.join().unwrap();
    }
}
