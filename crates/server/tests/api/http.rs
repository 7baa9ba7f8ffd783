//! What holds for every request: ids, limits, errors as JSON, the pages beside the API.

use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::json;
use tiffin_engine::fake::Script;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{Server, send, small_vm};

#[tokio::test]
async fn a_sane_request_id_is_kept_and_another_is_replaced() -> Result<()> {
    let server = Server::start().await?;
    let with = async |id: &str| send(server.request(Method::GET, "/v1/vms/x").header("x-request-id", id)).await;
    let reply = with("my-id.1").await?;
    reply.refused(404, "not_found");
    assert_eq!(reply.headers["x-request-id"], "my-id.1");
    for bad in ["", "with blank", &"x".repeat(65)] {
        let reply = with(bad).await?;
        reply.refused(404, "not_found");
        assert_ne!(reply.headers["x-request-id"], bad);
    }
    let one = server.get("/health").await?.headers["x-request-id"].clone();
    assert_ne!(one, server.get("/health").await?.headers["x-request-id"]);
    Ok(())
}

#[tokio::test]
async fn bodies_that_are_no_json_object_are_refused_each_with_its_reason() -> Result<()> {
    let server = Server::start_with(&[("limits.body_bytes", "2048")]).await?;
    let post = async |kind: &str, body: Vec<u8>| {
        send(server.request(Method::POST, "/v1/vms").header("Content-Type", kind).body(body)).await
    };
    let json = "application/json";
    for (bad, says) in [
        ("", "empty"),
        ("  \n", "empty"),
        ("[]", "no object"),
        ("null", "no object"),
        ("\"x\"", "no object"),
        ("{", "not valid JSON"),
        ("{\"cpu\": 1,}", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("cpu=1", "not valid JSON"),
        ("{\"cpu\": NaN}", "not valid JSON"),
        ("{\"cpu\": 1e999}", "not valid JSON"),
    ] {
        let message = post(json, bad.into()).await?.refused(400, "bad_request");
        assert!(message.contains(says), "{bad}: {message}");
    }
    post(json, vec![b'{', b'"', 0xff, b'"']).await?.refused(400, "bad_request");
    post(json, format!("{}1{}", "[".repeat(500), "]".repeat(500)).into()).await?.refused(400, "bad_request");

    for bytes in [2049, 8 << 20] {
        let message = post(json, vec![b' '; bytes]).await?.refused(413, "too_large");
        assert!(message.contains("2048"), "{message}");
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x"] {
        post(kind, b"{}".to_vec()).await?.refused(415, "unsupported_media_type");
    }
    let vm = post("application/json; charset=utf-8", small_vm().to_string().into()).await?;
    vm.ok(201);
    Ok(())
}

#[tokio::test]
async fn a_body_without_an_announced_length_is_bounded_too() -> Result<()> {
    let server = Server::start_with(&[("limits.body_bytes", "2048")]).await?;
    let chunks = futures_util::stream::iter((0..100).map(|_| anyhow::Ok(vec![b' '; 100])));
    let request = server.request(Method::POST, "/v1/vms").header("Content-Type", "application/json");
    send(request.body(reqwest::Body::wrap_stream(chunks))).await?.refused(413, "too_large");
    Ok(())
}

#[tokio::test]
async fn a_client_that_sends_all_before_it_reads_gets_its_413_too() -> Result<()> {
    let server = Server::start().await?;
    let body = vec![b' '; 8 << 20];
    let head = format!(
        "POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-API-Key: {}\r\nContent-Length: {}\r\n\r\n",
        server.key,
        body.len()
    );
    let answer = raw(&server, &[head.as_bytes(), &body].concat()).await?;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn unknown_routes_and_methods_are_json_errors() -> Result<()> {
    let server = Server::start().await?;
    for path in ["/", "/v1", "/v1/vm", "/v1/vms/", "/v2/vms", "/v1/vms/x/y/z"] {
        server.get(path).await?.refused(404, "no_such_route");
    }
    let reply = send(server.request(Method::PUT, "/v1/vms")).await?;
    reply.refused(405, "method_not_allowed");
    let allow = reply.headers["allow"].to_str()?;
    assert!(allow.contains("GET") && allow.contains("POST"), "{allow}");
    send(server.request(Method::from_bytes(b"BREW")?, "/health")).await?.refused(405, "method_not_allowed");
    Ok(())
}

#[tokio::test]
async fn health_metrics_documents_and_pages_need_no_key() -> Result<()> {
    let server = Server::start_cold().await?;
    let vm = server.vm().await?;
    server.post(&format!("{vm}/exec"), &json!({ "cmd": "echo secret-word" })).await?.ok(200);
    let get = async |path: &str| send(server.client.get(format!("{}{path}", server.url))).await;

    let health = get("/health").await?.ok(200);
    assert_eq!((&health["status"], &health["store"], &health["engine"]), (&json!("ok"), &json!("ok"), &json!("fake")));
    assert_eq!(get("/openapi.json").await?.ok(200)["info"]["title"], "Tiffin");
    let metrics = get("/metrics").await?;
    for name in [
        "tiffin_http_request_duration_seconds_bucket{route=\"/v1/vms/{id}/exec\",method=\"POST\",status=\"200\"",
        "tiffin_vms{state=\"RUNNING\"} 1",
        "tiffin_exec_platform_seconds_bucket",
        "tiffin_vm_starts_total{outcome=\"ok\"}",
        "tiffin_build_info{version=",
    ] {
        assert!(metrics.text.contains(name), "{name} is not in {}", metrics.text);
    }
    assert!(!metrics.text.contains("secret-word") && !metrics.text.contains(&vm), "ids and commands are no labels");

    for page in [
        "/docs",
        "/docs/",
        "/docs/quickstart",
        "/docs/api",
        "/docs/errors.md",
        "/docs/configuration",
        "/swagger",
        "/swagger/",
    ] {
        let page = get(page).await?;
        assert_eq!(page.status, 200);
        assert!(page.text.contains("<html"), "{}", page.text);
    }
    assert!(get("/docs/").await?.text.contains("<h1>"));
    get("/docs/nope").await?.refused(404, "not_found");
    get("/docs/..%2f..%2fCargo.toml").await?.refused(404, "not_found");
    let script = get("/swagger/swagger-ui-bundle.js").await?;
    assert!(script.status == 200 && script.text.len() > 100_000, "it comes from the program");
    Ok(())
}

#[tokio::test]
async fn metrics_can_ask_for_an_administrators_key() -> Result<()> {
    let server = Server::start_with(&[("metrics.require_key", "true")]).await?;
    send(server.client.get(format!("{}/metrics", server.url))).await?.refused(401, "unauthorized");
    let reader = server.other_key("reader", &["read"]).await?;
    server.get_as(&reader, "/metrics").await?.refused(403, "forbidden");
    assert_eq!(server.get("/metrics").await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn a_store_that_is_gone_makes_health_503_and_requests_503_without_the_inside() -> Result<()> {
    let server = Server::start().await?;
    server.get("/health").await?.ok(200);
    server.store.close().await;
    let health = server.get("/health").await?.ok(503);
    assert_eq!((&health["status"], &health["store"]), (&json!("unavailable"), &json!("unavailable")));
    let reply = server.get("/v1/vms").await?;
    assert!(reply.refused(503, "store_unavailable").contains("try again later"));
    assert!(reply.headers.contains_key("retry-after"));
    assert!(!reply.text.contains("sql") && !reply.text.contains("pool"), "{}", reply.text);
    Ok(())
}

#[tokio::test]
async fn a_panic_in_a_handler_is_a_500_and_the_server_goes_on() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.panic_on_denied();
    assert_eq!(server.get(&format!("{vm}/network")).await?.refused(500, "internal"), "internal error");
    server.get("/v1/vms").await?.ok(200);
    Ok(())
}

/// Sends bytes and reads until the server closes the connection.
async fn raw(server: &Server, bytes: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await?;
    stream.write_all(bytes).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.context("it stays open")??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn slow_clients_are_cut_off_and_slow_bodies_get_a_408() -> Result<()> {
    let settings = [("http.header_timeout_ms", "300"), ("http.body_timeout_ms", "300")];
    let server = Server::start_with(&settings).await?;
    raw(&server, b"GET /health HTT").await?;
    raw(&server, b"").await?;
    raw(&server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    let head = format!(
        "POST /v1/vms HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{",
        server.key
    );
    let answer = raw(&server, head.as_bytes()).await?;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("body_timeout"), "{answer}");
    server.get("/health").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn a_client_that_takes_nothing_of_its_answer_is_cut_off() -> Result<()> {
    let server = Server::start_with(&[("http.write_timeout_ms", "300"), ("http.max_connections", "1")]).await?;
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await?;
    // More answers than the socket's buffers hold; none is read.
    let ask = b"GET /swagger/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n".repeat(200);
    stream.write_all(&ask).await?;
    // There is one place for a connection: this one is served once the other is cut.
    server.get("/health").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn an_operation_that_takes_too_long_is_given_up_with_a_503() -> Result<()> {
    let server = Server::start_with(&[("http.request_timeout_ms", "200")]).await?;
    let vm = server.vm().await?;
    server.fake.hang_on_denied();
    server.get(&format!("{vm}/network")).await?.refused(503, "timed_out");
    server.get("/v1/vms").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn what_is_no_http_is_refused_and_hurts_nobody() -> Result<()> {
    let server = Server::start_with(&[("http.header_timeout_ms", "500")]).await?;
    raw(&server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await?;
    let mut huge = b"GET / HTTP/1.1\r\nHost: x\r\n".to_vec();
    for n in 0..2000 {
        huge.extend(format!("X-{n}: {}\r\n", "y".repeat(500)).into_bytes());
    }
    // The server may answer, or close with so much unread that the client sees a reset.
    let _ = raw(&server, &huge).await;
    server.get("/health").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_and_are_served_later() -> Result<()> {
    let server = Server::start_with(&[("http.max_connections", "2"), ("http.header_timeout_ms", "500")]).await?;
    let address = server.url.trim_start_matches("http://");
    let _one = TcpStream::connect(address).await?;
    let _two = TcpStream::connect(address).await?;
    server.get("/health").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn a_shutdown_lets_a_request_in_flight_finish_and_leaves_vms_running() -> Result<()> {
    let server = Server::start_with(&[("http.shutdown_grace_ms", "5000")]).await?;
    let vm = server.vm().await?;
    server.fake.script("work", Script { delay: Duration::from_millis(300), ..Script::default() });
    let path = format!("{vm}/exec");
    let body = json!({ "cmd": "work" });
    let run = server.post(&path, &body);
    let stop = async {
        crate::harness::until("it runs", async || Ok(server.fake.commands() == 1)).await?;
        server.stop().await;
        anyhow::Ok(())
    };
    let (reply, stopped) = tokio::join!(run, stop);
    stopped?;
    reply?.ok(200);
    assert!(server.get("/health").await.is_err(), "it no longer listens");
    assert_eq!(server.present().await?.len(), 1);
    Ok(())
}
