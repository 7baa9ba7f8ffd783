//! Exchanges with real receivers on loopback, plain and over TLS.
#![allow(clippy::unwrap_used)]

use std::{
    collections::VecDeque,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tiffin_outbound::{Answer, Client, OutboundError, Policy, Refused, Request, Resolve, Resolving, Roots};

const LIMIT: Duration = Duration::from_secs(20);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn loopback() -> Policy {
    Policy { allow_http: true, allow: vec!["127.0.0.0/8".parse().unwrap()] }
}

/// Answers each connection, one after the other, by `serve`; the port.
fn listen(serve: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().for_each(|stream| serve(stream.unwrap())));
    port
}

/// Reads a request's head and as much of a body as it says.
fn read_request(mut stream: impl Read) -> String {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        text.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&text).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map(|text| text.parse().unwrap());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).unwrap();
    String::from_utf8([text, body].concat()).unwrap()
}

async fn send(client: &Client, method: Method, url: &str, body: &'static str) -> Result<Answer, OutboundError> {
    let request = Request { method, url: url.parse().unwrap(), headers: HeaderMap::new(), body: Bytes::from(body) };
    tokio::time::timeout(LIMIT, client.send(request)).await.expect("an answer or an error in time")
}

/// Gives what it was told, call by call.
struct Scripted(Mutex<VecDeque<Vec<IpAddr>>>);

impl Resolve for Scripted {
    fn resolve(&self, _: String) -> Resolving {
        let addresses = self.0.lock().unwrap().pop_front().unwrap();
        Box::pin(std::future::ready(Ok(addresses)))
    }
}

fn scripted(answers: &[&[&str]]) -> Scripted {
    let parsed = answers.iter().map(|answer| answer.iter().map(|address| address.parse().unwrap()).collect());
    Scripted(Mutex::new(parsed.collect()))
}

#[tokio::test]
async fn a_request_arrives_as_it_was_made_and_the_answer_comes_back() {
    let (sender, seen) = std::sync::mpsc::channel();
    let port = listen(move |mut stream| {
        sender.send(read_request(&stream)).unwrap();
        stream.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello").unwrap();
    });
    let client = Client::new(loopback(), Roots::default(), LIMIT);
    let answer = send(&client, Method::POST, &format!("http://127.0.0.1:{port}/a/b?c=d#e"), "{}").await.unwrap();
    assert_eq!((answer.status, &answer.headers["x-a"]), (StatusCode::ACCEPTED, &"b".parse().unwrap()));
    assert_eq!(answer.body.read(5).await.unwrap(), b"hello");
    let request = seen.recv().unwrap();
    assert!(request.starts_with("POST /a/b?c=d HTTP/1.1\r\n") && request.ends_with("\r\n\r\n{}"), "{request}");
    assert!(request.contains(&format!("host: 127.0.0.1:{port}\r\n")), "{request}");
}

#[tokio::test]
async fn a_name_that_turns_to_a_private_address_is_refused_although_it_was_fine_before() {
    let port = listen(|mut stream| {
        read_request(&stream);
        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
    });
    let resolver = scripted(&[&["127.0.0.1"], &["10.0.0.1", "169.254.169.254", "::1"], &["10.0.0.1", "127.0.0.1"]]);
    let client = Client::new(loopback(), Roots::default(), LIMIT).with_resolver(resolver);
    let url = format!("http://hooks.example:{port}/");
    assert_eq!(send(&client, Method::GET, &url, "").await.unwrap().status, 204);
    let refused = send(&client, Method::GET, &url, "").await.unwrap_err();
    assert!(matches!(refused, OutboundError::Refused(Refused::Address(_))), "{refused}");
    // Of several addresses, the allowed ones are used.
    assert_eq!(send(&client, Method::GET, &url, "").await.unwrap().status, 204);
}

#[tokio::test]
async fn names_and_addresses_of_loopback_are_refused_by_default() {
    let client = Client::new(Policy { allow_http: true, ..Policy::default() }, Roots::default(), LIMIT);
    for host in ["localhost", "127.0.0.1", "[::1]", "0"] {
        let refused = send(&client, Method::GET, &format!("http://{host}:9/"), "").await.unwrap_err();
        assert!(matches!(refused, OutboundError::Refused(Refused::Address(_))), "{host}: {refused}");
    }
}

#[tokio::test]
async fn an_address_that_refuses_leaves_the_next_its_turn() {
    let port = listen(|mut stream| {
        read_request(&stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
    });
    let client =
        Client::new(loopback(), Roots::default(), LIMIT).with_resolver(scripted(&[&["127.9.9.9", "127.0.0.1"]]));
    assert_eq!(send(&client, Method::GET, &format!("http://two.example:{port}/"), "").await.unwrap().status, 200);
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_nothing_more() {
    let port = listen(|mut stream| {
        read_request(&stream);
        let answer = "HTTP/1.1 307 Moved\r\nLocation: http://169.254.169.254/latest\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let client = Client::new(loopback(), Roots::default(), LIMIT);
    assert_eq!(send(&client, Method::POST, &format!("http://127.0.0.1:{port}/"), "").await.unwrap().status, 307);
}

#[tokio::test]
async fn an_endless_body_is_read_up_to_the_limit_and_an_endless_head_is_no_answer() {
    let endless = |begin: &'static str, more: &'static [u8]| {
        listen(move |mut stream| {
            read_request(&stream);
            stream.write_all(begin.as_bytes()).unwrap();
            while stream.write_all(more).is_ok() {}
        })
    };
    let client = Client::new(loopback(), Roots::default(), LIMIT);
    let port = endless("HTTP/1.1 200 OK\r\n\r\n", &[b'x'; 4096]);
    let answer = send(&client, Method::GET, &format!("http://127.0.0.1:{port}/"), "").await.unwrap();
    assert!(matches!(answer.body.read(100_000).await, Err(OutboundError::TooLarge(100_000))));
    let port = endless("HTTP/1.1 200 OK\r\nX-Endless: ", &[b'x'; 4096]);
    let error = send(&client, Method::GET, &format!("http://127.0.0.1:{port}/"), "").await.unwrap_err();
    assert!(matches!(error, OutboundError::Http(_)), "{error}");
}

#[tokio::test]
async fn who_closes_early_or_speaks_something_else_is_an_error() {
    let client = Client::new(loopback(), Roots::default(), LIMIT);
    for answer in ["", "SSH-2.0-OpenSSH\r\n", "HTTP/1.1 200 OK\r\nContent-Le"] {
        let port = listen(move |mut stream| {
            read_request(&stream);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let error = send(&client, Method::GET, &format!("http://127.0.0.1:{port}/"), "").await.unwrap_err();
        assert!(matches!(error, OutboundError::Http(_)), "{answer}: {error}");
    }
    let port = listen(|mut stream| {
        read_request(&stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort").unwrap();
    });
    let answer = send(&client, Method::GET, &format!("http://127.0.0.1:{port}/"), "").await.unwrap();
    assert!(matches!(answer.body.read(1000).await, Err(OutboundError::Http(_))));
}

#[tokio::test]
async fn a_receiver_that_never_shakes_hands_is_given_up() {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let url = format!("https://127.0.0.1:{}/", listener.local_addr().unwrap().port());
    let client =
        Client::new(loopback(), Roots::with_extra(authority().0.as_bytes()).unwrap(), Duration::from_millis(300));
    let error = send(&client, Method::GET, &url, "").await.unwrap_err();
    assert!(matches!(error, OutboundError::ConnectTimeout(_)), "{error}");
}

/// An authority's certificate, and what it signs with.
fn authority() -> (String, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), Issuer::new(params, key))
}

#[tokio::test]
async fn tls_needs_a_certificate_of_the_host_from_a_known_authority() {
    let (pem, issuer) = authority();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["hooks.example".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    let config = Arc::new(config);
    let port = listen(move |stream| {
        let session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
        let mut stream = rustls::StreamOwned::new(session, stream);
        // Whoever doesn't trust us is gone by now.
        if !read_request(&mut stream).is_empty() {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        }
    });
    let known = || Roots::with_extra(pem.as_bytes()).unwrap();
    let client = Client::new(loopback(), known(), LIMIT).with_resolver(scripted(&[&["127.0.0.1"], &["127.0.0.1"]]));
    for host in ["hooks.example", "127.0.0.1"] {
        let answer = send(&client, Method::GET, &format!("https://{host}:{port}/"), "").await.unwrap();
        assert_eq!(answer.body.read(10).await.unwrap(), b"ok", "{host}");
    }
    let error = send(&client, Method::GET, &format!("https://other.example:{port}/"), "").await.unwrap_err();
    assert!(matches!(error, OutboundError::Tls(_)), "{error}");
    let stranger = Client::new(loopback(), Roots::with_extra(authority().0.as_bytes()).unwrap(), LIMIT);
    let error = send(&stranger, Method::GET, &format!("https://127.0.0.1:{port}/"), "").await.unwrap_err();
    assert!(matches!(error, OutboundError::Tls(_)), "{error}");
}

#[test]
fn certificates_that_are_none_are_refused() {
    for pem in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        assert!(Roots::with_extra(pem.as_bytes()).is_err(), "{pem}");
    }
}
