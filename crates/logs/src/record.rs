//! The bytes of an index: a header, then a record of fixed size per line.
//!
//! All numbers are little-endian. Sizes are powers of two, so that no record crosses a page. What is read back is
//! judged, never trusted: a disk may have lost what was written last.

use crate::Stream;

/// Bytes of an index's header.
pub(crate) const HEADER_BYTES: usize = 32;
/// Bytes of a record.
pub(crate) const RECORD_BYTES: usize = 16;

/// Also the version of the format.
const MAGIC: &[u8; 8] = b"tiffinL1";

/// What an index begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// The number of the segment's first line.
    pub(crate) first: u64,
    /// What the records' times count from, in milliseconds since the Unix epoch.
    pub(crate) base_ms: i64,
}

impl Header {
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..16].copy_from_slice(&self.first.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.base_ms.to_le_bytes());
        let check = crc32fast::hash(&bytes[..24]);
        bytes[24..28].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// `None` when that is no header.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let header = Self { first: u64_at(bytes, 8), base_ms: u64_at(bytes, 16).cast_signed() };
        (*bytes == header.encode()).then_some(header)
    }
}

/// What a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Printed by the program.
    Printed(Stream),
    /// Printed by the program, with a level of its own in it.
    Levelled(Stream),
    /// Says, in the place of lines, that they are missing.
    Missing,
}

impl Kind {
    fn encode(self) -> u8 {
        match self {
            Kind::Printed(Stream::Stdout) => 0,
            Kind::Printed(Stream::Stderr) => 1,
            Kind::Levelled(Stream::Stdout) => 2,
            Kind::Levelled(Stream::Stderr) => 3,
            Kind::Missing => 4,
        }
    }

    fn decode(byte: u8) -> Self {
        match byte {
            1 => Kind::Printed(Stream::Stderr),
            2 => Kind::Levelled(Stream::Stdout),
            3 => Kind::Levelled(Stream::Stderr),
            4 => Kind::Missing,
            // 0, or what this version doesn't know.
            _ => Kind::Printed(Stream::Stdout),
        }
    }
}

/// A line's record. The line begins where the one before ends, after its line feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// Where the line ends in the text, before its line feed.
    pub(crate) end: u32,
    /// Milliseconds since the header's time.
    pub(crate) after_ms: u32,
    pub(crate) kind: Kind,
    check: u32,
}

impl Record {
    /// The record of a line.
    pub(crate) fn of(line: &[u8], end: u32, after_ms: u32, kind: Kind) -> Self {
        let mut record = Self { end, after_ms, kind, check: 0 };
        record.check = record.checksum(line);
        record
    }

    /// Whether this is the line that the record was made of.
    pub(crate) fn matches(&self, line: &[u8]) -> bool {
        self.check == self.checksum(line)
    }

    fn checksum(&self, line: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(line);
        let mut own = [0; 9];
        own[..4].copy_from_slice(&self.end.to_le_bytes());
        own[4..8].copy_from_slice(&self.after_ms.to_le_bytes());
        own[8] = self.kind.encode();
        hasher.update(&own);
        hasher.finalize()
    }

    pub(crate) fn encode(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(&self.end.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.after_ms.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.check.to_le_bytes());
        bytes[12] = self.kind.encode();
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; RECORD_BYTES]) -> Self {
        Self {
            end: u32_at(bytes, 0),
            after_ms: u32_at(bytes, 4),
            kind: Kind::decode(bytes[12]),
            check: u32_at(bytes, 8),
        }
    }
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_records_come_back_and_zeros_are_neither() {
        let header = Header { first: 7, base_ms: -5 };
        assert_eq!(Header::decode(&header.encode()), Some(header));
        assert_eq!(Header::decode(&[0; HEADER_BYTES]), None);
        for kind in [Kind::Printed(Stream::Stderr), Kind::Levelled(Stream::Stdout), Kind::Missing] {
            let record = Record::of(b"line", 4, 99, kind);
            assert_eq!(Record::decode(&record.encode()), record);
            assert!(record.matches(b"line") && !record.matches(b"lime"));
        }
        assert!(!Record::decode(&[0; RECORD_BYTES]).matches(b""));
    }
}
