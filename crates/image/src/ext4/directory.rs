//! Folders: names and the inodes that they are for.
//!
//! Hashed folders are read like plain ones: the blocks of their index look like entries of nothing.

use super::{Ext4Error, Filesystem, Inode, damaged, inode::MAP_BYTES, u16_at, u32_at};

/// An inline folder begins with its parent's inode.
const INLINE_PARENT: usize = 4;
const HEADER: usize = 8;
const NAME_BYTES: usize = 255;

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name: 1 to 255 bytes without `/` and NUL, not `.` or `..`.
    pub name: Vec<u8>,
    /// What it names.
    pub inode: u32,
}

impl Filesystem {
    /// Calls `visit` for each name in a folder, `.` and `..` aside, in the order in which they are stored.
    ///
    /// # Errors
    /// When the folder is damaged or has a name that none may have, or `visit` fails.
    pub fn entries(
        &self,
        folder: &Inode,
        visit: &mut dyn FnMut(Entry) -> Result<(), Ext4Error>,
    ) -> Result<(), Ext4Error> {
        if folder.inline {
            self.part(&folder.map[INLINE_PARENT..MAP_BYTES], visit)?;
            return self.part(&folder.inline_rest()?, visit);
        }
        let block_size = self.block_size();
        let mut block = vec![0; usize::try_from(block_size).expect("at most 64 KiB")];
        self.runs(folder, &mut |run| {
            for offset in (0..run.length).step_by(block.len()) {
                self.read_at(run.from + offset, &mut block)?;
                self.part(&block, visit)?;
            }
            Ok(())
        })
    }

    /// A block, or as much of a folder as has one list of entries.
    fn part(&self, part: &[u8], visit: &mut dyn FnMut(Entry) -> Result<(), Ext4Error>) -> Result<(), Ext4Error> {
        let mut rest = part;
        while rest.len() >= HEADER {
            let (inode, length) = (u32_at(rest, 0)?, record_length(u16_at(rest, 4)?, rest.len()));
            // Without the feature of types, the name's length has two bytes.
            let name_length = if self.superblock.file_types { rest[6].into() } else { usize::from(u16_at(rest, 6)?) };
            if length < HEADER || length > rest.len() || (inode != 0 && HEADER + name_length > length) {
                return damaged("a folder's entries are broken");
            }
            if inode != 0 {
                let name = &rest[HEADER..HEADER + name_length];
                if name != b"." && name != b".." {
                    visit(Entry { name: checked(name)?, inode })?;
                }
            }
            rest = &rest[length..];
        }
        Ok(())
    }
}

/// Two values stand for the length of a block of 64 KiB, which has no room in the field.
fn record_length(field: u16, rest: usize) -> usize {
    match field {
        0 | 0xFFFF if rest >= 0xFFFF => rest,
        field => field.into(),
    }
}

fn checked(name: &[u8]) -> Result<Vec<u8>, Ext4Error> {
    if name.is_empty() || name.len() > NAME_BYTES || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return damaged("a folder has a name that no file can have");
    }
    Ok(name.to_vec())
}
