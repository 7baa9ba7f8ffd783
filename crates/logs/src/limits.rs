//! How much of a VM's lines is kept.

use std::time::Duration;

/// Bytes of a segment at most: what is searched, removed and checked at once.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// How much of a VM's lines is kept, and how long a line may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes on disk of one VM's lines; the oldest segments go first.
    pub total_bytes: u64,
    /// How long lines are kept. A segment goes once its newest line is older.
    pub age: Duration,
    /// Bytes of a line; the rest of a longer one is cut, and a mark says so.
    pub line_bytes: usize,
    /// Bytes of a segment, text and index together, at which the next is begun.
    pub segment_bytes: u64,
    /// Time between the first line of a segment and that of the next, at most.
    pub segment_age: Duration,
}

impl Limits {
    /// Limits with segments of a fitting size: an eighth of what is kept, so that at least seven eighths are.
    pub fn new(total_bytes: u64, age: Duration, line_bytes: usize) -> Self {
        Self {
            total_bytes,
            age,
            line_bytes,
            segment_bytes: (total_bytes / 8).clamp(64 * 1024, SEGMENT_BYTES),
            segment_age: (age / 8).clamp(Duration::from_secs(60), Duration::from_secs(86_400)),
        }
    }
}

impl Default for Limits {
    /// 64 MiB, two weeks, lines of 16 KiB.
    fn default() -> Self {
        Self::new(64 * 1024 * 1024, Duration::from_secs(14 * 86_400), 16 * 1024)
    }
}
