//! Taking over what an earlier server left: the VMs, and the removal of what is of no use any more.
//!
//! Folders are looked through, and things removed, on threads for what blocks: there may be many, and an unmount takes
//! its time.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tiffin_types::{id::VmId, vm::VmSpec};

use super::{
    Monitored, agent, blocking,
    images::Images,
    leftovers,
    machines::{self, KERNELS},
    snapshots::Snapshots,
    templates::Templates,
};
use crate::{
    Engine, EngineError, Observed,
    host::cgroup::Cgroups,
    monitor::launch::{self, LAUNCH, Launch, RESTORE, Restore, SPEC},
};

impl Monitored {
    /// See [`Engine::adopt`].
    pub(super) async fn adopt_all(&self) -> Result<Vec<(VmId, Observed)>, EngineError> {
        let vms = self.config.data_dir.join("vms");
        let folder = vms.clone();
        let found = blocking(move || all(&folder)).await;
        let mut seen = Vec::new();
        for (id, is_whole) in found.map_err(|e| EngineError::host("reading the VMs' folder", e))? {
            if is_whole {
                seen.push((id.clone(), self.adopt_one(&id).await));
            } else if let Err(error) = self.destroy(&id).await {
                tracing::error!(vm_id = %id, "the ruin of {id} stays: {error}");
            }
        }
        let sweep = Sweep {
            vms,
            agent_dir: self.agent_dir.clone(),
            kernels: self.config.data_dir.join(KERNELS),
            initramfs: self.machines.as_ref().map(|machines| machines.files.initramfs.clone()),
            cgroups: self.cgroups.clone(),
            snapshots: Arc::clone(&self.snapshots),
            templates: self.templates.clone(),
            images: Arc::clone(&self.images),
        };
        let adopted = seen.clone();
        let swept = blocking(move || sweep.run(&adopted)).await;
        swept.map_err(|e| EngineError::host("clearing the snapshots' folder", e))?;
        Ok(seen)
    }

    async fn adopt_one(&self, id: &VmId) -> Observed {
        let observed = self.observe(id).await;
        match observed {
            Observed::Running | Observed::Paused | Observed::Starting | Observed::Unknown => {
                if let Ok(Launch { uplink: Some(uplink), .. }) = self.launch_of(id) {
                    self.uplinks.hold(id, uplink);
                }
                self.follow(id);
            }
            Observed::Stopped { .. } => {
                if let Err(error) = self.leftovers(id).clear().await {
                    tracing::warn!(vm = %id, "clearing what {id} left: {error}");
                }
            }
            Observed::Absent => {}
        }
        observed
    }
}

/// The VMs that have a folder, and whether it is whole: a create or a removal that was killed half-way leaves one without
/// a spec, of which nobody knows.
fn all(vms: &Path) -> io::Result<Vec<(VmId, bool)>> {
    let names = fs::read_dir(vms)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let ids = names.filter_map(|name| name.parse::<VmId>().ok());
    Ok(ids.map(|id| (id.clone(), vms.join(id.as_str()).join(SPEC).exists())).collect())
}

/// What removes what nothing needs any more.
struct Sweep {
    vms: PathBuf,
    agent_dir: PathBuf,
    kernels: PathBuf,
    /// The first files of machines from now on, where there are any.
    initramfs: Option<PathBuf>,
    cgroups: Cgroups,
    snapshots: Arc<Snapshots>,
    templates: Option<Arc<Templates>>,
    images: Arc<Images>,
}

impl Sweep {
    fn run(&self, seen: &[(VmId, Observed)]) -> io::Result<()> {
        leftovers::sweep_orphans(&self.cgroups, &self.vms);
        self.snapshots.remove_ruins()?;
        self.templates.as_ref().map_or(Ok(()), |templates| templates.sweep())?;
        if let Err(error) = self.remove_old_agents(seen) {
            tracing::warn!("old agents stay: {error}");
        }
        if let Err(error) = self.remove_old_kernels(seen) {
            tracing::warn!("old kernels stay: {error}");
        }
        let image = |id: &VmId| Some(launch::read::<VmSpec>(&self.folder(id), SPEC).ok()??.image);
        let used: Vec<_> = seen.iter().filter_map(|(id, _)| image(id)).collect();
        self.images.release_unused(&used);
        Ok(())
    }

    fn folder(&self, id: &VmId) -> PathBuf {
        self.vms.join(id.as_str())
    }

    /// Removes the agents that neither a VM nor a snapshot needs any more.
    fn remove_old_agents(&self, seen: &[(VmId, Observed)]) -> io::Result<()> {
        let mut needed = self.snapshots.agents()?;
        for (id, observed) in seen {
            let dir = self.folder(id);
            needed.extend(launch::read::<Restore>(&dir, RESTORE)?.map(|restore| restore.agent));
            if !matches!(observed, Observed::Stopped { .. } | Observed::Absent)
                && let Some(launch) = launch::read::<Launch>(&dir, LAUNCH)?
            {
                needed.extend(launch.agent_dir.file_name().and_then(|name| name.to_str()).map(str::to_owned));
            }
        }
        agent::remove_others(&self.agent_dir, &needed)
    }

    /// Removes the kernels that machines no longer boot, nor one that runs may still look at. A stopped VM boots what there is at its
    /// next start, and a snapshot has its kernel in its memory.
    fn remove_old_kernels(&self, seen: &[(VmId, Observed)]) -> io::Result<()> {
        // Its first files are always there, also where a VM boots a kernel of its image.
        let mut needed: Vec<PathBuf> = self.initramfs.iter().cloned().collect();
        for (id, observed) in seen {
            if !matches!(observed, Observed::Stopped { .. } | Observed::Absent)
                && let Some(Launch { machine: Some(files), .. }) = launch::read(&self.folder(id), LAUNCH)?
            {
                needed.push(files.initramfs);
            }
        }
        let folders = needed.iter().filter_map(|file| Some(file.parent()?.file_name()?.to_owned()));
        machines::remove_others(&self.kernels, &folders.collect())
    }
}
