//! Packing a folder or a file into a gzipped tar, as it is read: no more than a few buffers are in memory.
//!
//! * Links are stored as links and never followed; sockets, FIFOs, devices and unfinished uploads are left out.
//! * What vanishes while the folder is read is left out. A file that changes meanwhile is stored with the size that it
//!   had when it was opened: cut, or filled up with zeros. So the archive is whole whatever the guest does.
//! * What the user may not read ends it with `Forbidden`. Output may be on its way by then: what has come is no whole gzip
//!   stream, so nobody can take it for the folder. Small folders fail before anything is sent.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Builder, EntryType, Header};
use tiffin_protocol::{Failure, FailureCode, FilesDone};

use super::{place, refusal, shown, staging};
use crate::request::failure;

/// Bytes sent at once.
const CHUNK: usize = 256 * 1024;

/// Folders in each other. The path's own limit comes first in all but made-up cases; this keeps the stack bounded.
const MAX_DEPTH: usize = 1000;

/// Bytes of a name that fit into a header.
const MAX_NAME: usize = 100;

/// Packs what is at `path` into `output`.
///
/// # Errors
/// A [`Failure`].
pub fn run(path: &str, output: File) -> Result<FilesDone, Failure> {
    let real = place::existing(path)?;
    let metadata = fs::symlink_metadata(&real).map_err(|error| refusal(&error, &real))?;
    let encoder = GzEncoder::new(BufWriter::with_capacity(CHUNK, output), Compression::fast());
    let mut packer = Packer { tar: Builder::new(encoder), done: FilesDone { bytes: 0, entries: 0 } };
    match packer.all(&real, &metadata) {
        Ok(()) => packer.finish(),
        Err(failed) => {
            // Dropped, it would write a proper end behind what is no whole archive. The process ends anyway.
            std::mem::forget(packer);
            Err(failed)
        }
    }
}

struct Packer {
    tar: Builder<GzEncoder<BufWriter<File>>>,
    done: FilesDone,
}

impl Packer {
    fn all(&mut self, real: &Path, metadata: &Metadata) -> Result<(), Failure> {
        if metadata.is_dir() {
            return self.folder(real, Path::new("."), metadata, 0);
        }
        if metadata.is_file() {
            return self.file(real, Path::new(real.file_name().unwrap_or(OsStr::new("file"))));
        }
        Err(failure(FailureCode::Forbidden, &format!("{} is neither a folder nor a file", shown(real))))
    }

    fn folder(&mut self, path: &Path, name: &Path, metadata: &Metadata, depth: usize) -> Result<(), Failure> {
        if depth > MAX_DEPTH {
            let message = format!("{}: more than {MAX_DEPTH} folders in each other", shown(path));
            return Err(failure(FailureCode::TooLarge, &message));
        }
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(refusal(&error, path)),
        };
        self.done.entries += 1;
        // With a slash at its end, as other archivers write folders.
        self.append(header(metadata, EntryType::Directory, 0), &name.join(""), None, io::empty())
            .map_err(|error| refusal(&error, path))?;
        for entry in entries {
            let entry = entry.map_err(|error| refusal(&error, path))?;
            if !staging::is_part(entry.file_name().as_encoded_bytes()) {
                self.entry(&entry.path(), &name.join(entry.file_name()), depth)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, name: &Path, depth: usize) -> Result<(), Failure> {
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(refusal(&error, path)),
        };
        if metadata.is_dir() {
            self.folder(path, name, &metadata, depth + 1)
        } else if metadata.is_file() {
            self.file(path, name)
        } else if metadata.is_symlink() {
            self.link(path, name, &metadata)
        } else {
            Ok(())
        }
    }

    fn file(&mut self, path: &Path, name: &Path) -> Result<(), Failure> {
        // It may have become a link or a FIFO since it was looked at: neither is followed or waited for.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(refusal(&error, path)),
        };
        let metadata = file.metadata().map_err(|error| refusal(&error, path))?;
        if !metadata.is_file() {
            return Ok(());
        }
        let header = header(&metadata, EntryType::Regular, metadata.len());
        let content = Exactly { file, left: metadata.len() };
        self.done.entries += 1;
        self.done.bytes += metadata.len();
        self.append(header, name, None, content).map_err(|error| refusal(&error, path))
    }

    fn link(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> Result<(), Failure> {
        let target: PathBuf = match fs::read_link(path) {
            Ok(target) => target,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
                return Ok(());
            }
            Err(error) => return Err(refusal(&error, path)),
        };
        let header = header(metadata, EntryType::Symlink, 0);
        self.done.entries += 1;
        self.append(header, name, Some(&target), io::empty()).map_err(|error| refusal(&error, path))
    }

    /// Appends an entry. The `tar` crate's own way to name one would leave out the dot at its beginning.
    fn append(&mut self, mut header: Header, name: &Path, link: Option<&Path>, content: impl Read) -> io::Result<()> {
        let name = name.as_os_str().as_encoded_bytes();
        self.long(EntryType::GNULongName, name)?;
        let fields = header.as_gnu_mut().expect("it was made as a GNU header");
        fit(&mut fields.name, name);
        if let Some(link) = link.map(|link| link.as_os_str().as_encoded_bytes()) {
            fit(&mut fields.linkname, link);
            self.long(EntryType::GNULongLink, link)?;
        }
        header.set_cksum();
        self.tar.append(&header, content)
    }

    /// Says `name` before its entry, where it doesn't fit into the header.
    fn long(&mut self, kind: EntryType, name: &[u8]) -> io::Result<()> {
        if name.len() <= MAX_NAME {
            return Ok(());
        }
        let mut header = Header::new_gnu();
        fit(&mut header.as_gnu_mut().expect("it was made as a GNU header").name, b"././@LongLink");
        header.set_entry_type(kind);
        header.set_size(name.len() as u64 + 1);
        header.set_cksum();
        self.tar.append(&header, name.chain(&[0][..]))
    }

    fn finish(self) -> Result<FilesDone, Failure> {
        let sent = self.tar.into_inner().and_then(GzEncoder::finish).and_then(|mut output| output.flush());
        sent.map_err(|error| refusal(&error, "standard output".as_ref()))?;
        Ok(self.done)
    }
}

fn header(metadata: &Metadata, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_metadata(metadata);
    header.set_entry_type(kind);
    header.set_size(size);
    header
}

fn fit(field: &mut [u8], name: &[u8]) {
    let length = name.len().min(field.len());
    field[..length].copy_from_slice(&name[..length]);
}

/// As many bytes of a file as were announced, whatever becomes of it meanwhile.
struct Exactly {
    file: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let count = match self.file.read(&mut buffer[..wanted])? {
            0 => {
                buffer[..wanted].fill(0);
                wanted
            }
            count => count,
        };
        self.left -= count as u64;
        Ok(count)
    }
}
