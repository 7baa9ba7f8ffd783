//! Programs that aren't there, stall or talk nonsense, and what the client is told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tiffin_proxy::{Connection, Dial, DialError, ProxyConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{HOST, PATIENCE, Site, Way, full, get, http_program, program, read_head, text, within};

/// A way that fails as it is told.
struct Fails(Failure);

/// What a dial ends with; `None` is no end.
type Failure = fn() -> Option<DialError>;

#[async_trait::async_trait]
impl Dial for Fails {
    async fn dial(&self) -> Result<Connection, DialError> {
        match (self.0)() {
            Some(error) => Err(error),
            None => std::future::pending().await,
        }
    }
}

fn quick() -> ProxyConfig {
    let (dial_timeout, answer_timeout) = (Duration::from_millis(200), Duration::from_millis(200));
    let (body_timeout, listen_patience) = (Duration::from_millis(300), Duration::from_millis(50));
    ProxyConfig { dial_timeout, answer_timeout, body_timeout, listen_patience, ..ProxyConfig::default() }
}

async fn ask(site: &Site) -> Response<Incoming> {
    let mut client = site.http1().await;
    within(client.send_request(get("/"))).await.unwrap()
}

#[track_caller]
fn is(answer: &Response<Incoming>, status: u16, code: &str) {
    assert_eq!((answer.status().as_u16(), answer.headers()["x-tiffin-error"].to_str().unwrap()), (status, code));
}

#[tokio::test]
async fn an_unknown_name_is_not_found_in_text_or_json() {
    let site = Site::start().await;
    let mut client = site.http1().await;
    let answer = within(client.send_request(get("/"))).await.unwrap();
    is(&answer, 404, "unknown_host");
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    let said = text(answer.into_body()).await;
    assert!(said.starts_with("404 Not Found: ") && said.contains(&id), "{said}");
    let request = Request::get("/").header("host", HOST).header("accept", "text/html, application/json;q=0.9");
    let answer = within(client.send_request(request.body(full("")).unwrap())).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/json");
    let body: serde_json::Value = serde_json::from_str(&text(answer.into_body()).await).unwrap();
    assert_eq!(body["code"], "unknown_host");
}

#[tokio::test]
async fn each_way_not_to_be_there_is_told_apart() {
    let site = Site::start_with(quick()).await;
    let cases: [(Failure, u16, &str); 6] = [
        (|| Some(DialError::NotRunning("STOPPED".into())), 503, "vm_not_running"),
        (|| Some(DialError::Busy), 503, "vm_busy"),
        (|| Some(DialError::Refused), 502, "not_listening"),
        (|| Some(DialError::TimedOut), 504, "dial_timeout"),
        (|| None, 504, "dial_timeout"),
        (|| Some(DialError::Failed("a secret of the host's".into())), 502, "unreachable"),
    ];
    for (fails, status, code) in cases {
        site.route(Fails(fails));
        let answer = ask(&site).await;
        is(&answer, status, code);
        assert_eq!(answer.headers().contains_key("retry-after"), status == 503);
        let said = text(answer.into_body()).await;
        assert!(!said.contains("secret"), "{said}");
        assert_eq!(said.contains("STOPPED"), code == "vm_not_running", "{said}");
    }
}

/// A way to where nothing listens so far.
fn nowhere() -> Way {
    let reserved = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    Way::to(reserved.local_addr().unwrap())
}

/// Answers one request there, and is gone.
async fn answer_one(way: &Way) {
    let listener = tokio::net::TcpListener::bind(way.to).await.unwrap();
    crate::harness::run(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        drop(listener);
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n").await.unwrap();
    });
}

#[tokio::test]
async fn a_port_where_nothing_listens_yet_is_served_once_something_does() {
    let (site, way) = (Site::start_with(quick()).await, nowhere());
    site.route(way.clone());
    is(&ask(&site).await, 502, "not_listening");
    answer_one(&way).await;
    assert_eq!(ask(&site).await.status(), StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn a_program_that_comes_up_is_waited_for_and_one_that_has_gone_is_not() {
    let patient = ProxyConfig { listen_patience: PATIENCE, ..ProxyConfig::default() };
    let (site, way) = (Site::start_with(patient).await, nowhere());
    let backend = site.route(way.clone());
    let comes_up = async |after: usize| {
        let up = async {
            while way.dials() < after {
                tokio::task::yield_now().await;
            }
            answer_one(&way).await;
        };
        let (answer, ()) = tokio::join!(ask(&site), up);
        assert_eq!(answer.status(), StatusCode::NO_CONTENT);
    };
    comes_up(3).await;
    let dials = way.dials();
    is(&ask(&site).await, 502, "not_listening");
    assert_eq!(way.dials(), dials + 1, "it has listened, so it isn't coming up");
    backend.starts_anew();
    comes_up(dials + 4).await;
}

#[tokio::test]
async fn a_program_that_closes_stalls_or_talks_nonsense_is_told_apart() {
    let site = Site::start_with(quick()).await;
    site.route(program(|mut stream| async move { drop(read_head(&mut stream).await) }).await);
    is(&ask(&site).await, 502, "connection_closed");
    site.route(
        program(|mut stream| async move {
            read_head(&mut stream).await;
            let _ = stream.read_u8().await;
        })
        .await,
    );
    is(&ask(&site).await, 504, "answer_timeout");
    for nonsense in ["hello\r\n\r\n", "HTTP/1.1 abc\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"] {
        site.route(
            program(move |mut stream| async move {
                read_head(&mut stream).await;
                let _ = stream.write_all(nonsense.as_bytes()).await;
                let _ = stream.read_u8().await;
            })
            .await,
        );
        is(&ask(&site).await, 502, "bad_answer");
    }
    let endless = |mut stream: tokio::net::TcpStream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream.write_all(b"X-More: and more, and more, and more\r\n").await.is_ok() {}
    };
    site.route(program(endless).await);
    assert_eq!(ask(&site).await.status(), StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_taken_for_a_whole_one() {
    let site = Site::start().await;
    for head in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        site.route(
            program(move |mut stream| async move {
                read_head(&mut stream).await;
                let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n5\r\nab").as_bytes()).await;
            })
            .await,
        );
        assert!(within(ask(&site).await.into_body().collect()).await.is_err(), "{head}");
        let mut client = site.http2().await;
        let request = Request::get(format!("https://{HOST}/")).body(full("")).unwrap();
        let answer = within(client.send_request(request)).await.unwrap();
        assert!(within(answer.into_body().collect()).await.is_err(), "{head}");
    }
}

#[tokio::test]
async fn an_answer_that_falls_silent_ends() {
    let stream_timeout = Duration::from_millis(200);
    let site = Site::start_with(ProxyConfig { stream_timeout, ..ProxyConfig::default() }).await;
    site.route(
        program(|mut stream| async move {
            read_head(&mut stream).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab").await;
            let _ = stream.read_u8().await;
        })
        .await,
    );
    assert!(within(ask(&site).await.into_body().collect()).await.is_err());
}

#[tokio::test]
async fn a_client_that_stops_in_the_middle_of_its_body_is_told_so() {
    let site = Site::start_with(quick()).await;
    site.route(
        http_program(|request| {
            Box::pin(async move {
                let _ = request.into_body().collect().await;
                Response::new(full("x"))
            })
        })
        .await,
    );
    let answer = site.raw(b"POST / HTTP/1.1\r\nHost: a.vm.test\r\nContent-Length: 10\r\n\r\nab").await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_timeout"), "{answer}");
}

/// A program that answers one request on each connection and closes it at the second, whatever that is.
async fn answers_once(requests: Arc<AtomicUsize>) -> Way {
    program(move |mut stream| {
        let requests = Arc::clone(&requests);
        async move {
            read_head(&mut stream).await;
            requests.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            read_head(&mut stream).await;
            requests.fetch_add(1, Ordering::SeqCst);
        }
    })
    .await
}

#[tokio::test]
async fn what_a_closed_connection_swallowed_is_repeated_only_where_that_means_nothing() {
    let site = Site::start().await;
    for (method, body, second) in
        [(Method::GET, "", 200), (Method::DELETE, "", 200), (Method::POST, "", 502), (Method::PUT, "body", 502)]
    {
        let requests = Arc::new(AtomicUsize::new(0));
        site.route(answers_once(Arc::clone(&requests)).await);
        let mut client = site.http1().await;
        for (nth, status) in [(1, 200), (2, second)] {
            let request = Request::builder().method(method.clone()).uri("/").header("host", HOST);
            let request = request.body(full(body)).unwrap();
            let answer = within(client.send_request(request)).await.unwrap();
            let code = answer.headers().get("x-tiffin-error").cloned();
            assert_eq!(answer.status().as_u16(), status, "{method} {body:?}, request {nth}: {code:?}");
            let _ = answer.into_body().collect().await;
        }
        assert!(requests.load(Ordering::SeqCst) >= 2, "the second went to the connection that was kept");
    }
}

#[tokio::test]
async fn a_backend_has_so_many_connections_and_the_next_is_told_to_come_back() {
    let config = ProxyConfig { max_connections_per_backend: 1, ..quick() };
    let site = Site::start_with(ProxyConfig { answer_timeout: Duration::from_secs(60), ..config }).await;
    let (reached, mut here) = tokio::sync::mpsc::unbounded_channel();
    site.route(
        program(move |mut stream| {
            let reached = reached.clone();
            async move {
                read_head(&mut stream).await;
                reached.send(()).unwrap();
                let _ = stream.read_u8().await;
            }
        })
        .await,
    );
    let mut first = site.http1().await;
    let waiting = first.send_request(get("/"));
    let mut waiting = std::pin::pin!(waiting);
    tokio::select! {
        _ = &mut waiting => panic!("the program doesn't answer"),
        _ = within(here.recv()) => {}
    }
    is(&ask(&site).await, 503, "vm_busy");
}
