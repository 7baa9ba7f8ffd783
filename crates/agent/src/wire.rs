//! Blocking frames over a socket, each with a deadline. What the frames say is [`crate::request`]'s concern.
//!
//! Invariant: never waits past its deadline, never holds more than one frame and one chunk in memory.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use tiffin_protocol::{FrameError, HEADER, Kind, decode_header};

/// Bytes asked of the socket at once.
pub const CHUNK: usize = 32 * 1024;

/// Why there is no frame.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Nothing came, or nothing was taken, until the deadline.
    #[error("the host was silent for too long")]
    Late,
    /// The host closed the connection.
    #[error("the host closed the connection")]
    Closed,
    /// The bytes are no frame.
    #[error("no frame: {0}")]
    Frame(#[from] FrameError),
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(#[from] Errno),
}

/// A first frame, and the bytes that came behind it.
#[derive(Debug, PartialEq, Eq)]
pub struct First {
    /// The frame's kind.
    pub kind: Kind,
    /// Its payload.
    pub payload: Vec<u8>,
    /// What was read beyond it.
    pub rest: Vec<u8>,
}

/// Reads the first frame of a connection.
///
/// # Errors
/// [`WireError`]; the connection is of no more use.
pub fn read_first(socket: &TcpStream, deadline: Instant) -> Result<First, WireError> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match recv(socket.as_raw_fd(), &mut chunk, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(WireError::Closed),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(Errno::EAGAIN) => wait(socket, PollFlags::POLLIN, deadline)?,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(first) = split_first(&mut bytes)? {
            return Ok(first);
        }
    }
}

/// Takes the first frame out of `bytes`, once it is whole.
///
/// # Errors
/// [`FrameError`] as soon as the header says so, whole or not.
pub fn split_first(bytes: &mut Vec<u8>) -> Result<Option<First>, FrameError> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let length = decode_header(*header)?;
    let Some(kind) = bytes.get(HEADER) else { return Ok(None) };
    let kind = Kind::from_byte(*kind)?;
    if bytes.len() < HEADER + length {
        return Ok(None);
    }
    let rest = bytes.split_off(HEADER + length);
    let payload = bytes.split_off(HEADER + 1);
    Ok(Some(First { kind, payload, rest }))
}

/// Sends all of `bytes`.
///
/// # Errors
/// [`WireError`]; the connection is of no more use.
pub fn write_all(socket: &TcpStream, mut bytes: &[u8], deadline: Instant) -> Result<(), WireError> {
    while !bytes.is_empty() {
        match send(socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EAGAIN) => wait(socket, PollFlags::POLLOUT, deadline)?,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads and drops until the host closes.
///
/// # Errors
/// [`WireError`], when it doesn't until the deadline.
pub fn wait_closed(socket: &TcpStream, deadline: Instant) -> Result<(), WireError> {
    let mut chunk = [0; 1024];
    loop {
        match recv(socket.as_raw_fd(), &mut chunk, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) if Instant::now() >= deadline => return Err(WireError::Late),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(socket, PollFlags::POLLIN, deadline)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Appends a frame to `buffer`; `payload` must be shorter than a frame's maximum.
pub fn push_frame(buffer: &mut Vec<u8>, kind: Kind, payload: &[u8]) {
    buffer.extend_from_slice(&tiffin_protocol::encode(kind, payload));
}

/// The time left until `deadline` for `poll`, rounded up so that it never spins.
pub fn poll_timeout(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now());
    PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
}

fn wait(socket: &TcpStream, events: PollFlags, deadline: Instant) -> Result<(), WireError> {
    if Instant::now() >= deadline {
        return Err(WireError::Late);
    }
    match poll(&mut [PollFd::new(socket.as_fd(), events)], poll_timeout(deadline)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
