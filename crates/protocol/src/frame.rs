//! Frames: the length, the kind, the bytes.

/// The largest frame (kind and payload), in bytes. Senders split output into smaller ones.
pub const MAX_FRAME: usize = 1 << 20;

/// The largest frame on the agent's standard output, header included. That is a pipe, which takes so much whole or not at
/// all (`PIPE_BUF`): a guest that is saved in the middle of a write, and goes on elsewhere, tears no frame.
pub const CHANNEL_FRAME: usize = 4096;

/// Bytes of a frame's header: the length.
pub const HEADER: usize = 4;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Host to agent, first on a connection: JSON `Request`.
    Request,
    /// Host to agent: bytes for the command's standard input.
    Stdin,
    /// Host to agent: the command's standard input ends. No payload.
    StdinEnd,
    /// Agent to host: bytes that the command wrote to standard output.
    Stdout,
    /// Agent to host: bytes that the command wrote to standard error.
    Stderr,
    /// Agent to host, last: the operation's JSON answer.
    Done,
    /// Agent to host, last: JSON `Failure`.
    Failed,
    /// Agent to monitor, on standard output: JSON `Event`.
    Event,
    /// Agent to host: bytes of the operation's result, which is neither of its outputs.
    Result,
    /// Host to agent: the terminal's new size, JSON `TerminalSize`.
    Resize,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 10] = [
        Kind::Request,
        Kind::Stdin,
        Kind::StdinEnd,
        Kind::Stdout,
        Kind::Stderr,
        Kind::Done,
        Kind::Failed,
        Kind::Event,
        Kind::Result,
        Kind::Resize,
    ];

    /// The kind's byte on the wire.
    pub fn byte(self) -> u8 {
        match self {
            Kind::Request => 1,
            Kind::Stdin => 2,
            Kind::StdinEnd => 3,
            Kind::Stdout => 4,
            Kind::Stderr => 5,
            Kind::Done => 6,
            Kind::Failed => 7,
            Kind::Event => 8,
            Kind::Result => 9,
            Kind::Resize => 10,
        }
    }

    /// The kind that `byte` stands for.
    ///
    /// # Errors
    /// [`FrameError::UnknownKind`].
    pub fn from_byte(byte: u8) -> Result<Self, FrameError> {
        Kind::ALL.into_iter().find(|kind| kind.byte() == byte).ok_or(FrameError::UnknownKind(byte))
    }
}

/// The peer didn't keep to the protocol; the connection is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is zero or over [`MAX_FRAME`].
    #[error("frame of {0} bytes, allowed 1 to {MAX_FRAME}")]
    Length(u32),
    /// The kind's byte is none of [`Kind::ALL`].
    #[error("frame of unknown kind {0}")]
    UnknownKind(u8),
}

/// One frame as bytes. `payload` must be shorter than [`MAX_FRAME`]; callers split longer output.
pub fn encode(kind: Kind, payload: &[u8]) -> Vec<u8> {
    debug_assert!(payload.len() < MAX_FRAME);
    let length = u32::try_from(payload.len() + 1).unwrap_or(u32::MAX);
    let mut frame = Vec::with_capacity(HEADER + 1 + payload.len());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.push(kind.byte());
    frame.extend_from_slice(payload);
    frame
}

/// Bytes that follow a header: the kind's byte and the payload.
///
/// # Errors
/// [`FrameError::Length`]; check before allocating.
pub fn decode_header(header: [u8; HEADER]) -> Result<usize, FrameError> {
    let length = u32::from_be_bytes(header);
    match usize::try_from(length) {
        Ok(bytes @ 1..=MAX_FRAME) => Ok(bytes),
        _ => Err(FrameError::Length(length)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kinds_have_distinct_bytes_that_read_back() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_byte(kind.byte()), Ok(kind));
        }
        assert_eq!(Kind::from_byte(0), Err(FrameError::UnknownKind(0)));
    }

    proptest! {
        #[test]
        fn an_encoded_frame_reads_back(payload in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let frame = encode(Kind::Stdout, &payload);
            let header: [u8; HEADER] = frame[..HEADER].try_into().unwrap();
            prop_assert_eq!(decode_header(header).unwrap(), payload.len() + 1);
            prop_assert_eq!(Kind::from_byte(frame[HEADER]).unwrap(), Kind::Stdout);
            prop_assert_eq!(&frame[HEADER + 1..], &payload[..]);
        }

        #[test]
        fn no_header_allows_more_than_the_maximum(header in any::<[u8; 4]>()) {
            if let Ok(bytes) = decode_header(header) {
                prop_assert!((1..=MAX_FRAME).contains(&bytes));
            }
        }
    }
}
