//! Frames on a connection, each way on its own, so that both can go on at once.
//!
//! Invariant: one frame is held in each direction and no more, and its size is checked before it is allocated. Giving up
//! waiting loses nothing: what was read of a frame is kept, what is left of one to send goes first next time.

use serde::Serialize;
use tiffin_protocol::{HEADER, Kind, MAX_FRAME, Op, Request, decode_header, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use super::AgentError;
use crate::Connection;

/// Frames from the agent.
pub(super) struct Reader {
    from: ReadHalf<Connection>,
    /// What has come of the next frame.
    frame: Vec<u8>,
}

/// Frames to the agent.
pub(super) struct Writer {
    to: WriteHalf<Connection>,
    frame: Vec<u8>,
    sent: usize,
}

/// Sends the request; what follows is the operation's.
pub(super) async fn open(connection: Connection, token: &str, op: Op) -> Result<(Writer, Reader), AgentError> {
    let request = to_json(&Request { token: token.to_owned(), op });
    if request.len() >= MAX_FRAME {
        return Err(AgentError::RequestTooLarge);
    }
    let (from, to) = tokio::io::split(connection);
    let mut writer = Writer { to, frame: encode(Kind::Request, &request), sent: 0 };
    writer.flush().await?;
    Ok((writer, Reader { from, frame: Vec::new() }))
}

/// A value as the payload of a frame.
pub(super) fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("strings and numbers are JSON")
}

impl Reader {
    /// The next frame.
    pub(super) async fn next(&mut self) -> Result<(Kind, Vec<u8>), AgentError> {
        self.fill(HEADER).await?;
        let header = self.frame.first_chunk().expect("a header was read");
        let length = decode_header(*header)?;
        self.fill(HEADER + length).await?;
        let mut frame = std::mem::take(&mut self.frame);
        let kind = Kind::from_byte(frame[HEADER])?;
        Ok((kind, frame.split_off(HEADER + 1)))
    }

    /// Reads until so much of the frame is there, and not a byte more.
    async fn fill(&mut self, bytes: usize) -> Result<(), AgentError> {
        while let Some(missing) = bytes.checked_sub(self.frame.len()).filter(|missing| *missing > 0) {
            self.frame.reserve(missing);
            let read = (&mut self.from).take(missing as u64).read_buf(&mut self.frame).await;
            if read.map_err(AgentError::Lost)? == 0 {
                return Err(AgentError::Lost(std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }
}

impl Writer {
    /// Takes a frame to be sent; the one before must have been flushed.
    pub(super) fn queue(&mut self, kind: Kind, payload: &[u8]) {
        debug_assert!(self.frame.is_empty());
        (self.frame, self.sent) = (encode(kind, payload), 0);
    }

    /// Sends what is left of the frame.
    pub(super) async fn flush(&mut self) -> Result<(), AgentError> {
        while self.sent < self.frame.len() {
            match self.to.write(&self.frame[self.sent..]).await.map_err(AgentError::Lost)? {
                0 => return Err(AgentError::Lost(std::io::ErrorKind::WriteZero.into())),
                sent => self.sent += sent,
            }
        }
        self.frame = Vec::new();
        Ok(())
    }

    /// Sends a frame.
    pub(super) async fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), AgentError> {
        self.flush().await?;
        self.queue(kind, payload);
        self.flush().await
    }
}
