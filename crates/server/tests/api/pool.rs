//! VMs that are booted ahead.

use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::{Engine, Observed, fake::Call};
use tiffin_types::{
    id::VmId,
    vm::{EndReason, EndReport},
};

use crate::harness::{Server, id_of, send, small_vm, until};

const KEEP_ONE: [(&str, &str); 2] = [("pool.max_vms", "2"), ("pool.keep", "1x128=1")];
/// No boot is over within a test.
const NEVER: Duration = Duration::from_secs(3600);

async fn create(server: &Server, body: &Value) -> Result<(VmId, Value)> {
    let vm = server.post("/v1/vms", body).await?.ok(201);
    Ok((vm["id"].as_str().context("an id")?.parse()?, vm))
}

fn with(field: &str, value: Value) -> Value {
    let mut body = small_vm();
    body[field] = value;
    body
}

fn report(message: &str) -> EndReport {
    EndReport { reason: EndReason::EngineLost, message: message.into(), exit_code: None }
}

async fn until_pooled(server: &Server, count: usize) -> Result<Vec<VmId>> {
    until(&format!("{count} are ready"), async || Ok(server.pooled().await?.len() == count)).await?;
    server.pooled().await
}

#[tokio::test]
async fn what_was_asked_for_lately_is_booted_ahead_and_taken_without_a_boot() -> Result<()> {
    let server = Server::start_with(&[("pool.max_vms", "2"), ("pool.keep", "")]).await?;
    assert_eq!(server.pooled().await?, [], "nobody asked for anything");
    server.vm().await?;
    let ready = until_pooled(&server, 1).await?;
    server.fake.set_start_delay(NEVER);
    let (id, vm) = create(&server, &small_vm()).await?;
    assert_eq!(ready, std::slice::from_ref(&id));
    assert_eq!((&vm["state"], &vm["provisionMode"]), (&json!("RUNNING"), &json!("boot")));
    assert_eq!(vm["startedAt"], vm["createdAt"], "its life began with the request");
    let done = server.post(&format!("/v1/vms/{id}/exec"), &json!({ "cmd": "echo up" })).await?.ok(200);
    assert_eq!(done["stdout"], "up\n");
    server.act(&format!("/v1/vms/{id}/stop")).await?.ok(204);
    server.delete(&format!("/v1/vms/{id}")).await?.ok(204);
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn the_network_policy_is_the_requests_own() -> Result<()> {
    let server = Server::start_with(&KEEP_ONE).await?;
    let ready = server.pooled().await?;
    let mut body = with("allowIps", json!(["192.0.2.0/24"]));
    body["outboundInternet"] = json!(true);
    let (id, vm) = create(&server, &body).await?;
    assert_eq!(ready, std::slice::from_ref(&id));
    assert_eq!((&vm["allowIps"], &vm["outboundInternet"]), (&json!(["192.0.2.0/24"]), &json!(true)));
    let egress = server.fake.spec(&id).context("it is there")?.egress;
    assert!(egress.outbound_internet && egress.allow == ["192.0.2.0/24".parse()?]);
    // The engine knows it by that policy from now on.
    server.act(&format!("/v1/vms/{id}/stop")).await?.ok(204);
    server.act(&format!("/v1/vms/{id}/start")).await?.ok(204);
    Ok(())
}

#[tokio::test]
async fn whatever_is_wrong_with_a_vm_of_the_pool_the_request_boots_one() -> Result<()> {
    let server = Server::start_with(&[("pool.max_vms", "1"), ("pool.keep", "1x128=1")]).await?;
    let ready = server.pooled().await?;
    server.fake.lose(&ready[0]);
    let (id, _) = create(&server, &small_vm()).await?;
    assert_ne!(ready, [id]);

    // It is down, and the engine has not told yet.
    let ready = until_pooled(&server, 1).await?;
    server.fake.pause(&ready[0]).await?;
    let (id, _) = create(&server, &small_vm()).await?;
    assert_ne!(ready, [id]);

    let ready = until_pooled(&server, 1).await?;
    server.fake.fail_next(Call::SetEgress);
    let mut body = with("allowIps", json!(["192.0.2.0/24"]));
    body["outboundInternet"] = json!(true);
    let (id, _) = create(&server, &body).await?;
    assert_ne!(ready, std::slice::from_ref(&id));
    assert!(server.fake.spec(&id).context("it is there")?.egress.outbound_internet);
    until("the unfit one is gone", async || Ok(server.fake.observe(&ready[0]).await == Observed::Absent)).await
}

#[tokio::test]
async fn one_that_ends_by_itself_is_replaced() -> Result<()> {
    let server = Server::start_with(&KEEP_ONE).await?;
    let ready = server.pooled().await?;
    server.fake.kill(&ready[0], report("It was killed."));
    until("there is another", async || {
        let now = server.pooled().await?;
        Ok(now.len() == 1 && now != ready && server.fake.observe(&ready[0]).await == Observed::Absent)
    })
    .await?;
    assert_eq!(server.get("/v1/vms").await?.ok(200), json!([]));
    Ok(())
}

#[tokio::test]
async fn one_that_ends_once_it_is_taken_ends_as_any_other() -> Result<()> {
    let server = Server::start_with(&KEEP_ONE).await?;
    let (id, _) = create(&server, &small_vm()).await?;
    server.fake.kill(&id, report("It was killed."));
    let path = format!("/v1/vms/{id}");
    server.until_state(&path, "ERROR").await?;
    assert_eq!(server.get(&path).await?.ok(200)["error"]["code"], "engine_lost");
    server.act(&format!("{path}/start")).await?.ok(204);
    Ok(())
}

#[tokio::test]
async fn what_is_not_alike_boots() -> Result<()> {
    let server = Server::start_with(&KEEP_ONE).await?;
    let ready = server.pooled().await?;
    for body in [with("memMb", json!(256)), with("cpu", json!(2)), with("diskSizeMb", json!(64))] {
        let (id, _) = create(&server, &body).await?;
        assert_ne!(ready, [id]);
    }
    let vm = server.vm().await?;
    assert_eq!(ready, [id_of(&vm)]);
    until("there is another", async || Ok(!server.pooled().await?.is_empty())).await?;
    let snapshot = server.act(&format!("{vm}/snapshots")).await?.ok(201);
    let (id, restored) = create(&server, &with("snapshotId", snapshot["id"].clone())).await?;
    assert_eq!(restored["provisionMode"], "snapshot");
    let spec = server.fake.spec(&id).context("it is there")?;
    assert_eq!(spec.size.mem_mb, 128);
    Ok(())
}

#[tokio::test]
async fn the_pool_makes_room_for_whoever_needs_it() -> Result<()> {
    let server = Server::start_with(&KEEP_ONE).await?;
    server.fake.set_capacity(1);
    let (id, _) = create(&server, &with("memMb", json!(256))).await?;
    assert_eq!(server.fake.present(), [id]);
    server.post("/v1/vms", &small_vm()).await?.refused(503, "no_capacity");
    Ok(())
}

#[tokio::test]
async fn what_nobody_asks_for_any_more_goes() -> Result<()> {
    let settings = [("pool.max_vms", "2"), ("pool.keep", ""), ("pool.recent_ms", "1000")];
    let server = Server::start_with(&settings).await?;
    let vm = server.vm().await?;
    until("one is ready or was", async || Ok(server.fake.present().len() == 2)).await?;
    until("it is gone", async || Ok(server.fake.present() == [id_of(&vm)])).await
}

#[tokio::test]
async fn none_is_booted_ahead_where_that_is_off() -> Result<()> {
    let server = Server::start_cold().await?;
    let vm = server.vm().await?;
    server.fake.set_start_delay(Duration::from_millis(200));
    let other = server.vm().await?;
    let mut made = [id_of(&vm), id_of(&other)];
    made.sort();
    assert_eq!(server.fake.present(), made);
    Ok(())
}

#[tokio::test]
async fn a_refused_request_leaves_the_pool_as_it_was() -> Result<()> {
    let server = Server::start_with(&[&KEEP_ONE[..], &[("quota.vms", "1")]].concat()).await?;
    let create = |body: Value| server.request(Method::POST, "/v1/vms").json(&body).header("Idempotency-Key", "k");
    let first = send(create(small_vm())).await?.ok(201);
    let ready = until_pooled(&server, 1).await?;
    assert_eq!(send(create(small_vm())).await?.ok(201)["id"], first["id"]);
    send(create(with("memMb", json!(256)))).await?.refused(422, "idempotency_key_reused");
    server.post("/v1/vms", &small_vm()).await?.refused(429, "quota_exceeded");
    assert_eq!(until_pooled(&server, 1).await?, ready);
    server.delete(&format!("/v1/vms/{}", first["id"].as_str().unwrap())).await?.ok(204);
    let vm = server.vm().await?;
    assert_eq!(ready, [id_of(&vm)]);
    Ok(())
}

#[tokio::test]
async fn one_that_was_opened_for_a_refused_request_is_for_nobody_else() -> Result<()> {
    let server = Server::start_with(&[&KEEP_ONE[..], &[("quota.vms", "0")]].concat()).await?;
    let ready = server.pooled().await?;
    let mut body = with("allowIps", json!(["192.0.2.0/24"]));
    body["outboundInternet"] = json!(true);
    server.post("/v1/vms", &body).await?.refused(429, "quota_exceeded");
    until("it is gone", async || Ok(server.fake.observe(&ready[0]).await == Observed::Absent)).await
}

#[tokio::test]
async fn a_size_that_does_not_come_up_is_not_tried_for_ever() -> Result<()> {
    let server = Server::start_with(&[("pool.max_vms", "2"), ("pool.keep", "")]).await?;
    server.vm().await?;
    until_pooled(&server, 1).await?;
    // The next start is one ahead, as this create takes the one that is ready.
    server.fake.fail_next_start_of(128, report("It doesn't come up."));
    server.vm().await?;
    until("one has failed", async || Ok(server.fake.failing_starts() == 0)).await?;
    // Others are none the worse for it.
    create(&server, &with("memMb", json!(256))).await?;
    let ready = until_pooled(&server, 1).await?;
    assert_eq!(server.fake.spec(&ready[0]).context("it is there")?.size.mem_mb, 256);
    server.vm().await?;
    Ok(())
}

#[tokio::test]
async fn what_did_not_come_up_for_its_client_is_not_booted_ahead() -> Result<()> {
    let server = Server::start_with(&[("pool.max_vms", "2"), ("pool.keep", "")]).await?;
    for _ in 0..2 {
        server.fake.fail_next_start_of(256, report("It doesn't come up."));
        server.post("/v1/vms", &with("memMb", json!(256))).await?.refused(500, "engine_lost");
    }
    server.vm().await?;
    let ready = until_pooled(&server, 1).await?;
    assert_eq!(server.fake.spec(&ready[0]).context("it is there")?.size.mem_mb, 128);
    Ok(())
}

#[tokio::test]
async fn a_shutdown_leaves_no_vm_that_is_nobodys() -> Result<()> {
    let mut server = Server::start_with(&KEEP_ONE).await?;
    let vm = server.vm().await?;
    until_pooled(&server, 1).await?;
    server.stop().await;
    assert_eq!(server.fake.present(), [id_of(&vm)]);
    server.restart().await?;
    assert_eq!(server.state(&vm).await?, "RUNNING");
    Ok(())
}

#[tokio::test]
async fn the_measurements_tell_of_hits_and_misses() -> Result<()> {
    let server = Server::start_with(&KEEP_ONE).await?;
    server.vm().await?;
    create(&server, &with("memMb", json!(256))).await?;
    let text = server.get("/metrics").await?.text;
    for line in
        ["tiffin_pool_claims_total{outcome=\"hit\"}", "tiffin_pool_claims_total{outcome=\"miss\"}", "tiffin_pool_vms"]
    {
        assert!(text.contains(line), "{text}");
    }
    Ok(())
}

#[tokio::test]
async fn vms_of_an_image_that_is_deleted_or_replaced_go_with_it_those_on_their_way_up_too() -> Result<()> {
    let any_disk = ("images.min_free_disk_mb", "1");
    for on_its_way in [false, true] {
        let server = Server::start_with(&[("pool.max_vms", "2"), ("pool.keep", ""), any_disk]).await?;
        let path = server.ready_image("mine").await?;
        let body = with("imageId", json!(path.rsplit('/').next()));
        let (id, _) = create(&server, &body).await?;
        let ready = until_pooled(&server, 1).await?;
        if on_its_way {
            server.fake.hold(Call::Start);
            let (second, _) = create(&server, &body).await?;
            assert_eq!(ready, std::slice::from_ref(&second), "it was there already");
            server.delete(&format!("/v1/vms/{second}")).await?.ok(204);
            until("another one is on its way", async || {
                let mut starting = Vec::new();
                for id in server.fake.present() {
                    starting.extend((server.fake.observe(&id).await == Observed::Starting).then_some(id));
                }
                Ok(!starting.is_empty())
            })
            .await?;
        }
        server.delete(&format!("/v1/vms/{id}")).await?.ok(204);
        server.delete(&path).await?.ok(204);
        assert_eq!(server.fake.present(), [], "on its way: {on_its_way}");
        assert_eq!(std::fs::read_dir(server.data_dir().join("images/sha256"))?.count(), 0);
        server.fake.release(Call::Start);
        server.stop().await;
        assert_eq!(server.fake.present(), []);
    }
    Ok(())
}
