//! What goes on from saved machines: clones that share a memory, and VMs that begin with a template.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/saved.rs"]
mod saved;

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use harness::{Host, eventually, sh, shell};
use saved::{TALK, another, ask, background, restored, save, small};
use tiffin_engine::{
    Engine, EngineError, Target,
    agent::{self, ExecItem},
};
use tiffin_types::{
    id::{SnapshotId, VmId},
    vm::{EndReason, EngineName, VmSpec},
};

/// KiB of memory that a VM's emulator takes: its share where several have the same pages, and as if it were alone.
fn memory(host: &Host, id: &VmId) -> (u64, u64) {
    let pids = harness::engine_pids(&host.folder(id), "/usr/bin/qemu-system-x86_64");
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", pids[0])).unwrap();
    let of = |name: &str| {
        let line = rollup.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (of("Pss:"), of("Rss:"))
}

/// The templates on the host that are whole.
fn templates(host: &Host) -> Vec<PathBuf> {
    let folder = host.config.data_dir.join("templates/machines");
    let all = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|template| template.join("manifest.json").exists()).collect()
}

async fn template(host: &Host) -> PathBuf {
    eventually("a template is left", async || !templates(host).is_empty()).await;
    templates(host).remove(0)
}

/// A VM that was started; whether it began with what was saved.
async fn started(host: &Host) -> (VmId, bool) {
    let spec = host.spec();
    host.engine.create(&spec).await.unwrap();
    (spec.id.clone(), host.engine.start(&spec.id).await.unwrap().from_saved)
}

async fn said(host: &Host, id: &VmId, script: &str) -> String {
    sh(&*host.engine, id, script).await.stdout.trim().to_owned()
}

/// Whether a file has these bytes somewhere.
fn has(file: &Path, bytes: &str) -> bool {
    memchr::memmem::find(&fs::read(file).unwrap(), bytes.as_bytes()).is_some()
}

fn damage(file: &Path) {
    let mut file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.seek(SeekFrom::Start(4000)).unwrap();
    file.write_all(b"damaged").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_share_the_memory_that_they_go_on_from_and_change_their_own() {
    let host = Host::with(EngineName::Qemu).await;
    let source = host.running().await;
    // A program that goes on, in a memory of some size.
    let fill = "yes something | head -c 40M > /dev/shm/big; (n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; \
                sleep 0.5; done) >/dev/null 2>&1 & tail -c 1M /dev/shm/big | md5sum";
    let sum = said(&host, &source, fill).await;
    let (first, second) = (SnapshotId::random(), SnapshotId::random());
    host.engine.snapshot_save(&source, &first).await.unwrap();
    let mut clones = Vec::new();
    for _ in 0..3 {
        let spec = host.spec();
        host.engine.create_from(&spec, &first).await.unwrap();
        assert!(host.engine.start(&spec.id).await.unwrap().from_saved);
        clones.push(spec.id);
    }
    let ask = "tail -c 1M /dev/shm/big | md5sum; hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid; date +%s";
    let mut others = vec![said(&host, &source, ask).await];
    for id in &clones {
        let told = said(&host, id, ask).await;
        let [content, name, machine, random, clock] = told.lines().collect::<Vec<_>>()[..] else { panic!("{told}") };
        assert_eq!((content, name), (&sum[..], id.as_str()));
        for own in [machine, random] {
            assert!(!others.iter().any(|other| other.contains(own)), "{own} is another's, too: {others:?}");
        }
        let behind = tiffin_types::time::Timestamp::now().as_millis() / 1000 - clock.parse::<i64>().unwrap();
        assert!((-1..=4).contains(&behind), "the clock is {behind} s behind, the answer's way included");
        others.push(told);
    }
    let taken: Vec<_> = clones.iter().map(|id| memory(&host, id)).collect();
    let (shared, alone): (u64, u64) = (taken.iter().map(|one| one.0).sum(), taken.iter().map(|one| one.1).sum());
    // Each has read a part of the same memory, which is there once.
    assert!(alone - shared > 20 << 10, "the clones take {shared} KiB, not {alone}");

    // What one changes is its own; saved again, it has both what it began with and what it changed.
    let clone = &clones[0];
    let change =
        "echo mine > /dev/shm/own; echo other | dd of=/dev/shm/big bs=1M seek=39 conv=notrunc 2>&-; echo disk > kept";
    said(&host, clone, change).await;
    let ask = "tail -c 1M /dev/shm/big | md5sum; cat /dev/shm/own kept";
    let changed = said(&host, clone, ask).await;
    assert!(!changed.contains(&sum) && changed.ends_with("mine\ndisk"), "{changed}");
    assert_eq!(said(&host, &clones[1], ask).await, sum, "nothing of it is another's");
    host.engine.snapshot_save(clone, &second).await.unwrap();
    let third = host.spec();
    host.engine.create_from(&third, &second).await.unwrap();
    host.engine.destroy(clone).await.unwrap();
    host.engine.snapshot_remove(&second).await.unwrap();
    host.engine.start(&third.id).await.unwrap();
    assert_eq!(said(&host, &third.id, ask).await, changed);
    let told = said(&host, &third.id, "cat /dev/shm/count; sleep 3; cat /dev/shm/count").await;
    let counted: Vec<u64> = told.lines().map(|line| line.parse().unwrap()).collect();
    assert!(counted[0] < counted[1], "the program that ran in the first goes on: {counted:?}");
    host.engine.snapshot_remove(&first).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_of_an_image_and_size_boots_and_the_others_begin_with_its_template() {
    let mut host = Host::with(EngineName::Qemu).await;
    let (booted, from_saved) = started(&host).await;
    assert!(!from_saved);
    let token = host.engine.agent_token(&booted).await.unwrap();
    let left = template(&host).await;
    // Nobody's secret is in what everybody begins with.
    for secret in [&token[..], booted.as_str()] {
        assert!(!has(&left.join("memory/ram"), secret) && !has(&left.join("disk.ext4"), secret));
    }
    assert_eq!(said(&host, &booted, "hostname").await, booted.as_str());
    said(&host, &booted, "echo mine > kept").await;

    let (one, from_saved) = started(&host).await;
    let (two, also) = started(&host).await;
    assert!(from_saved && also);
    let ask = "hostname; cat /etc/machine-id; cat /proc/sys/kernel/random/uuid; ls";
    let told = [said(&host, &booted, ask).await, said(&host, &one, ask).await, said(&host, &two, ask).await];
    for (at, id) in [&booted, &one, &two].into_iter().enumerate() {
        let [name, own @ ..] = &told[at].lines().collect::<Vec<_>>()[..] else { panic!("{told:?}") };
        assert_eq!(*name, id.as_str());
        for own in own {
            let others = told.iter().filter(|other| other.contains(own)).count();
            assert_eq!(others, 1, "{own}: {told:?}");
        }
    }
    // A stop and a start boots, on the disk that it had; a server that restarts goes on with all.
    said(&host, &one, "echo one > kept").await;
    host.engine.stop(&one, Duration::from_secs(5)).await.unwrap();
    assert!(!host.engine.start(&one).await.unwrap().from_saved);
    assert_eq!(said(&host, &one, "cat kept").await, "one");
    host.restart().await;
    assert_eq!((templates(&host), said(&host, &two, "echo on").await.as_str()), (vec![left], "on"));
    assert!(started(&host).await.1, "it was looked at anew, and is whole");

    // Another size has another; an image that goes takes its templates along.
    let mut spec = host.spec();
    spec.size.disk_mb = 128;
    host.engine.create(&spec).await.unwrap();
    assert!(!host.engine.start(&spec.id).await.unwrap().from_saved);
    eventually("a template for that size is left", async || templates(&host).len() == 2).await;
    for id in fs::read_dir(host.config.data_dir.join("vms")).unwrap() {
        host.engine.destroy(&id.unwrap().file_name().to_str().unwrap().parse().unwrap()).await.unwrap();
    }
    assert!(host.engine.image_release(&host.image).await.unwrap());
    assert_eq!(templates(&host), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_template_is_left_and_made_anew() {
    let mut host = Host::with(EngineName::Qemu).await;
    assert!(!started(&host).await.1);
    let first = template(&host).await;
    damage(&first.join("memory/ram"));
    let (id, from_saved) = started(&host).await;
    assert!(!from_saved, "it boots");
    assert_eq!(said(&host, &id, "echo up").await, "up");
    let second = template(&host).await;
    assert_eq!(first, second, "of the same name");
    assert!(started(&host).await.1);

    // What is damaged after a VM was made of it: QEMU doesn't take it, and the VM boots all the same.
    let spec: VmSpec = host.spec();
    host.engine.create(&spec).await.unwrap();
    fs::write(second.join("memory/state"), b"no state").unwrap();
    assert!(!host.engine.start(&spec.id).await.unwrap().from_saved);
    assert_eq!(said(&host, &spec.id, "echo up").await, "up");
    let third = template(&host).await;
    assert!(started(&host).await.1);

    // What a killed server left half-made, and what was cut, goes at the next start; without templates every VM boots.
    fs::remove_file(third.join("manifest.json")).unwrap();
    host.config.machines.as_mut().unwrap().templates = 0;
    host.restart().await;
    assert!(!third.exists(), "a ruin is removed");
    assert!(!started(&host).await.1);
    assert_eq!(templates(&host), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_saved_with_commands_and_deleted_files_open_and_its_copy_has_no_callers() {
    let host = Host::with(EngineName::Qemu).await;
    let spec = small(&host);
    let id = host.running_as(spec.clone()).await;
    background(&host, &id, TALK, "ready").await;
    let hold = "(exec 9<> gone; rm gone; echo held >&9; exec sleep 1234) > /dev/null 2>&1 & mkfifo go; echo";
    said(&host, &id, hold).await;
    let held = "cat /proc/$(pgrep -x sleep)/fd/9";
    eventually("the file is gone", async || said(&host, &id, held).await == "held").await;
    let agent = host.engine.dial(&id, Target::Agent).await.unwrap();
    let token = host.engine.agent_token(&id).await.unwrap();
    let mut stream = agent::exec(agent, &token, shell("echo begun; cat go; echo done")).await.unwrap();
    assert_eq!(harness::next_line(&mut stream).await, "begun");
    let _silent = host.engine.dial(&id, Target::Agent).await.unwrap();
    let snapshot = save(&host, &id).await;

    // In the copy nobody waits for the command any more; what is in the background goes on.
    let clone = restored(&host, &spec, &snapshot).await;
    eventually("the command is gone", async || said(&host, &clone, "pgrep -x cat || echo none").await == "none").await;
    assert_eq!((ask(&host, &clone).await.as_str(), said(&host, &clone, held).await.as_str()), ("echo\n", "held"));
    // That its connections are dead is no attempt of the guest's to reach anything.
    let denied = host.engine.denied(&clone).await.unwrap();
    assert_eq!(denied.total, 0, "{denied:?}");
    // It can be saved as any other, and ends in order.
    let again = save(&host, &clone).await;
    assert_eq!(host.engine.stop(&clone, Duration::from_secs(20)).await.unwrap().reason, EndReason::Requested);

    // To whoever called the source nothing has happened.
    said(&host, &id, "echo on > go").await;
    assert_eq!(harness::next_line(&mut stream).await, "on");
    assert_eq!(harness::next_line(&mut stream).await, "done");
    assert!(matches!(stream.next().await.unwrap(), ExecItem::Done(done) if done.exit_code == 0));
    assert_eq!(ask(&host, &id).await, "echo\n");
    for id in [id, clone] {
        host.engine.destroy(&id).await.unwrap();
    }

    // A state that QEMU doesn't take fails a restore, and the disk, which may have changed, isn't booted from.
    let failing = another(&spec);
    host.engine.create_from(&failing, &again).await.unwrap();
    let state = host.folder(&failing.id).join("memory/state");
    fs::remove_file(&state).unwrap();
    fs::write(&state, b"no state").unwrap();
    let Err(EngineError::Ended(report)) = host.engine.start(&failing.id).await else { panic!("it can't start") };
    assert_eq!(report.reason, EndReason::BootFailed, "{report:?}");
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&failing.id)), Vec::<String>::new());
    host.engine.destroy(&failing.id).await.unwrap();
}
