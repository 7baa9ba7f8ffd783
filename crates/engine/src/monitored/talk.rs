//! Talking to a monitor: one connection, one question.

use std::{
    io,
    net::TcpStream as StdTcpStream,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, send, socket};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest},
    net::{TcpStream, UnixStream},
};

use crate::{
    EngineError,
    host::descriptors::receive,
    monitor::launch::{Ask, Reply, SOCKET},
};

/// How long the guest may take to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// A dial may wait for 5 s while the guest is saved.
const DIAL: Duration = Duration::from_secs(8);

/// What a VM is whose monitor can't take one more.
pub(super) const BUSY: &str = "busy: it is being saved, or too much is asked of it at once; try again";

/// Asks and waits for the one answer.
pub(super) async fn ask(dir: &Path, ask: &Ask, within: Duration) -> io::Result<Reply> {
    let exchange = async {
        let mut answers = BufReader::new(say(dir, ask).await?);
        next(&mut answers).await
    };
    tokio::time::timeout(within, exchange).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Connects and asks.
pub(super) async fn say(dir: &Path, ask: &Ask) -> io::Result<UnixStream> {
    let mut line = serde_json::to_vec(ask).map_err(io::Error::other)?;
    line.push(b'\n');
    let connection = connect(dir)?;
    // A fresh connection takes it at once; tokio would first ask whether it does.
    let sent = send(connection.as_raw_fd(), &line, MsgFlags::MSG_NOSIGNAL)?;
    let mut connection = UnixStream::from_std(connection.into())?;
    connection.write_all(&line[sent..]).await?;
    Ok(connection)
}

/// The next answer on a connection.
pub(super) async fn next(answers: &mut BufReader<UnixStream>) -> io::Result<Reply> {
    let mut line = String::new();
    if answers.read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_str(&line).map_err(io::Error::other)
}

/// Connects through the folder's descriptor: a socket's own path has room for 107 bytes only, a data folder's may have
/// more. Doesn't block: a monitor with too many connections to take refuses.
fn connect(dir: &Path) -> io::Result<OwnedFd> {
    let folder = std::fs::File::open(dir)?;
    let address = UnixAddr::new(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()).as_str())?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

/// A connection into the guest, made by the monitor and handed over.
pub(super) async fn dial(dir: &Path, port: u16) -> Result<TcpStream, EngineError> {
    let gone = |_| EngineError::WrongState("not running");
    let dialled = async {
        let connection = say(dir, &Ask::Dial { port }).await.map_err(gone)?;
        let (line, fd) =
            connection.async_io(Interest::READABLE, || receive(connection.as_raw_fd())).await.map_err(gone)?;
        match (serde_json::from_slice(&line), fd) {
            (Ok(Reply::Dialled), Some(fd)) => Ok(fd),
            (Ok(Reply::Busy), _) => Err(EngineError::WrongState(BUSY)),
            (Ok(Reply::NotRunning), _) => Err(EngineError::WrongState("not running")),
            (Ok(Reply::Refused { message, errno }), _) => {
                let why = errno.map_or_else(|| io::Error::other(message), io::Error::from_raw_os_error);
                Err(EngineError::host("connecting into the guest", why))
            }
            _ => Err(EngineError::WrongState("not running")),
        }
    };
    let fd = tokio::time::timeout(DIAL, dialled).await.unwrap_or(Err(EngineError::WrongState("not answering")))?;
    let connected = tokio::time::timeout(CONNECT, connected(fd)).await;
    let stream = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    stream.map_err(|e| EngineError::host("connecting into the guest", e))
}

/// The connection that a monitor has begun, once it stands.
async fn connected(fd: OwnedFd) -> io::Result<TcpStream> {
    let stream = StdTcpStream::from(fd);
    // That of a VM which an earlier version started is connected, and blocks.
    stream.set_nonblocking(true)?;
    let stream = TcpStream::from_std(stream)?;
    stream.writable().await?;
    stream.take_error()?.map_or(Ok(stream), Err)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IoSlice, Read, Write},
        net::{Ipv4Addr, SocketAddrV4, TcpListener},
        os::unix::net::UnixListener,
    };

    use nix::sys::socket::{ControlMessage, SockaddrIn, sendmsg};
    use tokio::io::AsyncReadExt;

    use super::*;

    /// A monitor that hands over what `begin` gives.
    async fn dialled(begin: impl FnOnce() -> OwnedFd + Send + 'static) -> Result<TcpStream, EngineError> {
        let dir = tempfile::tempdir().unwrap();
        let monitor = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let hands_over = tokio::task::spawn_blocking(move || {
            let (mut connection, _) = monitor.accept().unwrap();
            let mut asked = [0; 24];
            connection.read_exact(&mut asked).unwrap();
            assert_eq!(&asked, b"{\"ask\":\"dial\",\"port\":1}\n");
            let socket = begin();
            let fds = [socket.as_raw_fd()];
            let reply = [IoSlice::new(b"{\"reply\":\"dialled\"}\n")];
            let beside = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(connection.as_raw_fd(), &reply, &beside, MsgFlags::empty(), None).unwrap();
        });
        let stream = dial(dir.path(), 1).await;
        hands_over.await.unwrap();
        stream
    }

    /// A connection to that port of this host, not waited for.
    fn begun(port: u16) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let begun = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
        // It is in progress, or over already.
        let _ = socket::connect(begun.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)));
        begun
    }

    async fn hears_from(guest: &TcpListener, mut stream: TcpStream) {
        guest.accept().unwrap().0.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
    }

    #[tokio::test]
    async fn a_connection_that_is_on_its_way_is_had_once_it_stands() {
        let guest = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = guest.local_addr().unwrap().port();
        hears_from(&guest, dialled(move || begun(port)).await.unwrap()).await;
    }

    #[tokio::test]
    async fn a_connection_of_an_earlier_monitors_stands_already_and_blocks() {
        let guest = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = guest.local_addr().unwrap();
        let stream = dialled(move || StdTcpStream::connect(address).unwrap().into()).await.unwrap();
        hears_from(&guest, stream).await;
    }

    #[tokio::test]
    async fn a_connection_that_the_guest_refuses_is_an_error() {
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let refused = dialled(move || begun(closed)).await;
        assert!(matches!(refused, Err(EngineError::Host { .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn where_no_monitor_listens_nothing_runs() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(dial(dir.path(), 1).await, Err(EngineError::WrongState("not running"))));
        assert!(ask(dir.path(), &Ask::Phase, DIAL).await.is_err());
    }
}
