//! `/v1/admin/webhooks`, with real receivers on loopback.

use std::{
    convert::Infallible,
    io::Write,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, ensure};
use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::Request,
    http::HeaderMap,
    response::Response,
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{Reply, Server, send, until};

const HOOKS: &str = "/v1/admin/webhooks";

/// Webhooks may lead to loopback, and failed attempts follow each other at once.
const OPEN: [(&str, &str); 3] =
    [("webhooks.allow_http", "true"), ("webhooks.allow_networks", "127.0.0.0/8"), ("webhooks.retry_delays_s", "0,0,0")];

/// A delivery as it came.
#[derive(Debug, Clone)]
struct Received {
    headers: HeaderMap,
    body: Bytes,
}

impl Received {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().expect("ASCII")
    }
}

/// A receiver of deliveries.
struct Receiver {
    url: String,
    received: Arc<Mutex<Vec<Received>>>,
    _tasks: JoinSet<()>,
}

impl Receiver {
    /// Answers the deliveries, counted from 0, by `answer`; where that is `None`, never.
    async fn start(answer: impl Fn(usize) -> Option<Response> + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/hook", listener.local_addr()?);
        let received = Arc::new(Mutex::new(Vec::new()));
        let (record, answer) = (Arc::clone(&received), Arc::new(answer));
        let take = move |request: Request| {
            let (record, answer) = (Arc::clone(&record), Arc::clone(&answer));
            async move {
                let (head, body) = request.into_parts();
                let body = to_bytes(body, 1 << 20).await.expect("a whole body");
                let number = {
                    let mut record = record.lock().expect("no panic");
                    record.push(Received { headers: head.headers, body });
                    record.len() - 1
                };
                match answer(number) {
                    Some(response) => response,
                    None => std::future::pending().await,
                }
            }
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { axum::serve(listener, Router::new().fallback(take)).await.expect("it serves") });
        Ok(Self { url, received, _tasks: tasks })
    }

    async fn answering(status: u16) -> Result<Self> {
        Self::start(move |_| Some(answer(status))).await
    }

    fn received(&self) -> Vec<Received> {
        self.received.lock().expect("no panic").clone()
    }

    fn types(&self) -> Vec<String> {
        self.received().iter().map(|one| one.json()["type"].as_str().expect("a type").to_owned()).collect()
    }

    async fn until_received(&self, count: usize) -> Result<Vec<Received>> {
        until(&format!("{count} deliveries"), async || Ok(self.received().len() >= count)).await?;
        Ok(self.received())
    }
}

fn answer(status: u16) -> Response {
    Response::builder().status(status).body(Body::empty()).expect("a response")
}

/// A webhook: its path, and its secret.
async fn hook(server: &Server, url: &str, types: &[&str]) -> Result<(String, String)> {
    let made = server.post(HOOKS, &json!({ "name": "test", "url": url, "eventTypes": types })).await?.ok(201);
    let text = |name: &str| made[name].as_str().map(str::to_owned).context("a text");
    Ok((format!("{HOOKS}/{}", text("id")?), text("secret")?))
}

async fn patch(server: &Server, path: &str, body: &Value) -> Result<Reply> {
    send(server.request(Method::PATCH, path).json(body)).await
}

/// Sends a ping and waits until it is done with; the delivery.
async fn ping(server: &Server, path: &str) -> Result<Value> {
    let id = server.act(&format!("{path}/test")).await?.ok(202)["id"].clone();
    settled(server, path, &id).await
}

/// Waits until a delivery is done with.
async fn settled(server: &Server, path: &str, id: &Value) -> Result<Value> {
    let mut found = Value::Null;
    until("the delivery is done with", async || {
        let list = server.get(&format!("{path}/deliveries")).await?.ok(200);
        found = list.as_array().context("a list")?.iter().find(|one| one["id"] == *id).context("it")?.clone();
        Ok(found["state"] != "pending")
    })
    .await?;
    Ok(found)
}

/// A webhook without what its deliveries, which go on meanwhile, say of it.
fn lasting(mut webhook: Value) -> Value {
    if let Some(fields) = webhook.as_object_mut() {
        fields.retain(|name, _| name != "failingSince" && name != "dropped");
    }
    webhook
}

#[tokio::test]
async fn a_webhook_is_made_changed_and_deleted_and_shows_its_secret_once() -> Result<()> {
    let server = Server::start().await?;
    let made = server.post(HOOKS, &json!({ "name": "a", "url": "https://hooks.example.com/x" })).await?.ok(201);
    assert_eq!((&made["enabled"], &made["eventTypes"]), (&json!(true), &json!(["*"])));
    ensure!(made["secret"].as_str().context("a secret")?.starts_with("whsec_"));
    let path = format!("{HOOKS}/{}", made["id"].as_str().context("an id")?);
    let got = lasting(server.get(&path).await?.ok(200));
    assert_eq!((&got["name"], &got["secret"]), (&json!("a"), &Value::Null));
    let list = server.get(HOOKS).await?.ok(200);
    let listed: Vec<Value> = list.as_array().context("a list")?.iter().cloned().map(lasting).collect();
    assert_eq!(listed, [got]);

    let types = json!({ "eventTypes": ["vm_state", "vm_create", "vm_state"], "enabled": false });
    let changed = patch(&server, &path, &types).await?.ok(200);
    assert_eq!(changed["eventTypes"], json!(["vm_create", "vm_state"]));
    assert_eq!((&changed["enabled"], &changed["url"]), (&json!(false), &json!("https://hooks.example.com/x")));
    let message = server.act(&format!("{path}/test")).await?.refused(409, "webhook_disabled");
    assert!(message.contains("enable it first"), "{message}");

    server.delete(&path).await?.ok(204);
    server.get(&path).await?.refused(404, "not_found");
    let done = server.get("/v1/admin/activity").await?.ok(200);
    let events: Vec<&str> = done.as_array().context("a list")?.iter().filter_map(|one| one["event"].as_str()).collect();
    for event in ["webhook_create", "webhook_update", "webhook_delete"] {
        assert!(events.contains(&event), "{event}: {events:?}");
    }
    assert!(!done.to_string().contains("whsec_"), "{done}");
    Ok(())
}

#[tokio::test]
async fn every_wrong_field_is_told_with_what_it_must_be() -> Result<()> {
    let server = Server::start().await?;
    let refused = async |body: Value| {
        let reply = server.post(HOOKS, &body).await?;
        reply.refused(400, "invalid_parameter");
        anyhow::Ok(reply.json()["details"]["fields"].to_string())
    };
    let all = refused(json!({ "name": " ", "url": 5, "enabled": "yes", "eventTypes": ["vm_state", "nope"] })).await?;
    for wrong in ["\"name\"", "\"url\"", "\"enabled\"", "eventTypes[1]", "* or one of", "vm_create"] {
        assert!(all.contains(wrong), "{wrong}: {all}");
    }
    for (url, why) in [
        ("http://hooks.example.com/", "https URL"),
        ("ftp://hooks.example.com/", "https URL"),
        ("https://user:secret@hooks.example.com/", "without a user"),
        ("https://127.0.0.1/", "isn't public"),
        ("https://0x7f000001/", "isn't public"),
        ("https://169.254.169.254/latest/meta-data", "isn't public"),
        ("https://[::ffff:10.0.0.1]/", "isn't public"),
        ("nonsense", "https URL"),
    ] {
        let said = refused(json!({ "name": "a", "url": url })).await?;
        assert!(said.contains(why) && !said.contains("secret"), "{url}: {said}");
    }
    let url = "https://hooks.example.com/";
    let long = format!("{url}{}", "x".repeat(2048));
    assert!(refused(json!({ "name": "a", "url": long })).await?.contains("2048"));
    assert!(refused(json!({ "name": "a", "url": url, "eventTypes": [] })).await?.contains("one event or more"));
    let (path, _) = hook(&server, url, &["*"]).await?;
    patch(&server, &path, &json!({})).await?.refused(400, "invalid_parameter");
    let too_long = json!({ "overlapSeconds": 604_801 });
    let message = server.post(&format!("{path}/rotate-secret"), &too_long).await?.refused(400, "invalid_parameter");
    assert!(message.contains("0 to 604800"), "{message}");
    server.get(&format!("{path}/deliveries?limit=201")).await?.refused(400, "invalid_parameter");
    Ok(())
}

#[tokio::test]
async fn webhooks_are_an_accounts_own_need_the_admin_scope_and_are_bounded_in_number() -> Result<()> {
    let server = Server::start_with(&[("webhooks.per_account", "1")]).await?;
    let body = json!({ "name": "a", "url": "https://hooks.example.com/" });
    let (path, _) = hook(&server, "https://hooks.example.com/", &["*"]).await?;
    let message = server.post(HOOKS, &body).await?.refused(429, "quota_exceeded");
    assert!(message.contains("webhooks"), "{message}");
    let other = server.other_key("other", &["admin"]).await?;
    server.get_as(&other, &path).await?.refused(404, "not_found");
    server.get_as(&other, &format!("{path}/deliveries")).await?.refused(404, "not_found");
    server.post_as(&other, &format!("{path}/rotate-secret"), &json!({})).await?.refused(404, "not_found");
    assert_eq!(server.get_as(&other, HOOKS).await?.ok(200), json!([]));
    server.post_as(&other, HOOKS, &body).await?.ok(201);
    let writer = server.other_key("third", &["write"]).await?;
    server.get_as(&writer, HOOKS).await?.refused(403, "forbidden");
    server.post_as(&writer, HOOKS, &body).await?.refused(403, "forbidden");
    Ok(())
}

/// What follows a heading of the documentation between the fences of a language.
fn documented(language: &str) -> Result<String> {
    let page = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/user/webhooks.md"));
    let (_, after) = page.split_once(&format!("```{language}\n")).context("the example")?;
    Ok(after.split_once("\n```").context("its end")?.0.to_owned())
}

/// Has a documented example judge a delivery.
fn judged(program: &str, flag: &str, code: &str, secret: &str, headers: &Value, body: &Bytes) -> Result<String> {
    let mut child = Command::new(program)
        .args([flag, code, secret, &headers.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("a pipe")?.write_all(body)?;
    Ok(String::from_utf8(child.wait_with_output()?.stdout)?.trim().to_lowercase())
}

#[tokio::test]
async fn a_delivery_is_signed_as_the_documentation_checks_it() -> Result<()> {
    let server = Server::start_with(&OPEN).await?;
    let receiver = Receiver::answering(204).await?;
    let (path, old) = hook(&server, &receiver.url, &["vm_delete"]).await?;
    assert_eq!(ping(&server, &path).await?["state"], "delivered");
    let rotated = server.act(&format!("{path}/rotate-secret")).await?.ok(200);
    ensure!(rotated["oldSecretUntil"].is_string());
    let new = rotated["secret"].as_str().context("a secret")?;
    ping(&server, &path).await?;
    server.post(&format!("{path}/rotate-secret"), &json!({ "overlapSeconds": 0 })).await?.ok(200);
    ping(&server, &path).await?;
    let received = receiver.until_received(3).await?;
    assert_eq!(received[0].header("content-type"), "application/json");
    assert_eq!(received[0].json()["id"], received[0].header("webhook-id"));
    assert_eq!(received[0].json()["type"], "ping");

    let python = documented("python")?
        + "\nimport json, sys\nprint(verify(sys.argv[1], json.loads(sys.argv[2]), sys.stdin.buffer.read()))";
    let node = documented("js")?
        + "\nconsole.log(verify(process.argv[1], JSON.parse(process.argv[2]), require('fs').readFileSync(0)));";
    let tampered = Received { body: Bytes::from_static(b"{}"), ..received[0].clone() };
    for (what, delivery, secret, expected) in [
        ("first", &received[0], old.as_str(), "true"),
        ("by another secret", &received[0], new, "false"),
        ("tampered with", &tampered, &old, "false"),
        ("in the overlap, by the old", &received[1], &old, "true"),
        ("in the overlap, by the new", &received[1], new, "true"),
        ("after the overlap", &received[2], &old, "false"),
    ] {
        let names = ["webhook-id", "webhook-timestamp", "webhook-signature"];
        let headers = names.iter().map(|name| ((*name).to_owned(), delivery.header(name).into()));
        let headers = Value::Object(headers.collect());
        assert_eq!(judged("python3", "-c", &python, secret, &headers, &delivery.body)?, expected, "{what}");
        assert_eq!(judged("node", "-e", &node, secret, &headers, &delivery.body)?, expected, "{what}");
    }
    Ok(())
}

#[tokio::test]
async fn a_webhook_is_told_of_what_it_asked_for_in_its_own_account() -> Result<()> {
    let server = Server::start_with(&OPEN).await?;
    let (states, all, foreign) =
        (Receiver::answering(200).await?, Receiver::answering(200).await?, Receiver::answering(200).await?);
    hook(&server, &states.url, &["vm_state"]).await?;
    hook(&server, &all.url, &["*"]).await?;
    let other = server.other_key("other", &["admin"]).await?;
    server.post_as(&other, HOOKS, &json!({ "name": "x", "url": foreign.url })).await?.ok(201);
    let vm = server.vm().await?;
    server.delete(&vm).await?.ok(204);
    until("everybody is told", async || {
        let told = all.types();
        let is_gone = |one: &Received| one.json()["data"]["state"] == "DELETED";
        Ok(states.received().iter().any(is_gone)
            && ["vm_create", "vm_delete", "vm_state"].iter().all(|kind| told.iter().any(|one| one == kind)))
    })
    .await?;
    assert!(states.types().iter().all(|kind| kind == "vm_state"));
    let id = vm.rsplit('/').next().context("an id")?;
    let running = states.received().into_iter().find(|one| one.json()["data"]["state"] == "RUNNING");
    assert_eq!(running.context("a start")?.json()["data"]["vmId"], id);
    let made = all.received().into_iter().find(|one| one.json()["type"] == "vm_create").context("a create")?.json();
    assert_eq!((&made["data"]["target"], &made["data"]["status"]), (&json!(id), &json!(201)));
    assert!(foreign.types().iter().all(|kind| !kind.starts_with("vm_")), "{:?}", foreign.types());
    Ok(())
}

#[tokio::test]
async fn what_fails_is_tried_again_with_the_same_bytes_until_it_is_taken() -> Result<()> {
    let server = Server::start_with(&OPEN).await?;
    let receiver = Receiver::start(|number| Some(answer(if number < 2 { 500 } else { 200 }))).await?;
    let (path, _) = hook(&server, &receiver.url, &["vm_delete"]).await?;
    let delivery = ping(&server, &path).await?;
    assert_eq!(delivery["state"], "delivered", "{delivery}");
    let attempts = delivery["attempts"].as_array().context("attempts")?;
    let statuses: Vec<&Value> = attempts.iter().map(|attempt| &attempt["status"]).collect();
    assert_eq!(statuses, [500, 500, 200], "{delivery}");
    assert!(attempts[0]["error"].as_str().context("an error")?.contains("500"));
    let received = receiver.received();
    for one in &received {
        assert_eq!((one.header("webhook-id"), &one.body), (received[0].header("webhook-id"), &received[0].body));
    }
    assert_eq!(server.get(&path).await?.ok(200)["failingSince"], Value::Null);
    Ok(())
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_what_has_failed_can_be_delivered_later() -> Result<()> {
    let server = Server::start_with(&OPEN).await?;
    let receiver = Receiver::start(|number| {
        let moved = Response::builder().status(307).header("location", "http://169.254.169.254/latest/meta-data");
        Some(if number < 4 { moved.body(Body::empty()).expect("a response") } else { answer(200) })
    })
    .await?;
    let (path, _) = hook(&server, &receiver.url, &["vm_delete"]).await?;
    let failed = ping(&server, &path).await?;
    assert_eq!((&failed["state"], failed["attempts"].as_array().map(Vec::len)), (&json!("failed"), Some(4)));
    assert!(failed["attempts"].to_string().contains("redirects aren't followed"), "{failed}");
    assert!(server.get(&path).await?.ok(200)["failingSince"].is_string());
    let again = format!("{path}/deliveries/{}/redeliver", failed["id"].as_str().context("an id")?);
    server.act(&again).await?.ok(202);
    assert_eq!(settled(&server, &path, &failed["id"]).await?["state"], "delivered");
    let unknown = format!("{path}/deliveries/dlv-00000000000000/redeliver");
    server.act(&unknown).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn one_receiver_that_never_answers_holds_up_no_other() -> Result<()> {
    let settings = [("webhooks.in_flight", "2"), ("webhooks.in_flight_each", "1"), ("webhooks.timeout_ms", "120000")];
    let server = Server::start_with(&[OPEN.as_slice(), &settings].concat()).await?;
    let (stuck, fine) = (Receiver::start(|_| None).await?, Receiver::answering(200).await?);
    let (stuck_path, _) = hook(&server, &stuck.url, &["vm_delete"]).await?;
    let (path, _) = hook(&server, &fine.url, &["vm_delete"]).await?;
    let first = server.act(&format!("{stuck_path}/test")).await?.ok(202);
    stuck.until_received(1).await?;
    for _ in 0..5 {
        server.act(&format!("{stuck_path}/test")).await?.ok(202);
        assert_eq!(ping(&server, &path).await?["state"], "delivered");
    }
    assert_eq!(stuck.received().len(), 1);
    let again = format!("{stuck_path}/deliveries/{}/redeliver", first["id"].as_str().context("an id")?);
    server.act(&again).await?.refused(409, "delivery_underway");
    Ok(())
}

#[tokio::test]
async fn receivers_that_are_slow_endless_or_gone_are_given_up_with_the_reason() -> Result<()> {
    let settings = [("webhooks.timeout_ms", "1500"), ("webhooks.retry_delays_s", "3600")];
    let server = Server::start_with(&[OPEN.as_slice(), &settings].concat()).await?;
    let slow = Receiver::start(|_| None).await?;
    let endless = Receiver::start(|_| {
        let more = futures_util::stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 4096])));
        Some(Response::new(Body::from_stream(more)))
    })
    .await?;
    let closed = TcpListener::bind("127.0.0.1:0").await?;
    let closed_url = format!("http://{}/", closed.local_addr()?);
    drop(closed);
    let error = async |url: &str| {
        let (path, _) = hook(&server, url, &["vm_delete"]).await?;
        server.act(&format!("{path}/test")).await?.ok(202);
        let mut attempts = Value::Null;
        until("it was tried", async || {
            attempts = server.get(&format!("{path}/deliveries")).await?.ok(200)[0].clone();
            Ok(attempts["attempts"].as_array().is_some_and(|attempts| !attempts.is_empty()))
        })
        .await?;
        anyhow::Ok(attempts)
    };
    let delivery = error(&slow.url).await?;
    assert!(delivery["attempts"][0]["error"].as_str().context("why")?.contains("1500 ms"), "{delivery}");
    assert!(delivery["state"] == "pending" && delivery["nextAttemptAt"].is_string(), "{delivery}");
    // It has said that it has taken it; the rest is its own affair.
    assert_eq!(error(&endless.url).await?["state"], "delivered");
    let delivery = error(&closed_url).await?;
    assert!(delivery["attempts"][0]["error"].as_str().context("why")?.contains("connect"), "{delivery}");
    Ok(())
}

#[tokio::test]
async fn a_name_that_leads_to_loopback_is_refused_when_it_is_delivered() -> Result<()> {
    let settings = [("webhooks.allow_http", "true"), ("webhooks.retry_delays_s", "0")];
    let server = Server::start_with(&settings).await?;
    let receiver = Receiver::answering(200).await?;
    let url = receiver.url.replace("127.0.0.1", "localhost");
    let (path, _) = hook(&server, &url, &["vm_delete"]).await?;
    let delivery = ping(&server, &path).await?;
    assert_eq!(delivery["state"], "failed");
    assert!(delivery["attempts"][0]["error"].as_str().context("why")?.contains("isn't public"), "{delivery}");
    assert!(receiver.received().is_empty());
    Ok(())
}

#[tokio::test]
async fn a_receiver_that_is_gone_disables_its_webhook_and_others_are_told() -> Result<()> {
    let server = Server::start_with(&OPEN).await?;
    let (gone, watcher) = (Receiver::answering(410).await?, Receiver::answering(200).await?);
    let (path, _) = hook(&server, &gone.url, &["vm_delete"]).await?;
    hook(&server, &watcher.url, &["webhook_disable"]).await?;
    ping(&server, &path).await?;
    let disabled = server.get(&path).await?.ok(200);
    assert_eq!((&disabled["enabled"], &disabled["disabledReason"]), (&json!(false), &json!("gone")));
    let told = watcher.until_received(1).await?[0].json();
    assert_eq!(told["data"]["details"]["reason"], "gone");
    assert!(path.ends_with(told["data"]["target"].as_str().context("a target")?), "{told}");
    let entry = server.get("/v1/admin/activity?limit=1000").await?.text;
    assert!(entry.contains("webhook_disable"), "{entry}");
    let enabled = patch(&server, &path, &json!({ "enabled": true })).await?.ok(200);
    assert_eq!((&enabled["enabled"], &enabled["disabledReason"]), (&json!(true), &Value::Null));
    Ok(())
}

#[tokio::test]
async fn what_was_not_delivered_before_a_restart_is_delivered_after_it() -> Result<()> {
    let settings = [("webhooks.timeout_ms", "1000"), ("http.shutdown_grace_ms", "50")];
    let mut server = Server::start_with(&[OPEN.as_slice(), &settings].concat()).await?;
    // The first delivery's answer never comes, and the server stops meanwhile.
    let receiver = Receiver::start(|number| (number > 0).then(|| answer(200))).await?;
    let (path, _) = hook(&server, &receiver.url, &["vm_delete"]).await?;
    let delivery = server.act(&format!("{path}/test")).await?.ok(202);
    receiver.until_received(1).await?;
    server.restart().await?;
    let delivery = settled(&server, &path, &delivery["id"]).await?;
    assert_eq!(delivery["state"], "delivered", "{delivery}");
    let received = receiver.received();
    assert!(received.len() > 1 && received.iter().all(|one| one.body == received[0].body));
    Ok(())
}
