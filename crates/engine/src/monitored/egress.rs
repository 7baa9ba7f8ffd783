//! Changing what a VM may reach, from the server's side: the folder first, as the intent, then the monitor.
//!
//! `launch.json` names the uplink before it is used, so that a server that is killed in between leaves none that the next
//! could give to another VM.

use std::io;

use tiffin_types::{id::VmId, network::EgressPolicy, vm::VmSpec};

use super::{FREEZE, Monitored, blocking, folder, host_or_full, talk};
use crate::{
    Engine, EngineError, Observed,
    monitor::launch::{self, Ask, LAUNCH, Launch, Reply, SPEC},
};

/// What became of a running VM's policy.
enum Changed {
    Done,
    No(EngineError),
    Unknown(EngineError),
}

impl Monitored {
    /// See [`Engine::set_egress`].
    pub(super) async fn change_egress(&self, id: &VmId, egress: &EgressPolicy) -> Result<(), EngineError> {
        let spec = self.spec(id)?;
        match self.observe(id).await {
            Observed::Absent => Err(EngineError::Absent),
            Observed::Stopped { .. } => self.write(VmSpec { egress: egress.clone(), ..spec }, None).await,
            Observed::Starting => Err(EngineError::WrongState("starting")),
            Observed::Unknown => Err(EngineError::WrongState("not answering")),
            Observed::Running | Observed::Paused => self.change_running(spec, egress).await,
        }
    }

    async fn change_running(&self, old_spec: VmSpec, egress: &EgressPolicy) -> Result<(), EngineError> {
        let id = &old_spec.id;
        let old = self.launch_of(id)?;
        let uplink = match (egress.allows_something(), old.uplink) {
            (false, _) => None,
            (true, Some(uplink)) => Some(uplink),
            (true, None) => Some(self.uplinks.take(id).await?),
        };
        let spec = VmSpec { egress: egress.clone(), ..old_spec.clone() };
        let new = Launch { spec: spec.clone(), uplink, ..old.clone() };
        let result = self.change_to(&old_spec, spec, &old, new, uplink.is_none()).await;
        // A VM that ended meanwhile has had its addresses freed before they were taken.
        if result.is_err() && old.uplink.is_none() && matches!(folder::monitor(&self.folder(id)), Ok(None)) {
            self.uplinks.free(id);
        }
        result
    }

    async fn change_to(
        &self,
        old_spec: &VmSpec,
        spec: VmSpec,
        old: &Launch,
        new: Launch,
        frees: bool,
    ) -> Result<(), EngineError> {
        let id = &old_spec.id;
        let changed = match self.write(spec, Some(new)).await {
            Ok(()) => Ok(self.ask_egress(id).await),
            Err(error) => Err(error),
        };
        match changed {
            Ok(Changed::Done) => {
                if frees {
                    self.uplinks.free(id);
                }
                Ok(())
            }
            Ok(Changed::No(error)) | Err(error) => {
                self.put_back(old_spec, old).await;
                Err(error)
            }
            // Nobody knows which policy is in force: the new one is the VM's, and the caller's to try again.
            Ok(Changed::Unknown(error)) => Err(error),
        }
    }

    async fn put_back(&self, spec: &VmSpec, launch: &Launch) {
        let id = &spec.id;
        match self.write(spec.clone(), Some(launch.clone())).await {
            Ok(()) if launch.uplink.is_none() => self.uplinks.free(id),
            Ok(()) => {}
            Err(error) => tracing::error!(vm_id = %id, "the network policy of {id} could not be put back: {error}"),
        }
    }

    async fn ask_egress(&self, id: &VmId) -> Changed {
        match talk::ask(&self.folder(id), &Ask::Egress, FREEZE).await {
            Ok(Reply::Done) => Changed::Done,
            Ok(Reply::NotRunning) => Changed::No(EngineError::WrongState("not running")),
            Ok(Reply::Refused { message, .. }) => {
                Changed::No(EngineError::host(format!("changing what {id} may reach"), io::Error::other(message)))
            }
            Ok(_) => Changed::Unknown(EngineError::WrongState("not answering")),
            Err(_) => Changed::Unknown(self.silent(id)),
        }
    }

    /// Writes the spec and, where the VM is up, its start; on a thread for that, as the spec waits for the disk.
    async fn write(&self, spec: VmSpec, launch: Option<Launch>) -> Result<(), EngineError> {
        let dir = self.folder(&spec.id);
        let written = blocking(move || {
            launch::write(&dir, SPEC, &spec, true)?;
            launch.map_or(Ok(()), |launch| launch::write(&dir, LAUNCH, &launch, false))
        });
        written.await.map_err(|e| host_or_full("writing the VM's policy", e))
    }
}
