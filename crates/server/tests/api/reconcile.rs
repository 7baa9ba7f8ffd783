//! A server that starts over what an earlier one left.

use std::time::Duration;

use anyhow::Result;
use reqwest::Method;
use serde_json::json;
use tiffin_engine::fake::Call;
use tiffin_store::{Change, Desired};
use tiffin_types::{
    network::EgressPolicy,
    vm::{EndReason, EndReport, VmEvent, VmSize, VmSpec, VmState},
};

use crate::harness::{Server, id_of, send, small_vm, until};

#[tokio::test]
async fn vms_that_run_are_adopted_and_serve_on() -> Result<()> {
    let mut server = Server::start().await?;
    let (running, paused, stopped) = (server.vm().await?, server.vm().await?, server.vm().await?);
    server.act(&format!("{paused}/pause")).await?.ok(204);
    server.act(&format!("{stopped}/stop")).await?.ok(204);
    server.restart().await?;
    assert_eq!(server.state(&running).await?, "RUNNING");
    assert_eq!(server.state(&paused).await?, "PAUSED");
    assert_eq!(server.state(&stopped).await?, "STOPPED");
    server.post(&format!("{running}/exec"), &json!({ "cmd": "echo on" })).await?.ok(200);
    server.act(&format!("{stopped}/start")).await?.ok(204);
    Ok(())
}

#[tokio::test]
async fn what_ended_while_no_server_watched_has_its_reason() -> Result<()> {
    let mut server = Server::start().await?;
    let (oom, exited, lost) = (server.vm().await?, server.vm().await?, server.vm().await?);
    server.stop().await;
    let report = |reason, exit_code| EndReport { reason, message: "It ended.".into(), exit_code };
    server.fake.kill(&id_of(&oom), report(EndReason::Oom, None));
    server.fake.kill(&id_of(&exited), report(EndReason::Exited, Some(0)));
    server.fake.lose(&id_of(&lost));
    server.restart().await?;
    assert_eq!(server.get(&oom).await?.ok(200)["error"]["code"], "oom");
    assert_eq!(server.get(&exited).await?.ok(200)["end"]["exitCode"], 0);
    assert_eq!(server.get(&lost).await?.ok(200)["error"]["code"], "engine_lost");
    server.act(&format!("{lost}/start")).await?.ok(204);
    Ok(())
}

#[tokio::test]
async fn a_start_that_was_cut_short_is_told_and_can_be_repeated() -> Result<()> {
    let mut server = Server::start().await?;
    let vm = server.vm().await?;
    server.act(&format!("{vm}/stop")).await?.ok(204);
    server.stop().await;
    server.store.vm_transition(&id_of(&vm), VmState::Stopped, VmEvent::Start, Change::default()).await?;
    server.restart().await?;
    server.until_state(&vm, "ERROR").await?;
    server.act(&format!("{vm}/start")).await?.ok(204);
    server.stop().await;

    // This one came up, but the record never heard of it.
    let fallen_behind = server.store.vm_not_deleted().await?.remove(0);
    let change = Change { desired: Some(Desired::Stopped), ..Change::default() };
    server.store.vm_transition(&fallen_behind.id, VmState::Running, VmEvent::Stop, change).await?;
    server.restart().await?;
    server.until_state(&vm, "STOPPED").await
}

#[tokio::test]
async fn a_create_that_was_cut_short_before_the_engine_knew_leaves_no_record() -> Result<()> {
    let mut server = Server::start().await?;
    let vm = server.vm().await?;
    server.stop().await;
    let record = server.store.vm_not_deleted().await?.remove(0);
    let account = server.store.account_get(&record.account_id).await?.unwrap();
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
        provision_mode: record.provision_mode,
        snapshot_id: None,
        service: None,
    };
    server.store.vm_insert(&half_made, &account.quota, None).await?;
    server.restart().await?;
    let list = server.get("/v1/vms").await?.ok(200);
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert!(vm.ends_with(list[0]["id"].as_str().unwrap()));
    Ok(())
}

#[tokio::test]
async fn what_no_record_knows_is_removed_from_the_host() -> Result<()> {
    let mut server = Server::start().await?;
    let vm = server.vm().await?;
    let stray = VmSpec {
        id: tiffin_types::id::VmId::random(),
        image: tiffin_types::id::Digest::from_sha256([9; 32]),
        kernel: None,
        size: VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 },
        egress: EgressPolicy::default(),
        engine: tiffin_types::vm::EngineName::Fake,
        program: None,
    };
    server.fake.plant(stray);
    server.restart().await?;
    server.get("/health").await?.ok(200);
    assert_eq!(server.present().await?, [id_of(&vm)]);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_told_is_left_alone() -> Result<()> {
    let mut server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.set_unknown(&id_of(&vm), true);
    server.restart().await?;
    assert_eq!(server.state(&vm).await?, "RUNNING");
    server.fake.set_unknown(&id_of(&vm), false);
    server.post(&format!("{vm}/exec"), &json!({ "cmd": "true" })).await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn what_drifts_without_a_word_is_found_by_the_timer() -> Result<()> {
    let server = Server::start_with(&[("vm.reconcile_ms", "50")]).await?;
    let (lost, deleted, unsure) = (server.vm().await?, server.vm().await?, server.vm().await?);
    server.fake.set_unknown(&id_of(&unsure), true);
    server.fake.lose(&id_of(&lost));
    server.until_state(&lost, "ERROR").await?;
    assert_eq!(server.get(&lost).await?.ok(200)["error"]["code"], "engine_lost");

    server.fake.fail_next(Call::Destroy);
    server.delete(&deleted).await?.refused(500, "internal");
    server.get(&deleted).await?.refused(404, "not_found");
    until("it is destroyed after all", async || Ok(!server.present().await?.contains(&id_of(&deleted)))).await?;

    server.fake.fail_next(Call::Stop);
    server.act(&format!("{unsure}/stop")).await?.refused(500, "internal");
    server.fake.set_unknown(&id_of(&unsure), false);
    server.until_state(&unsure, "STOPPED").await
}

#[tokio::test]
async fn the_timer_leaves_what_is_being_changed_alone() -> Result<()> {
    let server = Server::start_with(&[("vm.reconcile_ms", "50")]).await?;
    server.fake.set_start_delay(Duration::from_millis(400));
    let vm = server.vm().await?;
    server.act(&format!("{vm}/stop")).await?.ok(204);
    server.act(&format!("{vm}/start")).await?.ok(204);
    assert_eq!(server.state(&vm).await?, "RUNNING");
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn a_create_under_way_at_a_shutdown_is_finished_or_taken_up() -> Result<()> {
    let mut server = Server::start_cold().await?;
    server.fake.hold(Call::Start);
    let create = server.request(Method::POST, "/v1/vms").json(&small_vm());
    let stop = async {
        until("it is starting", async || Ok(!server.present().await?.is_empty())).await?;
        server.stop().await;
        anyhow::Ok(())
    };
    // The grace is over before the VM is up: the client loses its connection.
    let (created, stopped) = tokio::join!(send(create), stop);
    stopped?;
    assert!(created.is_err());
    server.restart().await?;
    server.fake.release(Call::Start);
    until("it runs", async || {
        let list = server.get("/v1/vms").await?.ok(200);
        Ok(list.as_array().is_some_and(|list| list.len() == 1 && list[0]["state"] == "RUNNING"))
    })
    .await
}
