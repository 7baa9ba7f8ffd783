//! Forgets lines: whole segments, oldest first, by the bytes of a log and by the age of a segment's newest line.
//!
//! The writer does so as it goes. A log that has none is looked after by [`sweep`], and that of a VM that is gone by
//! [`sweep_gone`], which removes the folder once nothing is left. Readers may be in the middle of what is removed.

use std::{
    collections::VecDeque,
    fs::{self, OpenOptions},
    io,
    path::Path,
};

use tiffin_types::time::Timestamp;

use crate::{
    Limits,
    record::Header,
    segment::{self, LOCK, Segment},
};

/// A segment that is complete.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Old {
    pub(crate) first: u64,
    /// What it takes on the disk.
    pub(crate) bytes: u64,
}

impl Old {
    pub(crate) fn new(folder: &Path, first: u64) -> Self {
        Self { first, bytes: segment::disk_bytes(folder, first) }
    }
}

/// Removes what is too old or too much of `older`, beside `active_bytes` that stay.
pub(crate) fn forget(
    folder: &Path,
    older: &mut VecDeque<Old>,
    active_bytes: u64,
    limits: &Limits,
    now_ms: i64,
) -> io::Result<()> {
    let mut total: u64 = older.iter().map(|old| old.bytes).sum::<u64>() + active_bytes;
    while let Some(oldest) = older.front().copied() {
        if total <= limits.total_bytes && !is_past(folder, oldest.first, limits, now_ms)? {
            break;
        }
        segment::remove(folder, oldest.first)?;
        total -= oldest.bytes;
        older.pop_front();
    }
    Ok(())
}

/// Whether all of a segment's lines are too old; so are those of one that is gone or damaged.
fn is_past(folder: &Path, first: u64, limits: &Limits, now_ms: i64) -> io::Result<bool> {
    let age = i64::try_from(limits.age.as_millis()).unwrap_or(i64::MAX);
    let newest = match Segment::open(folder, first)? {
        Some(segment) => segment.times()?.map(|(_, newest)| newest),
        None => None,
    };
    Ok(newest.is_none_or(|newest| newest < now_ms.saturating_sub(age)))
}

/// Forgets what is too old or too much of a VM's log, whether it is being written or not. What stays, if all is
/// forgotten, is an empty segment that remembers how many lines there were.
///
/// # Errors
/// The kernel's.
pub fn sweep(folder: &Path, limits: &Limits, now: Timestamp) -> io::Result<()> {
    let mut firsts = segment::list(folder)?;
    let Some(newest) = firsts.pop() else { return Ok(()) };
    let mut older = firsts.into_iter().map(|first| Old::new(folder, first)).collect();
    let newest_bytes = segment::disk_bytes(folder, newest);
    forget(folder, &mut older, newest_bytes, limits, now.as_millis())?;
    if !older.is_empty() || !is_past(folder, newest, limits, now.as_millis())? {
        return Ok(());
    }
    let lock = OpenOptions::new().write(true).create(true).truncate(false).open(folder.join(LOCK))?;
    if lock.try_lock().is_err() {
        // It has a writer, which will.
        return Ok(());
    }
    match Segment::open(folder, newest)? {
        Some(segment) if segment.count > 0 => {
            let next = segment.end();
            fs::write(segment::text_path(folder, next), [])?;
            let header = Header { first: next, base_ms: now.as_millis() };
            fs::write(segment::index_path(folder, next), header.encode())?;
            segment::remove(folder, newest)
        }
        Some(_) | None => Ok(()),
    }
}

/// The same for the log of a VM that is gone: its folder goes with its last line. Says whether it has gone.
///
/// # Errors
/// The kernel's.
pub fn sweep_gone(folder: &Path, limits: &Limits, now: Timestamp) -> io::Result<bool> {
    sweep(folder, limits, now)?;
    for first in segment::list(folder)? {
        if Segment::open(folder, first)?.is_some_and(|segment| segment.count > 0) {
            return Ok(false);
        }
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(true),
    }
}
