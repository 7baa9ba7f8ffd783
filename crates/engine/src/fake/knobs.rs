//! What a test can make the fake engine do, and what it can ask it.

use std::time::Duration;

use tiffin_types::{
    id::{Digest, SnapshotId, VmId},
    vm::{EndReport, VmSpec},
};

use super::{FailingStart, Fake, FakeSnapshot, FilesEnd, Script};
use crate::{Denied, Ended};

/// A call of the engine that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `create`
    Create,
    /// `start`
    Start,
    /// `program_start`
    ProgramStart,
    /// `stop`
    Stop,
    /// `pause`
    Pause,
    /// `resume`
    Resume,
    /// `destroy`
    Destroy,
    /// `create_from`
    CreateFrom,
    /// `snapshot_save`
    SnapshotSave,
    /// `snapshot_remove`
    SnapshotRemove,
    /// `snapshot_list`
    SnapshotList,
    /// `set_egress`
    SetEgress,
    /// `image_release`
    ImageRelease,
}

impl Fake {
    /// The next such call fails as if the host had failed.
    pub fn fail_next(&self, call: Call) {
        self.lock().failing.push(call);
    }

    /// The next start that isn't failing already comes up wrongly, with this report.
    pub fn fail_next_start(&self, report: EndReport) {
        self.lock().failing_starts.push_back(FailingStart { mem_mb: None, report });
    }

    /// The next start of a VM with that much memory does.
    pub fn fail_next_start_of(&self, mem_mb: u32, report: EndReport) {
        self.lock().failing_starts.push_back(FailingStart { mem_mb: Some(mem_mb), report });
    }

    /// Starts that are still to come up wrongly.
    pub fn failing_starts(&self) -> usize {
        self.lock().failing_starts.len()
    }

    /// How long starts take from now on.
    pub fn set_start_delay(&self, delay: Duration) {
        self.lock().start_delay = delay;
    }

    /// Saves, starts, programs' starts or releases of images don't go on until they are released.
    pub fn hold(&self, call: Call) {
        let held = [Call::Start, Call::ProgramStart, Call::SnapshotSave, Call::ImageRelease];
        assert!(held.contains(&call), "{call:?} can't be held");
        self.lock().held.push(call);
    }

    /// Lets those go on that are held.
    pub fn release(&self, call: Call) {
        self.lock().held.retain(|held| *held != call);
        self.shared.released.notify_waiters();
    }

    /// Saves under way.
    pub fn saves(&self) -> usize {
        self.lock().saves
    }

    /// Puts a snapshot on the host that no server knows of.
    pub fn plant_snapshot(&self, id: SnapshotId, spec: &VmSpec) {
        self.lock().snapshots.insert(id, FakeSnapshot::of(spec));
    }

    /// Makes the snapshot vanish without a word.
    pub fn lose_snapshot(&self, id: &SnapshotId) {
        self.lock().snapshots.remove(id);
    }

    /// Makes the snapshot one that can't be restored.
    pub fn damage_snapshot(&self, id: &SnapshotId) {
        if let Some(snapshot) = self.lock().snapshots.get_mut(id) {
            snapshot.damaged = true;
        }
    }

    /// The snapshots on the host.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        self.lock().snapshots.keys().cloned().collect()
    }

    /// How many VMs may run at once; further starts find no capacity.
    pub fn set_capacity(&self, vms: usize) {
        self.lock().capacity = Some(vms);
    }

    /// What a command line does in every guest.
    pub fn script(&self, line: &str, script: Script) {
        self.lock().scripts.insert(line.to_owned(), script);
    }

    /// The last request to run a program in a JavaScript runtime.
    pub fn last_script(&self) -> Option<tiffin_protocol::Script> {
        self.lock().last_script.clone()
    }

    /// What operations on the files of that path come to, in every guest.
    pub fn files_end(&self, path: &str, end: FilesEnd) {
        self.lock().files_ends.insert(path.to_owned(), end);
    }

    /// A file of a VM.
    pub fn file(&self, id: &VmId, path: &str) -> Option<Vec<u8>> {
        self.lock().files.get(id)?.get(path)
    }

    /// The paths of all files and folders of a VM, `/workspace` aside.
    pub fn paths(&self, id: &VmId) -> Vec<String> {
        self.lock().files.get(id).map(|files| files.paths()).unwrap_or_default()
    }

    /// What [`crate::Engine::denied`] says of every VM.
    pub fn set_denied(&self, denied: Denied) {
        self.lock().denied = denied;
    }

    /// Asking for refused connections panics from now on, as a defect would.
    pub fn panic_on_denied(&self) {
        self.lock().panic_on_denied = true;
    }

    /// Asking for refused connections is never answered from now on.
    pub fn hang_on_denied(&self) {
        self.lock().hang_on_denied = true;
    }

    /// Ends the VM's run as if by itself. Nothing when it isn't up.
    pub fn kill(&self, id: &VmId, report: EndReport) {
        let mut state = self.lock();
        if let Some(vm) = state.vms.get_mut(id).filter(|vm| vm.is_up()) {
            vm.end_with(report.clone());
            state.ends.push_back(Ended { id: id.clone(), report });
        }
        self.shared.ended.notify_waiters();
    }

    /// Makes the VM vanish without a word, as if its folder had been removed.
    pub fn lose(&self, id: &VmId) {
        if let Some(vm) = self.lock().vms.remove(id) {
            vm.run.cancel();
        }
    }

    /// Puts a VM on the host that no server knows of.
    pub fn plant(&self, spec: VmSpec) {
        let vm = super::FakeVm { phase: super::Phase::Running, ..super::FakeVm::new(spec.clone()) };
        self.lock().vms.insert(spec.id, vm);
    }

    /// Whether observing the VM says that it can't be told.
    pub fn set_unknown(&self, id: &VmId, unknown: bool) {
        let mut state = self.lock();
        match unknown {
            true => state.unknown.insert(id.clone()),
            false => state.unknown.remove(id),
        };
    }

    /// The VMs on the host.
    pub fn present(&self) -> Vec<VmId> {
        self.lock().vms.keys().cloned().collect()
    }

    /// The images that are held.
    pub fn images(&self) -> Vec<Digest> {
        self.lock().images.iter().cloned().collect()
    }

    /// The spec that the VM was made with.
    pub fn spec(&self, id: &VmId) -> Option<VmSpec> {
        self.lock().vms.get(id).map(|vm| vm.spec.clone())
    }

    /// Commands that run in guests now.
    pub fn commands(&self) -> usize {
        self.lock().commands
    }

    /// Calls that came while another one for the same VM was under way, against the contract.
    pub fn overlaps(&self) -> usize {
        self.lock().overlaps
    }
}
