//! A copy of a disk that is in use, so that little is left to do while nobody may write to it.
//!
//! ```text
//!   settle -> begin (whoever writes goes on) -> everybody stands still -> settle -> finish
//! ```
//!
//! [`LiveCopy::begin`] copies whatever is there. [`LiveCopy::finish`] makes the copy what the disk is: at once where nothing has been
//! written since, which the kernel's count of the disk's written sectors tells; else all is compared, and what differs
//! is copied again. Where the host's filesystem shares blocks between files, both take no time.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use super::disk::{PIECE, copy_data, data_from, share_blocks};

/// Fields of `/sys/dev/block/*/stat` (Documentation/block/stat.rst).
const WRITTEN_SECTORS: usize = 6;
const DISCARDED_SECTORS: usize = 13;

/// Some ticks of the slowest clock of a kernel's.
const TICKS: Duration = Duration::from_millis(50);

/// A copy that isn't done.
pub struct LiveCopy {
    source: File,
    target: File,
    shares_blocks: bool,
    count: Count,
    /// What had been written before the copy began; `None` when it isn't known.
    written: Option<u64>,
}

impl LiveCopy {
    /// Copies the disk file `disk` to the new file `to`. Where the host has mounted its filesystem, that is at `mounted_at`;
    /// else somebody writes to the file itself.
    ///
    /// # Errors
    /// The kernel's; `AlreadyExists` when `to` is there.
    pub fn begin(disk: &Path, mounted_at: Option<&Path>, to: &Path) -> io::Result<Self> {
        let source = File::open(disk)?;
        let count = match mounted_at {
            Some(at) => Count::of_device(at)?,
            None => Count::Times(source.try_clone()?),
        };
        let written = count.written();
        let target = OpenOptions::new().read(true).write(true).create_new(true).open(to)?;
        let shares_blocks = share_blocks(&source, &target);
        if !shares_blocks {
            copy_data(&source, &target)?;
        }
        Ok(Self { source, target, shares_blocks, count, written })
    }

    /// Makes the copy what the disk is now. Nobody writes to it meanwhile, and what was written is in its file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn finish(self) -> io::Result<()> {
        if self.shares_blocks && share_blocks(&self.source, &self.target) {
            return Ok(());
        }
        if self.written.is_some() && self.written == self.count.written() {
            return Ok(());
        }
        copy_differences(&self.source, &self.target)
    }
}

/// What tells whether something was written.
enum Count {
    /// The kernel's count of a block device, by its folder in sysfs.
    Sectors(PathBuf),
    /// The time of the last write to a file.
    Times(File),
}

impl Count {
    /// That of the device below the filesystem at `path`.
    fn of_device(path: &Path) -> io::Result<Self> {
        let id = fs::metadata(path)?.dev();
        Ok(Self::Sectors(PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(id), libc::minor(id)))))
    }

    /// Another number once something was written, if that can be told.
    fn written(&self) -> Option<u64> {
        match self {
            Self::Sectors(device) => {
                if fs::read_to_string(device.join("queue/iostats")).ok()?.trim() != "1" {
                    return None;
                }
                written_sectors(&fs::read_to_string(device.join("stat")).ok()?)
            }
            Self::Times(file) => {
                let changed = file.metadata().ok()?.modified().ok()?;
                // The kernel's clock for files ticks: two writes within a tick have the same time.
                let ticks_ago = changed.elapsed().ok()? > TICKS;
                let since = changed.duration_since(UNIX_EPOCH).ok()?;
                ticks_ago.then_some(u64::try_from(since.as_nanos()).ok()?)
            }
        }
    }
}

fn written_sectors(stat: &str) -> Option<u64> {
    let field = |at| stat.split_whitespace().nth(at)?.parse::<u64>().ok();
    field(WRITTEN_SECTORS)?.checked_add(field(DISCARDED_SECTORS)?)
}

/// Copies what differs, piece by piece. Both files are of one length.
fn copy_differences(source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    let (mut is, mut was) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut data, mut old_data) = (0..0, 0..0);
    let mut at = 0;
    while at < length {
        // What is a hole in both is the same.
        for (file, range) in [(source, &mut data), (target, &mut old_data)] {
            if range.end <= at {
                *range = data_from(file, at)?.unwrap_or(length..length);
            }
        }
        let next = data.start.min(old_data.start).max(at);
        if next >= length {
            return Ok(());
        }
        at = next - next % PIECE as u64;
        let want = usize::try_from(length - at).unwrap_or(PIECE).min(PIECE);
        source.read_exact_at(&mut is[..want], at)?;
        target.read_exact_at(&mut was[..want], at)?;
        if is[..want] != was[..want] {
            target.write_all_at(&is[..want], at)?;
        }
        at += want as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_count_is_of_what_was_changed() {
        let stat = "       7        0       56        1     4242        3     9000       12        0       40       13        2        0      100        1       5        6\n";
        assert_eq!(written_sectors(stat), Some(9100));
        assert_eq!(written_sectors("1 2 3"), None);
        assert_eq!(written_sectors(""), None);
    }

    /// What a file of that length holds after writes of a byte at places, and holes over pieces.
    fn changed(file: &File, length: u64, writes: &[(prop::sample::Index, u8)], holes: &[prop::sample::Index]) {
        let length = usize::try_from(length).unwrap();
        for (place, byte) in writes {
            file.write_all_at(&[*byte], place.index(length) as u64).unwrap();
        }
        for place in holes {
            let at = place.index(length) as u64 / 4096 * 4096;
            let mode =
                nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            nix::fcntl::fallocate(file, mode, i64::try_from(at).unwrap(), 4096).unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_was_written_meanwhile_is_in_the_copy(
            before in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..20),
            writes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..20),
            holes in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (disk, copy) = (dir.path().join("disk"), dir.path().join("copy"));
            let length = 20 * PIECE as u64 + 77;
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&disk).unwrap();
            file.set_len(length).unwrap();
            changed(&file, length, &before, &[]);
            let target = OpenOptions::new().read(true).write(true).create_new(true).open(&copy).unwrap();
            copy_data(&file, &target).unwrap();
            changed(&file, length, &writes, &holes);
            copy_differences(&file, &target).unwrap();
            prop_assert!(fs::read(&disk).unwrap() == fs::read(&copy).unwrap());
        }
    }

    #[test]
    fn a_files_time_tells_a_write_unless_it_was_a_moment_ago() {
        let file = tempfile::tempfile().unwrap();
        let count = Count::Times(file.try_clone().unwrap());
        file.write_all_at(b"now", 0).unwrap();
        assert_eq!(count.written(), None);
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(9)).unwrap();
        let before = count.written();
        assert_eq!((before.is_some(), count.written()), (true, before));
        file.write_all_at(b"then", 0).unwrap();
        assert_ne!(count.written(), before);
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, there) = (dir.path().join("disk"), dir.path().join("there"));
        fs::write(&disk, "new").unwrap();
        fs::write(&there, "precious").unwrap();
        assert!(LiveCopy::begin(&disk, Some(dir.path()), &there).is_err());
        assert_eq!(fs::read(&there).unwrap(), b"precious");
    }
}
