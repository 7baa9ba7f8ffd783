//! Finds text in lines, whichever case it is in.
//!
//! Two letters are the same when Unicode's simple case folding says so: letter by letter, in every script, so `ß` isn't
//! `ss`. Lines are searched as they lie in the text, many at once, without taking them apart.
//!
//! What is searched for most of the time isn't there, so what counts is how fast text is passed over. A [`Sieve`] looks
//! for those three letters of the needle that are rarest in a piece of the text, and at the rest of the needle only where
//! they are. It decides nothing: it finds what the needle's own expression finds, which the tests hold against it.

use std::fmt;

use regex::bytes::{Regex, RegexBuilder};

/// Characters of a text that is searched for, at most.
pub(crate) const NEEDLE_CHARS: usize = 1000;

/// Letters that a sieve looks for.
const WINDOW: usize = 3;
/// Bytes that the longest form of an ASCII letter has, in whichever case: that of `k` is the Kelvin sign.
const FORM_BYTES: usize = 3;

/// A text that is searched for.
#[derive(Clone)]
pub struct Needle {
    text: String,
    whole: Regex,
}

/// A text that can't be searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NeedleError {
    /// It is empty or too long.
    #[error("must have from 1 to {NEEDLE_CHARS} characters")]
    Length,
    /// It has a line feed, which no line has.
    #[error("must not have a line feed, as no line has one: search for the text of one line")]
    LineFeed,
}

impl Needle {
    /// Gets ready to search for a text.
    ///
    /// # Errors
    /// See [`NeedleError`].
    pub fn new(text: &str) -> Result<Self, NeedleError> {
        if !(1..=NEEDLE_CHARS).contains(&text.chars().count()) {
            return Err(NeedleError::Length);
        }
        if text.contains('\n') {
            return Err(NeedleError::LineFeed);
        }
        let whole = expression(text).ok_or(NeedleError::Length)?;
        Ok(Self { text: text.to_owned(), whole })
    }

    /// Bytes that no text which matches exceeds.
    pub(crate) fn bytes_max(&self) -> usize {
        self.text.chars().count() * 4
    }

    /// A sieve for text like that sample; without one where it would be of no use.
    pub(crate) fn sieve(&self, sample: &[u8]) -> Sieve {
        let text = self.text.as_bytes();
        // Other letters than ASCII's are rare enough by themselves, and so short a text is its own window.
        if !text.is_ascii() || text.len() <= WINDOW || sample.is_empty() {
            return Sieve::default();
        }
        let counts = Counts::of(sample);
        let windows = text.windows(WINDOW).enumerate();
        let rarest = windows.min_by_key(|(_, window)| (counts.at_most(window), has_odd_forms(window)));
        let window = rarest.and_then(|(at, _)| Some((at, expression(self.text.get(at..at + WINDOW)?)?)));
        Sieve { window }
    }
}

/// Finds a text, in whichever case it is.
fn expression(text: &str) -> Option<Regex> {
    RegexBuilder::new(&regex::escape(text)).case_insensitive(true).build().ok()
}

/// Whether a letter of an ASCII text has forms that are no ASCII: `ſ` and the Kelvin sign.
fn has_odd_forms(text: &[u8]) -> bool {
    text.iter().any(|byte| matches!(byte, b's' | b'S' | b'k' | b'K'))
}

/// Passes over text without a needle. One that has no window looks for all of the needle at once.
#[derive(Default)]
pub(crate) struct Sieve {
    /// Letters of the needle, and where they are in it.
    window: Option<(usize, Regex)>,
}

impl Sieve {
    /// The places in `lines`, in order, at which the needle's text begins: one for each line that has it, given where the
    /// line feed after a place is.
    pub(crate) fn places<'a>(&'a self, needle: &'a Needle, lines: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        let mut begin = 0;
        std::iter::from_fn(move || {
            let (start, end) = self.find(needle, lines, begin)?;
            let after = &lines[end..];
            begin = end + memchr::memchr(b'\n', after).unwrap_or(after.len());
            Some(start)
        })
    }

    /// The first text from there on that matches.
    fn find(&self, needle: &Needle, lines: &[u8], begin: usize) -> Option<(usize, usize)> {
        let Some((offset, window)) = &self.window else {
            return needle.whole.find_at(lines, begin).map(|found| (found.start(), found.end()));
        };
        let text = needle.text.as_bytes();
        let odd = has_odd_forms(text);
        let mut at = begin;
        loop {
            let seen = window.find_at(lines, at)?;
            let start = seen.start().checked_sub(*offset).filter(|start| *start >= begin);
            let plain = start.and_then(|start| Some((start, lines.get(start..start + text.len())?)));
            if let Some((start, plain)) = plain
                && plain.eq_ignore_ascii_case(text)
            {
                return Some((start, start + text.len()));
            }
            if odd {
                // As far as the text reaches with its letters in their longest forms.
                let from = seen.start().saturating_sub(offset * FORM_BYTES).max(begin);
                let to = (seen.start() + (text.len() - offset) * FORM_BYTES).min(lines.len());
                let around = &lines[from..to];
                if !around.is_ascii()
                    && let Some(found) = needle.whole.find(around)
                {
                    return Some((from + found.start(), from + found.end()));
                }
            }
            at = seen.start() + 1;
        }
    }
}

/// How often each three letters are in a text, whichever case they are in.
struct Counts(Vec<u16>);

impl Counts {
    fn of(text: &[u8]) -> Self {
        let mut counts = vec![0u16; 1 << 16];
        for window in text.windows(WINDOW) {
            let count = &mut counts[slot(window)];
            *count = count.saturating_add(1);
        }
        Self(counts)
    }

    fn at_most(&self, window: &[u8]) -> u16 {
        self.0[slot(window)]
    }
}

/// Others may share it.
fn slot(window: &[u8]) -> usize {
    let letters = window.iter().fold(0u32, |all, byte| (all << 8) | u32::from(byte.to_ascii_lowercase()));
    (letters.wrapping_mul(0x9E37_79B1) >> 16) as usize
}

impl fmt::Debug for Needle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Needle")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_in(text: &str, line: &[u8]) -> bool {
        let needle = Needle::new(text).unwrap();
        needle.sieve(&[]).places(&needle, line).next().is_some()
    }

    /// What a sieve with each possible window finds is the same; that.
    fn places(text: &str, lines: &[u8]) -> Vec<usize> {
        let needle = Needle::new(text).unwrap();
        let places: Vec<usize> = Sieve::default().places(&needle, lines).collect();
        for at in 0..text.len().saturating_sub(WINDOW) + 1 {
            let window = text.get(at..at + WINDOW).filter(|_| text.is_ascii());
            let sieve = Sieve { window: window.and_then(|window| Some((at, expression(window)?))) };
            assert_eq!(sieve.places(&needle, lines).collect::<Vec<_>>(), places, "{text} by {window:?}");
        }
        assert_eq!(needle.sieve(lines).places(&needle, lines).collect::<Vec<_>>(), places);
        places
    }

    #[test]
    fn case_makes_no_difference_in_any_script() {
        for (text, line) in [
            ("ERROR", "an error here"),
            ("äÖ", "xÄöx"),
            ("στίγμας", "ΣΤΊΓΜΑΣ"),
            ("ПРИВЕТ", "привет"),
            (".*", "a.*b"),
            ("a\\b[", "A\\B["),
        ] {
            assert!(is_in(text, line.as_bytes()), "{text} in {line}");
        }
        assert!(!is_in(".*", b"abc") && !is_in("straße", "STRASSE".as_bytes()));
    }

    #[test]
    fn bytes_that_are_no_text_are_passed_over() {
        assert!(is_in("needle", b"\xff\x00\xc3Needle\xff"));
    }

    #[test]
    fn each_line_is_found_once() {
        assert_eq!(places("a", b"aaa\nb\nba\n\na"), [0, 7, 10]);
        assert_eq!(places("abab", b"aababab abab\nABA\nBxabAb"), [1, 19]);
    }

    #[test]
    fn a_sieve_knows_every_form_of_a_letter() {
        for lines in
            ["a ta\u{17F}K xs", "TA\u{17F}\u{212A}\nTASK\n\u{212A}ta\u{17F}\u{212A}", "s\u{17F}task", "tas\n\u{212A}"]
        {
            for text in ["task", "Tasks", "sstask", "stask", "ktask"] {
                places(text, lines.as_bytes());
            }
        }
        assert_eq!(places("Task", "no\nxTa\u{17F}\u{212A}\ntask".as_bytes()), [4, 12]);
    }

    #[test]
    fn the_rarest_letters_are_looked_for() {
        let needle = Needle::new("Request IDs").unwrap();
        let sieve = needle.sieve(b"request is request id request REQUEST IDL");
        assert_eq!(sieve.window.map(|(at, _)| at), Some(8));
        assert!(Needle::new("\u{e9}tat").unwrap().sieve(b"some text").window.is_none());
    }

    #[test]
    fn what_no_line_can_have_is_refused() {
        assert_eq!(Needle::new("").unwrap_err(), NeedleError::Length);
        assert_eq!(Needle::new(&"x".repeat(1001)).unwrap_err(), NeedleError::Length);
        assert_eq!(Needle::new("a\nb").unwrap_err(), NeedleError::LineFeed);
        assert!(Needle::new(&"ſ".repeat(1000)).is_ok());
    }

    proptest! {
        #[test]
        fn ascii_is_found_as_lower_case_is(text in "[a-cA-C.]{1,3}", line in "[a-dA-D.]{0,30}") {
            let plain = line.to_ascii_lowercase().contains(&text.to_ascii_lowercase());
            prop_assert_eq!(is_in(&text, line.as_bytes()), plain);
        }

        #[test]
        fn every_sieve_finds_what_a_naive_search_finds(
            text in "[aAbsSk.]{1,7}", lines in prop::collection::vec("[aAbBsk.\u{17F}\u{212A}\u{e9}]{0,12}", 1..9),
        ) {
            let fold = |text: &str| text.replace('\u{17F}', "s").replace('\u{212A}', "k").to_ascii_lowercase();
            let naive: Vec<usize> = (0..lines.len()).filter(|nth| fold(&lines[*nth]).contains(&fold(&text))).collect();
            let all = lines.join("\n");
            let found = places(&text, all.as_bytes());
            let of_line = |place: usize| all.as_bytes()[..place].iter().filter(|byte| **byte == b'\n').count();
            prop_assert_eq!(found.into_iter().map(of_line).collect::<Vec<_>>(), naive);
        }
    }
}
