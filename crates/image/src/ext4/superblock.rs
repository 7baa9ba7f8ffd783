//! The superblock: what kind of filesystem it is, its sizes, and what of it can't be read here.

use std::{fs::File, os::unix::fs::FileExt};

use super::{Ext4Error, array_at, crc32c, damaged, joined_long, u16_at, u32_at};

const AT: u64 = 1024;
const BYTES: usize = 1024;
const MAGIC: u16 = 0xEF53;
/// Where the superblock's own checksum stands, over all before it.
const CHECKSUM_AT: usize = 0x3FC;

const COMPRESSION: u32 = 0x1;
const FILE_TYPES: u32 = 0x2;
const NEEDS_RECOVERY: u32 = 0x4;
const JOURNAL_DEVICE: u32 = 0x8;
const META_BLOCK_GROUPS: u32 = 0x10;
const EXTENTS: u32 = 0x40;
const WIDE: u32 = 0x80;
const MULTIPLE_MOUNT_PROTECTION: u32 = 0x100;
const FLEXIBLE_GROUPS: u32 = 0x200;
const LARGE_XATTRS: u32 = 0x400;
const CHECKSUM_SEED: u32 = 0x2000;
const LARGE_FOLDERS: u32 = 0x4000;
const INLINE_DATA: u32 = 0x8000;
const ENCRYPTION: u32 = 0x1_0000;
const CASE_FOLDING: u32 = 0x2_0000;
/// What can be read, or doesn't matter to a reader.
const KNOWN: u32 = FILE_TYPES
    | EXTENTS
    | WIDE
    | MULTIPLE_MOUNT_PROTECTION
    | FLEXIBLE_GROUPS
    | LARGE_XATTRS
    | CHECKSUM_SEED
    | LARGE_FOLDERS
    | INLINE_DATA
    | ENCRYPTION
    | CASE_FOLDING;

const METADATA_CHECKSUMS: u32 = 0x400;

/// What the rest of the reader needs of it.
#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) block_size: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_bytes: u16,
    pub(super) groups_at: u64,
    pub(super) group_bytes: u16,
    pub(super) file_types: bool,
    pub(super) large_folders: bool,
    /// What metadata checksums begin with, where there are any.
    pub(super) checksum_seed: Option<u32>,
}

impl Superblock {
    pub(super) fn read(file: &File) -> Result<Self, Ext4Error> {
        let length = file.metadata()?.len();
        let mut bytes = [0; BYTES];
        if length < AT + BYTES as u64 {
            return Err(Ext4Error::Unsupported("the file is too short for an ext4 filesystem".into()));
        }
        file.read_exact_at(&mut bytes, AT)?;
        if u16_at(&bytes, 0x38)? != MAGIC {
            return Err(Ext4Error::Unsupported("this is no ext4 (or ext2, ext3) filesystem".into()));
        }
        let superblock = Self::parse(&bytes)?;
        if superblock.bytes() > length {
            return Err(Ext4Error::Unsupported(format!(
                "the file is cut short: the filesystem has {} bytes and the file {length}; upload it whole",
                superblock.bytes()
            )));
        }
        Ok(superblock)
    }

    fn parse(bytes: &[u8]) -> Result<Self, Ext4Error> {
        // The first revision has no features, and inodes of one size.
        let dynamic = u32_at(bytes, 0x4C)? > 0;
        let feature = |at| if dynamic { u32_at(bytes, at) } else { Ok(0) };
        let (incompatible, read_only) = (feature(0x60)?, feature(0x64)?);
        readable(incompatible)?;
        let log_block_size = u32_at(bytes, 0x18)?;
        if log_block_size > 6 {
            return damaged(format!("its blocks have 2^{} bytes", u64::from(log_block_size) + 10));
        }
        let block_size = 1024_u64 << log_block_size;
        let wide = incompatible & WIDE != 0;
        let superblock = Self {
            block_size,
            blocks: joined_long(if wide { u32_at(bytes, 0x150)? } else { 0 }, u32_at(bytes, 0x4)?),
            inodes: u32_at(bytes, 0x0)?,
            inodes_per_group: u32_at(bytes, 0x28)?,
            inode_bytes: if dynamic { u16_at(bytes, 0x58)? } else { 128 },
            // After the block that the superblock is in.
            groups_at: (AT / block_size + 1) * block_size,
            group_bytes: if wide { u16_at(bytes, 0xFE)? } else { 32 },
            file_types: incompatible & FILE_TYPES != 0,
            large_folders: incompatible & LARGE_FOLDERS != 0,
            checksum_seed: checksum_seed(bytes, incompatible, read_only)?,
        };
        superblock.is_sane()?;
        Ok(superblock)
    }

    fn is_sane(&self) -> Result<(), Ext4Error> {
        let inode_fits =
            self.inode_bytes.is_power_of_two() && (128..=self.block_size).contains(&self.inode_bytes.into());
        let sane = inode_fits
            && (32..=1024).contains(&self.group_bytes)
            && self.blocks > 1
            && self.blocks.checked_mul(self.block_size).is_some()
            && self.inodes_per_group > 0
            && u64::from(self.inodes_per_group) <= self.block_size * 8;
        if sane { Ok(()) } else { damaged("the sizes in its superblock make no sense") }
    }

    /// Its length.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size)
    }
}

fn readable(incompatible: u32) -> Result<(), Ext4Error> {
    let refuse = |why: String| Err(Ext4Error::Unsupported(why));
    if incompatible & JOURNAL_DEVICE != 0 {
        return refuse("this is the journal of an ext4 filesystem, without the filesystem".into());
    }
    if incompatible & NEEDS_RECOVERY != 0 {
        return refuse(
            "the filesystem was not unmounted cleanly, so its journal holds changes: unmount it, or run `e2fsck -fy` on it, and upload it again"
                .into(),
        );
    }
    for (flag, name) in [(COMPRESSION, "compression"), (META_BLOCK_GROUPS, "meta_bg")] {
        if incompatible & flag != 0 {
            return refuse(format!("the filesystem uses {name}, which isn't supported: make it anew without"));
        }
    }
    match incompatible & !KNOWN {
        0 => Ok(()),
        unknown => {
            refuse(format!("the filesystem uses features that aren't supported ({unknown:#x}): make it anew without"))
        }
    }
}

fn checksum_seed(bytes: &[u8], incompatible: u32, read_only: u32) -> Result<Option<u32>, Ext4Error> {
    if read_only & METADATA_CHECKSUMS == 0 {
        return Ok(None);
    }
    if crc32c(!0, &bytes[..CHECKSUM_AT]) != u32_at(bytes, CHECKSUM_AT)? {
        return damaged("its superblock's checksum is wrong");
    }
    if incompatible & CHECKSUM_SEED != 0 {
        return Ok(Some(u32_at(bytes, 0x270)?));
    }
    Ok(Some(crc32c(!0, &array_at::<16>(bytes, 0x68)?)))
}
