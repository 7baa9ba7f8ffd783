//! Reading a tar archive that a stranger made, strictly: regular files and folders, and no two ways to understand it.
//!
//! The `tar` crate decodes the headers; what they mean is decided here, since archives are made to mean different things
//! to lenient readers. Accepted are the old, the POSIX (pax) and the GNU format. The archive must have its end: a block of
//! zeros, and nothing but zeros behind it.

use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use tar::{EntryType, Header};
use tiffin_protocol::{Failure, FailureCode};

use super::gzip::Gunzip;
use super::pax::{self, Extension};
use super::{names, shown};
use crate::request::failure;

/// The unit of a tar archive, in bytes.
const BLOCK: usize = 512;

/// Bytes of one extended header.
const MAX_EXTENSION: u64 = 64 * 1024;

/// Headers for the whole archive. Archivers write one, at its beginning.
const MAX_GLOBAL: usize = 16;

/// Bytes unpacked at once.
const CHUNK: usize = 128 * 1024;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it goes; empty for the folder that the archive is unpacked to.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Bytes of a file.
    pub size: u64,
    /// Mode bits, as they are.
    pub mode: u32,
    /// Seconds since the Unix epoch, as they are.
    pub mtime: i64,
}

/// An archive that is read from its beginning to its end.
pub struct Archive<R: Read> {
    input: BufReader<Gunzip<R>>,
    /// Bytes of the current entry's content that are still to be read, and of the padding behind them.
    content: u64,
    padding: usize,
    global: usize,
}

impl<R: Read> Archive<R> {
    /// Of the gzipped bytes that `input` gives.
    pub fn new(input: Gunzip<R>) -> Self {
        Archive { input: BufReader::with_capacity(CHUNK, input), content: 0, padding: 0, global: 0 }
    }

    /// The next entry; none at the end of the archive and of the stream. What is left of the content of the one before is
    /// passed over.
    ///
    /// # Errors
    /// A [`Failure`] that names the entry and the rule that it breaks; the archive is of no more use.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Failure> {
        let mut said = Said::default();
        loop {
            self.pass_over()?;
            let mut block = [0; BLOCK];
            self.exactly(&mut block)?;
            if block.iter().all(|byte| *byte == 0) {
                if said.something() {
                    return Err(bad("an extended header at its end has no entry behind it"));
                }
                self.end()?;
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check_sum(header)?;
            let size = header.entry_size().map_err(|_| broken(header, "its size can't be read"))?;
            match header.entry_type() {
                EntryType::XHeader => {
                    let records = self.extension(header, size)?;
                    let pax = pax::parse(&records, false).map_err(|rule| broken(header, rule))?;
                    if said.pax.replace(pax).is_some() {
                        return Err(broken(header, "two extended headers for one entry are not accepted"));
                    }
                }
                EntryType::XGlobalHeader => {
                    self.global += 1;
                    if self.global > MAX_GLOBAL || said.something() {
                        return Err(broken(header, "it has a header for the whole archive where none is accepted"));
                    }
                    let records = self.extension(header, size)?;
                    pax::parse(&records, true).map_err(|rule| broken(header, rule))?;
                }
                EntryType::GNULongName => {
                    let mut name = self.extension(header, size)?;
                    while name.last() == Some(&0) {
                        name.pop();
                    }
                    if said.long_name.replace(name).is_some() {
                        return Err(broken(header, "two long names for one entry are not accepted"));
                    }
                }
                kind => {
                    let entry = said.entry(header, kind, size)?;
                    self.content = entry.size;
                    self.padding = padding(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Reads the next bytes of the current entry's content into `buffer`; none at its end.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn content(&mut self, buffer: &mut [u8]) -> Result<usize, Failure> {
        let wanted = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
        self.exactly(&mut buffer[..wanted])?;
        self.content -= wanted as u64;
        Ok(wanted)
    }

    fn pass_over(&mut self) -> Result<(), Failure> {
        let mut buffer = [0; BLOCK];
        while self.content(&mut buffer)? > 0 {}
        let padding = std::mem::take(&mut self.padding);
        self.exactly(&mut buffer[..padding])
    }

    /// The content of an extended header.
    fn extension(&mut self, header: &Header, size: u64) -> Result<Vec<u8>, Failure> {
        if size > MAX_EXTENSION {
            return Err(broken(header, "an extended header may not be longer than 64 KiB"));
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
        self.exactly(&mut bytes)?;
        self.padding = padding(size);
        Ok(bytes)
    }

    /// Reads to the end of the stream, where the gzip's checksum is.
    fn end(&mut self) -> Result<(), Failure> {
        let mut buffer = vec![0; CHUNK];
        loop {
            match self.input.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) if buffer[..count].iter().all(|byte| *byte == 0) => {}
                Ok(_) => return Err(bad("there is something behind its end")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.input.get_mut().explain(&error)),
            }
        }
    }

    fn exactly(&mut self, buffer: &mut [u8]) -> Result<(), Failure> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) => return Err(bad("it is cut short: it has no end")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.input.get_mut().explain(&error)),
            }
        }
        Ok(())
    }
}

/// What extended headers say of the entry that comes.
#[derive(Debug, Default)]
struct Said {
    pax: Option<Extension>,
    long_name: Option<Vec<u8>>,
}

impl Said {
    fn something(&self) -> bool {
        self.pax.is_some() || self.long_name.is_some()
    }

    /// The entry of `header`, and of what was said before it.
    fn entry(self, header: &Header, kind: EntryType, size: u64) -> Result<Entry, Failure> {
        let pax = self.pax.unwrap_or_default();
        let name = match (pax.path, self.long_name) {
            (Some(_), Some(_)) => return Err(broken(header, "two long names for one entry are not accepted")),
            (Some(name), None) | (None, Some(name)) => name,
            (None, None) => header.path_bytes().into_owned(),
        };
        let refused = |rule: &str| refused(&name, rule);
        let kind = kind_of(kind).map_err(refused)?;
        if pax.size.is_some_and(|said| said != size) {
            return Err(refused("its extended header and its header disagree about its size"));
        }
        let path = names::relative(&name).map_err(refused)?;
        match kind {
            Kind::Folder if size != 0 => return Err(refused("a folder may not have content")),
            Kind::File if name.ends_with(b"/") || path.as_os_str().is_empty() => {
                return Err(refused("a file may not have the name of a folder"));
            }
            Kind::Folder | Kind::File => {}
        }
        let mode = header.mode().map_err(|_| refused("its mode can't be read"))?;
        let mtime = header.mtime().map_err(|_| refused("its time can't be read"))?;
        let mtime = pax.mtime.unwrap_or(i64::try_from(mtime).unwrap_or(i64::MAX));
        Ok(Entry { path, kind, size, mode, mtime })
    }
}

fn kind_of(kind: EntryType) -> Result<Kind, &'static str> {
    match kind {
        EntryType::Regular => Ok(Kind::File),
        EntryType::Directory => Ok(Kind::Folder),
        EntryType::Symlink | EntryType::GNULongLink => Err("symbolic links are not accepted"),
        EntryType::Link => Err("hard links are not accepted"),
        EntryType::Char | EntryType::Block => Err("devices are not accepted"),
        EntryType::Fifo => Err("FIFOs are not accepted"),
        EntryType::GNUSparse => Err("sparse files are not accepted"),
        _ => Err("only regular files and folders are accepted, and this is neither"),
    }
}

/// The sum of all bytes, the sum's own field taken as spaces.
fn check_sum(header: &Header) -> Result<(), Failure> {
    const FIELD: std::ops::Range<usize> = 148..156;
    let bytes = header.as_bytes();
    let sum = |range: &[u8]| range.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let expected = sum(&bytes[..FIELD.start]) + 8 * u32::from(b' ') + sum(&bytes[FIELD.end..]);
    if header.cksum().is_ok_and(|said| said == expected) {
        return Ok(());
    }
    Err(bad("it is no tar archive, or a damaged one: a header's checksum is wrong"))
}

/// Bytes from the end of a content of that size to the next block.
fn padding(size: u64) -> usize {
    let beyond = usize::try_from(size % BLOCK as u64).unwrap_or(0);
    if beyond == 0 { 0 } else { BLOCK - beyond }
}

fn broken(header: &Header, rule: &str) -> Failure {
    refused(&header.path_bytes(), rule)
}

fn bad(what: &str) -> Failure {
    failure(FailureCode::BadArchive, &format!("the archive is refused: {what}"))
}

/// The entry `name` breaks `rule`.
pub fn refused(name: &[u8], rule: &str) -> Failure {
    let name = String::from_utf8_lossy(name);
    failure(
        FailureCode::BadArchive,
        &format!("the archive is refused: entry {}: {rule}", shown(name.as_ref().as_ref())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;
    use std::io::Write;
    use std::path::Component;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn entries(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, Failure> {
        let packed = gzip(bytes);
        let mut archive = Archive::new(Gunzip::new(&packed[..], u64::MAX));
        let (mut entries, mut buffer) = (Vec::new(), [0; 100]);
        while let Some(entry) = archive.next_entry()? {
            let mut content = Vec::new();
            loop {
                let count = archive.content(&mut buffer)?;
                if count == 0 {
                    break;
                }
                content.extend_from_slice(&buffer[..count]);
            }
            entries.push((entry, content));
        }
        Ok(entries)
    }

    /// An archive as the `tar` crate writes it, a long name among its names.
    fn written(files: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o640);
            header.set_mtime(1_600_000_000);
            tar.append_data(&mut header, name, &content[..]).unwrap();
        }
        tar.into_inner().unwrap()
    }

    proptest! {
        #[test]
        fn what_another_program_wrote_reads_back(files in proptest::collection::vec(("[a-z]{1,80}/[a-z]{1,80}", proptest::collection::vec(any::<u8>(), 0..1500)), 0..5)) {
            let read = entries(&written(&files)).unwrap();
            prop_assert_eq!(read.len(), files.len());
            for ((entry, content), (name, expected)) in read.iter().zip(&files) {
                prop_assert_eq!((entry.path.to_str().unwrap(), content), (name.as_str(), expected));
                prop_assert_eq!((entry.kind, entry.mode, entry.mtime), (Kind::File, 0o640, 1_600_000_000));
            }
        }

        #[test]
        fn a_changed_archive_stays_inside_or_is_refused(at in any::<prop::sample::Index>(), bytes in proptest::collection::vec(any::<u8>(), 1..40), signed in any::<bool>()) {
            let mut archive = written(&[("a/b".to_owned(), vec![1; 700]), ("c".repeat(120), vec![2; 3])]);
            let at = at.index(archive.len() - bytes.len());
            archive[at..at + bytes.len()].copy_from_slice(&bytes);
            if signed {
                // With the first header's checksum right again, so that what it says is looked at.
                let mut header = Header::from_byte_slice(&archive[..BLOCK]).clone();
                header.set_cksum();
                archive[..BLOCK].copy_from_slice(header.as_bytes());
            }
            for (entry, content) in entries(&archive).unwrap_or_default() {
                prop_assert!(entry.path.components().all(|part| matches!(part, Component::Normal(_))), "{:?}", entry);
                prop_assert_eq!(entry.size, content.len() as u64);
            }
        }

        #[test]
        fn any_bytes_are_an_archive_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = entries(&bytes);
        }
    }
}
