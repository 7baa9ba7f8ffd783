//! What is in a folder.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use tiffin_protocol::{Failure, FailureCode, FileEntry, FileKind, FilesDone};

use super::{place, refusal, shown, staging};
use crate::request::failure;

/// Writes the entries of the folder at `path` to `output`, by name, unless there are more than `max_entries`.
///
/// # Errors
/// A [`Failure`].
pub fn run(path: &str, max_entries: u64, mut output: File) -> Result<FilesDone, Failure> {
    let real = place::existing(path)?;
    let failed = |error: io::Error| refusal(&error, &real);
    if !fs::metadata(&real).map_err(failed)?.is_dir() {
        return Err(failure(FailureCode::Forbidden, &format!("{} is no folder", shown(&real))));
    }
    let mut entries = Vec::new();
    for entry in fs::read_dir(&real).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if staging::is_part(entry.file_name().as_encoded_bytes()) {
            continue;
        }
        if entries.len() as u64 >= max_entries {
            let message = format!("{} has more than {max_entries} entries", shown(&real));
            return Err(failure(FailureCode::TooLarge, &message));
        }
        match entry.metadata() {
            Ok(metadata) => entries.push(described(entry.file_name().to_string_lossy().into_owned(), &metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    let json = serde_json::to_vec(&entries).expect("strings and numbers are JSON");
    output.write_all(&json).map_err(|error| refusal(&error, "standard output".as_ref()))?;
    let bytes = entries.iter().map(|entry| entry.size).fold(0, u64::saturating_add);
    Ok(FilesDone { bytes, entries: entries.len() as u64 })
}

fn described(name: String, metadata: &Metadata) -> FileEntry {
    let kind = match metadata.file_type() {
        kind if kind.is_file() => FileKind::File,
        kind if kind.is_dir() => FileKind::Directory,
        kind if kind.is_symlink() => FileKind::Symlink,
        _ => FileKind::Other,
    };
    FileEntry {
        name,
        kind,
        size: if kind == FileKind::File { metadata.len() } else { 0 },
        mode: metadata.mode() & 0o7777,
        modified_ms: metadata.mtime().saturating_mul(1000).saturating_add(metadata.mtime_nsec() / 1_000_000),
    }
}
