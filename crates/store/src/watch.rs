//! Telling somebody of every change of a VM's state, whoever makes it.

use std::{
    fmt,
    sync::{Arc, RwLock},
};

use crate::{Store, Vm};

/// Whoever wants to know.
type Watcher = Arc<dyn Fn(&Vm) + Send + Sync>;

/// Whom to tell.
#[derive(Clone, Default)]
pub(crate) struct Watch(Arc<RwLock<Option<Watcher>>>);

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

impl Watch {
    /// Tells of a change that is committed.
    pub(crate) fn tell(&self, vm: &Vm) {
        let watcher = self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        if let Some(watcher) = watcher {
            watcher(vm);
        }
    }
}

impl Store {
    /// Tells of a change of a VM's state that is committed, with what is to be delivered of it.
    pub(crate) fn moved(&self, vm: &Vm) {
        self.watch.tell(vm);
        self.outbox.notify_one();
    }

    /// From now on `watcher`, and nobody who was named before, is told of each change of a VM's state that this store or a
    /// clone of it commits. It must not block.
    pub fn watch_vms(&self, watcher: impl Fn(&Vm) + Send + Sync + 'static) {
        *self.watch.0.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Arc::new(watcher));
    }
}
