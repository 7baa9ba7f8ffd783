//! Server-sent events, read as they come (WHATWG HTML, section 9.2.6).
//!
//! Invariant: how the bytes are cut into chunks makes no difference, and an event is bounded. `id` and `retry` mean
//! nothing here: a command's output can't be resumed.

/// Bytes of one event, fields and text together. The server's events are far smaller.
const EVENT_BYTES: usize = 8 << 20;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Its type; `message` where the stream names none.
    pub(crate) name: String,
    /// Its data lines, joined by line feeds.
    pub(crate) data: String,
}

/// An event grew over the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is too large")]
pub(crate) struct TooLarge;

/// Takes bytes, gives events.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    line: Vec<u8>,
    /// The last byte ended a line as CR; a LF right after it belongs to it.
    after_cr: bool,
    /// The first line, before which a byte order mark may stand, is over.
    past_first_line: bool,
    name: String,
    data: Option<String>,
}

impl Parser {
    /// The events that `bytes` complete, in order.
    ///
    /// # Errors
    /// When an event grows over the limit; the parser is of no use after that.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, TooLarge> {
        let mut events = Vec::new();
        for &byte in bytes {
            let second_of_crlf = std::mem::take(&mut self.after_cr) && byte == b'\n';
            match byte {
                b'\n' if second_of_crlf => {}
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    events.extend(self.end_line());
                }
                _ => self.line.push(byte),
            }
            if self.line.len() + self.data.as_ref().map_or(0, String::len) > EVENT_BYTES {
                return Err(TooLarge);
            }
        }
        Ok(events)
    }

    fn end_line(&mut self) -> Option<Event> {
        let line = std::mem::take(&mut self.line);
        let mut line = String::from_utf8_lossy(&line);
        if !std::mem::replace(&mut self.past_first_line, true)
            && let Some(rest) = line.strip_prefix('\u{feff}')
        {
            line = rest.to_owned().into();
        }
        if line.is_empty() {
            return self.end_event();
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.name = value.to_owned(),
            "data" => match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            // A comment (no field name), or a field that means nothing here.
            _ => {}
        }
        None
    }

    fn end_event(&mut self) -> Option<Event> {
        let name = std::mem::take(&mut self.name);
        let data = self.data.take()?;
        Some(Event { name: if name.is_empty() { "message".to_owned() } else { name }, data })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Vec<(String, String)> {
        let events = Parser::default().push(text.as_bytes()).unwrap();
        events.into_iter().map(|event| (event.name, event.data)).collect()
    }

    fn event(name: &str, data: &str) -> (String, String) {
        (name.to_owned(), data.to_owned())
    }

    #[test]
    fn the_standards_examples_parse_as_it_says() {
        assert_eq!(parse("data: YHOO\ndata: +2\ndata: 10\n\n"), [event("message", "YHOO\n+2\n10")]);
        assert_eq!(
            parse(": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"),
            [event("message", "first event"), event("message", "second event"), event("message", " third event")]
        );
        assert_eq!(parse("data\n\ndata\ndata\n\ndata:"), [event("message", ""), event("message", "\n")]);
    }

    #[test]
    fn a_name_without_data_is_no_event_and_does_not_stay() {
        assert_eq!(parse("event: a\n\ndata: x\n\n"), [event("message", "x")]);
    }

    #[test]
    fn a_byte_order_mark_is_taken_only_at_the_start() {
        assert_eq!(parse("\u{feff}data: x\n\n\u{feff}data: y\n\n"), [event("message", "x")]);
    }

    #[test]
    fn a_stream_without_an_end_of_event_does_not_fill_the_memory() {
        let mut parser = Parser::default();
        let chunk = vec![b'x'; 1 << 20];
        assert_eq!((0..9).find_map(|_| parser.push(&chunk).err()), Some(TooLarge));
        let mut parser = Parser::default();
        let line = [b"data:".as_slice(), &chunk, b"\n"].concat();
        assert_eq!((0..9).find_map(|_| parser.push(&line).err()), Some(TooLarge));
    }

    proptest! {
        #[test]
        fn events_survive_any_line_ends_and_any_cuts(
            events in prop::collection::vec(("[a-z]{1,8}", prop::collection::vec("[^\r\n]{0,12}", 1..4)), 0..6),
            ends in prop::collection::vec(prop::sample::select(vec!["\n", "\r\n", "\r"]), 40),
            cuts in prop::collection::vec(1usize..7, 1..40),
        ) {
            let mut ends = ends.iter().cycle();
            let mut text = String::new();
            // A lone CR directly before a lone LF would read as one line end: write with one kind per event.
            for (name, lines) in &events {
                let end = ends.next().expect("cycles");
                text.push_str(&format!("event: {name}{end}"));
                for line in lines {
                    text.push_str(&format!("data: {line}{end}"));
                }
                text.push_str(end);
                text.push_str(": keep-alive\r\n");
            }
            let mut parser = Parser::default();
            let (mut got, mut rest, mut cuts) = (Vec::new(), text.as_bytes(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at(rest.len().min(*cuts.next().expect("cycles")));
                got.extend(parser.push(chunk).unwrap());
                rest = after;
            }
            let want: Vec<Event> =
                events.into_iter().map(|(name, lines)| Event { name, data: lines.join("\n") }).collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Parser::default().push(&bytes);
        }
    }
}
