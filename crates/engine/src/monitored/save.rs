//! Saving VMs and making VMs of what was saved, from the server's side: the monitor does the first, the VM's folder
//! says the second to its first start.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use tiffin_types::{
    id::{SnapshotId, VmId},
    vm::{EngineName, VmSpec},
};

use super::{Monitored, blocking, host_or_full, snapshots::Manner, talk};
use crate::{
    Engine, EngineError, Observed, Saved,
    monitor::launch::{self, Ask, Launch, RESTORE, Reply, Restore},
};

/// A save, beside what its size takes.
const SAVE: Duration = Duration::from_secs(90);
/// What a save copies at least in a second, in MiB, on the slowest disk that one waits for.
const SLOWEST: u32 = 10;

impl Monitored {
    /// See [`Engine::create_from`].
    pub(super) async fn create_saved(&self, spec: &VmSpec, snapshot: &SnapshotId) -> Result<(), EngineError> {
        if self.is_made(spec)? {
            return Ok(());
        }
        self.require_snapshots(spec.engine)?;
        self.check_room()?;
        self.images.require(&spec.image)?;
        self.kernel_of(spec)?;
        let (snapshots, dir, spec, snapshot) =
            (Arc::clone(&self.snapshots), self.folder(&spec.id), spec.clone(), snapshot.clone());
        tokio::task::spawn_blocking(move || snapshots.create_from(&spec, &snapshot, &dir, Manner::Snapshot))
            .await
            .map_err(|e| EngineError::host("creating the VM's folder", e))?
    }

    /// See [`Engine::snapshot_save`].
    pub(super) async fn save(&self, id: &VmId, into: &SnapshotId) -> Result<Saved, EngineError> {
        match self.observe(id).await {
            Observed::Absent => return Err(EngineError::Absent),
            Observed::Stopped { .. } => return Err(EngineError::WrongState("stopped")),
            Observed::Starting => return Err(EngineError::WrongState("starting")),
            Observed::Unknown => return Err(EngineError::WrongState("not answering")),
            Observed::Running | Observed::Paused => {}
        }
        self.check_room()?;
        let launch = self.launch_of(id)?;
        self.require_snapshots(launch.engine)?;
        let dir = self.snapshots.begin(into)?;
        let saved = self.save_into(&launch, into, dir).await;
        if saved.is_err()
            && let Err(error) = self.snapshot_remove(into).await
        {
            tracing::warn!(snapshot_id = %into, "what a failed save left stays: {error}");
        }
        saved
    }

    fn require_snapshots(&self, engine: EngineName) -> Result<(), EngineError> {
        match self.capabilities(engine).snapshot {
            true => Ok(()),
            false => Err(EngineError::Unsupported { engine: engine.as_str(), what: "save and restore VMs" }),
        }
    }

    /// The release that would run a VM of that engine now.
    pub(super) async fn engine_version(&self, engine: EngineName) -> Result<String, EngineError> {
        let releases = Arc::clone(&self.releases);
        let asked = tokio::task::spawn_blocking(move || releases.of(engine)).await;
        asked.map_err(|e| EngineError::host("asking runsc its release", e))?
    }

    /// What the VM's next start goes on from, if it does, and the folder of the agent that it is to have.
    pub(super) fn restore_of(&self, spec: &VmSpec) -> Result<(Option<Restore>, PathBuf), EngineError> {
        let id = &spec.id;
        let restore: Option<Restore> = launch::read(&self.folder(id), RESTORE)
            .map_err(|e| EngineError::host(format!("reading what {id} goes on from"), e))?;
        let Some(restore) = restore else { return Ok((None, self.agent_dir.clone())) };
        if !restore.template {
            self.releases.check(spec.engine, &restore.engine_version)?;
        }
        let agent_dir = self.config.data_dir.join("agent").join(&restore.agent);
        Ok((Some(restore), agent_dir))
    }

    /// Has the monitor save the VM, and seals what it wrote.
    async fn save_into(&self, launch: &Launch, into: &SnapshotId, dir: PathBuf) -> Result<Saved, EngineError> {
        let id = &launch.spec.id;
        let within =
            SAVE + Duration::from_secs(u64::from((launch.spec.size.mem_mb + launch.spec.size.disk_mb) / SLOWEST));
        let paused = match talk::ask(&self.folder(id), &Ask::Save { into: dir }, within).await {
            Ok(Reply::Saved { paused_us }) => Duration::from_micros(paused_us),
            Ok(Reply::Unsavable { what }) => return Err(EngineError::WrongState(what.state())),
            Ok(Reply::Full) => return Err(EngineError::NoCapacity("the host's disk is full".into())),
            Ok(Reply::NotRunning) => return Err(EngineError::WrongState("not running")),
            Ok(Reply::Refused { message, .. }) => {
                return Err(EngineError::host(format!("saving {id}"), io::Error::other(message)));
            }
            Ok(_) => return Err(EngineError::WrongState("not answering")),
            Err(_) => return Err(self.silent(id)),
        };
        let (snapshots, into, launch) = (Arc::clone(&self.snapshots), into.clone(), launch.clone());
        let sealed = blocking(move || snapshots.seal(&into, &launch, &launch.token)).await;
        let size_bytes = sealed.map_err(|e| host_or_full("sealing the snapshot", e))?;
        Ok(Saved { size_bytes, paused })
    }
}
