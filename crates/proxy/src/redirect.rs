//! Plain HTTP: where the same is to be had over TLS. Nothing is passed on.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header, uri::Authority};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use crate::{
    Patient,
    answer::{Refusal, chain, wants_json},
    body::ResponseBody,
    forward::Ingress,
    host::Host,
    serve::HEAD,
};

const HTTPS_PORT: u16 = 443;

/// Answers one connection's requests.
pub(crate) async fn serve(ingress: Arc<Ingress>, stream: TcpStream, places: Arc<dyn Send + Sync>) {
    let stream = TokioIo::new(Patient::new(stream, ingress.config.write_timeout));
    let mut builder = http1::Builder::new();
    let builder = builder.timer(TokioTimer::new()).header_read_timeout(ingress.config.handshake_timeout);
    let answer = |request: Request<Incoming>| {
        let answer = answer(&ingress, &request);
        async move { Ok::<_, Infallible>(answer) }
    };
    // There is nothing to keep such a connection for.
    let served = builder.keep_alive(false).max_header_size(HEAD).serve_connection(stream, service_fn(answer)).await;
    if let Err(error) = served {
        tracing::debug!(error = chain(&error), "a connection to the redirect ended early");
    }
    drop(places);
}

fn answer(ingress: &Ingress, request: &Request<Incoming>) -> Response<ResponseBody> {
    redirected(ingress, request)
        .unwrap_or_else(|refusal| refusal.answer(wants_json(request.headers()), &HeaderValue::from_static("none")))
}

fn redirected(ingress: &Ingress, request: &Request<Incoming>) -> Result<Response<ResponseBody>, Refusal> {
    if request.method() == Method::CONNECT {
        return Err(Refusal::Connect);
    }
    let host = Host::of(request.uri(), request.headers(), None)?;
    // Only to names that are somebody's: nobody else's requests are sent anywhere.
    ingress.routes.route(&host.name).ok_or(Refusal::UnknownHost)?;
    let to = target(&host.name, ingress.config.public_port, request.uri()).ok_or(Refusal::BadRequest("a bad path"))?;
    let mut response = Response::new(ResponseBody::full(Bytes::from_static(b"this is to be had over https\n")));
    // Of a kind that keeps the method and the body.
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, to);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(response)
}

fn target(name: &str, port: u16, uri: &Uri) -> Option<HeaderValue> {
    let authority = if port == HTTPS_PORT { name.to_owned() } else { format!("{name}:{port}") };
    let authority = Authority::try_from(authority).ok()?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    HeaderValue::from_str(&format!("https://{authority}{path}")).ok()
}
