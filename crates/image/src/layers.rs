//! From the layers of a container image to an image in the blob store.
//!
//! ```text
//!   layers --(unpacked)--> contents on disk, entries in memory --(merged)--> tree --(written)--> EROFS, blob store
//! ```
//!
//! Invariants: nothing is unpacked to paths: the contents of a layer's files lie one behind the other in a file without a
//! name, and what they are called is known to the tree in memory alone (`merge`). All of it runs in a process of its own
//! ([`main`]) that has no rights, an empty root and open files only; when this process ends, so does it, and its disk space with it.
//! Everything is bounded by [`Limits`]. That layers are the right bytes is checked here once more, by the digests of what
//! they unpack to; that they are what was downloaded is the caller's to know.
//!
//! Left out on purpose: devices, as a VM has a `/dev` of its own, and attributes other than `user.*` and `security.capability`.

mod archive;
mod compression;
mod merge;
mod pax;
mod unpack;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::Path,
    process::{Command, ExitCode},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use camino::{Utf8Path, Utf8PathBuf};
use nix::sys::statvfs::fstatvfs;
use serde::{Deserialize, Serialize};
use tiffin_types::id::Digest;

use crate::{
    blob::{Blob, BlobStore},
    convert::{
        CANT_CONFINE, Confinement, ConvertError, Converter, Limits, Unpacked, Unreadable, confine, remove_tree,
        run_confined,
    },
    erofs::{
        tree::{Content, Tree},
        write::{self, Output, WriteError},
    },
};

/// The word by which a program that has this crate in it assembles layers: its first argument.
pub const SUBCOMMAND: &str = "assemble-image";
/// Layers that are unpacked at once, where there are as many processors.
const MAX_THREADS: usize = 4;
/// Memory: names of a million files, and what decompressors look back on.
const MEMORY_BYTES: u64 = 4 << 30;
/// Bytes that a file takes in an image beyond its content, at most.
const BESIDE_A_FILE: u64 = 3 * 4096;

/// A layer that lies on the disk, compressed or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The file.
    pub file: Utf8PathBuf,
    /// The digest of what it unpacks to.
    pub diff_id: Digest,
}

/// What became of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assembled {
    /// The image's filesystem, in the store.
    pub blob: Blob,
    /// What is in it.
    pub unpacked: Unpacked,
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    layers: Vec<Layer>,
    limits: Limits,
}

impl Converter {
    /// Makes an image of layers, the lowest first. `work` is a folder for what is needed meanwhile, which is made and
    /// removed. Blocks for as long as it takes.
    ///
    /// # Errors
    /// [`ConvertError`]; nothing is left then but `work`, if it can't be removed.
    pub fn assemble(
        &self,
        layers: &[Layer],
        work: &Utf8Path,
        store: &BlobStore,
        limits: &Limits,
        tell: &mut (dyn FnMut(Unpacked) + Send),
    ) -> Result<Assembled, ConvertError> {
        let order = Order { layers: layers.to_vec(), limits: limits.clone() };
        let assembled = self.assemble_in(&order, work, store, tell);
        if let Err(error) = remove_tree(work) {
            return assembled.and(Err(ConvertError::Host(format!("removing {work}: {error}"))));
        }
        assembled
    }

    fn assemble_in(
        &self,
        order: &Order,
        work: &Utf8Path,
        store: &BlobStore,
        tell: &mut (dyn FnMut(Unpacked) + Send),
    ) -> Result<Assembled, ConvertError> {
        let host = |error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull => ConvertError::DiskFull,
            _ => ConvertError::Host(format!("{work}: {error}")),
        };
        remove_tree(work).map_err(host)?;
        DirBuilder::new().mode(0o700).create(work).map_err(host)?;
        let incoming = store.incoming()?;
        let unpacked = match self.program() {
            Some(program) => {
                let mut command = Command::new(program);
                let order_text = serde_json::to_string(order).expect("names and numbers are always JSON");
                command.args([SUBCOMMAND, &order_text, work.as_str(), incoming.path().as_str()]);
                run_confined(command, &order.limits, "the image", tell)?
            }
            None => assemble(order, work.as_std_path(), incoming.path().as_std_path(), false, tell)?,
        };
        Ok(Assembled { blob: incoming.commit()?, unpacked })
    }
}

/// The process that assembles: `arguments` are the order, an empty folder, and the file that becomes the image. Must be
/// called before any thread is started.
pub fn main(arguments: &[String]) -> ExitCode {
    let [order, work, target] = arguments else {
        eprintln!("usage: tiffin {SUBCOMMAND} ORDER FOLDER TARGET (run by the server)");
        return ExitCode::from(2);
    };
    let Ok(order) = serde_json::from_str::<Order>(order) else {
        eprintln!("the order is none");
        return ExitCode::from(2);
    };
    crate::convert::answer(|tell| assemble(&order, Path::new(work), Path::new(target), true, tell))
}

fn assemble(
    order: &Order,
    work: &Path,
    target: &Path,
    confined: bool,
    tell: &mut (dyn FnMut(Unpacked) + Send),
) -> Result<Unpacked, Unreadable> {
    let limits = &order.limits;
    let host = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull => Unreadable::DiskFull,
        _ => Unreadable::Host(error.to_string()),
    };
    let target = OpenOptions::new().write(true).truncate(true).open(target).map_err(host)?;
    let opened = order.layers.iter().enumerate().map(|(index, layer)| {
        Ok(unpack::Source { packed: File::open(&layer.file)?, contents: nameless(&work.join(index.to_string()))? })
    });
    let sources = opened.collect::<io::Result<Vec<_>>>().map_err(host)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    if confined {
        let bounds = Confinement {
            memory_bytes: MEMORY_BYTES,
            cpu_seconds: limits.time.as_secs().max(1) * threads as u64,
            file_bytes: limits.bytes.saturating_add(limits.entries.saturating_mul(BESIDE_A_FILE)),
            open_files: sources.len() as u64 * 2 + 32,
            capabilities: 0,
        };
        confine(work, &bounds).map_err(|error| Unreadable::Host(format!("{CANT_CONFINE}: {error}")))?;
    }
    let tree = merged(order, &sources, threads, tell)?;
    let plan = write::plan(&tree).map_err(|error| Unreadable::refused(error.to_string()))?;
    enough_room(&target, limits, plan.bytes())?;
    let mut fetch = |content: &Content, out: &mut Output<'_>| fetch(content, &sources, out);
    write::write(&tree, &plan, &target, &mut fetch).map_err(|WriteError(error)| host(error))?;
    let (entries, bytes) = plan.files(&tree);
    Ok(Unpacked { entries, bytes })
}

/// A new file that is gone when it is closed.
fn nameless(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    fs::remove_file(path)?;
    Ok(file)
}

/// Unpacks all layers, some at once, and puts them on top of each other.
fn merged(
    order: &Order,
    sources: &[unpack::Source],
    threads: usize,
    tell: &mut (dyn FnMut(Unpacked) + Send),
) -> Result<Tree, Unreadable> {
    let shared = unpack::Shared::new(&order.limits, tell);
    let (next, unpacked) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    unpacked.lock().unwrap_or_else(PoisonError::into_inner).resize_with(sources.len(), || None);
    let take = || {
        let index = next.fetch_add(1, Ordering::Relaxed);
        sources.get(index).map(|source| (index, source))
    };
    let work = || {
        while let Some((index, source)) = take() {
            let entries = unpack::unpack(source, &order.layers[index].diff_id, &shared);
            let entries = entries.map_err(|error| in_layer(index, error));
            if entries.is_err() {
                // The others end with the layers that they have begun.
                next.store(sources.len(), Ordering::Relaxed);
            }
            unpacked.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(entries);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(sources.len()) {
            scope.spawn(work);
        }
        work();
    });
    let mut unpacked = unpacked.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(failed) = unpacked.iter().position(|one| matches!(one, Some(Err(_)))) {
        return Err(unpacked.swap_remove(failed).and_then(Result::err).expect("it is one that failed"));
    }
    let mut tree = Tree::new();
    for (index, entries) in unpacked.into_iter().enumerate() {
        let entries = entries.and_then(Result::ok).ok_or_else(|| Unreadable::Host("a layer was passed over".into()))?;
        let source = u32::try_from(index).map_err(|_| Unreadable::refused("the image has too many layers"))?;
        merge::add_layer(&mut tree, source, entries)
            .map_err(|error| in_layer(index, Unreadable::refused(error.to_string())))?;
    }
    Ok(tree)
}

fn in_layer(index: usize, error: Unreadable) -> Unreadable {
    match error {
        Unreadable::Refused(why) => Unreadable::Refused(format!("layer {}: {why}", index + 1)),
        other @ (Unreadable::DiskFull | Unreadable::Host(_)) => other,
    }
}

fn enough_room(disk: &File, limits: &Limits, bytes: u64) -> Result<(), Unreadable> {
    let disk = fstatvfs(disk).map_err(|error| Unreadable::Host(error.to_string()))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    if free < limits.leave_free_bytes.saturating_add(bytes) { Err(Unreadable::DiskFull) } else { Ok(()) }
}

/// Copies a file's content to where the image is written.
fn fetch(content: &Content, sources: &[unpack::Source], out: &mut Output<'_>) -> io::Result<()> {
    let source = &sources[content.source as usize].contents;
    let Some(parts) = &content.parts else {
        return copy(source, content.at, content.size, &mut |bytes| out.bytes(bytes));
    };
    let (mut from, mut at) = (content.at, 0);
    for part in parts {
        out.zeros(part.at - at)?;
        copy(source, from, part.length, &mut |bytes| out.bytes(bytes))?;
        (from, at) = (from + part.length, part.at + part.length);
    }
    out.zeros(content.size - at)
}

fn copy(source: &File, mut from: u64, mut left: u64, to: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    const CHUNK: u64 = 256 << 10;
    let mut buffer = vec![0; usize::try_from(left.min(CHUNK)).unwrap_or(0)];
    while left > 0 {
        let some = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        source.read_exact_at(&mut buffer[..some], from)?;
        to(&buffer[..some])?;
        (from, left) = (from + some as u64, left - some as u64);
    }
    Ok(())
}

/// A name from a layer, for an error's text: cut, and nothing in it that a terminal obeys.
fn shown(name: &[u8]) -> String {
    const SHOWN: usize = 100;
    let text = String::from_utf8_lossy(&name[..name.len().min(SHOWN)]);
    let text: String = text.chars().flat_map(char::escape_debug).collect();
    if name.len() > SHOWN { format!("`{text}...`") } else { format!("`{text}`") }
}
