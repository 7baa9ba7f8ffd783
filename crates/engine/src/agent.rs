//! The host's side of the agent protocol: one connection, one operation.
//!
//! Everything read here comes from a guest and is hostile: a frame's size is checked before it is allocated, output is
//! cut at the caps that were asked for whether or not the agent keeps to them, and a frame that makes no sense ends the
//! operation. Dropping what is returned closes the connection, which makes the agent kill what was started.

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use tiffin_protocol::{
    Exec, ExecDone, Failure, FrameError, HEADER, Kind, Op, Pong, Request, Shutdown, decode_header, encode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::Connection;

/// An answer that is no output is small; a longer one is no honest agent's.
const MAX_ANSWER: usize = 64 * 1024;

/// Why an operation in the guest gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent refused or could not do it, and says why.
    #[error("{}", .0.message)]
    Refused(Failure),
    /// The agent didn't keep to the protocol.
    #[error("the guest's agent broke the protocol: {0}")]
    Protocol(String),
    /// The connection broke.
    #[error("the connection to the guest's agent broke")]
    Lost(#[source] std::io::Error),
    /// No answer in time.
    #[error("the guest's agent didn't answer in time")]
    TimedOut,
}

impl From<FrameError> for AgentError {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// What a running command sends.
#[derive(Debug)]
pub enum ExecItem {
    /// Bytes of standard output, in order.
    Stdout(Vec<u8>),
    /// Bytes of standard error, in order.
    Stderr(Vec<u8>),
    /// It has ended; nothing follows.
    Done(ExecDone),
}

/// A command that runs in a guest.
pub struct ExecStream {
    connection: Connection,
    stdout_left: u64,
    stderr_left: u64,
}

/// Starts a command. Its time limit is the agent's to keep; callers add a deadline of their own.
///
/// # Errors
/// [`AgentError::Lost`] when the connection breaks.
pub async fn exec(connection: Connection, token: &str, exec: Exec) -> Result<ExecStream, AgentError> {
    let (stdout_left, stderr_left) = (exec.stdout_cap, exec.stderr_cap);
    let mut connection = connection;
    send_request(&mut connection, token, Op::Exec(exec)).await?;
    Ok(ExecStream { connection, stdout_left, stderr_left })
}

impl ExecStream {
    /// The next piece of output, or the end.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the command could not be started; the others when the guest misbehaves or is gone.
    pub async fn next(&mut self) -> Result<ExecItem, AgentError> {
        let (kind, payload) = read_frame(&mut self.connection).await?;
        match kind {
            // It takes nothing from a cap, so there could be no end of them.
            Kind::Stdout | Kind::Stderr if payload.is_empty() => {
                Err(AgentError::Protocol("an empty frame of output".into()))
            }
            Kind::Stdout => {
                take_from(&mut self.stdout_left, payload.len())?;
                Ok(ExecItem::Stdout(payload))
            }
            Kind::Stderr => {
                take_from(&mut self.stderr_left, payload.len())?;
                Ok(ExecItem::Stderr(payload))
            }
            Kind::Done | Kind::Failed => answer(kind, &payload).map(ExecItem::Done),
            Kind::Request | Kind::Stdin | Kind::StdinEnd | Kind::Event | Kind::Result | Kind::Resize => {
                Err(unexpected(kind))
            }
        }
    }

    /// Sends bytes to the command's standard input.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        for chunk in bytes.chunks(64 * 1024) {
            self.connection.write_all(&encode(Kind::Stdin, chunk)).await.map_err(AgentError::Lost)?;
        }
        Ok(())
    }

    /// Ends the command's standard input.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub async fn stdin_end(&mut self) -> Result<(), AgentError> {
        self.connection.write_all(&encode(Kind::StdinEnd, &[])).await.map_err(AgentError::Lost)
    }
}

/// Asks whether the agent is there.
///
/// # Errors
/// [`AgentError`], [`AgentError::TimedOut`] after `within`.
pub async fn ping(connection: Connection, token: &str, within: Duration) -> Result<Pong, AgentError> {
    request(connection, token, Op::Ping, within).await
}

/// Asks the guest to end; returns when the agent says that every process is gone.
///
/// # Errors
/// [`AgentError`], [`AgentError::TimedOut`] after `within`, which should be longer than the grace.
pub async fn shutdown(
    connection: Connection,
    token: &str,
    grace: Duration,
    within: Duration,
) -> Result<(), AgentError> {
    let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
    let _: serde_json::Value = request(connection, token, Op::Shutdown(Shutdown { grace_ms }), within).await?;
    Ok(())
}

/// One request, one answer.
async fn request<T: DeserializeOwned>(
    mut connection: Connection,
    token: &str,
    op: Op,
    within: Duration,
) -> Result<T, AgentError> {
    let exchange = async {
        send_request(&mut connection, token, op).await?;
        let (kind, payload) = read_frame(&mut connection).await?;
        answer(kind, &payload)
    };
    tokio::time::timeout(within, exchange).await.unwrap_or(Err(AgentError::TimedOut))
}

async fn send_request(connection: &mut Connection, token: &str, op: Op) -> Result<(), AgentError> {
    let request = Request { token: token.to_owned(), op };
    connection.write_all(&encode(Kind::Request, &to_json(&request))).await.map_err(AgentError::Lost)
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("a request of strings and numbers is JSON")
}

async fn read_frame(connection: &mut Connection) -> Result<(Kind, Vec<u8>), AgentError> {
    let mut header = [0; HEADER];
    connection.read_exact(&mut header).await.map_err(AgentError::Lost)?;
    let mut bytes = vec![0; decode_header(header)?];
    connection.read_exact(&mut bytes).await.map_err(AgentError::Lost)?;
    let kind = Kind::from_byte(bytes.remove(0))?;
    Ok((kind, bytes))
}

/// The value of a last frame.
fn answer<T: DeserializeOwned>(kind: Kind, payload: &[u8]) -> Result<T, AgentError> {
    if payload.len() > MAX_ANSWER {
        return Err(AgentError::Protocol(format!("an answer of {} bytes", payload.len())));
    }
    let unreadable = |error: serde_json::Error| AgentError::Protocol(format!("an unreadable answer: {error}"));
    match kind {
        Kind::Done => serde_json::from_slice(payload).map_err(unreadable),
        Kind::Failed => Err(AgentError::Refused(serde_json::from_slice(payload).map_err(unreadable)?)),
        Kind::Request
        | Kind::Stdin
        | Kind::StdinEnd
        | Kind::Stdout
        | Kind::Stderr
        | Kind::Event
        | Kind::Result
        | Kind::Resize => Err(unexpected(kind)),
    }
}

fn unexpected(kind: Kind) -> AgentError {
    AgentError::Protocol(format!("a {kind:?} frame out of place"))
}

/// Holds the agent to the cap that it was given.
fn take_from(left: &mut u64, bytes: usize) -> Result<(), AgentError> {
    *left =
        left.checked_sub(bytes as u64).ok_or_else(|| AgentError::Protocol("more output than was asked for".into()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::DuplexStream;

    fn exec_request() -> Exec {
        Exec {
            command: tiffin_protocol::Command::Shell("true".into()),
            cwd: "/".into(),
            env: Default::default(),
            uid: 1000,
            gid: 1000,
            timeout_ms: 1000,
            stdout_cap: 10,
            stderr_cap: 10,
            stdin: false,
            terminal: None,
        }
    }

    /// A guest that answers any exec with `bytes`, whatever they are.
    async fn against(bytes: Vec<u8>) -> (ExecStream, DuplexStream) {
        let (host, mut guest) = tokio::io::duplex(4 * 1024 * 1024);
        guest.write_all(&bytes).await.unwrap();
        (exec(Box::pin(host), "token", exec_request()).await.unwrap(), guest)
    }

    #[tokio::test]
    async fn output_beyond_the_cap_is_the_agents_fault() {
        let mut bytes = encode(Kind::Stdout, b"0123456789");
        bytes.extend(encode(Kind::Stdout, b"x"));
        let (mut stream, _guest) = against(bytes).await;
        assert!(matches!(stream.next().await, Ok(ExecItem::Stdout(out)) if out == b"0123456789"));
        assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));
    }

    #[tokio::test]
    async fn a_frame_that_claims_gigabytes_is_refused_unallocated() {
        let (mut stream, _guest) = against(vec![0xff, 0xff, 0xff, 0xff, 4]).await;
        assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));
    }

    #[tokio::test]
    async fn frames_out_of_place_and_broken_json_are_refused() {
        for bytes in [
            encode(Kind::Request, b"{}"),
            encode(Kind::Event, b"{}"),
            encode(Kind::Stdout, b""),
            encode(Kind::Done, b"[]"),
            encode(Kind::Failed, b"\xff"),
            encode(Kind::Done, &vec![b' '; MAX_ANSWER + 1]),
        ] {
            let (mut stream, _guest) = against(bytes).await;
            assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));
        }
    }

    #[tokio::test]
    async fn a_guest_that_hangs_up_is_lost() {
        let (mut stream, guest) = against(vec![0, 0]).await;
        drop(guest);
        assert!(matches!(stream.next().await, Err(AgentError::Lost(_))));
    }

    #[tokio::test]
    async fn a_silent_guest_times_out() {
        let (host, _guest) = tokio::io::duplex(1024);
        let answer = ping(Box::pin(host), "token", Duration::from_millis(20)).await;
        assert!(matches!(answer, Err(AgentError::TimedOut)));
    }
}
