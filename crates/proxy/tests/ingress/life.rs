//! Routes that change, certificates, and the end.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http::{Request, Response, StatusCode};
use tiffin_proxy::ProxyConfig;
use tokio::io::AsyncReadExt;
use tokio_tungstenite::{accept_async, client_async, tungstenite::Message};

use crate::harness::{HOST, Site, Way, full, get, http_program, program, text, until, within};

/// A program that answers when it is let, and says when it was asked.
async fn held(name: &'static str) -> (Way, tokio::sync::mpsc::UnboundedReceiver<tokio::sync::oneshot::Sender<()>>) {
    let (asked, asks) = tokio::sync::mpsc::unbounded_channel();
    let way = http_program(move |_| {
        let (go, gone) = tokio::sync::oneshot::channel();
        asked.send(go).unwrap();
        Box::pin(async move {
            let _ = gone.await;
            Response::new(full(name))
        })
    })
    .await;
    (way, asks)
}

#[tokio::test]
async fn a_route_that_changes_cuts_nothing_and_the_next_request_goes_the_new_way() {
    let site = Site::start().await;
    let (blue, mut blue_asks) = held("blue").await;
    let (green, mut green_asks) = held("green").await;
    site.route(blue);
    let mut client = site.http2().await;
    let ask = |client: &mut hyper::client::conn::http2::SendRequest<_>| {
        client.send_request(Request::get(format!("https://{HOST}/")).body(full("")).unwrap())
    };
    let first = ask(&mut client);
    let mut first = std::pin::pin!(first);
    let let_blue = tokio::select! { _ = &mut first => panic!("not yet"), go = within(blue_asks.recv()) => go.unwrap() };
    site.route(green);
    let second = ask(&mut client);
    let mut second = std::pin::pin!(second);
    let let_green =
        tokio::select! { _ = &mut second => panic!("not yet"), go = within(green_asks.recv()) => go.unwrap() };
    let_green.send(()).unwrap();
    assert_eq!(text(within(second).await.unwrap().into_body()).await, "green");
    site.table.remove(HOST);
    let_blue.send(()).unwrap();
    assert_eq!(text(within(first).await.unwrap().into_body()).await, "blue");
    assert_eq!(within(ask(&mut client)).await.unwrap().status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn at_the_end_what_is_under_way_is_answered_and_nothing_new_is_taken() {
    let site = Site::start().await;
    let (way, mut asks) = held("done").await;
    site.route(way);
    let idle = site.http1().await;
    let mut client = site.http1().await;
    let answer = client.send_request(get("/"));
    let mut answer = std::pin::pin!(answer);
    let go = tokio::select! { _ = &mut answer => panic!("not yet"), go = within(asks.recv()) => go.unwrap() };
    site.shutdown.cancel();
    until("idle connections end", async || idle.is_closed()).await;
    until("nobody is let in", async || tokio::net::TcpStream::connect(site.address).await.is_err()).await;
    assert!(!site.tasks.is_empty(), "it waits for the answer");
    go.send(()).unwrap();
    assert_eq!(text(within(answer).await.unwrap().into_body()).await, "done");
    within(site.tasks.wait()).await;
}

#[tokio::test]
async fn what_doesnt_end_in_its_time_is_cut() {
    let shutdown_grace = Duration::from_millis(100);
    let site = Site::start_with(ProxyConfig { shutdown_grace, ..ProxyConfig::default() }).await;
    site.route(
        program(|stream| async move {
            let mut socket = accept_async(stream).await.unwrap();
            while let Some(Ok(message)) = socket.next().await {
                let _ = socket.send(message).await;
            }
        })
        .await,
    );
    let stream = site.connect(HOST, &[b"http/1.1"]).await;
    let (mut socket, _) = within(client_async(format!("wss://{HOST}/"), stream)).await.unwrap();
    socket.send(Message::text("x")).await.unwrap();
    assert!(within(socket.next()).await.unwrap().unwrap().is_text());
    site.shutdown.cancel();
    within(site.tasks.wait()).await;
    assert!(!matches!(within(socket.next()).await, Some(Ok(message)) if message.is_text()));
}

#[tokio::test]
async fn the_certificate_is_for_every_name_of_the_domain_and_for_no_other() {
    let site = Site::start().await;
    for name in ["a.vm.test", "anything-else.vm.test", "vm.test"] {
        site.connect(name, &[b"h2"]).await;
    }
    for name in ["a.other.test", "a.b.vm.test"] {
        let refused = site.try_connect(name, &[]).await.unwrap_err().to_string();
        assert!(refused.contains("certificate"), "{refused}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_program() {
    let site = Site::start().await;
    let (gone, mut is_gone) = tokio::sync::mpsc::unbounded_channel();
    let (asked, mut is_asked) = tokio::sync::mpsc::unbounded_channel();
    site.route(
        program(move |mut stream| {
            let (gone, asked) = (gone.clone(), asked.clone());
            async move {
                crate::harness::read_head(&mut stream).await;
                asked.send(()).unwrap();
                let _ = stream.read_u8().await;
                gone.send(()).unwrap();
            }
        })
        .await,
    );
    let mut client = site.http2().await;
    let request = Request::get(format!("https://{HOST}/")).body(full("")).unwrap();
    {
        let answer = client.send_request(request);
        let mut answer = std::pin::pin!(answer);
        tokio::select! { _ = &mut answer => panic!("no answer comes"), _ = within(is_asked.recv()) => {} }
    }
    within(is_gone.recv()).await.unwrap();
}
