//! The releases of the engines that this host has: what one saved, another can't take up.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use tiffin_types::vm::EngineName;

use crate::{EngineError, gvisor, host::process};

pub(super) struct Releases {
    runsc: Option<PathBuf>,
    /// `runsc`'s, and the file that told it.
    known: Mutex<Option<(Identity, String)>>,
    /// QEMU's, where it is used.
    qemu: Option<String>,
}

/// What changes when a program is replaced.
type Identity = (u64, u64, i64, i64);

impl Releases {
    pub(super) fn new(runsc: Option<PathBuf>, qemu: Option<String>) -> Self {
        Self { runsc, known: Mutex::default(), qemu }
    }

    /// The release that would run a VM of that engine now. May ask a program: for a thread that may block.
    pub(super) fn of(&self, engine: EngineName) -> Result<String, EngineError> {
        if let (EngineName::Qemu, Some(version)) = (engine, &self.qemu) {
            return Ok(version.clone());
        }
        let missing = || EngineError::Invalid(format!("this host has no engine {}", engine.as_str()));
        let runsc = self.runsc.as_deref().ok_or_else(missing)?;
        let meta = fs::metadata(runsc).map_err(|e| EngineError::host("looking for runsc", e))?;
        let identity = (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, version)) = known.as_ref().filter(|(of, _)| *of == identity) {
            return Ok(version.clone());
        }
        let said = process::run(gvisor::version(runsc), "").unwrap_or_default();
        // A runsc that can't say its release fails where it is used, with its own words.
        let version = said.lines().next().unwrap_or_default().trim().to_owned();
        *known = Some((identity, version.clone()));
        Ok(version)
    }

    /// Refuses what another release of the engine saved.
    pub(super) fn check(&self, engine: EngineName, saved_by: &str) -> Result<(), EngineError> {
        let here = self.of(engine)?;
        if here == saved_by {
            return Ok(());
        }
        Err(EngineError::BadSnapshot(format!(
            "the snapshot was saved by another release of the engine ({saved_by}; this is {here}), which this one can't \
             take over from"
        )))
    }
}
