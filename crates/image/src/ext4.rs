//! A reader of ext2, ext3 and ext4, for filesystems that strangers made.
//!
//! Invariants: it only reads; whatever the bytes are, an operation ends in a value or an [`Ext4Error`], after work that is
//! bounded by the file's own length and the sizes that the caller allows; it has no `unsafe`. It doesn't follow links,
//! replay journals, decrypt or repair: what would need that is refused by name.
//!
//! Written here because the readers that exist as crates show neither inode numbers (hard links), nor extended attributes
//! (capabilities of programs), nor holes, and one of them takes extents only.

mod directory;
mod inode;
mod map;
mod superblock;
mod xattr;

use std::{fs::File, io, os::unix::fs::FileExt};

use self::superblock::Superblock;
pub use self::{
    directory::Entry,
    inode::{Inode, Kind},
    map::Run,
    xattr::Xattr,
};

/// The root folder's inode.
pub const ROOT: u32 = 2;

/// The file is no filesystem that can be read.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// It is something else, or uses what isn't supported; says what, and what to do.
    #[error("{0}")]
    Unsupported(String),
    /// Its structures contradict each other; says which.
    #[error("the filesystem is damaged: {0}; `e2fsck -fy` may repair it")]
    Damaged(String),
    /// The file itself can't be read.
    #[error("reading the upload")]
    Io(#[from] io::Error),
}

fn damaged<T>(what: impl Into<String>) -> Result<T, Ext4Error> {
    Err(Ext4Error::Damaged(what.into()))
}

/// An open filesystem.
#[derive(Debug)]
pub struct Filesystem {
    file: File,
    superblock: Superblock,
}

impl Filesystem {
    /// Reads the superblock.
    ///
    /// # Errors
    /// When it isn't ext2, ext3 or ext4, is cut short, wasn't unmounted cleanly or needs what this reader doesn't have.
    pub fn open(file: File) -> Result<Self, Ext4Error> {
        let superblock = Superblock::read(&file)?;
        Ok(Self { file, superblock })
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.superblock.block_size
    }

    /// Bytes of the whole filesystem.
    pub fn bytes(&self) -> u64 {
        self.superblock.bytes()
    }

    /// Fills `buffer` from a place in the filesystem's own bytes.
    ///
    /// # Errors
    /// When that is beyond its end, or the file can't be read.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Ext4Error> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.superblock.bytes()) {
            return damaged(format!("something is said to be at byte {offset}, beyond its end"));
        }
        Ok(self.file.read_exact_at(buffer, offset)?)
    }

    fn block(&self, number: u64) -> Result<Vec<u8>, Ext4Error> {
        if number == 0 || number >= self.superblock.blocks {
            return damaged(format!("there is no block {number}"));
        }
        let mut block = vec![0; usize::try_from(self.block_size()).expect("at most 64 KiB")];
        self.read_at(number * self.block_size(), &mut block)?;
        Ok(block)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Ext4Error> {
    array_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Ext4Error> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Ext4Error> {
    let found = at.checked_add(N).and_then(|end| bytes.get(at..end)).and_then(|part| part.try_into().ok());
    found.ok_or_else(|| Ext4Error::Damaged(format!("a structure ends before its byte {at}")))
}

fn joined(high: u16, low: u16) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

fn joined_long(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// CRC-32C, continued from `crc`, without the final inversion: as ext4 uses it.
fn crc32c(mut crc: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    for byte in bytes {
        crc = TABLE[usize::from(crc.to_le_bytes()[0] ^ byte)] ^ (crc >> 8);
    }
    crc
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let (mut value, mut bit) = (index as u32, 0);
        while bit < 8 {
            value = if value & 1 == 1 { 0x82F6_3B78 ^ (value >> 1) } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc_32c() {
        // The check value of the algorithm's catalogue entry, whose final inversion ext4 leaves out.
        assert_eq!(!crc32c(!0, b"123456789"), 0xE306_9283);
    }
}
