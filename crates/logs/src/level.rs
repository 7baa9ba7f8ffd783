//! The level that a line of JSON has in it.
//!
//! Loggers of programs write an object per line with `level` (or `severity`): a word, or a number of pino's and
//! bunyan's. The word is kept as it is written. Only the top level's keys are looked at, without building anything;
//! `level` wins over `severity`.

/// Bytes of a level's word.
const WORD_BYTES: usize = 32;

/// The level in a line, if it is an object with one.
pub(crate) fn level_of(line: &[u8]) -> Option<&str> {
    let mut rest = Scan(line);
    rest.blank();
    rest.take(b'{')?;
    let mut severity = None;
    loop {
        rest.blank();
        let key = rest.string()?;
        rest.blank();
        rest.take(b':')?;
        rest.blank();
        let value = match rest.value() {
            Some(value) => value,
            None => return severity,
        };
        match key {
            b"level" => {
                if let Some(level) = word(value) {
                    return Some(level);
                }
            }
            b"severity" => severity = word(value).or(severity),
            _ => {}
        }
        rest.blank();
        if rest.take(b',').is_none() {
            return severity;
        }
    }
}

/// Whether a line looks like an object at all: cheap, and false for most lines. One that was cut has no end.
pub(crate) fn may_have_level(line: &[u8], is_cut: bool) -> bool {
    line.trim_ascii_start().first() == Some(&b'{') && (is_cut || line.trim_ascii_end().last() == Some(&b'}'))
}

/// A value as a level.
fn word(value: &[u8]) -> Option<&str> {
    if let Some(word) = value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) {
        let is_word = (1..=WORD_BYTES).contains(&word.len())
            && word.iter().all(|byte| (byte.is_ascii_graphic() || *byte == b' ') && *byte != b'\\');
        return if is_word { std::str::from_utf8(word).ok() } else { None };
    }
    match value {
        b"10" => Some("trace"),
        b"20" => Some("debug"),
        b"30" => Some("info"),
        b"40" => Some("warn"),
        b"50" => Some("error"),
        b"60" => Some("fatal"),
        _ => None,
    }
}

/// What of a line is still to be looked at.
struct Scan<'a>(&'a [u8]);

impl<'a> Scan<'a> {
    fn blank(&mut self) {
        self.0 = self.0.trim_ascii_start();
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        self.0 = self.0.strip_prefix(&[byte])?;
        Some(())
    }

    /// A string, without its quotes.
    fn string(&mut self) -> Option<&'a [u8]> {
        self.take(b'"')?;
        let text = self.0;
        let mut at = 0;
        loop {
            at += memchr::memchr2(b'"', b'\\', text.get(at..)?)?;
            if text[at] == b'"' {
                self.0 = &text[at + 1..];
                return Some(&text[..at]);
            }
            at += 2;
        }
    }

    /// A value, as it is written.
    fn value(&mut self) -> Option<&'a [u8]> {
        let whole = self.0;
        match whole.first()? {
            b'"' => {
                self.string()?;
            }
            b'{' | b'[' => self.nested()?,
            _ => {
                let end = whole.iter().position(|byte| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t'))?;
                self.0 = &whole[end..];
            }
        }
        Some(&whole[..whole.len() - self.0.len()])
    }

    fn nested(&mut self) -> Option<()> {
        let mut depth = 0usize;
        loop {
            match self.0.first()? {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            self.0 = &self.0[1..];
            if depth == 0 {
                return Some(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_and_the_numbers_of_loggers_are_levels() {
        for (line, level) in [
            (r#"{"level":"warn","msg":"x"}"#, Some("warn")),
            (r#" { "time" : 1 , "level" : "WARNING" } "#, Some("WARNING")),
            (r#"{"msg":"a \" b","a":{"level":"no","b":["}"]},"level":"debug"}"#, Some("debug")),
            (r#"{"level":50,"msg":"x"}"#, Some("error")),
            (r#"{"severity":"NOTICE"}"#, Some("NOTICE")),
            (r#"{"severity":"NOTICE","level":"info"}"#, Some("info")),
            (r#"{"severity":"NOTICE","level":{}}"#, Some("NOTICE")),
            (r#"{"a":{"level":"no"}}"#, None),
            (r#"{"level":35}"#, None),
            (r#"{"level":null}"#, None),
            (r#"{"level":""}"#, None),
            (r#"{"level":"a\u0000"}"#, None),
            (r#"["level","info"]"#, None),
            (r#"level: "info""#, None),
            ("{", None),
            ("", None),
        ] {
            assert_eq!(level_of(line.as_bytes()), level, "{line}");
        }
        assert_eq!(level_of(format!(r#"{{"level":"{}"}}"#, "x".repeat(33)).as_bytes()), None);
    }

    #[test]
    fn only_what_looks_like_a_whole_object_is_looked_into() {
        assert!(may_have_level(br#" {"level":"info"} "#, false));
        assert!(!may_have_level(br#"{"level":"info" and so on"#, false));
        assert!(may_have_level(br#"{"level":"info","data":"xxx"#, true));
        assert!(!may_have_level(b"", false));
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in prop::collection::vec(prop::sample::select(b"{}[]\":,\\ level1a\xff".to_vec()), 0..80)) {
            let _ = level_of(&line);
        }
    }
}
