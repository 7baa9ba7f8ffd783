//! `/v1/vms/{id}`: states, logs, network.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tiffin_engine::{Denied, DeniedConnection, fake::Call};
use tiffin_types::vm::{EndReason, EndReport};

use crate::harness::{Server, id_of, send, until};

#[tokio::test]
async fn a_vm_goes_through_its_states_and_each_refusal_names_the_state() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let act = async |what: &str| server.act(&format!("{vm}/{what}")).await;

    for (allowed, state, refused) in [
        (None, "RUNNING", vec!["start", "resume"]),
        (Some("pause"), "PAUSED", vec!["start", "pause"]),
        (Some("resume"), "RUNNING", vec!["start", "resume"]),
        (Some("stop"), "STOPPED", vec!["stop", "pause", "resume"]),
        (Some("start"), "RUNNING", vec!["start", "resume"]),
        (Some("pause"), "PAUSED", vec!["pause"]),
        (Some("stop"), "STOPPED", vec!["stop"]),
    ] {
        if let Some(allowed) = allowed {
            act(allowed).await?.ok(204);
        }
        assert_eq!(server.state(&vm).await?, state);
        for refused in refused {
            let reply = act(refused).await?;
            let message = reply.refused(409, "wrong_state");
            assert!(message.contains(state), "{message}");
            assert_eq!(reply.json()["details"]["state"], state);
        }
    }
    let stopped = server.get(&vm).await?.ok(200);
    assert_eq!(stopped["end"]["reason"], "requested");
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn a_deleted_vm_is_not_found_by_any_call_and_gone_from_the_host() -> Result<()> {
    let server = Server::start().await?;
    for prepare in ["", "stop", "pause"] {
        let vm = server.vm().await?;
        if !prepare.is_empty() {
            server.act(&format!("{vm}/{prepare}")).await?.ok(204);
        }
        server.delete(&vm).await?.ok(204);
        server.delete(&vm).await?.refused(404, "not_found");
        server.get(&vm).await?.refused(404, "not_found");
        for what in ["start", "stop", "pause", "resume"] {
            server.act(&format!("{vm}/{what}")).await?.refused(404, "not_found");
        }
        server.get(&format!("{vm}/logs")).await?.refused(404, "not_found");
        server.get(&format!("{vm}/network")).await?.refused(404, "not_found");
        server.post(&format!("{vm}/exec"), &json!({ "cmd": "true" })).await?.refused(404, "not_found");
    }
    assert!(server.present().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn deleting_a_vm_that_comes_up_cancels_it() -> Result<()> {
    let server = Server::start_cold().await?;
    server.fake.hold(Call::Start);
    let create = server.request(reqwest::Method::POST, "/v1/vms").json(&crate::harness::small_vm());
    let delete = async {
        until("it is starting", async || Ok(!server.present().await?.is_empty())).await?;
        let list = server.get("/v1/vms").await?.ok(200);
        assert_eq!(list[0]["state"], "STARTING");
        let path = format!("/v1/vms/{}", list[0]["id"].as_str().unwrap());
        server.act(&format!("{path}/stop")).await?.refused(409, "wrong_state");
        let deleted = server.delete(&path).await;
        server.fake.release(Call::Start);
        deleted
    };
    let (created, deleted) = tokio::join!(send(create), delete);
    deleted?.ok(204);
    created?.refused(404, "not_found");
    assert!(server.present().await?.is_empty());
    assert_eq!(server.get("/v1/vms").await?.ok(200), json!([]));
    Ok(())
}

#[tokio::test]
async fn a_vm_that_fails_to_start_again_is_in_error_with_the_reason_and_can_be_started_later() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.act(&format!("{vm}/stop")).await?.ok(204);
    server.fake.fail_next_start(EndReport {
        reason: EndReason::BootFailed,
        message: "The engine said no.".into(),
        exit_code: None,
    });
    server.act(&format!("{vm}/start")).await?.refused(500, "boot_failed");
    let body = server.get(&vm).await?.ok(200);
    assert_eq!(body["state"], "ERROR");
    assert_eq!(body["error"], json!({ "code": "boot_failed", "message": "The engine said no." }));
    server.act(&format!("{vm}/start")).await?.ok(204);
    assert!(server.get(&vm).await?.ok(200).get("error").is_none());
    Ok(())
}

#[tokio::test]
async fn an_end_that_nobody_asked_for_is_recorded_with_its_reason() -> Result<()> {
    let server = Server::start().await?;
    for (reason, exit_code, state) in [
        (EndReason::Oom, None, "ERROR"),
        (EndReason::EngineLost, None, "ERROR"),
        (EndReason::AgentLost, None, "ERROR"),
        (EndReason::MonitorLost, None, "ERROR"),
        (EndReason::Exited, Some(3), "STOPPED"),
    ] {
        let vm = server.vm().await?;
        server.fake.kill(&id_of(&vm), EndReport { reason, message: "It ended.".into(), exit_code });
        server.until_state(&vm, state).await?;
        let body = server.get(&vm).await?.ok(200);
        match exit_code {
            None => assert_eq!(body["error"]["code"], reason.as_str()),
            Some(code) => {
                assert_eq!(body["end"], json!({ "reason": "exited", "message": "It ended.", "exitCode": code }));
            }
        }
        server.act(&format!("{vm}/start")).await?.ok(204);
    }
    Ok(())
}

#[tokio::test]
async fn a_stop_that_fails_on_the_host_leaves_the_vm_stopping_until_it_is_finished() -> Result<()> {
    let mut server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.fail_next(Call::Stop);
    server.act(&format!("{vm}/stop")).await?.refused(500, "internal");
    assert_eq!(server.state(&vm).await?, "STOPPING");
    server.restart().await?;
    server.until_state(&vm, "STOPPED").await
}

#[tokio::test]
async fn a_failed_pause_or_resume_changes_nothing() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.fail_next(Call::Pause);
    server.act(&format!("{vm}/pause")).await?.refused(500, "internal");
    assert_eq!(server.state(&vm).await?, "RUNNING");
    server.act(&format!("{vm}/pause")).await?.ok(204);
    server.fake.fail_next(Call::Resume);
    server.act(&format!("{vm}/resume")).await?.refused(500, "internal");
    assert_eq!(server.state(&vm).await?, "PAUSED");
    Ok(())
}

#[tokio::test]
async fn changes_of_one_vm_at_once_go_one_after_the_other() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.set_start_delay(Duration::from_millis(20));
    let paths: Vec<String> =
        ["stop", "start", "pause", "resume", "stop", "start"].iter().map(|what| format!("{vm}/{what}")).collect();
    for _ in 0..5 {
        for reply in futures_util::future::join_all(paths.iter().map(|path| server.act(path))).await {
            assert!([204, 409].contains(&reply?.status.as_u16()));
        }
    }
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn logs_are_tails_of_the_three_named_logs() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let logs = server.get(&format!("{vm}/logs")).await?.ok(200);
    assert_eq!((&logs["type"], &logs["lines"]), (&json!("firecracker.log"), &json!(["created", "started"])));
    let logs = server.get(&format!("{vm}/logs?type=firecracker.stdout.log&tail=2")).await?.ok(200);
    assert_eq!((&logs["lines"], &logs["truncated"]), (&json!(["line 299", "line 300"]), &json!(true)));
    assert_eq!(logs["updatedAt"], "2025-01-21T10:30:00.000Z");
    let logs = server.get(&format!("{vm}/logs?type=firecracker.stdout.log")).await?.ok(200);
    assert_eq!(logs["lines"].as_array().unwrap().len(), 200);
    let logs = server.get(&format!("{vm}/logs?type=firecracker.stderr.log")).await?.ok(200);
    assert!(logs["lines"].as_array().unwrap().is_empty() && logs.get("updatedAt").is_none());
    for bad in [
        "tail=0",
        "tail=1001",
        "tail=-1",
        "tail=x",
        "tail=1.5",
        "tail=",
        "type=/etc/passwd",
        "type=",
        "x=1",
        "tail=1&tail=2",
    ] {
        server.get(&format!("{vm}/logs?{bad}")).await?.refused(400, "invalid_parameter");
    }
    Ok(())
}

#[tokio::test]
async fn refused_connections_are_shown_with_the_policy() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let destination =
        DeniedConnection { address: "192.0.2.7".parse()?, protocol: "tcp".into(), port: Some(443), count: 3 };
    server.fake.set_denied(Denied { total: 3, destinations: vec![destination] });
    let network = server.get(&format!("{vm}/network")).await?.ok(200);
    let denied =
        json!({ "total": 3, "destinations": [{ "address": "192.0.2.7", "protocol": "tcp", "port": 443, "count": 3 }] });
    assert_eq!(network, json!({ "outboundInternet": false, "allowIps": [], "denied": denied }));
    Ok(())
}

#[tokio::test]
async fn malformed_and_unknown_ids_are_not_found() -> Result<()> {
    let server = Server::start().await?;
    for id in ["vm-0123456789abcd", "nope", "vm-0123456789ABCD", "%00", "%ff", "..%2f..%2fetc", "vm-"] {
        server.get(&format!("/v1/vms/{id}")).await?.refused(404, "not_found");
        server.delete(&format!("/v1/vms/{id}")).await?.refused(404, "not_found");
    }
    Ok(())
}
