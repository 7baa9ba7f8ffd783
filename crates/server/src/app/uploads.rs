//! Uploads of filesystems and kernels to images: received to a file, checked, turned into a blob, named in the record.
//!
//! ```text
//!   begin (record) -> <images>/uploads/<id>/<part> -> converter or kernel check -> blob -> record -> the old blob goes
//!                       `- broken off: what came is kept, and the next request goes on with it
//! ```
//!
//! Invariants: an image keeps what it has until the new part is whole; it has one upload at a time; what is received is
//! bounded in bytes, in pace, and by the disk's free space. An upload that the server's end cuts short is found by its record
//! ([`crate::reconcile`]), and can be gone on with as any other. Only what can't become right by going on is thrown away.

mod convert;
pub(crate) mod kept;
mod pace;
mod places;
mod receive;
mod turns;

use std::sync::Arc;

use futures_util::Stream;
use serde_json::json;
use tiffin_store::{Image, Partial, Upload};
use tiffin_types::{
    account::Scope,
    id::{AccountId, Digest, ImageId},
    time::Timestamp,
};

use super::{
    App,
    auth::Caller,
    images::{find, may_change},
};
use crate::{
    error::{AppError, chain},
    fault,
};
use places::Place;
pub(crate) use places::{Ongoing, Progress};
pub(crate) use turns::Turns;

/// Which bytes of the file a body has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Span {
    /// All of them, so many if the client says so.
    Whole(Option<u64>),
    /// Those from `first` to before `end`, of `total`.
    Part { first: u64, end: u64, total: u64 },
    /// None: all `total` have come already.
    Nothing { total: u64 },
}

impl Span {
    fn total(self) -> Option<u64> {
        match self {
            Self::Whole(total) => total,
            Self::Part { total, .. } | Self::Nothing { total } => Some(total),
        }
    }
}

/// What a request says of what it brings.
pub(crate) struct Announced {
    pub(crate) span: Span,
    /// The SHA-256 of the whole file.
    pub(crate) digest: Option<Digest>,
}

/// What became of an upload that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The image has the part.
    Done,
    /// So many bytes of the file are there, and more are to come.
    Incomplete { received_bytes: u64 },
}

/// An upload that may begin.
pub(crate) struct Begun {
    image: Image,
    account: AccountId,
    part: Upload,
    limit: u64,
    /// Where it goes on.
    at: u64,
    /// Where this body ends, if that is known.
    end: Option<u64>,
    total: Option<u64>,
    digest: Option<Digest>,
    place: Place,
}

/// Bytes that an upload may have.
pub(crate) fn upload_limit(app: &App, part: Upload) -> u64 {
    match part {
        Upload::Rootfs => app.config.images.max_rootfs_bytes,
        Upload::Kernel => app.config.images.max_kernel_bytes,
    }
}

/// Whether an upload of what the client says may begin, or go on. Nothing of the body was read, and nothing is changed.
pub(crate) async fn image_upload_admit(
    app: &App,
    caller: &Caller,
    id: &ImageId,
    part: Upload,
    announced: Announced,
) -> Result<Begun, AppError> {
    caller.require(Scope::Write)?;
    let image = find(app, caller, id).await?;
    may_change(caller, &image)?;
    let (limit, total) = (upload_limit(app, part), announced.span.total());
    if total.is_some_and(|bytes| bytes > limit) {
        return Err(too_large(limit));
    }
    let account = caller.account_id.clone();
    let place = app.images.ongoing.take(id, &account, part, total)?;
    let kept = kept::find(app, id, part).await?;
    let (at, end) = match announced.span {
        Span::Whole(_) => (0, total),
        // A new beginning, as one without a range.
        Span::Part { first: 0, end, .. } => (0, Some(end)),
        Span::Part { first, end, total } => (goes_on(kept.as_ref(), first, total, &announced)?, Some(end)),
        Span::Nothing { total } => (goes_on(kept.as_ref(), total, total, &announced)?, Some(total)),
    };
    let digest = announced.digest.or_else(|| kept.filter(|_| at > 0).and_then(|kept| kept.digest));
    enough_room(app, total.unwrap_or(0).saturating_sub(at))?;
    Ok(Begun { image, account, part, limit, at, end, total, digest, place })
}

/// Where an upload goes on that is to go on at `first`.
fn goes_on(kept: Option<&Partial>, first: u64, total: u64, announced: &Announced) -> Result<u64, AppError> {
    let received = kept.map_or(0, |kept| kept.received_bytes);
    let known_total = kept.and_then(|kept| kept.total_bytes);
    let details = json!({ "receivedBytes": received, "totalBytes": known_total });
    if first != received {
        return Err(AppError::Conflict {
            code: "wrong_offset",
            message: format!(
                "{received} bytes of this upload are kept: go on with Content-Range: bytes {received}-{}/{total}, or begin anew without one",
                total.saturating_sub(1)
            ),
            details,
        });
    }
    let other_digest = announced.digest.as_ref().zip(kept.and_then(|kept| kept.digest.as_ref()));
    if known_total.is_some_and(|known| known != total) || other_digest.is_some_and(|(new, known)| new != known) {
        return Err(AppError::Conflict {
            code: "other_upload",
            message: "what is kept is of a file of another length or digest: begin anew without Content-Range".into(),
            details,
        });
    }
    Ok(received)
}

/// Takes a body in and, when it was the last of the file, makes it a part of the image. Answers when VMs can be made with it. It runs
/// to its end, or to that of the body, even when the caller goes away.
pub(crate) async fn image_upload<B: AsRef<[u8]> + Send>(
    app: &Arc<App>,
    begun: Begun,
    body: impl Stream<Item = Result<B, AppError>> + Send + 'static,
) -> Result<Outcome, AppError> {
    let work = Arc::clone(app);
    app.run(async move {
        let (id, part) = (begun.image.id.clone(), begun.part);
        if !work.store.image_upload_begin(&id, part).await? {
            return Err(AppError::NotFound("image"));
        }
        let done = upload(&work, &begun, body).await;
        match &done {
            Ok(Outcome::Done) => {
                tracing::info!(image_id = %id, "{} of image {id} uploaded", part.as_str());
                // What can't be removed now, the next start removes.
                let _ = kept::discard(&work, &id, part).await;
            }
            Ok(Outcome::Incomplete { .. }) => paused(&work, &begun).await?,
            Err(error) => failed(&work, &begun, error).await,
        }
        done
    })
    .await
}

async fn upload<B: AsRef<[u8]>>(
    app: &Arc<App>,
    begun: &Begun,
    body: impl Stream<Item = Result<B, AppError>>,
) -> Result<Outcome, AppError> {
    let id = &begun.image.id;
    let partial = Partial {
        image_id: id.clone(),
        part: begun.part,
        received_bytes: begun.at,
        total_bytes: begun.total,
        digest: begun.digest.clone(),
        updated_at: Timestamp::now(),
    };
    app.store.image_partial_begin(&partial).await?;
    fault::point("after_upload_begin");
    let received_bytes = receive::receive(app, begun, &kept::file(app, id, begun.part), body).await?;
    fault::point("after_upload_received");
    if begun.total.is_some_and(|total| received_bytes < total) {
        return Ok(Outcome::Incomplete { received_bytes });
    }
    convert::convert(app, begun).await?;
    Ok(Outcome::Done)
}

/// A piece has come, and others are to.
async fn paused(app: &App, begun: &Begun) -> Result<(), AppError> {
    let (id, account) = (&begun.image.id, begun.image.account_id.as_ref());
    if kept::keep(app, id, account, begun.part).await? > 0 {
        return Ok(app.store.image_upload_pause(id).await?);
    }
    let quota = app.config.images.quota.bytes;
    let error = AppError::OverLimit(format!(
        "the account's quota of {quota} bytes of images has no room for what came, so nothing of it is kept: delete images or upload the file at once"
    ));
    failed(app, begun, &error).await;
    Err(error)
}

/// Writes down that an upload came to nothing, and what is kept of it; what can't be written now, the reconciler writes.
async fn failed(app: &App, begun: &Begun, error: &AppError) {
    let (id, account, part) = (&begun.image.id, begun.image.account_id.as_ref(), begun.part);
    tracing::info!(image_id = %id, error = chain(error), "the upload to image {id} came to nothing");
    let kept = if is_final(error) {
        kept::discard(app, id, part).await.map(|()| 0)
    } else {
        kept::keep(app, id, account, part).await
    };
    let why = match error {
        AppError::Internal { .. } | AppError::Store(_) => "the server failed: upload it again".to_owned(),
        other => other.to_string(),
    };
    let why = match kept {
        Ok(0) | Err(_) => why,
        Ok(bytes) => format!("{why}; {bytes} bytes are kept: go on there, or upload it anew"),
    };
    if let Err(error) = app.store.image_upload_failed(id, &why).await {
        tracing::warn!(image_id = %id, error = chain(&error), "the end of the upload to image {id} can't be written down");
    }
}

/// Whether what came is of no use, however it is gone on with.
fn is_final(error: &AppError) -> bool {
    matches!(error, AppError::Unprocessable { .. } | AppError::TooLarge(_) | AppError::DigestMismatch { .. })
}

/// Whether the disk keeps its floor when so many bytes more are on it.
pub(super) fn enough_room(app: &App, bytes: u64) -> Result<(), AppError> {
    let disk = nix::sys::statvfs::statvfs(app.config.data_dir.as_std_path());
    let disk = disk.map_err(|error| AppError::internal("looking for free space", error))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    if free < app.config.images.min_free_disk_bytes.saturating_add(bytes) { Err(no_room()) } else { Ok(()) }
}

pub(super) fn no_room() -> AppError {
    AppError::Unavailable { code: "no_capacity", message: "the host's disk has no room for it".into() }
}

fn too_large(limit: u64) -> AppError {
    AppError::TooLarge(usize::try_from(limit).unwrap_or(usize::MAX))
}
