//! Puts the layers of an image on top of each other, in memory.
//!
//! The rules are those of the OCI image layer: what a layer has replaces what was there, folders are joined, `.wh.NAME`
//! takes NAME of the layers below away, `.wh..wh..opq` everything that a folder had. Marks take effect before the layer's
//! own entries, wherever they stand among them.
//!
//! Invariant: names are followed in the tree alone. A symbolic link on the way to an entry leads where it leads in the
//! image, at most to the image's root; the last part of a name is never followed.

use super::{archive::What, shown};
use crate::erofs::{
    XATTR_BYTES,
    tree::{Content, Kind, Meta, Node, NodeId, Tree, Xattr},
    xattr_bytes,
};

/// The longest name of a file, and the longest path, that programs can use.
const NAME_BYTES: usize = 255;
const PATH_BYTES: usize = 4095;
/// Symbolic links followed for one entry, as the kernel does.
const MAX_FOLLOWED: usize = 40;
const MARK: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that a layer's own builder left there, of a union filesystem long gone.
const BUILDERS: &[u8] = b".wh..wh.";

/// An entry of a layer, whose content lies somewhere.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) what: What,
    pub(super) meta: Meta,
    /// Where a file's content begins in the layer's store.
    pub(super) at: u64,
}

/// Why an entry can't be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("entry {}: {}", shown(.entry), .rule)]
pub(super) struct BadEntry {
    entry: Vec<u8>,
    rule: &'static str,
}

/// An entry's place in the image: the folders on the way, and the last name; none for the root.
struct Place<'a> {
    folders: Vec<&'a [u8]>,
    name: Option<&'a [u8]>,
}

/// What a layer's entry does.
enum Does<'a> {
    /// It is part of the image.
    Is,
    /// It hides that name of the layers below.
    Hides(&'a [u8]),
    /// It hides all that its folder had.
    HidesAll,
    /// Nothing.
    Nothing,
}

/// Puts a layer, the `source`th, on top of the tree.
pub(super) fn add_layer(tree: &mut Tree, source: u32, entries: Vec<Entry>) -> Result<(), BadEntry> {
    for entry in &entries {
        mark(tree, entry).map_err(|rule| BadEntry { entry: entry.path.clone(), rule })?;
    }
    for mut entry in entries {
        let path = std::mem::take(&mut entry.path);
        add(tree, source, &path, entry).map_err(|rule| BadEntry { entry: path, rule })?;
    }
    Ok(())
}

fn mark(tree: &mut Tree, entry: &Entry) -> Result<(), &'static str> {
    let place = place(&entry.path)?;
    let hides = match does(&place)? {
        Does::Is | Does::Nothing => return Ok(()),
        Does::Hides(name) => Some(name),
        Does::HidesAll => None,
    };
    // What isn't there needs no hiding.
    let Some(folder) = find(tree, &place.folders)? else { return Ok(()) };
    if let Some(names) = tree.names_mut(folder) {
        match hides {
            Some(name) => drop(names.remove(name)),
            None => names.clear(),
        }
    }
    Ok(())
}

fn add(tree: &mut Tree, source: u32, path: &[u8], entry: Entry) -> Result<(), &'static str> {
    let place = place(path)?;
    if !matches!(does(&place)?, Does::Is) || entry.what == What::Device {
        return Ok(());
    }
    let mut meta = entry.meta;
    meta.xattrs = kept(meta.xattrs)?;
    let Some(name) = place.name else {
        return match entry.what {
            What::Folder => {
                tree.node_mut(Tree::ROOT).meta = meta;
                Ok(())
            }
            _ => Err("the root must be a folder"),
        };
    };
    let folder = make(tree, &place.folders)?;
    let before = tree.names(folder).and_then(|names| names.get(name)).copied();
    let kind = match entry.what {
        What::Folder => match before.filter(|before| tree.names(*before).is_some()) {
            Some(before) => {
                tree.node_mut(before).meta = meta;
                return Ok(());
            }
            None => Kind::Folder(Default::default()),
        },
        What::File { size, parts } => Kind::File(Content { source, at: entry.at, size, parts }),
        What::Link(target) => Kind::Link(link_target(target)?),
        What::Fifo => Kind::Fifo,
        What::SameAs(target) => {
            let same = linked(tree, &target)?;
            put(tree, folder, name, same);
            return Ok(());
        }
        What::Device => return Ok(()),
    };
    let node = tree.add(Node { meta, kind }).ok_or(TOO_MANY)?;
    put(tree, folder, name, node);
    Ok(())
}

const TOO_MANY: &str = "there are more entries than an image can have";

fn put(tree: &mut Tree, folder: NodeId, name: &[u8], node: NodeId) {
    let names = tree.names_mut(folder).expect("entries are put into folders");
    names.insert(name.into(), node);
}

fn link_target(target: Vec<u8>) -> Result<Box<[u8]>, &'static str> {
    match target.len() {
        0 => Err("it is a link to nothing"),
        1..=PATH_BYTES if !target.contains(&0) => Ok(target.into()),
        _ => Err("its link's target is no path"),
    }
}

/// The file that a hard link names.
fn linked(tree: &Tree, target: &[u8]) -> Result<NodeId, &'static str> {
    const ABSENT: &str = "it is a hard link to a file that isn't in the image";
    let place = place(target)?;
    let folder = find(tree, &place.folders)?.ok_or(ABSENT)?;
    let node = place.name.and_then(|name| tree.names(folder)?.get(name)).copied().ok_or(ABSENT)?;
    if tree.names(node).is_some() { Err("it is a hard link to a folder") } else { Ok(node) }
}

/// The attributes that an image keeps: `user.*` and `security.capability`. Labels, access lists and the marks of overlays
/// mean something where they were set, and could do harm elsewhere.
fn kept(mut xattrs: Vec<Xattr>) -> Result<Vec<Xattr>, &'static str> {
    xattrs.retain(|xattr| {
        let is_kept = xattr.name == b"security.capability"
            || xattr.name.strip_prefix(b"user.").is_some_and(|rest| !rest.is_empty());
        is_kept && !xattr.name.contains(&0)
    });
    if xattrs.iter().any(|xattr| xattr.name.len() > NAME_BYTES) || xattr_bytes(&xattrs) > XATTR_BYTES {
        return Err("its extended attributes are larger than an image can keep");
    }
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(xattrs)
}

fn place(path: &[u8]) -> Result<Place<'_>, &'static str> {
    if path.len() > PATH_BYTES {
        return Err("its path is longer than 4095 bytes");
    }
    if path.contains(&0) {
        return Err("its path has a NUL");
    }
    let mut folders = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("its path has `..`"),
            part if part.len() > NAME_BYTES => return Err("a name in its path is longer than 255 bytes"),
            part => folders.push(part),
        }
    }
    let name = folders.pop();
    Ok(Place { folders, name })
}

fn does<'a>(place: &Place<'a>) -> Result<Does<'a>, &'static str> {
    if place.folders.iter().any(|folder| folder.starts_with(BUILDERS)) {
        return Ok(Does::Nothing);
    }
    if place.folders.iter().any(|folder| folder.starts_with(MARK)) {
        return Err("it is inside a mark for something that is removed");
    }
    let Some(name) = place.name else { return Ok(Does::Is) };
    if name == OPAQUE {
        return Ok(Does::HidesAll);
    }
    if name.starts_with(BUILDERS) {
        return Ok(Does::Nothing);
    }
    match name.strip_prefix(MARK) {
        None => Ok(Does::Is),
        Some(b"" | b"." | b"..") => Err("it removes nothing that could be there"),
        Some(hidden) => Ok(Does::Hides(hidden)),
    }
}

/// The folder at the end of that way, if it is there.
fn find(tree: &Tree, folders: &[&[u8]]) -> Result<Option<NodeId>, &'static str> {
    let mut walk = Walk::new(folders);
    while let Some(name) = walk.next() {
        let Some(next) = tree.names(walk.at()).and_then(|names| names.get(&*name)).copied() else { return Ok(None) };
        match &tree.node(next).kind {
            Kind::Folder(_) => walk.enter(next),
            Kind::Link(target) => walk.follow(target)?,
            Kind::File(_) | Kind::Fifo => return Ok(None),
        }
    }
    Ok(Some(walk.at()))
}

/// The same; what is missing is made.
fn make(tree: &mut Tree, folders: &[&[u8]]) -> Result<NodeId, &'static str> {
    let mut walk = Walk::new(folders);
    while let Some(name) = walk.next() {
        let next = match tree.names(walk.at()).and_then(|names| names.get(&*name)).copied() {
            Some(next) => next,
            None => {
                let meta = Meta { mode: 0o755, ..Meta::default() };
                let made = tree.add(Node { meta, kind: Kind::Folder(Default::default()) }).ok_or(TOO_MANY)?;
                put(tree, walk.at(), &name, made);
                made
            }
        };
        match &tree.node(next).kind {
            Kind::Folder(_) => walk.enter(next),
            Kind::Link(target) => walk.follow(target)?,
            Kind::File(_) | Kind::Fifo => return Err("a part of its path is a file"),
        }
    }
    Ok(walk.at())
}

/// A walk through the tree: the folders that it is in, and the names that are still to come, the next one last.
struct Walk {
    way: Vec<NodeId>,
    pending: Vec<Box<[u8]>>,
    followed: usize,
}

impl Walk {
    fn new(folders: &[&[u8]]) -> Self {
        Self { way: vec![Tree::ROOT], pending: folders.iter().rev().map(|name| (*name).into()).collect(), followed: 0 }
    }

    fn at(&self) -> NodeId {
        *self.way.last().expect("a walk is never outside the root")
    }

    fn next(&mut self) -> Option<Box<[u8]>> {
        loop {
            let name = self.pending.pop()?;
            match &*name {
                b"" | b"." => {}
                b".." => self.way.truncate(self.way.len().saturating_sub(1).max(1)),
                _ => return Some(name),
            }
        }
    }

    fn enter(&mut self, folder: NodeId) {
        self.way.push(folder);
    }

    fn follow(&mut self, target: &[u8]) -> Result<(), &'static str> {
        self.followed += 1;
        if self.followed > MAX_FOLLOWED {
            return Err("the links on the way to it lead in a circle");
        }
        if target.starts_with(b"/") {
            self.way.truncate(1);
        }
        let parts = target.split(|byte| *byte == b'/');
        if parts.clone().any(|part| part.len() > NAME_BYTES) {
            return Err("a link on the way to it has a name that is longer than 255 bytes");
        }
        self.pending.extend(parts.rev().map(Into::into));
        Ok(())
    }
}
