//! A guest's memory, as the host has it.
//!
//! A guest that booted has a memory of its own, without a name. One that goes on from a saved memory maps that file privately:
//! what it doesn't change it shares with all others of that memory, in the host's cache, and what it changes is its own.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use nix::{
    sys::memfd::{MFdFlags, memfd_create},
    unistd::Pid,
};

use crate::host::disk::{self, PIECE};

/// Bytes of a page, here as everywhere on x86-64.
const PAGE: u64 = 4096;
/// Bytes that the kernel tells of each page (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: u64 = 8;
/// Of such an entry: the page is in memory, or swapped out.
const THERE: u64 = 1 << 63 | 1 << 62;
/// Of such an entry: the page is the file's.
const OF_THE_FILE: u64 = 1 << 61;
/// Pages that are asked for at once.
const PAGES: usize = 4096;

/// See the module.
pub(super) enum Memory {
    /// The guest's own.
    Own(File),
    /// A saved one, open for reading; what the guest has changed is QEMU's.
    Saved(File),
}

/// A copy of a memory that isn't done.
pub(super) struct Copy<'a> {
    of: &'a Memory,
    to: File,
}

impl Memory {
    /// An empty one.
    pub(super) fn new(size_mb: u32) -> io::Result<Self> {
        let file = File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(u64::from(size_mb) << 20)?;
        Ok(Self::Own(file))
    }

    /// The one that was saved in `path`.
    pub(super) fn saved(path: &Path, size_mb: u32) -> io::Result<Self> {
        let file = File::open(path)?;
        match file.metadata()?.len() == u64::from(size_mb) << 20 {
            true => Ok(Self::Saved(file)),
            false => Err(io::Error::other("the saved memory has another size")),
        }
    }

    /// What QEMU is to map.
    pub(super) fn file(&self) -> &File {
        match self {
            Self::Own(file) | Self::Saved(file) => file,
        }
    }

    /// Copies to the new file `to` what doesn't change while the guest runs.
    pub(super) fn begin_copy(&self, to: &Path) -> io::Result<Copy<'_>> {
        let to = OpenOptions::new().write(true).create_new(true).open(to)?;
        match self {
            Self::Own(file) => to.set_len(file.metadata()?.len())?,
            Self::Saved(file) if disk::share_blocks(file, &to) => {}
            Self::Saved(file) => disk::copy_data(file, &to)?,
        }
        Ok(Copy { of: self, to })
    }
}

impl Copy<'_> {
    /// Makes it what the memory is now. The guest stands still meanwhile; `qemu` is its process.
    pub(super) fn finish(self, qemu: Pid) -> io::Result<()> {
        match self.of {
            Memory::Own(file) => copy_nonzero(file, &self.to),
            Memory::Saved(file) => copy_changed(file, qemu, &self.to),
        }
    }
}

/// Copies all that isn't zero.
fn copy_nonzero(from: &File, to: &File) -> io::Result<()> {
    let (mut position, mut piece) = (0, vec![0; PIECE]);
    while let Some(data) = disk::data_from(from, position)? {
        let mut at = data.start;
        while at < data.end {
            let want = usize::try_from(data.end - at).unwrap_or(PIECE).min(PIECE);
            from.read_exact_at(&mut piece[..want], at)?;
            if piece[..want].iter().any(|byte| *byte != 0) {
                to.write_all_at(&piece[..want], at)?;
            }
            at += want as u64;
        }
        position = data.end;
    }
    Ok(())
}

/// Copies the pages that `qemu`, which maps `base` privately, has changed.
fn copy_changed(base: &File, qemu: Pid, to: &File) -> io::Result<()> {
    let process = Path::new("/proc").join(qemu.to_string());
    let start = mapped_at(&fs::read_to_string(process.join("maps"))?, base)?;
    let (pagemap, memory) = (File::open(process.join("pagemap"))?, File::open(process.join("mem"))?);
    let pages = base.metadata()?.len() / PAGE;
    let (mut entries, mut run) = (vec![0; PAGES * ENTRY as usize], vec![0; PIECE]);
    let mut next = 0;
    while next < pages {
        let count = usize::try_from(pages - next).unwrap_or(PAGES).min(PAGES);
        let entries = &mut entries[..count * ENTRY as usize];
        pagemap.read_exact_at(entries, (start / PAGE + next) * ENTRY)?;
        for (first, length) in changed_runs(entries) {
            let (mut at, end) = ((next + first) * PAGE, (next + first + length) * PAGE);
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
                memory.read_exact_at(&mut run[..want], start + at)?;
                to.write_all_at(&run[..want], at)?;
                at += want as u64;
            }
        }
        next += count as u64;
    }
    Ok(())
}

/// Where a process has mapped the whole of a file, by what `/proc/<pid>/maps` says.
fn mapped_at(maps: &str, file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    let found = maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (range, _rights, offset) = (words.next()?, words.next()?, words.next()?);
        let (_device, inode) = (words.next()?, words.next()?);
        let (start, end) = range.split_once('-')?;
        let [start, end, offset] = [start, end, offset].map(|number| u64::from_str_radix(number, 16).ok());
        let is_it = inode.parse() == Ok(metadata.ino()) && offset? == 0 && end?.checked_sub(start?)? == metadata.len();
        is_it.then_some(start?)
    });
    found.ok_or_else(|| io::Error::other("the guest's memory isn't mapped in one piece"))
}

/// The runs of pages that aren't the file's any more: the first of each, and how many.
fn changed_runs(entries: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let entries = entries.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry));
    let mut changed: Vec<(u64, u64)> = Vec::new();
    for (page, _) in (0..).zip(entries).filter(|(_, entry)| entry & THERE != 0 && entry & OF_THE_FILE == 0) {
        match changed.last_mut() {
            Some((first, length)) if *first + *length == page => *length += 1,
            _ => changed.push((page, 1)),
        }
    }
    changed.into_iter()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    const LENGTH: usize = 64 * PAGE as usize;

    /// Maps a file privately, reads all of it and changes some pages.
    struct Mapped(*mut u8);

    impl Mapped {
        fn of(file: &File, changes: &[(usize, u8)]) -> Self {
            // SAFETY: a new mapping of a file of that length; the writes are within it.
            unsafe {
                let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
                let at = libc::mmap(std::ptr::null_mut(), LENGTH, rights, kind, file.as_raw_fd(), 0);
                assert_ne!(at, libc::MAP_FAILED);
                let at = at.cast::<u8>();
                for place in (0..LENGTH).step_by(PAGE as usize) {
                    std::ptr::read_volatile(at.add(place));
                }
                for (place, byte) in changes {
                    std::ptr::write_volatile(at.add(*place), *byte);
                }
                Self(at)
            }
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: made by the mapping above.
            unsafe { libc::munmap(self.0.cast(), LENGTH) };
        }
    }

    #[test]
    fn a_copy_of_a_private_mapping_has_what_was_changed_and_the_rest_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (base, copy) = (dir.path().join("base"), dir.path().join("copy"));
        let mut content: Vec<u8> = (0..LENGTH).map(|at| (at / 999) as u8).collect();
        fs::write(&base, &content).unwrap();
        let memory = Memory::Saved(File::open(&base).unwrap());
        let changes = [(0, 200), (5 * PAGE as usize + 7, 0), (6 * PAGE as usize, 201), (LENGTH - 1, 202)];
        let _mapped = Mapped::of(memory.file(), &changes);
        memory.begin_copy(&copy).unwrap().finish(Pid::this()).unwrap();
        for (place, byte) in changes {
            content[place] = byte;
        }
        assert!(fs::read(&copy).unwrap() == content, "the copy is the memory");
        assert!(memory.begin_copy(&copy).is_err(), "nothing is overwritten");
    }

    #[test]
    fn a_copy_of_an_own_memory_has_what_was_written_and_takes_no_more_room() {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("copy");
        let memory = Memory::new(8).unwrap();
        memory.file().write_all_at(b"here", 3 << 20).unwrap();
        memory.file().write_all_at(&[0; 4096], 5 << 20).unwrap();
        memory.begin_copy(&copy).unwrap().finish(Pid::this()).unwrap();
        let content = fs::read(&copy).unwrap();
        assert_eq!((content.len(), &content[3 << 20..(3 << 20) + 4]), (8 << 20, &b"here"[..]));
        assert_eq!(content.iter().filter(|byte| **byte != 0).count(), 4);
        assert!(fs::metadata(&copy).unwrap().blocks() * 512 <= 2 * PIECE as u64);
    }

    #[test]
    fn a_memory_that_is_not_mapped_as_a_whole_is_no_ones() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let inode = file.metadata().unwrap().ino();
        let at = |range: &str, offset: &str| format!("{range} rw-p {offset} 08:01 {inode} /memory (deleted)\n");
        assert_eq!(mapped_at(&at("7f0000001000-7f0000003000", "00000000"), &file).unwrap(), 0x7f00_0000_1000);
        for maps in [at("7f0000001000-7f0000002000", "00000000"), at("1000-3000", "00001000"), "odd\n".into()] {
            assert!(mapped_at(&maps, &file).is_err(), "{maps}");
        }
    }

    #[test]
    fn a_saved_memory_of_another_size_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        assert!(Memory::saved(&path, 1).is_ok());
        assert!(Memory::saved(&path, 2).is_err());
    }
}
