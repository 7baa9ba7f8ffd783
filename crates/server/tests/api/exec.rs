//! `POST /v1/vms/{id}/exec`

use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::{StreamExt, future::join_all};
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::fake::Script;
use tiffin_types::vm::{EndReason, EndReport};

use crate::harness::{Reply, Server, id_of, send, until};

async fn exec(server: &Server, vm: &str, body: &Value) -> Result<Reply> {
    server.post(&format!("{vm}/exec"), body).await
}

/// The events of a command: names and data.
async fn events(server: &Server, vm: &str, body: &Value) -> Result<Vec<(String, Value)>> {
    let request = server.request(Method::POST, &format!("{vm}/exec")).header("Accept", "text/event-stream");
    let reply = send(request.json(body)).await?;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_eq!(reply.headers["content-type"], "text/event-stream");
    let blocks = reply.text.split("\n\n").filter(|block| block.contains("event: "));
    Ok(blocks
        .map(|block| {
            let line = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).expect("a line").to_owned();
            (line("event: "), serde_json::from_str(&line("data: ")).expect("JSON"))
        })
        .collect())
}

#[tokio::test]
async fn a_command_answers_with_its_output_and_exit_code() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let done = exec(&server, &vm, &json!({ "cmd": "echo hello" })).await?.ok(200);
    assert_eq!(done, json!({ "exitCode": 0, "stdout": "hello\n", "stderr": "" }));
    let done = exec(&server, &vm, &json!({ "cmd": "exit 7" })).await?.ok(200);
    assert_eq!(done["exitCode"], 7);
    let done = exec(&server, &vm, &json!({ "cmd": "printenv A", "env": { "A": "b c" }, "cwd": "/tmp" })).await?.ok(200);
    assert_eq!(done["stdout"], "b c\n");
    Ok(())
}

#[tokio::test]
async fn the_commands_own_time_is_told_in_milliseconds() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let request = server.request(Method::POST, &format!("{vm}/exec"));
    let reply = send(request.json(&json!({ "cmd": "echo hello" }))).await?;
    let timing = reply.headers["server-timing"].to_str()?;
    let millis: f64 = timing.strip_prefix("guest;dur=").expect("the guest's time").parse()?;
    assert!((0.0..60_000.0).contains(&millis), "{timing}");
    Ok(())
}

#[tokio::test]
async fn a_command_over_its_limit_is_minus_one_and_timed_out() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let done = exec(&server, &vm, &json!({ "cmd": "sleep 60", "timeoutMs": 50 })).await?.ok(200);
    assert_eq!(done, json!({ "exitCode": -1, "stdout": "", "stderr": "", "timedOut": true }));
    Ok(())
}

#[tokio::test]
async fn output_over_a_mebibyte_is_cut_and_binary_output_is_readable() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.script("big", Script { stdout: vec![vec![b'x'; 700_000]; 3], ..Script::default() });
    let done = exec(&server, &vm, &json!({ "cmd": "big" })).await?.ok(200);
    assert_eq!(done["stdout"].as_str().unwrap().len(), 1 << 20);
    assert_eq!(done["truncated"], true);

    server.fake.script("binary", Script { stderr: vec![vec![0, 0xff, b'a']], ..Script::default() });
    let done = exec(&server, &vm, &json!({ "cmd": "binary" })).await?.ok(200);
    assert_eq!((&done["stderr"], done.get("truncated")), (&json!("\0\u{fffd}a"), None));
    Ok(())
}

#[tokio::test]
async fn every_bad_value_of_every_field_is_a_400_that_names_it() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let many: serde_json::Map<String, Value> = (0..257).map(|n| (format!("V{n}"), json!("x"))).collect();
    let heavy: serde_json::Map<String, Value> = (0..9).map(|n| (format!("V{n}"), json!("x".repeat(32_000)))).collect();
    for (field, bad) in [
        ("cmd", json!({})),
        ("cmd", json!({ "cmd": null })),
        ("cmd", json!({ "cmd": 1 })),
        ("cmd", json!({ "cmd": "" })),
        ("cmd", json!({ "cmd": "  \n" })),
        ("cmd", json!({ "cmd": "a\0b" })),
        ("cmd", json!({ "cmd": "x".repeat(131_073) })),
        ("cmd", json!({ "cmd": ["ls"] })),
        ("cwd", json!({ "cmd": "x", "cwd": "relative" })),
        ("cwd", json!({ "cmd": "x", "cwd": "" })),
        ("cwd", json!({ "cmd": "x", "cwd": null })),
        ("cwd", json!({ "cmd": "x", "cwd": 5 })),
        ("cwd", json!({ "cmd": "x", "cwd": "/a\0b" })),
        ("cwd", json!({ "cmd": "x", "cwd": format!("/{}", "a".repeat(4096)) })),
        ("cwd", json!({ "cmd": "x", "cwd": "/missing/dir" })),
        ("env", json!({ "cmd": "x", "env": [] })),
        ("env", json!({ "cmd": "x", "env": null })),
        ("env", json!({ "cmd": "x", "env": "A=b" })),
        ("env", json!({ "cmd": "x", "env": many })),
        ("env", json!({ "cmd": "x", "env": heavy })),
        ("env.1A", json!({ "cmd": "x", "env": { "1A": "b" } })),
        ("env.A-B", json!({ "cmd": "x", "env": { "A-B": "b" } })),
        ("env.", json!({ "cmd": "x", "env": { "": "b" } })),
        ("env.é", json!({ "cmd": "x", "env": { "é": "b" } })),
        ("env.A", json!({ "cmd": "x", "env": { "A": 1 } })),
        ("env.A", json!({ "cmd": "x", "env": { "A": null } })),
        ("env.A", json!({ "cmd": "x", "env": { "A": "b\0" } })),
        ("env.A", json!({ "cmd": "x", "env": { "A": "x".repeat(32_768) } })),
        ("timeoutMs", json!({ "cmd": "x", "timeoutMs": 0 })),
        ("timeoutMs", json!({ "cmd": "x", "timeoutMs": -1 })),
        ("timeoutMs", json!({ "cmd": "x", "timeoutMs": 1.5 })),
        ("timeoutMs", json!({ "cmd": "x", "timeoutMs": "100" })),
        ("timeoutMs", json!({ "cmd": "x", "timeoutMs": null })),
        ("timeoutMs", json!({ "cmd": "x", "timeoutMs": 3_600_001 })),
        ("timeoutMs", json!({ "cmd": "x", "timeoutMs": u64::MAX })),
        ("timeout", json!({ "cmd": "x", "timeout": 1 })),
    ] {
        let reply = exec(&server, &vm, &bad).await?;
        reply.refused(400, "invalid_parameter");
        assert_eq!(reply.json()["details"]["fields"][0]["field"], field, "{}", reply.text);
    }
    assert_eq!(server.fake.commands(), 0);
    Ok(())
}

#[tokio::test]
async fn the_longest_timeout_is_the_configurations() -> Result<()> {
    let server = Server::start_with(&[("exec.max_timeout_ms", "2000")]).await?;
    let vm = server.vm().await?;
    let message =
        exec(&server, &vm, &json!({ "cmd": "x", "timeoutMs": 2001 })).await?.refused(400, "invalid_parameter");
    assert!(message.contains("from 1 to 2000"), "{message}");
    exec(&server, &vm, &json!({ "cmd": "x", "timeoutMs": 2000 })).await?.ok(200);
    exec(&server, &vm, &json!({ "cmd": "x" })).await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn a_command_needs_a_running_vm() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.act(&format!("{vm}/pause")).await?.ok(204);
    let message = exec(&server, &vm, &json!({ "cmd": "x" })).await?.refused(409, "wrong_state");
    assert!(message.contains("PAUSED"), "{message}");
    server.act(&format!("{vm}/stop")).await?.ok(204);
    let message = exec(&server, &vm, &json!({ "cmd": "x" })).await?.refused(409, "wrong_state");
    assert!(message.contains("STOPPED"), "{message}");
    Ok(())
}

#[tokio::test]
async fn output_streams_as_events_and_ends_with_the_exit() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let script = Script {
        stdout: vec!["one\n".into(), vec![b'a', 0xe2, 0x82], vec![0xac]],
        stderr: vec!["bad\n".into()],
        exit_code: 3,
        ..Script::default()
    };
    server.fake.script("script", script);
    let events = events(&server, &vm, &json!({ "cmd": "script" })).await?;
    let said = |name: &str| -> String {
        events.iter().filter(|(event, _)| event == name).map(|(_, data)| data["data"].as_str().unwrap()).collect()
    };
    assert_eq!((said("stdout").as_str(), said("stderr").as_str()), ("one\na€", "bad\n"));
    assert_eq!(events.last().unwrap(), &("exit".to_owned(), json!({ "exitCode": 3 })));
    Ok(())
}

#[tokio::test]
async fn a_streamed_command_tells_of_its_time_limit_and_of_cuts() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let script = Script { stdout: vec![vec![b'y'; 2 << 20]], delay: Duration::from_secs(60), ..Script::default() };
    server.fake.script("yes", script);
    let events = events(&server, &vm, &json!({ "cmd": "yes", "timeoutMs": 300 })).await?;
    let bytes: usize =
        events.iter().filter(|(name, _)| name == "stdout").map(|(_, data)| data["data"].as_str().unwrap().len()).sum();
    assert_eq!(bytes, 1 << 20);
    assert_eq!(events.last().unwrap().1, json!({ "exitCode": -1, "timedOut": true, "truncated": true }));
    Ok(())
}

#[tokio::test]
async fn what_fails_before_any_output_is_an_ordinary_error_for_a_stream_too() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let request = server.request(Method::POST, &format!("{vm}/exec")).header("Accept", "text/event-stream");
    send(request.json(&json!({ "cmd": "x", "cwd": "/missing" }))).await?.refused(400, "invalid_parameter");
    Ok(())
}

#[tokio::test]
async fn a_client_that_hangs_up_kills_its_command_streamed_or_not() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let body = json!({ "cmd": "sleep 60", "timeoutMs": 60_000 });
    let plain = server.request(Method::POST, &format!("{vm}/exec")).json(&body);
    tokio::select! {
        _ = send(plain) => panic!("it runs for a minute"),
        begun = until("it runs", async || Ok(server.fake.commands() == 1)) => begun?,
    }
    until("the command is gone", async || Ok(server.fake.commands() == 0)).await?;

    server
        .fake
        .script("talk", Script { stdout: vec!["hi".into()], delay: Duration::from_secs(60), ..Script::default() });
    let request = server.request(Method::POST, &format!("{vm}/exec")).header("Accept", "text/event-stream");
    let response = request.json(&json!({ "cmd": "talk", "timeoutMs": 60_000 })).send().await?;
    let mut stream = response.bytes_stream();
    stream.next().await.expect("a first event")?;
    assert_eq!(server.fake.commands(), 1);
    drop(stream);
    until("the command is gone", async || Ok(server.fake.commands() == 0)).await
}

#[tokio::test]
async fn a_vm_that_ends_under_a_command_is_a_conflict_with_the_reason() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let path = format!("{vm}/exec");
    let body = json!({ "cmd": "sleep 60", "timeoutMs": 60_000 });
    let run = server.post(&path, &body);
    let kill = async {
        until("the command runs", async || Ok(server.fake.commands() == 1)).await?;
        let message = "It used more memory than its 128 MiB.".into();
        server.fake.kill(&id_of(&vm), EndReport { reason: EndReason::Oom, message, exit_code: None });
        anyhow::Ok(())
    };
    let (reply, killed) = tokio::join!(run, kill);
    killed?;
    let message = reply?.refused(409, "vm_ended");
    assert!(message.contains("128 MiB"), "{message}");
    assert_eq!(server.state(&vm).await?, "ERROR");
    Ok(())
}

#[tokio::test]
async fn an_agent_that_hangs_up_or_never_answers_is_an_error_in_time() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    server.fake.script("hang up", Script { hang_up: true, ..Script::default() });
    exec(&server, &vm, &json!({ "cmd": "hang up" })).await?.refused(502, "agent_failed");
    server.fake.script("silent", Script { silent: true, ..Script::default() });
    let began = Instant::now();
    exec(&server, &vm, &json!({ "cmd": "silent", "timeoutMs": 100 })).await?.refused(504, "agent_timeout");
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(server.state(&vm).await?, "RUNNING");
    Ok(())
}

#[tokio::test]
async fn commands_at_once_in_one_vm_are_bounded() -> Result<()> {
    let server = Server::start_with(&[("exec.max_concurrent", "2")]).await?;
    let vm = server.vm().await?;
    let body = json!({ "cmd": "sleep 1", "timeoutMs": 5000 });
    let replies = join_all((0..5).map(|_| exec(&server, &vm, &body))).await;
    let mut counts = [0, 0];
    for reply in replies {
        let reply = reply?;
        if reply.status == 200 {
            counts[0] += 1;
        } else {
            reply.refused(429, "too_many");
            assert!(reply.headers.contains_key("retry-after"));
            counts[1] += 1;
        }
    }
    assert_eq!(counts, [2, 3]);
    exec(&server, &vm, &json!({ "cmd": "echo again" })).await?.ok(200);
    Ok(())
}
