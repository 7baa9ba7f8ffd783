//! Writes an EROFS file from a tree, without a folder in between: what strangers name never becomes a path of the host.
//!
//! What is written is the plain part of the format, which every kernel since 5.4 reads: extended inodes with times and
//! inline attributes, nothing compressed, nothing chunked (Linux, `fs/erofs/erofs_fs.h`).

use std::{
    fs::File,
    io::{self, BufWriter, Seek, SeekFrom, Write},
};

use super::{
    UUID,
    layout::{
        BLOCK, DIRENT, INODE, Layout, Leads, Placed, SLOT, TooLarge, XATTR_HEADER, prefix, with_dots, xattr_bytes,
    },
    tree::{Content, Kind, Names, Tree, Xattr},
};

const MAGIC: u32 = 0xE0F5_E1E2;
/// Where the superblock is in the first block.
const SUPERBLOCK: usize = 1024;
const BLOCK_BITS: u8 = 12;
/// Inodes have times of their own.
const COMPAT_MTIME: u32 = 2;
/// `i_format`: an extended inode, its content in blocks; and the same with the end of it behind the inode.
const PLAIN: u16 = 1;
const INLINE: u16 = 1 | 2 << 1;
/// Zeros that are written rather than left out.
const SMALL_HOLE: u64 = 64 << 10;
/// 9999-12-31: no time is later.
const LATEST: i64 = 253_402_300_799;

/// An image that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("writing the image")]
pub(crate) struct WriteError(#[from] pub(crate) io::Error);

/// Where everything in an image goes.
pub(crate) struct Plan(Layout);

impl Plan {
    /// Bytes of the image.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.0.blocks) * BLOCK
    }

    /// How many files, folders and links it has, and bytes of the files.
    pub(crate) fn files(&self, tree: &Tree) -> (u64, u64) {
        let bytes = self.0.placed.iter().map(|one| match &tree.node(one.node).kind {
            Kind::File(content) => content.size,
            Kind::Folder(_) | Kind::Link(_) | Kind::Fifo => 0,
        });
        (self.0.placed.len() as u64, bytes.sum())
    }
}

/// Plans the image of a tree.
pub(crate) fn plan(tree: &Tree) -> Result<Plan, TooLarge> {
    Layout::of(tree).map(Plan)
}

/// Where an image is written to, from its beginning to its end.
pub(crate) struct Output<'a> {
    file: BufWriter<&'a File>,
    at: u64,
}

impl Output<'_> {
    /// Writes bytes.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    /// So many zeros; many of them are left out of the file.
    pub(crate) fn zeros(&mut self, count: u64) -> io::Result<()> {
        if count > SMALL_HOLE {
            self.at += count;
            self.file.seek(SeekFrom::Start(self.at))?;
            return Ok(());
        }
        let mut left = usize::try_from(count).unwrap_or(0);
        while left > 0 {
            let some = left.min(BLOCK as usize);
            self.bytes(&[0; BLOCK as usize][..some])?;
            left -= some;
        }
        Ok(())
    }

    fn to(&mut self, at: u64) -> io::Result<()> {
        self.zeros(at.saturating_sub(self.at))
    }
}

/// Writes the image of `tree` to `file`, which is empty; `fetch` writes the content that it is asked for, neither more nor
/// less.
pub(crate) fn write(
    tree: &Tree,
    Plan(layout): &Plan,
    file: &File,
    fetch: &mut dyn FnMut(&Content, &mut Output<'_>) -> io::Result<()>,
) -> Result<(), WriteError> {
    let mut out = Output { file: BufWriter::with_capacity(1 << 20, file), at: 0 };
    out.bytes(&first_block(layout))?;
    for (index, one) in layout.placed.iter().enumerate() {
        out.to(one.at)?;
        inode(tree, layout, one, index, &mut out)?;
    }
    out.to(layout.inodes_end)?;
    for one in layout.placed.iter().filter(|one| one.size > one.inlined) {
        out.to(u64::from(one.block) * BLOCK)?;
        let end = out.at + one.size - one.inlined;
        match &tree.node(one.node).kind {
            Kind::Folder(names) => {
                let blocks = folder(tree, names, one, layout);
                let beside = if one.inlined > 0 { &blocks[..blocks.len() - 1] } else { &blocks[..] };
                beside.iter().try_for_each(|block| out.bytes(block))?;
            }
            Kind::Link(target) => out.bytes(target)?,
            Kind::File(content) => fetch(content, &mut out)?,
            Kind::Fifo => {}
        }
        if out.at != end {
            return Err(io::Error::other("a file's content is not as long as its inode says").into());
        }
    }
    out.file.flush()?;
    drop(out);
    Ok(file.set_len(u64::from(layout.blocks) * BLOCK)?)
}

fn first_block(layout: &Layout) -> Vec<u8> {
    let mut block = vec![0; SUPERBLOCK];
    let root = u16::try_from(layout.number(Tree::ROOT)).expect("the root is the first inode");
    block.extend(MAGIC.to_le_bytes());
    block.extend([0; 4]);
    block.extend(COMPAT_MTIME.to_le_bytes());
    block.extend([BLOCK_BITS, 0]);
    block.extend(root.to_le_bytes());
    block.extend((layout.placed.len() as u64).to_le_bytes());
    block.extend([0; 12]);
    block.extend(layout.blocks.to_le_bytes());
    // Inodes and shared attributes are counted from the beginning of the file.
    block.extend([0; 8]);
    block.extend(UUID_BYTES);
    block.resize(BLOCK as usize, 0);
    block
}

/// [`UUID`] as the superblock has it.
const UUID_BYTES: [u8; 16] = {
    let (text, mut bytes, mut from, mut to) = (UUID.as_bytes(), [0; 16], 0, 0);
    while to < bytes.len() {
        if text[from] == b'-' {
            from += 1;
        }
        bytes[to] = digit(text[from]) << 4 | digit(text[from + 1]);
        (from, to) = (from + 2, to + 1);
    }
    bytes
};

const fn digit(character: u8) -> u8 {
    if character < b'a' { character - b'0' } else { character - b'a' + 10 }
}

fn inode(tree: &Tree, layout: &Layout, one: &Placed, index: usize, out: &mut Output<'_>) -> io::Result<()> {
    const IS_FOLDER: u16 = 0o040_000;
    const IS_FILE: u16 = 0o100_000;
    const IS_LINK: u16 = 0o120_000;
    const IS_FIFO: u16 = 0o010_000;
    let node = tree.node(one.node);
    let (kind, tail) = match &node.kind {
        Kind::Folder(names) if one.inlined > 0 => (IS_FOLDER, folder(tree, names, one, layout).pop()),
        Kind::Folder(_) => (IS_FOLDER, None),
        Kind::File(_) => (IS_FILE, None),
        Kind::Link(target) => (IS_LINK, (one.inlined > 0).then(|| target.to_vec())),
        Kind::Fifo => (IS_FIFO, None),
    };
    let xattrs = xattr_bytes(&node.meta.xattrs);
    // The count of words, of which the header counts as one however long it is.
    let xattr_words = if xattrs == 0 { 0 } else { 1 + (xattrs - XATTR_HEADER) / 4 };
    let mut bytes = Vec::with_capacity(INODE as usize);
    bytes.extend(if one.inlined > 0 { INLINE } else { PLAIN }.to_le_bytes());
    bytes.extend(u16::try_from(xattr_words).map_err(io::Error::other)?.to_le_bytes());
    bytes.extend((kind | (node.meta.mode & 0o7777)).to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(one.size.to_le_bytes());
    bytes.extend(one.block.to_le_bytes());
    bytes.extend(u32::try_from(index + 1).map_err(io::Error::other)?.to_le_bytes());
    bytes.extend(node.meta.uid.to_le_bytes());
    bytes.extend(node.meta.gid.to_le_bytes());
    bytes.extend(node.meta.mtime.clamp(0, LATEST).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(one.links.to_le_bytes());
    bytes.resize(INODE as usize, 0);
    add_xattrs(&node.meta.xattrs, &mut bytes);
    bytes.extend(tail.unwrap_or_default());
    debug_assert_eq!(one.at % SLOT, 0);
    out.bytes(&bytes)
}

fn add_xattrs(xattrs: &[Xattr], bytes: &mut Vec<u8>) {
    if xattrs.is_empty() {
        return;
    }
    bytes.extend([0; XATTR_HEADER as usize]);
    for xattr in xattrs {
        let (index, name) = prefix(&xattr.name);
        bytes.extend([u8::try_from(name.len()).expect("names are below 256 bytes"), index]);
        bytes.extend(u16::try_from(xattr.value.len()).expect("values fit a block").to_le_bytes());
        bytes.extend(name);
        bytes.extend(&xattr.value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
}

/// A folder's blocks, the last one as long as it must be.
fn folder(tree: &Tree, names: &Names, placed: &Placed, layout: &Layout) -> Vec<Vec<u8>> {
    let (mut blocks, mut some, mut used) = (Vec::new(), Vec::new(), 0);
    for (name, leads) in with_dots(names) {
        let more = DIRENT + name.len() as u64;
        if used + more > BLOCK {
            let mut block = block_of(tree, &some, layout, placed);
            block.resize(BLOCK as usize, 0);
            blocks.push(block);
            (some, used) = (Vec::new(), 0);
        }
        used += more;
        some.push((name, leads));
    }
    blocks.push(block_of(tree, &some, layout, placed));
    blocks
}

fn block_of(tree: &Tree, entries: &[(&[u8], Leads)], layout: &Layout, placed: &Placed) -> Vec<u8> {
    let mut name_at = entries.len() * DIRENT as usize;
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    for (name, leads) in entries {
        let node = match leads {
            Leads::Here => placed.node,
            Leads::Up => placed.parent,
            Leads::To(node) => *node,
        };
        let kind = match tree.node(node).kind {
            Kind::File(_) => 1,
            Kind::Folder(_) => 2,
            Kind::Fifo => 5,
            Kind::Link(_) => 7,
        };
        bytes.extend(layout.number(node).to_le_bytes());
        bytes.extend(u16::try_from(name_at).expect("it is within a block").to_le_bytes());
        bytes.extend([kind, 0]);
        name_at += name.len();
    }
    entries.iter().for_each(|(name, _)| bytes.extend(*name));
    bytes
}
