//! A request's way: whom it is for, what is sent on, what comes back.

mod request;
mod send;

use std::{net::IpAddr, sync::Arc, time::Instant};

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::{body::Incoming, ext::Protocol, upgrade::OnUpgrade};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    ProxyConfig,
    activity::{Activity, UnderWay},
    answer::{REQUEST_ID, Refusal, wants_json},
    body::{Fate, RequestBody, ResponseBody},
    headers,
    host::Host,
    metrics,
    route::Routes,
    tunnel,
    upstream::Lease,
};
use request::Kind;

/// The longest request id that is taken from a client.
const ID_CHARS: usize = 64;

/// What all connections share.
pub(crate) struct Ingress {
    pub(crate) config: ProxyConfig,
    pub(crate) routes: Arc<dyn Routes>,
    /// Connections, and the tunnels that outlive them.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the server is told to end.
    pub(crate) shutdown: CancellationToken,
    /// Cancelled when what is under way then has had its time.
    pub(crate) cut: CancellationToken,
}

/// A client's connection.
pub(crate) struct Client {
    pub(crate) ingress: Arc<Ingress>,
    pub(crate) peer: IpAddr,
    /// The name that the connection was made for.
    pub(crate) sni: Option<String>,
    pub(crate) activity: Arc<Activity>,
    /// Its places among the connections; what outlives it holds them too.
    pub(crate) places: Arc<dyn Send + Sync>,
}

/// Answers a request.
pub(crate) async fn answer(client: &Arc<Client>, request: Request<Incoming>) -> Response<ResponseBody> {
    let began = Instant::now();
    let under_way = Arc::new(client.activity.begin());
    let (id, json, version) = (request_id(request.headers()), wants_json(request.headers()), request.version());
    let logged = client.ingress.config.access_log.then(|| Logged::of(&request));
    let mut response = match pass(client, request, &id, under_way).await {
        Ok(response) => response,
        Err(refusal) => {
            let mut response = refusal.answer(json, &id);
            if refusal.is_end() && version < Version::HTTP_2 {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    };
    metrics::request(response.status(), version, began.elapsed());
    if let Some(logged) = logged {
        logged.write(client.peer, &id, response.status(), began);
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

async fn pass(
    client: &Arc<Client>,
    mut request: Request<Incoming>,
    id: &HeaderValue,
    under_way: Arc<UnderWay>,
) -> Result<Response<ResponseBody>, Refusal> {
    let config = &client.ingress.config;
    let kind = Kind::of(&request)?;
    let upgrade = (kind == Kind::WebSocket).then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    let host = Host::of(&head.uri, &head.headers, client.sni.as_deref())?;
    let route = client.ingress.routes.route(&host.name).ok_or(Refusal::UnknownHost)?;
    request::prepare(&mut head, kind, &host)?;
    headers::set_forwarded(&mut head.headers, client.peer, &host, config.trust_forwarded);
    head.headers.insert(REQUEST_ID, id.clone());

    let fate = Fate::new();
    let body = match kind {
        Kind::WebSocket => RequestBody::empty(&fate),
        Kind::Plain => RequestBody::new(body, config.body_timeout, Arc::clone(&fate), Arc::clone(&under_way)),
        // Either side may be silent while the other speaks.
        Kind::Grpc => RequestBody::new(body, config.stream_timeout, Arc::clone(&fate), Arc::clone(&under_way)),
    };
    let backend = timeout(config.answer_timeout, route.backend()).await.map_err(|_| Refusal::DialTimeout)??;
    let limit = if kind == Kind::Grpc { config.stream_timeout } else { config.answer_timeout };
    let (is_http2, request) = (head_is_http2(&head), Request::from_parts(request::fresh(head), body));
    let (response, lease) = send::send(&backend, request, kind, &fate, limit).await?;
    match (response.status(), upgrade) {
        (StatusCode::SWITCHING_PROTOCOLS, Some(upgrade)) => {
            Ok(switch(client, response, lease, upgrade, is_http2, under_way))
        }
        (StatusCode::SWITCHING_PROTOCOLS, None) => Err(Refusal::BadAnswer),
        _ => Ok(passed(response, config, lease, fate, under_way)),
    }
}

fn head_is_http2(head: &http::request::Parts) -> bool {
    head.version == Version::HTTP_2
}

/// A program's answer.
fn passed(
    response: Response<Incoming>,
    config: &ProxyConfig,
    lease: Lease,
    fate: Arc<Fate>,
    under_way: Arc<UnderWay>,
) -> Response<ResponseBody> {
    let (mut head, body) = response.into_parts();
    clean(&mut head.headers);
    let mut response = Response::new(ResponseBody::passed(body, config.stream_timeout, lease, fate, under_way));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}

/// Takes out of an answer what concerned the connection into the VM.
fn clean(answer: &mut HeaderMap) {
    if answer.contains_key(header::TRANSFER_ENCODING) {
        // Which of the two counted is known by now.
        answer.remove(header::CONTENT_LENGTH);
    }
    headers::strip_hop_by_hop(answer);
}

/// Both sides agreed to a WebSocket: what comes now is theirs.
fn switch(
    client: &Arc<Client>,
    mut response: Response<Incoming>,
    lease: Lease,
    upgrade: OnUpgrade,
    is_http2: bool,
    under_way: Arc<UnderWay>,
) -> Response<ResponseBody> {
    let program = hyper::upgrade::on(&mut response);
    let (limit, cut) = (client.ingress.config.stream_timeout, client.ingress.cut.clone());
    let held = (Arc::clone(&client.places), lease.into_place());
    client.ingress.tasks.spawn(async move {
        cut.run_until_cancelled(tunnel::carry(upgrade, program, under_way, limit)).await;
        drop(held);
    });
    let (mut head, _) = response.into_parts();
    clean(&mut head.headers);
    let mut response = Response::new(ResponseBody::nothing());
    if is_http2 {
        head.headers.remove(header::SEC_WEBSOCKET_ACCEPT);
        head.headers.remove(header::CONTENT_LENGTH);
    } else {
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        head.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    *response.headers_mut() = head.headers;
    response
}

/// The client's id of the request, if it has a sensible one, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_sensible = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=ID_CHARS).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(is_sensible).cloned().unwrap_or_else(|| {
        let (bits, mut id) = (rand::random::<[u8; 10]>(), *b"req-00000000000000000000");
        hex::encode_to_slice(bits, &mut id[4..]).expect("two digits for each byte");
        HeaderValue::from_bytes(&id).expect("hexadecimal digits are a header's value")
    })
}

/// What the log says of a request. Not the query: it may hold secrets.
struct Logged {
    method: Method,
    host: String,
    path: String,
}

impl Logged {
    fn of(request: &Request<Incoming>) -> Self {
        let named = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let host = request.uri().host().or(named).unwrap_or_default().to_owned();
        Self { method: request.method().clone(), host, path: request.uri().path().to_owned() }
    }

    fn write(&self, peer: IpAddr, id: &HeaderValue, status: StatusCode, began: Instant) {
        let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (Self { method, host, path }, status) = (self, status.as_u16());
        let request_id = id.to_str().unwrap_or_default();
        tracing::info!(%peer, request_id, %method, host, path, status, took_us, "{method} {host}{path} {status}");
    }
}

/// Whether a request is for a WebSocket, over HTTP/2 (RFC 8441).
fn is_extended_connect(request: &Request<Incoming>) -> bool {
    request.extensions().get::<Protocol>().is_some_and(|protocol| protocol.as_str() == "websocket")
}
