//! A VM's disk: an ext4 filesystem of fixed size in a sparse file, so that a full disk is the guest's own problem.
//!
//! Formatting takes longer than copying the few blocks that it wrote, so the sizes that are powers of two are formatted
//! once and kept as templates. Only those: templates for every size that a client thinks of would fill the host's disk.

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
};

use super::process::{self, ToolError};

/// What [`copy_seen`] shows at once.
pub const PIECE: usize = 16 * 1024;

/// A disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Formatting failed.
    #[error("formatting a disk failed")]
    Format(#[from] ToolError),
    /// Writing failed.
    #[error("writing a disk failed")]
    Write(#[from] io::Error),
}

impl DiskError {
    /// Whether the host's disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Write(error) if error.kind() == io::ErrorKind::StorageFull)
    }
}

/// Makes the disk file `at` with `size_mb` MiB, from a template in `templates`, which is made when missing.
///
/// # Errors
/// [`DiskError`]; nothing is left at `at`.
pub fn create(templates: &Path, at: &Path, size_mb: u32) -> Result<(), DiskError> {
    if !size_mb.is_power_of_two() {
        return format_new(at, size_mb);
    }
    let template = template(templates, size_mb)?;
    copy_sparse(&template, at).map_err(|error| {
        if error.kind() != io::ErrorKind::AlreadyExists {
            let _ = fs::remove_file(at);
        }
        DiskError::Write(error)
    })
}

/// The formatted file of that size, made when missing: complete under its final name, or not there.
fn template(templates: &Path, size_mb: u32) -> Result<PathBuf, DiskError> {
    let path = templates.join(format!("disk-{size_mb}.ext4"));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(templates)?;
    let unfinished = templates.join(format!("disk-{size_mb}.{}.tmp", hex::encode(rand::random::<[u8; 6]>())));
    let made = format(&unfinished, size_mb).and_then(|()| Ok(fs::rename(&unfinished, &path)?));
    if made.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    made.map(|()| path)
}

/// Formats the file itself; nothing is left of it on failure.
fn format_new(at: &Path, size_mb: u32) -> Result<(), DiskError> {
    if at.exists() {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists).into());
    }
    format(at, size_mb).inspect_err(|_| {
        let _ = fs::remove_file(at);
    })
}

/// Removes what a killed process left half-made among the templates. No other process may be making one.
pub fn clear_unfinished(templates: &Path) {
    for entry in fs::read_dir(templates).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|end| end == "tmp") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn format(path: &Path, size_mb: u32) -> Result<(), DiskError> {
    File::create(path)?.set_len(u64::from(size_mb) << 20)?;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-i", "16384", "-J", "size=4"]);
    mke2fs.args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"]);
    mke2fs.arg(path);
    process::run(mke2fs, "")?;
    Ok(())
}

/// Copies a file's data and leaves its holes holes; shares the blocks where the host's filesystem can.
///
/// # Errors
/// The kernel's; `AlreadyExists` when `to` is there.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new().write(true).create_new(true).open(to)?;
    if share_blocks(&source, &target) { Ok(()) } else { copy_data(&source, &target) }
}

/// Makes `target` what `source` is, by sharing its blocks; false where the host's filesystem can't.
pub fn share_blocks(source: &File, target: &File) -> bool {
    // SAFETY: FICLONE takes the descriptor of the file to share blocks with.
    unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) == 0 }
}

/// Copies the data to an empty file, and leaves holes holes.
pub fn copy_data(source: &File, target: &File) -> io::Result<()> {
    target.set_len(source.metadata()?.len())?;
    let mut position = 0;
    while let Some(data) = data_from(source, position)? {
        copy_range(source, target, data.clone())?;
        position = data.end;
    }
    Ok(())
}

/// As [`copy_sparse`] (`to` may be left out), and shows everything that was read and isn't zero, in order, in pieces that depend on the content
/// alone: at most [`PIECE`] bytes, each at a multiple of it.
///
/// # Errors
/// The kernel's; `AlreadyExists` when `to` is there.
pub fn copy_seen(from: &Path, to: Option<&Path>, mut seen: impl FnMut(u64, &[u8])) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let source = File::open(from)?;
    let length = source.metadata()?.len();
    let target = match to {
        None => None,
        Some(to) => {
            let target = OpenOptions::new().write(true).create_new(true).open(to)?;
            let shared = share_blocks(&source, &target);
            target.set_len(length)?;
            (!shared).then_some(target)
        }
    };
    let (mut buffer, mut next) = (vec![0; PIECE], 0u64);
    while let Some(data) = data_from(&source, next)? {
        next = data.start - data.start % PIECE as u64;
        while next < data.end {
            let want = usize::try_from(length - next).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..want];
            source.read_exact_at(piece, next)?;
            if piece.iter().any(|byte| *byte != 0) {
                if let Some(target) = &target {
                    target.write_all_at(piece, next)?;
                }
                seen(next, piece);
            }
            next += want as u64;
        }
    }
    Ok(())
}

/// The next run of data at or after `position`; at the end there is none.
pub fn data_from(file: &File, position: u64) -> io::Result<Option<Range<u64>>> {
    use nix::unistd::{Whence, lseek};
    let start = match lseek(file, i64::try_from(position).map_err(io::Error::other)?, Whence::SeekData) {
        Ok(start) => start,
        Err(nix::errno::Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = lseek(file, start, Whence::SeekHole)?;
    Ok(Some(u64::try_from(start).map_err(io::Error::other)?..u64::try_from(end).map_err(io::Error::other)?))
}

fn copy_range(source: &File, target: &File, range: Range<u64>) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 256 * 1024];
    let mut at = range.start;
    while at < range.end {
        let want = usize::try_from(range.end - at).unwrap_or(buffer.len()).min(buffer.len());
        source.read_exact_at(&mut buffer[..want], at)?;
        target.write_all_at(&buffer[..want], at)?;
        at += want as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_disk_is_as_large_as_asked_and_takes_little_room() {
        let dir = tempfile::tempdir().unwrap();
        for (name, size) in [("a", 256), ("b", 256), ("c", 300)] {
            let path = dir.path().join(name);
            create(&dir.path().join("templates"), &path, size).unwrap();
            let meta = fs::metadata(&path).unwrap();
            assert_eq!(meta.len(), u64::from(size) << 20);
            assert!(meta.blocks() * 512 < 16 << 20, "{} bytes on disk", meta.blocks() * 512);
        }
        let mut check = Command::new("e2fsck");
        check.args(["-fn"]).arg(dir.path().join("b"));
        process::run(check, "").unwrap();
        assert_eq!(fs::read_dir(dir.path().join("templates")).unwrap().count(), 1, "odd sizes leave no template");
        fs::write(dir.path().join("templates/disk-64.x.tmp"), "").unwrap();
        clear_unfinished(&dir.path().join("templates"));
        assert_eq!(fs::read_dir(dir.path().join("templates")).unwrap().count(), 1);
    }

    #[test]
    fn a_copy_shows_the_same_wherever_the_holes_are() {
        let dir = tempfile::tempdir().unwrap();
        let (sparse, dense) = (dir.path().join("sparse"), dir.path().join("dense"));
        let mut content = vec![0; 5 * PIECE + 77];
        for at in [3, PIECE - 1, 3 * PIECE + 5, 5 * PIECE + 76] {
            content[at] = 7;
        }
        fs::write(&dense, &content).unwrap();
        let file = File::create(&sparse).unwrap();
        file.set_len(content.len() as u64).unwrap();
        for (at, byte) in content.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            std::os::unix::fs::FileExt::write_all_at(&file, &[*byte], at as u64).unwrap();
        }
        let show = |from: &Path, to: Option<&Path>| {
            let mut all = Vec::new();
            copy_seen(from, to, |at, piece| all.push((at, piece.to_vec()))).unwrap();
            all
        };
        let copy = dir.path().join("copy");
        let shown = show(&sparse, Some(&copy));
        assert_eq!(shown, show(&dense, None));
        assert_eq!(shown.iter().map(|(at, _)| at / PIECE as u64).collect::<Vec<_>>(), [0, 3, 5]);
        assert_eq!(fs::read(&copy).unwrap(), content);
        assert!(copy_seen(&sparse, Some(&copy), |_, _| ()).is_err(), "nothing is overwritten");
    }

    #[test]
    fn an_existing_disk_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "precious").unwrap();
        for size in [64, 65] {
            assert!(create(&dir.path().join("templates"), &path, size).is_err());
        }
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
