//! The files of a log's folder, and a segment as readers see it.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::record::{HEADER_BYTES, Header, RECORD_BYTES, Record};

/// The file whose lock the writer holds.
pub(crate) const LOCK: &str = "writer.lock";

pub(crate) fn index_path(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("{first:020}.index"))
}

pub(crate) fn text_path(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("{first:020}.text"))
}

/// The first lines' numbers of a folder's segments, in order. A folder that isn't there has none.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<u64>> {
    let mut firsts = named(folder, ".index")?;
    firsts.sort_unstable();
    Ok(firsts)
}

/// The numbers of the files with that ending.
pub(crate) fn named(folder: &Path, ending: &str) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let digits = name.to_str().and_then(|name| name.strip_suffix(ending)).filter(|digits| digits.len() == 20);
        numbers.extend(digits.and_then(|digits| digits.parse::<u64>().ok()));
    }
    Ok(numbers)
}

/// Removes a segment. One that is gone already is fine.
pub(crate) fn remove(folder: &Path, first: u64) -> io::Result<()> {
    for path in [index_path(folder, first), text_path(folder, first)] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// What a segment takes on the disk, in whole blocks.
pub(crate) fn disk_bytes(folder: &Path, first: u64) -> u64 {
    let length = |path| fs::metadata(path).map_or(0, |file: fs::Metadata| file.len());
    blocks(length(index_path(folder, first))) + blocks(length(text_path(folder, first)))
}

/// A file's length in whole blocks, with one for itself, so that many small segments count too.
pub(crate) fn blocks(bytes: u64) -> u64 {
    (bytes / 4096 + 1) * 4096
}

/// A segment as it was when it was opened; lines written later aren't seen.
#[derive(Debug)]
pub(crate) struct Segment {
    /// The number of its first line.
    pub(crate) first: u64,
    /// How many lines it has.
    pub(crate) count: u64,
    base_ms: i64,
    index: File,
    text: File,
}

impl Segment {
    /// `None` when it isn't there.
    pub(crate) fn open(folder: &Path, first: u64) -> io::Result<Option<Self>> {
        let (index, text) = match (File::open(index_path(folder, first)), File::open(text_path(folder, first))) {
            (Ok(index), Ok(text)) => (index, text),
            (Err(error), _) | (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        let mut bytes = [0; HEADER_BYTES];
        let header = match index.read_exact_at(&mut bytes, 0) {
            Ok(()) => Header::decode(&bytes).filter(|header| header.first == first),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => return Err(error),
        };
        // Without a header it is being made, or was when the power went.
        let (base_ms, count) = match header {
            Some(header) => {
                (header.base_ms, index.metadata()?.len().saturating_sub(HEADER_BYTES as u64) / RECORD_BYTES as u64)
            }
            None => (0, 0),
        };
        Ok(Some(Self { first, count, base_ms, index, text }))
    }

    /// The number after its last line.
    pub(crate) fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// The time of a record.
    pub(crate) fn time_ms(&self, record: &Record) -> i64 {
        self.base_ms.saturating_add(i64::from(record.after_ms))
    }

    /// The records of lines of the segment, by their places in it; as many as are there.
    pub(crate) fn records(&self, places: Range<u64>) -> io::Result<Vec<Record>> {
        let places = places.start..places.end.min(self.count);
        let length = usize::try_from(places.end.saturating_sub(places.start)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length.saturating_mul(RECORD_BYTES)];
        let read = read_at(&self.index, &mut bytes, HEADER_BYTES as u64 + places.start * RECORD_BYTES as u64)?;
        Ok(bytes[..read].as_chunks::<RECORD_BYTES>().0.iter().map(Record::decode).collect())
    }

    /// Bytes of the text; fewer where there are fewer.
    pub(crate) fn text(&self, range: Range<u64>, into: &mut Vec<u8>) -> io::Result<()> {
        into.resize(usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX), 0);
        let read = read_at(&self.text, into, range.start)?;
        into.truncate(read);
        Ok(())
    }

    /// The places of the lines between two times, both included.
    pub(crate) fn between(&self, from_ms: Option<i64>, to_ms: Option<i64>) -> io::Result<Range<u64>> {
        let begin = match from_ms {
            Some(from) => self.first_place(0..self.count, |record| self.time_ms(record) >= from)?,
            None => 0,
        };
        let end = match to_ms {
            Some(to) => self.first_place(0..self.count, |record| self.time_ms(record) > to)?,
            None => self.count,
        };
        Ok(begin..end.max(begin))
    }

    /// The time of the first line, and of the last.
    pub(crate) fn times(&self) -> io::Result<Option<(i64, i64)>> {
        if self.count == 0 {
            return Ok(None);
        }
        let (first, last) = (self.records(0..1)?, self.records(self.count - 1..self.count)?);
        Ok(first.first().zip(last.first()).map(|(first, last)| (self.time_ms(first), self.time_ms(last))))
    }

    /// Where the text of those lines begins and ends, as far as there is text.
    pub(crate) fn text_range(&self, places: &Range<u64>) -> io::Result<Range<u64>> {
        // The text of a line begins where that of the one before ends.
        let border = |place: u64| match place.checked_sub(1) {
            Some(before) => Ok(self.records(before..place)?.first().map_or(0, |record| u64::from(record.end) + 1)),
            None => io::Result::Ok(0),
        };
        let begin = border(places.start)?;
        // A damaged record may claim any.
        let end = border(places.end)?.min(self.text.metadata()?.len());
        Ok(begin..end.max(begin))
    }

    /// Which of those lines a byte of the text is in, or a line feed before.
    pub(crate) fn line_at(&self, places: &Range<u64>, byte: u64) -> io::Result<u64> {
        self.first_place(places.clone(), |record| u64::from(record.end) > byte)
    }

    /// The first of those places whose record `is_past`. Neither times nor the text's places go back within a segment.
    fn first_place(&self, places: Range<u64>, is_past: impl Fn(&Record) -> bool) -> io::Result<u64> {
        let (mut low, mut high) = (places.start, places.end);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.records(middle..middle + 1)?.first() {
                Some(record) if !is_past(record) => low = middle + 1,
                Some(_) | None => high = middle,
            }
        }
        Ok(low)
    }
}

/// Reads until the buffer is full or the file ends.
pub(crate) fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < into.len() {
        match file.read_at(&mut into[read..], at + read as u64) {
            Ok(0) => break,
            Ok(length) => read += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}
