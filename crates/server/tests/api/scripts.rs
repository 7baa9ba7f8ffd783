//! `POST /v1/vms/{id}/run-ts` and `/run-js`

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::fake::Script;
use tiffin_protocol::{Runtime, Source};

use crate::harness::{Reply, Server, send};

async fn run(server: &Server, vm: &str, runtime: &str, body: &Value) -> Result<Reply> {
    server.post(&format!("{vm}/run-{runtime}"), body).await
}

#[tokio::test]
async fn a_script_answers_as_a_command_does_with_what_it_said_of_itself() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let done = run(&server, &vm, "ts", &json!({ "code": "console.log(4)" })).await?.ok(200);
    assert_eq!(done, json!({ "exitCode": 0, "stdout": "4\n", "stderr": "" }));
    for (given, result) in [
        ("{\"ok\":true,\"answer\":42}", json!({ "ok": true, "answer": 42 })),
        ("null", json!(null)),
        ("[1,2.5]", json!([1, 2.5])),
    ] {
        let done = run(&server, &vm, "js", &json!({ "code": format!("result.set({given})") })).await?.ok(200);
        assert_eq!(done, json!({ "exitCode": 0, "stdout": "", "stderr": "", "result": result }));
    }
    let done = run(&server, &vm, "ts", &json!({ "code": "result.error(\"no\")" })).await?.ok(200);
    assert_eq!(done, json!({ "exitCode": 1, "stdout": "", "stderr": "", "error": "no" }));
    let done = server.fake.last_script().context("a script ran")?;
    assert_eq!((done.uid, done.gid, done.timeout_ms, done.result_cap), (1000, 1000, 30_000, 1 << 20));
    Ok(())
}

#[tokio::test]
async fn the_guest_is_asked_for_exactly_what_the_request_says() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let body = json!({ "path": "//workspace/./a/main.ts", "args": ["-A", "b c", ""], "env": ["A=b=c", "B="],
        "denoFlags": ["--no-check", "--seed=5"], "timeoutMs": 7 });
    run(&server, &vm, "ts", &body).await?.ok(200);
    let asked = server.fake.last_script().context("a script ran")?;
    assert_eq!(asked.runtime, Runtime::Deno);
    assert_eq!(asked.source, Source::Path("/workspace/a/main.ts".into()));
    assert_eq!(asked.args, ["-A", "b c", ""]);
    assert_eq!(asked.env.into_iter().collect::<Vec<_>>(), [("A".into(), "b=c".into()), ("B".into(), "".into())]);
    assert_eq!((asked.flags, asked.timeout_ms), (vec!["--no-check".to_owned(), "--seed=5".to_owned()], 7));
    assert!(!asked.network, "the VM may reach nothing");

    let open = json!({ "cpu": 1, "memMb": 128, "outboundInternet": true, "allowIps": ["198.51.100.0/24"] });
    let open = server.post("/v1/vms", &open).await?.ok(201);
    let open = format!("/v1/vms/{}", open["id"].as_str().context("an id")?);
    run(&server, &open, "js", &json!({ "code": "1" })).await?.ok(200);
    let asked = server.fake.last_script().context("a script ran")?;
    assert_eq!((asked.runtime, asked.source, asked.network), (Runtime::Node, Source::Inline, true));
    Ok(())
}

#[tokio::test]
async fn every_bad_value_of_every_field_is_a_400_that_names_it() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let many = vec!["x"; 257];
    let heavy: Vec<String> = (0..9).map(|n| format!("V{n}={}", "x".repeat(32_000))).collect();
    for (field, bad) in [
        ("code", json!({})),
        ("code", json!({ "code": "" })),
        ("code", json!({ "code": 1 })),
        ("path", json!({ "code": "1", "path": "/workspace/a.ts" })),
        ("path", json!({ "path": null })),
        ("path", json!({ "path": "a.ts" })),
        ("path", json!({ "path": "/etc/a.ts" })),
        ("path", json!({ "path": "/workspace/../etc/a.ts" })),
        ("path", json!({ "path": "/workspace/a.py" })),
        ("path", json!({ "path": "/workspace/ts" })),
        ("args", json!({ "code": "1", "args": "x" })),
        ("args", json!({ "code": "1", "args": many })),
        ("args[1]", json!({ "code": "1", "args": ["x", 1] })),
        ("args[0]", json!({ "code": "1", "args": ["a\0"] })),
        ("args", json!({ "code": "1", "args": ["x".repeat(131_073)] })),
        ("env", json!({ "code": "1", "env": { "A": "b" } })),
        ("env", json!({ "code": "1", "env": many })),
        ("env[1]", json!({ "code": "1", "env": ["A=b", "B"] })),
        ("env[0]", json!({ "code": "1", "env": ["1A=b"] })),
        ("env[0]", json!({ "code": "1", "env": ["=b"] })),
        ("env[0]", json!({ "code": "1", "env": ["A-B=b"] })),
        ("env[0]", json!({ "code": "1", "env": ["A=b\0"] })),
        ("env", json!({ "code": "1", "env": ["A=b", "A=c"] })),
        ("env", json!({ "code": "1", "env": heavy })),
        ("denoFlags", json!({ "code": "1", "denoFlags": "--no-check" })),
        ("denoFlags[1]", json!({ "code": "1", "denoFlags": ["--no-check", "-A"] })),
        ("denoFlags[0]", json!({ "code": "1", "denoFlags": ["--allow-all"] })),
        ("denoFlags[0]", json!({ "code": "1", "denoFlags": ["--inspect=0.0.0.0:1"] })),
        ("denoFlags[0]", json!({ "code": "1", "denoFlags": ["--seed"] })),
        ("timeoutMs", json!({ "code": "1", "timeoutMs": 0 })),
        ("cwd", json!({ "code": "1", "cwd": "/workspace" })),
    ] {
        let reply = run(&server, &vm, "ts", &bad).await?;
        reply.refused(400, "invalid_parameter");
        assert_eq!(reply.json()["details"]["fields"][0]["field"], field, "{}", reply.text);
    }
    for (field, bad) in
        [("denoFlags", json!({ "code": "1", "denoFlags": [] })), ("path", json!({ "path": "/workspace/a.ts" }))]
    {
        let reply = run(&server, &vm, "js", &bad).await?;
        reply.refused(400, "invalid_parameter");
        assert_eq!(reply.json()["details"]["fields"][0]["field"], field, "{}", reply.text);
    }
    assert!(server.fake.last_script().is_none(), "nothing ran");
    Ok(())
}

#[tokio::test]
async fn what_a_guest_says_of_its_script_is_read_with_care() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let deep = [vec![b'['; 5000], vec![b']'; 5000]].concat();
    for broken in [b"nonsense".to_vec(), vec![0xff; 100], [b"{\"result\":".to_vec(), deep, b"}".to_vec()].concat()] {
        server.fake.script("odd", Script { result: broken, ..Script::default() });
        let done = run(&server, &vm, "ts", &json!({ "code": "odd" })).await?.ok(200);
        assert!(done["error"].as_str().is_some_and(|error| error.contains("can't be read")), "{done}");
        assert!(done.get("result").is_none() && done["exitCode"] == 0, "{done}");
    }
    server.fake.script("big", Script { result: vec![b' '; (1 << 20) + 1], ..Script::default() });
    run(&server, &vm, "ts", &json!({ "code": "big" })).await?.refused(502, "agent_failed");
    Ok(())
}

#[tokio::test]
async fn a_scripts_output_streams_and_its_result_comes_last() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let script = Script { stdout: vec![b"out".to_vec()], result: b"{\"result\":[1]}".to_vec(), ..Script::default() };
    server.fake.script("say", script);
    let request = server.request(Method::POST, &format!("{vm}/run-ts")).header("Accept", "text/event-stream");
    let reply = send(request.json(&json!({ "code": "say" }))).await?;
    let events: Vec<&str> = reply.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(events, ["{\"data\":\"out\"}", "{\"exitCode\":0,\"result\":[1]}"]);
    Ok(())
}

#[tokio::test]
async fn a_script_needs_a_running_vm_of_ones_own_and_the_scope_write() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let (path, body) = (format!("{vm}/run-ts"), json!({ "code": "1" }));
    let stranger = server.other_key("other", &["write"]).await?;
    server.post_as(&stranger, &path, &body).await?.refused(404, "not_found");
    let reader = server.other_key("reader", &["read"]).await?;
    server.post_as(&reader, &path, &body).await?.refused(403, "forbidden");
    server.act(&format!("{vm}/stop")).await?.ok(204);
    let message = server.post(&path, &body).await?.refused(409, "wrong_state");
    assert!(message.contains("STOPPED"), "{message}");
    Ok(())
}

#[tokio::test]
async fn a_large_program_arrives_whole() -> Result<()> {
    let server = Server::start_with(&[("limits.body_bytes", "2097152")]).await?;
    let vm = server.vm().await?;
    let code = format!("console.log({})", "x".repeat(900_000));
    let done = run(&server, &vm, "js", &json!({ "code": code })).await?.ok(200);
    assert_eq!(done["stdout"].as_str().map(str::len), Some(900_001));
    run(&server, &vm, "js", &json!({ "code": "x".repeat(1_048_577) })).await?.refused(400, "invalid_parameter");
    Ok(())
}
