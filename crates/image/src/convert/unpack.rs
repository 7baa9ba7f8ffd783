//! From an ext4 filesystem to a folder: owners, modes, hard and symbolic links, pipes, capabilities, holes.
//!
//! Invariants: nothing is ever written through something that the filesystem planted: each name is made new, below
//! folders that were made here, and a name that exists already is a refusal. What is written is bounded by [`Limits`]
//! before it is written. Devices and sockets are left out: a VM has a `/dev` of its own. Times are left out: an image has
//! none.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry as Known},
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use nix::{
    sys::{stat::Mode, statvfs::statvfs},
    unistd::mkfifo,
};

use super::{Limits, Unpacked, Unreadable};
use crate::ext4::{Entry, Ext4Error, Filesystem, Inode, Kind, ROOT};

/// The longest path that programs can use, and what makes the image is one.
const PATH_BYTES: usize = 4095;
const CHUNK: usize = 1 << 20;
/// Free space is looked at each time that so many bytes were written.
const LOOK_EVERY: u64 = 64 << 20;
/// Progress is told each time that so many entries were made.
const TELL_EVERY: u64 = 500;

/// Writes all files of `filesystem` into the folder `root`, which is empty. Others see it below a path of so many bytes.
pub(super) fn unpack(
    filesystem: &Filesystem,
    root: &Path,
    before: usize,
    limits: &Limits,
    tell: &mut dyn FnMut(Unpacked),
) -> Result<Unpacked, Unreadable> {
    let mut work = Unpack {
        filesystem,
        limits,
        tell,
        done: Unpacked::default(),
        root_bytes: root.as_os_str().len(),
        path_bytes: PATH_BYTES.saturating_sub(before),
        folder_bytes: 0,
        unchecked: u64::MAX,
        linked: HashMap::new(),
        folders: HashSet::from([ROOT]),
        buffer: vec![0; CHUNK],
    };
    work.look_at_free_space(root, 0)?;
    let inode = filesystem.inode(ROOT)?;
    if inode.kind != Kind::Folder {
        return Err(Ext4Error::Damaged("its root is no folder".into()).into());
    }
    work.finish(root, &inode)?;
    let mut pending = vec![(root.to_owned(), inode)];
    while let Some((path, inode)) = pending.pop() {
        work.folder(&path, &inode, &mut pending)?;
    }
    // What mke2fs puts into every filesystem. One with something in it stays.
    let _ = fs::remove_dir(root.join("lost+found"));
    Ok(work.done)
}

struct Unpack<'a> {
    filesystem: &'a Filesystem,
    limits: &'a Limits,
    tell: &'a mut dyn FnMut(Unpacked),
    done: Unpacked,
    /// The length of the root folder's path here.
    root_bytes: usize,
    /// The longest path below it that is taken.
    path_bytes: usize,
    /// Bytes of the folders that were read.
    folder_bytes: u64,
    /// Bytes written since free space was looked at.
    unchecked: u64,
    /// Where files with several names were made, by inode.
    linked: HashMap<u32, PathBuf>,
    /// Folders that were met, by inode.
    folders: HashSet<u32>,
    buffer: Vec<u8>,
}

impl Unpack<'_> {
    /// Makes what a folder names; folders in it are made empty and added to `pending`.
    fn folder(&mut self, path: &Path, inode: &Inode, pending: &mut Vec<(PathBuf, Inode)>) -> Result<(), Unreadable> {
        // Folders have no holes and share no blocks. One that says so may name one block over and over.
        self.folder_bytes = self.folder_bytes.saturating_add(inode.size);
        if self.folder_bytes > self.filesystem.bytes() {
            return Err(Ext4Error::Damaged("its folders are larger than the filesystem".into()).into());
        }
        let (mut entries, room) = (Vec::new(), self.limits.entries - self.done.entries.min(self.limits.entries));
        self.filesystem.entries(inode, &mut |entry| {
            if entries.len() as u64 >= room {
                return Err(Ext4Error::Unsupported(format!(
                    "the filesystem has more than {} files, the most that are taken",
                    self.limits.entries
                )));
            }
            entries.push(entry);
            Ok(())
        })?;
        for entry in entries {
            self.entry(path, entry, pending)?;
        }
        Ok(())
    }

    fn entry(&mut self, folder: &Path, entry: Entry, pending: &mut Vec<(PathBuf, Inode)>) -> Result<(), Unreadable> {
        let path = folder.join(OsStr::from_bytes(&entry.name));
        // Below `/` the path has one separator, which is the root's own.
        let inside = path.as_os_str().len() - self.root_bytes + usize::from(self.root_bytes == 1);
        if inside > self.path_bytes {
            return Err(Unreadable::refused(format!(
                "a path has more than {} bytes, the longest that is taken: `{}...`",
                self.path_bytes,
                String::from_utf8_lossy(&entry.name[..entry.name.len().min(32)])
            )));
        }
        let inode = self.filesystem.inode(entry.inode)?;
        self.done.entries += 1;
        if self.done.entries.is_multiple_of(TELL_EVERY) {
            (self.tell)(self.done);
        }
        if inode.kind != Kind::Folder && inode.links > 1 {
            match self.linked.entry(inode.number) {
                Known::Occupied(first) => return made(fs::hard_link(first.get(), &path)),
                Known::Vacant(free) if !matches!(inode.kind, Kind::Device | Kind::Socket) => {
                    free.insert(path.clone());
                }
                Known::Vacant(_) => {}
            }
        }
        match inode.kind {
            Kind::Folder => {
                if !self.folders.insert(inode.number) {
                    return Err(Ext4Error::Damaged("a folder is in two places".into()).into());
                }
                made(DirBuilder::new().mode(0o700).create(&path))?;
                self.finish(&path, &inode)?;
                pending.push((path, inode));
                return Ok(());
            }
            Kind::File => self.file(&path, &inode)?,
            Kind::Link => {
                let target = self.filesystem.link_target(&inode)?;
                made(symlink(OsStr::from_bytes(&target), &path))?;
                return made(lchown(&path, Some(inode.uid), Some(inode.gid)));
            }
            Kind::Fifo => made(mkfifo(&path, Mode::from_bits_truncate(0o600)).map_err(io::Error::from))?,
            Kind::Device | Kind::Socket => return Ok(()),
        }
        self.finish(&path, &inode)
    }

    fn file(&mut self, path: &Path, inode: &Inode) -> Result<(), Unreadable> {
        // Holes count: where the image is read, they are as long as the rest.
        self.done.bytes = self.done.bytes.saturating_add(inode.size);
        if self.done.bytes > self.limits.bytes {
            return Err(Unreadable::refused(format!(
                "its files have more than {} bytes together, the most that are taken",
                self.limits.bytes
            )));
        }
        let mut file = made(OpenOptions::new().write(true).create_new(true).mode(0o600).open(path))?;
        made(file.set_len(inode.size))?;
        if let Some(content) = self.filesystem.inline_content(inode)? {
            return made(file.write_all_at(&content, 0));
        }
        let (filesystem, mut failed) = (self.filesystem, None);
        let copied = filesystem.runs(inode, &mut |run| {
            let (mut at, mut from) = (run.at, run.from);
            let end = run.at.saturating_add(run.length).min(inode.size);
            while at < end {
                let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                filesystem.read_at(from, &mut self.buffer[..length])?;
                if let Err(error) = self.write(&mut file, path, at, length) {
                    failed = Some(error);
                    return Err(Ext4Error::Unsupported("stopped".into()));
                }
                at += length as u64;
                from += length as u64;
            }
            Ok(())
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(copied?),
        }
    }

    /// Writes the beginning of the buffer.
    fn write(&mut self, file: &mut File, path: &Path, at: u64, length: usize) -> Result<(), Unreadable> {
        self.look_at_free_space(path, length as u64)?;
        made(file.write_all_at(&self.buffer[..length], at))
    }

    fn look_at_free_space(&mut self, path: &Path, about_to_write: u64) -> Result<(), Unreadable> {
        self.unchecked = self.unchecked.saturating_add(about_to_write);
        if self.unchecked < LOOK_EVERY {
            return Ok(());
        }
        self.unchecked = 0;
        let disk = statvfs(path).map_err(|error| Unreadable::Host(error.to_string()))?;
        let free = disk.blocks_available().saturating_mul(disk.fragment_size());
        if free < self.limits.leave_free_bytes { Err(Unreadable::DiskFull) } else { Ok(()) }
    }

    /// Owner, mode and attributes, in the order in which the one doesn't undo the other.
    fn finish(&self, path: &Path, inode: &Inode) -> Result<(), Unreadable> {
        made(chown(path, Some(inode.uid), Some(inode.gid)))?;
        made(fs::set_permissions(path, Permissions::from_mode(inode.mode)))?;
        if inode.kind == Kind::Fifo {
            return Ok(());
        }
        for xattr in self.filesystem.xattrs(inode)? {
            let name = OsStr::from_bytes(&xattr.name);
            match rustix::fs::lsetxattr(path, name, &xattr.value, rustix::fs::XattrFlags::CREATE) {
                // Two of one name, or a capability that is none.
                Err(rustix::io::Errno::EXIST | rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {
                    return Err(Ext4Error::Damaged("an extended attribute makes no sense".into()).into());
                }
                set => made(set.map_err(io::Error::from))?,
            }
        }
        Ok(())
    }
}

/// What the host's refusals mean.
fn made<T>(done: io::Result<T>) -> Result<T, Unreadable> {
    done.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Ext4Error::Damaged("a folder has the same name twice".into()).into(),
        io::ErrorKind::TooManyLinks => Unreadable::refused("a file has more names than the host's filesystem can keep"),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Unreadable::DiskFull,
        io::ErrorKind::FileTooLarge => Unreadable::refused("a file in it is larger than what is taken"),
        _ => Unreadable::Host(error.to_string()),
    })
}
