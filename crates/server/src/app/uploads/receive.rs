//! A body into a file, at the place where the last one ended.
//!
//! Invariants: nothing is written beyond what the client announced and what is allowed; the free space that the configuration names
//! stays free; what has come by any end stays in the file.

use std::{
    io::{self, SeekFrom},
    pin::{Pin, pin},
    sync::atomic::Ordering,
};

use camino::Utf8Path;
use futures_util::{Stream, StreamExt};
use tokio::{
    fs::File,
    io::{AsyncSeekExt, AsyncWriteExt},
    time::Instant,
};

use super::{Begun, enough_room, no_room, pace::Pace, too_large};
use crate::{app::App, error::AppError};

/// Free space is looked at each time that so many bytes were received.
const LOOK_EVERY: u64 = 64 << 20;

/// Receives the body; how long the file is then.
pub(super) async fn receive<B: AsRef<[u8]>>(
    app: &App,
    begun: &Begun,
    path: &Utf8Path,
    body: impl Stream<Item = Result<B, AppError>>,
) -> Result<u64, AppError> {
    let folder = path.parent().expect("it is in a folder of its own");
    tokio::fs::create_dir_all(folder).await.map_err(disk)?;
    let mut options = File::options();
    let mut file = options.create(true).write(true).truncate(false).open(path).await.map_err(disk)?;
    file.set_len(begun.at).await.map_err(disk)?;
    file.seek(SeekFrom::Start(begun.at)).await.map_err(disk)?;
    let received = write(app, begun, &mut file, pin!(body)).await;
    // What has come is to be in the file however this ends.
    file.flush().await.map_err(disk)?;
    received
}

async fn write<B: AsRef<[u8]>>(
    app: &App,
    begun: &Begun,
    file: &mut File,
    mut body: Pin<&mut impl Stream<Item = Result<B, AppError>>>,
) -> Result<u64, AppError> {
    let counters = &begun.place.counters;
    let mut pace = Pace::new(&app.config.images, app.config.http.body_timeout, Instant::now());
    let mut received = begun.at;
    counters.received.store(received, Ordering::Relaxed);
    while let Some(piece) = next(body.as_mut(), pace.deadline()).await? {
        let piece = piece.as_ref();
        let before = received;
        received += piece.len() as u64;
        if received > begun.limit {
            return Err(too_large(begun.limit));
        }
        if begun.end.is_some_and(|end| received > end) {
            return Err(AppError::BadRequest("the body has more bytes than the request's head says".into()));
        }
        if before / LOOK_EVERY != received / LOOK_EVERY {
            enough_room(app, 0)?;
        }
        file.write_all(piece).await.map_err(disk)?;
        counters.received.store(received, Ordering::Relaxed);
        pace.note(received - begun.at, Instant::now())?;
    }
    match begun.end {
        Some(end) if received < end => Err(AppError::BadRequest(format!(
            "the body ended after {} of the {} bytes that the request's head says",
            received - begun.at,
            end - begun.at
        ))),
        Some(_) | None => Ok(received),
    }
}

async fn next<B>(
    mut body: Pin<&mut impl Stream<Item = Result<B, AppError>>>,
    deadline: Instant,
) -> Result<Option<B>, AppError> {
    match tokio::time::timeout_at(deadline, body.next()).await {
        Ok(piece) => piece.transpose(),
        Err(_) => Err(AppError::BodyTimeout),
    }
}

fn disk(error: io::Error) -> AppError {
    match error.kind() {
        io::ErrorKind::StorageFull => no_room(),
        _ => AppError::internal("receiving an upload", error),
    }
}
