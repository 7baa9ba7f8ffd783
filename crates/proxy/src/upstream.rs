//! Connections to programs: made by a dial, used for one request after the other, bounded per backend.
//!
//! Invariants: a connection is kept only when its request and its answer are over, and for a short while: a program that
//! closes what is idle, and a VM that is to be saved, shouldn't meet one. One that the program closed meanwhile isn't used.
//! A program that has not listened yet is waited for, one that no longer does is not. A backend's connections end with it. What was sent once isn't sent again unless repeating it means nothing.

mod lease;

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::task::TaskTracker;

pub(crate) use self::lease::{Lease, Sender};
use crate::{
    ProxyConfig,
    answer::chain,
    body::RequestBody,
    metrics,
    route::{Connection, Dial, DialError},
};

/// How long a connection may take to be ready again after its last answer.
const READY: Duration = Duration::from_millis(50);
/// How soon it is looked again whether a program listens that comes up, and how seldom in the end.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of an answer's head.
const HEAD: usize = 64 * 1024;
/// Bytes of an HTTP/2 stream that a program may send ahead, and of all of a connection's.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// How often it is looked whether the other end of an HTTP/2 connection is there while streams are open.
const PING: Duration = Duration::from_secs(30);

/// What all backends share.
#[derive(Debug)]
pub struct Upstreams {
    config: ProxyConfig,
    tasks: TaskTracker,
}

impl Upstreams {
    /// For backends that keep to `config`.
    pub fn new(config: ProxyConfig) -> Arc<Self> {
        Arc::new(Self { config, tasks: TaskTracker::new() })
    }
}

/// A program that answers requests: the way to it, and the connections that are open.
pub struct Backend {
    me: Weak<Self>,
    way: Box<dyn Dial>,
    upstreams: Arc<Upstreams>,
    places: Arc<Semaphore>,
    kept: Mutex<Kept>,
    /// Somebody took a connection since it was last said that the program starts anew.
    has_listened: AtomicBool,
    /// gRPC's connection, which all its requests share.
    shared: tokio::sync::Mutex<Option<Shared>>,
}

#[derive(Default)]
struct Kept {
    /// Longest kept first.
    idle: VecDeque<Idle>,
    /// Somebody will close what is kept for too long.
    is_watched: bool,
}

struct Idle {
    sender: http1::SendRequest<RequestBody>,
    place: OwnedSemaphorePermit,
    since: Instant,
}

struct Shared {
    sender: http2::SendRequest<RequestBody>,
    /// Each request on it holds one.
    place: Arc<OwnedSemaphorePermit>,
}

impl Backend {
    /// The program at the end of `way`.
    pub fn new(way: impl Dial, upstreams: &Arc<Upstreams>) -> Arc<Self> {
        let most = upstreams.config.max_connections_per_backend.min(Semaphore::MAX_PERMITS);
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            way: Box::new(way),
            upstreams: Arc::clone(upstreams),
            places: Arc::new(Semaphore::new(most)),
            kept: Mutex::default(),
            has_listened: AtomicBool::new(false),
            shared: tokio::sync::Mutex::default(),
        })
    }

    /// Closes what is kept for the next request; what is under way goes on.
    pub fn close_idle(&self) {
        self.kept().idle.clear();
        // One that is just made isn't idle.
        let Ok(mut shared) = self.shared.try_lock() else { return };
        if shared.as_ref().is_some_and(|shared| Arc::strong_count(&shared.place) == 1) {
            *shared = None;
        }
    }

    /// The program is to start, or starts anew: until it listens, requests wait for that a while.
    pub fn starts_anew(&self) {
        self.has_listened.store(false, Ordering::Relaxed);
    }

    /// A connection for a request of HTTP/1: one that was kept unless `fresh`, else a new one.
    pub(crate) async fn lease(&self, fresh: bool) -> Result<Lease, DialError> {
        if let Some((sender, place)) = if fresh { None } else { self.kept_ready().await } {
            metrics::reused();
            return Ok(Lease::kept(Weak::clone(&self.me), sender, place));
        }
        let (connection, place) = self.dial().await?;
        let mut builder = http1::Builder::new();
        builder.max_header_size(HEAD);
        let (sender, connection) = builder.handshake(TokioIo::new(connection)).await.map_err(failed)?;
        self.run(connection.with_upgrades());
        Ok(Lease::new(Weak::clone(&self.me), Sender::Http1(sender), place))
    }

    /// A connection that was kept and is ready, the last one first.
    async fn kept_ready(&self) -> Option<(http1::SendRequest<RequestBody>, OwnedSemaphorePermit)> {
        loop {
            let Idle { mut sender, place, since } = self.take_kept()?;
            let is_old = since.elapsed() >= self.upstreams.config.keep;
            if !is_old && (sender.is_ready() || matches!(timeout(READY, sender.ready()).await, Ok(Ok(())))) {
                return Some((sender, place));
            }
        }
    }

    fn take_kept(&self) -> Option<Idle> {
        self.kept().idle.pop_back()
    }

    /// The connection for requests of HTTP/2.
    pub(crate) async fn lease_http2(&self, fresh: bool) -> Result<Lease, DialError> {
        let mut shared = self.shared.lock().await;
        if let Some(Shared { sender, place }) = shared.as_ref().filter(|shared| !fresh && !shared.sender.is_closed()) {
            metrics::reused();
            return Ok(Lease::shared(sender.clone(), Arc::clone(place)));
        }
        let (connection, place) = self.dial().await?;
        let mut builder = http2::Builder::new(Tracked(self.upstreams.tasks.clone()));
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(HEAD).unwrap_or(u32::MAX))
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING);
        let (sender, connection) = builder.handshake(TokioIo::new(connection)).await.map_err(failed)?;
        self.run(connection);
        let new = shared.insert(Shared { sender, place: Arc::new(place) });
        let lease = Lease::shared(new.sender.clone(), Arc::clone(&new.place)).unused();
        drop(shared);
        self.watch();
        Ok(lease)
    }

    async fn dial(&self) -> Result<(Connection, OwnedSemaphorePermit), DialError> {
        let limit = self.upstreams.config.dial_timeout;
        let place = match timeout(limit, Arc::clone(&self.places).acquire_owned()).await {
            Ok(Ok(place)) => place,
            Ok(Err(_)) | Err(_) => return Err(DialError::Busy),
        };
        let (deadline, mut pause) = (Instant::now() + self.upstreams.config.listen_patience, FIRST_PAUSE);
        loop {
            match self.dial_once(limit).await {
                // A program takes a moment to come up, and its users know no better than to ask at once.
                Err(DialError::Refused)
                    if !self.has_listened.load(Ordering::Relaxed) && Instant::now() + pause < deadline =>
                {
                    tokio::time::sleep(pause).await;
                    pause = LAST_PAUSE.min(2 * pause);
                }
                dialled => return dialled.map(|connection| (connection, place)),
            }
        }
    }

    async fn dial_once(&self, limit: Duration) -> Result<Connection, DialError> {
        let began = Instant::now();
        let dialled = timeout(limit, self.way.dial()).await.unwrap_or(Err(DialError::TimedOut));
        let outcome = match &dialled {
            Ok(_) => "ok",
            Err(DialError::NotRunning(_)) => "not_running",
            Err(DialError::Refused) => "refused",
            Err(DialError::TimedOut) => "timed_out",
            Err(DialError::Busy) => "busy",
            Err(DialError::Failed(_)) => "failed",
        };
        metrics::dial(outcome, began.elapsed());
        if dialled.is_ok() {
            self.has_listened.store(true, Ordering::Relaxed);
        }
        dialled
    }

    fn run(&self, connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
        self.upstreams.tasks.spawn(async move {
            // Who waits for an answer on it is told; a program that closes what is idle is as it should be.
            if let Err(error) = connection.await {
                tracing::debug!(error = chain(&error), "a connection to a program ended");
            }
        });
    }

    /// Keeps a connection for the next request.
    fn keep(&self, sender: http1::SendRequest<RequestBody>, place: OwnedSemaphorePermit) {
        if sender.is_closed() || self.upstreams.config.keep.is_zero() {
            return;
        }
        self.kept().idle.push_back(Idle { sender, place, since: Instant::now() });
        self.watch();
    }

    /// Has somebody close what is kept for too long, for as long as something is kept.
    fn watch(&self) {
        if std::mem::replace(&mut self.kept().is_watched, true) {
            return;
        }
        let (me, mut wait) = (Weak::clone(&self.me), self.upstreams.config.keep);
        self.upstreams.tasks.spawn(async move {
            loop {
                tokio::time::sleep(wait).await;
                let Some(backend) = me.upgrade() else { return };
                let Some(next) = backend.close_old().await else { return };
                wait = next;
            }
        });
    }

    /// Closes what is kept for too long, at the moment that it is: a program that closes first keeps its end for a minute.
    /// When to look again, if anything is left.
    async fn close_old(&self) -> Option<Duration> {
        let mut shared = self.shared.lock().await;
        if shared.as_ref().is_some_and(|shared| shared.sender.is_closed() || Arc::strong_count(&shared.place) == 1) {
            *shared = None;
        }
        let mut kept = self.kept();
        let keep = self.upstreams.config.keep;
        kept.idle.retain(|idle| idle.since.elapsed() < keep && !idle.sender.is_closed());
        let oldest = kept.idle.front().map(|idle| keep.saturating_sub(idle.since.elapsed()));
        let next = oldest.or(shared.is_some().then_some(keep));
        kept.is_watched = next.is_some();
        next
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failed(error: hyper::Error) -> DialError {
    DialError::Failed(Box::new(error))
}

/// Runs what HTTP/2 runs beside a connection.
#[derive(Clone)]
pub(crate) struct Tracked(pub(crate) TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}
