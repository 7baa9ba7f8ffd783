//! `/v1/admin/activity`: what was done, by whom, and what became of VMs.

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::fake::Script;
use tiffin_store::{Activity, Performer, PerformerKind};
use tiffin_types::{
    time::Timestamp,
    vm::{EndReason, EndReport},
};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    harness::{Server, id_of, send, small_vm, until},
    openapi::{document, good_body, operations, unknown_id},
};

async fn entries(server: &Server) -> Result<Vec<Value>> {
    let list = server.get("/v1/admin/activity?limit=1000").await?.ok(200);
    Ok(list.as_array().context("a list")?.clone())
}

/// Waits for an entry, as commands are written down after they are answered.
async fn entry(server: &Server, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut found = None;
    until(what, async || {
        found = entries(server).await?.into_iter().find(|entry| is_it(entry));
        Ok(found.is_some())
    })
    .await?;
    found.context("it was found")
}

/// What programs do in VMs, which would crowd out the rest.
fn is_work(path: &str) -> bool {
    let inside = path.strip_prefix("/v1/vms/{id}/").unwrap_or("");
    ["exec", "run-ts", "run-js"].contains(&inside) || inside.starts_with("files")
}

#[tokio::test]
async fn every_operation_that_changes_something_leaves_an_entry() -> Result<()> {
    let server = Server::start().await?;
    let reader = server.other_key("reader", &["read"]).await?;
    let (mut seen, before) = (0, entries(&server).await?.len());
    for operation in operations(&document()?).iter().filter(|operation| operation.method != Method::GET) {
        // Nobody's log out ends nothing.
        let is_noted = !is_work(&operation.path) && operation.path != "/auth/logout";
        let id = operation.spec["operationId"].as_str().context("an id")?;
        // Reading by another method.
        if id.contains("posted_") && !id.ends_with("_import") {
            continue;
        }
        let path = if operation.path.contains('{') { unknown_id(&operation.path) } else { operation.path.clone() };
        let parameters = operation.spec["parameters"].as_array().cloned().unwrap_or_default();
        let needed = parameters.iter().filter(|one| one["in"] == "query" && one["required"] == true);
        let query: Vec<_> = needed.map(|one| (one["name"].as_str().unwrap_or(""), "/workspace/x")).collect();
        let mut request =
            server.client.request(operation.method.clone(), format!("{}{path}", server.url)).query(&query);
        request = request.header("X-API-Key", &reader).header("x-request-id", format!("walk-{id}"));
        let bodies = operation.spec["requestBody"]["content"].as_object();
        match bodies.and_then(|bodies| bodies.keys().next()) {
            Some(kind) if kind == "application/json" => request = request.json(&good_body(id)),
            Some(kind) => request = request.header("Content-Type", kind).body("x"),
            None => {}
        }
        let status = send(request).await?.status.as_u16();
        let by_nobody = operation.path.starts_with("/auth/");
        assert!(status == 403 || by_nobody, "{id}: whoever may only read gets {status}");
        if !is_noted {
            continue;
        }
        let entry = entry(&server, id, |entry| entry["requestId"] == format!("walk-{id}")).await?;
        assert_eq!((&entry["event"], &entry["status"]), (&json!(id), &json!(status)));
        assert_eq!(entry["actor"]["type"], if by_nobody { "anonymous" } else { "key" }, "{entry}");
        if operation.path.contains("{id}") {
            let mut targets = entry["target"].as_str().context("a target")?.split(',');
            assert!(targets.all(|target| path.contains(target)), "{entry}");
        }
        seen += 1;
    }
    assert!(seen >= 12, "{seen}");
    assert_eq!(entries(&server).await?.len(), before + seen);
    Ok(())
}

#[tokio::test]
async fn an_entry_says_who_did_what_to_what_and_no_secret() -> Result<()> {
    let server = Server::start().await?;
    let made = send(server.request(Method::POST, "/v1/vms").json(&small_vm())).await?;
    let vm = made.ok(201)["id"].as_str().context("an id")?.to_owned();
    let secret = json!({ "cmd": "echo secret-word", "env": { "TOKEN": "secret-word" } });
    server.post(&format!("/v1/vms/{vm}/exec"), &secret).await?.ok(200);
    let key = server.post("/v1/admin/api-keys", &json!({ "name": "ci", "scopes": ["read"] })).await?.ok(201);
    server.post("/v1/vms", &json!({})).await?.refused(400, "invalid_parameter");
    server.get("/v1/vms").await?.ok(200);
    server.delete(&format!("/v1/vms/{vm}")).await?.ok(204);

    let create = entry(&server, "the create", |entry| entry["event"] == "vm_create").await?;
    assert_eq!((&create["status"], &create["target"]), (&json!(201), &json!(vm)));
    assert_eq!(create["requestId"], made.headers["x-request-id"].to_str()?);
    assert_eq!((&create["actor"]["type"], &create["actor"]["name"]), (&json!("key"), &json!("admin")));
    assert_eq!(create["peer"], "127.0.0.1");
    assert!(create["accountId"].as_str().is_some_and(|id| id.starts_with("acc-")));
    let made_key = entry(&server, "the key", |entry| entry["event"] == "api_key_create").await?;
    assert_eq!(made_key["target"], key["id"]);
    entry(&server, "the delete", |entry| entry["event"] == "vm_delete" && entry["status"] == 204).await?;
    let states: Vec<Value> = entries(&server).await?.into_iter().filter(|entry| entry["event"] == "vm_state").collect();
    let told: Vec<&str> = states.iter().rev().filter_map(|entry| entry["details"]["state"].as_str()).collect();
    // One that was booted ahead is RUNNING from the beginning.
    assert!(told.ends_with(&["RUNNING", "DELETED"]), "{told:?}");
    assert!(states.iter().all(|entry| entry["actor"]["type"] == "system" && entry["target"] == vm.as_str()));

    let all = server.get("/v1/admin/activity").await?.text;
    let text = key["key"].as_str().context("a key")?;
    assert!(!all.contains("secret-word") && !all.contains(text) && !all.contains(&server.key), "{all}");
    let events: Vec<Value> =
        serde_json::from_str::<Vec<Value>>(&all)?.iter().map(|entry| entry["event"].clone()).collect();
    assert!(!events.contains(&json!("vm_list")), "reading isn't noted");
    assert!(!events.contains(&json!("exec_create")), "the exec logs have it");
    assert_eq!(events.iter().filter(|event| **event == "vm_create").count(), 1, "nor is what was simply wrong");
    Ok(())
}

#[tokio::test]
async fn entries_come_in_pages_and_outlive_the_server() -> Result<()> {
    let mut server = Server::start().await?;
    for number in 0..5 {
        server.post("/v1/admin/accounts", &json!({ "name": format!("a{number}") })).await?.ok(201);
    }
    server.restart().await?;
    server.post("/v1/admin/accounts", &json!({ "name": "later" })).await?.ok(201);
    let all = entries(&server).await?;
    let ids: Vec<&str> = all.iter().filter_map(|entry| entry["id"].as_str()).collect();
    assert!(ids.len() == 6 && ids.is_sorted_by(|a, b| a > b), "{ids:?}");
    let first = server.get("/v1/admin/activity?limit=4").await?.ok(200);
    let next = server.get(&format!("/v1/admin/activity?limit=4&before={}", ids[3])).await?.ok(200);
    assert_eq!([first.as_array(), next.as_array()].into_iter().flatten().flatten().cloned().collect::<Vec<_>>(), all);
    for bad in ["limit=0", "limit=1001", "limit=x", "before=x", "before=%27", "x=1"] {
        server.get(&format!("/v1/admin/activity?{bad}")).await?.refused(400, "invalid_parameter");
    }
    let writer = server.other_key("writer", &["write"]).await?;
    for path in ["activity", "events", "overview"] {
        server.get_as(&writer, &format!("/v1/admin/{path}")).await?.refused(403, "forbidden");
    }
    Ok(())
}

#[tokio::test]
async fn a_client_that_hangs_up_is_noted_too_as_the_change_may_be_done() -> Result<()> {
    let server = Server::start_cold().await?;
    server.fake.set_start_delay(std::time::Duration::from_secs(60));
    let body = small_vm();
    let create = server.post("/v1/vms", &body);
    tokio::select! {
        _ = create => panic!("the client hangs up before the end"),
        made = until("it boots", async || Ok(!server.present().await?.is_empty())) => made?,
    }
    entry(&server, "the create", |entry| entry["event"] == "vm_create" && entry["status"] == 499).await?;
    Ok(())
}

#[tokio::test]
async fn a_command_whose_client_hangs_up_is_in_the_exec_logs() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.script("slow", Script { delay: std::time::Duration::from_secs(60), ..Script::default() });
    let exec = server.request(Method::POST, &format!("{vm}/exec")).json(&json!({ "cmd": "slow", "timeoutMs": 90000 }));
    tokio::select! {
        _ = send(exec) => panic!("the client hangs up before the end"),
        runs = until("it runs", async || Ok(server.fake.commands() == 1)) => runs?,
    }
    let mut logged = Value::Null;
    until("the run is logged", async || {
        logged = server.get(&format!("{vm}/exec-logs")).await?.ok(200)[0].clone();
        Ok(logged.is_object())
    })
    .await?;
    assert_eq!((&logged["outcome"], logged.get("exitCode")), (&json!("abandoned"), None));
    Ok(())
}

#[tokio::test]
async fn an_end_that_nobody_asked_for_is_told_with_its_reason() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let report = EndReport { reason: EndReason::Oom, message: "out of memory".into(), exit_code: None };
    server.fake.kill(&id_of(&vm), report);
    let end = entry(&server, "the end", |entry| entry["details"]["state"] == "ERROR").await?;
    assert_eq!((&end["details"]["reason"], &end["actor"]["type"]), (&json!("oom"), &json!("system")));
    Ok(())
}

#[tokio::test]
async fn logging_in_is_noted_whether_it_works_or_not() -> Result<()> {
    let server = Server::start().await?;
    let login = tiffin_server::first_login(&server.store, "admin@tiffin.local").await?.context("a login")?;
    for (password, status) in [("wrong", 401), (login.password.as_str(), 200)] {
        let body = json!({ "email": login.email, "password": password });
        assert_eq!(send(server.client.post(format!("{}/auth/login", server.url)).json(&body)).await?.status, status);
    }
    let all = entries(&server).await?;
    assert_eq!((&all[0]["event"], &all[0]["actor"]["name"]), (&json!("session_create"), &json!(login.email)));
    assert_eq!((&all[1]["status"], &all[1]["actor"]), (&json!(401), &json!({ "type": "anonymous" })));
    Ok(())
}

#[tokio::test]
async fn who_has_no_session_leaves_no_more_entries_than_attempts_to_log_in() -> Result<()> {
    let mut server = Server::start_with(&[("rate.login_address_per_min", "5"), ("http.max_connections", "1")]).await?;
    // There is one place for a connection: whatever is asked next is asked once the one before is over.
    server.client = reqwest::Client::builder().pool_max_idle_per_host(0).build()?;
    let address = server.url.trim_start_matches("http://").to_owned();
    TcpStream::connect(&address).await?.write_all(LOGIN_HEAD).await?;
    let post = async |path: &str, origin: &str, email: &str| {
        let request = server.client.post(format!("{}{path}", server.url)).header("Origin", origin);
        send(request.json(&json!({ "email": email, "password": "x" }))).await
    };
    let own = server.url.clone();
    post("/auth/logout", &own, "").await?.ok(204);
    post("/auth/login", "http://evil.example", "a@b").await?.refused(403, "csrf");
    post("/auth/login", &own, "a@b").await?.refused(401, "unauthorized");
    let mut refused = Vec::new();
    // All of them count, so that few are left; one more comes back every twelve seconds.
    for (path, origin, email) in
        [("/auth/login", "http://evil.example", "a@b"), ("/auth/login", &own, "no email"), ("/auth/logout", &own, "")]
    {
        until(&format!("{path} is refused"), async || {
            let reply = post(path, origin, email).await?;
            refused.push(reply.status.as_u16());
            Ok(reply.status == 429)
        })
        .await?;
    }
    // This is written before it is answered, and after what is noted of those.
    server.post("/v1/admin/accounts", &json!({ "name": "last" })).await?.ok(201);
    let told = refused.iter().filter(|status| **status == 401).count();
    let all = entries(&server).await?;
    let by_nobody: Vec<&Value> = all.iter().filter(|entry| entry["actor"]["type"] == "anonymous").collect();
    assert!(by_nobody.iter().all(|entry| entry["status"] == 401 && entry["event"] == "session_create"), "{all:?}");
    assert_eq!(by_nobody.len(), 1 + told);
    Ok(())
}

#[tokio::test]
async fn a_log_out_is_noted_when_it_ends_a_session() -> Result<()> {
    let server = Server::start().await?;
    let login = tiffin_server::first_login(&server.store, "admin@tiffin.local").await?.context("a login")?;
    let body = json!({ "email": login.email, "password": login.password });
    let reply = send(server.client.post(format!("{}/auth/login", server.url)).json(&body)).await?;
    let cookie = reply.headers["set-cookie"].to_str()?.split(';').next().context("a cookie")?.to_owned();
    for _ in 0..2 {
        send(server.client.post(format!("{}/auth/logout", server.url)).header("Cookie", &cookie)).await?.ok(204);
    }
    let all = entries(&server).await?;
    let ends: Vec<&Value> = all.iter().filter(|entry| entry["event"] == "session_delete").collect();
    assert_eq!(ends.len(), 1, "{all:?}");
    assert_eq!(ends[0]["actor"]["name"], login.email);
    Ok(())
}

#[tokio::test]
async fn the_clones_of_a_fork_are_told_to_be_running() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let made = server.post(&format!("{vm}/fork"), &json!({ "count": 2 })).await?.ok(201);
    for clone in made.as_array().context("VMs")? {
        let of_it = |entry: &Value| entry["target"] == clone["id"] && entry["details"]["state"] == "RUNNING";
        entry(&server, "the clone runs", of_it).await?;
    }
    Ok(())
}

/// The head of a login whose body never comes.
const LOGIN_HEAD: &[u8] =
    b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n";

#[tokio::test]
async fn a_server_forgets_what_is_too_old_or_too_much_and_nothing_else() -> Result<()> {
    let mut server = Server::start_with(&[("activity.kept_days", "10"), ("activity.kept_entries", "100")]).await?;
    let now = Timestamp::now();
    let days_ago = |days: i64| now.plus_millis(-days * 24 * 3600 * 1000);
    let entry = |number: usize, at: Timestamp, is_lasting: bool| Activity {
        // Older than any that the server writes now.
        id: format!("{number:026}"),
        at,
        event: "vm_create".into(),
        actor: Performer { kind: PerformerKind::Anonymous, id: None, name: None },
        account_id: None,
        target: None,
        status: Some(201),
        request_id: None,
        peer: None,
        details: None,
        is_lasting,
    };
    let mut all = vec![entry(1, days_ago(11), true), entry(2, days_ago(9), true), entry(3, days_ago(11), false)];
    all.extend((4..=120).map(|number| entry(number, days_ago(9), false)));
    server.store.journal_write(&all, &[], 10).await?;
    server.restart().await?;
    let left = async || {
        let left = server.store.activity_list(1000, None).await?;
        let left: Vec<usize> = left.iter().filter_map(|entry| entry.id.parse().ok()).collect();
        anyhow::Ok(left)
    };
    until("the first is forgotten", async || Ok(!left().await?.contains(&1))).await?;
    let left = left().await?;
    assert!(left.contains(&2), "what lasts isn't crowded out");
    assert!(!left.contains(&3), "it is too old: {left:?}");
    assert!(!left.contains(&20) && left.contains(&60) && left.contains(&120), "the newest hundred are kept: {left:?}");
    Ok(())
}
