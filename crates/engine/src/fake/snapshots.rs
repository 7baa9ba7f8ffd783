//! Snapshots of fake VMs: copies of the files that scripted commands wrote, those in memory and those on the disk.

use std::{collections::BTreeMap, time::Duration};

use tiffin_types::{
    id::{Digest, SnapshotId, VmId},
    vm::{VmSize, VmSpec},
};

use super::{Call, FakeVm, Phase, State, files};
use crate::{EngineError, Saved};

/// What scripted commands wrote, by path.
pub(super) type Texts = BTreeMap<String, String>;

/// A VM as it was when it was saved.
#[derive(Debug, Clone)]
pub(super) struct FakeSnapshot {
    pub(super) image: Digest,
    kernel: Option<Digest>,
    pub(super) size: VmSize,
    pub(super) memory: Texts,
    pub(super) disk: Texts,
    program_runs: bool,
    /// What was uploaded.
    files: Option<files::Store>,
    pub(super) damaged: bool,
}

impl FakeSnapshot {
    /// One of such a VM that never ran anything.
    pub(super) fn of(spec: &VmSpec) -> Self {
        let (image, kernel, size) = (spec.image.clone(), spec.kernel.clone(), spec.size);
        let (memory, disk) = (Texts::new(), Texts::new());
        Self { image, kernel, size, memory, disk, program_runs: false, files: None, damaged: false }
    }
}

/// What every fake snapshot takes on the disk.
const SIZE_BYTES: u64 = 3 << 20;

/// Makes a VM whose first start goes on where the snapshot was taken.
pub(super) fn create_from(state: &mut State, spec: &VmSpec, snapshot: &SnapshotId) -> Result<(), EngineError> {
    state.fails(Call::CreateFrom)?;
    let saved = match state.snapshots.get(snapshot) {
        None => return Err(EngineError::BadSnapshot("the snapshot is not on this host".into())),
        Some(saved) if saved.damaged => return Err(EngineError::BadSnapshot("the snapshot is damaged".into())),
        Some(saved) => saved.clone(),
    };
    if (&saved.image, &saved.kernel, saved.size) != (&spec.image, &spec.kernel, spec.size) {
        return Err(EngineError::Invalid("the snapshot is of another image, kernel or size".into()));
    }
    if state.vms.contains_key(&spec.id) {
        let vm = state.exclusive(&spec.id)?;
        return if vm.spec == *spec { Ok(()) } else { Err(EngineError::WrongState("made with another spec")) };
    }
    let vm =
        FakeVm { disk: saved.disk, restore: Some((saved.memory, saved.program_runs)), ..FakeVm::new(spec.clone()) };
    state.vms.insert(spec.id.clone(), vm);
    state.files.extend(saved.files.map(|files| (spec.id.clone(), files)));
    Ok(())
}

/// Marks the VM as being saved, or tells why it can't be.
pub(super) fn begin_save(state: &mut State, id: &VmId, into: &SnapshotId) -> Result<(), EngineError> {
    state.fails(Call::SnapshotSave)?;
    let taken = state.snapshots.contains_key(into);
    let vm = state.exclusive(id)?;
    match vm.phase {
        Phase::Running | Phase::Paused => {}
        Phase::Starting => return Err(EngineError::WrongState("starting")),
        Phase::Stopped => return Err(EngineError::WrongState("stopped")),
    }
    if taken {
        return Err(EngineError::host("saving", "there is a snapshot of that name"));
    }
    vm.busy = true;
    state.saves += 1;
    Ok(())
}

/// Keeps the VM as it is now, unless it ended or was destroyed meanwhile.
pub(super) fn finish_save(state: &mut State, id: &VmId, into: SnapshotId) -> Result<Saved, EngineError> {
    state.saves -= 1;
    let files = state.files.get(id).cloned();
    let vm = state.vms.get_mut(id).ok_or(EngineError::Absent)?;
    vm.busy = false;
    match vm.phase {
        Phase::Running | Phase::Paused => {}
        Phase::Starting => return Err(EngineError::WrongState("starting")),
        Phase::Stopped => return Err(EngineError::WrongState("stopped")),
    }
    let (memory, disk, program_runs) = (vm.memory.clone(), vm.disk.clone(), vm.program_runs);
    let saved = FakeSnapshot { memory, disk, program_runs, files, ..FakeSnapshot::of(&vm.spec) };
    state.snapshots.insert(into, saved);
    Ok(Saved { size_bytes: SIZE_BYTES, paused: Duration::ZERO })
}
