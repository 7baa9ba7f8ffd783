//! Layers on the disk, as registries gave them.
//!
//! ```text
//!   <dir>/layers/<hash of where it is from>/<64 hex>          a whole layer
//!   <dir>/layers/<hash of where it is from>/<64 hex>.partial  the beginning of one
//! ```
//!
//! Invariants: whoever is given a layer has shown its registry credentials for it, also where it was here already; a
//! layer of one registry is no other's, or anybody's registry could hand out what it knows by digest alone. For the same reason one
//! that has other addresses in its manifest is another than the one without: whoever writes a manifest chooses them. A layer is
//! compared with its digest before it is used, also one that was here: a crash of the host may have torn it. Layers go
//! only while no import is under way.

use std::{
    fs, io,
    time::{Duration, SystemTime},
};

use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha256};
use tiffin_image::oci::Descriptor;
use tiffin_types::id::Digest;
use tokio::{
    io::AsyncWriteExt,
    sync::{RwLock, RwLockReadGuard},
};

use super::{
    super::{
        App,
        places::Locks,
        uploads::{enough_room, no_room},
    },
    progress::Progress,
    told,
};
use crate::{
    error::{AppError, chain},
    registry::{PATIENCE, RegistryError, Session},
};

/// Attempts to get a layer, each from where the last one broke off.
const ATTEMPTS: usize = 4;
/// Free space is looked at each time that so many bytes were received.
const LOOK_EVERY: u64 = 64 << 20;
const BUFFER: usize = 1 << 20;
/// What is left of layers that nobody came back for.
const PARTIAL_AGE: Duration = Duration::from_secs(24 * 3600);
const PARTIAL: &str = "partial";

pub(super) struct Cache {
    dir: Utf8PathBuf,
    bytes: u64,
    /// Held to read by imports, to write while layers go.
    used: RwLock<()>,
    /// One at a time gets a layer.
    locks: Locks<Utf8PathBuf>,
}

impl Cache {
    pub(super) fn new(images: &Utf8Path, bytes: u64) -> Self {
        Self { dir: images.join("layers"), bytes, used: RwLock::default(), locks: Locks::default() }
    }

    /// No layer goes while this is held.
    pub(super) async fn keep(&self) -> RwLockReadGuard<'_, ()> {
        self.used.read().await
    }

    /// The file of a layer, got from the registry where it isn't here.
    pub(super) async fn get(
        &self,
        app: &App,
        session: &Session,
        host: &str,
        layer: &Descriptor,
        progress: &Progress,
    ) -> Result<Utf8PathBuf, AppError> {
        let disk = |error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull => no_room(),
            _ => AppError::internal("receiving a layer", error),
        };
        let from = [&[host.to_owned()], &layer.urls[..]].concat().join("\n");
        let folder = self.dir.join(&hex::encode(Sha256::digest(from))[..16]);
        let path = folder.join(layer.digest.hex());
        let _turn = self.locks.lock(&path).await;
        if is_whole(&path, layer).await? && session.has(layer).await.map_err(told)? {
            progress.received(column(layer.size));
            return Ok(path);
        }
        tokio::fs::create_dir_all(&folder).await.map_err(disk)?;
        let partial = path.with_extension(PARTIAL);
        let (mut failed, mut others) = (None, 0);
        for _ in 0..ATTEMPTS {
            enough_room(app, layer.size)?;
            match receive(app, session, layer, &partial, progress).await {
                Ok(()) => {}
                Err(Broken::App(error)) => return Err(error),
                Err(Broken::Disk(error)) => return Err(disk(error)),
                // What comes and breaks off may come whole the next time; what is refused is not.
                Err(Broken::Registry(error @ RegistryError::Failed(_))) => {
                    failed = Some(error);
                    continue;
                }
                Err(Broken::Registry(error)) => return Err(told(error)),
            }
            if is_whole(&partial, layer).await? {
                tokio::fs::rename(&partial, &path).await.map_err(disk)?;
                return Ok(path);
            }
            remove(&partial).await.map_err(disk)?;
            progress.received(-column(layer.size));
            failed =
                Some(RegistryError::Failed(format!("what it gives for the layer {} isn't that layer", layer.digest)));
            others += 1;
            // The first one may have begun with what was left of an earlier import.
            if others == 2 {
                break;
            }
        }
        Err(told(failed.unwrap_or_else(|| RegistryError::Failed("a layer doesn't come".into()))))
    }

    /// Lets go of what was not used for the longest time, until the rest is no more than it may be.
    pub(super) async fn trim(&self) {
        // Who comes later trims what is left.
        let Ok(_alone) = self.used.try_write() else { return };
        let (dir, bytes) = (self.dir.clone(), self.bytes);
        let trimmed = tokio::task::spawn_blocking(move || trim(&dir, bytes)).await;
        let failed = match trimmed {
            Ok(Ok(())) => return,
            Ok(Err(error)) => chain(&error),
            Err(error) => error.to_string(),
        };
        tracing::warn!(error = failed, "layers that nobody needs can't be removed now");
    }
}

enum Broken {
    Registry(RegistryError),
    Disk(io::Error),
    App(AppError),
}

/// Receives a layer, or what is missing of it.
async fn receive(
    app: &App,
    session: &Session,
    layer: &Descriptor,
    partial: &Utf8Path,
    progress: &Progress,
) -> Result<(), Broken> {
    let file = tokio::fs::OpenOptions::new().create(true).truncate(false).write(true).open(partial).await;
    let mut file = file.map_err(Broken::Disk)?;
    let here = file.metadata().await.map_err(Broken::Disk)?.len();
    if here == layer.size && here > 0 {
        if !session.has(layer).await.map_err(Broken::Registry)? {
            return Err(Broken::Registry(RegistryError::Absent("the registry doesn't have a layer".into())));
        }
        progress.received(column(here));
        return Ok(());
    }
    let here = if here > layer.size { 0 } else { here };
    let (mut at, mut body) = session.blob(layer, here).await.map_err(Broken::Registry)?;
    file.set_len(at).await.map_err(Broken::Disk)?;
    tokio::io::AsyncSeekExt::seek(&mut file, io::SeekFrom::Start(at)).await.map_err(Broken::Disk)?;
    let mut file = tokio::io::BufWriter::with_capacity(BUFFER, file);
    progress.received(column(at));
    let received = async {
        loop {
            let next = tokio::time::timeout(PATIENCE, body.next()).await;
            let next = next.map_err(|_| Broken::Registry(RegistryError::Failed("a layer stopped coming".into())))?;
            let Some(piece) =
                next.transpose().map_err(|error| Broken::Registry(RegistryError::Failed(error.to_string())))?
            else {
                return Ok(());
            };
            let before = at;
            at += piece.len() as u64;
            if at > layer.size {
                return Err(Broken::Registry(RegistryError::Failed(format!(
                    "the layer {} is longer than its manifest says",
                    layer.digest
                ))));
            }
            if before / LOOK_EVERY != at / LOOK_EVERY {
                enough_room(app, 0).map_err(Broken::App)?;
            }
            file.write_all(&piece).await.map_err(Broken::Disk)?;
            progress.received(column(piece.len() as u64));
        }
    };
    let received: Result<(), Broken> = received.await;
    // What came is kept, however it ended.
    file.flush().await.map_err(Broken::Disk)?;
    if received.is_err() || at < layer.size {
        progress.received(-column(at));
    }
    received?;
    match at == layer.size {
        true => Ok(()),
        false => Err(Broken::Registry(RegistryError::Failed("a layer broke off".into()))),
    }
}

/// Whether the file is that layer.
async fn is_whole(path: &Utf8Path, layer: &Descriptor) -> Result<bool, AppError> {
    let (path, layer) = (path.to_owned(), layer.clone());
    let compared = tokio::task::spawn_blocking(move || -> io::Result<bool> {
        let mut file = match fs::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        if file.metadata()?.len() != layer.size {
            return Ok(false);
        }
        let (mut hasher, mut buffer) = (Sha256::new(), vec![0; BUFFER]);
        loop {
            match io::Read::read(&mut file, &mut buffer)? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
        // For who lets layers go.
        file.set_modified(SystemTime::now())?;
        Ok(Digest::from_sha256(hasher.finalize().into()) == layer.digest)
    });
    let compared = compared.await.map_err(|error| AppError::internal("a task of the server panicked", error))?;
    compared.map_err(|error| AppError::internal("reading a layer", error))
}

async fn remove(path: &Utf8Path) -> io::Result<()> {
    match tokio::fs::remove_file(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn trim(dir: &Utf8Path, most: u64) -> io::Result<()> {
    let mut layers = Vec::new();
    let folders = match dir.read_dir_utf8() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        folders => folders?,
    };
    for folder in folders {
        for file in folder?.path().read_dir_utf8()? {
            let file = file?;
            let metadata = file.metadata()?;
            let used = metadata.modified()?;
            let age = SystemTime::now().duration_since(used).unwrap_or_default();
            if file.path().extension() == Some(PARTIAL) && age > PARTIAL_AGE {
                fs::remove_file(file.path())?;
            } else {
                layers.push((used, metadata.len(), file.path().to_owned()));
            }
        }
    }
    layers.sort_by_key(|(used, ..)| std::cmp::Reverse(*used));
    let mut kept = 0_u64;
    for (_, bytes, path) in layers {
        kept = kept.saturating_add(bytes);
        if kept > most {
            tracing::info!(layer = %path.file_name().unwrap_or_default(), "removing a layer that was not used for long");
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

fn column(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
