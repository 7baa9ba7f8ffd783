//! Saved VMs, for real: what lives through it, what is its own afterwards, what is refused, and what is left when
//! somebody is killed in the middle.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/disk.rs"]
mod disk;
#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/saved.rs"]
mod saved;

use std::{
    fs,
    io::Write,
    os::unix::{
        fs::{FileExt, PermissionsExt},
        net::UnixStream,
    },
    path::Path,
    process::Command,
    time::Duration,
};

use disk::SmallDisk;
use harness::{Host, eventually, on_both_engines, sh};
use saved::{another, ask, background, restored, save, small, snapshot_folder};
use tiffin_engine::{
    Engine, EngineError, Observed, Target,
    agent::{self, AgentError},
};
use tiffin_types::{
    id::{SnapshotId, VmId},
    network::EgressPolicy,
    time::Timestamp,
    vm::{EngineName, VmSpec},
};

on_both_engines!(
    what_ran_goes_on_with_the_right_time_and_randomness_of_its_own,
    a_restored_vm_has_names_and_a_secret_of_its_own,
    memory_and_files_are_of_one_moment_over_generations,
    a_snapshot_that_is_not_as_it_was_saved_is_refused_by_name,
    a_save_whose_server_is_gone_ends_and_is_no_snapshot,
    a_full_host_disk_fails_the_save_and_not_the_vm,
    a_restored_vm_has_the_network_of_its_own_policy,
);

/// How far the clock of a restored guest may be off, and how old its snapshot is at least, in milliseconds. An emulated
/// guest takes its time until it sets what it was told.
fn clock_ms(engine: EngineName) -> (i64, i64) {
    if engine == EngineName::Qemu { (4500, 7000) } else { (500, 2000) }
}

async fn what_ran_goes_on_with_the_right_time_and_randomness_of_its_own(engine: EngineName) {
    let host = Host::with(engine).await;
    let spec = small(&host);
    let source = host.running_as(spec.clone()).await;
    let program = "import os, signal, time\nheld = 'precious'\n\
                   def tell(*_): print(held, os.getpid(), int(time.time() * 1000), os.urandom(16).hex(), flush=True)\n\
                   signal.signal(signal.SIGUSR1, tell)\nprint('ready', flush=True)\nwhile True: time.sleep(1000)";
    background(&host, &source, program, "ready").await;
    let told: Vec<String> = ask(&host, &source).await.split(' ').map(str::to_owned).collect();
    let snapshot = save(&host, &source).await;
    // The snapshot is to be a while old.
    let (off, old) = clock_ms(engine);
    let saved = Timestamp::now().as_millis();
    eventually("the snapshot is old", async || Timestamp::now().as_millis() - saved > old).await;

    let clones = [restored(&host, &spec, &snapshot).await, restored(&host, &spec, &snapshot).await];
    let mut random = vec![told[3].trim().to_owned()];
    for id in clones.iter().chain([&source]) {
        let before = Timestamp::now().as_millis();
        let answer = ask(&host, id).await;
        let new = sh(&*host.engine, id, "date +%s%3N; head -c 16 /dev/urandom | od -An -tx1").await.stdout;
        let after = Timestamp::now().as_millis();
        let words: Vec<&str> = answer.trim().split(' ').collect();
        assert_eq!(words[..2], [told[0].as_str(), told[1].as_str()], "the same process, with its memory");
        let (date, urandom) = new.split_once('\n').unwrap();
        for clock in [words[2], date] {
            let clock: i64 = clock.parse().unwrap();
            assert!((before - off..=after + off).contains(&clock), "{before} {clock} {after}");
        }
        random.extend([words[3].to_owned(), urandom.to_owned()]);
    }
    let count = random.len();
    random.sort();
    random.dedup();
    assert_eq!(random.len(), count, "no randomness twice: {random:?}");
    for id in clones.iter().chain([&source]) {
        host.engine.destroy(id).await.unwrap();
    }
}

async fn a_restored_vm_has_names_and_a_secret_of_its_own(engine: EngineName) {
    let host = Host::with(engine).await;
    let spec = small(&host);
    let source = host.running_as(spec.clone()).await;
    let snapshot = save(&host, &source).await;
    let clones = [restored(&host, &spec, &snapshot).await, restored(&host, &spec, &snapshot).await];
    let all: Vec<&VmId> = clones.iter().chain([&source]).collect();
    let mut machines = Vec::new();
    for id in &all {
        let names =
            sh(&*host.engine, id, "hostname; cat /etc/hostname /etc/machine-id; tail -1 /etc/hosts").await.stdout;
        let lines: Vec<&str> = names.lines().collect();
        assert_eq!(lines[..2], [id.as_str(), id.as_str()], "{names}");
        assert!(lines.last().unwrap().ends_with(id.as_str()), "{names}");
        machines.push(lines[2].to_owned());
        for other in &all {
            let token = host.engine.agent_token(other).await.unwrap();
            let dialled = host.engine.dial(id, Target::Agent).await.unwrap();
            let pong = agent::ping(dialled, &token, Duration::from_secs(5)).await;
            match pong {
                Ok(_) => assert_eq!(id, other),
                Err(AgentError::Refused(_)) => assert_ne!(id, other),
                Err(error) => panic!("{error}"),
            }
        }
    }
    machines.sort();
    machines.dedup();
    assert_eq!(machines.len(), 3, "{machines:?}");
    for id in all {
        host.engine.destroy(id).await.unwrap();
    }
    assert_eq!(harness::leftovers(&host, &[source, clones[0].clone(), clones[1].clone()]), Vec::<String>::new());
}

/// Writes without end, by write(2) and through a mapping, and knows what it has written: its memory and its files agree
/// exactly when both are of one moment.
const WRITER: &str = "import hashlib, mmap, os, signal, time\n\
    asked = False\n\
    def ask(*_):\n global asked; asked = True\n\
    signal.signal(signal.SIGUSR1, ask)\n\
    log = open('/workspace/log', 'w+b', buffering=0)\n\
    pages = open('/workspace/pages', 'w+b'); pages.truncate(1 << 20)\n\
    view = mmap.mmap(pages.fileno(), 1 << 20)\n\
    written, shown, n = hashlib.sha256(), hashlib.sha256(), 0\n\
    while True:\n\
    \x20 n += 1; time.sleep(0.002)\n\
    \x20 block = hashlib.sha256(str(n).encode()).digest() * 64\n\
    \x20 log.write(block); written.update(block)\n\
    \x20 at = (n * 4096) % (1 << 20); view[at:at + 2048] = block\n\
    \x20 if n % 64 == 0: os.ftruncate(log.fileno(), 0); log.seek(0); written = hashlib.sha256(); os.rename('/workspace/pages', '/workspace/moved'); os.rename('/workspace/moved', '/workspace/pages')\n\
    \x20 if n == 30: print('ready', flush=True)\n\
    \x20 if asked:\n\
    \x20  asked = False\n\
    \x20  same = hashlib.sha256(open('/workspace/log', 'rb').read()).digest() == written.digest()\n\
    \x20  mapped = open('/workspace/pages', 'rb').read() == view[:]\n\
    \x20  last = view[at:at + 2048] == block\n\
    \x20  print('same' if same and mapped and last else f'differ {same} {mapped} {last}', n, flush=True)";

/// gVisor's guests have their disk mounted by the host, which settles it; a machine's is as if its power had been cut.
fn check_disk(engine: EngineName, disk: &Path) {
    let copy = tempfile::NamedTempFile::new().unwrap();
    fs::copy(disk, copy.path()).unwrap();
    let (how, fine) = if engine == EngineName::Qemu { ("-fp", 0..=1) } else { ("-fn", 0..=0) };
    let checked = Command::new("e2fsck").arg(how).arg(copy.path()).output().unwrap();
    assert!(fine.contains(&checked.status.code().unwrap()), "{}", String::from_utf8_lossy(&checked.stdout));
}

async fn memory_and_files_are_of_one_moment_over_generations(engine: EngineName) {
    let host = Host::with(engine).await;
    let spec = small(&host);
    let mut id = host.running_as(spec.clone()).await;
    sh(&*host.engine, &id, "head -c 8M /dev/urandom > /workspace/still; sha256sum /workspace/still > /workspace/sum")
        .await;
    background(&host, &id, WRITER, "ready").await;
    let mut count = 0;
    for generation in 0..if engine == EngineName::Qemu { 3 } else { 20 } {
        let snapshot = save(&host, &id).await;
        if generation % 5 == 0 {
            check_disk(engine, &snapshot_folder(&host, &snapshot).join("disk.ext4"));
        }
        let next = restored(&host, &spec, &snapshot).await;
        host.engine.snapshot_remove(&snapshot).await.unwrap();
        host.engine.destroy(&id).await.unwrap();
        id = next;
        let answer = ask(&host, &id).await;
        let (same, n) = answer.trim().split_once(' ').unwrap();
        assert_eq!(same, "same", "generation {generation}: {answer}");
        let n: u64 = n.parse().unwrap();
        assert!(n > count, "it goes on: {n} after {count}");
        count = n;
    }
    let sum = sh(&*host.engine, &id, "sha256sum --check --quiet /workspace/sum && echo whole").await;
    assert_eq!(sum.stdout, "whole\n", "{sum:?}");
    host.engine.destroy(&id).await.unwrap();
    assert_eq!(harness::leftovers(&host, &[id]), Vec::<String>::new());
}

/// What happens to a file.
type Damage = fn(&fs::File);

fn flip(file: &fs::File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn shorten(file: &fs::File, by: u64) {
    file.set_len(file.metadata().unwrap().len() - by).unwrap();
}

/// The memory of a saved guest, and the rest of what ran.
fn memory_files(engine: EngineName) -> [&'static str; 2] {
    match engine {
        EngineName::Qemu => ["memory/ram", "memory/state"],
        _ => ["memory/pages.img", "memory/checkpoint.img"],
    }
}

/// Gives the host another release of the engine, which is asked for nothing but its name.
fn replace_engine(host: &mut Host) {
    let path = host.config.data_dir.join("another");
    let says = match host.config.engine {
        EngineName::Qemu => "QEMU emulator version 99.20990101",
        _ => "runsc version release-20990101.0",
    };
    fs::write(&path, format!("#!/bin/sh\necho {says}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    match &mut host.config.machines {
        Some(machines) => machines.qemu = path,
        None => host.config.runsc = Some(path),
    }
}

async fn a_snapshot_that_is_not_as_it_was_saved_is_refused_by_name(engine: EngineName) {
    let mut host = Host::with(engine).await;
    let spec = small(&host);
    let source = host.running_as(spec.clone()).await;
    let snapshot = save(&host, &source).await;
    host.engine.destroy(&source).await.unwrap();
    let folder = snapshot_folder(&host, &snapshot);
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    let refusal = async |host: &Host, snapshot: &SnapshotId| {
        let clone = another(&spec);
        let refused = host.engine.create_from(&clone, snapshot).await;
        assert_eq!(host.engine.observe(&clone.id).await, Observed::Absent);
        assert!(!host.folder(&clone.id).exists());
        match refused {
            Err(EngineError::BadSnapshot(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    let [memory, state] = memory_files(engine);
    let damages: [(&str, Damage, &str); 6] = [
        ("disk.ext4", |file| flip(file, 70_000), "disk.ext4 has changed"),
        ("disk.ext4", |file| shorten(file, 1 << 20), "disk.ext4 has another length"),
        (memory, |file| flip(file, 4096), "has changed"),
        (state, |file| shorten(file, 1), "has another length"),
        ("manifest.json", |file| file.set_len(200).unwrap(), "its manifest can't be read"),
        ("manifest.json", |file| flip(file, file.metadata().unwrap().len() - 9), "damaged"),
    ];
    let (path, away) = (|file: &str| folder.join(file), folder.join("away"));
    for (file, damage, expected) in damages {
        fs::rename(path(file), &away).unwrap();
        let copied = Command::new("cp").args(["-a", "--sparse=always"]).arg(&away).arg(path(file)).status().unwrap();
        assert!(copied.success());
        damage(&fs::File::options().read(true).write(true).open(path(file)).unwrap());
        let why = refusal(&host, &snapshot).await;
        assert!(why.contains("the snapshot is damaged") && why.contains(expected), "{file}: {why}");
        assert!(why.contains(file) || file == "manifest.json", "{file}: {why}");
        fs::rename(&away, path(file)).unwrap();
    }
    fs::rename(path(memory), &away).unwrap();
    assert!(refusal(&host, &snapshot).await.contains(&format!("{memory} is missing")));
    fs::rename(&away, path(memory)).unwrap();
    // Under another name it would be what it isn't.
    let other = SnapshotId::random();
    assert!(Command::new("cp").arg("-a").arg(&folder).arg(snapshot_folder(&host, &other)).status().unwrap().success());
    assert!(refusal(&host, &other).await.contains("not what its name says"));
    host.engine.snapshot_remove(&other).await.unwrap();

    let key = host.config.data_dir.join("snapshot.key");
    let own = fs::read(&key).unwrap();
    fs::write(&key, "ab".repeat(32)).unwrap();
    host.restart().await;
    assert!(refusal(&host, &snapshot).await.contains("another host"));
    fs::write(&key, own).unwrap();
    let (runsc, machines) = (host.config.runsc.clone(), host.config.machines.clone());
    replace_engine(&mut host);
    host.restart().await;
    let why = refusal(&host, &snapshot).await;
    assert!(why.contains("another release of the engine") && why.contains("20990101"), "{why}");
    (host.config.runsc, host.config.machines) = (runsc, machines);
    host.restart().await;
    // As it was saved, it is taken up, by a server that never saw it made.
    let id = restored(&host, &spec, &snapshot).await;
    assert_eq!(sh(&*host.engine, &id, "echo whole").await.stdout, "whole\n");
    host.engine.destroy(&id).await.unwrap();
}

async fn a_save_whose_server_is_gone_ends_and_is_no_snapshot(engine: EngineName) {
    let mut host = Host::with(engine).await;
    let id = host.running_as(small(&host)).await;
    let ruin = SnapshotId::random();
    let folder = snapshot_folder(&host, &ruin);
    fs::create_dir(&folder).unwrap();
    // As a server that is killed the moment after it asked.
    let mut monitor = UnixStream::connect(host.folder(&id).join("monitor.sock")).unwrap();
    writeln!(monitor, "{}", serde_json::json!({ "ask": "save", "into": folder })).unwrap();
    eventually("the monitor saves", async || folder.join("memory").exists()).await;
    drop(monitor);
    assert_eq!(host.engine.snapshot_list().await.unwrap(), []);
    let seen = host.restart().await;
    assert_eq!(seen, [(id.clone(), Observed::Running)]);
    assert!(!folder.exists(), "the ruin is cleared");
    assert_eq!(sh(&*host.engine, &id, "echo alive > /workspace/file; cat /workspace/file").await.stdout, "alive\n");
    let snapshot = save(&host, &id).await;
    assert_eq!(host.engine.snapshot_list().await.unwrap(), [snapshot]);
    host.engine.destroy(&id).await.unwrap();
}

async fn a_full_host_disk_fails_the_save_and_not_the_vm(engine: EngineName) {
    let disk = SmallDisk::new(1024);
    let mut host = Host::with(engine).await;
    host.config.data_dir = disk.at().join("data");
    harness::link_image(&host.config.data_dir);
    host.config.min_free_disk_mb = 1;
    if let Some(machines) = &mut host.config.machines {
        // One would take of the space that is measured out here.
        machines.templates = 0;
    }
    host.restart().await;
    let id = host.running_as(small(&host)).await;
    let fill = "head -c 24M /dev/urandom > /workspace/much; head -c 24M /dev/urandom > /dev/shm/much; sync";
    sh(&*host.engine, &id, fill).await;
    for left in [4, 30] {
        disk.leave(left);
        let full = host.engine.snapshot_save(&id, &SnapshotId::random()).await;
        assert!(matches!(full, Err(EngineError::NoCapacity(_))), "{left}: {full:?}");
        assert_eq!(host.engine.observe(&id).await, Observed::Running);
        assert_eq!(fs::read_dir(host.config.data_dir.join("snapshots")).unwrap().count(), 0, "nothing is left");
        assert_eq!(sh(&*host.engine, &id, "echo on").await.stdout, "on\n");
    }
    disk.leave(300);
    let snapshot = save(&host, &id).await;
    disk.leave(10);
    let full = host.engine.create_from(&another(&small(&host)), &snapshot).await;
    assert!(matches!(full, Err(EngineError::NoCapacity(_))), "{full:?}");
    assert_eq!(fs::read_dir(host.config.data_dir.join("vms")).unwrap().count(), 1, "nothing is left");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_saves_and_restores_run_at_once() {
    let host = Host::new().await;
    let spec = small(&host);
    let sources = [host.running_as(spec.clone()).await, host.running_as(another(&spec)).await];
    let saving = sources.iter().flat_map(|id| [id; 2]).enumerate().filter(|(n, _)| n % 2 == 0).map(|(_, id)| {
        let (engine, id, into) = (host.engine.clone(), id.clone(), SnapshotId::random());
        tokio::task::spawn(async move { engine.snapshot_save(&id, &into).await.map(|_| into) })
    });
    let mut snapshots = Vec::new();
    for save in saving.collect::<Vec<_>>() {
        snapshots.push(save.await.unwrap().unwrap());
    }
    let starting = snapshots.iter().flat_map(|snapshot| [snapshot; 3]).map(|snapshot| {
        let (engine, clone, snapshot) = (host.engine.clone(), another(&spec), snapshot.clone());
        tokio::task::spawn(async move {
            engine.create_from(&clone, &snapshot).await?;
            engine.start(&clone.id).await.map(|_| clone.id)
        })
    });
    let mut clones = Vec::new();
    for start in starting.collect::<Vec<_>>() {
        clones.push(start.await.unwrap().unwrap());
    }
    for id in clones.iter().chain(&sources) {
        assert_eq!(sh(&*host.engine, id, "hostname").await.stdout.trim(), id.as_str());
        host.engine.destroy(id).await.unwrap();
    }
    assert_eq!(harness::leftovers(&host, &clones), Vec::<String>::new());
}

async fn a_restored_vm_has_the_network_of_its_own_policy(engine: EngineName) {
    let host = Host::with(engine).await;
    let open = EgressPolicy { outbound_internet: true, allow: vec!["192.0.2.0/24".parse().unwrap()] };
    let spec = VmSpec { egress: open.clone(), ..small(&host) };
    let source = host.running_as(spec.clone()).await;
    let snapshot = save(&host, &source).await;
    let resolvers = "cat /etc/resolv.conf";
    assert!(sh(&*host.engine, &source, resolvers).await.stdout.contains("172.16.0.1"));
    let closed = restored(&host, &VmSpec { egress: EgressPolicy::default(), ..spec.clone() }, &snapshot).await;
    let opened = restored(&host, &spec, &snapshot).await;
    assert!(!sh(&*host.engine, &closed, resolvers).await.stdout.contains("nameserver"));
    assert!(sh(&*host.engine, &opened, resolvers).await.stdout.contains("172.16.0.1"));
    let link = |id: &VmId| Path::new("/sys/class/net").join(tiffin_engine::host::network::host_link(id)).exists();
    assert!(link(&opened) && !link(&closed));
    host.engine.set_egress(&closed, &open).await.unwrap();
    assert!(sh(&*host.engine, &closed, resolvers).await.stdout.contains("172.16.0.1"));
    assert!(link(&closed));
    for id in [&source, &closed, &opened] {
        host.engine.destroy(id).await.unwrap();
    }
    assert_eq!(harness::leftovers(&host, &[source, closed, opened]), Vec::<String>::new());
}
