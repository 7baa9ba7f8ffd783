//! Talking to a monitor: one connection, one question.

use std::{
    io::{self, IoSliceMut},
    net::TcpStream as StdTcpStream,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    time::Duration,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest},
    net::{TcpStream, UnixStream},
};

use crate::{
    EngineError,
    monitor::launch::{Ask, Reply, SOCKET},
};

/// A dial into the guest has 5 s in the monitor, and may wait for 5 s while the guest is saved.
const DIAL: Duration = Duration::from_secs(13);

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
    let mut connection = connect(dir).await?;
    let mut line = serde_json::to_vec(ask).map_err(io::Error::other)?;
    line.push(b'\n');
    connection.write_all(&line).await?;
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
/// more.
async fn connect(dir: &Path) -> io::Result<UnixStream> {
    let folder = std::fs::File::open(dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd())).await
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
            (Ok(Reply::Refused { message }), _) => {
                Err(EngineError::host("connecting into the guest", io::Error::other(message)))
            }
            _ => Err(EngineError::WrongState("not running")),
        }
    };
    let fd = tokio::time::timeout(DIAL, dialled).await.unwrap_or(Err(EngineError::WrongState("not answering")))?;
    let stream = StdTcpStream::from(fd);
    let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
    stream.map_err(|e| EngineError::host("connecting into the guest", e))
}

/// One message and the descriptor beside it. The monitor sends both in one call, and so they arrive.
fn receive(socket: RawFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (length, fd) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let fds = message.cmsgs()?.find_map(|one| match one {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (message.bytes, fds)
    };
    bytes.truncate(length);
    // SAFETY: the kernel made this descriptor for this process in recvmsg(2); nobody else owns it.
    Ok((bytes, fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })))
}
