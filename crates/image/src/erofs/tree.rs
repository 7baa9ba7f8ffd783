//! A filesystem's tree in memory: names, owners, modes, links, attributes; the contents of files stay where they are.
//!
//! Invariant: it is a tree of folders. A node that is no folder may have several names (hard links), a folder has one; so
//! nothing can lead in a circle. Nothing in here is a path of the host.

use std::collections::BTreeMap;

/// Names a node of one tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Xattr {
    /// Its whole name.
    pub(crate) name: Vec<u8>,
    /// Its value.
    pub(crate) value: Vec<u8>,
}

/// What every node has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permissions, with the bits for set-user-id, set-group-id and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: i64,
    pub(crate) xattrs: Vec<Xattr>,
}

/// Where a file's bytes are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Content {
    /// Which of the sources.
    pub(crate) source: u32,
    /// Where they begin in it.
    pub(crate) at: u64,
    /// The file's length.
    pub(crate) size: u64,
    /// The parts of the file that the source has, one behind the other there; the rest is zeros. `None`: all of it.
    pub(crate) parts: Option<Box<[Part]>>,
}

/// A part of a file that isn't a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// Where it is in the file.
    pub(crate) at: u64,
    /// Its bytes.
    pub(crate) length: u64,
}

/// What a folder holds, by name; in the order of the names' bytes, as the filesystem wants it.
pub(crate) type Names = BTreeMap<Box<[u8]>, NodeId>;

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Folder(Names),
    File(Content),
    Link(Box<[u8]>),
    Fifo,
}

/// A node.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// A tree with a root.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// The root of every tree.
    pub(crate) const ROOT: NodeId = NodeId(0);

    /// An empty one.
    pub(crate) fn new() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        Self { nodes: vec![Node { meta, kind: Kind::Folder(Names::new()) }] }
    }

    /// How many nodes were ever made.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A new node, which has no name yet. `None` when there are more than a tree can have.
    pub(crate) fn add(&mut self, node: Node) -> Option<NodeId> {
        let id = u32::try_from(self.nodes.len()).ok()?;
        self.nodes.push(node);
        Some(NodeId(id))
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// What a folder holds; `None` for anything else.
    pub(crate) fn names(&self, id: NodeId) -> Option<&Names> {
        match &self.node(id).kind {
            Kind::Folder(names) => Some(names),
            Kind::File(_) | Kind::Link(_) | Kind::Fifo => None,
        }
    }

    /// The same, to change it.
    pub(crate) fn names_mut(&mut self, id: NodeId) -> Option<&mut Names> {
        match &mut self.node_mut(id).kind {
            Kind::Folder(names) => Some(names),
            Kind::File(_) | Kind::Link(_) | Kind::Fifo => None,
        }
    }
}

impl NodeId {
    /// Its place among all nodes.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}
