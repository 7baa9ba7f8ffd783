//! What a layer is compressed with, and reading it: told by its first bytes, as media types lie.
//!
//! Bounded by [`Budget`]: the bytes that come out of all layers together, and how many of them one byte may become.
//! Zstandard frames may refer back 128 MiB at most; frames that are to be skipped are, and several files of gzip or frames
//! of Zstandard behind one another are one layer.

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::atomic::{AtomicU64, Ordering},
};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

/// What every layer may unpack to, however small it is.
const FREE_BYTES: u64 = 1 << 30;
/// How many bytes one byte may become beyond that.
const RATIO: u64 = 200;
const CHUNK: usize = 256 << 10;

/// What all layers of an image may unpack to together.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicU64,
    bytes: u64,
}

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        Self { left: AtomicU64::new(bytes), bytes }
    }

    fn take(&self, count: u64) -> io::Result<()> {
        let take = |left: u64| left.checked_sub(count);
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(()),
            Err(_) => {
                Err(refused(format!("the layers unpack to more than {} bytes, the most that is taken", self.bytes)))
            }
        }
    }
}

/// A layer's bytes are refused; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(pub(super) String);

fn refused(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Refused(why))
}

/// A layer, unpacked as it is read.
pub(super) struct Unpacked<'a, R: Read> {
    inner: Decoder<R>,
    budget: &'a Budget,
    /// What this layer may still become.
    left: u64,
}

enum Decoder<R: Read> {
    Plain(BufReader<R>),
    Gzip(Box<MultiGzDecoder<BufReader<R>>>),
    Zstd(Box<Frames<BufReader<R>>>),
}

impl<'a, R: Read> Unpacked<'a, R> {
    /// Of the layer that `input` gives, which has so many bytes.
    pub(super) fn new(input: R, packed_bytes: u64, budget: &'a Budget) -> io::Result<Self> {
        let mut input = BufReader::with_capacity(CHUNK, input);
        let start = input.fill_buf()?;
        let inner = if start.starts_with(&[0x1f, 0x8b]) {
            Decoder::Gzip(Box::new(MultiGzDecoder::new(input)))
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable(start) {
            Decoder::Zstd(Box::new(Frames { input, decoder: FrameDecoder::new(), inside: false }))
        } else if let Some(known) = unsupported(start) {
            return Err(refused(format!("it is compressed with {known}: gzip and zstd are taken")));
        } else {
            Decoder::Plain(input)
        };
        Ok(Self { inner, budget, left: packed_bytes.saturating_mul(RATIO).saturating_add(FREE_BYTES) })
    }
}

impl<R: Read> Read for Unpacked<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.inner {
            Decoder::Plain(input) => input.read(buffer),
            Decoder::Gzip(input) => input.read(buffer),
            Decoder::Zstd(input) => input.read(buffer),
        }?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            refused(format!(
                "it unpacks to more than {RATIO} times its size: this is no image, but a decompression bomb"
            ))
        })?;
        self.budget.take(count as u64)?;
        Ok(count)
    }
}

fn is_skippable(start: &[u8]) -> bool {
    matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

fn unsupported(start: &[u8]) -> Option<&'static str> {
    match start {
        [b'B', b'Z', b'h', ..] => Some("bzip2"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some("xz"),
        [0x04, 0x22, 0x4d, 0x18, ..] => Some("lz4"),
        _ => None,
    }
}

/// Frames of Zstandard, one behind the other.
struct Frames<R: BufRead> {
    input: R,
    decoder: FrameDecoder,
    /// Whether there is a frame whose end wasn't read yet.
    inside: bool,
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let damaged = |error: FrameDecoderError| refused(format!("its Zstandard frames can't be read: {error}"));
        loop {
            if !self.inside && !self.next_frame()? {
                return Ok(0);
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.input, one).map_err(damaged)?;
            }
            match self.decoder.read(buffer)? {
                0 if buffer.is_empty() => return Ok(0),
                0 => self.inside = false,
                count => return Ok(count),
            }
        }
    }
}

impl<R: BufRead> Frames<R> {
    /// Begins the next frame with something in it; `false` at the end.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.input.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.input) {
                Ok(()) => {
                    self.inside = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.input).take(length), &mut io::sink())? != length {
                        return Err(refused("it is cut short".into()));
                    }
                }
                Err(error) => return Err(refused(format!("its Zstandard frames can't be read: {error}"))),
            }
        }
        Ok(false)
    }
}
