//! What the host sends while a command runs, decoded as it comes: bytes for standard input, and its end.
//!
//! Pure. Invariant: gives back no more bytes than it was given, and holds none itself.

use tiffin_protocol::{FrameError, HEADER, Kind, decode_header};

/// The host broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The bytes are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that has no place here.
    #[error("a frame of kind {0:?} while a command runs")]
    Misplaced(Kind),
}

/// Decodes [`Kind::Stdin`] and [`Kind::StdinEnd`] frames.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER + 1],
    /// Bytes of `header` that are filled.
    filled: usize,
    /// Bytes of the frame's payload that are still to come.
    payload: usize,
    ended: bool,
}

impl Decoder {
    /// Takes `bytes` and appends to `input` what is for the command.
    ///
    /// # Errors
    /// [`Violation`]; nothing after it makes sense.
    pub fn push(&mut self, mut bytes: &[u8], input: &mut Vec<u8>) -> Result<(), Violation> {
        while !bytes.is_empty() {
            let payload;
            (payload, bytes) = bytes.split_at(self.payload.min(bytes.len()));
            self.payload -= payload.len();
            input.extend_from_slice(payload);
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

    fn begin(&mut self) -> Result<(), Violation> {
        self.filled = 0;
        let [header @ .., kind] = self.header;
        let payload = decode_header(header)? - 1;
        match Kind::from_byte(kind)? {
            Kind::Stdin if !self.ended => self.payload = payload,
            Kind::StdinEnd if payload == 0 => self.ended = true,
            kind => return Err(Violation::Misplaced(kind)),
        }
        Ok(())
    }
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

    proptest! {
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
            let _ = Decoder::default().push(&bytes, &mut input);
            prop_assert!(input.len() <= bytes.len());
        }
    }
}
