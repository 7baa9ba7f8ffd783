//! `/v1/snapshots`, and VMs that are made of them.

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::fake::Call;
use tiffin_store::{NewSnapshot, SnapshotInserted};
use tiffin_types::{
    id::SnapshotId,
    snapshot::SnapshotEvent,
    vm::{EndReason, EndReport, VmSpec},
};

use crate::harness::{Server, id_of, send, small_vm, until};

fn snapshot_id(path: &str) -> SnapshotId {
    path.rsplit('/').next().and_then(|id| id.parse().ok()).expect("a snapshot's path")
}

/// A saved VM: its path, and the snapshot's.
async fn saved(server: &Server) -> Result<(String, String)> {
    let vm = server.vm().await?;
    let snapshot = save(server, &vm).await?;
    Ok((vm, snapshot))
}

async fn save(server: &Server, vm: &str) -> Result<String> {
    let snapshot = server.act(&format!("{vm}/snapshots")).await?.ok(201);
    Ok(format!("/v1/snapshots/{}", snapshot["id"].as_str().context("an id")?))
}

fn of(snapshot: &str) -> Value {
    let mut body = small_vm();
    body["snapshotId"] = json!(snapshot_id(snapshot));
    body
}

async fn restored(server: &Server, snapshot: &str) -> Result<String> {
    let vm = server.post("/v1/vms", &of(snapshot)).await?.ok(201);
    Ok(format!("/v1/vms/{}", vm["id"].as_str().context("an id")?))
}

async fn sh(server: &Server, vm: &str, cmd: &str) -> Result<String> {
    let done = server.post(&format!("{vm}/exec"), &json!({ "cmd": cmd })).await?.ok(200);
    Ok(done["stdout"].as_str().context("text")?.to_owned())
}

async fn wrong_fields(server: &Server, body: &Value) -> Result<Vec<String>> {
    let reply = server.post("/v1/vms", body).await?;
    reply.refused(400, "invalid_parameter");
    let body = reply.json();
    let fields = body["details"]["fields"].as_array().context("fields")?;
    Ok(fields.iter().map(|field| field["field"].as_str().expect("a name").to_owned()).collect())
}

#[tokio::test]
async fn a_snapshot_tells_what_was_saved_and_the_vm_runs_on() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let body = json!({ "name": "after setup" });
    let snapshot = server.post(&format!("{vm}/snapshots"), &body).await?.ok(201);
    assert_eq!(snapshot["vmId"], json!(id_of(&vm)));
    assert_eq!((&snapshot["cpu"], &snapshot["memMb"], &snapshot["diskSizeMb"]), (&json!(1), &json!(128), &json!(1024)));
    assert_eq!((&snapshot["name"], &snapshot["state"]), (&json!("after setup"), &json!("READY")));
    assert!(snapshot["sizeBytes"].as_u64() > Some(0) && snapshot["createdAt"].as_str().unwrap().ends_with('Z'));
    assert_eq!(snapshot["imageId"], server.get(&vm).await?.ok(200)["imageId"]);
    assert_eq!(server.get("/v1/snapshots").await?.ok(200), json!([snapshot]));
    let path = format!("/v1/snapshots/{}", snapshot["id"].as_str().unwrap());
    assert_eq!(server.get(&path).await?.ok(200), snapshot);
    assert_eq!(server.state(&vm).await?, "RUNNING");
    assert_eq!(sh(&server, &vm, "echo on").await?, "on\n");
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn a_restored_vm_goes_on_where_it_was_saved_and_shares_nothing() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    sh(&server, &vm, "echo memory > /dev/shm/a").await?;
    sh(&server, &vm, "echo disk > /workspace/a").await?;
    let snapshot = save(&server, &vm).await?;
    sh(&server, &vm, "echo later > /workspace/a").await?;
    let mut body = of(&snapshot);
    body["allowIps"] = json!(["192.0.2.0/24"]);
    body["outboundInternet"] = json!(true);
    let one = server.post("/v1/vms", &body).await?.ok(201);
    assert_eq!((&one["provisionMode"], &one["state"]), (&json!("snapshot"), &json!("RUNNING")));
    assert_eq!((&one["allowIps"], &one["diskSizeMb"]), (&json!(["192.0.2.0/24"]), &json!(1024)));
    let one = format!("/v1/vms/{}", one["id"].as_str().unwrap());
    let other = restored(&server, &snapshot).await?;
    assert_eq!(sh(&server, &one, "cat /dev/shm/a").await?, "memory\n");
    assert_eq!(sh(&server, &one, "cat /workspace/a").await?, "disk\n");
    sh(&server, &one, "echo mine > /workspace/a").await?;
    assert_eq!(sh(&server, &other, "cat /workspace/a").await?, "disk\n");
    assert_eq!(sh(&server, &vm, "cat /workspace/a").await?, "later\n");
    // Once down it boots, from its own disk.
    server.act(&format!("{one}/stop")).await?.ok(204);
    server.act(&format!("{one}/start")).await?.ok(204);
    assert_eq!(sh(&server, &one, "cat /workspace/a").await?, "mine\n");
    assert_eq!(sh(&server, &one, "cat /dev/shm/a").await?, "");
    Ok(())
}

#[tokio::test]
async fn a_snapshot_outlives_its_vm_and_its_vms_outlive_it() -> Result<()> {
    let server = Server::start().await?;
    let (vm, snapshot) = saved(&server).await?;
    server.delete(&vm).await?.ok(204);
    let one = restored(&server, &snapshot).await?;
    server.delete(&snapshot).await?.ok(204);
    server.get(&snapshot).await?.refused(404, "not_found");
    server.delete(&snapshot).await?.refused(404, "not_found");
    assert_eq!(server.get("/v1/snapshots").await?.ok(200), json!([]));
    assert!(server.fake.snapshots().is_empty());
    assert_eq!(sh(&server, &one, "echo on").await?, "on\n");
    server.post("/v1/vms", &of(&snapshot)).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn only_a_running_vm_is_saved() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let path = format!("{vm}/snapshots");
    server.act(&format!("{vm}/pause")).await?.ok(204);
    assert!(server.act(&path).await?.refused(409, "wrong_state").contains("PAUSED"));
    server.act(&format!("{vm}/stop")).await?.ok(204);
    assert!(server.act(&path).await?.refused(409, "wrong_state").contains("STOPPED"));
    for bad in [json!(""), json!(1), json!(null), json!("x".repeat(101)), json!(" x")] {
        server.post(&path, &json!({ "name": bad })).await?.refused(400, "invalid_parameter");
    }
    server.post(&path, &json!({ "nam": "x" })).await?.refused(400, "invalid_parameter");
    server.delete(&vm).await?.ok(204);
    server.act(&path).await?.refused(404, "not_found");
    assert_eq!(server.get("/v1/snapshots").await?.ok(200), json!([]));
    Ok(())
}

#[tokio::test]
async fn a_restore_must_agree_with_what_was_saved() -> Result<()> {
    let server = Server::start().await?;
    let (_, snapshot) = saved(&server).await?;
    let with = |field: &str, value: Value| {
        let mut body = of(&snapshot);
        body[field] = value;
        body
    };
    let mut both = with("cpu", json!(2));
    both["memMb"] = json!(256);
    assert_eq!(wrong_fields(&server, &both).await?, ["cpu", "memMb"]);
    let message = server.post("/v1/vms", &both).await?.refused(400, "invalid_parameter");
    assert!(message.contains('2') && message.contains('1'), "{message}");
    for smaller_or_larger in [64, 2048] {
        assert_eq!(wrong_fields(&server, &with("diskSizeMb", json!(smaller_or_larger))).await?, ["diskSizeMb"]);
    }
    let other_image = json!("01JD4W5C1QZX6M0V5K2B8N7T3A");
    assert_eq!(wrong_fields(&server, &with("imageId", other_image)).await?, ["imageId"]);
    let image = server.get(&snapshot).await?.ok(200)["imageId"].clone();
    let mut same = with("imageId", image);
    same["diskSizeMb"] = json!(1024);
    server.post("/v1/vms", &same).await?.ok(201);
    let mut unknown = small_vm();
    unknown["snapshotId"] = json!("snap-0123456789abcd");
    assert!(server.post("/v1/vms", &unknown).await?.refused(404, "not_found").contains("snapshot"));
    Ok(())
}

#[tokio::test]
async fn another_account_neither_sees_nor_uses_nor_deletes_a_snapshot() -> Result<()> {
    let server = Server::start().await?;
    let (vm, snapshot) = saved(&server).await?;
    let key = server.other_key("other", &["write"]).await?;
    assert_eq!(server.get_as(&key, "/v1/snapshots").await?.ok(200), json!([]));
    server.get_as(&key, &snapshot).await?.refused(404, "not_found");
    server.post_as(&key, "/v1/vms", &of(&snapshot)).await?.refused(404, "not_found");
    server.post_as(&key, &format!("{vm}/snapshots"), &json!({})).await?.refused(404, "not_found");
    let delete = server.client.delete(format!("{}{snapshot}", server.url)).header("X-API-Key", &key);
    send(delete).await?.refused(404, "not_found");
    let reader = server.other_key("reader", &["read"]).await?;
    server.post_as(&reader, &format!("{vm}/snapshots"), &json!({})).await?.refused(403, "forbidden");
    server.get(&snapshot).await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn a_save_that_fails_leaves_nothing_and_the_vm_runs_on() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.fail_next(Call::SnapshotSave);
    server.act(&format!("{vm}/snapshots")).await?.refused(500, "internal");
    assert_eq!(server.get("/v1/snapshots").await?.ok(200), json!([]));
    assert!(server.store.snapshot_all().await?.is_empty() && server.fake.snapshots().is_empty());
    assert_eq!(server.state(&vm).await?, "RUNNING");
    save(&server, &vm).await?;
    Ok(())
}

#[tokio::test]
async fn a_save_that_takes_too_long_is_given_up() -> Result<()> {
    let server = Server::start_with(&[("vm.snapshot_timeout_ms", "1000")]).await?;
    let vm = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    let reply = server.act(&format!("{vm}/snapshots")).await?;
    reply.refused(503, "snapshot_timeout");
    assert!(reply.headers.contains_key("retry-after"));
    assert!(server.store.snapshot_all().await?.is_empty());
    assert_eq!(server.state(&vm).await?, "RUNNING");
    Ok(())
}

/// Waits until a save is under way.
async fn saving(server: &Server) -> Result<()> {
    until("it is saved", async || Ok(server.fake.saves() == 1)).await
}

#[tokio::test]
async fn a_vm_can_be_deleted_while_it_is_saved() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    let path = format!("{vm}/snapshots");
    let delete = async {
        saving(&server).await?;
        let deleted = server.delete(&vm).await;
        server.fake.release(Call::SnapshotSave);
        deleted
    };
    let (saved, deleted) = tokio::join!(server.act(&path), delete);
    deleted?.ok(204);
    saved?.refused(404, "not_found");
    assert!(server.present().await?.is_empty() && server.fake.snapshots().is_empty());
    assert!(server.store.snapshot_all().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_vm_that_ends_while_it_is_saved_says_why() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    let path = format!("{vm}/snapshots");
    let end = async {
        saving(&server).await?;
        let report = EndReport { reason: EndReason::Oom, message: "It used too much.".into(), exit_code: None };
        server.fake.kill(&id_of(&vm), report);
        server.fake.release(Call::SnapshotSave);
        anyhow::Ok(())
    };
    let (saved, ended) = tokio::join!(server.act(&path), end);
    ended?;
    assert!(saved?.refused(409, "vm_ended").contains("It used too much."));
    server.until_state(&vm, "ERROR").await?;
    assert!(server.store.snapshot_all().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_stop_waits_for_the_save_and_a_client_that_hangs_up_undoes_nothing() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    tokio::select! {
        _ = send(server.request(Method::POST, &format!("{vm}/snapshots"))) => panic!("it is held"),
        begun = saving(&server) => begun?,
    }
    let path = format!("{vm}/stop");
    let release = async {
        assert_eq!(server.state(&vm).await?, "RUNNING");
        server.fake.release(Call::SnapshotSave);
        anyhow::Ok(())
    };
    let (stopped, released) = tokio::join!(server.act(&path), release);
    released?;
    stopped?.ok(204);
    assert_eq!(server.fake.overlaps(), 0);
    let list = server.get("/v1/snapshots").await?.ok(200);
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(list[0]["state"], "READY");
    Ok(())
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_restored_is_told_and_leaves_no_vm() -> Result<()> {
    let server = Server::start().await?;
    let (vm, snapshot) = saved(&server).await?;
    server.fake.damage_snapshot(&snapshot_id(&snapshot));
    for _ in 0..2 {
        let create = server.request(Method::POST, "/v1/vms").json(&of(&snapshot)).header("Idempotency-Key", "k");
        send(create).await?.refused(422, "bad_snapshot");
    }
    server.fake.fail_next(Call::CreateFrom);
    server.post("/v1/vms", &of(&snapshot)).await?.refused(500, "internal");
    assert_eq!(server.get("/v1/vms").await?.ok(200).as_array().unwrap().len(), 1);
    assert_eq!(server.present().await?, [id_of(&vm)]);
    Ok(())
}

#[tokio::test]
async fn a_host_without_room_refuses_a_restore_for_now() -> Result<()> {
    let server = Server::start().await?;
    let (_, snapshot) = saved(&server).await?;
    server.fake.set_capacity(1);
    let reply = server.post("/v1/vms", &of(&snapshot)).await?;
    reply.refused(503, "no_capacity");
    assert!(reply.headers.contains_key("retry-after"));
    Ok(())
}

#[tokio::test]
async fn snapshots_are_bounded_in_number_and_count_for_the_disk() -> Result<()> {
    let server = Server::start_with(&[("limits.snapshots_per_account", "1"), ("quota.disk_mb", "2176")]).await?;
    let (vm, snapshot) = saved(&server).await?;
    let reply = server.act(&format!("{vm}/snapshots")).await?;
    reply.refused(429, "quota_exceeded");
    assert_eq!(reply.json()["details"], json!({ "what": "snapshots", "limit": 1, "used": 1, "asked": 1 }));
    // A second VM needs 1024 MiB; the first has as much, the snapshot 3, of 2176.
    server.vm().await?;
    server.delete(&snapshot).await?.ok(204);
    // While it is saved, a snapshot may come to take all of the VM's memory and disk.
    let reply = server.act(&format!("{vm}/snapshots")).await?;
    reply.refused(429, "quota_exceeded");
    let details = json!({ "what": "diskMb", "limit": 2176, "used": 2048, "asked": 1152 });
    assert_eq!(reply.json()["details"], details);
    assert!(server.store.snapshot_all().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_removal_waits_for_a_restore_under_way() -> Result<()> {
    let server = Server::start().await?;
    let (_, snapshot) = saved(&server).await?;
    server.fake.hold(Call::Start);
    let delete = async {
        until("it is restored", async || Ok(server.present().await?.len() == 2)).await?;
        let deleted = server.delete(&snapshot);
        let gone = async {
            until("it is not to be seen", async || Ok(server.get(&snapshot).await?.status == 404)).await?;
            let left = server.fake.snapshots().len();
            server.fake.release(Call::Start);
            anyhow::Ok(left)
        };
        let (deleted, left) = tokio::join!(deleted, gone);
        deleted?.ok(204);
        left
    };
    let body = of(&snapshot);
    let (restored, left) = tokio::join!(server.post("/v1/vms", &body), delete);
    restored?.ok(201);
    assert_eq!(left?, 1, "it was there while the VM came up");
    assert!(server.fake.snapshots().is_empty());
    Ok(())
}

/// A record as an earlier server may have left it.
async fn left(server: &Server, events: &[SnapshotEvent]) -> Result<SnapshotId> {
    let vm = server.store.vm_not_deleted().await?.remove(0);
    let account = server.store.account_get(&vm.account_id).await?.context("the account")?;
    let new = NewSnapshot {
        id: SnapshotId::random(),
        account_id: vm.account_id,
        vm_id: vm.id,
        name: None,
        image_id: vm.image_id,
        image_digest: vm.image_digest,
        kernel_digest: None,
        engine: vm.engine,
        size: vm.size,
    };
    let SnapshotInserted::New(mut snapshot) = server.store.snapshot_insert(&new, &account.quota, 100).await? else {
        anyhow::bail!("it fits")
    };
    for event in events {
        let moved = server.store.snapshot_transition(&snapshot.id, snapshot.state, *event).await?;
        snapshot = moved.context("nobody else moves it")?;
    }
    Ok(snapshot.id)
}

fn any_spec() -> VmSpec {
    VmSpec {
        id: tiffin_types::id::VmId::random(),
        image: tiffin_types::id::Digest::from_sha256([7; 32]),
        kernel: None,
        size: tiffin_types::vm::VmSize { cpus: 1, mem_mb: 128, disk_mb: 1024 },
        egress: Default::default(),
        engine: tiffin_types::vm::EngineName::Fake,
        program: None,
    }
}

#[tokio::test]
async fn the_next_server_removes_what_an_earlier_one_left_half_done() -> Result<()> {
    let mut server = Server::start().await?;
    let (_, kept) = saved(&server).await?;
    server.stop().await;
    // Killed before the engine was asked; after it had saved; while one was removed, before and after the engine did;
    // and one that no record knows.
    left(&server, &[]).await?;
    let whole = left(&server, &[]).await?;
    server.fake.plant_snapshot(whole, &any_spec());
    let removing = left(&server, &[SnapshotEvent::Saved, SnapshotEvent::Remove]).await?;
    server.fake.plant_snapshot(removing, &any_spec());
    left(&server, &[SnapshotEvent::Remove]).await?;
    server.fake.plant_snapshot(SnapshotId::random(), &any_spec());
    server.restart().await?;
    server.get("/health").await?.ok(200);
    assert_eq!(server.fake.snapshots(), [snapshot_id(&kept)]);
    let all = server.store.snapshot_all().await?;
    assert_eq!(all.iter().map(|snapshot| &snapshot.id).collect::<Vec<_>>(), [&snapshot_id(&kept)]);
    restored(&server, &kept).await?;
    Ok(())
}

#[tokio::test]
async fn a_restore_that_was_cut_short_leaves_no_vm() -> Result<()> {
    let mut server = Server::start().await?;
    let (vm, snapshot) = saved(&server).await?;
    server.stop().await;
    let record = server.store.vm_not_deleted().await?.remove(0);
    let account = server.store.account_get(&record.account_id).await?.context("the account")?;
    let half_made = tiffin_store::NewVm {
        id: tiffin_types::id::VmId::random(),
        account_id: record.account_id.clone(),
        image_id: record.image_id.clone(),
        image_digest: record.image_digest.clone(),
        kernel_digest: None,
        engine: record.engine,
        isolation: record.isolation,
        size: record.size,
        egress: record.egress.clone(),
        provision_mode: tiffin_types::vm::ProvisionMode::Snapshot,
        snapshot_id: Some(snapshot_id(&snapshot)),
        service: None,
    };
    server.store.vm_insert(&half_made, &account.quota, None).await?;
    let (created, start) = (tiffin_types::vm::VmState::Created, tiffin_types::vm::VmEvent::Start);
    server.store.vm_transition(&half_made.id, created, start, Default::default()).await?;
    server.fake.plant_snapshot(snapshot_id(&snapshot), &any_spec());
    server.restart().await?;
    let list = server.get("/v1/vms").await?.ok(200);
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert!(vm.ends_with(list[0]["id"].as_str().unwrap()));
    server.get(&snapshot).await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn a_snapshot_whose_files_are_gone_is_lost_until_they_are_back() -> Result<()> {
    let mut server = Server::start_with(&[("vm.reconcile_ms", "50")]).await?;
    let (_, snapshot) = saved(&server).await?;
    server.fake.lose_snapshot(&snapshot_id(&snapshot));
    server.restart().await?;
    until("it is lost", async || Ok(server.get(&snapshot).await?.ok(200)["state"] == "LOST")).await?;
    server.post("/v1/vms", &of(&snapshot)).await?.refused(422, "bad_snapshot");
    server.fake.plant_snapshot(snapshot_id(&snapshot), &any_spec());
    until("it is found", async || Ok(server.get(&snapshot).await?.ok(200)["state"] == "READY")).await?;
    restored(&server, &snapshot).await?;
    server.fake.lose_snapshot(&snapshot_id(&snapshot));
    until("it is lost", async || Ok(server.get(&snapshot).await?.ok(200)["state"] == "LOST")).await?;
    server.delete(&snapshot).await?.ok(204);
    Ok(())
}

#[tokio::test]
async fn a_removal_that_fails_is_tried_again_by_the_timer() -> Result<()> {
    let server = Server::start_with(&[("vm.reconcile_ms", "50")]).await?;
    let (_, snapshot) = saved(&server).await?;
    server.fake.fail_next(Call::SnapshotRemove);
    // The timer may come first and meet the failure in its stead.
    let status = server.delete(&snapshot).await?.status;
    assert!([204, 500].contains(&status.as_u16()), "{status}");
    server.get(&snapshot).await?.refused(404, "not_found");
    until(
        "it is gone",
        async || Ok(server.fake.snapshots().is_empty() && server.store.snapshot_all().await?.is_empty()),
    )
    .await
}

#[tokio::test]
async fn the_timer_leaves_a_save_under_way_alone() -> Result<()> {
    let server = Server::start_with(&[("vm.reconcile_ms", "50")]).await?;
    let vm = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    let ticks = async {
        saving(&server).await?;
        // Each run removes what no record knows.
        for _ in 0..2 {
            server.fake.plant_snapshot(SnapshotId::random(), &any_spec());
            until("the timer has run", async || Ok(server.fake.snapshots().is_empty())).await?;
        }
        server.fake.release(Call::SnapshotSave);
        anyhow::Ok(())
    };
    let (snapshot, ticked) = tokio::join!(save(&server, &vm), ticks);
    ticked?;
    let snapshot = snapshot?;
    assert_eq!(server.get(&snapshot).await?.ok(200)["state"], "READY");
    Ok(())
}

#[tokio::test]
async fn a_host_that_cannot_be_asked_for_its_snapshots_loses_none() -> Result<()> {
    let mut server = Server::start().await?;
    let (_, snapshot) = saved(&server).await?;
    server.stop().await;
    server.fake.fail_next(Call::SnapshotList);
    server.restart().await?;
    assert_eq!(server.get(&snapshot).await?.ok(200)["state"], "READY");
    Ok(())
}

#[tokio::test]
async fn requests_that_wait_for_one_vm_keep_nobody_else_waiting() -> Result<()> {
    let limits = [("limits.creates_in_flight", "2"), ("limits.create_wait_ms", "1000")];
    let server = Server::start_with(&limits).await?;
    let vm = server.vm().await?;
    server.fake.hold(Call::SnapshotSave);
    let paths: Vec<String> = (0..4).map(|_| format!("{vm}/snapshots")).collect();
    let saves = futures_util::future::join_all(paths.iter().map(|path| server.act(path)));
    let fork_path = format!("{vm}/fork");
    let count = json!({ "count": 1 });
    let fork = server.post(&fork_path, &count);
    let other = async {
        saving(&server).await?;
        // All of them wait by now, or will.
        for _ in 0..5 {
            let other = server.vm().await?;
            server.act(&format!("{other}/stop")).await?.ok(204);
            server.act(&format!("{other}/start")).await?.ok(204);
        }
        server.fake.release(Call::SnapshotSave);
        anyhow::Ok(())
    };
    let (saves, forked, other) = tokio::join!(saves, fork, other);
    other?;
    forked?.ok(201);
    for saved in saves {
        saved?.ok(201);
    }
    Ok(())
}

#[tokio::test]
async fn a_restore_can_be_repeated_with_its_key_when_its_snapshot_is_gone() -> Result<()> {
    let server = Server::start().await?;
    let (_, snapshot) = saved(&server).await?;
    let create = || server.request(Method::POST, "/v1/vms").json(&of(&snapshot)).header("Idempotency-Key", "k");
    let first = send(create()).await?.ok(201);
    server.delete(&snapshot).await?.ok(204);
    assert_eq!(send(create()).await?.ok(201)["id"], first["id"]);
    Ok(())
}
