//! Extended attributes: in the inode's slot, and in one block beside it.

use super::{Ext4Error, Filesystem, Inode, damaged, u16_at, u32_at};

const MAGIC: u32 = 0xEA02_0000;
const HEADER: usize = 16;
/// The header of a block of attributes.
const BLOCK_HEADER: usize = 32;
/// The index of names that begin with `system.`, of which inline data is one.
const SYSTEM: u8 = 7;

/// An extended attribute that means the same wherever the file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Its whole name.
    pub name: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// An attribute as it is stored.
struct Stored {
    prefix: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Filesystem {
    /// The attributes of a file that are kept: `user.*` and `security.capability`. Others are left out: labels, access
    /// lists and the marks of overlays mean something on the system where they were set, and could do harm on another.
    ///
    /// # Errors
    /// When they are damaged, or a value is kept in an inode of its own.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, Ext4Error> {
        let mut stored = inode.xattrs()?;
        if inode.xattr_block != 0 {
            let block = self.block(inode.xattr_block)?;
            if u32_at(&block, 0)? != MAGIC {
                return damaged(format!("the attributes of inode {} are none", inode.number));
            }
            stored.extend(list(&block[BLOCK_HEADER..], &block)?);
        }
        Ok(stored.into_iter().filter_map(kept).collect())
    }
}

impl Inode {
    fn xattrs(&self) -> Result<Vec<Stored>, Ext4Error> {
        match self.tail.len() >= 4 && u32_at(&self.tail, 0)? == MAGIC {
            true => list(&self.tail[4..], &self.tail[4..]),
            false => Ok(Vec::new()),
        }
    }

    /// What inline data has beyond the block map.
    pub(super) fn inline_rest(&self) -> Result<Vec<u8>, Ext4Error> {
        let found = self.xattrs()?.into_iter().find(|stored| stored.prefix == SYSTEM && stored.name == b"data");
        Ok(found.map(|stored| stored.value).unwrap_or_default())
    }
}

/// A list of entries, whose values stand at offsets into `values`.
fn list(mut entries: &[u8], values: &[u8]) -> Result<Vec<Stored>, Ext4Error> {
    let mut found = Vec::new();
    // Ends with a word of zeros, or with the space.
    while entries.len() >= HEADER && u32_at(entries, 0)? != 0 {
        let (length, prefix) = (usize::from(entries[0]), entries[1]);
        let (at, size) = (usize::from(u16_at(entries, 2)?), u32_at(entries, 8)? as usize);
        if u32_at(entries, 4)? != 0 {
            let why = "the filesystem keeps values of extended attributes in inodes (ea_inode), which isn't supported";
            return Err(Ext4Error::Unsupported(why.into()));
        }
        let name = entries.get(HEADER..HEADER + length);
        let value = at.checked_add(size).and_then(|end| values.get(at..end));
        let (Some(name), Some(value)) = (name, value) else { return damaged("extended attributes are broken") };
        found.push(Stored { prefix, name: name.to_vec(), value: value.to_vec() });
        entries = entries.get((HEADER + length).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

fn kept(stored: Stored) -> Option<Xattr> {
    let prefix: &[u8] = match stored.prefix {
        1 => b"user.",
        6 if stored.name == b"capability" => b"security.",
        _ => return None,
    };
    let name = [prefix, &stored.name].concat();
    (!name.contains(&0)).then_some(Xattr { name, value: stored.value })
}
