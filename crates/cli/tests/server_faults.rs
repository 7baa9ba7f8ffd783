//! Faults of the whole program with real VMs: the server killed at every point of a VM's life, VMs that end by
//! themselves, a burst, a full disk. After each: a clear answer, and nothing on the host that the API doesn't list.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/disk.rs"]
mod disk;
#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/server.rs"]
mod server;

use std::time::Duration;

use disk::SmallDisk;
use futures_util::future::join_all;
use harness::{eventually, kill_sandbox, monitor_pid};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use server::{Site, small};
use tiffin_types::id::VmId;

/// What a lost server's VM is found by: a file in memory, which no restart would keep, and a process.
const LEAVE_TRACES: &str = "echo mine > /dev/shm/file; nohup sleep 4321 >/dev/null 2>&1 & echo";
const FIND_TRACES: &str = "cat /dev/shm/file; pgrep -xc sleep";

/// A VM that must live through everything.
async fn witness(site: &Site) -> VmId {
    let id = site.create().await;
    site.sh(&id, LEAVE_TRACES).await;
    id
}

async fn lives_on(site: &Site, id: &VmId) {
    assert_eq!(site.get(id).await.body["state"], "RUNNING");
    assert_eq!(site.sh(id, FIND_TRACES).await, "mine\n1\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_was_cut_short_leaves_one_vm_or_none_and_its_key_still_makes_one() {
    let mut site = Site::start(&[]).await;
    let witness = witness(&site).await;
    for point in &tiffin_server::fault::POINTS[..6] {
        site.kill().await;
        site.serve(Some(point)).await;
        let cut = create_as(&site, point).await;
        assert!(cut.is_err(), "{point}: {cut:?}");
        site.ended().await;
        goes_on_after_a_cut_create(&mut site, &witness, point).await;
    }
    // And at moments that have no name: before, while and after it boots.
    for millis in [4, 15, 30, 50, 75, 100, 150, 200, 300] {
        let key = format!("after {millis} ms");
        let _ = tokio::time::timeout(Duration::from_millis(millis), create_as(&site, &key)).await;
        site.kill().await;
        goes_on_after_a_cut_create(&mut site, &witness, &key).await;
    }
    site.delete(&witness).await;
    site.is_tidy().await;
}

async fn create_as(site: &Site, key: &str) -> reqwest::Result<server::Answer> {
    site.try_ask("POST", "/v1/vms", Some(&key.replace(' ', "-")), Some(small())).await
}

/// The server that cut a create short by its end is followed by one that has at most that VM, and makes it when asked
/// once more.
async fn goes_on_after_a_cut_create(site: &mut Site, witness: &VmId, cut: &str) {
    site.serve(None).await;
    lives_on(site, witness).await;
    site.is_tidy().await;
    let others = async || site.list().await.into_iter().filter(|(id, _)| id != witness).collect::<Vec<_>>();
    let left = others().await;
    assert!(left.len() <= 1 && left.iter().all(|(_, state)| state == "RUNNING"), "{cut}: {left:?}");
    let again = create_as(site, cut).await.unwrap();
    let id = again.id();
    assert!(left.iter().all(|(one, _)| *one == id), "{cut}: {left:?} {id}");
    assert_eq!(again.body["state"], "RUNNING", "{cut}: {again:?}");
    assert_eq!(site.sh(&id, "echo up").await, "up\n");
    assert_eq!(others().await, [(id.clone(), "RUNNING".to_owned())], "{cut}");
    assert_eq!(create_as(site, cut).await.unwrap().id(), id, "{cut}");
    site.delete(&id).await;
    site.is_tidy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_lives_on_and_what_was_begun_is_finished_whenever_the_server_is_killed() {
    let mut site = Site::start(&[]).await;
    let witness = witness(&site).await;

    // While a command runs, which ends with the connection that asked for it.
    let path = format!("/v1/vms/{witness}/exec");
    let command = json!({ "cmd": "exec sleep 1234", "timeoutMs": 60_000 });
    let begun =
        async { eventually("the command runs", async || running(&site, &witness, "sleep 1234").await == 1).await };
    let (asked, ()) = tokio::join!(
        async { tokio::time::timeout(Duration::from_secs(20), site.try_ask("POST", &path, None, Some(command))).await },
        async {
            begun.await;
            site.signal(Signal::SIGKILL);
        }
    );
    assert!(asked.unwrap().is_err());
    site.ended().await;
    site.serve(None).await;
    lives_on(&site, &witness).await;
    eventually("the command is gone", async || running(&site, &witness, "sleep 1234").await == 0).await;
    site.is_tidy().await;

    // In the middle of a stop, of which the client has no answer: it is finished.
    for point in ["after_stop_intent", "after_engine_stop"] {
        let id = site.create().await;
        site.sh(&id, "echo kept > file").await;
        cut(&mut site, point, "POST", &format!("/v1/vms/{id}/stop")).await;
        let stopped = site.until(&id, "STOPPED").await;
        assert_eq!(stopped["end"]["reason"], "requested", "{point}: {stopped}");
        site.is_tidy().await;
        // And so is a start that the engine has finished.
        cut(&mut site, "after_engine_start", "POST", &format!("/v1/vms/{id}/start")).await;
        site.until(&id, "RUNNING").await;
        assert_eq!(site.sh(&id, "cat file").await, "kept\n");
        // One that had only begun is told.
        assert_eq!(site.ask("POST", &format!("/v1/vms/{id}/stop"), None).await.status, 204);
        cut(&mut site, "after_start_intent", "POST", &format!("/v1/vms/{id}/start")).await;
        assert_eq!(site.until(&id, "ERROR").await["error"]["code"], "boot_failed");
        site.is_tidy().await;
        site.delete(&id).await;
    }
    // In the middle of a delete.
    for point in ["after_delete_intent", "after_engine_destroy"] {
        let id = site.create().await;
        cut(&mut site, point, "DELETE", &format!("/v1/vms/{id}")).await;
        assert_eq!(site.get(&id).await.status, 404);
        site.is_tidy().await;
    }
    lives_on(&site, &witness).await;
    site.delete(&witness).await;
    site.is_tidy().await;
}

/// Has the server kill itself at a point of that request, and starts it again.
async fn cut(site: &mut Site, point: &str, method: &str, path: &str) {
    site.kill().await;
    site.serve(Some(point)).await;
    let answer = site.try_ask(method, path, None, None).await;
    assert!(answer.is_err(), "{point}: {answer:?}");
    site.ended().await;
    site.serve(None).await;
}

/// How many processes in the VM have that command line.
async fn running(site: &Site, id: &VmId, line: &str) -> u32 {
    site.sh(id, &format!("pgrep -xfc '{line}' || true")).await.trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_and_denials_while_no_server_runs_are_told_by_the_next() {
    let mut site = Site::start(&[]).await;
    let witness = witness(&site).await;
    let (knocking, hungry) = (site.create().await, site.create().await);
    let (killed, orphan) = (site.create().await, site.create().await);
    // At another port each time, as the log names each destination once.
    let knock = "for port in $(seq 1000 2000); do timeout 1 bash -c \">/dev/tcp/192.0.2.7/$port\"; sleep 0.2; done";
    site.sh(&knocking, &in_background(knock)).await;
    site.sh(&hungry, &in_background(&format!("sleep 4; {}", eat(512)))).await;

    // A shutdown leaves the VMs alone.
    site.signal(Signal::SIGTERM);
    assert!(site.ended().await.success(), "a shutdown by SIGTERM is no failure");
    assert!(!log_of(&site, &hungry).contains("ended"), "it must end when no server runs");
    let heard = denials(&log_of(&site, &knocking)).len();
    kill_sandbox(&site.folder(&killed));
    kill_monitor(&site, &orphan);
    let mut missed = Vec::new();
    eventually("something is denied", async || {
        missed = denials(&log_of(&site, &knocking));
        missed.len() > heard + 2
    })
    .await;
    eventually("the hungry one is over", async || log_of(&site, &hungry).contains("ended: oom")).await;

    site.serve(None).await;
    lives_on(&site, &witness).await;
    for (id, code) in [(&hungry, "oom"), (&killed, "engine_lost"), (&orphan, "monitor_lost")] {
        let vm = site.get(id).await.body;
        assert_eq!((&vm["state"], &vm["error"]["code"]), (&json!("ERROR"), &json!(code)), "{vm}");
    }
    let logs = site.ask("GET", &format!("/v1/vms/{knocking}/logs?tail=1000"), None).await;
    let told = logs.body["lines"].to_string();
    assert!(missed.iter().all(|line| told.contains(line)), "{missed:?} {told}");
    let network = site.ask("GET", &format!("/v1/vms/{knocking}/network"), None).await;
    assert_eq!(network.body["denied"]["destinations"][0]["address"], "192.0.2.7", "{network:?}");
    let logs = site.ask("GET", &format!("/v1/vms/{hungry}/logs"), None).await;
    assert!(logs.body["lines"].to_string().contains("ended: oom"), "{logs:?}");
    site.is_tidy().await;
    for (id, _) in site.list().await {
        site.delete(&id).await;
    }
    site.is_tidy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_ends_by_itself_says_why_and_starts_again() {
    let site = Site::start(&[]).await;
    let witness = witness(&site).await;
    for code in ["oom", "engine_lost", "monitor_lost"] {
        let id = site.create().await;
        site.sh(&id, "echo kept > file").await;
        match code {
            "oom" => {
                // The kernel may take the command first, and the VM right after it.
                let answer = site.exec(&id, &eat(512)).await;
                let reason = (answer.status == 409).then_some(&answer.body["details"]["reason"]);
                assert!(reason.map_or(answer.body["exitCode"] != 0, |reason| reason == "oom"), "{answer:?}");
            }
            "engine_lost" => kill_sandbox(&site.folder(&id)),
            _ => kill_monitor(&site, &id),
        }
        let vm = site.until(&id, "ERROR").await;
        assert_eq!(vm["error"]["code"], code, "{vm}");
        let refused = site.exec(&id, "true").await;
        assert_eq!((refused.status, &refused.body["code"]), (409, &json!("wrong_state")), "{refused:?}");
        site.is_tidy().await;
        assert_eq!(site.ask("POST", &format!("/v1/vms/{id}/start"), None).await.status, 204);
        assert_eq!(site.sh(&id, "cat file").await, "kept\n", "{code}");
        assert_eq!(site.get(&id).await.body["error"], json!(null));
        site.delete(&id).await;
    }
    lives_on(&site, &witness).await;
    let second = site.second_server();
    let told = String::from_utf8(second.stderr).unwrap();
    assert!(!second.status.success() && told.contains("a server runs on"), "{told}");
    lives_on(&site, &witness).await;
    site.delete(&witness).await;
    site.is_tidy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_hundred_creates_at_once_each_makes_a_vm_or_is_refused_with_a_reason() {
    let site = Site::start(&["quota.vms=95"]).await;
    let answers = join_all((0..100).map(|_| site.ask("POST", "/v1/vms", Some(small())))).await;
    let (made, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 201);
    for answer in &refused {
        // A host whose disk is slow may keep the store, too, from answering.
        let typed = [
            (429, json!("quota_exceeded")),
            (503, json!("busy")),
            (503, json!("no_capacity")),
            (503, json!("store_unavailable")),
        ];
        assert!(typed.contains(&(answer.status, answer.body["code"].clone())), "{answer:?}");
        assert!(answer.retry_after.as_ref().is_some_and(|after| after.parse::<u32>().is_ok()), "{answer:?}");
    }
    assert!((50..=95).contains(&made.len()), "{} of 100, refused: {refused:?}", made.len());
    let listed = site.list().await;
    let ids: Vec<VmId> = made.iter().map(|answer| answer.id()).collect();
    assert!(ids.iter().all(|id| listed.contains(&(id.clone(), "RUNNING".to_owned()))), "{listed:?}");
    assert_eq!(listed.len(), ids.len());
    site.is_tidy().await;
    assert_eq!(site.sh(&ids[0], "echo up").await, "up\n");
    let deleted = join_all(ids.iter().map(|id| site.delete(id))).await;
    assert_eq!((deleted.len(), site.list().await.len()), (made.len(), 0));
    site.is_tidy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_new_vms_and_leaves_the_server_and_the_others_alone() {
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::new(3072);
    let mut site = Site::start_on(folder, disk.at().join("data"), &[]).await;
    let witness = witness(&site).await;
    let big = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "diskSizeMb": 512 });
    let writer = site.ask("POST", "/v1/vms", Some(big)).await.id();
    let stopped = site.create().await;
    assert_eq!(site.ask("POST", &format!("/v1/vms/{stopped}/stop"), None).await.status, 204);

    disk.leave(400);
    let refused = site.ask("POST", "/v1/vms", Some(small())).await;
    assert_eq!((refused.status, &refused.body["code"]), (503, &json!("no_capacity")), "{refused:?}");
    assert!(refused.retry_after.is_some(), "{refused:?}");
    assert!(
        refused.body["message"].as_str().unwrap().contains("MiB of disk are free, 512 must stay so"),
        "{refused:?}"
    );
    let refused = site.ask("POST", &format!("/v1/vms/{stopped}/start"), None).await;
    assert_eq!((refused.status, &refused.body["code"]), (503, &json!("no_capacity")), "{refused:?}");
    assert_eq!(site.list().await.len(), 3);
    site.is_tidy().await;

    // A guest takes what is left.
    disk.leave(16);
    let written = site.exec(&writer, "head -c 300M /dev/zero > big").await;
    assert_eq!(written.status, 200, "{written:?}");
    eventually("the disk is full", async || disk.free_kib() < 1024).await;
    assert_eq!(site.ask("GET", "/health", None).await.status, 200);
    lives_on(&site, &witness).await;
    site.kill().await;
    site.serve(None).await;
    lives_on(&site, &witness).await;
    site.delete(&writer).await;
    assert!(disk.free_kib() > 10 << 10, "{} KiB", disk.free_kib());
    site.delete(&stopped).await;
    disk.leave(800);
    let fresh = site.create().await;
    assert_eq!(site.sh(&fresh, "echo up").await, "up\n");
    lives_on(&site, &witness).await;
    for (id, _) in site.list().await {
        site.delete(&id).await;
    }
    site.is_tidy().await;
}

/// A shell line that goes on when its command is over.
fn in_background(line: &str) -> String {
    format!("nohup bash -c {} >/dev/null 2>&1 & true", quoted(line))
}

fn quoted(line: &str) -> String {
    format!("'{}'", line.replace('\'', r"'\''"))
}

/// A shell line that takes so much memory.
fn eat(mib: u32) -> String {
    format!("python3 -c 'x = [bytearray(4 << 20) for _ in range({})]'", mib / 4)
}

/// The lines of a log that tell what the VM's network refused.
fn denials(log: &str) -> Vec<String> {
    log.lines().filter(|line| line.contains("denied tcp to 192.0.2.7 port")).map(str::to_owned).collect()
}

fn log_of(site: &Site, id: &VmId) -> String {
    std::fs::read_to_string(site.folder(id).join("engine.log")).unwrap_or_default()
}

fn kill_monitor(site: &Site, id: &VmId) {
    kill(Pid::from_raw(monitor_pid(&site.folder(id)).unwrap()), Signal::SIGKILL).unwrap();
}
