//! The rules: what a caller may do, and how each thing is done. No HTTP here.
//!
//! Every function that a request reaches takes the [`auth::Caller`] and authorizes in its first line. What changes a VM runs in
//! a task of its own ([`App::run`]), so that a client who hangs up leaves nothing half done.

pub(crate) mod accounts;
pub(crate) mod activity;
pub(crate) mod api_keys;
pub(crate) mod auth;
pub(crate) mod exec;
pub(crate) mod exec_logs;
pub(crate) mod files;
mod guest;
pub(crate) mod health;
pub(crate) mod images;
pub(crate) mod imports;
pub(crate) mod ingress;
pub(crate) mod journal;
pub(crate) mod logs;
pub(crate) mod overview;
pub(crate) mod passwords;
mod places;
pub(crate) mod pool;
pub(crate) mod ports;
pub(crate) mod prepared;
pub(crate) mod rates;
pub(crate) mod routes;
pub(crate) mod scripts;
pub(crate) mod services;
pub(crate) mod sessions;
pub(crate) mod snapshots;
pub(crate) mod terminal;
pub(crate) mod uploads;
pub(crate) mod vms;
pub(crate) mod webhooks;

use std::{collections::BTreeSet, future::Future, sync::Arc, sync::Mutex, time::Instant};

use metrics_exporter_prometheus::PrometheusHandle;
use tiffin_engine::Engine;
use tiffin_store::Store;
use tiffin_types::id::{SnapshotId, VmId};
use tiffin_types::time::Timestamp;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{authorities::BadAuthorities, config::Config, error::AppError};
use journal::Journal;
use passwords::Passwords;
use places::{Commands, Locks, Places};
use rates::Rates;

/// What every request and task of the server shares.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) store: Store,
    pub(crate) metrics: PrometheusHandle,
    /// Where images are, and what is being uploaded to them.
    pub(crate) images: images::Images,
    /// What is being imported from registries.
    pub(crate) imports: imports::Imports,
    /// What is told of the ingress.
    ingress: ingress::Facts,
    /// Which host name leads into which VM.
    pub(crate) routes: Arc<routes::Routes>,
    /// Every task of the server.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the server is asked to shut down.
    pub(crate) shutdown: CancellationToken,
    /// One change at a time for each VM.
    pub(crate) locks: Locks<VmId>,
    /// Held while a snapshot is saved or removed, shared while VMs are made of it.
    pub(crate) snapshot_locks: Locks<SnapshotId>,
    /// Bounds how often a caller may do what is costly.
    pub(crate) rates: Rates,
    /// What deliveries of webhooks are sent by.
    pub(crate) outbound: tiffin_outbound::Client,
    /// What is written down of all this.
    pub(crate) journal: Journal,
    /// Bounds how many watch the journal at once.
    watchers: Arc<Semaphore>,
    /// Bounds how many follow logs of VMs' programs at once.
    followers: Arc<Semaphore>,
    /// Bounds how many of these logs are read at once.
    log_readers: Arc<Semaphore>,
    /// When the server began, by the clock and for spans.
    pub(crate) started_at: Timestamp,
    pub(crate) began: Instant,
    /// Compares passwords, a few at once.
    passwords: Passwords,
    /// VMs that are up before anybody asks for them.
    pub(crate) pool: pool::Pool,
    /// Cached VMs that are booted and stand still.
    pub(crate) prepared: prepared::Prepared,
    /// Bounds how many VMs come up at once.
    places: Places,
    /// Bounds how many commands run at once in each VM.
    commands: Commands,
    /// Deleted VMs that the engine has not destroyed yet; the reconciler tries again.
    pub(crate) undestroyed: Mutex<BTreeSet<VmId>>,
}

impl App {
    /// The server's state, before it does anything.
    ///
    /// # Errors
    /// When certificates that the configuration names can't be used.
    pub(crate) fn new(
        config: Config,
        engine: Arc<dyn Engine>,
        store: Store,
        images: images::Images,
        metrics: PrometheusHandle,
        shutdown: CancellationToken,
    ) -> Result<Arc<Self>, BadAuthorities> {
        let ingress = &config.ingress;
        let upstreams = tiffin_proxy::Upstreams::new(ingress.proxy.clone());
        let routes = Arc::new(routes::Routes::new(Arc::clone(&engine), &ingress.domain, upstreams));
        Ok(Arc::new(Self {
            imports: imports::Imports::open(&config)?,
            outbound: webhooks::client(&config.webhooks)?,
            ingress: ingress::Facts::default(),
            routes,
            journal: Journal::default(),
            watchers: Arc::new(Semaphore::new(config.limits.event_streams)),
            followers: Arc::new(Semaphore::new(config.limits.log_streams)),
            log_readers: Arc::new(Semaphore::new(logs::READ_AT_ONCE)),
            started_at: Timestamp::now(),
            began: Instant::now(),
            passwords: Passwords::default(),
            rates: Rates::new(&config.rate),
            pool: pool::Pool::new(config.pool.clone()),
            prepared: prepared::Prepared::new(config.services.prepared),
            places: Places::new(
                config.limits.creates_in_flight,
                config.limits.creates_queued,
                config.limits.create_wait,
                "too many VMs are coming up or being saved at once; try again shortly",
            ),
            commands: Commands::new(config.exec.max_concurrent),
            locks: Locks::default(),
            snapshot_locks: Locks::default(),
            tasks: TaskTracker::new(),
            undestroyed: Mutex::default(),
            config,
            engine,
            store,
            images,
            metrics,
            shutdown,
        }))
    }

    /// Runs `work` to its end even if the caller goes away.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, AppError>> + Send + 'static,
    ) -> Result<T, AppError> {
        match self.tasks.spawn(work).await {
            Ok(result) => result,
            Err(error) => Err(AppError::internal("a task of the server panicked", error)),
        }
    }
}
