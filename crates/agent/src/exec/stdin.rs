//! What the host sends while a command runs, decoded as it comes: bytes for standard input, its end, and a terminal's
//! sizes.
//!
//! Pure. Invariant: gives back no more bytes than it was given, and holds none itself but those of one size.

use tiffin_protocol::{FrameError, HEADER, Kind, TerminalSize, decode_header};

use super::terminal;

/// Bytes that a size can take, generously.
const MAX_SIZE: usize = 256;

/// The host broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The bytes are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that has no place here.
    #[error("a frame of kind {0:?} while a command runs")]
    Misplaced(Kind),
    /// A size that is none, or that no terminal may have.
    #[error("a terminal's columns and rows must be 1 to 1000 each")]
    Size,
}

/// Decodes [`Kind::Stdin`] and [`Kind::StdinEnd`] frames, and a terminal's [`Kind::Resize`].
#[derive(Debug, Default)]
pub struct Decoder {
    /// Whether there is a terminal to resize.
    terminal: bool,
    /// The part of a size that has come; none while no frame of a size is being read.
    partial: Option<Vec<u8>>,
    size: Option<TerminalSize>,
    header: [u8; HEADER + 1],
    /// Bytes of `header` that are filled.
    filled: usize,
    /// Bytes of the frame's payload that are still to come.
    payload: usize,
    ended: bool,
}

impl Decoder {
    /// For a command that has a terminal, or none.
    pub fn new(terminal: bool) -> Self {
        Decoder { terminal, ..Decoder::default() }
    }

    /// Takes `bytes` and appends to `input` what is for the command.
    ///
    /// # Errors
    /// [`Violation`]; nothing after it makes sense.
    pub fn push(&mut self, mut bytes: &[u8], input: &mut Vec<u8>) -> Result<(), Violation> {
        while !bytes.is_empty() {
            let payload;
            (payload, bytes) = bytes.split_at(self.payload.min(bytes.len()));
            self.payload -= payload.len();
            match &mut self.partial {
                Some(partial) => partial.extend_from_slice(payload),
                None => input.extend_from_slice(payload),
            }
            if self.payload == 0
                && let Some(whole) = self.partial.take()
            {
                self.size = Some(read_size(&whole)?);
            }
            let header;
            (header, bytes) = bytes.split_at((self.header.len() - self.filled).min(bytes.len()));
            self.header[self.filled..self.filled + header.len()].copy_from_slice(header);
            self.filled += header.len();
            if self.filled == self.header.len() {
                self.begin()?;
            }
        }
        Ok(())
    }

    /// Whether the command's standard input is complete.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The size that the terminal is to have from now on, told once.
    pub fn new_size(&mut self) -> Option<TerminalSize> {
        self.size.take()
    }

    fn begin(&mut self) -> Result<(), Violation> {
        self.filled = 0;
        let [header @ .., kind] = self.header;
        let payload = decode_header(header)? - 1;
        match Kind::from_byte(kind)? {
            Kind::Stdin if !self.ended => self.payload = payload,
            Kind::StdinEnd if payload == 0 => self.ended = true,
            Kind::Resize if self.terminal && !(1..=MAX_SIZE).contains(&payload) => return Err(Violation::Size),
            Kind::Resize if self.terminal => (self.payload, self.partial) = (payload, Some(Vec::new())),
            kind => return Err(Violation::Misplaced(kind)),
        }
        Ok(())
    }
}

fn read_size(json: &[u8]) -> Result<TerminalSize, Violation> {
    let size = serde_json::from_slice(json).map_err(|_| Violation::Size)?;
    terminal::check(size).map_err(|_| Violation::Size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tiffin_protocol::encode;

    #[test]
    fn input_after_its_end_and_other_kinds_are_violations() {
        let mut decoder = Decoder::default();
        let late = [encode(Kind::StdinEnd, b""), encode(Kind::Stdin, b"x")].concat();
        assert_eq!(decoder.push(&late, &mut Vec::new()), Err(Violation::Misplaced(Kind::Stdin)));
        let other = encode(Kind::Request, b"{}");
        assert_eq!(Decoder::default().push(&other, &mut Vec::new()), Err(Violation::Misplaced(Kind::Request)));
    }

    #[test]
    fn a_size_is_for_terminals_alone_and_must_be_one() {
        let good = encode(Kind::Resize, br#"{"columns":100,"rows":40}"#);
        assert_eq!(Decoder::default().push(&good, &mut Vec::new()), Err(Violation::Misplaced(Kind::Resize)));
        let long = [b' '; MAX_SIZE + 1];
        for bad in [&b""[..], b"{}", b"\xff", br#"{"columns":0,"rows":40}"#, br#"{"columns":80,"rows":1001}"#, &long] {
            let refused = Decoder::new(true).push(&encode(Kind::Resize, bad), &mut Vec::new());
            assert_eq!(refused, Err(Violation::Size), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    proptest! {
        #[test]
        fn sizes_between_input_arrive_however_they_are_cut(columns in 1u16..=1000, rows in 1u16..=1000, part in 1usize..40) {
            let size = TerminalSize { columns, rows };
            let json = serde_json::to_vec(&size).unwrap();
            let wire = [encode(Kind::Stdin, b"ab"), encode(Kind::Resize, &json), encode(Kind::Stdin, b"cd")].concat();
            let (mut decoder, mut input, mut told) = (Decoder::new(true), Vec::new(), None);
            for piece in wire.chunks(part) {
                prop_assert_eq!(decoder.push(piece, &mut input), Ok(()));
                told = decoder.new_size().or(told);
            }
            prop_assert_eq!((input.as_slice(), told), (&b"abcd"[..], Some(size)));
        }

        #[test]
        fn input_arrives_whole_however_it_is_cut(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..10), size in 1usize..50) {
            let mut wire: Vec<u8> = parts.iter().flat_map(|part| encode(Kind::Stdin, part)).collect();
            wire.extend(encode(Kind::StdinEnd, b""));
            let (mut decoder, mut input) = (Decoder::default(), Vec::new());
            for piece in wire.chunks(size) {
                prop_assert!(!decoder.ended());
                prop_assert_eq!(decoder.push(piece, &mut input), Ok(()));
            }
            prop_assert!(decoder.ended());
            prop_assert_eq!(input, parts.concat());
        }

        #[test]
        fn any_bytes_are_input_or_a_violation(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut input = Vec::new();
            let _ = Decoder::new(bytes.len() % 2 == 0).push(&bytes, &mut input);
            prop_assert!(input.len() <= bytes.len());
        }
    }
}
