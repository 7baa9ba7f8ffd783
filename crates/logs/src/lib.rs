//! The lines that users' programs print, kept on disk: one folder per VM.
//!
//! A [`Writer`] (one per folder, in the process that reads the program's output) appends; any number of [`Reader`]s, in
//! other processes, page, search and follow while it does, and after the VM is gone. Both are synchronous.
//!
//! A folder is a row of segments, each two files named after the number of their first line: `N.text` has the lines
//! as they were printed, each with a line feed; `N.index` a record of fixed size per line (`record.rs`). Text is written
//! before its records, and a line exists once its record does. So a reader sees whole lines only, a killed writer leaves
//! nothing to repair but text that no record names, and lines are found by number, by time (times don't go back within
//! a segment) and from either end without reading what lies between.
//!
//! Lines are numbered from 0, for ever: a place in a log ([`Cursor`]) is a number, and means the same whatever is written,
//! rotated or removed in the meantime.
//!
//! What survives: everything handed to the kernel, whichever process is killed. Nothing is synced to the disk on the
//! way, so that no program waits for a disk: a power cut can lose what the kernel hadn't written back, usually the last
//! half minute. Every record has a checksum of its line; what doesn't match is cut off when the writer opens, and
//! shown as damaged by readers, never as a line.

mod batch;
mod clock;
mod date;
mod level;
mod limits;
mod reader;
mod record;
mod request;
mod retention;
mod search;
mod segment;
mod split;
mod token;
mod writer;

pub use date::read as read_date;
pub use limits::Limits;
pub use reader::{Budget, Cursor, Line, Order, Page, Query, Reader};
pub use request::{Answer, More, Parameters, Request, WrongParameter};
pub use retention::{sweep, sweep_gone};
pub use search::{Needle, NeedleError};
pub use writer::Writer;

/// Where a program printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output: level `info`.
    Stdout,
    /// Standard error: level `error`.
    Stderr,
}
