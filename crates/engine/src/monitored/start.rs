//! Starting a VM: from nothing, from what was saved, or from a template; and what comes of a template that fails.

use std::time::Instant;

use tiffin_types::{
    id::VmId,
    vm::{EndReason, EngineName, VmSpec},
};

use super::{ANSWER, MONITOR_MARGIN, Monitored, blocking, folder, host_or_full};
use crate::{
    Engine, EngineError, Observed, Started,
    host::mount::wait_detached,
    monitor::launch::{self, DISK, END, LAUNCH, Launch, RUN, Restore},
};

impl Monitored {
    /// See [`Engine::start`].
    pub(super) async fn start_vm(&self, id: &VmId) -> Result<Started, EngineError> {
        let begun = Instant::now();
        let spec = self.spec(id)?;
        let (restore, _) = self.restore_of(&spec)?;
        let is_new = restore.is_none() && folder::end(&self.folder(id)).is_none();
        let mut started = self.start_from(&spec, restore.as_ref(), is_new).await;
        let mut from_saved = restore.is_some();
        if let Err(EngineError::Ended(report)) = &started
            && restore.is_some_and(|restore| restore.template)
            && report.reason != EndReason::Requested
        {
            tracing::warn!(vm_id = %id, "{id} did not go on from its template, and boots: {}", report.message);
            self.forget_template(&spec).await?;
            from_saved = false;
            started = self.start_from(&spec, None, true).await;
        }
        started.map(|()| Started { took: begun.elapsed(), from_saved })
    }

    /// Starts a VM, once. One that is new and boots may leave a template.
    async fn start_from(&self, spec: &VmSpec, restore: Option<&Restore>, is_new: bool) -> Result<(), EngineError> {
        let id = &spec.id;
        match self.observe(id).await {
            Observed::Stopped { .. } => {}
            Observed::Running | Observed::Paused | Observed::Starting => {
                return Err(EngineError::WrongState("running"));
            }
            Observed::Absent => return Err(EngineError::Absent),
            Observed::Unknown => return Err(EngineError::WrongState("not answering")),
        }
        // The run before may still be cleared away.
        if let Some(before) = self.watch(id) {
            let over = tokio::time::timeout(MONITOR_MARGIN, before.ended()).await;
            over.map_err(|_| EngineError::WrongState("not answering"))?;
        }
        self.check_room()?;
        self.require_engine(spec.engine)?;
        let mut launch = self.launch_for(spec, restore).await?;
        let templates = self.templates_of(spec.engine).filter(|_| is_new);
        launch.template = templates.as_ref().and_then(|templates| templates.begin(spec));
        let started = self.start_and_wait(&launch).await;
        if let (Some(templates), Some(_)) = (templates, &launch.template) {
            let came_up = started.is_ok();
            self.tasks.spawn_blocking(move || templates.finish(&launch, came_up));
        }
        started
    }

    /// All that the VM's monitor needs to know.
    async fn launch_for(&self, spec: &VmSpec, restore: Option<&Restore>) -> Result<Launch, EngineError> {
        let id = &spec.id;
        // First, as it has the engine's program asked on a thread for that where its release isn't known yet.
        let engine_version = self.engine_version(spec.engine).await?;
        let (_, agent_dir) = self.restore_of(spec)?;
        let (image, machine) = match &self.machines {
            Some(machines) if spec.engine == EngineName::Qemu => {
                (self.images.file(&spec.image)?, Some(machines.files_with(self.kernel_of(spec)?)))
            }
            _ => (self.images.mounted(&spec.image, &self.folder(id)).await?, None),
        };
        let uplink = if spec.egress.allows_something() { Some(self.uplinks.take(id).await?) } else { None };
        Ok(Launch {
            engine: spec.engine,
            spec: spec.clone(),
            machine,
            image,
            agent_dir,
            runsc: self.config.runsc.clone().unwrap_or_default(),
            uplink,
            uplinks: Some(self.config.uplinks),
            resolvers: self.config.resolvers.clone(),
            token: hex::encode(rand::random::<[u8; 32]>()),
            boot_timeout_ms: u64::try_from(self.config.boot_timeout.as_millis()).unwrap_or(u64::MAX),
            engine_version,
            log: Some(self.log_keep(id)),
            restore: restore.cloned(),
            template: None,
        })
    }

    async fn start_and_wait(&self, launch: &Launch) -> Result<(), EngineError> {
        let id = &launch.spec.id;
        if let Err(error) = self.start_monitor(id, launch).await {
            self.uplinks.free(id);
            return Err(error);
        }
        let watch = self.follow(id);
        watch.claim();
        if tokio::time::timeout(self.config.boot_timeout + MONITOR_MARGIN, watch.ready()).await.is_err() {
            self.kill_monitor(id).await;
        }
        match watch.ended_now() {
            None if watch.is_ready() => {
                watch.release();
                Ok(())
            }
            _ => {
                let report = watch.ended().await;
                self.log_cause(id, &report);
                Err(EngineError::Ended(report))
            }
        }
    }

    async fn start_monitor(&self, id: &VmId, launch: &Launch) -> Result<(), EngineError> {
        let dir = self.folder(id);
        let disk = dir.join(DISK);
        blocking(move || wait_detached(&disk, ANSWER))
            .await
            .map_err(|e| EngineError::host("waiting for the disk", e))?;
        for last in [END, RUN] {
            launch::remove(&dir, last).map_err(|e| EngineError::host("forgetting the last run", e))?;
        }
        launch::write(&dir, LAUNCH, launch, false).map_err(|e| host_or_full("writing the start", e))?;
        folder::spawn_monitor(&self.config.monitor, &dir).await
    }

    /// Removes a template from which a VM didn't come up, and gives that VM, in which nothing has run, a disk to boot on.
    async fn forget_template(&self, spec: &VmSpec) -> Result<(), EngineError> {
        // What is left of the failed start is cleared away first.
        if let Some(before) = self.watch(&spec.id) {
            let _ = tokio::time::timeout(MONITOR_MARGIN, before.ended()).await;
        }
        let (dir, disks, templates) = (self.folder(&spec.id), self.disks(), self.templates_of(spec.engine));
        let spec = spec.clone();
        let renewed = blocking(move || {
            if let Some(templates) = templates {
                templates.reject(&spec);
            }
            folder::renew_disk(&dir, &spec, &disks)
        });
        renewed.await.map_err(|e| host_or_full("making the VM's disk", e))
    }
}
