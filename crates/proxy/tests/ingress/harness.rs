//! An ingress of one's own, programs behind it, and clients.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tiffin_proxy::{
    Backend, Connection, Dial, DialError, Listeners, ProxyConfig, Route, Routes, Single, Upstreams,
    tls::{Keeper, Source},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long anything that is waited for may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const HOST: &str = "a.vm.test";

pub(crate) type Body = BoxBody<Bytes, Infallible>;
pub(crate) type Secure = TlsStream<TcpStream>;

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// The ingress; gone when dropped.
pub(crate) struct Site {
    pub(crate) address: SocketAddr,
    pub(crate) redirect: SocketAddr,
    pub(crate) table: Arc<Table>,
    pub(crate) upstreams: Arc<Upstreams>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
    roots: RootCertStore,
    _folder: tempfile::TempDir,
}

#[derive(Default)]
pub(crate) struct Table(RwLock<HashMap<String, Arc<dyn Route>>>);

impl Table {
    pub(crate) fn set(&self, host: &str, route: impl Route) {
        self.0.write().unwrap().insert(host.into(), Arc::new(route));
    }

    pub(crate) fn remove(&self, host: &str) {
        self.0.write().unwrap().remove(host);
    }
}

impl Routes for Table {
    fn route(&self, host: &str) -> Option<Arc<dyn Route>> {
        self.0.read().unwrap().get(host).cloned()
    }
}

/// A way to a program at an address of this machine, which counts how often it is gone.
#[derive(Clone)]
pub(crate) struct Way {
    pub(crate) to: SocketAddr,
    pub(crate) dials: Arc<AtomicUsize>,
}

impl Way {
    pub(crate) fn to(to: SocketAddr) -> Self {
        Self { to, dials: Arc::default() }
    }

    pub(crate) fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }
}

#[async_trait::async_trait]
impl Dial for Way {
    async fn dial(&self) -> Result<Connection, DialError> {
        self.dials.fetch_add(1, Ordering::SeqCst);
        match TcpStream::connect(self.to).await {
            Ok(stream) => Ok(Box::pin(stream)),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Err(DialError::Refused),
            Err(error) => Err(DialError::Failed(Box::new(error))),
        }
    }
}

impl Site {
    pub(crate) async fn start() -> Self {
        Self::start_with(ProxyConfig::default()).await
    }

    pub(crate) async fn start_with(config: ProxyConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Source::Local { folder: folder.path().to_owned(), domain: "vm.test".into() };
        let keeper = Keeper::open(source).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(keeper.authority().unwrap().as_bytes()).unwrap()).unwrap();
        let tls = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let redirect = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, redirected) = (tls.local_addr().unwrap(), redirect.local_addr().unwrap());
        let (table, shutdown, tasks) = (Arc::new(Table::default()), CancellationToken::new(), TaskTracker::new());
        let upstreams = Upstreams::new(config.clone());
        let listeners = Listeners { tls, redirect: Some(redirect) };
        let served = tiffin_proxy::serve(config, table.clone(), keeper.certificates(), listeners, shutdown.clone());
        tasks.spawn(async move { served.await.unwrap() });
        tasks.close();
        Self { address, redirect: redirected, table, upstreams, shutdown, tasks, roots, _folder: folder }
    }

    /// Puts a backend behind [`HOST`].
    pub(crate) fn route(&self, way: impl Dial) -> Arc<Backend> {
        let backend = Backend::new(way, &self.upstreams);
        self.table.set(HOST, Single(Arc::clone(&backend)));
        backend
    }

    /// A TLS connection for that name.
    pub(crate) async fn connect(&self, name: &str, protocols: &[&[u8]]) -> Secure {
        self.try_connect(name, protocols).await.unwrap()
    }

    pub(crate) async fn try_connect(&self, name: &str, protocols: &[&[u8]]) -> std::io::Result<Secure> {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_root_certificates(self.roots.clone()).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    pub(crate) async fn http1(&self) -> http1::SendRequest<Body> {
        let stream = self.connect(HOST, &[b"http/1.1"]).await;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        run(connection.with_upgrades());
        sender
    }

    pub(crate) async fn http2(&self) -> http2::SendRequest<Body> {
        let stream = self.connect(HOST, &[b"h2"]).await;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        run(connection);
        sender
    }

    /// Sends bytes as they are; all that comes back until the ingress hangs up.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect(HOST, &[]).await;
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        // How it hangs up is not the point.
        let _ = within(stream.read_to_end(&mut answer)).await;
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// What is waited for comes in time.
#[track_caller]
pub(crate) fn within<T>(wait: impl Future<Output = T>) -> impl Future<Output = T> {
    let waited = tokio::time::timeout(PATIENCE, wait);
    async move { waited.await.expect("in time") }
}

/// Runs beside the test, until its runtime ends.
#[allow(clippy::disallowed_methods, reason = "the test's runtime is the tracker")]
pub(crate) fn run<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) {
    tokio::spawn(work);
}

/// A program that does with each connection what `serve` says.
pub(crate) async fn program<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Way
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let way = Way::to(listener.local_addr().unwrap());
    run(async move {
        while let Ok((stream, _)) = listener.accept().await {
            run(serve(stream));
        }
    });
    way
}

type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// A program of HTTP/1.1.
pub(crate) async fn http_program(answer: impl Fn(Request<Incoming>) -> Answer + Clone + Send + Sync + 'static) -> Way {
    program(move |stream| {
        let answer = answer.clone();
        async move {
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        }
    })
    .await
}

/// A program that answers each request with its head and its body's length and bytes.
pub(crate) async fn echo() -> Way {
    http_program(|request| {
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let mut text = format!("{} {}\n", head.method, head.uri);
            for (name, value) in &head.headers {
                text += &format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
            }
            text += &format!("\n{}", String::from_utf8_lossy(&body));
            Response::builder().header("x-program", "1").header("keep-alive", "timeout=5").body(full(text)).unwrap()
        })
    })
    .await
}

/// Reads a request's head from a program's connection.
pub(crate) async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&head).into_owned()
}

pub(crate) async fn text(body: Incoming) -> String {
    String::from_utf8_lossy(&body.collect().await.unwrap().to_bytes()).into_owned()
}

/// A GET of HTTP/1.1.
pub(crate) fn get(path: &str) -> Request<Body> {
    Request::get(path).header("host", HOST).body(full("")).unwrap()
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let waited = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.unwrap_or_else(|_| panic!("{what}: not in time"));
}
