//! Scripts, files and terminals through the whole program with real VMs: what the documentation promises, hostile
//! archives, a server that is killed in the middle, bounded memory.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/server.rs"]
mod server;

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    time::Duration,
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use futures_util::{SinkExt, StreamExt, stream};
use harness::{eventually, on_both_engines};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::Site;
use tar::EntryType;
use tiffin_types::{id::VmId, vm::EngineName};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest},
};

const PATIENCE: Duration = Duration::from_secs(60);

on_both_engines!(
    the_examples_of_the_api_give_the_documented_answers,
    hostile_archives_are_refused_with_nothing_written,
    ten_mebibytes_go_in_and_come_out_unchanged_and_more_are_refused,
    a_server_killed_during_an_upload_leaves_nothing_half_written,
    a_terminal_is_one,
);

fn request(site: &Site, method: Method, path: &str) -> RequestBuilder {
    let client = reqwest::Client::new().request(method, format!("{}{path}", site.url()));
    client.header("X-API-Key", site.key()).timeout(PATIENCE)
}

async fn upload(site: &Site, id: &VmId, dest: &str, archive: Vec<u8>) -> (u16, Value) {
    let request = request(site, Method::POST, &format!("/v1/vms/{id}/files/upload")).query(&[("dest", dest)]);
    let answer = request.header("Content-Type", "application/gzip").body(archive).send().await.unwrap();
    (answer.status().as_u16(), serde_json::from_str(&answer.text().await.unwrap()).unwrap_or_default())
}

async fn download(site: &Site, id: &VmId, path: &str) -> Vec<u8> {
    let request = request(site, Method::GET, &format!("/v1/vms/{id}/files/download")).query(&[("path", path)]);
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.bytes().await.unwrap().to_vec()
}

/// A tar.gz of entries: type, name, content (a link's target).
fn archive(entries: &[(EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (kind, name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        // Not by the builder, which refuses names that a hostile client would send.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        let is_link = kind.is_symlink() || kind.is_hard_link();
        let content = if is_link {
            header.set_link_name_literal(content).unwrap();
            &[]
        } else {
            *content
        };
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, content).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn unpacked(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    let entries = tar.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        (name.trim_start_matches("./").trim_end_matches('/').to_owned(), bytes)
    });
    entries.filter(|(name, _)| !name.is_empty()).collect()
}

/// Bytes that don't compress.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

async fn the_examples_of_the_api_give_the_documented_answers(engine: EngineName) {
    let site = Site::start_with(engine, &[]).await;
    let id = site.ask("POST", "/v1/vms", Some(json!({ "cpu": 1, "memMb": 512, "allowIps": [] }))).await.id();
    let post = async |what: &str, body: Value| {
        let answer = site.ask("POST", &format!("/v1/vms/{id}/{what}"), Some(body)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    };
    let done = post("exec", json!({ "cmd": "echo hello && id -u", "timeoutMs": 30_000 })).await;
    assert_eq!(done, json!({ "exitCode": 0, "stdout": "hello\n1000\n", "stderr": "" }));

    let done = post("run-ts", json!({ "code": "console.log(2 + 2)" })).await;
    assert_eq!((&done["exitCode"], &done["stdout"]), (&json!(0), &json!("4\n")), "{done}");
    let done = post(
        "run-ts",
        json!({ "env": ["API_TOKEN=secret123", "BASE_URL=https://api.example.com"],
        "code": "console.log(Deno.env.get(\"BASE_URL\"))" }),
    )
    .await;
    assert_eq!(done["stdout"], "https://api.example.com\n", "{done}");
    let done = post("run-ts", json!({ "code": "result.set({ ok: true, answer: 42 })" })).await;
    assert_eq!(done, json!({ "exitCode": 0, "stdout": "", "stderr": "", "result": { "ok": true, "answer": 42 } }));
    let done = post(
        "run-js",
        json!({ "code": "result.set([1, null, \"x\"]); console.log(process.argv.slice(2).join())",
        "args": ["a b", "c"] }),
    )
    .await;
    assert_eq!(done, json!({ "exitCode": 0, "stdout": "a b,c\n", "stderr": "", "result": [1, null, "x"] }));
    let done = post("run-ts", json!({ "code": "throw new Error(\"boom\")" })).await;
    assert!(done["exitCode"] == 1 && done["error"].to_string().contains("boom"), "{done}");
    let done =
        post("run-ts", json!({ "code": "await new Promise(() => setInterval(() => {}, 1000))", "timeoutMs": 3000 }))
            .await;
    assert_eq!((&done["exitCode"], &done["timedOut"]), (&json!(-1), &json!(true)), "{done}");
    let done = post("run-ts", json!({ "code": "console.log(Deno.readTextFileSync(\"/etc/hostname\"))" })).await;
    assert_ne!(done["exitCode"], 0, "{done}");
    let done = post(
        "run-ts",
        json!({ "code": "result.set(Number(Deno.args[0]) + 1)", "args": ["1"],
        "denoFlags": ["--no-check", "--v8-flags=--max-old-space-size=64"] }),
    )
    .await;
    assert_eq!(done["result"], 2, "{done}");

    let hello = archive(&[(EntryType::Regular, "./hello.txt", b"hello world\n")]);
    assert_eq!(upload(&site, &id, "/workspace/project", hello).await.0, 204);
    let seen = site.sh(&id, "cat /workspace/project/hello.txt; stat -c '%u %g' /workspace/project/hello.txt").await;
    assert_eq!(seen, "hello world\n1000 1000\n");
    let packed = unpacked(&download(&site, &id, "/workspace/project").await);
    assert!(packed.iter().any(|(name, bytes)| name.ends_with("hello.txt") && bytes == b"hello world\n"), "{packed:?}");
    let listed = site.ask("GET", &format!("/v1/vms/{id}/files?path=/workspace/project"), None).await;
    assert_eq!((&listed.body[0]["name"], &listed.body[0]["size"]), (&json!("hello.txt"), &json!(12)), "{listed:?}");

    let main = "export {}; result.set(Deno.readTextFileSync(\"/workspace/project/hello.txt\"))";
    let put = request(&site, Method::PUT, &format!("/v1/vms/{id}/files/content?path=/workspace/src/main.ts"));
    let put = put.header("Content-Type", "application/octet-stream").body(main).send().await.unwrap();
    assert_eq!(put.status(), 204);
    let done = post("run-ts", json!({ "path": "/workspace/src/main.ts" })).await;
    assert_eq!(done["result"], "hello world\n", "{done}");
    for (path, status, code) in [
        ("content?path=/workspace/none", 404, "file_not_found"),
        ("content?path=/workspace/src", 400, "invalid_parameter"),
        ("download?path=/workspace/none", 404, "file_not_found"),
    ] {
        let answer = site.ask("GET", &format!("/v1/vms/{id}/files/{path}"), None).await;
        assert_eq!((answer.status, &answer.body["code"]), (status, &json!(code)), "{path}: {answer:?}");
    }
    site.sh(&id, "ln -s /etc/passwd /workspace/link").await;
    let answer = site.ask("GET", &format!("/v1/vms/{id}/files/content?path=/workspace/link"), None).await;
    assert_eq!(answer.status, 400, "what a link leads to outside isn't read: {answer:?}");
}

async fn hostile_archives_are_refused_with_nothing_written(engine: EngineName) {
    let site = Site::start_with(engine, &["files.unpacked_bytes=33554432", "files.entries=100"]).await;
    let id = site.create().await;
    let everything = "find /workspace /tmp /home/user | sort; ls -la /etc | sha256sum";
    site.sh(&id, "ln -s /tmp /workspace/out").await;
    let before = site.sh(&id, everything).await;
    let ok: (EntryType, &str, &[u8]) = (EntryType::Regular, "ok", b"x");
    let many: Vec<String> = (0..101).map(|n| format!("f{n}")).collect();
    let many: Vec<(EntryType, &str, &[u8])> =
        many.iter().map(|name| (EntryType::Regular, name.as_str(), &b"x"[..])).collect();
    let whole = archive(&[ok, (EntryType::Regular, "noise", &noise(100_000))]);
    for (what, bad, status) in [
        ("dots", archive(&[ok, (EntryType::Regular, "../evil", b"x")]), 400),
        ("absolute", archive(&[ok, (EntryType::Regular, "/tmp/evil", b"x")]), 400),
        ("symlink", archive(&[ok, (EntryType::Symlink, "link", b"/etc")]), 400),
        (
            "through a symlink",
            archive(&[ok, (EntryType::Symlink, "l", b"/tmp"), (EntryType::Regular, "l/evil", b"x")]),
            400,
        ),
        ("hard link", archive(&[ok, (EntryType::Link, "link", b"/etc/passwd")]), 400),
        ("fifo", archive(&[ok, (EntryType::Fifo, "fifo", b"")]), 400),
        ("device", archive(&[ok, (EntryType::Char, "null", b"")]), 400),
        ("no archive", noise(10_000), 400),
        ("cut short", whole[..50_000].to_vec(), 400),
        ("bomb", archive(&[ok, (EntryType::Regular, "zeros", &vec![0; 40 << 20])]), 413),
        ("many", archive(&many), 413),
    ] {
        let (got, body) = upload(&site, &id, "/workspace/new", bad).await;
        assert_eq!(got, status, "{what}: {body}");
        assert_eq!(site.sh(&id, everything).await, before, "{what}");
    }
    let (status, body) = upload(&site, &id, "/workspace/out/x", archive(&[ok])).await;
    assert_eq!((status, &body["code"]), (400, &json!("invalid_parameter")), "a folder behind a link out: {body}");
    assert_eq!(site.sh(&id, everything).await, before);
}

async fn ten_mebibytes_go_in_and_come_out_unchanged_and_more_are_refused(engine: EngineName) {
    let site = Site::start_with(engine, &[]).await;
    let id = site.create().await;
    let noise = noise(9_900_000);
    let archive = archive(&[(EntryType::Regular, "noise", &noise)]);
    assert!((10_000_000..=10 << 20).contains(&archive.len()), "{}", archive.len());
    assert_eq!(upload(&site, &id, "/workspace/big", archive).await.0, 204);
    let packed = unpacked(&download(&site, &id, "/workspace/big").await);
    assert!(packed.iter().any(|(name, bytes)| name.ends_with("noise") && *bytes == noise));
    let (status, body) = upload(&site, &id, "/workspace/big", vec![0; (10 << 20) + 1]).await;
    assert_eq!((status, &body["code"]), (413, &json!("too_large")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_download_takes_no_memory_of_the_server() {
    let site = Site::start(&[]).await;
    let vm = json!({ "cpu": 1, "memMb": 256, "allowIps": [], "diskSizeMb": 512 });
    let id = site.ask("POST", "/v1/vms", Some(vm)).await.id();
    site.sh(&id, "head -c 200M /dev/zero > /workspace/zeros").await;
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", site.server_pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = resident();
    let path = format!("/v1/vms/{id}/files/content?path=/workspace/zeros");
    let mut body = request(&site, Method::GET, &path).send().await.unwrap().bytes_stream();
    let (mut seen, mut most) = (0, before);
    while let Some(bytes) = body.next().await {
        seen += bytes.unwrap().len();
        most = most.max(resident());
    }
    assert_eq!(seen, 200 << 20);
    assert!(most < before + 64 * 1024, "{before} kB before, {most} kB at most");
}

async fn a_server_killed_during_an_upload_leaves_nothing_half_written(engine: EngineName) {
    let mut site = Site::start_with(engine, &[]).await;
    let id = site.create().await;
    for (method, path, kind) in [
        (Method::POST, format!("/v1/vms/{id}/files/upload?dest=/workspace/new"), "application/gzip"),
        (Method::PUT, format!("/v1/vms/{id}/files/content?path=/workspace/new/file"), "application/octet-stream"),
    ] {
        let whole = archive(&[(EntryType::Regular, "ok", b"x"), (EntryType::Regular, "noise", &noise(3 << 20))]);
        let first = whole[..2 << 20].to_vec();
        let never = stream::iter([Ok::<_, std::io::Error>(first)]).chain(stream::pending());
        let request = request(&site, method, &path).header("Content-Type", kind);
        let upload = tokio::spawn(request.body(reqwest::Body::wrap_stream(never)).send());
        eventually("the guest has some of it", async || {
            let size =
                site.exec(&id, "du -sb /workspace | cut -f1").await.body["stdout"].as_str().unwrap_or("").to_owned();
            size.trim().parse::<u64>().is_ok_and(|bytes| bytes > 100_000) || upload.is_finished()
        })
        .await;
        site.kill().await;
        assert!(upload.await.unwrap().is_err());
        site.serve(None).await;
        eventually("nothing is left of it", async || {
            site.exec(&id, "find /workspace -mindepth 1").await.body["stdout"] == ""
        })
        .await;
    }
    assert_eq!(upload(&site, &id, "/workspace/new", archive(&[(EntryType::Regular, "ok", b"x")])).await.0, 204);
}

/// A client of a terminal.
struct Client(WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>, Vec<u8>);

impl Client {
    async fn open(site: &Site, id: &VmId, query: &str) -> Self {
        let url = format!("{}/v1/vms/{id}/terminal{query}", site.url().replace("http://", "ws://"));
        let mut request = url.into_client_request().unwrap();
        request.headers_mut().insert("x-api-key", site.key().parse().unwrap());
        Self(connect_async(request).await.unwrap().0, Vec::new())
    }

    async fn types(&mut self, text: &str) {
        self.0.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
    }

    /// Waits until the terminal has shown that text, and forgets all up to then.
    async fn shows(&mut self, text: &str) {
        loop {
            let seen = String::from_utf8_lossy(&self.1).into_owned();
            if let Some(at) = seen.find(text) {
                self.1 = seen.as_bytes()[at + text.len()..].to_vec();
                return;
            }
            match tokio::time::timeout(PATIENCE, self.0.next()).await {
                Ok(Some(Ok(Message::Binary(bytes)))) => self.1.extend(bytes),
                Ok(Some(Ok(Message::Ping(_)))) => {}
                other => panic!("{other:?} instead of {text:?} after {seen:?}"),
            }
        }
    }

    async fn end(&mut self) -> (Value, u16) {
        let mut said = Value::Null;
        loop {
            match tokio::time::timeout(PATIENCE, self.0.next()).await {
                Ok(Some(Ok(Message::Text(text)))) => said = serde_json::from_str(&text).unwrap(),
                Ok(Some(Ok(Message::Close(frame)))) => return (said, frame.unwrap().code.into()),
                Ok(Some(Ok(_))) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

async fn a_terminal_is_one(engine: EngineName) {
    let site = Site::start_with(engine, &[]).await;
    let id = site.create().await;
    let mut client = Client::open(&site, &id, "?cols=100&rows=30").await;
    // The answer is not in what is echoed of the question.
    client.types("echo size $(stty size); echo me $(id -un) $((6 * 7))\r").await;
    client.shows("size 30 100").await;
    client.shows("me user 42").await;
    client.0.send(Message::text(r#"{"resize":{"cols":132,"rows":50}}"#)).await.unwrap();
    eventually("the size has changed", async || {
        client.types("echo size $(stty size) end\r").await;
        client.shows("size 5").await;
        true
    })
    .await;
    client.types("stty -echo; echo on$((1))ce; sleep 1000; echo st$((0))pped $?\r").await;
    client.shows("on1ce").await;
    // Between the shell's fork and the program's start a ^C is nobody's.
    eventually("it sleeps", async || site.exec(&id, "pgrep -f '[s]leep 1000'").await.body["exitCode"] == 0).await;
    client.types("\u{3}").await;
    client.types("echo inte$((1))rrupted\r").await;
    client.shows("inte1rrupted").await;
    client.types("exit 7\r").await;
    assert_eq!(client.end().await, (json!({ "exit": { "exitCode": 7 } }), 1000));

    let mut client = Client::open(&site, &id, "?cmd=test%20-t%200%20%26%26%20exit%203").await;
    assert_eq!(client.end().await, (json!({ "exit": { "exitCode": 3 } }), 1000));

    let mut client = Client::open(&site, &id, "?cmd=sleep%204444").await;
    eventually("it runs", async || site.exec(&id, "pgrep -f '[s]leep 4444'").await.body["exitCode"] == 0).await;
    client.0.close(None).await.unwrap();
    eventually("it is over", async || site.exec(&id, "pgrep -f '[s]leep 4444'").await.body["exitCode"] == 1).await;

    let mut client = Client::open(&site, &id, "").await;
    client.types("echo he$((1))re\r").await;
    client.shows("he1re").await;
    site.delete(&id).await;
    assert_eq!(client.end().await, (Value::Null, 4000));
}

/// `tiffin` against the site's server.
fn tiffin(site: &Site, args: &[&str], input: &str) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiffin"));
    command.args(args).env("TIFFIN_URL", site.url()).env("TIFFIN_API_KEY", site.key());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_copies_runs_and_opens_terminals() {
    let site = Site::start(&[]).await;
    let id = site.ask("POST", "/v1/vms", Some(json!({ "cpu": 1, "memMb": 512, "allowIps": [] }))).await.id();
    let vm = id.to_string();
    let run = |args: &[&str], input: &str| {
        let out = tiffin(&site, args, input);
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let dir = tempfile::tempdir().unwrap();
    let here = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let there = |name: &str| format!("{vm}:{name}");
    let quiet = (Some(0), String::new(), String::new());

    std::fs::write(here("main.ts"), "console.log(Deno.args[0]); result.set({ ok: true });").unwrap();
    let out = run(&["vm", "run", &vm, &here("main.ts"), "--", "hi"], "");
    assert_eq!((out.0, out.1.as_str()), (Some(0), "hi\n{\"ok\":true}\n"), "{out:?}");
    let out = run(&["vm", "run", &vm, "-", "--js", "--env", "A=5"], "process.exit(Number(process.env.A))");
    assert_eq!(out.0, Some(5), "{out:?}");

    assert_eq!(run(&["vm", "cp", &here("main.ts"), &there("sub/")], ""), quiet);
    assert_eq!(run(&["vm", "cp", "-", &there("typed")], "typed in"), quiet);
    assert_eq!(run(&["vm", "cp", &there("typed"), "-"], ""), (Some(0), "typed in".into(), String::new()));
    assert_eq!(run(&["vm", "cp", &there("sub/main.ts"), &here("back.ts")], ""), quiet);
    assert_eq!(std::fs::read(here("back.ts")).unwrap(), std::fs::read(here("main.ts")).unwrap());
    assert_eq!(run(&["vm", "cp", "-r", dir.path().to_str().unwrap(), &there("folder")], ""), quiet);
    assert_eq!(run(&["vm", "cp", "-r", &there("folder"), &here("copy")], ""), quiet);
    assert_eq!(std::fs::read(here("copy/back.ts")).unwrap(), std::fs::read(here("main.ts")).unwrap());
    let out = run(&["vm", "files", &vm, "folder"], "");
    assert!(out.1.contains("back.ts") && out.1.contains("main.ts"), "{out:?}");
    let out = run(&["vm", "cp", &there("nothing"), &here("nothing")], "");
    assert!(out.0 == Some(1) && out.2.contains("file_not_found") && !dir.path().join("nothing").exists(), "{out:?}");
    site.sh(&id, "mkdir /workspace/odd && ln -s /etc/passwd /workspace/odd/link").await;
    let out = run(&["vm", "cp", "-r", &there("odd"), &here("odd")], "");
    assert!(out.0 == Some(1) && !dir.path().join("odd").exists(), "a guest's link is not made here: {out:?}");

    let out = run(&["vm", "shell", &vm], "echo in $((40 + 2)); exit 4\n");
    assert!(out.0 == Some(4) && out.1.contains("in 42"), "{out:?}");
    let out = run(&["vm", "shell", &vm, "--", "cat; echo over"], "half a line");
    assert!(out.0 == Some(0) && out.1.contains("half a line") && out.1.contains("over"), "{out:?}");
    let out = run(&["vm", "shell", "vm-00000000000000"], "");
    assert!(out.0 == Some(125) && out.2.contains("VM not found"), "{out:?}");
}
