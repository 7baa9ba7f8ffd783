//! Files into and out of a guest.

use tiffin_protocol::{Files, FilesDone, Kind, Op};

use super::{
    AgentError, answer,
    exec::Input,
    frames::{Reader, open},
    take_from, unexpected,
};
use crate::Connection;

/// What comes out.
#[derive(Debug)]
pub enum FilesItem {
    /// Bytes of the archive, the file or the list, in order.
    Bytes(Vec<u8>),
    /// All is done; nothing follows.
    Done(FilesDone),
}

/// What an operation on files gives.
pub struct FilesOutput {
    reader: Reader,
    left: u64,
}

/// Starts an operation on files, whose output may be `output_cap` bytes. What goes in is the [`Input`]'s; an operation
/// whose connection closes before [`Input::end`] leaves nothing behind. The connection closes when both are dropped.
///
/// # Errors
/// [`AgentError::Lost`] when the connection breaks.
pub async fn files(
    connection: Connection,
    token: &str,
    files: Files,
    output_cap: u64,
) -> Result<(Input, FilesOutput), AgentError> {
    let (writer, reader) = open(connection, token, Op::Files(files)).await?;
    Ok((Input::new(writer), FilesOutput { reader, left: output_cap }))
}

impl FilesOutput {
    /// The next bytes, or the end. Giving up waiting loses nothing.
    ///
    /// # Errors
    /// [`AgentError::Refused`] with the reason; [`AgentError::OutputTooLarge`] over the cap; the others when the guest
    /// misbehaves or is gone.
    pub async fn next(&mut self) -> Result<FilesItem, AgentError> {
        let (kind, payload) = self.reader.next().await?;
        match kind {
            Kind::Stdout if payload.is_empty() => Err(AgentError::Protocol("an empty frame of output".into())),
            Kind::Stdout => {
                take_from(&mut self.left, payload.len()).map_err(|_| AgentError::OutputTooLarge)?;
                Ok(FilesItem::Bytes(payload))
            }
            Kind::Done | Kind::Failed => answer(kind, &payload).map(FilesItem::Done),
            Kind::Request | Kind::Stdin | Kind::StdinEnd | Kind::Stderr | Kind::Event | Kind::Result | Kind::Resize => {
                Err(unexpected(kind))
            }
        }
    }
}
