//! gRPC: HTTP/2 all the way, with trailers.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::harness::{Body, HOST, Site, Way, echo, full, program, text, within};

/// A program of HTTP/2 that says each message back and ends with a status.
async fn service() -> Way {
    let answer = async |request: Request<Incoming>| {
        assert_eq!(request.version(), Version::HTTP_2);
        assert_eq!(request.headers()["te"], "trailers");
        assert_eq!(request.uri().authority().unwrap(), HOST);
        let said = request.into_body().into_data_stream().map(|data| Ok(Frame::data(data.unwrap_or_default())));
        let status = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))]);
        let end = futures_util::stream::iter([Ok::<_, Infallible>(Frame::trailers(status))]);
        let answer = Response::builder().header("content-type", "application/grpc");
        Ok::<_, Infallible>(answer.body(BodyExt::boxed(StreamBody::new(said.chain(end)))).unwrap())
    };
    program(move |stream| async move {
        let _ =
            http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service_fn(answer)).await;
    })
    .await
}

fn call(body: Body) -> Request<Body> {
    Request::post(format!("https://{HOST}/pkg.Service/Call"))
        .header("content-type", "application/grpc+proto")
        .header("te", "trailers")
        .body(body)
        .unwrap()
}

#[tokio::test]
async fn calls_share_a_connection_stream_both_ways_and_end_with_trailers() {
    let site = Site::start().await;
    let way = service().await;
    site.route(way.clone());
    let mut client = site.http2().await;
    for _ in 0..3 {
        let (send, messages) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
        let messages = futures_util::stream::unfold(messages, async |mut messages| {
            messages.recv().await.map(|data| (Ok(Frame::data(data)), messages))
        });
        let answer = within(client.send_request(call(BodyExt::boxed(StreamBody::new(messages))))).await.unwrap();
        assert_eq!((answer.status(), answer.version()), (StatusCode::OK, Version::HTTP_2));
        let mut body = answer.into_body();
        for message in ["first", "second"] {
            send.send(Bytes::from(message)).unwrap();
            let frame = within(body.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), message, "before the next one is sent");
        }
        drop(send);
        let trailers = within(body.frame()).await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "0");
    }
    assert_eq!(way.dials(), 1);
}

#[tokio::test]
async fn a_program_without_http_2_is_told_of_as_such() {
    let site = Site::start().await;
    site.route(echo().await);
    let mut client = site.http2().await;
    let answer = within(client.send_request(call(full("x")))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(answer.headers()["x-tiffin-error"], "no_http2");
    assert!(text(answer.into_body()).await.contains("h2c"));
}
