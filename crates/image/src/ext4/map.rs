//! Where a file's content is: trees of extents, the block pointers of ext2 and ext3, or in the inode itself.
//!
//! Invariant: runs come in ascending order and don't overlap, which is also what keeps a tree that points at itself from
//! being walked for ever: its second visit would not ascend.

use super::{Ext4Error, Filesystem, Inode, damaged, inode::MAP_BYTES, joined_long, u16_at, u32_at};

const EXTENT_MAGIC: u16 = 0xF30A;
const EXTENT_DEPTH: u16 = 5;
/// Lengths beyond this are of extents that are reserved and not written: they read as zeros.
const WRITTEN: u16 = 0x8000;
/// Pointers in the inode itself, before those to blocks of pointers.
const DIRECT: usize = 12;

/// Content that lies in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where in the file it begins, in bytes.
    pub at: u64,
    /// Where in the filesystem it is, in bytes.
    pub from: u64,
    /// How many bytes; the last run may reach beyond the file's end.
    pub length: u64,
}

/// What is done with each run.
type Visit<'a> = &'a mut dyn FnMut(Run) -> Result<(), Ext4Error>;

/// A walk over one file's runs, in blocks.
struct Walk<'a> {
    filesystem: &'a Filesystem,
    /// The first block that may come next.
    next: u64,
    /// The first block beyond the file's end.
    end: u64,
    visit: Visit<'a>,
}

impl Filesystem {
    /// Calls `visit` for each piece of a file's content that lies on blocks, in ascending order; what no run covers is zeros.
    /// Not for files with [`Filesystem::inline_content`].
    ///
    /// # Errors
    /// When the map is damaged, or `visit` fails.
    pub fn runs(&self, inode: &Inode, visit: Visit<'_>) -> Result<(), Ext4Error> {
        let end = inode.size.div_ceil(self.block_size());
        let mut walk = Walk { filesystem: self, next: 0, end, visit };
        if inode.extents { walk.extents(&inode.map, None) } else { walk.pointers(&inode.map) }
    }

    /// The content that an inode holds itself, if that is where it is.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn inline_content(&self, inode: &Inode) -> Result<Option<Vec<u8>>, Ext4Error> {
        if !inode.inline {
            return Ok(None);
        }
        let mut content = inode.map.to_vec();
        content.extend(inode.inline_rest()?);
        let length = usize::try_from(inode.size).ok().filter(|length| *length <= content.len());
        let Some(length) = length else { return damaged(format!("inode {} holds less than its size", inode.number)) };
        content.truncate(length);
        Ok(Some(content))
    }

    /// The whole content, for what is known to be small.
    pub(super) fn content(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        if let Some(content) = self.inline_content(inode)? {
            return Ok(content);
        }
        let mut content = vec![0; usize::try_from(inode.size).unwrap_or(usize::MAX)];
        self.runs(inode, &mut |run| {
            let at = usize::try_from(run.at).unwrap_or(usize::MAX);
            let end = usize::try_from(run.at.saturating_add(run.length)).unwrap_or(usize::MAX).min(content.len());
            match content.get_mut(at..end) {
                Some(part) => self.read_at(run.from, part),
                None => Ok(()),
            }
        })?;
        Ok(content)
    }
}

impl Walk<'_> {
    /// A node of a tree of extents. `expected` is its depth; the root says its own.
    fn extents(&mut self, node: &[u8], expected: Option<u16>) -> Result<(), Ext4Error> {
        let (entries, depth) = (usize::from(u16_at(node, 2)?), u16_at(node, 6)?);
        let is_root = expected.is_none();
        let sane = u16_at(node, 0)? == EXTENT_MAGIC
            && depth <= EXTENT_DEPTH
            && expected.is_none_or(|expected| expected == depth)
            && (entries > 0 || is_root)
            && 12 + entries * 12 <= node.len();
        if !sane {
            return damaged("a tree of extents is broken");
        }
        for entry in node[12..].chunks_exact(12).take(entries) {
            if self.next >= self.end {
                return Ok(());
            }
            if depth == 0 {
                self.extent(entry)?;
            } else {
                let child = joined_long(u16_at(entry, 8)?.into(), u32_at(entry, 4)?);
                self.extents(&self.filesystem.block(child)?, Some(depth - 1))?;
            }
        }
        Ok(())
    }

    fn extent(&mut self, entry: &[u8]) -> Result<(), Ext4Error> {
        let (block, length) = (u64::from(u32_at(entry, 0)?), u16_at(entry, 4)?);
        let start = joined_long(u16_at(entry, 6)?.into(), u32_at(entry, 8)?);
        let written = length <= WRITTEN;
        let length = u64::from(if written { length } else { length - WRITTEN });
        if length == 0 {
            return damaged("an extent has no length");
        }
        self.run(block, start, length, written)
    }

    /// The pointers of an inode of ext2 or ext3.
    fn pointers(&mut self, map: &[u8; MAP_BYTES]) -> Result<(), Ext4Error> {
        let per_block = self.filesystem.block_size() / 4;
        let mut at = 0;
        for (slot, pointer) in map.chunks_exact(4).enumerate() {
            let level = u32::try_from(slot.saturating_sub(DIRECT - 1)).expect("at most 3");
            self.pointer(u32_at(pointer, 0)?, at, level)?;
            at += per_block.pow(level);
        }
        Ok(())
    }

    /// What one pointer leads to: `level` blocks of pointers, then content, from block `at` of the file.
    fn pointer(&mut self, pointer: u32, at: u64, level: u32) -> Result<(), Ext4Error> {
        if pointer == 0 || at >= self.end {
            return Ok(());
        }
        if level == 0 {
            return self.run(at, pointer.into(), 1, true);
        }
        let block = self.filesystem.block(pointer.into())?;
        let covered = (self.filesystem.block_size() / 4).pow(level - 1);
        for (slot, pointer) in (0_u64..).zip(block.chunks_exact(4)) {
            self.pointer(u32_at(pointer, 0)?, at + slot * covered, level - 1)?;
        }
        Ok(())
    }

    fn run(&mut self, block: u64, start: u64, length: u64, written: bool) -> Result<(), Ext4Error> {
        let superblock = &self.filesystem.superblock;
        if block < self.next {
            return damaged("the parts of a file are out of order");
        }
        if start == 0 || start.checked_add(length).is_none_or(|end| end > superblock.blocks) {
            return damaged("a file lies beyond the filesystem's end");
        }
        self.next = block + length;
        let length = length.min(self.end.saturating_sub(block));
        if !written || length == 0 {
            return Ok(());
        }
        let size = superblock.block_size;
        (self.visit)(Run { at: block * size, from: start * size, length: length * size })
    }
}
