//! VMs that run their image's program, in the second dialect.

use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::{Engine, Observed, fake::FakeProgram};
use tiffin_store::{Change, NewImage};
use tiffin_types::{
    id::{Digest, VmId},
    vm::{VmEvent, VmState},
};

use crate::harness::{Server, send, until};

/// No boot is over within a test.
const NEVER: Duration = Duration::from_secs(3600);

/// An image whose program is `serve`.
async fn image(server: &Server) -> Result<String> {
    image_with(server, json!({ "Entrypoint": ["serve"], "Env": ["A=image", "B=image"], "User": "www" })).await
}

async fn image_with(server: &Server, config: Value) -> Result<String> {
    let new = NewImage {
        account_id: None,
        name: "web".into(),
        description: String::new(),
        digest: Some(Digest::from_sha256([9; 32])),
        size_bytes: 1000,
        rootfs_bytes: 2000,
        config,
    };
    Ok(server.store.image_insert(new).await?.id.to_string())
}

fn vm_id(vm: &Value) -> VmId {
    format!("vm-{}", vm["id"].as_str().expect("an id")).parse().expect("14 hexadecimal digits")
}

fn path(vm: &Value) -> String {
    format!("/v1/vm/{}", vm["id"].as_str().expect("an id"))
}

fn cached(vm: &Value, action: &str) -> String {
    format!("/v1/vm/cached/{}/{action}", vm["id"].as_str().expect("an id"))
}

async fn start(server: &Server, more: Value) -> Result<Value> {
    make(server, "/v1/vm/start", more).await
}

async fn cache(server: &Server, more: Value) -> Result<Value> {
    make(server, "/v1/vm/cache", more).await
}

async fn make(server: &Server, path: &str, more: Value) -> Result<Value> {
    let mut body = json!({ "imageId": image(server).await? });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    Ok(server.post(path, &body).await?.ok(200))
}

async fn state(server: &Server, vm: &Value) -> Result<String> {
    Ok(server.get(&path(vm)).await?.ok(200)["state"].as_str().context("a state")?.to_owned())
}

async fn until_prepared(server: &Server, vm: &Value) -> Result<()> {
    until("it is prepared", async || Ok(server.fake.observe(&vm_id(vm)).await == Observed::Paused)).await
}

#[tokio::test]
async fn a_one_time_vm_runs_its_images_program_until_it_is_stopped_and_is_told_of_afterwards() -> Result<()> {
    let server = Server::start().await?;
    let env = json!({ "B": "hush-hush", "C": "c", "D": null });
    let vm = start(&server, json!({ "port": 8080, "envVars": env, "cpu": 2, "volumeGB": 3, "unknown": 1 })).await?;
    assert_eq!((&vm["state"], &vm["cpu"], &vm["memory"]), (&json!("started"), &json!(2), &json!(256)));
    assert_eq!((&vm["port"], &vm["volumeGB"]), (&json!(8080), &json!(3)));
    let hostname = vm["hostname"].as_str().context("a name")?;
    assert!(hostname.len() == 26 + ".vm.localhost".len() && hostname.ends_with(".vm.localhost"), "{hostname}");
    let spec = server.fake.spec(&vm_id(&vm)).context("it is there")?;
    assert_eq!(spec.size.disk_mb, 3 * 1024);
    assert!(spec.egress.allows("8.8.8.8".parse()?) && !spec.egress.allows("10.0.0.1".parse()?));
    let program = spec.program.context("it has a program")?;
    assert_eq!((&program.argv[..], program.user.as_str()), (&["serve".to_owned()][..], "www"));
    let env: Vec<_> = program.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(env, ["A=image", "B=hush-hush", "C=c"]);
    assert!(server.fake.program_runs(&vm_id(&vm)));
    assert!(!vm.to_string().contains("hush"), "{vm}");

    assert_eq!(server.get(&path(&vm)).await?.ok(200), vm);
    assert_eq!(server.act(&path(&vm)).await?.ok(200), vm);
    let other = server.get(&format!("/v1/vms/{}", vm_id(&vm))).await?.ok(200);
    assert_eq!((&other["state"], &other["memMb"]), (&json!("RUNNING"), &json!(256)));

    assert_eq!(server.act(&format!("{}/stop", path(&vm))).await?.ok(200), json!({}));
    let gone = server.get(&path(&vm)).await?.ok(200);
    assert_eq!((&gone["state"], &gone["end"]["reason"]), (&json!("destroyed"), &json!("requested")));
    assert_eq!(server.present().await?, []);
    server.act(&format!("{}/stop", path(&vm))).await?.refused(409, "wrong_state");
    server.get(&format!("/v1/vms/{}", vm_id(&vm))).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn a_program_that_ends_takes_its_one_time_vm_along_and_leaves_its_exit_code() -> Result<()> {
    let server = Server::start().await?;
    let vm = start(&server, json!({})).await?;
    server.fake.exit_program(&vm_id(&vm), 7);
    until("it is destroyed", async || Ok(state(&server, &vm).await? == "destroyed")).await?;
    let end = server.get(&path(&vm)).await?.ok(200)["end"].clone();
    assert_eq!((&end["reason"], &end["exitCode"]), (&json!("exited"), &json!(7)));
    until("nothing is left", async || Ok(server.present().await?.is_empty())).await
}

#[tokio::test]
async fn a_program_that_cannot_be_started_is_told_and_leaves_nothing() -> Result<()> {
    let server = Server::start().await?;
    let refused = Some(("there is no such file: serve".to_owned(), 127));
    server.fake.program("serve", FakeProgram { refused, ..FakeProgram::default() });
    let body = json!({ "imageId": image(&server).await? });
    let message = server.post("/v1/vm/start", &body).await?.refused(422, "program_failed");
    assert!(message.contains("no such file"), "{message}");
    assert_eq!(server.present().await?, []);
    // A cached one isn't tried before it is started, and stays.
    let vm = server.post("/v1/vm/cache", &body).await?.ok(200);
    server.act(&cached(&vm, "start")).await?.refused(422, "program_failed");
    let vm = server.get(&path(&vm)).await?.ok(200);
    assert_eq!((&vm["state"], &vm["end"]["exitCode"]), (&json!("stopped"), &json!(127)));
    Ok(())
}

#[tokio::test]
async fn an_image_without_a_program_is_refused() -> Result<()> {
    let server = Server::start().await?;
    let without = image_with(&server, json!({ "User": "1000:1000" })).await?;
    for path in ["/v1/vm/start", "/v1/vm/cache"] {
        let message = server.post(path, &json!({ "imageId": without })).await?.refused(422, "image_unusable");
        assert!(message.contains("entrypoint"), "{message}");
    }
    Ok(())
}

#[tokio::test]
async fn a_cached_vm_is_booted_ahead_and_starts_without_a_boot_again_and_again() -> Result<()> {
    let server = Server::start().await?;
    let vm = cache(&server, json!({ "diskSize": 2 })).await?;
    assert_eq!((&vm["state"], &vm["volumeGB"]), (&json!("stopped"), &json!(2)));
    let id = vm_id(&vm);
    for run in 0..2 {
        until_prepared(&server, &vm).await?;
        assert_eq!(state(&server, &vm).await?, "stopped");
        assert!(!server.fake.program_runs(&id), "nothing of the program has run");
        server.fake.set_start_delay(NEVER);
        assert_eq!(server.act(&cached(&vm, "start")).await?.ok(200), json!({}));
        server.fake.set_start_delay(Duration::ZERO);
        assert_eq!(state(&server, &vm).await?, "started");
        assert!(server.fake.program_runs(&id));
        server.act(&cached(&vm, "start")).await?.refused(409, "wrong_state");
        match run {
            0 => assert_eq!(server.act(&cached(&vm, "stop")).await?.ok(200), json!({})),
            _ => server.fake.exit_program(&id, 0),
        }
        until("it is stopped", async || Ok(state(&server, &vm).await? == "stopped")).await?;
    }
    assert_eq!(server.get(&path(&vm)).await?.ok(200)["end"]["exitCode"], 0);
    server.act(&cached(&vm, "destroy")).await?.ok(200);
    assert_eq!(state(&server, &vm).await?, "destroyed");
    until("nothing is left", async || Ok(server.present().await?.is_empty())).await?;
    server.act(&format!("{}/destroy", path(&vm))).await?.refused(409, "wrong_state");
    assert_eq!(server.fake.overlaps(), 0);
    Ok(())
}

#[tokio::test]
async fn a_cached_vm_that_could_not_be_prepared_boots_when_it_is_started() -> Result<()> {
    let server = Server::start_with(&[("services.prepared", "0")]).await?;
    let vm = cache(&server, json!({})).await?;
    assert_eq!(server.fake.observe(&vm_id(&vm)).await, Observed::Stopped { end: None });
    server.act(&cached(&vm, "start")).await?.ok(200);
    assert!(server.fake.program_runs(&vm_id(&vm)));
    Ok(())
}

#[tokio::test]
async fn what_is_prepared_makes_room_for_who_finds_the_host_full() -> Result<()> {
    let server = Server::start_cold().await?;
    let vm = cache(&server, json!({})).await?;
    until_prepared(&server, &vm).await?;
    server.fake.set_capacity(1);
    server.post("/v1/vms", &crate::harness::small_vm()).await?.ok(201);
    assert!(matches!(server.fake.observe(&vm_id(&vm)).await, Observed::Stopped { .. }));
    assert_eq!(state(&server, &vm).await?, "stopped");
    Ok(())
}

#[tokio::test]
async fn calls_for_another_kind_of_vm_are_refused_and_say_which_are_right() -> Result<()> {
    let server = Server::start().await?;
    let (once, kept) = (start(&server, json!({})).await?, cache(&server, json!({})).await?);
    let sandbox = server.vm().await?.replace("/v1/vms/vm-", "/v1/vm/");
    for action in ["start", "stop"] {
        let message = server.act(&cached(&once, action)).await?.refused(409, "wrong_kind");
        assert!(message.contains("/v1/vm/{id}/stop"), "{message}");
    }
    let message = server.act(&format!("{}/stop", path(&kept))).await?.refused(409, "wrong_kind");
    assert!(message.contains("/v1/vm/cached/"), "{message}");
    for action in ["stop", "destroy"] {
        let message = server.act(&format!("{sandbox}/{action}")).await?.refused(409, "wrong_kind");
        assert!(message.contains("POST /v1/vms"), "{message}");
    }
    server.act(&cached(&kept, "stop")).await?.refused(409, "wrong_state");
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_is_named_with_its_range_and_no_value_of_the_environment_is_repeated() -> Result<()> {
    let server = Server::start().await?;
    let image = image(&server).await?;
    for (field, value, expected) in [
        ("imageId", json!("x"), "26 characters"),
        ("cpu", json!(9), "from 1 to 8"),
        ("cpu", json!("1"), "from 1 to 8"),
        ("memory", json!(255), "from 256 to 16384"),
        ("memory", json!(16_385), "from 256 to 16384"),
        ("port", json!(0), "from 1 to 65535"),
        ("port", json!(65_536), "from 1 to 65535"),
        ("volumeGB", json!(0), "from 1 to 500"),
        ("diskSize", json!(501), "from 1 to 500"),
        ("envVars", json!(["A=1"]), "object of texts"),
        ("envVars", json!({ "1A": "secret" }), "no name of a variable"),
        ("envVars", json!({ "A": 17 }), "must be a text"),
        ("envVars", json!({ "A": "secret\0" }), "must be a text"),
    ] {
        for path in ["/v1/vm/start", "/v1/vm/cache", "/cakework/v1/vm/start"] {
            let mut body = json!({ "imageId": image });
            body[field] = value.clone();
            let message = server.post(path, &body).await?.refused(400, "invalid_parameter");
            assert!(message.contains(field) && message.contains(expected), "{message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }
    let unknown = json!({ "imageId": "01JD4W5C1QZX6M0V5K2B8N7T3A" });
    server.post("/v1/vm/start", &unknown).await?.refused(400, "invalid_parameter");
    let too_much = json!({ "imageId": image, "envVars": { "A": "x".repeat(40_000) } });
    server.post("/v1/vm/start", &too_much).await?.refused(422, "image_unusable");
    assert_eq!(server.present().await?, []);
    Ok(())
}

#[tokio::test]
async fn the_list_comes_in_pages_by_image_and_state_and_in_both_places() -> Result<()> {
    let server =
        Server::start_cold_with(&[("quota.vms", "200"), ("quota.cpus", "200"), ("quota.mem_mb", "100000")]).await?;
    let sandbox = server.vm().await?;
    let body = json!({ "imageId": image(&server).await? });
    let mut made = Vec::new();
    for _ in 0..101 {
        made.push(server.post("/v1/vm/start", &body).await?.ok(200)["id"].clone());
    }
    server.act(&format!("/v1/vm/{}/stop", made[0].as_str().unwrap())).await?.ok(200);
    let (mut seen, mut query) = (Vec::new(), String::new());
    loop {
        let page = server.get(&format!("/cakework/v1/vms{query}")).await?.ok(200);
        seen.extend(page["vms"].as_array().context("a list")?.iter().map(|vm| vm["id"].clone()));
        let Some(token) = page["pagination"].as_str() else { break };
        query = format!("?pagination={token}");
    }
    let mut expected: Vec<Value> = made[1..].iter().rev().cloned().collect();
    expected.push(json!(sandbox.trim_start_matches("/v1/vms/vm-")));
    assert_eq!(seen.len(), 101);
    for id in &expected {
        assert!(seen.contains(id), "{id}");
    }
    let list = async |query: &str| -> Result<usize> {
        Ok(server.get(&format!("/vms?{query}")).await?.ok(200)["vms"].as_array().context("a list")?.len())
    };
    assert_eq!(list("status=destroyed").await?, 1);
    assert_eq!(list("status=stopped").await?, 0);
    assert_eq!(list(&format!("status=started&imageId={}", body["imageId"].as_str().unwrap())).await?, 100);
    assert_eq!(list("imageId=01JD4W5C1QZX6M0V5K2B8N7T3A").await?, 0);
    for bad in ["status=running", "imageId=x", "pagination=x", "pagination=zzzzzzzzzzzzzzz", "limit=1"] {
        server.get(&format!("/vms?{bad}")).await?.refused(400, "invalid_parameter");
    }
    Ok(())
}

#[tokio::test]
async fn a_strangers_vm_is_not_found() -> Result<()> {
    let server = Server::start().await?;
    let vm = start(&server, json!({})).await?;
    let key = server.other_key("bob", &["read", "write"]).await?;
    server.get_as(&key, &path(&vm)).await?.refused(404, "not_found");
    server.post_as(&key, &format!("{}/stop", path(&vm)), &json!({})).await?.refused(404, "not_found");
    assert_eq!(server.get_as(&key, "/vms").await?.ok(200)["vms"], json!([]));
    Ok(())
}

#[tokio::test]
async fn a_request_that_is_repeated_with_its_key_makes_one_vm() -> Result<()> {
    let server = Server::start().await?;
    let body = json!({ "imageId": image(&server).await? });
    for path in ["/v1/vm/start", "/v1/vm/cache"] {
        let ask = || {
            server.request(Method::POST, path).header("Idempotency-Key", path.rsplit('/').next().unwrap()).json(&body)
        };
        let first = send(ask()).await?.ok(200);
        assert_eq!(send(ask()).await?.ok(200)["id"], first["id"]);
    }
    Ok(())
}

#[tokio::test]
async fn a_start_that_was_cut_short_goes_on_with_the_program() -> Result<()> {
    let mut server = Server::start().await?;
    let vm = cache(&server, json!({})).await?;
    until_prepared(&server, &vm).await?;
    let id = vm_id(&vm);
    server.stop().await;
    server.store.vm_transition(&id, VmState::Stopped, VmEvent::Start, Change::default()).await?;
    server.restart().await?;
    until("it runs", async || Ok(state(&server, &vm).await? == "started")).await?;
    assert!(server.fake.program_runs(&id));
    Ok(())
}

#[tokio::test]
async fn what_a_killed_server_left_is_taken_over_or_removed() -> Result<()> {
    let mut server = Server::start().await?;
    let (once, kept) = (start(&server, json!({})).await?, cache(&server, json!({})).await?);
    until_prepared(&server, &kept).await?;
    server.stop().await;
    // As one that was killed between the end and the removal.
    server.store.vm_transition(&vm_id(&once), VmState::Running, VmEvent::Ended, Change::default()).await?;
    server.restart().await?;
    until("the one-time VM is destroyed", async || Ok(state(&server, &once).await? == "destroyed")).await?;
    assert_eq!(server.fake.observe(&vm_id(&once)).await, Observed::Absent);
    server.fake.set_start_delay(NEVER);
    server.act(&cached(&kept, "start")).await?.ok(200);
    assert!(server.fake.program_runs(&vm_id(&kept)), "it was still prepared");
    Ok(())
}
