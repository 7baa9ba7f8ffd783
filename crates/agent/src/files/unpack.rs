//! Unpacking an archive: all of it into a folder of its own first, then into place.
//!
//! Invariant: nothing at the destination changes before the whole archive has been read and found right.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tiffin_protocol::{Failure, FailureCode, FilesDone, UnpackLimits};

use super::archive::{Archive, Entry, Kind, refused};
use super::gzip::Gunzip;
use super::staging::{self, Part};
use super::{merge, place, refusal, shown};
use crate::request::failure;

/// Bytes written at once.
const CHUNK: usize = 128 * 1024;

/// Bytes of all names: what is known of the entries is kept in memory.
const MAX_NAMES: usize = 16 << 20;

/// The last time that is kept, in seconds since the Unix epoch: a later one is as good as this.
const LAST_TIME: i64 = u32::MAX as i64;

/// Mode of a folder that no entry speaks of.
const USUAL_MODE: u32 = 0o755;

/// Unpacks `input` into the folder `dest`.
///
/// # Errors
/// A [`Failure`]; nothing has changed then.
pub fn run(dest: &str, limits: &UnpackLimits, input: File) -> Result<FilesDone, Failure> {
    let place = place::to_be(dest)?;
    if !place.existing.is_dir() {
        let message = format!("{} is no folder", shown(&place.existing));
        return Err(failure(FailureCode::Forbidden, &message));
    }
    staging::sweep(&place.existing);
    let part = Part::folder(&place.existing)?;
    let mut tree = Tree::new(part.path(), *limits);
    tree.fill(&mut Archive::new(Gunzip::new(input, limits.ratio)))?;
    tree.finish()?;
    let done = tree.done;
    if place.missing.is_empty() {
        merge::merge(part.path(), &place.existing)?;
        return Ok(done);
    }
    fs::set_permissions(part.path(), Permissions::from_mode(USUAL_MODE))
        .map_err(|error| refusal(&error, part.path()))?;
    let made = place.make_parents()?;
    part.place(&place.path()).inspect_err(|_| place::unmake(&made))?;
    Ok(done)
}

/// The folder that is filled, and what is in it.
struct Tree<'a> {
    root: &'a Path,
    limits: UnpackLimits,
    known: HashMap<PathBuf, Known>,
    names: usize,
    things: u64,
    done: FilesDone,
    buffer: Vec<u8>,
}

/// What was made of an entry.
#[derive(Clone, Copy)]
enum Known {
    File,
    /// With what its entry says of it, which would hinder filling it.
    Folder(Option<Attributes>),
}

#[derive(Clone, Copy)]
struct Attributes {
    mode: u32,
    mtime: i64,
}

impl<'a> Tree<'a> {
    fn new(root: &'a Path, limits: UnpackLimits) -> Self {
        let done = FilesDone { bytes: 0, entries: 0 };
        Tree { root, limits, known: HashMap::new(), names: 0, things: 0, done, buffer: vec![0; CHUNK] }
    }

    fn fill<R: Read>(&mut self, archive: &mut Archive<R>) -> Result<(), Failure> {
        while let Some(entry) = archive.next_entry()? {
            if entry.path.as_os_str().is_empty() {
                continue;
            }
            self.count(&entry)?;
            let parent = entry.path.parent().filter(|parent| !parent.as_os_str().is_empty());
            if let Some(parent) = parent {
                self.make_folders(parent, &entry.path)?;
            }
            match entry.kind {
                Kind::Folder => {
                    if self.known.contains_key(&entry.path) {
                        self.count_thing(&entry.path)?;
                    }
                    self.make_folders(&entry.path, &entry.path)?;
                    let said = Attributes { mode: entry.mode & 0o777 | 0o700, mtime: entry.mtime };
                    self.known.insert(entry.path, Known::Folder(Some(said)));
                }
                Kind::File => {
                    self.count_thing(&entry.path)?;
                    self.make_file(&entry, archive)?;
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.done.entries += 1;
        self.done.bytes = self.done.bytes.saturating_add(entry.size);
        if self.done.bytes > self.limits.unpacked_bytes {
            let message = format!("the archive unpacks to more than {} bytes", self.limits.unpacked_bytes);
            return Err(failure(FailureCode::TooLarge, &message));
        }
        Ok(())
    }

    /// Holds files and folders to their limit, and their names to theirs. Folders that no entry names count, too: one
    /// entry can bring a thousand.
    fn count_thing(&mut self, path: &Path) -> Result<(), Failure> {
        self.things += 1;
        self.names += path.as_os_str().len();
        if self.things > self.limits.entries {
            let message = format!("the archive has more than {} files and folders", self.limits.entries);
            return Err(failure(FailureCode::TooLarge, &message));
        }
        if self.names > MAX_NAMES {
            let message = format!("the names in the archive come to more than {MAX_NAMES} bytes");
            return Err(failure(FailureCode::TooLarge, &message));
        }
        Ok(())
    }

    /// Makes the folder `path` and those above it, as far as they aren't there, for the entry `entry`.
    fn make_folders(&mut self, path: &Path, entry: &Path) -> Result<(), Failure> {
        match self.known.get(path) {
            Some(Known::Folder(_)) => return Ok(()),
            Some(Known::File) => {
                let rule = format!("{} is a file in this archive and can't be a folder, too", shown(path));
                return Err(refused(entry.as_os_str().as_encoded_bytes(), &rule));
            }
            None => {}
        }
        let mut missing = vec![path];
        for above in path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()) {
            match self.known.get(above) {
                None => missing.push(above),
                Some(Known::Folder(_)) => break,
                Some(Known::File) => return self.make_folders(above, entry),
            }
        }
        for folder in missing.into_iter().rev() {
            self.count_thing(folder)?;
            let made = self.root.join(folder);
            fs::create_dir(&made).map_err(|error| refusal(&error, folder))?;
            self.known.insert(folder.to_owned(), Known::Folder(None));
        }
        Ok(())
    }

    /// Writes a file. The last one of a name wins, as with any tar.
    fn make_file<R: Read>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), Failure> {
        if let Some(Known::Folder(_)) = self.known.get(&entry.path) {
            let rule = "it is a folder in this archive and can't be a file, too";
            return Err(refused(entry.path.as_os_str().as_encoded_bytes(), rule));
        }
        let path = self.root.join(&entry.path);
        let failed = |error: std::io::Error| refusal(&error, &entry.path);
        let mode = entry.mode & 0o777 | 0o600;
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&path);
        let mut file = opened.map_err(failed)?;
        loop {
            let count = archive.content(&mut self.buffer)?;
            if count == 0 {
                break;
            }
            file.write_all(&self.buffer[..count]).map_err(failed)?;
        }
        let again = self.known.insert(entry.path.clone(), Known::File).is_some();
        // What the umask took, or an earlier file of that name left.
        if again || mode & 0o022 != 0 {
            file.set_permissions(Permissions::from_mode(mode)).map_err(failed)?;
        }
        file.set_times(times(entry.mtime)).map_err(failed)
    }

    /// Gives folders the modes and times of their entries, now that nothing more is put into them.
    fn finish(&mut self) -> Result<(), Failure> {
        for (path, known) in &self.known {
            let Known::Folder(Some(said)) = known else { continue };
            let failed = |error: std::io::Error| refusal(&error, path);
            let folder = File::open(self.root.join(path)).map_err(failed)?;
            if said.mode != USUAL_MODE {
                folder.set_permissions(Permissions::from_mode(said.mode)).map_err(failed)?;
            }
            folder.set_times(times(said.mtime)).map_err(failed)?;
        }
        Ok(())
    }
}

fn times(mtime: i64) -> FileTimes {
    let seconds = u64::try_from(mtime.clamp(0, LAST_TIME)).unwrap_or(0);
    FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}
