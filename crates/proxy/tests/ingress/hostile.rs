//! Clients that try it on.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use http::Request;
use tiffin_proxy::ProxyConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{HOST, Site, Way, echo, full, program, text, until, within};

/// A program that notes every byte it gets and answers nothing but what ends with a blank line.
async fn listener(heard: Arc<Mutex<Vec<u8>>>) -> Way {
    program(move |mut stream| {
        let heard = Arc::clone(&heard);
        async move {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut bytes).await {
                heard.lock().unwrap().extend_from_slice(&bytes[..read]);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_request_whose_end_is_arguable_is_refused_or_framed_anew() {
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: a.vm.test\r\nConnection: close\r\n\r\n";
    let cases = [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        "Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
        "Content-Length: 0, 44\r\n\r\n",
        "Content-Length: +0\r\n\r\n",
        "Content-Length : 0\r\n\r\n",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0 \r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    ];
    for case in cases {
        let site = Site::start().await;
        let heard = Arc::new(Mutex::new(Vec::new()));
        site.route(listener(Arc::clone(&heard)).await);
        let answer = site.raw(format!("POST /first HTTP/1.1\r\nHost: a.vm.test\r\n{case}{smuggled}").as_bytes()).await;
        let heard = String::from_utf8_lossy(&heard.lock().unwrap()).into_owned();
        let refused = answer.starts_with("HTTP/1.1 400 ") || answer.is_empty();
        // What was passed on has one length, and what came after it is a request of its own, in sight of the ingress.
        let lengths = heard.matches("content-length").count() + heard.matches("transfer-encoding").count();
        let seen = heard.matches("x-forwarded-for").count();
        assert!(
            refused || lengths <= 1 && seen == heard.matches(" HTTP/1.1\r\n").count(),
            "{case:?}: {heard:?} {answer:?}"
        );
        assert!(!heard.contains("cow") && !heard.contains("xchunked"), "{case:?}: {heard:?}");
    }
}

#[tokio::test]
async fn after_a_request_with_both_a_length_and_chunks_nothing_more_is_read() {
    let site = Site::start().await;
    site.route(echo().await);
    let (length, chunks) = ("Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n");
    for both in [[length, chunks], [chunks, length]] {
        let both = both.concat();
        let first = format!("POST / HTTP/1.1\r\nHost: a.vm.test\r\n{both}\r\n0\r\n\r\n");
        let answer = site.raw(format!("{first}GET /smuggled HTTP/1.1\r\nHost: a.vm.test\r\n\r\n").as_bytes()).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(answer.contains("connection: close") && !answer.contains("smuggled"), "{answer}");
    }
}

#[tokio::test]
async fn hosts_that_are_missing_double_or_contradictory_are_refused() {
    let site = Site::start().await;
    site.route(echo().await);
    for (target, hosts) in [
        ("/", ""),
        ("/", "Host: a.vm.test\r\nHost: b.vm.test\r\n"),
        ("/", "Host: a.vm.test/x\r\n"),
        ("https://b.vm.test/", "Host: a.vm.test\r\n"),
    ] {
        let answer = site.raw(format!("GET {target} HTTP/1.1\r\n{hosts}\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{target} {hosts:?}: {answer}");
    }
    let answer = site.raw(b"GET / HTTP/1.1\r\nHost: b.vm.test\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 421 "), "{answer}");
    let mut client = site.http2().await;
    let other = Request::get("https://b.vm.test/").body(full("")).unwrap();
    assert_eq!(within(client.send_request(other)).await.unwrap().status(), 421);
    let two = Request::get(format!("https://{HOST}/")).header("host", "b.vm.test").body(full("")).unwrap();
    assert_eq!(within(client.send_request(two)).await.unwrap().status(), 400);
}

#[tokio::test]
async fn heads_are_bounded_in_bytes_and_number() {
    let site = Site::start().await;
    site.route(echo().await);
    let head = |extra: &str| format!("GET / HTTP/1.1\r\nHost: a.vm.test\r\nConnection: close\r\n{extra}\r\n");
    let many: String = (0..101).map(|nth| format!("x-{nth}: y\r\n")).collect();
    let long = format!("x: {}\r\n", "y".repeat(80_000));
    for extra in [many, long] {
        let answer = site.raw(head(&extra).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{}", &answer[..answer.len().min(200)]);
    }
    let path = format!("GET /{} HTTP/1.1\r\nHost: a.vm.test\r\nConnection: close\r\n\r\n", "y".repeat(80_000));
    let answer = site.raw(path.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 414 ") || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let mut client = site.http2().await;
    let mut request = Request::get(format!("https://{HOST}/"));
    for nth in 0..101 {
        request = request.header(format!("x-{nth}"), "y");
    }
    let answer = within(client.send_request(request.body(full("")).unwrap())).await.unwrap();
    assert_eq!(answer.status(), 431);
    assert!(within(site.http1().await.send_request(crate::harness::get("/"))).await.unwrap().status().is_success());
}

#[tokio::test]
async fn whoever_is_slow_to_say_hello_or_to_ask_is_cut_off() {
    let quick = Duration::from_millis(200);
    let config = ProxyConfig { handshake_timeout: quick, idle_timeout: quick, ..ProxyConfig::default() };
    let site = Site::start_with(config).await;
    let mut silent = tokio::net::TcpStream::connect(site.address).await.unwrap();
    assert_eq!(within(silent.read(&mut [0; 1])).await.unwrap_or(0), 0);
    let answer = site.raw(b"GET / HTTP/1.1\r\nHost: a.vm").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    // The same over HTTP/2: a preface, and nothing after it.
    let mut stream = site.connect(HOST, &[b"h2"]).await;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut rest = Vec::new();
    let _ = within(stream.read_to_end(&mut rest)).await;
}

#[tokio::test]
async fn an_address_has_so_many_connections() {
    let site = Site::start_with(ProxyConfig { max_connections_per_address: 2, ..ProxyConfig::default() }).await;
    let first = site.connect(HOST, &[]).await;
    let _second = site.connect(HOST, &[]).await;
    assert!(site.try_connect(HOST, &[]).await.is_err());
    drop(first);
    until("a place is free again", async || site.try_connect(HOST, &[]).await.is_ok()).await;
}

#[tokio::test]
async fn a_flood_of_resets_ends_the_connection_and_nobody_elses() {
    let site = Site::start().await;
    site.route(echo().await);
    let mut stream = site.connect(HOST, &[b"h2"]).await;
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for nth in 0..20_000u32 {
        let stream_id = (2 * nth + 1).to_be_bytes();
        // HEADERS: GET https / with the authority as a literal; then RST_STREAM.
        let block = [&[0x82, 0x87, 0x84, 0x41, 9][..], HOST.as_bytes()].concat();
        bytes.extend([0, 0, u8::try_from(block.len()).unwrap(), 1, 5]);
        bytes.extend(stream_id);
        bytes.extend(&block);
        bytes.extend([0, 0, 4, 3, 0]);
        bytes.extend(stream_id);
        bytes.extend(8u32.to_be_bytes());
    }
    let flood = within(async {
        let sent = stream.write_all(&bytes).await;
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer).await;
        (sent, ended, answer)
    });
    let (_, _, answer) = flood.await;
    // GOAWAY with ENHANCE_YOUR_CALM, if it got through.
    let calm = answer.windows(4).any(|four| four == 11u32.to_be_bytes());
    assert!(calm || answer.len() < bytes.len(), "{} bytes of answers", answer.len());
    let answer = within(site.http1().await.send_request(crate::harness::get("/"))).await.unwrap();
    assert!(text(answer.into_body()).await.starts_with("GET /"));
}

#[tokio::test]
async fn what_is_no_tls_and_what_is_no_http_ends_without_harm() {
    let site = Site::start().await;
    site.route(echo().await);
    let mut plain = tokio::net::TcpStream::connect(site.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: a.vm.test\r\n\r\n").await.unwrap();
    let _ = within(plain.read_to_end(&mut Vec::new())).await;
    for nonsense in
        [&b"\0\0\0\0\r\n\r\n"[..], b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"G\0T / HTTP/1.1\r\n\r\n"]
    {
        let answer = site.raw(nonsense).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 505"),
            "{answer}"
        );
    }
    let mut stream = site.connect(HOST, &[b"h2"]).await;
    stream.write_all(&[0xff; 4096]).await.unwrap();
    let _ = within(stream.read_to_end(&mut Vec::new())).await;
    assert!(within(site.http1().await.send_request(crate::harness::get("/"))).await.unwrap().status().is_success());
}
