//! Reading a layer's tar archive: every kind of entry that images have, in the old, the POSIX (pax) and the GNU format.
//!
//! The `tar` crate decodes headers; what entries mean is decided here, as the archivers that images are made with
//! understand them. Bounded in what is held: one header, one entry's names, attributes and parts. What is wrong is refused
//! with the entry's name.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::{
    compression::Refused,
    pax::{self, Extension, MAX_PARTS, Sparse},
};
use crate::erofs::tree::{Part, Xattr};

/// The unit of a tar archive, in bytes.
const BLOCK: usize = 512;
/// Bytes of one extended header.
const MAX_EXTENSION: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    /// A file: its length, and the parts of it that come, if not all of it does.
    File {
        size: u64,
        parts: Option<Box<[Part]>>,
    },
    Folder,
    /// A symbolic link, to that.
    Link(Vec<u8>),
    /// Another name of a file that came before.
    SameAs(Vec<u8>),
    Fifo,
    /// A device: nothing is made of it.
    Device,
}

/// An entry, as the archive has it: nothing of it is checked but that it can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) what: What,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) xattrs: Vec<Xattr>,
}

/// An archive that is read from its beginning to its end.
pub(super) struct Archive<R: Read> {
    input: R,
    /// Bytes of the current entry's content that are still to be read, and of the padding behind them.
    content: u64,
    padding: u64,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, content: 0, padding: 0 }
    }

    /// The next entry; none at the end. What is left of the content of the one before is passed over.
    pub(super) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut said = Said::default();
        loop {
            let left = std::mem::take(&mut self.content).saturating_add(std::mem::take(&mut self.padding));
            self.pass_over(left)?;
            let mut block = [0; BLOCK];
            // Some archivers write no end.
            if !self.block_or_end(&mut block)? || block.iter().all(|byte| *byte == 0) {
                return if said.something() {
                    Err(refused("a header at its end has no entry behind it"))
                } else {
                    Ok(None)
                };
            }
            let header = Header::from_byte_slice(&block);
            check_sum(header)?;
            let size = header.entry_size().map_err(|_| broken(header, "its size can't be read"))?;
            self.content = size;
            self.padding = padding(size);
            match header.entry_type() {
                EntryType::XHeader => {
                    let records = self.extension(header, size)?;
                    said.pax = Some(pax::parse(&records).map_err(|rule| broken(header, rule))?);
                }
                // Comments, as of git.
                EntryType::XGlobalHeader => {}
                EntryType::GNULongName => said.long_name = Some(self.text(header, size)?),
                EntryType::GNULongLink => said.long_link = Some(self.text(header, size)?),
                kind => return self.entry(said, header, kind, size).map(Some),
            }
        }
    }

    fn entry(&mut self, said: Said, header: &Header, kind: EntryType, size: u64) -> io::Result<Entry> {
        let pax = said.pax.unwrap_or_default();
        let mut sparse = pax.sparse;
        let listed_name = sparse.as_mut().and_then(|sparse| sparse.name.take());
        let path = listed_name.or(pax.path).or(said.long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link.or(said.long_link).or_else(|| header.link_name_bytes().map(Into::into)).unwrap_or_default();
        let is_file = matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse);
        // Links and folders may have a size; no content comes with it but with files, as archivers agree.
        self.content = if is_file { pax.size.unwrap_or(size) } else { 0 };
        self.padding = padding(self.content);
        let what = match kind {
            EntryType::GNUSparse => {
                let (size, parts) = self.old_sparse(header)?;
                What::File { size, parts: Some(parts) }
            }
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => What::Folder,
            EntryType::Regular | EntryType::Continuous => match sparse {
                Some(sparse) => {
                    let (size, parts) = self.new_sparse(header, sparse)?;
                    What::File { size, parts: Some(parts) }
                }
                None => What::File { size: self.content, parts: None },
            },
            EntryType::Directory => What::Folder,
            EntryType::Symlink => What::Link(link),
            EntryType::Link => What::SameAs(link),
            EntryType::Fifo => What::Fifo,
            EntryType::Char | EntryType::Block => What::Device,
            _ => return Err(broken(header, "its type is none that images have")),
        };
        let id = |said: Option<u64>, field: &[u8]| {
            let number = said.or_else(|| number(field)).ok_or_else(|| broken(header, "its owner can't be read"))?;
            u32::try_from(number).map_err(|_| broken(header, "its owner's number is too large"))
        };
        let old = header.as_old();
        let mode = number(&old.mode).ok_or_else(|| broken(header, "its mode can't be read"))?;
        Ok(Entry {
            what,
            mode: (mode & 0o7777) as u16,
            uid: id(pax.uid, &old.uid)?,
            gid: id(pax.gid, &old.gid)?,
            mtime: pax.mtime.unwrap_or_else(|| number(&old.mtime).and_then(|at| at.try_into().ok()).unwrap_or(0)),
            xattrs: pax.xattrs,
            path,
        })
    }

    /// Reads the next bytes of the current entry's content into `buffer`; none at its end.
    pub(super) fn content(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
        self.exactly(&mut buffer[..wanted])?;
        self.content -= wanted as u64;
        Ok(wanted)
    }

    /// Reads to the end of the stream; what is behind the archive is part of the layer's digest, and of nothing else.
    pub(super) fn finish(mut self) -> io::Result<()> {
        io::copy(&mut self.input, &mut io::sink()).map(drop)
    }

    /// The parts of a file in GNU tar's old sparse format: some in the header, more in blocks behind it.
    fn old_sparse(&mut self, header: &Header) -> io::Result<(u64, Box<[Part]>)> {
        let unreadable = || broken(header, "the parts of a sparse file can't be read");
        let gnu = header.as_gnu().ok_or_else(unreadable)?;
        let mut parts = Vec::new();
        let mut add = |entry: &tar::GnuSparseHeader| -> io::Result<()> {
            if !entry.is_empty() {
                parts.push(Part { at: entry.offset()?, length: entry.length()? });
            }
            if parts.len() > MAX_PARTS { Err(broken(header, "a sparse file has too many parts")) } else { Ok(()) }
        };
        gnu.sparse.iter().try_for_each(&mut add)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            self.exactly(block.as_mut_bytes())?;
            block.sparse().iter().try_for_each(&mut add)?;
            more = block.is_extended();
        }
        let size = gnu.real_size().map_err(|_| unreadable())?;
        checked(header, size, parts, self.content)
    }

    /// The same in its newer formats: in the extended header, or at the beginning of the content.
    fn new_sparse(&mut self, header: &Header, sparse: Sparse) -> io::Result<(u64, Box<[Part]>)> {
        let unreadable = || broken(header, "the parts of a sparse file can't be read");
        let mut parts = sparse.parts;
        if sparse.listed_in_content {
            let mut numbers = Numbers { archive: self, block: [0; BLOCK], at: BLOCK };
            let count = usize::try_from(numbers.next()?).map_err(|_| unreadable())?;
            if count > MAX_PARTS {
                return Err(broken(header, "a sparse file has too many parts"));
            }
            for _ in 0..count {
                parts.push(Part { at: numbers.next()?, length: numbers.next()? });
            }
        }
        let size = sparse.size.ok_or_else(unreadable)?;
        checked(header, size, parts, self.content)
    }

    fn text(&mut self, header: &Header, size: u64) -> io::Result<Vec<u8>> {
        let mut text = self.extension(header, size)?;
        if let Some(end) = text.iter().position(|byte| *byte == 0) {
            text.truncate(end);
        }
        Ok(text)
    }

    fn extension(&mut self, header: &Header, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(broken(header, "a header before it is longer than 1 MiB"));
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        self.exactly(&mut bytes)?;
        self.content = 0;
        Ok(bytes)
    }

    fn pass_over(&mut self, count: u64) -> io::Result<()> {
        match io::copy(&mut (&mut self.input).take(count), &mut io::sink())? == count {
            true => Ok(()),
            false => Err(cut_short()),
        }
    }

    /// Fills the block; `false` where nothing comes any more.
    fn block_or_end(&mut self, block: &mut [u8; BLOCK]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < block.len() {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(cut_short()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn exactly(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => cut_short(),
            _ => error,
        })
    }
}

/// Numbers at the beginning of a content, each on a line, in blocks.
struct Numbers<'a, R: Read> {
    archive: &'a mut Archive<R>,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: Read> Numbers<'_, R> {
    fn next(&mut self) -> io::Result<u64> {
        let mut digits = Vec::new();
        loop {
            if self.at == BLOCK {
                if self.archive.content(&mut self.block)? < BLOCK {
                    return Err(refused("the parts of a sparse file are cut short"));
                }
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' if !digits.is_empty() => {
                    return pax::number(&digits).ok_or_else(|| refused("the parts of a sparse file can't be read"));
                }
                b'0'..=b'9' if digits.len() < 20 => digits.push(byte),
                _ => return Err(refused("the parts of a sparse file can't be read")),
            }
        }
    }
}

/// The parts of a sparse file, if they are one behind the other, within it, and as long as what comes.
fn checked(header: &Header, size: u64, mut parts: Vec<Part>, comes: u64) -> io::Result<(u64, Box<[Part]>)> {
    let (mut end, mut sum) = (0, 0_u64);
    for part in &parts {
        let behind = part.at.checked_add(part.length).filter(|behind| part.at >= end && *behind <= size);
        end = behind.ok_or_else(|| broken(header, "the parts of a sparse file make no sense"))?;
        sum += part.length;
    }
    if sum != comes {
        return Err(broken(header, "the parts of a sparse file are not as long as its content"));
    }
    parts.retain(|part| part.length > 0);
    Ok((size, parts.into()))
}

/// What headers before an entry say of it.
#[derive(Debug, Default)]
struct Said {
    pax: Option<Extension>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Said {
    fn something(&self) -> bool {
        self.pax.is_some() || self.long_name.is_some() || self.long_link.is_some()
    }
}

/// A header's number: octal digits, or bytes where the first bit says so; a field that is empty is 0.
fn number(field: &[u8]) -> Option<u64> {
    if field.first().is_some_and(|byte| byte & 0x80 != 0) {
        let (first, rest) = field.split_first()?;
        let bytes = std::iter::once(first & 0x7f).chain(rest.iter().copied());
        return bytes.into_iter().try_fold(0_u64, |value, byte| Some(value.checked_mul(256)? + u64::from(byte)));
    }
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches(|c| c == ' ' || c == '\0');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// The sum of all bytes, the sum's own field taken as spaces; as signed ones, as some old archivers did, too.
fn check_sum(header: &Header) -> io::Result<()> {
    const FIELD: std::ops::Range<usize> = 148..156;
    let bytes = header.as_bytes().iter().enumerate();
    let bytes = bytes.map(|(at, byte)| if FIELD.contains(&at) { b' ' } else { *byte });
    let said = header.cksum().ok().map(i64::from);
    let unsigned: i64 = bytes.clone().map(i64::from).sum();
    let signed: i64 = bytes.map(|byte| i64::from(byte.cast_signed())).sum();
    match said {
        Some(said) if said == unsigned || said == signed => Ok(()),
        Some(_) | None => Err(refused("it is no tar archive, or a damaged one: a header's checksum is wrong")),
    }
}

/// Bytes from the end of a content of that size to the next block.
fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn cut_short() -> io::Error {
    refused("it is cut short")
}

fn broken(header: &Header, rule: &str) -> io::Error {
    refused(&format!("entry {}: {rule}", super::shown(&header.path_bytes())))
}

fn refused(rule: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Refused(rule.to_owned()))
}
