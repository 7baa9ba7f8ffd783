//! Writes a log: the one writer of its folder.
//!
//! Nothing here fails towards whoever hands in a program's output, so that no trouble with a disk ends or stops the
//! program. Lines that can't be kept are counted, and once there is room a line in their place says how many.

mod active;

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use tiffin_types::time::Timestamp;

use crate::{
    Limits, Stream,
    batch::{Batch, Printed},
    clock::Clock,
    record::Kind,
    retention::{self, Old},
    segment::{self, LOCK},
    split::Splitter,
};
use active::Active;

/// Output that is taken at once, which bounds what is held in memory.
const PIECE_BYTES: usize = 32 * 1024;
/// How often the age of lines is looked at, at most.
const LOOK_MS: i64 = 60_000;

/// Writes the lines of one VM.
#[derive(Debug)]
pub struct Writer {
    folder: PathBuf,
    limits: Limits,
    /// `None` while the folder can't be written.
    open: Option<Open>,
    stdout: Splitter,
    stderr: Splitter,
    batch: Batch,
    lost: u64,
    trouble: Option<io::Error>,
}

/// A folder that is being written.
#[derive(Debug)]
struct Open {
    active: Active,
    /// The segments before, oldest first.
    older: VecDeque<Old>,
    clock: Clock,
    looked_ms: i64,
    _lock: File,
}

impl Writer {
    /// Opens a log's folder, which is made if it isn't there, and goes on where the last writer ended. A folder that
    /// can't be opened now is tried again at every output; [`Writer::trouble`] says why.
    pub fn open(folder: impl Into<PathBuf>, limits: Limits) -> Self {
        let mut writer = Self {
            folder: folder.into(),
            limits,
            open: None,
            stdout: Splitter::default(),
            stderr: Splitter::default(),
            batch: Batch::default(),
            lost: 0,
            trouble: None,
        };
        let opened = writer.opened(Timestamp::now().as_millis()).err();
        writer.trouble = opened;
        writer
    }

    /// Takes what the program printed, in pieces of any size, at that time. Each line that ends in it has been handed to
    /// the kernel when this returns; what comes after the last line feed is held for the rest of its line.
    pub fn push(&mut self, stream: Stream, bytes: &[u8], now: Timestamp) {
        for piece in bytes.chunks(PIECE_BYTES) {
            let splitter = match stream {
                Stream::Stdout => &mut self.stdout,
                Stream::Stderr => &mut self.stderr,
            };
            splitter.push(piece, self.limits.line_bytes, &mut Printed { stream, onto: &mut self.batch });
            self.commit(now);
        }
    }

    /// The stream has ended: what it printed after its last line feed is a line.
    pub fn end(&mut self, stream: Stream, now: Timestamp) {
        let splitter = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        splitter.end(self.limits.line_bytes, &mut Printed { stream, onto: &mut self.batch });
        self.commit(now);
    }

    /// Both streams have ended.
    pub fn finish(&mut self, now: Timestamp) {
        self.end(Stream::Stdout, now);
        self.end(Stream::Stderr, now);
        self.tick(now);
    }

    /// What is due when nothing is printed: to be called now and then (once a minute is enough).
    pub fn tick(&mut self, now: Timestamp) {
        let now_ms = now.as_millis();
        let outcome = self.say_lost(now_ms).and_then(|()| {
            let (folder, limits) = (self.folder.clone(), self.limits);
            let open = self.opened(now_ms)?;
            if open.active.count > 0 && open.is_old(now_ms, &limits) {
                open.rotate(&folder, &limits, now_ms)?;
            }
            open.forget(&folder, &limits, now_ms)
        });
        self.trouble = outcome.err();
    }

    /// Why lines aren't kept at the moment.
    pub fn trouble(&self) -> Option<&io::Error> {
        self.trouble.as_ref()
    }

    /// Lines that weren't kept and of which the log doesn't say so yet.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    fn commit(&mut self, now: Timestamp) {
        if self.batch.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        let outcome = self.write(&batch, now.as_millis());
        if let Err((written, _)) = &outcome {
            self.lost += (batch.len() - written) as u64;
        }
        self.trouble = outcome.err().map(|(_, error)| error);
        self.batch = batch;
        self.batch.clear();
    }

    fn write(&mut self, batch: &Batch, now_ms: i64) -> Result<(), (usize, io::Error)> {
        self.say_lost(now_ms).map_err(|error| (0, error))?;
        let (folder, limits) = (self.folder.clone(), self.limits);
        self.opened(now_ms).map_err(|error| (0, error))?.write(&folder, &limits, batch, now_ms)
    }

    /// Says in the log what is missing, if something is.
    fn say_lost(&mut self, now_ms: i64) -> io::Result<()> {
        if self.lost == 0 {
            return Ok(());
        }
        let mut notice = Batch::default();
        notice.add(
            format!("[lines missing: {}; the host had no room to keep them]", self.lost).as_bytes(),
            Kind::Missing,
        );
        let (folder, limits) = (self.folder.clone(), self.limits);
        self.opened(now_ms)?.write(&folder, &limits, &notice, now_ms).map_err(|(_, error)| error)?;
        self.lost = 0;
        Ok(())
    }

    fn opened(&mut self, now_ms: i64) -> io::Result<&mut Open> {
        match &mut self.open {
            // Looked up anew, as the borrow would otherwise last.
            Some(_) => {}
            none @ None => *none = Some(Open::new(&self.folder, now_ms)?),
        }
        self.open.as_mut().ok_or_else(|| io::Error::other("not open"))
    }
}

impl Open {
    fn new(folder: &Path, now_ms: i64) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(folder.join(LOCK))?;
        lock.try_lock().map_err(|_| io::Error::other("another writer has the log"))?;
        let mut firsts = segment::list(folder)?;
        for orphan in segment::named(folder, ".text")? {
            if firsts.binary_search(&orphan).is_err() {
                fs::remove_file(segment::text_path(folder, orphan))?;
            }
        }
        let newest = firsts.pop();
        let resumed = newest.map(|newest| Active::resume(folder, newest)).transpose()?.flatten();
        let (active, last_ms) = match resumed {
            Some(resumed) => resumed,
            None => (Active::create(folder, newest.unwrap_or(0), now_ms)?, None),
        };
        let older = firsts.into_iter().map(|first| Old::new(folder, first)).collect();
        Ok(Self { active, older, clock: Clock::after(last_ms), looked_ms: 0, _lock: lock })
    }

    fn write(&mut self, folder: &Path, limits: &Limits, batch: &Batch, now_ms: i64) -> Result<(), (usize, io::Error)> {
        let stamp = self.clock.stamp(now_ms);
        let is_full = self.active.bytes() + batch.text().len() as u64 > limits.segment_bytes;
        if (is_full && self.active.count > 0) || stamp.is_jump || self.is_old(stamp.at_ms, limits) {
            self.rotate(folder, limits, stamp.at_ms).map_err(|error| (0, error))?;
        }
        self.active.append(batch, stamp.at_ms)?;
        if now_ms.saturating_sub(self.looked_ms) >= LOOK_MS || now_ms < self.looked_ms {
            self.forget(folder, limits, now_ms).map_err(|error| (batch.len(), error))?;
        }
        Ok(())
    }

    /// Whether a line of that time belongs into the next segment.
    fn is_old(&self, at_ms: i64, limits: &Limits) -> bool {
        let age = i64::try_from(limits.segment_age.as_millis()).unwrap_or(i64::MAX).min(i64::from(u32::MAX));
        at_ms < self.active.base_ms || at_ms.saturating_sub(self.active.base_ms) > age
    }

    /// Begins the next segment.
    fn rotate(&mut self, folder: &Path, limits: &Limits, at_ms: i64) -> io::Result<()> {
        let next = Active::create(folder, self.active.end(), at_ms)?;
        let full = std::mem::replace(&mut self.active, next);
        if full.first != self.active.first {
            self.older.push_back(Old { first: full.first, bytes: full.disk_bytes() });
        }
        self.forget(folder, limits, at_ms)
    }

    fn forget(&mut self, folder: &Path, limits: &Limits, now_ms: i64) -> io::Result<()> {
        self.looked_ms = now_ms;
        retention::forget(folder, &mut self.older, self.active.disk_bytes(), limits, now_ms)
    }
}
