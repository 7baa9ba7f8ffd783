//! Finds the next line that has a text, in the text of a segment as it lies there: what is passed over is neither taken
//! apart nor looked up in the index.
//!
//! It reads piece by piece. Pieces overlap by more than a text can have, so that none lies across a border; they grow while
//! nothing is found, as the next line with the text is either near or far.

use std::{io, ops::Range};

use crate::{
    search::{Needle, Sieve},
    segment::Segment,
};

/// Bytes that are read at once, at first.
const PIECE_MIN: u64 = 32 * 1024;
/// And at most: what the processor keeps close.
const PIECE_MAX: u64 = 256 * 1024;
/// Bytes of a piece from which it is told which letters are rare.
const SAMPLE: usize = 64 * 1024;

/// Looks for a needle.
pub(super) struct Seeker<'a> {
    needle: &'a Needle,
    sieve: Sieve,
    /// The sieve was made for the log's text.
    is_fit: bool,
    piece: Vec<u8>,
}

/// How far it got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sought {
    /// To that line, which has the text.
    Found(u64),
    /// To the end; no line has it.
    Through,
    /// To that line when the time was over. It must be looked at again.
    Late(u64),
}

impl<'a> Seeker<'a> {
    pub(super) fn new(needle: &'a Needle) -> Self {
        Self { needle, sieve: Sieve::default(), is_fit: false, piece: Vec::new() }
    }

    /// The lines of a text that have the needle, each by a place in it.
    pub(super) fn places<'b>(&'b self, text: &'b [u8]) -> impl Iterator<Item = usize> + 'b {
        self.sieve.places(self.needle, text)
    }

    /// The first of those lines that has the text. A call gets on by a line at least, however late it is.
    pub(super) fn first(
        &mut self,
        segment: &Segment,
        lines: &Range<u64>,
        is_late: impl Fn() -> bool,
    ) -> io::Result<Sought> {
        let text = segment.text_range(lines)?;
        let (mut from, mut length) = (text.start, PIECE_MIN);
        loop {
            let to = text.end.min(from + length);
            self.read(segment, from..to)?;
            if let Some(place) = self.sieve.places(self.needle, &self.piece).next() {
                return Ok(Sought::Found(segment.line_at(lines, from + place as u64)?.min(lines.end - 1)));
            }
            // The text may have lost its end.
            if to == text.end || (self.piece.len() as u64) < to - from {
                return Ok(Sought::Through);
            }
            from = to - self.overlap();
            length = (length * 2).min(PIECE_MAX);
            if is_late() {
                let line = segment.line_at(lines, from)?;
                if line > lines.start {
                    return Ok(Sought::Late(line));
                }
            }
        }
    }

    /// The last of those lines that has the text, as the first.
    pub(super) fn last(
        &mut self,
        segment: &Segment,
        lines: &Range<u64>,
        is_late: impl Fn() -> bool,
    ) -> io::Result<Sought> {
        let text = segment.text_range(lines)?;
        let (mut to, mut length) = (text.end, PIECE_MIN);
        loop {
            let from = text.start.max(to.saturating_sub(length));
            self.read(segment, from..to)?;
            if let Some(place) = self.sieve.places(self.needle, &self.piece).last() {
                return Ok(Sought::Found(segment.line_at(lines, from + place as u64)?.min(lines.end - 1)));
            }
            if from == text.start {
                return Ok(Sought::Through);
            }
            to = from + self.overlap();
            length = (length * 2).min(PIECE_MAX);
            if is_late() {
                let line = segment.line_at(lines, from)?;
                if line + 1 < lines.end {
                    return Ok(Sought::Late(line));
                }
            }
        }
    }

    fn read(&mut self, segment: &Segment, range: Range<u64>) -> io::Result<()> {
        segment.text(range, &mut self.piece)?;
        if !self.is_fit && self.piece.len() >= SAMPLE {
            self.sieve = self.needle.sieve(&self.piece[..SAMPLE]);
            self.is_fit = true;
        }
        Ok(())
    }

    fn overlap(&self) -> u64 {
        self.needle.bytes_max() as u64
    }
}
