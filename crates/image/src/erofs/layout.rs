//! Where each inode, folder and file of a tree goes in an EROFS file, before a byte of it is written.
//!
//! Invariants: the order is that of the tree's names, so the same tree always gives the same bytes. An inode with its
//! attributes and what is inlined behind it lies in one block. Files' contents are never inlined: they begin at a block,
//! so that they can be mapped.

use super::tree::{Kind, Names, NodeId, Tree, Xattr};

/// The unit of everything, in bytes.
pub(super) const BLOCK: u64 = 4096;
/// Inodes are numbered by where they are, in steps of this.
pub(super) const SLOT: u64 = 32;
/// Bytes of an inode in its extended form.
pub(super) const INODE: u64 = 64;
/// Bytes of a folder's entry before its name.
pub(super) const DIRENT: u64 = 12;
/// Bytes before the first attribute.
pub(super) const XATTR_HEADER: u64 = 12;
/// The most that a node's attributes may take here, so that they fit a block beside the inode.
pub(crate) const XATTR_BYTES: u64 = BLOCK - INODE;

/// More than the format can hold.
#[derive(Debug, thiserror::Error)]
#[error("the image's files are more than an image can hold")]
pub(crate) struct TooLarge;

/// Where a node is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) node: NodeId,
    /// The folder that it is in; of the root, the root.
    pub(super) parent: NodeId,
    /// Where its inode begins.
    pub(super) at: u64,
    /// Bytes of its content.
    pub(super) size: u64,
    /// Bytes of the content's end that are behind the inode.
    pub(super) inlined: u64,
    /// The first block of the content; of what is wholly inlined, or empty, none.
    pub(super) block: u32,
    /// Names.
    pub(super) links: u32,
}

/// Where everything is.
pub(super) struct Layout {
    /// In the order in which they are written.
    pub(super) placed: Vec<Placed>,
    /// By node: the inode's number, for those in the tree.
    numbers: Vec<u64>,
    /// Bytes from the beginning to the end of the last inode's block.
    pub(super) inodes_end: u64,
    /// Blocks of it all.
    pub(super) blocks: u32,
}

impl Layout {
    /// Plans the file of that tree.
    pub(super) fn of(tree: &Tree) -> Result<Self, TooLarge> {
        let mut placed = visit(tree);
        let mut at = BLOCK;
        let mut numbers = vec![0; tree.len()];
        for one in &mut placed {
            let node = tree.node(one.node);
            let fixed = INODE + xattr_bytes(&node.meta.xattrs);
            (one.size, one.inlined) = match &node.kind {
                Kind::Folder(names) => folder_bytes(names),
                Kind::Link(target) => (target.len() as u64, target.len() as u64),
                Kind::File(content) => (content.size, 0),
                Kind::Fifo => (0, 0),
            };
            if fixed + one.inlined > BLOCK {
                one.inlined = 0;
            }
            let whole = fixed + one.inlined;
            if at % BLOCK + whole > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            one.at = at;
            numbers[one.node.index()] = at / SLOT;
            at = (at + whole).next_multiple_of(SLOT);
        }
        let inodes_end = at.next_multiple_of(BLOCK);
        let mut next = inodes_end / BLOCK;
        for one in &mut placed {
            let beside = one.size - one.inlined;
            if beside > 0 {
                one.block = u32::try_from(next).map_err(|_| TooLarge)?;
                next = next.checked_add(beside.div_ceil(BLOCK)).ok_or(TooLarge)?;
            }
        }
        Ok(Self { placed, numbers, inodes_end, blocks: u32::try_from(next).map_err(|_| TooLarge)? })
    }

    /// The number of a node's inode.
    pub(super) fn number(&self, node: NodeId) -> u64 {
        self.numbers[node.index()]
    }
}

/// Every node that has a name, folders before what they hold, with its names counted.
fn visit(tree: &Tree) -> Vec<Placed> {
    const UNSEEN: usize = usize::MAX;
    let mut order: Vec<Placed> = Vec::new();
    let mut seen = vec![UNSEEN; tree.len()];
    let mut pending = vec![(Tree::ROOT, Tree::ROOT)];
    while let Some((node, parent)) = pending.pop() {
        if let Some(known) = order.get_mut(seen[node.index()]) {
            known.links += 1;
            continue;
        }
        seen[node.index()] = order.len();
        let mut links = 1;
        if let Some(names) = tree.names(node) {
            // Its own name, its `.`, and the `..` of each folder in it.
            links = 2;
            for child in names.values().rev() {
                links += u32::from(tree.names(*child).is_some());
                pending.push((*child, node));
            }
        }
        order.push(Placed { node, parent, at: 0, size: 0, inlined: 0, block: 0, links });
    }
    order
}

/// Bytes of a folder, and of its last block.
fn folder_bytes(names: &Names) -> (u64, u64) {
    let (mut full, mut used) = (0, 0);
    for name in with_dots(names).map(|(name, _)| name) {
        let more = DIRENT + name.len() as u64;
        if used + more > BLOCK {
            (full, used) = (full + BLOCK, 0);
        }
        used += more;
    }
    (full + used, used)
}

/// What a name in a folder leads to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Leads {
    Here,
    Up,
    To(NodeId),
}

/// The folder's names and the two that every folder has, in the order of their bytes.
pub(super) fn with_dots(names: &Names) -> impl Iterator<Item = (&[u8], Leads)> {
    let mut dots = [(&b"."[..], Leads::Here), (&b".."[..], Leads::Up)].into_iter().peekable();
    let mut own = names.iter().map(|(name, node)| (&**name, Leads::To(*node))).peekable();
    std::iter::from_fn(move || {
        let dot_first = match (dots.peek(), own.peek()) {
            (Some((dot, _)), Some((name, _))) => dot < name,
            (dot, _) => dot.is_some(),
        };
        if dot_first { dots.next() } else { own.next() }
    })
}

/// Bytes that attributes take behind an inode.
pub(crate) fn xattr_bytes(xattrs: &[Xattr]) -> u64 {
    let bytes = |xattr: &Xattr| (4 + prefix(&xattr.name).1.len() + xattr.value.len()).next_multiple_of(4) as u64;
    if xattrs.is_empty() { 0 } else { XATTR_HEADER + xattrs.iter().map(bytes).sum::<u64>() }
}

/// How an attribute's name is written: a number for how it begins, and the rest.
pub(super) fn prefix(name: &[u8]) -> (u8, &[u8]) {
    if let Some(rest) = name.strip_prefix(b"user.") {
        (1, rest)
    } else if let Some(rest) = name.strip_prefix(b"security.") {
        (6, rest)
    } else {
        (0, name)
    }
}
