//! The host's side of the agent protocol: one connection, one operation.
//!
//! Everything read here comes from a guest and is hostile: a frame's size is checked before it is allocated, output is
//! cut at the caps that were asked for whether or not the agent keeps to them, and a frame that makes no sense ends the
//! operation. Nothing is read before it is asked for, so a guest that sends for ever waits. Dropping what is returned
//! closes the connection, which makes the agent kill what was started.

mod exec;
mod files;
mod frames;

use std::time::Duration;

use serde::de::DeserializeOwned;
use tiffin_protocol::{Failure, FrameError, Kind, Op, Pong, Renew, Shutdown};

use crate::Connection;
pub use exec::{ExecItem, ExecOutput, ExecStream, Input, exec, script};
pub use files::{FilesItem, FilesOutput, files};

/// An answer that is no output is small; a longer one is no honest agent's.
const MAX_ANSWER: usize = 64 * 1024;

/// Why an operation in the guest gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent refused or could not do it, and says why.
    #[error("{}", .0.message)]
    Refused(Failure),
    /// The request doesn't fit into a frame; it was not sent.
    #[error("the request is too large")]
    RequestTooLarge,
    /// More came out than the caller takes. The agent is not at fault: it isn't told how much that is.
    #[error("the output is too large")]
    OutputTooLarge,
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

/// Asks whether the agent is there.
///
/// # Errors
/// [`AgentError`], [`AgentError::TimedOut`] after `within`.
pub async fn ping(connection: Connection, token: &str, within: Duration) -> Result<Pong, AgentError> {
    request(connection, token, Op::Ping, within).await
}

/// Makes the guest another one; `token` is the one that was right until now. The answer shows its new clock.
///
/// # Errors
/// [`AgentError`], [`AgentError::TimedOut`] after `within`.
pub async fn renew(connection: Connection, token: &str, renew: Renew, within: Duration) -> Result<Pong, AgentError> {
    request(connection, token, Op::Renew(renew), within).await
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
    connection: Connection,
    token: &str,
    op: Op,
    within: Duration,
) -> Result<T, AgentError> {
    let exchange = async {
        // The way to the agent stays open until the answer is there: closing it would mean that nobody waits.
        let (_writer, mut reader) = frames::open(connection, token, op).await?;
        let (kind, payload) = reader.next().await?;
        answer(kind, &payload)
    };
    tokio::time::timeout(within, exchange).await.unwrap_or(Err(AgentError::TimedOut))
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
mod tests;
