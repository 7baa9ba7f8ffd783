//! A VM's folder, from the server's side.

use std::{fs, io, os::unix::fs::DirBuilderExt, path::Path, process::Stdio, thread, time::Duration};

use tiffin_types::vm::{EndReason, EndReport, VmSpec};

use crate::{
    EngineError, LogKind,
    host::{
        disk::{self, DiskError},
        process::{ProcessId, boot_id},
    },
    monitor::{
        launch::{self, DISK, END, RESTORE, RUN, Run, SCRATCH, SPEC},
        log::file_name,
    },
};

/// How often a folder is removed in which something is made meanwhile.
const REMOVALS: u32 = 20;
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);
/// How long the monitor's first stage may take; it does no more than a few system calls.
const FIRST_STAGE: Duration = Duration::from_secs(20);

/// Makes the folder with everything in it; the spec comes last and says that the rest is whole.
pub(super) fn create(dir: &Path, spec: &VmSpec, templates: &Path) -> Result<(), EngineError> {
    let made = make(dir, spec, templates);
    if made.is_err() {
        // Already failing: what can't be removed now is a ruin that the next start of the server removes.
        let _ = remove(dir);
    }
    made
}

fn make(dir: &Path, spec: &VmSpec, templates: &Path) -> Result<(), EngineError> {
    let full = || EngineError::NoCapacity("the host's disk is full".into());
    let host = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull => full(),
        _ => EngineError::host("making the VM's folder", error),
    };
    remove(dir).map_err(host)?;
    fs::DirBuilder::new().mode(0o700).create(dir).map_err(host)?;
    disk::create(templates, &dir.join(DISK), spec.size.disk_mb).map_err(|error: DiskError| {
        if error.is_full() { full() } else { EngineError::host("making the VM's disk", error) }
    })?;
    launch::write(dir, SPEC, spec, true).map_err(host)
}

/// Gives a VM that hasn't run a disk as new.
pub(super) fn renew_disk(dir: &Path, spec: &VmSpec, templates: &Path) -> io::Result<()> {
    launch::remove(dir, RESTORE)?;
    launch::remove(dir, DISK)?;
    disk::create(templates, &dir.join(DISK), spec.size.disk_mb).map_err(|error| match error.is_full() {
        true => io::ErrorKind::StorageFull.into(),
        false => io::Error::other(error),
    })
}

/// Removes the folder; absent is fine.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    // The spec goes first: a removal that is killed half-way leaves a ruin, not a VM.
    launch::remove(dir, SPEC)?;
    for _ in 0..REMOVALS {
        match fs::remove_dir_all(dir) {
            // A monitor that is just giving up was here.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => thread::sleep(REMOVAL_PAUSE),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
    fs::remove_dir_all(dir)
}

/// Starts the monitor and waits for its first stage, after which its socket answers.
pub(super) async fn spawn_monitor(program: &Path, dir: &Path) -> Result<(), EngineError> {
    let context = "starting the VM's monitor";
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => {
            EngineError::NoCapacity(format!("{context}: {error}"))
        }
        _ => EngineError::host(context, error),
    };
    fs::create_dir_all(dir.join(SCRATCH)).map_err(failed)?;
    let errors = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(dir.join(file_name(LogKind::EngineErrors)))
        .map_err(failed)?;
    let mut first_stage = tokio::process::Command::new(program)
        .arg0("tiffin")
        .arg("monitor")
        .arg(dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let status = tokio::time::timeout(FIRST_STAGE, first_stage.wait())
        .await
        .map_err(|_| failed(io::Error::from(io::ErrorKind::TimedOut)))?
        .map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    Err(failed(io::Error::other(format!("it ended with {status}; the engine's error log has its words"))))
}

/// The VM's monitor, if that very process still exists.
pub(super) fn monitor(dir: &Path) -> io::Result<Option<ProcessId>> {
    let run: Option<Run> = launch::read(dir, RUN)?;
    Ok(run.filter(|run| run.boot_id == boot_id()).map(|run| run.process).filter(|process| process.is_alive()))
}

/// How the last run ended: as its monitor recorded, or as its silence tells. `None` when it never ran.
pub(super) fn end(dir: &Path) -> Option<EndReport> {
    if let Ok(Some(report)) = launch::read(dir, END) {
        return Some(report);
    }
    let lost = |reason, message: &str| Some(EndReport { reason, message: message.into(), exit_code: None });
    match launch::read::<Run>(dir, RUN) {
        Ok(None) => None,
        Ok(Some(run)) if run.boot_id != boot_id() => lost(EndReason::HostRestarted, "the host restarted"),
        Ok(Some(_)) | Err(_) => lost(EndReason::MonitorLost, "the VM's monitor was killed, and the VM with it"),
    }
}
