//! Templates: guests that were saved as they had just booted, where other VMs of that image and size begin instead of booting.
//!
//! ```text
//!   first boot of an image and size -> (nobody yet) -> saved, sealed -> the next VMs go on from there, each with its own identity
//! ```
//!
//! A template is a snapshot in a folder of its own, named after all that it depends on. No user's code has run in it, and no VM's
//! secret is in it. One that is damaged or of no use any more is removed; a VM that can't go on from one boots, and leaves another.

use std::{
    collections::HashSet,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use sha2::{Digest as _, Sha256};
use tiffin_types::{
    id::{Digest, SnapshotId},
    vm::{VmSize, VmSpec},
};

use super::{
    HostConfig,
    releases::Releases,
    snapshots::{Manner, Of, Snapshots},
};
use crate::{
    EngineError,
    host::network,
    monitor::launch::{Launch, Template},
};

/// The templates' folder in the data folder.
const TEMPLATES: &str = "templates/machines";

pub(super) struct Templates {
    store: Snapshots,
    /// What boots: the kernel, where an image brings none, and the first files.
    boots: String,
    release: String,
    /// How many are kept.
    kept: usize,
    /// Those that are being made.
    begun: Mutex<HashSet<SnapshotId>>,
}

impl Templates {
    pub(super) fn open(config: &HostConfig, releases: Arc<Releases>, boots: &str, release: &str) -> io::Result<Self> {
        Ok(Self {
            store: Snapshots::open(config.data_dir.join(TEMPLATES), config, releases)?.trusting(),
            boots: boots.to_owned(),
            release: release.to_owned(),
            kept: config.machines.as_ref().map_or(0, |machines| machines.templates),
            begun: Mutex::default(),
        })
    }

    /// A template's name: what it is of. Only what is named alike can go on from it.
    fn name(&self, of: &Of) -> SnapshotId {
        let Of { image, kernel, size: VmSize { cpus, mem_mb, disk_mb } } = of;
        let own = kernel.as_ref().map_or("", Digest::as_str);
        let (boots, release, v6) = (&self.boots, &self.release, network::has_ipv6());
        let of = format!("{image} {own} {cpus} {mem_mb} {disk_mb} {boots} {v6} {release}");
        SnapshotId::from_bits(Sha256::digest(of).first_chunk().copied().unwrap_or_default())
    }

    /// Makes a VM's folder that begins with a template, if there is one that is of use; whether there was.
    pub(super) fn create(&self, spec: &VmSpec, vm: &Path) -> Result<bool, EngineError> {
        let id = self.name(&Of::vm(spec));
        if self.kept == 0 || !self.store.is_whole(&id) {
            return Ok(false);
        }
        match self.store.create_from(spec, &id, vm, Manner::Template) {
            Ok(()) => {
                // Not worth a failure: the wrong template may be dropped as the oldest.
                let _ = self.store.touch(&id);
                Ok(true)
            }
            Err(EngineError::BadSnapshot(why) | EngineError::Invalid(why)) => {
                tracing::warn!(template = %id, "a template is of no use and is made anew: {why}");
                self.remove(&id);
                Ok(false)
            }
            Err(full @ EngineError::NoCapacity(_)) => Err(full),
            // One that is just being removed, say: the VM can do without it.
            Err(error) => {
                tracing::warn!(template = %id, "a VM boots, as its template can't be had: {error}");
                Ok(false)
            }
        }
    }

    /// Where a VM that boots is to leave a template, unless there is one, or another VM is about to.
    pub(super) fn begin(&self, spec: &VmSpec) -> Option<Template> {
        let id = self.name(&Of::vm(spec));
        if self.kept == 0 || self.store.is_whole(&id) || !self.begun().insert(id.clone()) {
            return None;
        }
        match self.store.begin(&id) {
            Ok(into) => Some(Template { into, token: hex::encode(rand::random::<[u8; 32]>()) }),
            Err(error) => {
                self.begun().remove(&id);
                tracing::warn!(template = %id, "no template is made: {error}");
                None
            }
        }
    }

    /// Seals what a VM that came up has left, and removes what one left that didn't.
    pub(super) fn finish(&self, launch: &Launch, came_up: bool) {
        let spec = &launch.spec;
        let (id, token) = (self.name(&Of::vm(spec)), launch.template.as_ref().map(|one| one.token.as_str()));
        let sealed = match token {
            Some(token) if came_up => self.store.seal(&id, launch, token).map(drop),
            _ => Err(io::Error::other("the VM did not come up")),
        };
        if let Err(error) = sealed {
            tracing::warn!(template = %id, "no template was left: {error}");
            self.remove(&id);
        }
        self.begun().remove(&id);
        self.drop_oldest();
    }

    /// Removes the template that such a VM would begin with.
    pub(super) fn reject(&self, spec: &VmSpec) {
        self.remove(&self.name(&Of::vm(spec)));
    }

    /// Removes those of an image, or of a kernel that one came with.
    pub(super) fn forget(&self, blob: &Digest) {
        self.remove_where(|_, of| of.image == *blob || of.kernel.as_ref() == Some(blob));
    }

    /// Removes what was left half-made, and what nothing is named after any more.
    pub(super) fn sweep(&self) -> io::Result<()> {
        self.store.remove_ruins()?;
        self.remove_where(|id, of| self.name(of) != *id);
        self.drop_oldest();
        Ok(())
    }

    fn remove_where(&self, which: impl Fn(&SnapshotId, &Of) -> bool) {
        for id in self.store.list().unwrap_or_default() {
            if self.store.of(&id).is_none_or(|of| which(&id, &of)) {
                self.remove(&id);
            }
        }
    }

    fn drop_oldest(&self) {
        let used = |id: SnapshotId| (self.store.used(&id).unwrap_or(SystemTime::UNIX_EPOCH), id);
        let mut all: Vec<_> = self.store.list().unwrap_or_default().into_iter().map(used).collect();
        all.sort();
        for (_, id) in all.iter().take(all.len().saturating_sub(self.kept)) {
            self.remove(id);
        }
    }

    fn remove(&self, id: &SnapshotId) {
        if let Err(error) = self.store.remove(id) {
            tracing::error!(template = %id, "a template stays: {error}");
        }
    }

    fn begun(&self) -> std::sync::MutexGuard<'_, HashSet<SnapshotId>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
