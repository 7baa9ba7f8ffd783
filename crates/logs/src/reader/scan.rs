//! Goes through a segment, chunk by chunk, and takes the lines that are wanted.

use std::{io, ops::Range, time::Instant};

use super::{
    Line, Query, level,
    seek::{Seeker, Sought},
};
use crate::{
    level::level_of,
    record::{Kind, Record},
    segment::Segment,
};

/// Records that are read at once.
const CHUNK_RECORDS: u64 = 4096;
/// The same where a text was found: others may be near.
const FOUND_RECORDS: u64 = 256;
/// Bytes of text that are read at once.
const CHUNK_BYTES: u64 = 512 * 1024;
/// More than a line can have; what says it has more is damaged.
const LINE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// What is shown of a line that the disk has lost.
const DAMAGED: &str = "[this line is damaged on the host's disk]";

/// A page that is being gathered.
pub(super) struct Scan<'a> {
    query: &'a Query,
    begun: Instant,
    pub(super) lines: Vec<Line>,
    bytes: usize,
    text: Vec<u8>,
    /// Finds the lines that have the query's text, if it has one.
    seeker: Option<Seeker<'a>>,
    /// A page always gets on by a chunk, whatever time it has.
    has_looked: bool,
}

/// Some lines of a segment, as they lie there.
struct Chunk<'a> {
    segment: &'a Segment,
    /// The place of the first of them.
    first: u64,
    /// Where the first one's text begins in the segment.
    begin: u64,
    records: Vec<Record>,
    text: Vec<u8>,
}

impl<'a> Scan<'a> {
    pub(super) fn new(query: &'a Query, begun: Instant) -> Self {
        let seeker = query.text.as_ref().map(Seeker::new);
        Self { query, begun, lines: Vec::new(), bytes: 0, text: Vec::new(), seeker, has_looked: false }
    }

    /// Takes lines from that place of the segment on. Says up to where it got, and whether that is all.
    pub(super) fn forwards(&mut self, segment: &Segment, from: u64) -> io::Result<(u64, bool)> {
        let wanted = self.wanted(segment)?;
        let mut at = from.max(wanted.start);
        while at < wanted.end {
            if self.is_over() {
                return Ok((at, false));
            }
            self.has_looked = true;
            if let Some(seeker) = &mut self.seeker {
                let is_late = || self.begun.elapsed() >= self.query.budget.time;
                match seeker.first(segment, &(at..wanted.end), is_late)? {
                    Sought::Found(line) => at = line,
                    Sought::Through => break,
                    Sought::Late(line) => return Ok((line, false)),
                }
            }
            let places = at..(at + self.records()).min(wanted.end);
            let chunk = Chunk::forwards(segment, places, std::mem::take(&mut self.text))?;
            for nth in chunk.matching(self.seeker.as_ref()) {
                if self.is_full() {
                    return Ok((at, false));
                }
                self.take(chunk.line(nth));
                at = chunk.first + nth as u64 + 1;
            }
            at = chunk.end();
            self.text = chunk.text;
        }
        Ok((segment.count, true))
    }

    /// The same towards older lines, from the one before that place on.
    pub(super) fn backwards(&mut self, segment: &Segment, until: u64) -> io::Result<(u64, bool)> {
        let wanted = self.wanted(segment)?;
        let mut at = until.min(wanted.end);
        while at > wanted.start {
            if self.is_over() {
                return Ok((at, false));
            }
            self.has_looked = true;
            if let Some(seeker) = &mut self.seeker {
                let is_late = || self.begun.elapsed() >= self.query.budget.time;
                match seeker.last(segment, &(wanted.start..at), is_late)? {
                    Sought::Found(line) => at = line + 1,
                    Sought::Through => break,
                    Sought::Late(line) => return Ok((line + 1, false)),
                }
            }
            let places = at.saturating_sub(self.records()).max(wanted.start)..at;
            let chunk = Chunk::backwards(segment, places, std::mem::take(&mut self.text))?;
            for nth in chunk.matching(self.seeker.as_ref()).into_iter().rev() {
                if self.is_full() {
                    return Ok((at, false));
                }
                self.take(chunk.line(nth));
                at = chunk.first + nth as u64;
            }
            at = chunk.first;
            self.text = chunk.text;
        }
        Ok((0, true))
    }

    /// The places of a segment that the times allow.
    fn wanted(&self, segment: &Segment) -> io::Result<Range<u64>> {
        segment.between(self.query.from.map(|from| from.as_millis()), self.query.to.map(|to| to.as_millis()))
    }

    /// How many records are worth reading.
    fn records(&self) -> u64 {
        match self.query.text {
            Some(_) => FOUND_RECORDS,
            None => CHUNK_RECORDS.min(self.query.batch.saturating_sub(self.lines.len()).max(1) as u64),
        }
    }

    fn is_full(&self) -> bool {
        self.lines.len() >= self.query.batch.max(1) || (self.bytes >= self.query.budget.bytes && !self.lines.is_empty())
    }

    fn is_over(&self) -> bool {
        self.is_full() || (self.has_looked && self.begun.elapsed() >= self.query.budget.time)
    }

    fn take(&mut self, line: Line) {
        self.bytes += line.message.len();
        self.lines.push(line);
    }
}

impl<'a> Chunk<'a> {
    /// The first of those places that fit.
    fn forwards(segment: &'a Segment, places: Range<u64>, text: Vec<u8>) -> io::Result<Self> {
        let (mut records, begin) = with_begin(segment, places.clone())?;
        let fitting = records.partition_point(|record| u64::from(record.end) < begin + CHUNK_BYTES);
        records.truncate(fitting.max(1));
        Self::read(segment, places.start, begin, records, text)
    }

    /// The last of those places that fit.
    fn backwards(segment: &'a Segment, places: Range<u64>, text: Vec<u8>) -> io::Result<Self> {
        let (mut records, mut begin) = with_begin(segment, places.clone())?;
        let end = records.last().map_or(begin, |record| u64::from(record.end));
        let skipped = records
            .partition_point(|record| u64::from(record.end) + CHUNK_BYTES < end)
            .min(records.len().saturating_sub(1));
        if let Some(before) = skipped.checked_sub(1) {
            begin = u64::from(records[before].end) + 1;
        }
        records.drain(..skipped);
        Self::read(segment, places.start + skipped as u64, begin, records, text)
    }

    fn read(segment: &'a Segment, first: u64, begin: u64, records: Vec<Record>, mut text: Vec<u8>) -> io::Result<Self> {
        let end = records.last().map_or(begin, |record| u64::from(record.end) + 1);
        segment.text(begin..end.clamp(begin, begin + CHUNK_BYTES + LINE_BYTES_MAX), &mut text)?;
        Ok(Self { segment, first, begin, records, text })
    }

    fn end(&self) -> u64 {
        self.first + self.records.len().max(1) as u64
    }

    /// Which of the chunk's lines are wanted.
    fn matching(&self, seeker: Option<&Seeker<'_>>) -> Vec<usize> {
        let Some(seeker) = seeker else { return (0..self.records.len()).collect() };
        let mut matching: Vec<usize> = Vec::new();
        for place in seeker.places(&self.text) {
            let place = self.begin + place as u64;
            // Ends grow; where damage makes them not, some line is found, and none twice.
            let nth = self.records.partition_point(|record| u64::from(record.end) <= place);
            if nth < self.records.len() && matching.last().is_none_or(|last| *last < nth) {
                matching.push(nth);
            }
        }
        matching
    }

    fn line(&self, nth: usize) -> Line {
        let record = &self.records[nth];
        let begin = nth.checked_sub(1).map_or(self.begin, |before| u64::from(self.records[before].end) + 1);
        let text = usize::try_from(begin.saturating_sub(self.begin)).ok().and_then(|begin| {
            let end = usize::try_from(u64::from(record.end).checked_sub(self.begin)?).ok()?;
            self.text.get(begin..end)
        });
        let (mut level, mut stream) = level(record.kind);
        let message = match text.filter(|text| record.matches(text)) {
            Some(text) => {
                if matches!(record.kind, Kind::Levelled(_)) {
                    level = level_of(text).unwrap_or(level);
                }
                String::from_utf8_lossy(text).into_owned()
            }
            None => {
                (level, stream) = ("warn", None);
                DAMAGED.to_owned()
            }
        };
        Line {
            number: self.segment.first + self.first + nth as u64,
            time_ms: self.segment.time_ms(record),
            level: level.to_owned(),
            stream,
            message,
        }
    }
}

/// The records of those places, and where the text of the first begins.
fn with_begin(segment: &Segment, places: Range<u64>) -> io::Result<(Vec<Record>, u64)> {
    match places.start.checked_sub(1) {
        Some(before) => {
            let mut records = segment.records(before..places.end)?;
            let begin = if records.is_empty() { 0 } else { u64::from(records.remove(0).end) + 1 };
            Ok((records, begin))
        }
        None => Ok((segment.records(places)?, 0)),
    }
}
