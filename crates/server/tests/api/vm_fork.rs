//! `POST /v1/vms/{id}/fork`

use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::fake::Call;
use tiffin_store::{Forked, NewFork, NewSnapshot, NewVm};
use tiffin_types::{
    id::{SnapshotId, VmId},
    vm::{EndReason, EndReport, ProvisionMode, VmEvent, VmState},
};

use crate::harness::{Reply, Server, id_of, send, small_vm, until};

async fn fork(server: &Server, vm: &str, body: Value) -> Result<Reply> {
    server.post(&format!("{vm}/fork"), &body).await
}

async fn fork_with_key(server: &Server, vm: &str, key: &str, body: Value) -> Result<Reply> {
    send(server.request(Method::POST, &format!("{vm}/fork")).json(&body).header("Idempotency-Key", key)).await
}

fn paths(clones: &Value) -> Vec<String> {
    let clones = clones.as_array().expect("a list");
    clones.iter().map(|clone| format!("/v1/vms/{}", clone["id"].as_str().expect("an id"))).collect()
}

async fn sh(server: &Server, vm: &str, cmd: &str) -> Result<String> {
    let done = server.post(&format!("{vm}/exec"), &json!({ "cmd": cmd })).await?.ok(200);
    Ok(done["stdout"].as_str().context("text")?.to_owned())
}

/// Only that VM is there, runs on, and nothing is left of a fork.
async fn nothing_left(server: &Server, vm: &str) -> Result<()> {
    let list = server.get("/v1/vms").await?.ok(200);
    assert_eq!(paths(&list), [vm]);
    assert_eq!(list[0]["state"], "RUNNING");
    assert_eq!(server.present().await?, [id_of(vm)]);
    assert!(server.fake.snapshots().is_empty() && server.store.snapshot_all().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn clones_go_on_where_their_source_is_and_share_nothing() -> Result<()> {
    let server = Server::start().await?;
    let mut body = small_vm();
    body["allowIps"] = json!(["192.0.2.0/24"]);
    body["outboundInternet"] = json!(true);
    let source = server.post("/v1/vms", &body).await?.ok(201);
    let source = format!("/v1/vms/{}", source["id"].as_str().unwrap());
    sh(&server, &source, "echo warm > /dev/shm/a").await?;
    let clones = fork(&server, &source, json!({ "count": 3 })).await?.ok(201);
    let paths = paths(&clones);
    assert_eq!(paths.len(), 3);
    for (path, clone) in paths.iter().zip(clones.as_array().unwrap()) {
        assert_eq!((&clone["state"], &clone["provisionMode"]), (&json!("RUNNING"), &json!("snapshot")));
        assert_eq!((&clone["allowIps"], &clone["memMb"]), (&json!(["192.0.2.0/24"]), &json!(128)));
        assert_eq!(sh(&server, path, "cat /dev/shm/a").await?, "warm\n");
        assert_eq!(&server.get(path).await?.ok(200), clone);
    }
    sh(&server, &paths[0], "echo mine > /dev/shm/a").await?;
    assert_eq!(sh(&server, &paths[1], "cat /dev/shm/a").await?, "warm\n");
    assert_eq!(sh(&server, &source, "cat /dev/shm/a").await?, "warm\n");
    // The snapshot between is nobody's to see and is gone.
    assert_eq!(server.get("/v1/snapshots").await?.ok(200), json!([]));
    assert!(server.fake.snapshots().is_empty() && server.store.snapshot_all().await?.is_empty());
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn clones_can_have_a_network_of_their_own() -> Result<()> {
    let server = Server::start().await?;
    let source = server.vm().await?;
    let body = json!({ "count": 1, "allowIps": ["198.51.100.7"], "outboundInternet": true });
    let clones = fork(&server, &source, body).await?.ok(201);
    assert_eq!((&clones[0]["allowIps"], &clones[0]["outboundInternet"]), (&json!(["198.51.100.7/32"]), &json!(true)));
    assert_eq!(server.get(&source).await?.ok(200)["allowIps"], json!([]));
    Ok(())
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() -> Result<()> {
    let server = Server::start().await?;
    let source = server.vm().await?;
    for bad in [json!(0), json!(17), json!("2"), json!(1.5), json!(null), json!(-1)] {
        let message = fork(&server, &source, json!({ "count": bad })).await?.refused(400, "invalid_parameter");
        assert!(message.contains("from 1 to 16"), "{message}");
    }
    for half in [json!({ "count": 1, "allowIps": [] }), json!({ "count": 1, "outboundInternet": true })] {
        fork(&server, &source, half).await?.refused(400, "invalid_parameter");
    }
    let key = server.other_key("other", &["write"]).await?;
    server.post_as(&key, &format!("{source}/fork"), &json!({ "count": 1 })).await?.refused(404, "not_found");
    server.act(&format!("{source}/pause")).await?.ok(204);
    fork(&server, &source, json!({ "count": 1 })).await?.refused(409, "wrong_state");
    server.act(&format!("{source}/resume")).await?.ok(204);
    nothing_left(&server, &source).await
}

#[tokio::test]
async fn all_clones_fit_the_quota_or_none_is_made() -> Result<()> {
    let server = Server::start_with(&[("quota.vms", "3")]).await?;
    let source = server.vm().await?;
    let reply = fork(&server, &source, json!({ "count": 3 })).await?;
    reply.refused(429, "quota_exceeded");
    assert_eq!(reply.json()["details"], json!({ "what": "vms", "limit": 3, "used": 1, "asked": 3 }));
    nothing_left(&server, &source).await?;
    fork(&server, &source, json!({ "count": 2 })).await?.ok(201);
    Ok(())
}

#[tokio::test]
async fn one_clone_that_fails_undoes_them_all_whichever_step_it_is() -> Result<()> {
    let server = Server::start().await?;
    let source = server.vm().await?;
    for call in [Call::SnapshotSave, Call::CreateFrom, Call::Start] {
        server.fake.fail_next(call);
        fork(&server, &source, json!({ "count": 4 })).await?.refused(500, "internal");
        nothing_left(&server, &source).await?;
    }
    server.fake.fail_next_start(EndReport {
        reason: EndReason::BootFailed,
        message: "It broke.".into(),
        exit_code: None,
    });
    assert!(fork(&server, &source, json!({ "count": 4 })).await?.refused(500, "boot_failed").contains("It broke."));
    nothing_left(&server, &source).await?;
    server.fake.set_capacity(3);
    let reply = fork(&server, &source, json!({ "count": 3 })).await?;
    reply.refused(503, "no_capacity");
    assert!(reply.headers.contains_key("retry-after"));
    nothing_left(&server, &source).await?;
    assert_eq!(fork(&server, &source, json!({ "count": 2 })).await?.ok(201).as_array().unwrap().len(), 2);
    Ok(())
}

#[tokio::test]
async fn more_clones_than_places_come_up_one_after_the_other() -> Result<()> {
    let server = Server::start_with(&[("limits.creates_in_flight", "2")]).await?;
    let source = server.vm().await?;
    server.fake.set_start_delay(Duration::from_millis(50));
    let clones = fork(&server, &source, json!({ "count": 6 })).await?.ok(201);
    assert_eq!(clones.as_array().unwrap().len(), 6);
    Ok(())
}

#[tokio::test]
async fn a_clone_deleted_on_its_way_up_undoes_the_others() -> Result<()> {
    let server = Server::start().await?;
    let source = server.vm().await?;
    server.fake.hold(Call::Start);
    let delete = async {
        until("the clones come up", async || Ok(server.present().await?.len() == 3)).await?;
        let list = server.get("/v1/vms").await?.ok(200);
        let clone = paths(&list).into_iter().find(|path| *path != source).context("a clone")?;
        let deleted = server.delete(&clone).await;
        server.fake.release(Call::Start);
        deleted
    };
    let (forked, deleted) = tokio::join!(fork(&server, &source, json!({ "count": 2 })), delete);
    deleted?.ok(204);
    let forked = forked?;
    assert!(forked.status == 409 || forked.status == 404, "{}", forked.text);
    nothing_left(&server, &source).await
}

#[tokio::test]
async fn the_same_fork_again_gives_the_same_clones() -> Result<()> {
    let server = Server::start().await?;
    let source = server.vm().await?;
    let (one, two) = tokio::join!(
        fork_with_key(&server, &source, "k", json!({ "count": 2 })),
        fork_with_key(&server, &source, "k", json!({ "count": 2 }))
    );
    let (one, two) = (one?.ok(201), two?.ok(201));
    let sorted = |clones: &Value| {
        let mut paths = paths(clones);
        paths.sort();
        paths
    };
    assert_eq!(sorted(&one), sorted(&two));
    assert_eq!(server.get("/v1/vms").await?.ok(200).as_array().unwrap().len(), 3);
    let other = server.vm().await?;
    fork_with_key(&server, &source, "k", json!({ "count": 1 })).await?.refused(422, "idempotency_key_reused");
    fork_with_key(&server, &other, "k", json!({ "count": 2 })).await?.refused(422, "idempotency_key_reused");
    // A failure that passes frees the key.
    server.fake.set_capacity(4);
    fork_with_key(&server, &source, "l", json!({ "count": 2 })).await?.refused(503, "no_capacity");
    server.fake.set_capacity(100);
    fork_with_key(&server, &source, "l", json!({ "count": 2 })).await?.ok(201);
    Ok(())
}

#[tokio::test]
async fn a_client_that_hangs_up_undoes_nothing() -> Result<()> {
    let server = Server::start().await?;
    let source = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    tokio::select! {
        _ = fork(&server, &source, json!({ "count": 2 })) => panic!("it is held"),
        begun = until("it is saved", async || Ok(server.fake.saves() == 1)) => begun?,
    }
    server.fake.release(Call::SnapshotSave);
    until("the clones run", async || {
        let list = server.get("/v1/vms").await?.ok(200);
        let list = list.as_array().context("a list")?;
        Ok(list.len() == 3 && list.iter().all(|vm| vm["state"] == "RUNNING"))
    })
    .await?;
    until("the snapshot is gone", async || Ok(server.store.snapshot_all().await?.is_empty())).await
}

/// The records of a fork as an earlier server may have left it; clones that came up run on the engine.
async fn cut_short(server: &Server, vm: &str, up: &[bool]) -> Result<SnapshotId> {
    let source = server.store.vm_not_deleted().await?.into_iter().find(|one| one.id == id_of(vm)).context("it")?;
    let account = server.store.account_get(&source.account_id).await?.context("the account")?;
    let snapshot = NewSnapshot {
        id: SnapshotId::random(),
        account_id: source.account_id.clone(),
        vm_id: source.id.clone(),
        name: None,
        image_id: source.image_id.clone(),
        image_digest: source.image_digest.clone(),
        kernel_digest: None,
        engine: source.engine,
        size: source.size,
    };
    let clone = |_: &bool| NewVm {
        id: VmId::random(),
        account_id: source.account_id.clone(),
        image_id: source.image_id.clone(),
        image_digest: source.image_digest.clone(),
        kernel_digest: None,
        engine: source.engine,
        isolation: source.isolation,
        size: source.size,
        egress: source.egress.clone(),
        provision_mode: ProvisionMode::Snapshot,
        snapshot_id: Some(snapshot.id.clone()),
        service: None,
    };
    let new = NewFork { snapshot: snapshot.clone(), vms: up.iter().map(clone).collect() };
    let Forked::New(clones) = server.store.fork_insert(&new, &account.quota, None).await? else {
        anyhow::bail!("it fits")
    };
    for (clone, up) in clones.iter().zip(up) {
        if *up {
            server.store.vm_transition(&clone.id, VmState::Created, VmEvent::Start, Default::default()).await?;
            let (id, image) = (clone.id.clone(), clone.image_digest.clone());
            let spec = tiffin_types::vm::VmSpec {
                id,
                image,
                kernel: None,
                size: clone.size,
                egress: clone.egress.clone(),
                engine: tiffin_types::vm::EngineName::Fake,
                program: None,
            };
            server.fake.plant_snapshot(snapshot.id.clone(), &spec);
            server.fake.plant(spec);
        }
    }
    Ok(snapshot.id)
}

#[tokio::test]
async fn the_next_server_undoes_a_fork_that_was_cut_short() -> Result<()> {
    let mut server = Server::start().await?;
    let source = server.vm().await?;
    server.stop().await;
    // Before the save; with some of the clones up; with all of them up and none told.
    cut_short(&server, &source, &[false, false]).await?;
    let halfway = cut_short(&server, &source, &[true, false]).await?;
    server.store.snapshot_saved(&halfway, 1).await?;
    let nearly = cut_short(&server, &source, &[true, true]).await?;
    server.store.snapshot_saved(&nearly, 1).await?;
    server.restart().await?;
    server.get("/health").await?.ok(200);
    nothing_left(&server, &source).await
}

#[tokio::test]
async fn the_next_server_keeps_a_fork_that_was_done() -> Result<()> {
    let mut server = Server::start().await?;
    let source = server.vm().await?;
    server.stop().await;
    let id = cut_short(&server, &source, &[true, true]).await?;
    server.store.snapshot_saved(&id, 1).await?;
    let clones = server.store.vm_list_of_snapshot(&id).await?;
    assert!(server.store.fork_commit(&id, &clones).await?.is_some());
    server.restart().await?;
    let list = server.get("/v1/vms").await?.ok(200);
    assert!(list.as_array().unwrap().iter().all(|vm| vm["state"] == "RUNNING"));
    assert_eq!(list.as_array().unwrap().len(), 3);
    assert!(server.fake.snapshots().is_empty() && server.store.snapshot_all().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_fork_can_be_repeated_with_its_key_when_its_source_is_gone() -> Result<()> {
    let server = Server::start().await?;
    let source = server.vm().await?;
    let first = fork_with_key(&server, &source, "k", json!({ "count": 2 })).await?.ok(201);
    server.act(&format!("{source}/stop")).await?.ok(204);
    let again = fork_with_key(&server, &source, "k", json!({ "count": 2 })).await?.ok(201);
    assert_eq!(again.as_array().unwrap().len(), 2);
    server.delete(&source).await?.ok(204);
    let again = fork_with_key(&server, &source, "k", json!({ "count": 2 })).await?.ok(201);
    assert!(paths(&first).iter().all(|clone| paths(&again).contains(clone)));
    fork_with_key(&server, &source, "k", json!({ "count": 1 })).await?.refused(422, "idempotency_key_reused");
    fork_with_key(&server, &source, "l", json!({ "count": 1 })).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn a_fork_that_waited_for_a_first_one_that_failed_for_now_makes_the_clones_itself() -> Result<()> {
    let server = Server::start_with(&[("vm.snapshot_timeout_ms", "1000")]).await?;
    let source = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    let first = async {
        let first = fork_with_key(&server, &source, "k", json!({ "count": 1 })).await;
        server.fake.release(Call::SnapshotSave);
        first
    };
    let second = async {
        until("the first is saved", async || Ok(server.fake.saves() == 1)).await?;
        fork_with_key(&server, &source, "k", json!({ "count": 1 })).await
    };
    let (first, second) = tokio::join!(first, second);
    first?.refused(503, "snapshot_timeout");
    second?.ok(201);
    Ok(())
}
