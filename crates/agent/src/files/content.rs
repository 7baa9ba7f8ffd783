//! One file's bytes, in or out.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};

use tiffin_protocol::{Failure, FailureCode, FilesDone};

use super::staging::{self, Part};
use super::{place, refusal, shown};
use crate::request::failure;

/// Bytes carried at once.
const CHUNK: usize = 128 * 1024;

/// Mode of a file that wasn't there before.
const USUAL_MODE: u32 = 0o644;

/// Copies the file at `path` to `output`.
///
/// # Errors
/// A [`Failure`].
pub fn read(path: &str, mut output: File) -> Result<FilesDone, Failure> {
    let real = place::existing(path)?;
    let failed = |error: io::Error| refusal(&error, &real);
    // Not to be stuck at a FIFO.
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&real).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failure(FailureCode::Forbidden, &format!("{} is no file", shown(&real))));
    }
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(FilesDone { bytes, entries: 1 }),
            Ok(count) => {
                output.write_all(&buffer[..count]).map_err(|error| refusal(&error, "standard output".as_ref()))?;
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Makes `input` the file at `path`, whole or not at all. A file that was there keeps its mode.
///
/// # Errors
/// A [`Failure`]; nothing has changed then.
pub fn write(path: &str, max_bytes: u64, mut input: File) -> Result<FilesDone, Failure> {
    let place = place::to_be(path)?;
    let replaced = fs::metadata(&place.existing).map_err(|error| refusal(&error, &place.existing))?;
    let refused = |what: &str| Err(failure(FailureCode::Forbidden, &format!("{} {what}", shown(&place.existing))));
    match (place.missing.is_empty(), replaced.is_dir(), replaced.is_file()) {
        (true, true, _) => return refused("is a folder"),
        (true, _, false) => return refused("is no file"),
        (false, false, _) => return refused("is no folder"),
        _ => {}
    }
    let Some(folder) = staging::folder_of(&place.existing) else { return refused("is in no folder") };
    staging::sweep(folder);
    let part = Part::file(folder)?;
    let bytes = fill(&mut part.as_file(), &mut input, max_bytes, path)?;
    let mode = if place.missing.is_empty() { replaced.mode() & 0o777 } else { USUAL_MODE };
    part.as_file().set_permissions(Permissions::from_mode(mode)).map_err(|error| refusal(&error, path.as_ref()))?;
    let made = place.make_parents()?;
    part.place(&place.path()).inspect_err(|_| place::unmake(&made))?;
    Ok(FilesDone { bytes, entries: 1 })
}

fn fill(file: &mut &File, input: &mut File, max_bytes: u64, path: &str) -> Result<u64, Failure> {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(count) => {
                bytes += count as u64;
                if bytes > max_bytes {
                    let message = format!("{}: more than {max_bytes} bytes", shown(path.as_ref()));
                    return Err(failure(FailureCode::TooLarge, &message));
                }
                file.write_all(&buffer[..count]).map_err(|error| refusal(&error, path.as_ref()))?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(refusal(&error, "standard input".as_ref())),
        }
    }
}
