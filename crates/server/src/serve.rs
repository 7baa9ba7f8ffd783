//! The server's life: adopt, listen, answer, shut down.
//!
//! Invariants: nothing is answered before what an earlier server left is adopted; connections are bounded, and so is the
//! time that a client may take for a request's head and to take its answer; a shutdown leaves every VM running.

use std::{net::IpAddr, sync::Arc};

use axum::{Router, routing::RouterIntoService};
use hyper::{Request, body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tiffin_engine::Engine;
use tiffin_image::convert::Converter;
use tiffin_proxy::Patient;
use tiffin_store::Store;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use crate::app::ingress::IngressError;
use crate::{
    api,
    app::{
        App,
        images::Images,
        ingress::{Ingress, load_routes},
        journal::Entry,
    },
    authorities::BadAuthorities,
    config::Config,
    error::{AppError, chain},
    fault, metrics, reconcile,
};

/// How long to leave a listener alone that can't accept (out of file descriptors).
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// How long writing down the last of what was done may take.
const LAST_WRITES: std::time::Duration = std::time::Duration::from_secs(5);

/// The server could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The VMs that an earlier server left could not be taken over.
    #[error("can't take over the VMs on this host: {0}")]
    Adopt(String),
    /// The ingress can't begin.
    #[error(transparent)]
    Ingress(#[from] IngressError),
    /// The folder of images can't be used.
    #[error("can't open the images")]
    Images(#[from] tiffin_image::blob::BlobError),
    /// The certificates of additional authorities can't be used.
    #[error(transparent)]
    Authorities(#[from] BadAuthorities),
}

/// Serves the API on `listener` until `shutdown` is cancelled; then requests in flight have the configured grace, and
/// VMs run on.
///
/// # Errors
/// When what an earlier server left can't be adopted; nothing was served then.
pub async fn serve(
    config: Config,
    engine: Arc<dyn Engine>,
    store: Store,
    converter: Converter,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    if let Some(point) = &config.fault {
        fault::arm(point);
    }
    let ingress = Ingress::open(&config).await?;
    let images = Images::open(&config, converter)?;
    let app = App::new(config, engine, store, images, metrics::install(), shutdown.clone())?;
    let (writers, stop_writing) = (TaskTracker::new(), CancellationToken::new());
    let (writer, stop) = (Arc::clone(&app), stop_writing.clone());
    writers.spawn(async move { writer.journal.write(&writer.store, writer.config.exec.logs_kept, stop).await });
    let told = Arc::downgrade(&app);
    app.store.watch_vms(move |vm| {
        if let Some(app) = told.upgrade() {
            app.routes.follow(vm);
            app.journal.note(Entry::of_vm(vm));
        }
    });
    reconcile::adopt_all(&app).await.map_err(|error: AppError| ServeError::Adopt(error.inside()))?;
    reconcile::settle_images(&app).await.map_err(|error: AppError| ServeError::Adopt(error.inside()))?;
    load_routes(&app).await.map_err(|error| ServeError::Adopt(error.inside()))?;
    reconcile::spawn_all(&app);
    if let Some(ingress) = ingress {
        ingress.begin(&app);
    }
    tracing::info!(listen = listener.local_addr().map(|address| address.to_string()).ok(), "listening");
    accept_until_shutdown(&app, listener).await;

    if tokio::time::timeout(app.config.http.shutdown_grace, app.pool.close(&app)).await.is_err() {
        tracing::warn!("shutting down with VMs that were booted ahead; the next start removes them");
    }
    // Whoever still works on a VM's behalf is given the grace too: a stop, a create whose client has gone.
    app.tasks.close();
    if tokio::time::timeout(app.config.http.shutdown_grace, app.tasks.wait()).await.is_err() {
        tracing::warn!(tasks = app.tasks.len(), "shutting down with work unfinished; the next start goes on with it");
    }
    // Last, so that it writes down what they did.
    stop_writing.cancel();
    writers.close();
    if tokio::time::timeout(LAST_WRITES, writers.wait()).await.is_err() {
        tracing::error!("the journal can't be finished; entries are lost");
    }
    tracing::info!("shut down; VMs run on");
    Ok(())
}

async fn accept_until_shutdown(app: &Arc<App>, listener: TcpListener) {
    let router = api::router(Arc::clone(app));
    let places = Arc::new(Semaphore::new(app.config.http.max_connections.min(Semaphore::MAX_PERMITS)));
    let connections = TaskTracker::new();
    // Cancelled when the grace is over: cuts the connections that are left.
    let cut = CancellationToken::new();
    while let Some((stream, peer, place)) = next_connection(app, &listener, &places).await {
        let place = Arc::new(place);
        let served = served(connection(app, stream, peer, &place, router.clone()), app.shutdown.clone());
        let cut = cut.clone();
        connections.spawn(async move {
            // A client that breaks off or is too slow is its own business.
            if let Some(Err(error)) = cut.run_until_cancelled(served).await {
                tracing::debug!(error = chain(&error), "a connection ended early");
            }
            drop(place);
        });
    }
    drop(listener);
    connections.close();
    let grace = app.config.http.shutdown_grace;
    tracing::info!(connections = connections.len(), grace_ms = grace.as_millis(), "shutting down");
    if tokio::time::timeout(grace, connections.wait()).await.is_err() {
        tracing::warn!(connections = connections.len(), "cutting the connections that are left");
    }
    cut.cancel();
    connections.wait().await;
}

/// Serves a connection to its end, or, at a shutdown, to the end of the request that it is at. (hyper-util's own graceful
/// shutdown knows no connections that may be upgraded.)
async fn served(connection: Connection, shutdown: CancellationToken) -> hyper::Result<()> {
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        served = connection.as_mut() => return served,
        () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// The next connection and its place among those open at once; `None` at shutdown.
async fn next_connection(
    app: &App,
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, IpAddr, OwnedSemaphorePermit)> {
    let next = async {
        let place = Arc::clone(places).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => return Some((stream, peer.ip().to_canonical(), place)),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "can't accept a connection now");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    app.shutdown.run_until_cancelled(next).await.flatten()
}

/// The router, told of each request where it comes from, and given its connection's place, for what outlives it.
struct WithPeer {
    peer: IpAddr,
    place: Arc<OwnedSemaphorePermit>,
    router: TowerToHyperService<RouterIntoService<Incoming>>,
}

impl hyper::service::Service<Request<Incoming>> for WithPeer {
    type Response = axum::response::Response;
    type Error = std::convert::Infallible;
    type Future =
        <TowerToHyperService<RouterIntoService<Incoming>> as hyper::service::Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(api::Peer(self.peer));
        request.extensions_mut().insert(api::Place(Arc::clone(&self.place)));
        self.router.call(request)
    }
}

/// A connection that may become a WebSocket; those are ended by the shutdown themselves.
type Connection = http1::UpgradeableConnection<TokioIo<Patient<TcpStream>>, WithPeer>;

fn connection(
    app: &App,
    stream: TcpStream,
    peer: IpAddr,
    place: &Arc<OwnedSemaphorePermit>,
    router: Router,
) -> Connection {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = chain(&error), "TCP_NODELAY");
    }
    let stream = Patient::new(stream, app.config.http.write_timeout);
    let router = TowerToHyperService::new(router.into_service());
    let service = WithPeer { peer, place: Arc::clone(place), router };
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.config.http.header_timeout)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
}
