//! What is passed on, and how.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use crate::harness::{HOST, Site, echo, full, get, http_program, program, read_head, text, until, within};

const LARGE: u64 = 100 << 20;

#[tokio::test]
async fn a_request_reaches_its_program_with_its_host_and_who_asked() {
    let site = Site::start().await;
    site.route(echo().await);
    let mut client = site.http1().await;
    let request = Request::post("/a/b?c=%20")
        .header("host", "A.vm.test:3443")
        .header("x-forwarded-for", "1.2.3.4")
        .header("connection", "x-own")
        .header("x-own", "1")
        .header("expect", "100-continue")
        .body(full("hello"))
        .unwrap();
    let answer = within(client.send_request(request)).await.unwrap();
    assert_eq!((answer.status(), &answer.headers()["x-program"]), (StatusCode::OK, &"1".parse().unwrap()));
    assert!(answer.headers()["x-request-id"].to_str().unwrap().starts_with("req-"));
    assert!(!answer.headers().contains_key("keep-alive"));
    let seen = text(answer.into_body()).await;
    assert!(seen.starts_with("POST /a/b?c=%20\n") && seen.ends_with("\n\nhello"), "{seen}");
    for header in
        ["host: A.vm.test:3443", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: https", "content-length: 5"]
    {
        assert!(seen.contains(&format!("{header}\n")), "{header} in {seen}");
    }
    for header in ["1.2.3.4", "x-own", "expect", "connection", "transfer-encoding"] {
        assert!(!seen.contains(header), "{header} in {seen}");
    }
}

#[tokio::test]
async fn http_2_becomes_http_1_with_one_host_and_one_cookie() {
    let site = Site::start().await;
    site.route(echo().await);
    let mut client = site.http2().await;
    let request = Request::put(format!("https://{HOST}/x?y"))
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("x-request-id", "mine-1")
        .body(full("body"))
        .unwrap();
    let answer = within(client.send_request(request)).await.unwrap();
    assert_eq!(answer.headers()["x-request-id"], "mine-1");
    let seen = text(answer.into_body()).await;
    assert!(seen.starts_with("PUT /x?y\n") && seen.ends_with("\n\nbody"), "{seen}");
    for header in [&format!("host: {HOST}"), "cookie: a=1; b=2", "x-request-id: mine-1"] {
        assert!(seen.contains(&format!("{header}\n")), "{header} in {seen}");
    }
}

#[tokio::test]
async fn large_bodies_stream_both_ways_over_both_protocols() {
    let site = Site::start().await;
    site.route(
        http_program(|request| {
            Box::pin(async move {
                // What comes goes back as it comes.
                let frames = request.into_body().into_data_stream();
                let frames = futures_util::StreamExt::map(frames, |data| Ok(Frame::data(data.unwrap_or_default())));
                Response::new(BodyExt::boxed(StreamBody::new(frames)))
            })
        })
        .await,
    );
    let body = || {
        let zeros = ReaderStream::with_capacity(tokio::io::repeat(7).take(LARGE), 64 * 1024);
        BodyExt::boxed(StreamBody::new(futures_util::StreamExt::map(zeros, |data| Ok(Frame::data(data.unwrap())))))
    };
    let mut http1 = site.http1().await;
    let request = Request::post("/").header("host", HOST).body(body()).unwrap();
    let first = within(http1.send_request(request)).await.unwrap();
    let mut http2 = site.http2().await;
    let request = Request::post(format!("https://{HOST}/")).body(body()).unwrap();
    let second = within(http2.send_request(request)).await.unwrap();
    for answer in [first, second] {
        let (mut body, mut length) = (answer.into_body(), 0);
        while let Some(frame) = within(body.frame()).await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data.iter().all(|byte| *byte == 7));
            length += data.len() as u64;
        }
        assert_eq!(length, LARGE);
    }
}

#[tokio::test]
async fn events_come_as_they_are_sent() {
    let site = Site::start().await;
    let (send, events) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
    let events = Arc::new(std::sync::Mutex::new(Some(events)));
    site.route(
        http_program(move |_| {
            let mut events = events.lock().unwrap().take().unwrap();
            Box::pin(async move {
                let frames = futures_util::stream::poll_fn(move |cx| events.poll_recv(cx));
                let frames = futures_util::StreamExt::map(frames, |data| Ok(Frame::data(data)));
                let answer = Response::builder().header("content-type", "text/event-stream");
                answer.body(BodyExt::boxed(StreamBody::new(frames))).unwrap()
            })
        })
        .await,
    );
    let mut client = site.http2().await;
    let answer = client.send_request(Request::get(format!("https://{HOST}/")).body(full("")).unwrap());
    let mut body = within(answer).await.unwrap().into_body();
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        send.send(Bytes::from(event)).unwrap();
        let frame = within(body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), event, "before the next one is sent");
    }
    drop(send);
    assert!(within(body.collect()).await.unwrap().to_bytes().is_empty());
}

#[tokio::test]
async fn what_nobody_takes_is_not_read_from_the_program() {
    let site = Site::start().await;
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    site.route(
        program(move |mut stream| {
            let count = Arc::clone(&count);
            async move {
                read_head(&mut stream).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000000\r\n\r\n").await;
                while let Ok(()) = stream.write_all(&[0; 64 * 1024]).await {
                    count.fetch_add(64 * 1024, Ordering::SeqCst);
                }
            }
        })
        .await,
    );
    let mut client = site.http2().await;
    let answer = client.send_request(Request::get(format!("https://{HOST}/")).body(full("")).unwrap());
    let mut answer = within(answer).await.unwrap().into_body();
    let before = || sent.load(Ordering::SeqCst);
    // The program stands still once windows and sockets are full.
    let stands = async || {
        let now = before();
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        now == before()
    };
    until("the program stands still", stands).await;
    let stood_at = before();
    assert!(stood_at < 64 << 20, "{stood_at} bytes are on their way");
    until("it goes on when the client takes something", async || {
        let _ = answer.frame().await;
        before() > stood_at
    })
    .await;
}

#[tokio::test]
async fn connections_to_a_program_are_used_again_and_closed_with_the_route() {
    let site = Site::start().await;
    let open = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&open);
    let way = program(move |mut stream| {
        let count = Arc::clone(&count);
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            while read_head(&mut stream).await.starts_with("GET") {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            }
            count.fetch_sub(1, Ordering::SeqCst);
        }
    })
    .await;
    let backend = site.route(way.clone());
    let mut client = site.http1().await;
    for _ in 0..20 {
        let answer = within(client.send_request(get("/"))).await.unwrap();
        assert_eq!(text(answer.into_body()).await, "ok");
    }
    assert!(way.dials() <= 2, "{} dials", way.dials());
    backend.close_idle();
    until("what is idle is closed when asked", async || open.load(Ordering::SeqCst) == 0).await;
    let answer = within(client.send_request(get("/"))).await.unwrap();
    assert_eq!(text(answer.into_body()).await, "ok");
    until("and after a while by itself", async || open.load(Ordering::SeqCst) == 0).await;
    let answer = within(client.send_request(get("/"))).await.unwrap();
    assert_eq!(text(answer.into_body()).await, "ok");
    drop(backend);
    site.table.remove(HOST);
    until("and when the route goes", async || open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn plain_http_is_told_where_the_same_is_to_be_had() {
    let site = Site::start().await;
    site.route(echo().await);
    let ask = async |host: &str| {
        let mut stream = tokio::net::TcpStream::connect(site.redirect).await.unwrap();
        let request = format!("GET /x?y HTTP/1.1\r\nHost: {host}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        within(stream.read_to_string(&mut answer)).await.unwrap();
        answer
    };
    let answer = ask("a.vm.test:80").await;
    assert!(answer.starts_with("HTTP/1.1 308 ") && answer.contains("location: https://a.vm.test/x?y\r\n"), "{answer}");
    assert!(ask("elsewhere.test").await.starts_with("HTTP/1.1 404 "));
}
