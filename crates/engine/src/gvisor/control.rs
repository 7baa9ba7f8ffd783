//! Pausing and resuming by the sandbox's own socket: the two calls that `runsc pause` and `runsc resume` make once they
//! have started, which takes them fifty times as long.
//!
//! The socket is `runsc`'s own business. These two calls haven't changed in any release that the platform trusts; one that
//! is not found or not understood is told from one that may have been done, so that the tool can stand in.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::Deserialize;

use super::CONTAINER;

/// An answer is a line; a longer one is no answer.
const MAX_ANSWER: usize = 16 * 1024;

/// A call was not answered with success.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The sandbox was not asked.
    #[error("the sandbox's socket can't be reached: {0}")]
    Unreached(io::Error),
    /// It said no.
    #[error("the sandbox refused: {0}")]
    Refused(String),
    /// Whether it has done it, or is about to, isn't known.
    #[error("the sandbox didn't answer: {0}")]
    Unclear(io::Error),
}

/// Stops every task of the guest, and returns when they stand. Each pause takes a resume.
///
/// # Errors
/// [`ControlError`].
pub fn pause(state: &Path, within: Duration) -> Result<(), ControlError> {
    call(state, "containerManager.Pause", within)
}

/// Lets a guest go on that was stopped by [`pause`], and by nothing else.
///
/// # Errors
/// [`ControlError`].
pub fn resume(state: &Path, within: Duration) -> Result<(), ControlError> {
    call(state, "containerManager.Resume", within)
}

#[derive(Deserialize)]
struct Answer {
    success: bool,
    #[serde(default)]
    err: String,
}

fn call(state: &Path, method: &str, within: Duration) -> Result<(), ControlError> {
    let deadline = Instant::now() + within;
    let mut socket = reach(&state.join(format!("runsc-{CONTAINER}.sock"))).map_err(ControlError::Unreached)?;
    let question = serde_json::json!({ "method": method, "arg": null }).to_string();
    let answer = ask(&mut socket, question.as_bytes(), deadline).map_err(ControlError::Unclear)?;
    if answer.success { Ok(()) } else { Err(ControlError::Refused(answer.err.chars().take(500).collect())) }
}

/// Connects without waiting: a sandbox that accepts nobody must not hold up its monitor.
fn reach(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn ask(socket: &mut UnixStream, question: &[u8], deadline: Instant) -> io::Result<Answer> {
    let left = || Some(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    socket.set_write_timeout(left())?;
    socket.write_all(question)?;
    let (mut said, mut buffer) = (Vec::new(), [0; 1024]);
    loop {
        socket.set_read_timeout(left())?;
        let length = socket.read(&mut buffer)?;
        said.extend_from_slice(&buffer[..length]);
        // No length goes before it: it is whole when it can be read.
        match serde_json::from_slice(&said) {
            Ok(answer) => return Ok(answer),
            Err(error) if !error.is_eof() => return Err(io::Error::other(error)),
            Err(_) if length == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) if said.len() > MAX_ANSWER => return Err(io::Error::other("the answer is too long")),
            Err(_) if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixListener, thread};

    /// What a pause comes to where the sandbox says `answer`, in two parts, and hangs up; and what it was asked.
    fn told(answer: &[u8]) -> (Result<(), ControlError>, String) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("runsc-vm.sock")).unwrap();
        thread::scope(|scope| {
            let sandbox = scope.spawn(move || {
                let (mut peer, _) = listener.accept().unwrap();
                let mut asked = [0; 200];
                let length = peer.read(&mut asked).unwrap();
                let (first, rest) = answer.split_at(answer.len() / 2);
                // Who has heard enough hangs up.
                let _ = peer.write_all(first).and_then(|()| peer.write_all(rest));
                String::from_utf8(asked[..length].to_vec()).unwrap()
            });
            let result = pause(dir.path(), Duration::from_secs(20));
            (result, sandbox.join().unwrap())
        })
    }

    #[test]
    fn a_call_is_what_the_tool_would_say_and_success_is_success() {
        let (result, asked) = told(br#"{"success":true,"err":"","result":{}}"#);
        result.unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&asked).unwrap()["method"], "containerManager.Pause");
    }

    #[test]
    fn what_was_not_done_is_told_from_what_may_have_been() {
        let empty = tempfile::tempdir().unwrap();
        let nobody = pause(empty.path(), Duration::from_secs(1));
        assert!(matches!(nobody, Err(ControlError::Unreached(_))), "{nobody:?}");
        let (refused, _) = told(br#"{"success":false,"err":"unknown method","result":null}"#);
        assert!(matches!(&refused, Err(ControlError::Refused(why)) if why == "unknown method"), "{refused:?}");
        for nonsense in [&b""[..], b"{\"success\":tr", b"no", b"{}", &vec![b' '; 100_000]] {
            let (unclear, _) = told(nonsense);
            assert!(matches!(unclear, Err(ControlError::Unclear(_))), "{unclear:?}");
        }
    }

    #[test]
    fn a_sandbox_that_accepts_nobody_or_says_nothing_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("runsc-vm.sock")).unwrap();
        // Connected by the kernel, and never read.
        let silent = pause(dir.path(), Duration::from_millis(50));
        assert!(matches!(silent, Err(ControlError::Unclear(_))), "{silent:?}");
        let mut waiting = Vec::new();
        while let Ok(one) = reach(&dir.path().join("runsc-vm.sock")) {
            waiting.push(one);
        }
        let full = pause(dir.path(), Duration::from_secs(20));
        assert!(matches!(full, Err(ControlError::Unreached(_))), "{full:?}");
        drop(listener);
    }
}
