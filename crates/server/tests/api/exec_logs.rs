//! `/v1/vms/{id}/exec-logs`: what was run, and how it ended.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use tiffin_engine::fake::Script;

use crate::harness::{Server, until};

async fn logs(server: &Server, path: &str, count: usize) -> Result<Vec<Value>> {
    let mut list = Vec::new();
    until(&format!("{count} runs are logged"), async || {
        list = server.get(path).await?.ok(200).as_array().cloned().unwrap_or_default();
        Ok(list.len() == count)
    })
    .await?;
    Ok(list)
}

#[tokio::test]
async fn runs_are_logged_with_how_they_ended_and_without_what_they_were() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.script("slow", Script { delay: Duration::from_secs(30), ..Script::default() });
    let path = format!("{vm}/exec");
    let ok = server.post(&path, &json!({ "cmd": "echo secret-word" })).await?;
    ok.ok(200);
    server.post(&path, &json!({ "cmd": "slow", "timeoutMs": 50 })).await?.ok(200);
    let list = logs(&server, &format!("{vm}/exec-logs"), 2).await?;
    assert_eq!(
        (&list[0]["outcome"], &list[0]["timedOut"], &list[0]["exitCode"]),
        (&json!("timed_out"), &json!(true), &json!(-1))
    );
    assert_eq!(
        (&list[1]["outcome"], &list[1]["exitCode"], &list[1]["type"]),
        (&json!("exited"), &json!(0), &json!("exec"))
    );
    assert_eq!(list[1]["requestId"], ok.headers["x-request-id"].to_str()?);
    assert_eq!((&list[1]["actor"]["type"], &list[1]["actor"]["name"]), (&json!("key"), &json!("admin")));
    assert!(list[1]["durationMs"].is_u64() && list[1].get("command").is_none() && list[1]["truncated"] == false);
    assert!(!serde_json::to_string(&list)?.contains("secret-word"));

    assert_eq!(logs(&server, &format!("{vm}/exec-logs?limit=1"), 1).await?, list[..1]);
    assert_eq!(logs(&server, &format!("{vm}/exec-logs?type=exec"), 2).await?, list);
    logs(&server, &format!("{vm}/exec-logs?type=run-ts"), 0).await?;
    for bad in ["type=x", "limit=0", "limit=1001", "y=1"] {
        server.get(&format!("{vm}/exec-logs?{bad}")).await?.refused(400, "invalid_parameter");
    }
    let stranger = server.other_key("other", &["admin"]).await?;
    server.get_as(&stranger, &format!("{vm}/exec-logs")).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn commands_are_shown_where_the_configuration_wants_it_and_only_the_newest_runs_kept() -> Result<()> {
    let server = Server::start_with(&[("exec.log_commands", "true"), ("exec.logs_kept", "3")]).await?;
    let vm = server.vm().await?;
    for number in 0..5 {
        let cmd = format!("echo {number} {}", "ä".repeat(2000));
        server.post(&format!("{vm}/exec"), &json!({ "cmd": cmd })).await?.ok(200);
    }
    let path = format!("{vm}/exec-logs");
    let newest = |list: &Value| list[0]["command"].as_str().is_some_and(|text| text.starts_with("echo 4"));
    until("the last is logged", async || Ok(newest(&server.get(&path).await?.ok(200)))).await?;
    let list = logs(&server, &path, 3).await?;
    let command = list[2]["command"].as_str().expect("a command");
    assert!(command.starts_with("echo 2 ä") && command.len() <= 1024, "{command}");
    Ok(())
}
