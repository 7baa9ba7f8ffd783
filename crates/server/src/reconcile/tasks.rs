//! When reconcilers run.

use std::{sync::Arc, time::Duration};

use tiffin_types::time::Timestamp;
use tokio::time::MissedTickBehavior;

use super::images::{settle_uploads, sweep_blobs};
use super::logs::sweep_logs;
use super::scrub::scrub_blobs;
use super::vms::{end_noticed, reconcile_all, settle_starting};
use crate::{
    app::{App, images::leaving, pool, prepared, sessions, webhooks},
    error::chain,
};

/// Between two prunings of what is remembered for a time only, and of blobs.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);
/// Between two prunings of what was delivered to webhooks: there may be much of it.
const DELIVERIES_EVERY: Duration = Duration::from_secs(60);
/// How long an idempotency key is remembered.
const KEYS_KEPT_MS: i64 = 24 * 3600 * 1000;

/// Starts every background task; they end when the server is asked to shut down.
pub(crate) fn spawn_all(app: &Arc<App>) {
    let every = app.config.vm.reconcile_every;
    spawn(app, ends);
    spawn(app, settle_starting);
    spawn(app, pool::keep_filled);
    spawn(app, prepared::keep_prepared);
    spawn(app, webhooks::deliver);
    spawn(app, |app| periodically(app, DELIVERIES_EVERY, prune_deliveries));
    spawn(app, scrub_blobs);
    spawn(app, |app| periodically(app, every, reconcile));
    spawn(app, prune_now_and_then);
}

fn spawn<F>(app: &Arc<App>, task: impl FnOnce(Arc<App>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (shutdown, work) = (app.shutdown.clone(), task(Arc::clone(app)));
    app.tasks.spawn(async move { shutdown.run_until_cancelled(work).await });
}

/// Each end is handled in a task of its own: one VM's lock must not keep others waiting.
async fn ends(app: Arc<App>) {
    loop {
        let ended = app.engine.next_end().await;
        let work = Arc::clone(&app);
        app.tasks.spawn(async move { end_noticed(&work, ended).await });
    }
}

async fn periodically<F: Future<Output = ()>>(app: Arc<App>, every: Duration, run: impl Fn(Arc<App>) -> F) {
    let mut timer = tokio::time::interval(every);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer.tick().await;
    loop {
        timer.tick().await;
        run(Arc::clone(&app)).await;
    }
}

async fn reconcile(app: Arc<App>) {
    if let Err(error) = settle_uploads(&app).await {
        tracing::error!(error = error.inside(), "uploads can't be reconciled now");
    }
    leaving::release_leaving(&app).await;
    if let Err(error) = reconcile_all(&app).await {
        tracing::error!(error = error.inside(), "VMs can't be reconciled now");
    }
}

/// At start too: a server that is started anew more often would never come to it.
async fn prune_now_and_then(app: Arc<App>) {
    prune(Arc::clone(&app)).await;
    periodically(app, PRUNE_EVERY, prune).await;
}

async fn prune_deliveries(app: Arc<App>) {
    let config = &app.config.webhooks;
    let kept = i64::try_from(config.kept.as_millis()).unwrap_or(i64::MAX);
    let pruned = app.store.webhook_prune(Timestamp::now().plus_millis(-kept), config.kept_deliveries).await;
    if let Err(error) = pruned {
        tracing::error!(error = chain(&error), "deliveries of webhooks can't be pruned now");
    }
}

async fn prune(app: Arc<App>) {
    if let Err(error) = sweep_blobs(&app).await {
        tracing::error!(error = error.inside(), "blobs that nothing needs can't be removed now");
    }
    if let Err(error) = sweep_logs(&app).await {
        tracing::error!(error = error.inside(), "what programs printed can't be swept now");
    }
    match app.store.idempotency_prune(Timestamp::now().plus_millis(-KEYS_KEPT_MS)).await {
        Ok(0) => {}
        Ok(keys) => tracing::debug!(keys, "old idempotency keys forgotten"),
        Err(error) => tracing::error!(error = chain(&error), "idempotency keys can't be pruned now"),
    }
    if let Err(error) = app.store.port_prune().await {
        tracing::error!(error = chain(&error), "ports of deleted VMs can't be forgotten now");
    }
    let kept = i64::try_from(app.config.activity.kept.as_millis()).unwrap_or(i64::MAX);
    let since = Timestamp::now().plus_millis(-kept);
    if let Err(error) = app.store.journal_prune(since, app.config.activity.entries).await {
        tracing::error!(error = chain(&error), "the activity can't be pruned now");
    }
    if let Err(error) = sessions::prune(&app).await {
        tracing::error!(error = chain(&error), "sessions can't be pruned now");
    }
}
