//! What the guest's program prints, as lines of the VM's log.
//!
//! The log is opened by the first output, so VMs without a program have none. It is no file of the VM's folder: it outlives
//! the VM, and its removal is others' business.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tiffin_logs::{Stream, Writer};
use tiffin_types::time::Timestamp;

use super::launch::LogKeep;

/// The log of a VM's program.
#[derive(Debug)]
pub(super) struct Output {
    keep: LogKeep,
    writer: Mutex<Option<Writer>>,
}

impl Output {
    /// One that isn't there yet.
    pub(super) fn new(keep: LogKeep) -> Self {
        Self { keep, writer: Mutex::default() }
    }

    /// Adds what was printed. Nothing here fails: what the disk doesn't take is counted, and the log says so once it does.
    pub(super) fn push(&self, stream: Stream, bytes: &[u8]) {
        let mut writer = self.lock();
        let writer = writer.get_or_insert_with(|| Writer::open(&self.keep.folder, self.keep.limits()));
        writer.push(stream, bytes, Timestamp::now());
    }

    /// What is due while nothing is printed; once a minute is enough.
    pub(super) fn tick(&self) {
        if let Some(writer) = self.lock().as_mut() {
            writer.tick(Timestamp::now());
        }
    }

    /// Nothing comes any more; what is wrong with the log, if something is.
    pub(super) fn finish(&self) -> Option<String> {
        let mut writer = self.lock().take()?;
        writer.finish(Timestamp::now());
        writer.trouble().map(|trouble| format!("the program's log: {trouble}"))
    }

    /// Whether a program has printed.
    pub(super) fn is_begun(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Writer>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
