//! From one layer to its entries, and to its files' contents one behind the other.
//!
//! Invariant: what is written is bounded by [`Limits`] before it is written, over all layers of the image together.

use std::{
    fs::File,
    io::{self, BufWriter, Read, Write},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use sha2::{Digest as _, Sha256};
use tiffin_types::id::Digest;

use super::{
    archive::{Archive, What},
    compression::{Budget, Refused, Unpacked as Decompressed},
    enough_room,
    merge::Entry,
};
use crate::{
    convert::{Limits, Unpacked, Unreadable},
    erofs::tree::Meta,
};

const CHUNK: usize = 256 << 10;
/// Free space is looked at each time that so many bytes were written.
const LOOK_EVERY: u64 = 64 << 20;
/// Progress is told each time that so many entries were read.
const TELL_EVERY: u64 = 500;

/// A layer, and where its contents go.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) packed: File,
    pub(super) contents: File,
}

/// What all layers of an image share.
pub(super) struct Shared<'a> {
    limits: &'a Limits,
    budget: Budget,
    entries: AtomicU64,
    bytes: AtomicU64,
    tell: Mutex<&'a mut (dyn FnMut(Unpacked) + Send)>,
}

impl<'a> Shared<'a> {
    pub(super) fn new(limits: &'a Limits, tell: &'a mut (dyn FnMut(Unpacked) + Send)) -> Self {
        Self {
            limits,
            // Archives have a header of 512 bytes, and some more, beside each entry.
            budget: Budget::new(limits.bytes.saturating_add(limits.entries.saturating_mul(2048))),
            entries: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            tell: Mutex::new(tell),
        }
    }

    /// Counts an entry of so many bytes.
    fn count(&self, bytes: u64) -> Result<(), String> {
        let entries = self.entries.fetch_add(1, Ordering::Relaxed) + 1;
        let add = |sum: u64| sum.checked_add(bytes).filter(|sum| *sum <= self.limits.bytes);
        let before = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        let Ok(before) = before else {
            return Err(format!(
                "the layers' files have more than {} bytes together, the most that are taken",
                self.limits.bytes
            ));
        };
        if entries > self.limits.entries {
            return Err(format!("the layers have more than {} entries, the most that are taken", self.limits.entries));
        }
        if entries.is_multiple_of(TELL_EVERY) {
            let mut tell = self.tell.lock().unwrap_or_else(PoisonError::into_inner);
            (*tell)(Unpacked { entries, bytes: before + bytes });
        }
        Ok(())
    }
}

/// Reads a layer, whose content must have that digest.
pub(super) fn unpack(source: &Source, diff_id: &Digest, shared: &Shared<'_>) -> Result<Vec<Entry>, Unreadable> {
    let packed_bytes = source.packed.metadata().map_err(told)?.len();
    let input = Decompressed::new(&source.packed, packed_bytes, &shared.budget).map_err(told)?;
    let mut hashed = Hashed { input, hasher: Sha256::new() };
    let entries = entries(&mut hashed, source, shared)?;
    let found = Digest::from_sha256(hashed.hasher.finalize().into());
    match found == *diff_id {
        true => Ok(entries),
        false => Err(Unreadable::refused(format!(
            "it unpacks to {found}, and the image's configuration says {diff_id}: the image is damaged"
        ))),
    }
}

fn entries(input: impl Read, source: &Source, shared: &Shared<'_>) -> Result<Vec<Entry>, Unreadable> {
    let mut archive = Archive::new(io::BufReader::with_capacity(CHUNK, input));
    let mut out = Contents { file: BufWriter::with_capacity(1 << 20, &source.contents), at: 0, looked: 0 };
    let (mut entries, mut buffer) = (Vec::new(), vec![0; CHUNK]);
    enough_room(&source.contents, shared.limits, 0)?;
    while let Some(entry) = archive.next_entry().map_err(told)? {
        let begins = out.at;
        let size = match entry.what {
            What::File { size, .. } => size,
            What::Folder | What::Link(_) | What::SameAs(_) | What::Fifo | What::Device => 0,
        };
        shared.count(size).map_err(Unreadable::refused)?;
        if size > 0 {
            out.add(&mut archive, &mut buffer, shared.limits)?;
        }
        let meta = Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs: entry.xattrs };
        entries.push(Entry { path: entry.path, what: entry.what, meta, at: begins });
    }
    archive.finish().map_err(told)?;
    out.file.flush().map_err(told)?;
    Ok(entries)
}

/// Where the contents of a layer's files are written.
struct Contents<'a> {
    file: BufWriter<&'a File>,
    at: u64,
    /// Where free space was looked at.
    looked: u64,
}

impl Contents<'_> {
    /// Writes the content of the archive's current entry.
    fn add<R: Read>(&mut self, from: &mut Archive<R>, buffer: &mut [u8], limits: &Limits) -> Result<(), Unreadable> {
        loop {
            let count = from.content(buffer).map_err(told)?;
            if count == 0 {
                return Ok(());
            }
            self.file.write_all(&buffer[..count]).map_err(told)?;
            self.at += count as u64;
            if self.at - self.looked >= LOOK_EVERY {
                self.looked = self.at;
                enough_room(self.file.get_ref(), limits, 0)?;
            }
        }
    }
}

/// What an error means: what comes from the host has a number.
fn told(error: io::Error) -> Unreadable {
    if error.kind() == io::ErrorKind::StorageFull || error.kind() == io::ErrorKind::QuotaExceeded {
        return Unreadable::DiskFull;
    }
    if error.raw_os_error().is_some() {
        return Unreadable::Host(error.to_string());
    }
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Refused>()) {
        Some(Refused(why)) => Unreadable::refused(why.clone()),
        None => Unreadable::refused(format!("it is damaged or cut short: {error}")),
    }
}

/// Bytes that are hashed as they are read.
struct Hashed<R> {
    input: R,
    hasher: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
