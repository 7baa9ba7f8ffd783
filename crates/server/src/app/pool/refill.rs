//! Booting ahead: one VM at a time, and only while nobody waits for one of their own.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tiffin_engine::EngineError;
use tiffin_types::{
    id::VmId,
    network::EgressPolicy,
    vm::{VmSize, VmSpec},
};

use super::{App, Instant, Kind, QUIET, demand::targets, destroy_all};
use crate::{app::images::kind_for, error::chain};

/// How often the pool is looked at when nothing happens.
const IDLE_POLL: Duration = Duration::from_secs(1);
/// How often it is looked whether those who wait for VMs of their own have them.
const BUSY_POLL: Duration = Duration::from_millis(50);

/// Keeps the pool as full as it is to be, for as long as the server runs.
pub(crate) async fn keep_filled(app: Arc<App>) {
    if app.pool.is_off() {
        return;
    }
    loop {
        let changed = app.pool.changed.notified();
        let pause = if tend(&app).await { BUSY_POLL } else { IDLE_POLL };
        // Whichever comes first: the pause is over, or something changed.
        let _ = tokio::time::timeout(pause, changed).await;
    }
}

/// Destroys what is too much and boots what is missing; whether something is still missing as others come first.
async fn tend(app: &Arc<App>) -> bool {
    loop {
        let targets = wanted(app).await;
        destroy_all(app, &surplus(app, &targets)).await;
        let Some(kind) = missing(app, &targets) else { return false };
        if !app.places.are_all_free() {
            return true;
        }
        boot(app, kind).await;
    }
}

/// How many of each kind to have: those that the configuration names, and others by recent use.
async fn wanted(app: &App) -> HashMap<Kind, usize> {
    let config = &app.pool.config;
    let counts = app.pool.lock().demand.counts(config.recent);
    let mut keep = Vec::new();
    if !config.keep.is_empty()
        && let Ok(Some(image)) = app.store.image_default().await
        && let Some(digest) = image.digest
        && let Ok(kind) = kind_for(app, None, image.kernel_digest.as_ref())
    {
        let (engine, kernel) = (kind.name, image.kernel_digest);
        let disk_mb = tiffin_types::limits::DISK_MB_DEFAULT;
        keep.extend(config.keep.iter().map(|keep| {
            let size = VmSize { cpus: keep.cpus, mem_mb: keep.mem_mb, disk_mb };
            (Kind { image: digest.clone(), kernel: kernel.clone(), size, engine }, keep.count)
        }));
    }
    targets(&keep, &counts, config.max_vms)
}

fn surplus(app: &App, targets: &HashMap<Kind, usize>) -> Vec<VmId> {
    let mut state = app.pool.lock();
    let mut surplus = Vec::new();
    for (kind, ids) in &mut state.ready {
        let target = targets.get(kind).copied().unwrap_or(0);
        surplus.extend(ids.drain(target.min(ids.len())..));
    }
    state.ready.retain(|_, ids| !ids.is_empty());
    state.tell();
    surplus
}

fn missing(app: &App, targets: &HashMap<Kind, usize>) -> Option<Kind> {
    let state = app.pool.lock();
    if state.is_quiet() {
        return None;
    }
    let have = |kind: &Kind| state.ready.get(kind).map_or(0, |ids| ids.len());
    // The one that lacks most.
    let lacking = targets.iter().filter(|(kind, target)| have(kind) < **target && !state.is_resting(kind));
    lacking.max_by_key(|(kind, target)| *target - have(kind)).map(|(kind, _)| kind.clone())
}

/// Boots one and puts it into the pool, unless that is closed or makes room by then.
async fn boot(app: &Arc<App>, kind: Kind) {
    let (work, id) = (Arc::clone(app), VmId::random());
    // In a task of its own, so that a shutdown doesn't cut it: [`super::Pool::close`] waits for it.
    let boot = app.tasks.spawn(async move {
        let _booting = work.pool.booting.lock().await;
        if work.pool.lock().is_quiet() {
            return;
        }
        let spec = VmSpec {
            id: id.clone(),
            image: kind.image.clone(),
            kernel: kind.kernel.clone(),
            size: kind.size,
            egress: EgressPolicy::default(),
            engine: kind.engine,
            program: None,
        };
        let up = async {
            if !make(&work, &kind, &spec).await? {
                return Ok(false);
            }
            work.engine.start(&id).await.map(|_| true)
        };
        let came_up = tokio::time::timeout(work.config.vm.start_timeout, up).await;
        if put(&work, &kind, &id, came_up.unwrap_or(Err(EngineError::WrongState("not up in time")))) {
            return;
        }
        destroy_all(&work, &[id]).await;
    });
    // It panics only where the code is wrong, and then the next look boots another.
    let _ = boot.await;
}

/// Makes a VM, if its image is still there; whether it was. From then on the engine sees a user of the image, and
/// [`super::Pool::forget_blob`] the VM.
async fn make(app: &App, kind: &Kind, spec: &VmSpec) -> Result<bool, EngineError> {
    // The blob can't go meanwhile.
    let _gate = app.images.gate.read().await;
    for blob in std::iter::once(&kind.image).chain(&kind.kernel) {
        match app.store.image_has_blob(blob).await {
            Ok(true) => {}
            Ok(false) => {
                app.pool.lock().demand.forget_blob(blob);
                return Ok(false);
            }
            Err(error) => return Err(EngineError::host("looking for the image", error)),
        }
    }
    app.pool.lock().coming = Some((kind.clone(), spec.id.clone()));
    app.engine.create(spec).await.map(|()| true)
}

/// Puts a VM that came up into the pool; `false` when it has to be destroyed: it didn't, or isn't wanted any more.
fn put(app: &App, kind: &Kind, id: &VmId, came_up: Result<bool, EngineError>) -> bool {
    let is_wanted = app.pool.lock().coming.take().is_some_and(|(_, coming)| coming == *id);
    match came_up {
        Ok(true) if is_wanted => {
            let mut state = app.pool.lock();
            if state.is_quiet() {
                return false;
            }
            tracing::debug!(vm_id = %id, "VM {id} is up ahead");
            state.ready.entry(kind.clone()).or_default().push_back(id.clone());
            state.tell();
            true
        }
        Ok(_) => false,
        // It was destroyed on its way up.
        Err(_) if !is_wanted => false,
        Err(error) => {
            rest(app, kind, &error);
            false
        }
    }
}

/// After a failure: that kind isn't booted for a while, and then only when it is asked for again. Others are none the
/// worse for it, as it may be the image; unless the host is full, which holds for all.
fn rest(app: &App, kind: &Kind, error: &EngineError) {
    let (now, until) = (Instant::now(), Instant::now() + QUIET);
    let mut state = app.pool.lock();
    state.demand.forget(kind);
    if let EngineError::NoCapacity(_) = error {
        tracing::warn!(error = chain(error), "no VM could be booted ahead; none is for {} s", QUIET.as_secs());
        state.quiet_until = Some(until);
        return;
    }
    let image = kind.image.as_str();
    tracing::warn!(
        image,
        error = chain(error),
        "a VM could not be booted ahead; none like it is for {} s",
        QUIET.as_secs()
    );
    state.resting.retain(|_, until| now < *until);
    state.resting.insert(kind.clone(), until);
}
