//! Cuts what a program prints into lines.
//!
//! A line ends at a line feed; a carriage return before it goes with it. Other bytes stay as they are, whatever they are.
//! A line longer than the cap keeps its beginning, and a mark says how much is gone. No more than the cap is held.

use std::ops::ControlFlow;

/// One stream's line that has no end yet.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    /// Its first bytes, up to the cap.
    held: Vec<u8>,
    /// Its bytes so far, held or not.
    length: u64,
    /// Its last byte so far.
    last: u8,
}

/// What is done with a line; the flag says whether it was cut.
pub(crate) trait Lines {
    fn line(&mut self, line: &[u8], is_cut: bool);
}

impl Splitter {
    /// Takes bytes as they come.
    pub(crate) fn push(&mut self, mut bytes: &[u8], cap: usize, lines: &mut impl Lines) {
        while let Some(length) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = bytes.split_at(length);
            if self.length == 0 && length <= cap {
                lines.line(line.strip_suffix(b"\r").unwrap_or(line), false);
            } else {
                self.hold(line, cap);
                self.give(cap, lines);
            }
            bytes = &rest[1..];
        }
        self.hold(bytes, cap);
    }

    /// The stream ended: what is held is a line.
    pub(crate) fn end(&mut self, cap: usize, lines: &mut impl Lines) {
        if self.length > 0 {
            self.give(cap, lines);
        }
    }

    fn hold(&mut self, bytes: &[u8], cap: usize) {
        if let Some(last) = bytes.last() {
            let room = cap.saturating_sub(self.held.len()).min(bytes.len());
            self.held.extend_from_slice(&bytes[..room]);
            self.length += bytes.len() as u64;
            self.last = *last;
        }
    }

    fn give(&mut self, cap: usize, lines: &mut impl Lines) {
        let length = self.length - u64::from(self.last == b'\r');
        match usize::try_from(length) {
            Ok(whole) if whole <= self.held.len() => lines.line(&self.held[..whole], false),
            _ => {
                let kept = whole_characters(&self.held[..self.held.len().min(cap)]);
                self.held.truncate(kept);
                self.held.extend_from_slice(format!(" [cut: {} bytes more]", length - kept as u64).as_bytes());
                lines.line(&self.held, true);
            }
        }
        // A long line's room is given back.
        self.held = Vec::new();
        (self.length, self.last) = (0, 0);
    }
}

/// How many bytes of `text` there are before a character whose end is missing.
fn whole_characters(text: &[u8]) -> usize {
    let back = text.iter().rev().take(3).try_fold(1, |back, byte| {
        if byte & 0xC0 == 0x80 { ControlFlow::Continue(back + 1) } else { ControlFlow::Break((back, *byte)) }
    });
    match back {
        ControlFlow::Break((back, 0xC0..=0xDF)) if back < 2 => text.len() - back,
        ControlFlow::Break((back, 0xE0..=0xEF)) if back < 3 => text.len() - back,
        ControlFlow::Break((back, 0xF0..=0xFF)) if back < 4 => text.len() - back,
        ControlFlow::Break(_) | ControlFlow::Continue(_) => text.len(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Lines for Vec<Vec<u8>> {
        fn line(&mut self, line: &[u8], _is_cut: bool) {
            self.push(line.to_vec());
        }
    }

    fn split(chunks: &[&[u8]], cap: usize) -> Vec<String> {
        let (mut splitter, mut lines) = (Splitter::default(), Vec::new());
        for chunk in chunks {
            splitter.push(chunk, cap, &mut lines);
        }
        splitter.end(cap, &mut lines);
        lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    #[test]
    fn lines_end_at_line_feeds_and_at_the_end() {
        assert_eq!(split(&[b"a\r\nb", b"c\r", b"\n\n\rd\r\r\ne"], 100), ["a", "bc", "", "\rd\r", "e"]);
        assert_eq!(split(&[b""], 100), [""; 0]);
        assert_eq!(split(&[b"a\n"], 100), ["a"]);
    }

    #[test]
    fn a_long_line_is_cut_between_characters_and_says_so() {
        assert_eq!(split(&[b"12345\r\n123456\n"], 5), ["12345", "12345 [cut: 1 bytes more]"]);
        assert_eq!(split(&["aäöü".as_bytes()], 4), ["aä [cut: 4 bytes more]"]);
        assert_eq!(split(&["€€".as_bytes()], 5), ["€ [cut: 3 bytes more]"]);
        assert_eq!(split(&["\u{10348}\u{10348}".as_bytes()], 7), ["\u{10348} [cut: 4 bytes more]"]);
        let many = vec![b'x'; 1_000_000];
        assert_eq!(split(&[&many, &many, b"\nok"], 3), ["xxx [cut: 1999997 bytes more]", "ok"]);
    }

    proptest! {
        #[test]
        fn where_chunks_are_cut_changes_nothing(
            text in prop::collection::vec(prop::sample::select(vec![b'a', b'\r', b'\n', 0xC3, 0xA4, 0]), 0..200),
            cuts in prop::collection::vec(1usize..9, 1..60), cap in 1usize..12,
        ) {
            let mut chunks = Vec::new();
            let (mut rest, mut cuts) = (text.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at(rest.len().min(*cuts.next().expect("cycles")));
                chunks.push(chunk);
                rest = after;
            }
            prop_assert_eq!(split(&chunks, cap), split(&[&text], cap));
        }
    }
}
