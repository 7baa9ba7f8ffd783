//! Files of VMs, moved by the agent in the guest.
//!
//! Invariants: nothing is held but a few pieces of what passes through; the host looks into no archive; an upload that
//! is cut short, by whomever, is a hang-up to the agent, which leaves nothing of it behind; a download is over only when the
//! agent said so, so that a short one can be told from a whole one.

use std::{sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt};
use tiffin_engine::agent::{self, AgentError, FilesItem, FilesOutput, Input};
use tiffin_protocol::{FailureCode, FileAction, FileEntry, Files, FilesDone, UnpackLimits};
use tiffin_types::{account::Scope, id::VmId, limits::FILE_LIST_ENTRIES, path::GuestPath};
use tokio::time::Instant;

use super::{
    App,
    auth::Caller,
    guest::{GUEST_USER, Guest, SLACK, reach, shown},
};
use crate::error::AppError;

/// Bytes of a list of [`FILE_LIST_ENTRIES`]: each is a name of 255 bytes, six times as long in JSON, and some figures.
const LIST_BYTES: u64 = FILE_LIST_ENTRIES * 1700;

/// A body that comes in pieces; an error is a client that broke off.
pub(crate) trait Pieces: Stream<Item = Result<Self::Piece, Self::Broken>> + Send + Unpin {
    /// A piece.
    type Piece: AsRef<[u8]> + Send;
    /// Why it broke off.
    type Broken: Send;
}

impl<S, P: AsRef<[u8]> + Send, B: Send> Pieces for S
where
    S: Stream<Item = Result<P, B>> + Send + Unpin,
{
    type Piece = P;
    type Broken = B;
}

/// Unpacks an archive into a folder of the VM.
pub(crate) async fn files_upload(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    dest: &GuestPath,
    body: &mut impl Pieces,
) -> Result<FilesDone, AppError> {
    caller.require(Scope::Write)?;
    let config = &app.config.files;
    let limits = UnpackLimits { unpacked_bytes: config.unpacked_bytes, entries: config.entries, ratio: config.ratio };
    let action = FileAction::Unpack { dest: dest.to_string(), limits };
    put(app, caller, id, action, body, config.upload_bytes, "dest").await
}

/// Writes one file of the VM, whole or not at all.
pub(crate) async fn file_update(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    path: &GuestPath,
    body: &mut impl Pieces,
) -> Result<FilesDone, AppError> {
    caller.require(Scope::Write)?;
    let max_bytes = app.config.files.file_bytes;
    let action = FileAction::Write { path: path.to_string(), max_bytes };
    put(app, caller, id, action, body, max_bytes, "path").await
}

/// An archive of a file or folder of the VM.
pub(crate) async fn files_download(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    path: &GuestPath,
) -> Result<Download, AppError> {
    caller.require(Scope::Read)?;
    get(app, caller, id, FileAction::Pack { path: path.to_string() }, app.config.files.download_bytes).await
}

/// The bytes of one file of the VM.
pub(crate) async fn file_get(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    path: &GuestPath,
) -> Result<Download, AppError> {
    caller.require(Scope::Read)?;
    get(app, caller, id, FileAction::Read { path: path.to_string() }, app.config.files.download_bytes).await
}

/// What is in a folder of the VM.
pub(crate) async fn file_list(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    path: &GuestPath,
) -> Result<Vec<FileEntry>, AppError> {
    caller.require(Scope::Read)?;
    let action = FileAction::List { path: path.to_string(), max_entries: FILE_LIST_ENTRIES };
    let mut download = get(app, caller, id, action, LIST_BYTES).await?;
    let mut json = Vec::new();
    while let Some(bytes) = download.next().await? {
        json.extend(bytes);
    }
    let entries: Vec<FileEntry> = serde_json::from_slice(&json).map_err(|error| AppError::Agent(error.into()))?;
    if entries.len() as u64 > FILE_LIST_ENTRIES {
        return Err(AppError::Agent("more entries than were asked for".into()));
    }
    Ok(entries)
}

/// An operation that goes on in a guest.
struct Transfer {
    guest: Guest,
    input: Input,
    output: FilesOutput,
    deadline: Instant,
    /// What the client calls the path.
    field: &'static str,
}

impl Transfer {
    async fn begin(
        app: &Arc<App>,
        caller: &Caller,
        id: &VmId,
        action: FileAction,
        output_cap: u64,
        field: &'static str,
    ) -> Result<Self, AppError> {
        let (guest, connection, token) = reach(app, caller, id).await?;
        let timeout = app.config.files.timeout;
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let files = Files { action, uid: GUEST_USER, gid: GUEST_USER, timeout_ms };
        let (input, output) = guest.begin(agent::files(connection, &token, files, output_cap)).await?;
        Ok(Self { guest, input, output, deadline: Instant::now() + timeout + SLACK, field })
    }

    async fn failure(&self, error: AgentError) -> AppError {
        match error {
            AgentError::Refused(failure) if failure.code == FailureCode::Forbidden => {
                AppError::field(self.field, shown(&failure.message))
            }
            AgentError::OutputTooLarge => AppError::OverLimit("there is more than the server gives out at once".into()),
            other => self.guest.failure(other).await,
        }
    }
}

/// What comes out of a guest. Dropping it ends the operation there.
pub(crate) struct Download {
    transfer: Transfer,
    first: Option<FilesItem>,
}

/// Returns when the first bytes are there, or the end, so that what fails before is an ordinary error.
async fn get(app: &Arc<App>, caller: &Caller, id: &VmId, action: FileAction, cap: u64) -> Result<Download, AppError> {
    let transfer = Transfer::begin(app, caller, id, action, cap, "path").await?;
    let mut download = Download { transfer, first: None };
    download.first = Some(download.item().await?);
    Ok(download)
}

impl Download {
    /// The next bytes; `None` when that was all. Asked for nothing more after that or an error.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, AppError> {
        let item = match self.first.take() {
            Some(first) => first,
            None => self.item().await?,
        };
        match item {
            FilesItem::Bytes(bytes) => Ok(Some(bytes)),
            FilesItem::Done(_) => Ok(None),
        }
    }

    async fn item(&mut self) -> Result<FilesItem, AppError> {
        match tokio::time::timeout_at(self.transfer.deadline, self.transfer.output.next()).await {
            Ok(Ok(item)) => Ok(item),
            Ok(Err(error)) => Err(self.transfer.failure(error).await),
            Err(_) => Err(AppError::AgentTimeout),
        }
    }
}

async fn put(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    action: FileAction,
    body: &mut impl Pieces,
    cap: u64,
    field: &'static str,
) -> Result<FilesDone, AppError> {
    let Transfer { guest, mut input, mut output, deadline, field } =
        Transfer::begin(app, caller, id, action, 0, field).await?;
    let answered = {
        let feeding = feed(&mut input, body, cap, app.config.http.body_timeout);
        let answer = output.next();
        tokio::pin!(feeding, answer);
        let both = async {
            tokio::select! {
                fed = &mut feeding => fed?,
                // It has seen enough, or is gone.
                answered = &mut answer => return Ok(answered),
            }
            Ok::<_, AppError>(answer.await)
        };
        tokio::time::timeout_at(deadline, both).await.map_err(|_| AppError::AgentTimeout)??
    };
    match answered {
        Ok(FilesItem::Done(done)) => Ok(done),
        Ok(FilesItem::Bytes(_)) => Err(AppError::Agent("output where none was asked for".into())),
        Err(error) => Err(Transfer { guest, input, output, deadline, field }.failure(error).await),
    }
}

/// Sends the body to the guest, piece by piece. Where the guest takes no more, its answer says why.
async fn feed(input: &mut Input, body: &mut impl Pieces, cap: u64, patience: Duration) -> Result<(), AppError> {
    let mut seen = 0_u64;
    loop {
        let piece = tokio::time::timeout(patience, body.next()).await.map_err(|_| AppError::BodyTimeout)?;
        let Some(piece) = piece else { break };
        let piece = piece.map_err(|_| AppError::BadRequest("the body broke off: send it whole".into()))?;
        seen += piece.as_ref().len() as u64;
        if seen > cap {
            return Err(AppError::TooLarge(usize::try_from(cap).unwrap_or(usize::MAX)));
        }
        if input.write(piece.as_ref()).await.is_err() {
            return Ok(());
        }
    }
    // As above.
    let _ = input.end().await;
    Ok(())
}
