//! `POST /v1/vms`

use std::time::Duration;

use anyhow::Result;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::fake::Call;
use tiffin_types::vm::{EndReason, EndReport};

use crate::harness::{Reply, Server, id_of, send, small_vm, until};

fn with(field: &str, value: Value) -> Value {
    let mut body = small_vm();
    body[field] = value;
    body
}

/// The names in `details.fields`.
fn wrong_fields(reply: &Reply) -> Vec<String> {
    let body = reply.json();
    let fields = body["details"]["fields"].as_array().expect("fields");
    fields.iter().map(|field| field["field"].as_str().expect("a name").to_owned()).collect()
}

#[tokio::test]
async fn a_created_vm_runs_and_is_what_was_asked_for() -> Result<()> {
    let server = Server::start().await?;
    let body = json!({ "cpu": 2, "memMb": 256, "allowIps": ["192.0.2.9/24", "2001:db8::1"], "outboundInternet": true, "diskSizeMb": 128 });
    let vm = server.post("/v1/vms", &body).await?.ok(201);
    assert_eq!(vm["state"], "RUNNING");
    assert_eq!((&vm["cpu"], &vm["memMb"], &vm["diskSizeMb"]), (&json!(2), &json!(256), &json!(128)));
    assert_eq!(vm["allowIps"], json!(["192.0.2.0/24", "2001:db8::1/128"]));
    assert_eq!(vm["outboundInternet"], true);
    assert_eq!((&vm["guestIp"], &vm["provisionMode"]), (&json!("172.16.0.2"), &json!("boot")));
    assert_eq!((&vm["engine"], &vm["isolation"]), (&json!("fake"), &json!("none")));
    assert!(vm["createdAt"].as_str().unwrap().ends_with('Z') && vm["startedAt"].is_string());
    assert!(vm.get("error").is_none() && vm.get("end").is_none());

    let path = format!("/v1/vms/{}", vm["id"].as_str().unwrap());
    assert_eq!(server.get(&path).await?.ok(200), vm);
    assert_eq!(server.get("/v1/vms").await?.ok(200), json!([vm]));
    let spec = server.fake.spec(&id_of(&path)).expect("the engine has it");
    assert_eq!((spec.size.cpus, spec.size.mem_mb, spec.size.disk_mb), (2, 256, 128));
    Ok(())
}

#[tokio::test]
async fn an_engine_is_taken_by_name_if_the_host_has_it() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.post("/v1/vms", &with("engine", json!("fake"))).await?.ok(201);
    assert_eq!(vm["engine"], "fake");
    for (engine, expected) in
        [(json!("qemu"), "must be one of this host's: fake"), (json!("bochs"), "must be gvisor or qemu")]
    {
        let refused = server.post("/v1/vms", &with("engine", engine)).await?;
        assert_eq!((refused.status.as_u16(), wrong_fields(&refused)), (400, vec!["engine".to_owned()]));
        assert!(refused.json()["details"]["fields"][0]["message"].as_str().unwrap().contains(expected), "{refused:?}");
    }
    assert_eq!(server.get("/v1/vms").await?.ok(200).as_array().unwrap().len(), 1);
    Ok(())
}

#[tokio::test]
async fn every_bad_value_of_every_field_is_a_400_that_names_it_and_makes_nothing() -> Result<()> {
    let server = Server::start().await?;
    let not_numbers = [
        json!("2"),
        json!(null),
        json!(1.5),
        json!(2.0),
        json!(-1),
        json!(0),
        json!(1e30),
        json!(u64::MAX),
        json!([]),
        json!({}),
        json!(true),
    ];
    let mut table: Vec<(&str, Value)> = Vec::new();
    for bad in not_numbers {
        for field in ["cpu", "memMb", "diskSizeMb"] {
            table.push((field, bad.clone()));
        }
    }
    for (field, bad) in [
        ("cpu", json!(9)),
        ("memMb", json!(127)),
        ("memMb", json!(8193)),
        ("diskSizeMb", json!(63)),
        ("diskSizeMb", json!(512_001)),
        ("allowIps", json!(null)),
        ("allowIps", json!("0.0.0.0/0")),
        ("allowIps", json!({})),
        ("allowIps", json!(vec!["192.0.2.1"; 257])),
        ("outboundInternet", json!("true")),
        ("outboundInternet", json!(null)),
        ("outboundInternet", json!(1)),
        ("imageId", json!("nope")),
        ("imageId", json!("")),
        ("imageId", json!(7)),
        ("imageId", json!(null)),
        ("imageId", json!("01JD4W5C1QZX6M0V5K2B8N7T3A")),
        ("imageId", json!("../../../../etc/passwd")),
        ("snapshotId", json!("snap-0123456789ABCD")),
        ("snapshotId", json!("../../etc")),
        ("snapshotId", json!(null)),
        ("cpus", json!(1)),
        ("", json!(1)),
    ] {
        table.push((field, bad));
    }
    for (field, bad) in table {
        let reply = server.post("/v1/vms", &with(field, bad.clone())).await?;
        let message = reply.refused(400, "invalid_parameter");
        assert_eq!(wrong_fields(&reply), [field], "{bad}");
        assert!(message.starts_with(field), "{message}");
    }
    for bad in [json!(["x"]), json!([1]), json!([null]), json!(["192.0.2.1/33"]), json!(["example.com"]), json!([""])] {
        let reply = server.post("/v1/vms", &with("allowIps", bad)).await?;
        reply.refused(400, "invalid_parameter");
        assert_eq!(wrong_fields(&reply), ["allowIps[0]"]);
    }
    assert_eq!(server.get("/v1/vms").await?.ok(200), json!([]));
    assert!(server.present().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn all_that_is_wrong_is_said_at_once_with_the_range() -> Result<()> {
    let server = Server::start().await?;
    let reply = server.post("/v1/vms", &json!({ "cpu": 99, "typo": 1 })).await?;
    reply.refused(400, "invalid_parameter");
    assert_eq!(wrong_fields(&reply), ["cpu", "memMb", "allowIps", "typo"]);
    assert!(reply.text.contains("from 1 to 8") && reply.text.contains("from 128 to 8192"), "{}", reply.text);
    Ok(())
}

#[tokio::test]
async fn a_vm_that_does_not_come_up_leaves_nothing_behind_and_the_answer_says_why() -> Result<()> {
    let server = Server::start_cold().await?;
    let report = |reason, message: &str| EndReport { reason, message: message.into(), exit_code: None };

    server.fake.fail_next_start(report(EndReason::BootTimeout, "The agent was silent for 30 s."));
    let message = server.post("/v1/vms", &small_vm()).await?.refused(500, "boot_timeout");
    assert!(message.contains("silent for 30 s"), "{message}");

    server.fake.fail_next_start(report(EndReason::Oom, "It used more memory than its 128 MiB."));
    server.post("/v1/vms", &small_vm()).await?.refused(422, "oom");

    for call in [Call::Create, Call::Start] {
        server.fake.fail_next(call);
        let message = server.post("/v1/vms", &small_vm()).await?.refused(500, "internal");
        assert_eq!(message, "internal error");
    }
    assert_eq!(server.get("/v1/vms").await?.ok(200), json!([]));
    assert!(server.present().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_destroyed_at_once_is_gone_after_the_next_start() -> Result<()> {
    let mut server = Server::start_cold().await?;
    server.fake.fail_next(Call::Start);
    server.fake.fail_next(Call::Destroy);
    server.post("/v1/vms", &small_vm()).await?.refused(500, "internal");
    assert_eq!(server.present().await?.len(), 1);
    server.restart().await?;
    until("it is gone", async || Ok(server.present().await?.is_empty())).await
}

#[tokio::test]
async fn a_host_without_room_is_a_503_that_says_when_to_try_again() -> Result<()> {
    let server = Server::start_cold().await?;
    server.fake.set_capacity(1);
    server.vm().await?;
    let reply = server.post("/v1/vms", &small_vm()).await?;
    reply.refused(503, "no_capacity");
    assert!(reply.headers.contains_key("retry-after"));
    assert_eq!(server.present().await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn of_a_hundred_creates_at_once_each_succeeds_or_is_told_to_retry() -> Result<()> {
    let server = Server::start_cold_with(&[("limits.creates_in_flight", "4"), ("limits.creates_queued", "60")]).await?;
    server.fake.set_capacity(30);
    server.fake.set_start_delay(Duration::from_millis(20));
    let body = small_vm();
    let replies = join_all((0..100).map(|_| server.post("/v1/vms", &body))).await;
    let mut made = 0;
    for reply in replies {
        let reply = reply?;
        match reply.status.as_u16() {
            201 => made += 1,
            503 => {
                let code = reply.json()["code"].as_str().unwrap().to_owned();
                assert!(["busy", "no_capacity"].contains(&code.as_str()), "{code}");
                assert!(reply.headers.contains_key("retry-after"));
            }
            _ => panic!("{} {}", reply.status, reply.text),
        }
    }
    assert_eq!(made, 30);
    assert_eq!(server.get("/v1/vms").await?.ok(200).as_array().unwrap().len(), 30);
    until("only those are on the host", async || Ok(server.present().await?.len() == 30)).await?;
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_a_whole_vm() -> Result<()> {
    let server = Server::start_cold().await?;
    server.fake.hold(Call::Start);
    let request = server.request(Method::POST, "/v1/vms").json(&small_vm());
    let is_known = async || Ok(!server.store.vm_not_deleted().await?.is_empty());
    tokio::select! {
        _ = send(request) => panic!("the client gives up before the answer"),
        known = until("its record is there", is_known) => known?,
    }
    server.fake.release(Call::Start);
    until("it runs", async || {
        let list = server.get("/v1/vms").await?.ok(200);
        Ok(list.as_array().is_some_and(|list| list.len() == 1 && list[0]["state"] == "RUNNING"))
    })
    .await
}

async fn create_with_key(server: &Server, key: &str, body: &Value) -> Result<Reply> {
    send(server.request(Method::POST, "/v1/vms").header("Idempotency-Key", key).json(body)).await
}

#[tokio::test]
async fn the_same_idempotency_key_makes_one_vm_however_often_and_at_once() -> Result<()> {
    let server = Server::start().await?;
    server.fake.set_start_delay(Duration::from_millis(100));
    let body = small_vm();
    let replies = join_all((0..8).map(|_| create_with_key(&server, "k1", &body))).await;
    let ids: Vec<Value> = replies.into_iter().map(|reply| reply.unwrap().ok(201)["id"].clone()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(server.present().await?.len(), 1);

    let reordered = json!({ "memMb": 128, "allowIps": [], "cpu": 1 });
    assert_eq!(create_with_key(&server, "k1", &reordered).await?.ok(201)["id"], ids[0]);
    create_with_key(&server, "k1", &with("cpu", json!(2))).await?.refused(422, "idempotency_key_reused");
    assert_ne!(create_with_key(&server, "k2", &body).await?.ok(201)["id"], ids[0]);
    Ok(())
}

#[tokio::test]
async fn a_repeated_request_whose_first_failed_fails_alike_and_starts_nothing() -> Result<()> {
    let server = Server::start_cold().await?;
    let end = EndReport { reason: EndReason::BootFailed, message: "No.".into(), exit_code: None };
    server.fake.fail_next_start(end);
    create_with_key(&server, "k", &small_vm()).await?.refused(500, "boot_failed");
    create_with_key(&server, "k", &small_vm()).await?.refused(500, "boot_failed");
    assert!(server.present().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_request_that_found_no_room_can_be_repeated_with_its_key() -> Result<()> {
    let server = Server::start_cold().await?;
    server.fake.set_capacity(0);
    create_with_key(&server, "k", &small_vm()).await?.refused(503, "no_capacity");
    create_with_key(&server, "k", &small_vm()).await?.refused(503, "no_capacity");
    server.fake.set_start_delay(Duration::from_millis(50));
    let body = small_vm();
    for reply in join_all((0..4).map(|_| create_with_key(&server, "k", &body))).await {
        // Those that waited for the first one try themselves once and may meet another's attempt.
        let reply = reply?;
        assert!([500, 503].contains(&reply.status.as_u16()), "{}", reply.text);
    }
    server.fake.set_capacity(1);
    let made = create_with_key(&server, "k", &small_vm()).await?.ok(201);
    assert_eq!(create_with_key(&server, "k", &small_vm()).await?.ok(201)["id"], made["id"]);
    Ok(())
}

#[tokio::test]
async fn idempotency_keys_are_each_accounts_own_and_bad_ones_are_refused() -> Result<()> {
    let server = Server::start().await?;
    let mine = create_with_key(&server, "k", &small_vm()).await?.ok(201);
    let other = server.other_key("other", &["write"]).await?;
    let request = server.client.post(format!("{}/v1/vms", server.url)).header("X-API-Key", other);
    let theirs = send(request.header("Idempotency-Key", "k").json(&small_vm())).await?.ok(201);
    assert_ne!(mine["id"], theirs["id"]);
    for bad in ["", "with blank", &"x".repeat(256)] {
        create_with_key(&server, bad, &small_vm()).await?.refused(400, "invalid_parameter");
    }
    Ok(())
}

#[tokio::test]
async fn over_quota_is_a_429_with_figures_and_stopping_or_deleting_makes_room() -> Result<()> {
    let server = Server::start_with(&[("quota.vms", "3"), ("quota.cpus", "2"), ("quota.mem_mb", "1024")]).await?;
    let first = server.vm().await?;
    server.vm().await?;
    let reply = server.post("/v1/vms", &small_vm()).await?;
    reply.refused(429, "quota_exceeded");
    assert!(reply.headers.contains_key("retry-after"));
    assert_eq!(reply.json()["details"], json!({ "what": "cpus", "limit": 2, "used": 2, "asked": 1 }));

    server.act(&format!("{first}/stop")).await?.ok(204);
    server.vm().await?;
    let reply = server.post("/v1/vms", &small_vm()).await?;
    reply.refused(429, "quota_exceeded");
    assert_eq!(reply.json()["details"]["what"], "vms");
    server.act(&format!("{first}/start")).await?.refused(429, "quota_exceeded");
    assert_eq!(server.state(&first).await?, "STOPPED");

    server.delete(&first).await?.ok(204);
    assert_eq!(server.get("/v1/vms").await?.ok(200).as_array().unwrap().len(), 2);
    Ok(())
}

#[tokio::test]
async fn concurrent_creates_do_not_go_over_the_quota() -> Result<()> {
    let server = Server::start_with(&[("quota.vms", "5")]).await?;
    let body = small_vm();
    let replies = join_all((0..20).map(|_| server.post("/v1/vms", &body))).await;
    let made = replies.iter().filter(|reply| reply.as_ref().is_ok_and(|reply| reply.status == 201)).count();
    assert_eq!(made, 5);
    Ok(())
}
