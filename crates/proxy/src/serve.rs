//! The ingress's life: accept, serve, drain.
//!
//! Invariants: connections are bounded, overall and per address, and each has its time for a handshake, a head and for
//! doing nothing; at a shutdown what is under way goes on until the grace is over.

use std::{convert::Infallible, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::server::ResolvesServerCert;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Patient, ProxyConfig,
    activity::Activity,
    address::Addresses,
    answer::chain,
    body::ResponseBody,
    forward::{self, Client, Ingress},
    metrics::{self, Counted},
    redirect,
    route::Routes,
    tls::{self, TlsError},
    upstream::Tracked,
};

/// How long to leave a listener alone that can't accept (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection that is told to end may take for it when nothing is under way.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Bytes of a request's head.
pub(crate) const HEAD: usize = 64 * 1024;
/// Requests at once on one connection of HTTP/2.
const STREAMS: u32 = 128;
/// Streams that a client may reset before the server has seen them, and faults of its that are answered by resets.
const RESETS: usize = 32;
const FAULTS: usize = 256;
/// Bytes that a client may send ahead on one stream, and on all of a connection.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes of answers that wait for one stream.
const SEND_BUFFER: usize = 256 * 1024;
/// How often it is looked whether the client of an HTTP/2 connection is there, and how long it has to answer.
const PING: Duration = Duration::from_secs(30);

/// Where the ingress listens.
#[derive(Debug)]
pub struct Listeners {
    /// TLS.
    pub tls: TcpListener,
    /// Plain HTTP, which is redirected to TLS.
    pub redirect: Option<TcpListener>,
}

/// Serves until `shutdown` is cancelled; then what is under way has the configured grace.
///
/// # Errors
/// When TLS can't be set up; nothing was served then.
pub async fn serve(
    config: ProxyConfig,
    routes: Arc<dyn Routes>,
    certificates: Arc<dyn ResolvesServerCert>,
    listeners: Listeners,
    shutdown: CancellationToken,
) -> Result<(), TlsError> {
    let tls = TlsAcceptor::from(tls::server_config(certificates)?);
    let places = Arc::new(Semaphore::new(config.max_connections.min(Semaphore::MAX_PERMITS)));
    let door = Door { addresses: Addresses::new(config.max_connections_per_address), places };
    let ingress =
        Arc::new(Ingress { config, routes, tasks: TaskTracker::new(), shutdown, cut: CancellationToken::new() });
    let secure = accept(&ingress, &door, &listeners.tls, |stream, peer, places| {
        serve_tls(Arc::clone(&ingress), tls.clone(), stream, peer, places)
    });
    let plain = async {
        if let Some(listener) = &listeners.redirect {
            let redirect = |stream, _, places| redirect::serve(Arc::clone(&ingress), stream, places);
            accept(&ingress, &door, listener, redirect).await;
        }
    };
    tokio::join!(secure, plain);
    drop(listeners);
    drain(&ingress).await;
    Ok(())
}

async fn drain(ingress: &Ingress) {
    let (tasks, grace) = (&ingress.tasks, ingress.config.shutdown_grace);
    tasks.close();
    if timeout(grace, tasks.wait()).await.is_err() {
        tracing::warn!(connections = tasks.len(), "cutting what is left of the ingress's connections");
    }
    ingress.cut.cancel();
    if timeout(LAST_WORDS, tasks.wait()).await.is_err() {
        tracing::error!(tasks = tasks.len(), "connections of the ingress don't end");
    }
}

/// Who is let in.
struct Door {
    addresses: Arc<Addresses>,
    places: Arc<Semaphore>,
}

async fn accept<F: Future<Output = ()> + Send + 'static>(
    ingress: &Arc<Ingress>,
    door: &Door,
    listener: &TcpListener,
    serve: impl Fn(TcpStream, SocketAddr, Arc<dyn Send + Sync>) -> F,
) {
    while let Some((stream, peer, place)) = next_connection(ingress, door, listener).await {
        let Some(of_address) = door.addresses.take(peer.ip()) else {
            metrics::turned_away("address_limit");
            continue;
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = chain(&error), "TCP_NODELAY");
        }
        let places = Arc::new((place, of_address, Counted::connection()));
        // Its own: each poll looks at it, and looking at one that all share costs them more than it does this one.
        let (served, cut) = (serve(stream, peer, places), ingress.cut.child_token());
        ingress.tasks.spawn(async move { cut.run_until_cancelled(served).await });
    }
}

/// The next connection and its place among those open at once; `None` at shutdown.
async fn next_connection(
    ingress: &Ingress,
    door: &Door,
    listener: &TcpListener,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let next = async {
        let place = Arc::clone(&door.places).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                    return Some((stream, peer, place));
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "the ingress can't accept a connection now");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    ingress.shutdown.run_until_cancelled(next).await.flatten()
}

type Socket = TlsStream<Patient<TcpStream>>;

async fn serve_tls(
    ingress: Arc<Ingress>,
    tls: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    places: Arc<dyn Send + Sync>,
) {
    let config = &ingress.config;
    let stream = Patient::new(stream, config.write_timeout);
    let stream = match timeout(config.handshake_timeout, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            metrics::turned_away("handshake");
            return tracing::debug!(error = chain(&error), "a TLS handshake failed");
        }
        Err(_) => return metrics::turned_away("handshake_timeout"),
    };
    let session = stream.get_ref().1;
    let (sni, is_http2) = (session.server_name().map(str::to_owned), session.alpn_protocol() == Some(tls::HTTP2));
    let client = Arc::new(Client { peer: peer.ip(), sni, activity: Activity::new(), places, ingress });
    let served = if is_http2 { serve_http2(&client, stream).await } else { serve_http1(&client, stream).await };
    // A client that breaks off or is too slow is its own business.
    if let Err(error) = served {
        tracing::debug!(error = chain(&error), "a connection to the ingress ended early");
    }
}

async fn serve_http1(client: &Arc<Client>, stream: Socket) -> hyper::Result<()> {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(client.ingress.config.idle_timeout).max_header_size(HEAD);
    let connection = builder.serve_connection(TokioIo::new(stream), answering(client)).with_upgrades();
    drive(client, connection, |connection| connection.graceful_shutdown()).await
}

async fn serve_http2(client: &Arc<Client>, stream: Socket) -> hyper::Result<()> {
    let mut builder = http2::Builder::new(Tracked(client.ingress.tasks.clone()));
    builder
        .timer(TokioTimer::new())
        .enable_connect_protocol()
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(FAULTS)
        .max_header_list_size(u32::try_from(HEAD).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let connection = builder.serve_connection(TokioIo::new(stream), answering(client));
    drive(client, connection, |connection| connection.graceful_shutdown()).await
}

/// Serves a connection to its end, to the end of what is under way at a shutdown, or until it is of no more use. By `end` it
/// is told to end after what is under way.
async fn drive<C: Future<Output = hyper::Result<()>>>(
    client: &Client,
    connection: C,
    end: impl FnOnce(Pin<&mut C>),
) -> hyper::Result<()> {
    let mut connection = std::pin::pin!(connection);
    let (idle, stream) = (client.ingress.config.idle_timeout, client.ingress.config.stream_timeout);
    let shutdown = client.ingress.shutdown.child_token();
    tokio::select! {
        served = connection.as_mut() => return served,
        is_idle = client.activity.stale(idle, stream) => if !is_idle { return Ok(()) },
        () = shutdown.cancelled() => {}
    }
    end(connection.as_mut());
    client.activity.touch();
    tokio::select! {
        served = connection => served,
        _ = client.activity.stale(LAST_WORDS, stream) => Ok(()),
    }
}

/// Answers the requests of one connection. Its futures have no box of their own: they are large, and HTTP/1 has a place for
/// one at a time.
fn answering(
    client: &Arc<Client>,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = Response<ResponseBody>,
    Error = Infallible,
    Future: Future<Output = Result<Response<ResponseBody>, Infallible>> + Send + 'static,
> + use<> {
    let client = Arc::clone(client);
    service_fn(move |request| {
        let client = Arc::clone(&client);
        async move { Ok(forward::answer(&client, request).await) }
    })
}
