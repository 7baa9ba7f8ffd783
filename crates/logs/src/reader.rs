//! Reads a log while it is written, and after.
//!
//! A page is what lies on one side of a place in the log, in the order of the lines' numbers. It ends at the number of
//! lines that was asked for, at the end of the log, or when it has taken as much time or memory as it may; it then says
//! where to go on, and never leaves a line out.

mod scan;
mod seek;

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tiffin_types::time::Timestamp;

use crate::{
    Stream,
    record::Kind,
    search::Needle,
    segment::{self, Segment},
};
use scan::Scan;

/// How often a page begins anew because segments were removed under it.
const TRIES: u32 = 100;

/// A place in a log: before the line of that number, which may be yet to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor(pub u64);

/// In which order lines are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they were printed.
    OldestFirst,
    /// The other way round.
    NewestFirst,
}

/// What a page may take.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// How long it may search.
    pub time: Duration,
    /// Bytes of its lines; one line is always given.
    pub bytes: usize,
}

impl Default for Budget {
    /// Two seconds, 8 MiB.
    fn default() -> Self {
        Self { time: Duration::from_secs(2), bytes: 8 * 1024 * 1024 }
    }
}

/// What is asked of a log.
#[derive(Debug, Clone)]
pub struct Query {
    /// Only lines with this text.
    pub text: Option<Needle>,
    /// Lines of a page.
    pub batch: usize,
    /// Their order.
    pub order: Order,
    /// Where the page begins: lines from there on, or, newest first, those before. Else at the log's end.
    pub after: Option<Cursor>,
    /// Only lines of this time or later.
    pub from: Option<Timestamp>,
    /// Only lines of this time or earlier.
    pub to: Option<Timestamp>,
    /// What it may take.
    pub budget: Budget,
}

impl Query {
    /// The first `batch` lines of that order.
    pub fn new(order: Order, batch: usize) -> Self {
        Self { text: None, batch, order, after: None, from: None, to: None, budget: Budget::default() }
    }
}

/// A line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its number in its log.
    pub number: u64,
    /// When it was printed, in milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// `info` for stdout, `error` for stderr, or what the line says itself.
    pub level: String,
    /// Where it was printed; `None` for what the log says of itself.
    pub stream: Option<Stream>,
    /// What was printed. Bytes that are no UTF-8 are shown as U+FFFD.
    pub message: String,
}

/// Some lines of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// In the order that was asked for.
    pub lines: Vec<Line>,
    /// Where the next page begins. At the end of a log that is still written, lines may come there.
    pub position: Cursor,
    /// There was nothing more when it was looked.
    pub is_end: bool,
}

impl Page {
    /// Where to go on, if there is more.
    pub fn next(&self) -> Option<Cursor> {
        (!self.is_end).then_some(self.position)
    }
}

/// Reads the lines of one VM.
#[derive(Debug, Clone)]
pub struct Reader {
    folder: PathBuf,
}

impl Reader {
    /// The log in that folder. One that isn't there is an empty log.
    pub fn open(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The log's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Lines of the log.
    ///
    /// # Errors
    /// The kernel's.
    pub fn page(&self, query: &Query) -> io::Result<Page> {
        let mut scan = Scan::new(query, Instant::now());
        match query.order {
            Order::OldestFirst => self.forwards(query, &mut scan),
            Order::NewestFirst => self.backwards(query, &mut scan),
        }
    }

    /// The place after the newest line.
    ///
    /// # Errors
    /// The kernel's.
    pub fn end(&self) -> io::Result<Cursor> {
        let newest = self.try_segments(|firsts| match firsts.last() {
            Some(newest) => Ok(Segment::open(&self.folder, *newest)?.map(Some)),
            None => Ok(Some(None)),
        })?;
        Ok(Cursor(newest.map_or(0, |segment| segment.end())))
    }

    /// The earliest and the latest time of lines, if there are any. (Where the clock was set back, these needn't be those of
    /// the oldest and the newest line.)
    ///
    /// # Errors
    /// The kernel's.
    pub fn times(&self) -> io::Result<Option<(Timestamp, Timestamp)>> {
        let mut times: Option<(i64, i64)> = None;
        for first in segment::list(&self.folder)? {
            let Some(segment) = Segment::open(&self.folder, first)? else { continue };
            if let Some((first, last)) = segment.times()? {
                let (earliest, latest) = times.unwrap_or((first, last));
                times = Some((earliest.min(first), latest.max(last)));
            }
        }
        Ok(times.map(|(first, last)| (Timestamp::from_millis(first), Timestamp::from_millis(last))))
    }

    /// Does something with the list of segments; again, with a new list, while it finds that one has gone (`None`).
    fn try_segments<T>(&self, mut what: impl FnMut(&[u64]) -> io::Result<Option<T>>) -> io::Result<T> {
        for _ in 0..TRIES {
            if let Some(outcome) = what(&segment::list(&self.folder)?)? {
                return Ok(outcome);
            }
        }
        Err(io::Error::other("segments are removed faster than they can be read"))
    }

    /// Whether a segment follows that one which the list may not have.
    fn is_unlisted(&self, before: &Segment) -> bool {
        before.count > 0 && segment::index_path(&self.folder, before.end()).exists()
    }

    fn forwards(&self, query: &Query, scan: &mut Scan<'_>) -> io::Result<Page> {
        let mut at = query.after.map_or(0, |cursor| cursor.0);
        let is_end = self.try_segments(|firsts| {
            // The last that begins at or before the place, and all after it.
            let begin = firsts.partition_point(|first| *first <= at).saturating_sub(1);
            for (nth, first) in firsts.iter().enumerate().skip(begin) {
                let Some(segment) = Segment::open(&self.folder, *first)? else { return Ok(None) };
                let is_last = nth + 1 == firsts.len();
                if at > segment.end() && !is_last {
                    // What was there is damaged and gone.
                    continue;
                }
                // A place that the log hasn't got to is no place: the end.
                at = at.clamp(segment.first, segment.end());
                let (place, is_through) = scan.forwards(&segment, at - segment.first)?;
                at = segment.first + place;
                if !is_through {
                    return Ok(Some(false));
                }
                at = segment.end();
                match firsts.get(nth + 1) {
                    // It was made while the folder was listed.
                    Some(next) if *next > at && self.is_unlisted(&segment) => return Ok(None),
                    // What was between is damaged and gone.
                    Some(next) if *next > at => at = *next,
                    Some(_) | None => {}
                }
            }
            Ok(Some(true))
        })?;
        Ok(Page { lines: std::mem::take(&mut scan.lines), position: Cursor(at), is_end })
    }

    fn backwards(&self, query: &Query, scan: &mut Scan<'_>) -> io::Result<Page> {
        let mut at = query.after.map(|cursor| cursor.0);
        let is_end = self.try_segments(|firsts| {
            let end = firsts.partition_point(|first| at.is_none_or(|at| *first < at));
            for first in firsts[..end].iter().rev() {
                // The oldest go first: if this one has gone, so have those before it.
                let Some(segment) = Segment::open(&self.folder, *first)? else { return Ok(Some(true)) };
                let is_before = at.is_some_and(|at| at > segment.end()) && segment.count > 0;
                if is_before && firsts.binary_search(&segment.end()).is_err() && self.is_unlisted(&segment) {
                    // It was made while the folder was listed.
                    return Ok(None);
                }
                let until = at.unwrap_or(u64::MAX).clamp(segment.first, segment.end());
                let (place, is_through) = scan.backwards(&segment, until - segment.first)?;
                at = Some(segment.first + place);
                if !is_through {
                    return Ok(Some(false));
                }
                at = Some(segment.first);
            }
            Ok(Some(true))
        })?;
        Ok(Page { lines: std::mem::take(&mut scan.lines), position: Cursor(at.unwrap_or(0)), is_end })
    }
}

/// The level of a line that says none itself.
fn level(kind: Kind) -> (&'static str, Option<Stream>) {
    match kind {
        Kind::Printed(stream @ Stream::Stdout) | Kind::Levelled(stream @ Stream::Stdout) => ("info", Some(stream)),
        Kind::Printed(stream @ Stream::Stderr) | Kind::Levelled(stream @ Stream::Stderr) => ("error", Some(stream)),
        Kind::Missing => ("warn", None),
    }
}
