//! Several logs as one: their lines merged by time, each log's in its own order.
//!
//! A place in several logs is a place in each of them, so that a line which one of them gets late is neither left out nor
//! moves others.

use std::{collections::VecDeque, io};

use crate::{Cursor, Line, Order, Page, Query, Reader};

/// Lines of several logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManyPage {
    /// In the order that was asked for, each with its log's place in the list of readers.
    pub lines: Vec<(usize, Line)>,
    /// Where the next page begins, in each log.
    pub positions: Vec<Cursor>,
    /// There was nothing more when it was looked.
    pub is_end: bool,
}

/// One log, read ahead a little.
struct Source<'a> {
    reader: &'a Reader,
    ahead: VecDeque<Line>,
    /// After the lines that were taken.
    position: Option<Cursor>,
    /// After the lines that were read ahead.
    read_to: Option<Cursor>,
    is_end: bool,
}

/// Lines of several logs, from a place in each of them on (`None`: from its beginning). `query.after` isn't looked at.
///
/// # Errors
/// The kernel's.
pub fn page_many(logs: &[(&Reader, Option<Cursor>)], query: &Query) -> io::Result<ManyPage> {
    let mut sources: Vec<Source<'_>> = logs
        .iter()
        .map(|(reader, after)| Source {
            reader,
            ahead: VecDeque::new(),
            position: *after,
            read_to: *after,
            is_end: false,
        })
        .collect();
    let share = (query.batch / logs.len().max(1)).clamp(16, 256);
    let (mut lines, mut bytes) = (Vec::new(), 0);
    let begun = std::time::Instant::now();
    let is_end = loop {
        let is_full = lines.len() >= query.batch.max(1) || (bytes >= query.budget.bytes && !lines.is_empty());
        // Each log must show its next line, or have none.
        let mut is_stuck = false;
        for source in &mut sources {
            if source.ahead.is_empty() && !source.is_end {
                let left = query.budget.time.saturating_sub(begun.elapsed());
                source.read(query, share, left)?;
                is_stuck |= source.ahead.is_empty() && !source.is_end;
            }
        }
        let heads = sources.iter().enumerate().filter_map(|(nth, source)| Some((source.ahead.front()?.time_ms, nth)));
        let next = match query.order {
            Order::OldestFirst => heads.min(),
            Order::NewestFirst => heads.max(),
        };
        match next {
            None if !is_stuck => break true,
            Some((_, nth)) if !is_stuck && !is_full => {
                if let Some(line) = sources[nth].take(query.order) {
                    bytes += line.message.len();
                    lines.push((nth, line));
                }
            }
            None | Some(_) => break false,
        }
    };
    let positions = sources.iter().map(|source| source.position.unwrap_or(Cursor(0))).collect();
    Ok(ManyPage { lines, positions, is_end })
}

impl Source<'_> {
    fn read(&mut self, query: &Query, share: usize, left: std::time::Duration) -> io::Result<()> {
        let mut query = Query { after: self.read_to, batch: share, ..query.clone() };
        query.budget.time = left;
        let Page { lines, position, is_end } = self.reader.page(&query)?;
        if lines.is_empty() {
            // Nothing was found up to there.
            self.position = Some(position);
        } else if self.position.is_none() {
            // Fixed now: lines that come later don't belong before.
            self.position = lines.first().map(|line| beside(line, query.order, false));
        }
        (self.read_to, self.is_end) = (Some(position), is_end);
        self.ahead = lines.into();
        Ok(())
    }

    fn take(&mut self, order: Order) -> Option<Line> {
        let line = self.ahead.pop_front()?;
        // With the last of them goes what was looked at after it.
        let after = if self.ahead.is_empty() { self.read_to } else { Some(beside(&line, order, true)) };
        self.position = after;
        Some(line)
    }
}

/// The place before or after a line, in that order.
fn beside(line: &Line, order: Order, after: bool) -> Cursor {
    let is_behind = match order {
        Order::OldestFirst => after,
        Order::NewestFirst => !after,
    };
    Cursor(line.number + u64::from(is_behind))
}
