//! WebSockets over both protocols.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{Request, StatusCode};
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use tiffin_proxy::ProxyConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::{
    WebSocketStream, accept_async, client_async,
    tungstenite::{Message, protocol::Role},
};

use crate::harness::{HOST, Site, Way, echo, full, program, read_head, within};

/// A program that says everything back.
async fn parrot() -> Way {
    program(|stream| async move {
        let Ok(mut socket) = accept_async(stream).await else { return };
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() || message.is_binary() {
                socket.send(message).await.unwrap();
            }
        }
    })
    .await
}

async fn talk<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut socket: WebSocketStream<S>) {
    let large = Message::binary(vec![7; 1 << 20]);
    for message in [Message::text("hello"), large] {
        socket.send(message.clone()).await.unwrap();
        assert!(within(socket.next()).await.unwrap().unwrap() == message);
    }
    socket.close(None).await.unwrap();
    assert!(within(socket.next()).await.unwrap().unwrap().is_close());
}

#[tokio::test]
async fn a_websocket_works_over_http_1() {
    let site = Site::start().await;
    site.route(parrot().await);
    let stream = site.connect(HOST, &[b"http/1.1"]).await;
    let (socket, answer) = within(client_async(format!("wss://{HOST}/chat"), stream)).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    talk(socket).await;
}

#[tokio::test]
async fn a_websocket_works_over_http_2_beside_other_requests() {
    let site = Site::start().await;
    site.route(parrot().await);
    let mut client = site.http2().await;
    // With the first answer has come what the ingress says of itself: that it takes them.
    let first = Request::get(format!("https://{HOST}/")).body(full(Bytes::new())).unwrap();
    within(client.send_request(first)).await.unwrap();
    let request = Request::connect(format!("https://{HOST}/chat"))
        .extension(Protocol::from_static("websocket"))
        .header("sec-websocket-version", "13")
        .body(full(Bytes::new()))
        .unwrap();
    let answer = within(client.send_request(request)).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let stream = TokioIo::new(within(hyper::upgrade::on(answer)).await.unwrap());
    talk(WebSocketStream::from_raw_socket(stream, Role::Client, None).await).await;
}

#[tokio::test]
async fn a_program_may_refuse_and_no_other_protocol_is_switched_to() {
    let site = Site::start().await;
    site.route(echo().await);
    let stream = site.connect(HOST, &[b"http/1.1"]).await;
    let refused = within(client_async(format!("wss://{HOST}/"), stream)).await.unwrap_err();
    assert!(refused.to_string().contains("200"), "{refused}");
    let answer = site
        .raw(b"GET / HTTP/1.1\r\nHost: a.vm.test\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && !answer.contains("upgrade"), "{answer}");
    let mut client = site.http1().await;
    let connect = Request::connect(format!("{HOST}:22")).header("host", format!("{HOST}:22")).body(full("")).unwrap();
    assert_eq!(within(client.send_request(connect)).await.unwrap().status(), StatusCode::NOT_IMPLEMENTED);
}

#[tokio::test]
async fn a_program_that_switches_without_being_asked_answers_nonsense() {
    let site = Site::start().await;
    let switching = |mut stream: tokio::net::TcpStream| async move {
        read_head(&mut stream).await;
        let _ =
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n").await;
        let _ = stream.read_u8().await;
    };
    site.route(program(switching).await);
    let answer = site.raw(b"GET / HTTP/1.1\r\nHost: a.vm.test\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("bad_answer"), "{answer}");
}

#[tokio::test]
async fn a_websocket_may_be_silent_for_so_long_and_no_longer() {
    let stream_timeout = Duration::from_millis(300);
    let site = Site::start_with(ProxyConfig { stream_timeout, ..ProxyConfig::default() }).await;
    site.route(parrot().await);
    let stream = site.connect(HOST, &[b"http/1.1"]).await;
    let (mut socket, _) = within(client_async(format!("wss://{HOST}/"), stream)).await.unwrap();
    socket.send(Message::text("x")).await.unwrap();
    assert!(within(socket.next()).await.unwrap().unwrap().is_text());
    // However it ends.
    assert!(!matches!(within(socket.next()).await, Some(Ok(message)) if message.is_text()));
}
