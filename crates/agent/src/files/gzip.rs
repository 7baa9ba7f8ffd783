//! Gunzipping what a stranger sends, no further than the limits go.
//!
//! Several gzip members one after the other are one stream, as gzip itself has it. Anything else behind the last one,
//! padding too, is refused: it is what a broken transfer looks like.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;
use tiffin_protocol::{Failure, FailureCode};

use crate::request::failure;

/// Bytes read at once.
const CHUNK: usize = 64 * 1024;

/// Unpacked bytes from which on the ratio counts.
const RATIO_FROM: u64 = 1 << 20;

/// A stream that is unpacked while it is read.
pub struct Gunzip<R: Read> {
    decoder: MultiGzDecoder<Counted<R>>,
    packed: Rc<Cell<u64>>,
    unpacked: u64,
    ratio: u64,
    /// Why it ended, where it isn't the stream's own end.
    refused: Option<Failure>,
}

/// Counts what is taken out of a buffer, not what is read ahead into it.
struct Counted<R: Read> {
    inner: BufReader<R>,
    taken: Rc<Cell<u64>>,
}

impl<R: Read> Gunzip<R> {
    /// Unpacks `input`, which may come to `ratio` times of its size.
    pub fn new(input: R, ratio: u64) -> Self {
        let packed = Rc::new(Cell::new(0));
        let inner = BufReader::with_capacity(CHUNK, input);
        let decoder = MultiGzDecoder::new(Counted { inner, taken: Rc::clone(&packed) });
        Gunzip { decoder, packed, unpacked: 0, ratio, refused: None }
    }

    /// What an error that reading gave means to the host.
    pub fn explain(&mut self, error: &io::Error) -> Failure {
        if let Some(refused) = self.refused.take() {
            return refused;
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                failure(FailureCode::BadArchive, "the archive is cut short: its gzip stream has no end")
            }
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
                let message =
                    format!("the archive is no gzip stream, or a damaged one, or has something behind it: {error}");
                failure(FailureCode::BadArchive, &message)
            }
            _ => failure(FailureCode::Internal, &format!("the archive can't be read: {error}")),
        }
    }
}

impl<R: Read> Read for Gunzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer)?;
        self.unpacked += count as u64;
        let allowed = self.packed.get().saturating_mul(self.ratio);
        if self.unpacked > RATIO_FROM && self.unpacked > allowed {
            let message = format!("the archive unpacks to more than {} times its size", self.ratio);
            self.refused = Some(failure(FailureCode::TooLarge, &message));
            return Err(io::Error::other("over the ratio"));
        }
        Ok(count)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.taken.set(self.taken.get() + count as u64);
        Ok(count)
    }
}

impl<R: Read> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.taken.set(self.taken.get() + amount as u64);
        self.inner.consume(amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn unpack(bytes: &[u8], ratio: u64) -> Result<Vec<u8>, Failure> {
        let (mut stream, mut out) = (Gunzip::new(bytes, ratio), Vec::new());
        stream.read_to_end(&mut out).map_err(|error| stream.explain(&error))?;
        Ok(out)
    }

    #[test]
    fn members_one_after_the_other_are_one_stream() {
        assert_eq!(unpack(&[gzip(b"one "), gzip(b""), gzip(b"two")].concat(), 100).unwrap(), b"one two");
    }

    #[test]
    fn what_is_no_whole_gzip_stream_is_refused() {
        let whole = gzip(b"some text that is worth packing, worth packing");
        let mut damaged = whole.clone();
        let at = damaged.len() - 6;
        damaged[at] ^= 1;
        let cases = [
            Vec::new(),
            b"PK\x03\x04".to_vec(),
            vec![0x1f],
            damaged,
            [&whole[..], b"x"].concat(),
            [&whole[..], &[0; 512]].concat(),
        ];
        for bytes in cases {
            assert_eq!(unpack(&bytes, 100).unwrap_err().code, FailureCode::BadArchive, "{bytes:?}");
        }
        for cut in 0..whole.len() {
            assert_eq!(unpack(&whole[..cut], 100).unwrap_err().code, FailureCode::BadArchive, "cut at {cut}");
        }
    }

    #[test]
    fn the_ratio_counts_from_a_mebibyte_on() {
        let bomb = gzip(&vec![0; 2 << 20]);
        let refused = unpack(&bomb, 100).unwrap_err();
        assert_eq!((refused.code, refused.message.contains("100 times")), (FailureCode::TooLarge, true));
        assert_eq!(unpack(&gzip(&vec![0; 1 << 20]), 1).unwrap().len(), 1 << 20);
        assert_eq!(unpack(&bomb, 2000).unwrap().len(), 2 << 20);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_stream_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let framed = [&[0x1f, 0x8b, 8, 0][..], &bytes].concat();
            let _ = unpack(&framed, 10);
            let _ = unpack(&bytes, 10);
        }
    }
}
