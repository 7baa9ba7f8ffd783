//! Snapshots in a folder of this host: `<id>/` with `memory/`, `disk.ext4` and, last, `manifest.json`.
//!
//! A folder without a manifest is a ruin and no snapshot. A snapshot is never changed; VMs made from it have their own copy of
//! its disk and names of their own for its memory, so it can go at any time.
//!
//! Who may have it, and what for, is the business of the layers above.

mod manifest;

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::SystemTime,
};

use tiffin_types::{
    id::{Digest, SnapshotId},
    time::Timestamp,
    vm::{EngineName, VmSize, VmSpec},
};

use self::manifest::{Key, MANIFEST, Manifest, SealedFile, damaged};
use super::{HostConfig, folder, host_or_full, releases::Releases};
use crate::{
    EngineError,
    host::disk,
    monitor::launch::{self, DISK, Launch, MEMORY, RESTORE, Restore},
};

pub(super) struct Snapshots {
    dir: PathBuf,
    agents: PathBuf,
    key: Key,
    releases: Arc<Releases>,
    /// The files that are as they were sealed, if such are believed to stay so.
    trusted: Option<Mutex<HashMap<PathBuf, Identity>>>,
}

/// What changes when a file is replaced or written to.
type Identity = (u64, u64, u64, i64, i64);

/// What a VM is made of a snapshot for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// To go on from there.
    Snapshot,
    /// To begin there.
    Template,
}

/// What a VM that was saved is made of.
pub(super) struct Of {
    pub(super) image: Digest,
    /// The kernel that the image came with.
    pub(super) kernel: Option<Digest>,
    pub(super) size: VmSize,
}

impl Of {
    pub(super) fn vm(spec: &VmSpec) -> Self {
        Self { image: spec.image.clone(), kernel: spec.kernel.clone(), size: spec.size }
    }
}

impl Snapshots {
    /// Opens the folder, and makes the host's key if there is none.
    pub(super) fn open(dir: PathBuf, config: &HostConfig, releases: Arc<Releases>) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let (agents, key) = (config.data_dir.join("agent"), Key::open(&config.data_dir)?);
        Ok(Self { dir, agents, key, releases, trusted: None })
    }

    /// Looks at the content of each file once, as long as nobody has written to it.
    pub(super) fn trusting(self) -> Self {
        Self { trusted: Some(Mutex::default()), ..self }
    }

    fn folder(&self, id: &SnapshotId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// Makes the folder that a save goes into.
    pub(super) fn begin(&self, id: &SnapshotId) -> Result<PathBuf, EngineError> {
        let dir = self.folder(id);
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => Ok(dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(EngineError::Invalid("another snapshot has this id".into()))
            }
            Err(error) => Err(host_or_full("making the snapshot's folder", error)),
        }
    }

    /// Seals what the monitor wrote, of a guest whose agent takes `token`, and makes it last. Gives the room that it takes.
    pub(super) fn seal(&self, id: &SnapshotId, launch: &Launch, token: &str) -> io::Result<u64> {
        let dir = self.folder(id);
        let mut paths = vec![DISK.to_owned()];
        for entry in fs::read_dir(dir.join(MEMORY))? {
            let name = entry?.file_name().into_string().map_err(|_| io::Error::other("a file without a name"))?;
            paths.push(format!("{MEMORY}/{name}"));
        }
        paths.sort();
        let files = each(&paths, |path| {
            let from = dir.join(path);
            let (length, hash) = hash(&self.key, &from, None)?;
            fs::File::open(&from)?.sync_all()?;
            self.trust(&from)?;
            Ok(SealedFile { path: path.clone(), length, hash })
        })?;
        fs::File::open(dir.join(MEMORY))?.sync_all()?;
        // The agent of a machine is in its memory.
        let agent_dir = if launch.machine.is_some() { None } else { launch.agent_dir.file_name() };
        let agent = agent_dir.and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let spec = &launch.spec;
        let manifest = Manifest {
            snapshot: id.clone(),
            vm: spec.id.clone(),
            created_ms: Timestamp::now().as_millis(),
            engine: launch.engine,
            engine_version: launch.engine_version.clone(),
            cpu: cpu_features()?,
            image: spec.image.clone(),
            kernel: spec.kernel.clone(),
            size: spec.size,
            token: token.to_owned(),
            agent,
            files,
        };
        manifest::write(&dir, &self.key, &manifest)?;
        fs::File::open(&self.dir)?.sync_all()?;
        size(&dir)
    }

    /// Makes a VM's folder that the first start goes on from; the spec comes last and says that the rest is whole. On
    /// failure nothing is left.
    pub(super) fn create_from(
        &self,
        spec: &VmSpec,
        id: &SnapshotId,
        vm: &Path,
        manner: Manner,
    ) -> Result<(), EngineError> {
        let manifest = self.usable(id)?;
        fits(&manifest, spec)?;
        let made = self.make(spec, id, &manifest, vm, manner);
        if made.is_err() {
            // Already failing: what can't be removed now is a ruin that the next start of the server removes.
            let _ = folder::remove(vm);
        }
        made
    }

    fn make(
        &self,
        spec: &VmSpec,
        id: &SnapshotId,
        manifest: &Manifest,
        vm: &Path,
        manner: Manner,
    ) -> Result<(), EngineError> {
        let failed = |error| host_or_full("making the VM's folder", error);
        folder::remove(vm).map_err(failed)?;
        fs::DirBuilder::new().mode(0o700).create(vm).map_err(failed)?;
        fs::DirBuilder::new().mode(0o700).create(vm.join(MEMORY)).map_err(failed)?;
        let from = self.folder(id);
        let wrong = each(&manifest.files, |file| self.take(&from, file, vm)).map_err(failed)?;
        if let Some(how) = wrong.into_iter().flatten().next() {
            return Err(EngineError::BadSnapshot(damaged(&how)));
        }
        let restore = Restore {
            token: manifest.token.clone(),
            agent: manifest.agent.clone(),
            engine_version: manifest.engine_version.clone(),
            template: manner == Manner::Template,
        };
        launch::write(vm, RESTORE, &restore, false).map_err(failed)?;
        launch::write(vm, launch::SPEC, spec, true).map_err(failed)
    }

    /// Gives a VM one file of a snapshot: a copy of the disk, another name for the rest, which nobody changes. Tells what is
    /// wrong with it.
    fn take(&self, snapshot: &Path, file: &SealedFile, vm: &Path) -> io::Result<Option<String>> {
        let (from, to) = (snapshot.join(&file.path), vm.join(&file.path));
        let is_disk = file.path == DISK;
        match fs::metadata(&from) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Some(format!("{} is missing", file.path)));
            }
            Err(error) => return Err(error),
            Ok(meta) if meta.len() != file.length => return Ok(Some(format!("{} has another length", file.path))),
            Ok(meta) if self.is_trusted(&from, &meta) => {
                if is_disk {
                    disk::copy_sparse(&from, &to)?;
                }
            }
            Ok(_) => {
                let (_, hash) = hash(&self.key, &from, is_disk.then_some(&to))?;
                if hash != file.hash {
                    return Ok(Some(format!("{} has changed", file.path)));
                }
                self.trust(&from)?;
            }
        }
        if !is_disk && fs::hard_link(&from, &to).is_err() {
            // Another filesystem, or one without links.
            fs::copy(&from, &to)?;
        }
        Ok(None)
    }

    /// Remembers that a file is as it was sealed.
    fn trust(&self, path: &Path) -> io::Result<()> {
        if let Some(trusted) = &self.trusted {
            let identity = identity(&fs::metadata(path)?);
            trusted.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), identity);
        }
        Ok(())
    }

    fn is_trusted(&self, path: &Path, meta: &fs::Metadata) -> bool {
        let Some(trusted) = &self.trusted else { return false };
        trusted.lock().unwrap_or_else(PoisonError::into_inner).get(path) == Some(&identity(meta))
    }

    /// Whether there is one of that name, whatever its worth.
    pub(super) fn is_whole(&self, id: &SnapshotId) -> bool {
        self.folder(id).join(MANIFEST).exists()
    }

    /// Notes that one was used now.
    pub(super) fn touch(&self, id: &SnapshotId) -> io::Result<()> {
        fs::File::open(self.folder(id).join(MANIFEST))?.set_modified(SystemTime::now())
    }

    /// When one was made or used last.
    pub(super) fn used(&self, id: &SnapshotId) -> io::Result<SystemTime> {
        fs::metadata(self.folder(id).join(MANIFEST))?.modified()
    }

    /// What was saved; `None` where that can't be told.
    pub(super) fn of(&self, id: &SnapshotId) -> Option<Of> {
        let manifest = manifest::read(&self.folder(id), &self.key, id).ok()?.ok()?;
        Some(Of { image: manifest.image, kernel: manifest.kernel, size: manifest.size })
    }

    /// The manifest of a snapshot that this host can take up.
    fn usable(&self, id: &SnapshotId) -> Result<Manifest, EngineError> {
        let manifest = manifest::read(&self.folder(id), &self.key, id)
            .map_err(|e| EngineError::host("reading the snapshot", e))?
            .map_err(EngineError::BadSnapshot)?;
        let bad = |why: &str| Err(EngineError::BadSnapshot(why.to_owned()));
        self.releases.check(manifest.engine, &manifest.engine_version)?;
        let here = cpu_features().map_err(|e| EngineError::host("looking at the CPU", e))?;
        let missing: Vec<&str> = manifest.cpu.difference(&here).map(String::as_str).take(8).collect();
        if !missing.is_empty() {
            return bad(&format!("the snapshot was saved on a CPU that can more ({})", missing.join(", ")));
        }
        let agent = self.agents.join(&manifest.agent).join(".tiffin/tiffin-agent");
        if manifest.engine == EngineName::Gvisor && !agent.exists() {
            return bad("the snapshot's agent is gone from this host");
        }
        Ok(manifest)
    }

    /// Removes a snapshot, or what is left of one; absent is fine.
    pub(super) fn remove(&self, id: &SnapshotId) -> io::Result<()> {
        let dir = self.folder(id);
        if let Some(trusted) = &self.trusted {
            trusted.lock().unwrap_or_else(PoisonError::into_inner).retain(|path, _| !path.starts_with(&dir));
        }
        // First: a removal that is killed half-way leaves a ruin, not a snapshot.
        launch::remove(&dir, MANIFEST)?;
        // A save whose server was killed may still be writing.
        for _ in 0..3 {
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => return Ok(()),
            }
        }
        Err(io::ErrorKind::DirectoryNotEmpty.into())
    }

    /// The whole ones, and the ruins.
    fn all(&self) -> io::Result<(Vec<SnapshotId>, Vec<SnapshotId>)> {
        let names = fs::read_dir(&self.dir)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut ids: Vec<SnapshotId> = names.filter_map(|name| name.parse().ok()).collect();
        ids.sort();
        Ok(ids.into_iter().partition(|id| self.is_whole(id)))
    }

    pub(super) fn list(&self) -> io::Result<Vec<SnapshotId>> {
        self.all().map(|(whole, _)| whole)
    }

    /// Removes what killed saves and removals left.
    pub(super) fn remove_ruins(&self) -> io::Result<()> {
        for id in self.all()?.1 {
            if let Err(error) = self.remove(&id) {
                tracing::error!(snapshot_id = %id, "the ruin of {id} stays: {error}");
            }
        }
        Ok(())
    }

    /// The agents that snapshots need. One that can't be read needs none: it can't be restored.
    pub(super) fn agents(&self) -> io::Result<BTreeSet<String>> {
        let agent = |id: &SnapshotId| Some(manifest::read(&self.folder(id), &self.key, id).ok()?.ok()?.agent);
        Ok(self.all()?.0.iter().filter_map(agent).collect())
    }
}

/// Refuses a VM that isn't of the snapshot's image, kernel and size.
fn fits(manifest: &Manifest, spec: &VmSpec) -> Result<(), EngineError> {
    let (saved, asked) = (manifest.size, spec.size);
    for (what, saved, asked) in [
        ("CPUs", saved.cpus, asked.cpus),
        ("MiB of memory", saved.mem_mb, asked.mem_mb),
        ("MiB of disk", saved.disk_mb, asked.disk_mb),
    ] {
        if saved != asked {
            return Err(EngineError::Invalid(format!("the snapshot is of a VM with {saved} {what}, not {asked}")));
        }
    }
    if manifest.engine != spec.engine {
        return Err(EngineError::Invalid("the snapshot is of a VM of another engine".into()));
    }
    if manifest.image != spec.image {
        return Err(EngineError::Invalid("the snapshot is of a VM of another image".into()));
    }
    if manifest.kernel != spec.kernel {
        return Err(EngineError::Invalid("the snapshot is of a VM with another kernel".into()));
    }
    Ok(())
}

fn identity(meta: &fs::Metadata) -> Identity {
    (meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec())
}

/// The length and the hash of a file, which is copied on the way where `to` says so.
fn hash(key: &Key, from: &Path, to: Option<&PathBuf>) -> io::Result<(u64, String)> {
    let mut hasher = key.hasher();
    disk::copy_seen(from, to.map(PathBuf::as_path), |at, piece| {
        hasher.update(&at.to_le_bytes());
        hasher.update(&(piece.len() as u64).to_le_bytes());
        hasher.update(piece);
    })?;
    Ok((fs::metadata(from)?.len(), hasher.finalize().to_hex().to_string()))
}

/// Does something with each of a handful of files, at once.
fn each<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> io::Result<R> + Sync) -> io::Result<Vec<R>> {
    thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(|| work(one))).collect();
        let panicked = |_| Err(io::Error::other("a thread panicked"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    })
}

/// What the host's CPU says that it can do.
fn cpu_features() -> io::Result<BTreeSet<String>> {
    let told = fs::read_to_string("/proc/cpuinfo")?;
    let flags = told.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':').map(|(_, flags)| flags));
    Ok(flags.unwrap_or_default().split_whitespace().map(str::to_owned).collect())
}

/// The room that a folder takes on the disk, in bytes.
fn size(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() { size(&entry.path())? } else { meta.blocks() * 512 };
    }
    Ok(bytes)
}
