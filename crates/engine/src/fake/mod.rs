//! The fake engine: scripted, in process, for tests of the layers above. Isolates nothing, runs no real command.
//!
//! Invariant: it keeps to the contract of [`Engine`] as a real engine would, and notices callers that don't
//! ([`Fake::overlaps`]). A `Fake` outlives the server that uses it, so a test can drop the server, start another over
//! the same `Fake` and see it adopt. It deliberately has no conveniences that a real engine lacks.

mod files;
mod guest;
mod knobs;
mod program;
mod scripts;
mod snapshots;
mod terminal;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tiffin_protocol::AGENT_PORT;
use tiffin_types::{
    id::{Digest, SnapshotId, VmId},
    network::EgressPolicy,
    vm::{EndReason, EndReport, EngineName, Isolation, VmSpec},
};
use tokio::{net::TcpStream, sync::Notify};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Capabilities, Connection, Denied, Ended, Engine, EngineError, Kind, LogKind, LogTail, Observed, Saved, Started,
    Target,
};
pub use files::FilesEnd;
pub use guest::{Script, TOKEN};
pub use knobs::Call;
pub use program::{FakeProgram, Printed};
use snapshots::{FakeSnapshot, Texts};

/// The engine.
pub struct Fake {
    kinds: Vec<Kind>,
    shared: Arc<Shared>,
    tasks: TaskTracker,
}

/// What the engine's tasks see of it.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    ended: Notify,
    released: Notify,
}

#[derive(Default)]
struct State {
    vms: BTreeMap<VmId, FakeVm>,
    /// Images that are held, since a VM of them was started.
    images: BTreeSet<Digest>,
    ends: VecDeque<Ended>,
    scripts: HashMap<String, Script>,
    /// What the last script's request was.
    last_script: Option<tiffin_protocol::Script>,
    programs: HashMap<String, FakeProgram>,
    printed: HashMap<VmId, Vec<(Printed, Vec<u8>)>>,
    /// Where programs' lines go, and who writes them.
    logs: Option<PathBuf>,
    log_writers: HashMap<VmId, tiffin_logs::Writer>,
    files: HashMap<VmId, files::Store>,
    files_ends: HashMap<String, FilesEnd>,
    unknown: BTreeSet<VmId>,
    failing: Vec<Call>,
    failing_starts: VecDeque<FailingStart>,
    start_delay: Duration,
    /// What doesn't end until it is released.
    held: Vec<Call>,
    /// Saves under way.
    saves: usize,
    snapshots: BTreeMap<SnapshotId, FakeSnapshot>,
    capacity: Option<usize>,
    denied: Denied,
    panic_on_denied: bool,
    hang_on_denied: bool,
    overlaps: usize,
    commands: usize,
}

/// A start that comes up wrongly.
struct FailingStart {
    /// Only of a VM with that much memory.
    mem_mb: Option<u32>,
    report: EndReport,
}

struct FakeVm {
    spec: VmSpec,
    phase: Phase,
    end: Option<EndReport>,
    /// Cancelled when the run ends; cuts the connections into the guest.
    run: CancellationToken,
    busy: bool,
    /// What commands wrote below `/dev/shm`: gone at the end of a run.
    memory: Texts,
    /// What commands wrote elsewhere: kept over a stop.
    disk: Texts,
    /// The memory that the first start goes on with, and whether the program runs in it.
    restore: Option<(Texts, bool)>,
    program_runs: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Stopped,
    Starting,
    Running,
    Paused,
}

impl FakeVm {
    fn new(spec: VmSpec) -> Self {
        let (memory, disk) = (Texts::new(), Texts::new());
        let run = CancellationToken::new();
        let (phase, end, restore) = (Phase::Stopped, None, None);
        Self { spec, phase, end, run, busy: false, memory, disk, restore, program_runs: false }
    }

    fn is_up(&self) -> bool {
        match self.phase {
            Phase::Starting | Phase::Running | Phase::Paused => true,
            Phase::Stopped => false,
        }
    }

    fn end_with(&mut self, report: EndReport) {
        self.phase = Phase::Stopped;
        self.end = Some(report);
        self.memory.clear();
        self.program_runs = false;
        self.run.cancel();
    }

    fn observed(&self) -> Observed {
        match self.phase {
            Phase::Stopped => Observed::Stopped { end: self.end.clone() },
            Phase::Starting => Observed::Starting,
            Phase::Running => Observed::Running,
            Phase::Paused => Observed::Paused,
        }
    }
}

impl State {
    /// The VM, for a call that must not overlap with another one.
    fn exclusive(&mut self, id: &VmId) -> Result<&mut FakeVm, EngineError> {
        let vm = self.vms.get_mut(id).ok_or(EngineError::Absent)?;
        if vm.busy {
            self.overlaps += 1;
        }
        Ok(vm)
    }

    fn fails(&mut self, call: Call) -> Result<(), EngineError> {
        match self.failing.iter().position(|failing| *failing == call) {
            Some(at) => {
                self.failing.remove(at);
                Err(EngineError::host(format!("a scripted failure of {call:?}"), "scripted"))
            }
            None => Ok(()),
        }
    }
}

impl Fake {
    /// An engine without VMs, that does everything at once and never fails.
    pub fn new() -> Arc<Self> {
        Self::of_kinds(vec![FAKE])
    }

    /// One that passes for those, of which there is one at least; the first is the default.
    pub fn of_kinds(kinds: Vec<Kind>) -> Arc<Self> {
        Arc::new(Self { kinds, shared: Arc::default(), tasks: TaskTracker::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits as long as such calls are held.
    async fn pass(&self, call: Call) {
        loop {
            let released = self.released.notified();
            if !self.lock().held.contains(&call) {
                return;
            }
            released.await;
        }
    }

    /// Marks the VM as starting, or tells why it can't.
    fn begin_start(&self, id: &VmId) -> Result<Duration, EngineError> {
        let mut state = self.lock();
        state.fails(Call::Start)?;
        let up = state.vms.values().filter(|vm| vm.is_up()).count();
        let (delay, capacity) = (state.start_delay, state.capacity.unwrap_or(usize::MAX));
        let vm = state.exclusive(id)?;
        match vm.phase {
            Phase::Running => return Err(EngineError::WrongState("running")),
            Phase::Starting => return Err(EngineError::WrongState("starting")),
            Phase::Paused => return Err(EngineError::WrongState("paused")),
            Phase::Stopped => {}
        }
        if up >= capacity {
            return Err(EngineError::NoCapacity(format!("{up} of {capacity} VMs run")));
        }
        (vm.phase, vm.busy, vm.end, vm.run) = (Phase::Starting, true, None, CancellationToken::new());
        let image = vm.spec.image.clone();
        state.images.insert(image);
        Ok(delay)
    }

    /// Whether it went on from a snapshot.
    fn finish_start(&self, id: &VmId) -> Result<bool, EngineError> {
        let mut state = self.lock();
        let mem_mb = state.vms.get(id).map(|vm| vm.spec.size.mem_mb);
        let fails = |start: &FailingStart| start.mem_mb.is_none() || start.mem_mb == mem_mb;
        let failing = state.failing_starts.iter().position(fails);
        let failure = failing.and_then(|at| state.failing_starts.remove(at)).map(|start| start.report);
        let vm = state.vms.get_mut(id).ok_or(EngineError::Absent)?;
        vm.busy = false;
        match failure {
            Some(report) => {
                vm.end_with(report.clone());
                Err(EngineError::Ended(report))
            }
            None => {
                vm.phase = Phase::Running;
                let restore = vm.restore.take();
                let from_saved = restore.is_some();
                (vm.memory, vm.program_runs) = restore.unwrap_or_default();
                Ok(from_saved)
            }
        }
    }
}

const FAKE: Kind = Kind {
    name: EngineName::Fake,
    isolation: Isolation::None,
    capabilities: Capabilities { pause: true, snapshot: true, kernels: true },
};

#[async_trait]
impl Engine for Fake {
    fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    fn default_kind(&self) -> Kind {
        self.kinds[0]
    }

    async fn create(&self, spec: &VmSpec) -> Result<(), EngineError> {
        let mut state = self.lock();
        state.fails(Call::Create)?;
        if spec.kernel.is_some() && !self.capabilities(spec.engine).kernels {
            return Err(EngineError::Unsupported { engine: spec.engine.as_str(), what: "boot kernels of images" });
        }
        if state.vms.contains_key(&spec.id) {
            let vm = state.exclusive(&spec.id)?;
            return if vm.spec == *spec { Ok(()) } else { Err(EngineError::WrongState("made with another spec")) };
        }
        state.vms.insert(spec.id.clone(), FakeVm::new(spec.clone()));
        Ok(())
    }

    async fn start(&self, id: &VmId) -> Result<Started, EngineError> {
        let began = Instant::now();
        let delay = self.shared.begin_start(id)?;
        let (shared, id) = (Arc::clone(&self.shared), id.clone());
        // In a task, so that a caller who gives up doesn't stop the start.
        let start = self.tasks.spawn(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            shared.pass(Call::Start).await;
            shared.finish_start(&id)
        });
        let from_saved = start.await.map_err(|error| EngineError::host("starting", error))??;
        Ok(Started { took: began.elapsed(), from_saved })
    }

    async fn program_start(&self, id: &VmId) -> Result<(), EngineError> {
        program::start(self, id).await
    }

    async fn create_from(&self, spec: &VmSpec, snapshot: &SnapshotId) -> Result<(), EngineError> {
        snapshots::create_from(&mut self.lock(), spec, snapshot)
    }

    async fn snapshot_save(&self, id: &VmId, into: &SnapshotId) -> Result<Saved, EngineError> {
        snapshots::begin_save(&mut self.lock(), id, into)?;
        let (shared, id, into) = (Arc::clone(&self.shared), id.clone(), into.clone());
        let save = self.tasks.spawn(async move {
            shared.pass(Call::SnapshotSave).await;
            snapshots::finish_save(&mut shared.lock(), &id, into)
        });
        save.await.map_err(|error| EngineError::host("saving", error))?
    }

    async fn snapshot_remove(&self, snapshot: &SnapshotId) -> Result<(), EngineError> {
        let mut state = self.lock();
        state.fails(Call::SnapshotRemove)?;
        state.snapshots.remove(snapshot);
        Ok(())
    }

    async fn snapshot_list(&self) -> Result<Vec<SnapshotId>, EngineError> {
        let mut state = self.lock();
        state.fails(Call::SnapshotList)?;
        Ok(state.snapshots.keys().cloned().collect())
    }

    async fn set_egress(&self, id: &VmId, egress: &EgressPolicy) -> Result<(), EngineError> {
        let mut state = self.lock();
        state.fails(Call::SetEgress)?;
        state.exclusive(id)?.spec.egress = egress.clone();
        Ok(())
    }

    async fn stop(&self, id: &VmId, _grace: Duration) -> Result<EndReport, EngineError> {
        let mut state = self.lock();
        state.fails(Call::Stop)?;
        let vm = state.exclusive(id)?;
        if !vm.is_up() {
            return Ok(vm.end.clone().unwrap_or_else(requested));
        }
        vm.end_with(requested());
        state.close_log(id);
        Ok(requested())
    }

    async fn pause(&self, id: &VmId) -> Result<(), EngineError> {
        let mut state = self.lock();
        state.fails(Call::Pause)?;
        let vm = state.exclusive(id)?;
        match vm.phase {
            Phase::Running | Phase::Paused => vm.phase = Phase::Paused,
            Phase::Starting => return Err(EngineError::WrongState("starting")),
            Phase::Stopped => return Err(EngineError::WrongState("stopped")),
        }
        Ok(())
    }

    async fn resume(&self, id: &VmId) -> Result<(), EngineError> {
        let mut state = self.lock();
        state.fails(Call::Resume)?;
        let vm = state.exclusive(id)?;
        match vm.phase {
            Phase::Running | Phase::Paused => vm.phase = Phase::Running,
            Phase::Starting => return Err(EngineError::WrongState("starting")),
            Phase::Stopped => return Err(EngineError::WrongState("stopped")),
        }
        Ok(())
    }

    async fn destroy(&self, id: &VmId) -> Result<(), EngineError> {
        let mut state = self.lock();
        state.fails(Call::Destroy)?;
        state.files.remove(id);
        state.close_log(id);
        if let Some(vm) = state.vms.remove(id) {
            vm.run.cancel();
        }
        Ok(())
    }

    async fn observe(&self, id: &VmId) -> Observed {
        let state = self.lock();
        if state.unknown.contains(id) {
            return Observed::Unknown;
        }
        state.vms.get(id).map_or(Observed::Absent, FakeVm::observed)
    }

    async fn adopt(&self) -> Result<Vec<(VmId, Observed)>, EngineError> {
        let mut state = self.lock();
        // Ends that nobody took are told by what is observed.
        state.ends.clear();
        let State { vms, images, .. } = &mut *state;
        images.retain(|image| vms.values().any(|vm| vm.spec.image == *image));
        let seen = |(id, vm): (&VmId, &FakeVm)| {
            let observed = if state.unknown.contains(id) { Observed::Unknown } else { vm.observed() };
            (id.clone(), observed)
        };
        Ok(state.vms.iter().map(seen).collect())
    }

    async fn image_release(&self, image: &Digest) -> Result<bool, EngineError> {
        self.shared.pass(Call::ImageRelease).await;
        let mut state = self.lock();
        state.fails(Call::ImageRelease)?;
        if state.vms.values().any(|vm| vm.spec.image == *image || vm.spec.kernel.as_ref() == Some(image)) {
            return Ok(false);
        }
        state.images.remove(image);
        Ok(true)
    }

    async fn dial(&self, id: &VmId, target: Target) -> Result<Connection, EngineError> {
        let run = {
            let state = self.lock();
            let vm = state.vms.get(id).ok_or(EngineError::Absent)?;
            match vm.phase {
                Phase::Running => vm.run.clone(),
                Phase::Stopped => return Err(EngineError::WrongState("stopped")),
                Phase::Starting => return Err(EngineError::WrongState("starting")),
                Phase::Paused => return Err(EngineError::WrongState("paused")),
            }
        };
        match target {
            Target::Port(AGENT_PORT) => Err(EngineError::Invalid("the agent's port is not for dialling".into())),
            // Its guests' ports are those of this machine's loopback: nothing is isolated here.
            Target::Port(port) => match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
                Ok(stream) => Ok(Box::pin(stream)),
                Err(error) => Err(EngineError::host("connecting into the guest", error)),
            },
            Target::Agent => {
                let (host, guest) = tokio::io::duplex(64 * 1024);
                let shared = Arc::clone(&self.shared);
                let id = id.clone();
                self.tasks.spawn(async move { run.run_until_cancelled(guest::serve(&shared, &id, guest)).await });
                Ok(Box::pin(host))
            }
        }
    }

    async fn agent_token(&self, id: &VmId) -> Result<String, EngineError> {
        match self.lock().vms.contains_key(id) {
            true => Ok(TOKEN.to_owned()),
            false => Err(EngineError::Absent),
        }
    }

    async fn next_end(&self) -> Ended {
        loop {
            let noticed = self.shared.ended.notified();
            let next = self.lock().ends.pop_front();
            match next {
                Some(end) => return end,
                None => noticed.await,
            }
        }
    }

    async fn log_tail(&self, id: &VmId, kind: LogKind, lines: usize) -> Result<LogTail, EngineError> {
        let state = self.lock();
        state.vms.get(id).ok_or(EngineError::Absent)?;
        let all = match kind {
            LogKind::Engine => vec!["created".to_owned(), "started".to_owned()],
            LogKind::Console => (1..=300).map(|line| format!("line {line}")).collect(),
            LogKind::EngineErrors => return Ok(LogTail::default()),
        };
        let skip = all.len().saturating_sub(lines);
        let lines = all.into_iter().skip(skip).collect();
        Ok(LogTail { lines, truncated: skip > 0, updated_at_ms: Some(1_737_455_400_000) })
    }

    async fn denied(&self, id: &VmId) -> Result<Denied, EngineError> {
        if self.lock().hang_on_denied {
            std::future::pending::<()>().await;
        }
        let state = self.lock();
        state.vms.get(id).ok_or(EngineError::Absent)?;
        assert!(!state.panic_on_denied, "a scripted panic");
        Ok(state.denied.clone())
    }
}

fn requested() -> EndReport {
    EndReport { reason: EndReason::Requested, message: "Stopped on request.".into(), exit_code: None }
}
