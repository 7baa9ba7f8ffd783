//! Files of fake VMs: a tree in memory for each, below `/workspace`, moved by the agent's protocol.
//!
//! Archives are real ones, made and read by the `tar` crate; what a real agent refuses of them is refused. There are no
//! users, links or disks that fill up: failures beyond that are scripted ([`super::Fake::files_end`]).

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use tiffin_protocol::{FailureCode, FileAction, FileEntry, FileKind, Files, FilesDone, Kind, UnpackLimits};
use tiffin_types::id::VmId;
use tokio::io::{DuplexStream, ReadHalf, WriteHalf};

use super::{
    Shared,
    guest::{Running, fail, hung_up, json, read_frame, send},
};

/// When every file was changed last.
const MODIFIED_MS: i64 = 1_737_455_400_000;
const CHUNK: usize = 32 * 1024;

/// What a VM's path does instead of what it holds.
#[derive(Debug, Clone)]
pub enum FilesEnd {
    /// Fails, after so many bytes of output.
    Fails(usize, FailureCode),
    /// Hangs up, after so many bytes of output.
    HangsUp(usize),
    /// Gives output for ever.
    Endless,
    /// Takes all input and says nothing.
    Silent,
}

/// Files by their paths; `None` is a folder.
pub(super) type Tree = BTreeMap<String, Option<Vec<u8>>>;

type Refusal = (FailureCode, String);

/// Serves one operation.
pub(super) async fn serve(
    fake: &Shared,
    id: &VmId,
    files: Files,
    reader: &mut ReadHalf<DuplexStream>,
    writer: &mut WriteHalf<DuplexStream>,
) -> io::Result<()> {
    let _running = Running::new(fake);
    let (path, takes) = match &files.action {
        FileAction::Unpack { dest, .. } => (dest.clone(), true),
        FileAction::Write { path, .. } => (path.clone(), true),
        FileAction::Pack { path } | FileAction::List { path, .. } | FileAction::Read { path } => (path.clone(), false),
    };
    let end = fake.lock().files_ends.get(&path).cloned();
    match end {
        Some(FilesEnd::Silent) => {
            hung_up(reader).await;
            return Ok(());
        }
        Some(FilesEnd::Endless) => loop {
            send(writer, Kind::Stdout, &[b'x'; CHUNK]).await?;
        },
        Some(FilesEnd::Fails(bytes, code)) => {
            send_all(writer, &vec![b'x'; bytes]).await?;
            return fail(writer, code, "a scripted failure").await;
        }
        Some(FilesEnd::HangsUp(bytes)) => return send_all(writer, &vec![b'x'; bytes]).await,
        None => {}
    }
    // Cut short, it leaves nothing behind.
    let input = if takes { take_input(reader).await? } else { Vec::new() };
    let outcome = run(fake.lock().files.entry(id.clone()).or_default().tree(), &files.action, &input);
    let answer = async {
        match outcome {
            Ok((output, done)) => {
                send_all(writer, &output).await?;
                send(writer, Kind::Done, &json(&done)).await
            }
            Err((code, message)) => fail(writer, code, &message).await,
        }
    };
    tokio::select! {
        answered = answer => answered,
        () = hung_up(reader) => Ok(()),
    }
}

async fn take_input(reader: &mut ReadHalf<DuplexStream>) -> io::Result<Vec<u8>> {
    let mut input = Vec::new();
    loop {
        match read_frame(reader).await? {
            (Kind::Stdin, bytes) => input.extend(bytes),
            (Kind::StdinEnd, _) => return Ok(input),
            (kind, _) => return Err(io::Error::other(format!("a {kind:?} frame as input"))),
        }
    }
}

async fn send_all(writer: &mut WriteHalf<DuplexStream>, bytes: &[u8]) -> io::Result<()> {
    for chunk in bytes.chunks(CHUNK) {
        send(writer, Kind::Stdout, chunk).await?;
    }
    Ok(())
}

fn run(tree: &mut Tree, action: &FileAction, input: &[u8]) -> Result<(Vec<u8>, FilesDone), Refusal> {
    match action {
        FileAction::Unpack { dest, limits } => {
            let unpacked = unpack(input, dest, *limits)?;
            let done = counted(&unpacked);
            tree.extend(unpacked);
            Ok((Vec::new(), done))
        }
        FileAction::Pack { path } => pack(tree, path),
        FileAction::List { path, max_entries } => {
            let entries = list(tree, path)?;
            if entries.len() as u64 > *max_entries {
                return Err((FailureCode::TooLarge, format!("the folder has over {max_entries} entries")));
            }
            let done = FilesDone { bytes: 0, entries: entries.len() as u64 };
            Ok((json(&entries), done))
        }
        FileAction::Read { path } => match tree.get(path) {
            Some(Some(bytes)) => Ok((bytes.clone(), FilesDone { bytes: bytes.len() as u64, entries: 1 })),
            Some(None) => Err((FailureCode::Forbidden, format!("{path} is a folder"))),
            None => Err(missing(path)),
        },
        FileAction::Write { path, max_bytes } => {
            if input.len() as u64 > *max_bytes {
                return Err((FailureCode::TooLarge, format!("the file is larger than {max_bytes} bytes")));
            }
            if matches!(tree.get(path), Some(None)) {
                return Err((FailureCode::Forbidden, format!("{path} is a folder")));
            }
            make_folders(tree, path);
            tree.insert(path.clone(), Some(input.to_vec()));
            Ok((Vec::new(), FilesDone { bytes: input.len() as u64, entries: 1 }))
        }
    }
}

fn missing(path: &str) -> Refusal {
    (FailureCode::NotFound, format!("there is no {path}"))
}

fn make_folders(tree: &mut Tree, path: &str) {
    for (at, _) in path.match_indices('/').skip(1) {
        tree.entry(path[..at].to_owned()).or_insert(None);
    }
}

fn counted(tree: &Tree) -> FilesDone {
    let bytes = tree.values().flatten().map(|bytes| bytes.len() as u64).sum();
    FilesDone { bytes, entries: tree.len() as u64 }
}

fn unpack(input: &[u8], dest: &str, limits: UnpackLimits) -> Result<Tree, Refusal> {
    let bad = |error: io::Error| (FailureCode::BadArchive, format!("the archive can't be read: {error}"));
    let mut unpacked = Tree::from([(dest.to_owned(), None)]);
    let (mut total, mut count) = (0, 0);
    let mut archive = tar::Archive::new(GzDecoder::new(input));
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if name.starts_with('/') || name.split('/').any(|part| part == "..") {
            return Err((FailureCode::BadArchive, format!("{name}: leads outside")));
        }
        count += 1;
        if count > limits.entries {
            return Err((FailureCode::TooLarge, format!("the archive has over {} entries", limits.entries)));
        }
        let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        let path = [dest].into_iter().chain(parts).collect::<Vec<_>>().join("/");
        make_folders(&mut unpacked, &path);
        if entry.header().entry_type().is_dir() {
            unpacked.insert(path, None);
            continue;
        }
        if !entry.header().entry_type().is_file() {
            return Err((FailureCode::BadArchive, format!("{name}: is no file and no folder")));
        }
        let mut bytes = Vec::new();
        let room = limits.unpacked_bytes - total;
        (&mut entry).take(room.saturating_add(1)).read_to_end(&mut bytes).map_err(bad)?;
        total += bytes.len() as u64;
        let ratio = total > 1 << 20 && total / (input.len() as u64).max(1) > limits.ratio;
        if bytes.len() as u64 > room || ratio {
            return Err((FailureCode::TooLarge, "the archive unpacks to too much".into()));
        }
        unpacked.insert(path, Some(bytes));
    }
    unpacked.remove("/workspace");
    Ok(unpacked)
}

fn pack(tree: &Tree, path: &str) -> Result<(Vec<u8>, FilesDone), Refusal> {
    let failed = |error: io::Error| (FailureCode::Internal, error.to_string());
    let mut packed = Tree::new();
    match tree.get(path) {
        None => return Err(missing(path)),
        Some(Some(bytes)) => {
            packed.insert(path.rsplit('/').next().unwrap_or(path).to_owned(), Some(bytes.clone()));
        }
        Some(None) => {
            let inside = format!("{path}/");
            packed.extend(
                tree.iter().filter_map(|(name, entry)| Some((name.strip_prefix(&inside)?.to_owned(), entry.clone()))),
            );
        }
    }
    let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (name, entry) in &packed {
        let mut header = tar::Header::new_gnu();
        header.set_mode(if entry.is_some() { 0o644 } else { 0o755 });
        header.set_entry_type(if entry.is_some() { tar::EntryType::Regular } else { tar::EntryType::Directory });
        let bytes = entry.as_deref().unwrap_or_default();
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, bytes).map_err(failed)?;
    }
    let mut gzip = archive.into_inner().map_err(failed)?;
    gzip.flush().map_err(failed)?;
    Ok((gzip.finish().map_err(failed)?, counted(&packed)))
}

fn list(tree: &Tree, path: &str) -> Result<Vec<FileEntry>, Refusal> {
    match tree.get(path) {
        None => return Err(missing(path)),
        Some(Some(_)) => return Err((FailureCode::Forbidden, format!("{path} is no folder"))),
        Some(None) => {}
    }
    let inside = format!("{path}/");
    let entry = |(name, entry): (&String, &Option<Vec<u8>>)| {
        let name = name.strip_prefix(&inside).filter(|name| !name.contains('/'))?.to_owned();
        let (kind, mode) = match entry {
            Some(_) => (FileKind::File, 0o644),
            None => (FileKind::Directory, 0o755),
        };
        let size = entry.as_ref().map_or(0, |bytes| bytes.len() as u64);
        Some(FileEntry { name, kind, size, mode, modified_ms: MODIFIED_MS })
    };
    Ok(tree.iter().filter_map(entry).collect())
}

/// The files of a VM, which always has a `/workspace`.
#[derive(Debug, Clone)]
pub(super) struct Store(Tree);

impl Default for Store {
    fn default() -> Self {
        Self(Tree::from([("/workspace".to_owned(), None)]))
    }
}

impl Store {
    fn tree(&mut self) -> &mut Tree {
        &mut self.0
    }

    /// A file's bytes.
    pub(super) fn get(&self, path: &str) -> Option<Vec<u8>> {
        self.0.get(path).cloned().flatten()
    }

    /// Every path but `/workspace`.
    pub(super) fn paths(&self) -> Vec<String> {
        self.0.keys().filter(|path| *path != "/workspace").cloned().collect()
    }
}
