//! Moving a finished folder's entries into one that is there already.
//!
//! Folders that both have are merged; a file takes the place of a file, a link or whatever else is no folder. Everything is
//! looked at before anything is moved: a file can't replace a folder, nor a folder anything else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use tiffin_protocol::{Failure, FailureCode};

use super::archive::refused;
use super::{refusal, shown};
use crate::request::failure;

/// Moves all that is in `from` into `to`.
///
/// # Errors
/// A [`Failure`]; nothing is moved then, unless the disk or the guest's user interferes at this very moment.
pub fn merge(from: &Path, to: &Path) -> Result<(), Failure> {
    let mut moves = Vec::new();
    plan(from, to, Path::new(""), &mut moves)?;
    for (from, to) in moves {
        fs::rename(&from, &to).map_err(|error| refusal(&error, &to))?;
    }
    Ok(())
}

/// Appends to `moves` what has to be moved from where to where for the folder `below` of the archive.
fn plan(from: &Path, to: &Path, below: &Path, moves: &mut Vec<(PathBuf, PathBuf)>) -> Result<(), Failure> {
    if access(to, AccessFlags::W_OK | AccessFlags::X_OK).is_err() {
        let message = format!("{}: the user may not write to this folder", shown(to));
        return Err(failure(FailureCode::Forbidden, &message));
    }
    for entry in fs::read_dir(from).map_err(|error| refusal(&error, below))? {
        let entry = entry.map_err(|error| refusal(&error, below))?;
        let name = entry.file_name();
        let (own, there, path) = (entry.path(), to.join(&name), below.join(&name));
        let is_folder = entry.file_type().map_err(|error| refusal(&error, &path))?.is_dir();
        match fs::symlink_metadata(&there) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => moves.push((own, there)),
            Err(error) => return Err(refusal(&error, &there)),
            Ok(found) => match (is_folder, found.is_dir()) {
                (true, true) => plan(&own, &there, &path, moves)?,
                (false, false) => moves.push((own, there)),
                (true, false) => {
                    let what = if found.is_symlink() { "a link" } else { "a file" };
                    let rule = format!("it is a folder, and {} is {what}: remove that first", shown(&there));
                    return Err(refused(path.as_os_str().as_encoded_bytes(), &rule));
                }
                (false, true) => {
                    let rule = format!("it is a file, and {} is a folder: remove that first", shown(&there));
                    return Err(refused(path.as_os_str().as_encoded_bytes(), &rule));
                }
            },
        }
    }
    Ok(())
}
