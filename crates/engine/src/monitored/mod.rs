//! The engine whose VMs each live under a monitor: the server's side of it.
//!
//! It holds nothing that matters: what a VM is stands in its folder, what it does its monitor knows. Losing this process
//! loses nothing, and [`Monitored::adopt`] is how another one goes on.

mod adopt;
mod agent;
mod clean;
mod config;
mod egress;
mod folder;
mod images;
mod leftovers;
mod machines;
mod program;
mod releases;
mod save;
mod snapshots;
mod start;
mod stream;
mod talk;
mod templates;
mod uplinks;
mod watch;

use std::{
    collections::{HashMap, hash_map::Entry},
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tiffin_protocol::AGENT_PORT;
use tiffin_types::{
    id::{Digest, SnapshotId, VmId},
    network::EgressPolicy,
    vm::{EndReport, EngineName, VmSpec},
};
use tokio::sync::mpsc;

pub use self::{
    clean::{Cleaned, clean},
    config::{HostConfig, MachinesConfig},
};
use self::{
    images::Images, leftovers::Leftovers, machines::Machines, releases::Releases, snapshots::Snapshots,
    stream::GuestStream, templates::Templates, uplinks::Uplinks, watch::Watch,
};
use crate::{
    Connection, Denied, Ended, Engine, EngineError, Kind, LogKind, LogTail, Observed, Saved, Started, Target,
    host::{cgroup::Cgroups, disk, filter, mount::free_bytes},
    monitor::{
        launch::{self, Ask, END, LAUNCH, LOGS, Launch, LogKeep, Phase, Reply, SPEC},
        log,
    },
};

/// How much longer than the guest a monitor may take to come up or go down.
const MONITOR_MARGIN: Duration = Duration::from_secs(15);
/// A pause or a resume; the engine's tool has 20 s for it.
const FREEZE: Duration = Duration::from_secs(25);
/// An answer that needs no work in the guest.
const ANSWER: Duration = Duration::from_secs(5);
/// The snapshots' folder in the data folder.
const SNAPSHOTS: &str = "snapshots";
/// Ends that nobody has asked for yet.
const ENDS: usize = 4096;

/// See the module.
pub struct Monitored {
    config: Arc<HostConfig>,
    cgroups: Cgroups,
    images: Arc<Images>,
    /// The folder that is laid over every guest's root: it holds the agent.
    agent_dir: PathBuf,
    releases: Arc<Releases>,
    snapshots: Arc<Snapshots>,
    templates: Option<Arc<Templates>>,
    kinds: Vec<Kind>,
    default_kind: Kind,
    machines: Option<Machines>,
    watches: Arc<Mutex<HashMap<VmId, Watch>>>,
    uplinks: Uplinks,
    ends: mpsc::Sender<Ended>,
    ended: tokio::sync::Mutex<mpsc::Receiver<Ended>>,
    tasks: tokio_util::task::TaskTracker,
}

impl Monitored {
    /// Prepares the host: folders, the host's packet filter. Touches no VM.
    ///
    /// # Errors
    /// [`EngineError::Host`], naming what failed.
    pub fn open(config: HostConfig) -> Result<Self, EngineError> {
        let make = |dir: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(|e| EngineError::host(format!("making {}", dir.display()), e))
        };
        make(&config.data_dir.join("vms"))?;
        make(&config.run_dir)?;
        // The kernel names mounts and loop devices by paths without symbolic links.
        let real =
            |dir: &Path| dir.canonicalize().map_err(|e| EngineError::host(format!("looking up {}", dir.display()), e));
        let config = HostConfig { data_dir: real(&config.data_dir)?, run_dir: real(&config.run_dir)?, ..config };
        disk::clear_unfinished(&config.data_dir.join("templates"));
        let cgroups = Cgroups::detect().map_err(|e| EngineError::host("looking for control groups", e))?;
        filter::apply_host(config.uplinks).map_err(|e| EngineError::host("setting the host's packet filter", e))?;
        let (ends, ended) = mpsc::channel(ENDS);
        let machines = config.machines.as_ref().map(|machines| Machines::set_up(machines, &config)).transpose()?;
        let kinds = machines::kinds(config.runsc.as_deref(), machines.as_ref());
        let is_default = |kind: &&Kind| kind.name == config.engine;
        let default_kind = *kinds.iter().find(is_default).ok_or_else(|| {
            let lacks = match config.engine {
                EngineName::Qemu => "no kernel is named: set qemu.kernel",
                _ => "there is no runsc: install it, or name it with the setting runsc",
            };
            EngineError::Invalid(format!("engine = {}: {lacks}", config.engine.as_str()))
        })?;
        let release = machines.as_ref().map(|machines| machines.release.clone());
        let releases = Arc::new(Releases::new(config.runsc.clone(), release));
        let template = |machines: &Machines| {
            let opened = Templates::open(&config, Arc::clone(&releases), &machines.kernel, &machines.release);
            opened.map(Arc::new).map_err(|e| EngineError::host("opening the templates' folder", e))
        };
        Ok(Self {
            templates: machines.as_ref().map(template).transpose()?,
            kinds,
            default_kind,
            machines,
            images: Arc::new(Images::new(&config)),
            agent_dir: agent::install(&config.agent, &config.data_dir)
                .map_err(|e| EngineError::host(format!("installing the agent {}", config.agent.display()), e))?,
            snapshots: Arc::new(
                Snapshots::open(config.data_dir.join(SNAPSHOTS), &config, Arc::clone(&releases))
                    .map_err(|e| EngineError::host("opening the snapshots' folder", e))?,
            ),
            releases,
            uplinks: Uplinks::new(config.uplinks),
            config: Arc::new(config),
            cgroups,
            watches: Arc::default(),
            ends,
            ended: tokio::sync::Mutex::new(ended),
            tasks: tokio_util::task::TaskTracker::new(),
        })
    }

    fn folder(&self, id: &VmId) -> PathBuf {
        self.config.data_dir.join("vms").join(id.as_str())
    }

    /// Where disks as new are, to be copied.
    fn disks(&self) -> PathBuf {
        self.config.data_dir.join("templates")
    }

    /// The templates, where VMs of that engine have some.
    fn templates_of(&self, engine: EngineName) -> Option<Arc<Templates>> {
        self.templates.clone().filter(|_| engine == EngineName::Qemu)
    }

    /// Where the VM's program's output goes.
    fn log_keep(&self, id: &VmId) -> LogKeep {
        LogKeep::new(self.config.data_dir.join(LOGS).join(id.as_str()), self.config.logs)
    }

    fn spec(&self, id: &VmId) -> Result<VmSpec, EngineError> {
        launch::read(&self.folder(id), SPEC)
            .map_err(|e| EngineError::host(format!("reading the spec of {id}"), e))?
            .ok_or(EngineError::Absent)
    }

    fn launch_of(&self, id: &VmId) -> Result<Launch, EngineError> {
        launch::read(&self.folder(id), LAUNCH)
            .map_err(|e| EngineError::host(format!("reading the last start of {id}"), e))?
            .ok_or(EngineError::WrongState("stopped"))
    }

    fn check_room(&self) -> Result<(), EngineError> {
        let free = free_bytes(&self.config.data_dir).map_err(|e| EngineError::host("looking for free space", e))? >> 20;
        if free < self.config.min_free_disk_mb {
            return Err(EngineError::NoCapacity(format!(
                "{free} MiB of disk are free, {} must stay so",
                self.config.min_free_disk_mb
            )));
        }
        Ok(())
    }

    fn watch(&self, id: &VmId) -> Option<Watch> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// The end of the run that `watch` follows, taken by the caller: it isn't sent to [`Engine::next_end`].
    async fn taken_end(&self, watch: &Watch, within: Duration) -> Option<EndReport> {
        watch.claim();
        tokio::time::timeout(within, watch.ended()).await.ok()
    }

    /// Kills a monitor that doesn't answer, and with it all of its VM.
    async fn kill_monitor(&self, id: &VmId) {
        if let Ok(Some(process)) = folder::monitor(&self.folder(id)) {
            tracing::warn!(vm = %id, "killing the monitor of {id}, which doesn't answer");
            process.kill();
        }
    }
}

/// Runs what blocks on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn host_or_full(context: &str, error: io::Error) -> EngineError {
    if error.kind() == io::ErrorKind::StorageFull {
        return EngineError::NoCapacity("the host's disk is full".into());
    }
    EngineError::host(context, error)
}

#[async_trait]
impl Engine for Monitored {
    fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    fn default_kind(&self) -> Kind {
        self.default_kind
    }

    async fn create(&self, spec: &VmSpec) -> Result<(), EngineError> {
        if self.is_made(spec)? {
            return Ok(());
        }
        self.require_engine(spec.engine)?;
        self.check_room()?;
        self.images.require(&spec.image)?;
        self.kernel_of(spec)?;
        let dir = self.folder(&spec.id);
        let (spec, disks) = (spec.clone(), self.disks());
        let templates = self.templates_of(spec.engine);
        let make = move || match templates.map(|templates| templates.create(&spec, &dir)).transpose()? {
            Some(true) => Ok(()),
            Some(false) | None => folder::create(&dir, &spec, &disks),
        };
        tokio::task::spawn_blocking(make).await.map_err(|e| EngineError::host("creating the VM's folder", e))?
    }

    async fn start(&self, id: &VmId) -> Result<Started, EngineError> {
        self.start_vm(id).await
    }

    async fn program_start(&self, id: &VmId) -> Result<(), EngineError> {
        self.start_program(id).await
    }

    async fn create_from(&self, spec: &VmSpec, snapshot: &SnapshotId) -> Result<(), EngineError> {
        self.create_saved(spec, snapshot).await
    }

    async fn snapshot_save(&self, id: &VmId, into: &SnapshotId) -> Result<Saved, EngineError> {
        self.save(id, into).await
    }

    async fn snapshot_remove(&self, snapshot: &SnapshotId) -> Result<(), EngineError> {
        let (snapshots, id) = (Arc::clone(&self.snapshots), snapshot.clone());
        let removed = blocking(move || snapshots.remove(&id)).await;
        removed.map_err(|e| EngineError::host(format!("removing {snapshot}"), e))
    }

    async fn snapshot_list(&self) -> Result<Vec<SnapshotId>, EngineError> {
        let snapshots = Arc::clone(&self.snapshots);
        blocking(move || snapshots.list()).await.map_err(|e| EngineError::host("listing the snapshots", e))
    }

    async fn set_egress(&self, id: &VmId, egress: &EgressPolicy) -> Result<(), EngineError> {
        self.change_egress(id, egress).await
    }

    async fn stop(&self, id: &VmId, grace: Duration) -> Result<EndReport, EngineError> {
        let Some(watch) = self.watch_or_follow(id) else {
            let end = launch::read(&self.folder(id), END).map_err(|e| EngineError::host("reading the end", e))?;
            return match end {
                Some(report) => Ok(report),
                None if self.folder(id).join(SPEC).exists() => Err(EngineError::WrongState("stopped")),
                None => Err(EngineError::Absent),
            };
        };
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        watch.claim();
        let folder = self.folder(id);
        let asked = talk::ask(&folder, &Ask::Stop { grace_ms }, grace + MONITOR_MARGIN).await;
        if asked.is_err() && watch.ended_now().is_none() {
            self.kill_monitor(id).await;
        }
        let end = self.taken_end(&watch, MONITOR_MARGIN).await;
        if end.is_none() {
            watch.release();
        }
        end.ok_or(EngineError::WrongState("not answering"))
    }

    async fn pause(&self, id: &VmId) -> Result<(), EngineError> {
        self.freeze(id, &Ask::Pause).await
    }

    async fn resume(&self, id: &VmId) -> Result<(), EngineError> {
        self.freeze(id, &Ask::Resume).await
    }

    async fn destroy(&self, id: &VmId) -> Result<(), EngineError> {
        // First of all: a monitor that is on its way up writes who it is and then looks for this, so either it finds nothing
        // and gives up, or it is found below.
        launch::remove(&self.folder(id), SPEC).map_err(|e| EngineError::host(format!("removing {id}"), e))?;
        if let Some(watch) = self.watch(id) {
            watch.claim();
            let asked = talk::ask(&self.folder(id), &Ask::Kill, ANSWER).await;
            if asked.is_err() && watch.ended_now().is_none() {
                self.kill_monitor(id).await;
            }
            self.taken_end(&watch, MONITOR_MARGIN).await;
        }
        // One that isn't followed yet; the watch may be of the run before.
        if let Ok(Some(process)) = folder::monitor(&self.folder(id)) {
            process.kill();
        }
        let cleared = self.leftovers(id).clear().await;
        cleared.map_err(|e| EngineError::host(format!("clearing what {id} left"), e))?;
        let dir = self.folder(id);
        blocking(move || folder::remove(&dir)).await.map_err(|e| EngineError::host(format!("removing {id}"), e))
    }

    async fn observe(&self, id: &VmId) -> Observed {
        let dir = self.folder(id);
        if !dir.join(SPEC).exists() {
            return Observed::Absent;
        }
        match talk::ask(&dir, &Ask::Phase, ANSWER).await {
            Ok(Reply::Phase { phase: Phase::Starting }) => Observed::Starting,
            Ok(Reply::Phase { phase: Phase::Running }) => Observed::Running,
            Ok(Reply::Phase { phase: Phase::Paused }) => Observed::Paused,
            Ok(_) => Observed::Unknown,
            Err(_) => match folder::monitor(&dir) {
                Ok(Some(_)) => Observed::Unknown,
                Ok(None) => Observed::Stopped { end: folder::end(&dir) },
                Err(_) => Observed::Unknown,
            },
        }
    }

    async fn adopt(&self) -> Result<Vec<(VmId, Observed)>, EngineError> {
        self.adopt_all().await
    }

    async fn image_release(&self, image: &Digest) -> Result<bool, EngineError> {
        if let Some(templates) = self.templates.clone() {
            let image = image.clone();
            let forgotten = tokio::task::spawn_blocking(move || templates.forget(&image)).await;
            forgotten.map_err(|e| EngineError::host("removing an image's templates", e))?;
        }
        self.images.let_go(image, &self.config.data_dir.join("vms")).await
    }

    async fn dial(&self, id: &VmId, target: Target) -> Result<Connection, EngineError> {
        let port = match target {
            Target::Agent => AGENT_PORT,
            Target::Port(AGENT_PORT) => {
                return Err(EngineError::Invalid("the agent's port is not for dialling".into()));
            }
            Target::Port(port) => port,
        };
        let watch = self.watch_or_follow(id).ok_or(EngineError::WrongState("not running"))?;
        let stream = talk::dial(&self.folder(id), port).await?;
        Ok(Box::pin(GuestStream::new(stream, watch.over())))
    }

    async fn agent_token(&self, id: &VmId) -> Result<String, EngineError> {
        self.launch_of(id).map(|launch| launch.token)
    }

    async fn next_end(&self) -> Ended {
        match self.ended.lock().await.recv().await {
            Some(ended) => ended,
            // The engine itself holds a sender, so the channel doesn't close while it lives.
            None => std::future::pending().await,
        }
    }

    async fn log_tail(&self, id: &VmId, kind: LogKind, lines: usize) -> Result<LogTail, EngineError> {
        let dir = self.folder(id);
        if !dir.exists() {
            return Err(EngineError::Absent);
        }
        blocking(move || log::tail(&dir, kind, lines)).await.map_err(|e| EngineError::host("reading a log", e))
    }

    async fn denied(&self, id: &VmId) -> Result<Denied, EngineError> {
        match talk::ask(&self.folder(id), &Ask::Denied, ANSWER).await {
            Ok(Reply::Denied { denied }) => Ok(denied),
            Ok(_) => Err(EngineError::WrongState("not answering")),
            Err(_) => Err(self.silent(id)),
        }
    }
}

impl Monitored {
    fn require_engine(&self, name: EngineName) -> Result<(), EngineError> {
        match self.kind(name) {
            Some(_) => Ok(()),
            None => Err(EngineError::Invalid(format!("this host has no engine {}", name.as_str()))),
        }
    }

    /// The kernel that the VM's image came with, if it did.
    fn kernel_of(&self, spec: &VmSpec) -> Result<Option<PathBuf>, EngineError> {
        let Some(kernel) = &spec.kernel else { return Ok(None) };
        match self.capabilities(spec.engine).kernels {
            true => self.images.kernel(kernel).map(Some),
            false => Err(EngineError::Unsupported { engine: spec.engine.as_str(), what: "boot kernels of images" }),
        }
    }

    /// Whether the VM is there already, with this spec.
    fn is_made(&self, spec: &VmSpec) -> Result<bool, EngineError> {
        match launch::read::<VmSpec>(&self.folder(&spec.id), SPEC) {
            Ok(Some(existing)) if existing == *spec => Ok(true),
            Ok(Some(_)) => Err(EngineError::Invalid("another VM has this id".into())),
            Ok(None) | Err(_) => Ok(false),
        }
    }

    async fn freeze(&self, id: &VmId, ask: &Ask) -> Result<(), EngineError> {
        match talk::ask(&self.folder(id), ask, FREEZE).await {
            Ok(Reply::Done) => Ok(()),
            Ok(Reply::NotRunning) => Err(EngineError::WrongState("not running")),
            Ok(Reply::Refused { message, .. }) => {
                Err(EngineError::host(format!("pausing or resuming {id}"), io::Error::other(message)))
            }
            Ok(_) => Err(EngineError::WrongState("not answering")),
            Err(_) => Err(self.silent(id)),
        }
    }

    /// What it means that a VM's monitor gave no answer.
    fn silent(&self, id: &VmId) -> EngineError {
        match folder::monitor(&self.folder(id)) {
            Ok(None) => EngineError::WrongState("stopped"),
            Ok(Some(_)) | Err(_) => EngineError::WrongState("not answering"),
        }
    }

    /// What the report doesn't say, as it may name things of the host, is for the server's log.
    fn log_cause(&self, id: &VmId, report: &EndReport) {
        let tail = |kind| log::tail(&self.folder(id), kind, 3).map(|tail| tail.lines).unwrap_or_default();
        let (errors, console) = (tail(LogKind::EngineErrors), tail(LogKind::Console));
        tracing::warn!(vm_id = %id, ?errors, ?console, "VM {id} did not come up: {}", report.message);
    }

    /// The watch of the VM's run. A monitor that nobody follows yet (its start was cut short) is followed from now on.
    fn watch_or_follow(&self, id: &VmId) -> Option<Watch> {
        self.watch(id).or_else(|| match folder::monitor(&self.folder(id)) {
            Ok(Some(_)) => Some(self.follow(id)),
            Ok(None) | Err(_) => None,
        })
    }

    /// Follows the VM's monitor, unless it is followed already.
    fn follow(&self, id: &VmId) -> Watch {
        let watch = match self.watches.lock().unwrap_or_else(PoisonError::into_inner).entry(id.clone()) {
            Entry::Occupied(followed) => return followed.get().clone(),
            Entry::Vacant(free) => free.insert(Watch::new(self.ends.clone())).clone(),
        };
        let (watches, leftovers, gone) = (Arc::clone(&self.watches), self.leftovers(id), id.clone());
        let clear = move || async move {
            if let Err(error) = leftovers.clear().await {
                tracing::warn!(vm = %gone, "clearing what {gone} left: {error}");
            }
            watches.lock().unwrap_or_else(PoisonError::into_inner).remove(&gone);
        };
        self.tasks.spawn(watch::follow(watch.clone(), id.clone(), self.folder(id), clear));
        watch
    }

    fn leftovers(&self, id: &VmId) -> Leftovers {
        Leftovers {
            id: id.clone(),
            group: self.cgroups.group(id),
            folder: self.folder(id),
            uplinks: self.uplinks.clone(),
        }
    }
}
