//! Finds text in lines, whichever case it is in.
//!
//! Two letters are the same when Unicode's simple case folding says so: letter by letter, in every script, so `ß` isn't
//! `ss`. Lines are searched as they lie in the text, many at once, without taking them apart.

use std::fmt;

use regex::bytes::{Regex, RegexBuilder};

/// Characters of a text that is searched for, at most.
pub(crate) const NEEDLE_CHARS: usize = 1000;

/// A text that is searched for.
#[derive(Clone)]
pub struct Needle(Regex);

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
        let pattern = RegexBuilder::new(&regex::escape(text)).case_insensitive(true).build();
        pattern.map(Self).map_err(|_| NeedleError::Length)
    }

    /// The places in `lines`, in order, at which the text begins: one for each line that has it, given where the line
    /// feed after a place is.
    pub(crate) fn places<'a>(&'a self, lines: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        let mut begin = 0;
        std::iter::from_fn(move || {
            let found = self.0.find_at(lines, begin)?;
            let after = &lines[found.end()..];
            begin = found.end() + memchr::memchr(b'\n', after).unwrap_or(after.len());
            Some(found.start())
        })
    }
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
        Needle::new(text).unwrap().places(line).next().is_some()
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
        let needle = Needle::new("a").unwrap();
        assert_eq!(needle.places(b"aaa\nb\nba\n\na").collect::<Vec<_>>(), [0, 7, 10]);
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
    }
}
