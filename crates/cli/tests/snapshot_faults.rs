//! The whole program with real VMs of either engine, killed at every point of a save, a removal, a restore, a fork and a claim of the
//! pool. After each: nothing half done is listed or on the host, what was whole is whole, and a second try works.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/server.rs"]
mod server;

use std::time::Duration;

use harness::{eventually, on_both_engines};
use serde_json::{Value, json};
use server::{Answer, Site, small};
use tiffin_types::{id::VmId, vm::EngineName};

on_both_engines!(
    a_save_or_removal_that_was_cut_short_leaves_no_snapshot_and_a_vm_that_runs,
    a_restore_that_was_cut_short_leaves_one_vm_or_none_and_its_key_still_makes_one,
    a_fork_that_was_cut_short_leaves_all_clones_or_none_and_its_key_still_makes_them,
    a_claim_of_the_pool_that_was_cut_short_leaves_no_vm_and_its_key_still_makes_one,
);

/// What a saved VM is found by: a file in memory, which no boot would keep, and a process.
const LEAVE_TRACES: &str = "echo mine > /dev/shm/file; nohup sleep 4321 >/dev/null 2>&1 & echo";
const FIND_TRACES: &str = "cat /dev/shm/file; pgrep -xc sleep";

/// A VM to be saved.
async fn source(site: &Site) -> VmId {
    let id = site.create().await;
    site.sh(&id, LEAVE_TRACES).await;
    id
}

/// Saves a VM, and answers the snapshot's id.
async fn save(site: &Site, vm: &VmId) -> String {
    let answer = site.ask("POST", &format!("/v1/vms/{vm}/snapshots"), None).await;
    assert_eq!((answer.status, &answer.body["state"]), (201, &json!("READY")), "{answer:?}");
    answer.body["id"].as_str().unwrap().to_owned()
}

fn of(snapshot: &str) -> Value {
    let mut body = small();
    body["snapshotId"] = json!(snapshot);
    body
}

/// The VM goes on with what it had when it was saved.
async fn goes_on(site: &Site, id: &VmId, point: &str) {
    assert_eq!(site.get(id).await.body["state"], "RUNNING", "{point}");
    assert_eq!(site.sh(id, FIND_TRACES).await, "mine\n1\n", "{point}");
}

/// So does one that is made of the snapshot.
async fn goes_on_from(site: &Site, snapshot: &str, point: &str) {
    let id = site.ask("POST", "/v1/vms", Some(of(snapshot))).await.id();
    goes_on(site, &id, point).await;
    site.delete(&id).await;
}

/// The snapshots in the list, which are all whole.
async fn listed(site: &Site) -> Vec<String> {
    let list = site.ask("GET", "/v1/snapshots", None).await.body;
    let list = list.as_array().unwrap();
    assert!(list.iter().all(|snapshot| snapshot["state"] == "READY"), "{list:?}");
    list.iter().map(|snapshot| snapshot["id"].as_str().unwrap().to_owned()).collect()
}

/// The snapshots are those, listed and on the disk, and the host has nothing but the VMs of the API's list.
async fn has_only(site: &Site, snapshots: &[&str], point: &str) {
    let sorted = |mut ids: Vec<String>| {
        ids.sort();
        ids
    };
    let expected = sorted(snapshots.iter().map(|id| (*id).to_owned()).collect());
    assert_eq!(sorted(listed(site).await), expected, "{point}: listed");
    let entries = std::fs::read_dir(site.data.join("snapshots")).unwrap();
    let folders = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(sorted(folders), expected, "{point}: on the disk");
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(site.data.join("snapshots").to_str().unwrap()), "{point}: {mounts}");
    site.is_tidy().await;
}

/// Has the server kill itself at a point of that request, and starts it again.
async fn cut(site: &mut Site, point: &str, method: &str, path: &str, body: Option<Value>) {
    site.kill().await;
    site.serve(Some(point)).await;
    let answer = ask(site, point, method, path, body).await;
    assert!(answer.is_err(), "{point}: {answer:?}");
    site.ended().await;
    site.serve(None).await;
}

/// A request; one with a body makes VMs, once for each point and path.
async fn ask(site: &Site, point: &str, method: &str, path: &str, body: Option<Value>) -> reqwest::Result<Answer> {
    let key = body.is_some().then(|| format!("{point}{path}"));
    site.try_ask(method, path, key.as_deref(), body).await
}

/// The VMs besides that one.
async fn others(site: &Site, id: &VmId) -> Vec<(VmId, String)> {
    site.list().await.into_iter().filter(|(one, _)| one != id).collect()
}

async fn a_save_or_removal_that_was_cut_short_leaves_no_snapshot_and_a_vm_that_runs(engine: EngineName) {
    let mut site = Site::start_with(engine, &[]).await;
    let source = source(&site).await;
    let kept = save(&site, &source).await;
    let path = format!("/v1/vms/{source}/snapshots");
    for point in ["after_snapshot_intent", "after_engine_save", "before_snapshot_commit"] {
        cut(&mut site, point, "POST", &path, None).await;
        goes_on(&site, &source, point).await;
        has_only(&site, &[&kept], point).await;
        let again = save(&site, &source).await;
        has_only(&site, &[&kept, &again], point).await;
        assert_eq!(site.ask("DELETE", &format!("/v1/snapshots/{again}"), None).await.status, 204, "{point}");
    }
    // And at moments that have no name, in which the VM stands still.
    let moments: &[u64] = if engine == EngineName::Qemu { &[120] } else { &[5, 40, 120, 250] };
    for millis in moments.iter().copied() {
        let asked = ask(&site, "", "POST", &path, None);
        let _ = tokio::time::timeout(Duration::from_millis(millis), asked).await;
        site.kill().await;
        site.serve(None).await;
        let point = format!("after {millis} ms");
        goes_on(&site, &source, &point).await;
        let left = listed(&site).await;
        assert!(left.contains(&kept) && left.len() <= 2, "{point}: {left:?}");
        has_only(&site, &left.iter().map(String::as_str).collect::<Vec<_>>(), &point).await;
        for id in left.iter().filter(|id| **id != kept) {
            goes_on_from(&site, id, &point).await;
            assert_eq!(site.ask("DELETE", &format!("/v1/snapshots/{id}"), None).await.status, 204, "{point}");
        }
    }
    // What was committed is there, though nobody was told.
    cut(&mut site, "after_snapshot_commit", "POST", &path, None).await;
    let left = listed(&site).await;
    let untold = left.iter().find(|id| **id != kept).unwrap();
    has_only(&site, &[&kept, untold], "after_snapshot_commit").await;
    goes_on_from(&site, untold, "after_snapshot_commit").await;

    let more = save(&site, &source).await;
    for (point, id) in
        [("after_snapshot_delete_intent", untold.as_str()), ("after_engine_snapshot_remove", more.as_str())]
    {
        cut(&mut site, point, "DELETE", &format!("/v1/snapshots/{id}"), None).await;
        goes_on(&site, &source, point).await;
        assert_eq!(site.ask("DELETE", &format!("/v1/snapshots/{id}"), None).await.status, 404, "{point}");
    }
    has_only(&site, &[&kept], "the end").await;
    site.delete(&source).await;
    goes_on_from(&site, &kept, "a restore").await;
    has_only(&site, &[&kept], "without VMs").await;
}

async fn a_restore_that_was_cut_short_leaves_one_vm_or_none_and_its_key_still_makes_one(engine: EngineName) {
    let mut site = Site::start_with(engine, &[]).await;
    let source = source(&site).await;
    let kept = save(&site, &source).await;
    for point in ["after_engine_create", "after_engine_start", "before_running_commit", "after_running_commit"] {
        cut(&mut site, point, "POST", "/v1/vms", Some(of(&kept))).await;
        goes_on(&site, &source, point).await;
        let left = others(&site, &source).await;
        assert!(left.len() <= 1 && left.iter().all(|(_, state)| state == "RUNNING"), "{point}: {left:?}");
        has_only(&site, &[&kept], point).await;
        let id = ask(&site, point, "POST", "/v1/vms", Some(of(&kept))).await.unwrap().id();
        assert!(left.iter().all(|(one, _)| *one == id), "{point}: {left:?} {id}");
        assert_eq!(others(&site, &source).await, [(id.clone(), "RUNNING".to_owned())], "{point}");
        goes_on(&site, &id, point).await;
        site.delete(&id).await;
        has_only(&site, &[&kept], point).await;
    }
    site.delete(&source).await;
    goes_on_from(&site, &kept, "the end").await;
    has_only(&site, &[&kept], "the end").await;
}

async fn a_fork_that_was_cut_short_leaves_all_clones_or_none_and_its_key_still_makes_them(engine: EngineName) {
    let mut site = Site::start_with(engine, &[]).await;
    let source = source(&site).await;
    let kept = save(&site, &source).await;
    let path = format!("/v1/vms/{source}/fork");
    let two = || Some(json!({ "count": 2 }));
    for (point, done) in [("after_fork_insert", false), ("before_fork_commit", false), ("after_running_commit", true)] {
        cut(&mut site, point, "POST", &path, two()).await;
        goes_on(&site, &source, point).await;
        has_only(&site, &[&kept], point).await;
        let left = others(&site, &source).await;
        assert_eq!(left.len(), if done { 2 } else { 0 }, "{point}: {left:?}");
        let again = ask(&site, point, "POST", &path, two()).await.unwrap();
        assert_eq!(again.status, 201, "{point}: {again:?}");
        let clones = others(&site, &source).await;
        assert_eq!(clones.len(), 2, "{point}: {clones:?}");
        assert!(left.iter().all(|one| clones.contains(one)), "{point}: {left:?} {clones:?}");
        for (id, _) in clones {
            goes_on(&site, &id, point).await;
            site.delete(&id).await;
        }
        has_only(&site, &[&kept], point).await;
    }
    site.delete(&source).await;
    has_only(&site, &[&kept], "the end").await;
}

async fn a_claim_of_the_pool_that_was_cut_short_leaves_no_vm_and_its_key_still_makes_one(engine: EngineName) {
    let mut site = Site::start_with(engine, &[]).await;
    let witness = source(&site).await;
    site.kill().await;
    site.settings = ["pool.max_vms=1", "pool.keep=1x128=1"].map(str::to_owned).to_vec();
    site.serve(Some("after_pool_claim")).await;
    eventually("one is booted ahead", async || site.text("/metrics").await.contains("tiffin_pool_vms 1\n")).await;
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [] });
    let claimed = site.try_ask("POST", "/v1/vms", Some("claim"), Some(body.clone())).await;
    assert!(claimed.is_err(), "{claimed:?}");
    site.ended().await;

    // Without a pool the host has what the API lists.
    site.settings.clear();
    site.serve(None).await;
    assert_eq!(others(&site, &witness).await, []);
    goes_on(&site, &witness, "a claim").await;
    site.is_tidy().await;
    let id = site.try_ask("POST", "/v1/vms", Some("claim"), Some(body)).await.unwrap().id();
    assert_eq!(site.sh(&id, "echo up").await, "up\n");
    for id in [&id, &witness] {
        site.delete(id).await;
    }
    site.is_tidy().await;
}
