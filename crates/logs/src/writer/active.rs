//! The segment that is being written.
//!
//! Both files are written at places that are known, text first: what a failed or killed write left behind is
//! overwritten by the next.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use crate::{
    batch::Batch,
    record::{HEADER_BYTES, Header, RECORD_BYTES, Record},
    segment::{blocks, index_path, read_at, text_path},
};

/// Bytes of an index that are checked at once.
const CHECKED_RECORDS: usize = 4096;

#[derive(Debug)]
pub(super) struct Active {
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) base_ms: i64,
    text_bytes: u32,
    index: File,
    text: File,
    /// Kept to be used again.
    records: Vec<u8>,
}

impl Active {
    /// Begins a segment.
    pub(super) fn create(folder: &Path, first: u64, base_ms: i64) -> io::Result<Self> {
        let file = |path| OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
        let text = file(text_path(folder, first))?;
        let index = file(index_path(folder, first))?;
        index.write_all_at(&Header { first, base_ms }.encode(), 0)?;
        Ok(Self { first, count: 0, base_ms, text_bytes: 0, index, text, records: Vec::new() })
    }

    /// Goes on with a segment that another writer left, and with the time of its last line. What doesn't match its
    /// record, and all after it, is cut off. `None` when it has no header.
    pub(super) fn resume(folder: &Path, first: u64) -> io::Result<Option<(Self, Option<i64>)>> {
        let file = |path| OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let (index, text) = (file(index_path(folder, first))?, file(text_path(folder, first))?);
        let mut bytes = [0; HEADER_BYTES];
        let read = read_at(&index, &mut bytes, 0)?;
        let Some(header) = Header::decode(&bytes).filter(|header| read == HEADER_BYTES && header.first == first) else {
            return Ok(None);
        };
        let base_ms = header.base_ms;
        let mut active = Self { first, count: 0, base_ms, text_bytes: 0, index, text, records: Vec::new() };
        let last_ms = active.check()?.map(|after| base_ms.saturating_add(i64::from(after)));
        active.index.set_len(active.index_bytes())?;
        active.text.set_len(u64::from(active.text_bytes))?;
        Ok(Some((active, last_ms)))
    }

    /// Counts the lines that match their records, up to the first that doesn't; the last one's time.
    fn check(&mut self) -> io::Result<Option<u32>> {
        let mut records = vec![0; CHECKED_RECORDS * RECORD_BYTES];
        let text_length = self.text.metadata()?.len();
        let mut line = Vec::new();
        let mut last = None;
        loop {
            let read = read_at(&self.index, &mut records, self.index_bytes())?;
            for record in records[..read].as_chunks::<RECORD_BYTES>().0 {
                let record = Record::decode(record);
                // A damaged record may claim any length.
                let is_there = u64::from(record.end) < text_length;
                let Some(length) = record.end.checked_sub(self.text_bytes).filter(|_| is_there) else {
                    return Ok(last);
                };
                line.resize(length as usize + 1, 0);
                let has_line = read_at(&self.text, &mut line, u64::from(self.text_bytes))? == line.len();
                let is_sane = last.is_none_or(|last| record.after_ms >= last);
                if !has_line || !is_sane || line.pop() != Some(b'\n') || !record.matches(&line) {
                    return Ok(last);
                }
                self.count += 1;
                self.text_bytes = record.end.saturating_add(1);
                last = Some(record.after_ms);
            }
            if read < records.len() {
                return Ok(last);
            }
        }
    }

    /// Writes lines. When that fails, so many of them are written.
    pub(super) fn append(&mut self, batch: &Batch, at_ms: i64) -> Result<(), (usize, io::Error)> {
        let full = || (0, io::Error::other("the segment is full"));
        let after_ms = u32::try_from(at_ms.saturating_sub(self.base_ms)).map_err(|_| full())?;
        let length = u32::try_from(batch.text().len()).map_err(|_| full())?;
        let begin = self.text_bytes;
        let text_bytes = begin.checked_add(length).ok_or_else(full)?;
        self.text.write_all_at(batch.text(), u64::from(self.text_bytes)).map_err(|error| (0, error))?;
        let mut records = std::mem::take(&mut self.records);
        records.clear();
        for (line, end, kind) in batch.lines() {
            // Within `length`, so it fits.
            let end = begin.saturating_add(u32::try_from(end).unwrap_or(length));
            records.extend_from_slice(&Record::of(line, end, after_ms, kind).encode());
        }
        let (written, outcome) = write_at(&self.index, &records, self.index_bytes());
        if outcome.is_ok() {
            (self.count, self.text_bytes) = (self.count + batch.len() as u64, text_bytes);
        } else if let Some(last) = (written / RECORD_BYTES).checked_sub(1) {
            // Readers may have seen these.
            self.count += last as u64 + 1;
            let text = batch.lines().nth(last).map_or(0, |(_, end, _)| end + 1);
            self.text_bytes = begin.saturating_add(u32::try_from(text).unwrap_or(length));
        }
        self.records = records;
        outcome.map_err(|error| (written / RECORD_BYTES, error))
    }

    /// Bytes of both files.
    pub(super) fn bytes(&self) -> u64 {
        self.index_bytes() + u64::from(self.text_bytes)
    }

    /// What it takes on the disk.
    pub(super) fn disk_bytes(&self) -> u64 {
        blocks(self.index_bytes()) + blocks(u64::from(self.text_bytes))
    }

    /// The number after its last line.
    pub(super) fn end(&self) -> u64 {
        self.first + self.count
    }

    fn index_bytes(&self) -> u64 {
        HEADER_BYTES as u64 + self.count * RECORD_BYTES as u64
    }
}

/// Writes all, or says how much.
fn write_at(file: &File, bytes: &[u8], at: u64) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write_at(&bytes[written..], at + written as u64) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(length) => written += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}
