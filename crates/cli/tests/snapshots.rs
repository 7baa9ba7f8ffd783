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

use std::{
    fs,
    io::Write,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use disk::SmallDisk;
use harness::{Host, eventually, monitor_pid, sh, shell};
use tiffin_engine::{
    Engine, EngineError, LogKind, Observed, Target,
    agent::{self, AgentError, ExecItem},
};
use tiffin_types::{
    id::{SnapshotId, VmId},
    network::EgressPolicy,
    time::Timestamp,
    vm::{EndReason, VmSize, VmSpec},
};

const GRACE: Duration = Duration::from_secs(3);
/// The clock of a restored guest may be that far off, in milliseconds.
const CLOCK_MS: i64 = 500;

/// A small VM.
fn small(host: &Host) -> VmSpec {
    VmSpec { size: VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 }, ..host.spec() }
}

fn another(spec: &VmSpec) -> VmSpec {
    VmSpec { id: VmId::random(), ..spec.clone() }
}

async fn save(host: &Host, id: &VmId) -> SnapshotId {
    let snapshot = SnapshotId::random();
    host.engine.snapshot_save(id, &snapshot).await.unwrap();
    snapshot
}

/// A VM that goes on from the snapshot.
async fn restored(host: &Host, spec: &VmSpec, snapshot: &SnapshotId) -> VmId {
    let clone = another(spec);
    host.engine.create_from(&clone, snapshot).await.unwrap();
    host.engine.start(&clone.id).await.unwrap();
    clone.id
}

fn snapshot_folder(host: &Host, snapshot: &SnapshotId) -> PathBuf {
    host.config.data_dir.join("snapshots").join(snapshot.as_str())
}

/// Starts a program in the guest that outlives the command, and waits until it has written `ready`.
async fn background(host: &Host, id: &VmId, program: &str, ready: &str) {
    let begin = format!(
        "cat > /workspace/program.py <<'END'\n{program}\nEND\nsetsid python3 /workspace/program.py > /workspace/said 2>&1 < /dev/null &"
    );
    sh(&*host.engine, id, &begin).await;
    eventually("the program is ready", async || {
        sh(&*host.engine, id, "cat /workspace/said").await.stdout.contains(ready)
    })
    .await;
}

/// Asks the program by a signal, and gives the answer that it adds.
async fn ask(host: &Host, id: &VmId) -> String {
    let line = "cd /workspace; n=$(wc -l < said); pkill -USR1 -f '[p]rogram.py'; \
                until [ $(wc -l < said) -gt $n ]; do sleep 0.05; done; tail -n +$((n + 1)) said";
    let answer = sh(&*host.engine, id, line).await;
    assert_eq!(answer.done.exit_code, 0, "{answer:?}");
    answer.stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_goes_on_with_the_right_time_and_randomness_of_its_own() {
    let host = Host::new().await;
    let spec = small(&host);
    let source = host.running_as(spec.clone()).await;
    let program = "import os, signal, time\nheld = 'precious'\n\
                   def tell(*_): print(held, os.getpid(), int(time.time() * 1000), os.urandom(16).hex(), flush=True)\n\
                   signal.signal(signal.SIGUSR1, tell)\nprint('ready', flush=True)\nwhile True: time.sleep(1000)";
    background(&host, &source, program, "ready").await;
    let told: Vec<String> = ask(&host, &source).await.split(' ').map(str::to_owned).collect();
    let snapshot = save(&host, &source).await;
    // The snapshot is to be a while old.
    let saved = Timestamp::now().as_millis();
    eventually("two seconds pass", async || Timestamp::now().as_millis() - saved > 2000).await;

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
            assert!((before - CLOCK_MS..=after + CLOCK_MS).contains(&clock), "{before} {clock} {after}");
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

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_vm_has_names_and_a_secret_of_its_own() {
    let host = Host::new().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_files_are_of_one_moment_over_twenty_generations() {
    let host = Host::new().await;
    let spec = small(&host);
    let mut id = host.running_as(spec.clone()).await;
    sh(&*host.engine, &id, "head -c 8M /dev/urandom > /workspace/still; sha256sum /workspace/still > /workspace/sum")
        .await;
    background(&host, &id, WRITER, "ready").await;
    let mut count = 0;
    for generation in 0..20 {
        let snapshot = save(&host, &id).await;
        let disk = snapshot_folder(&host, &snapshot).join("disk.ext4");
        if generation % 5 == 0 {
            let checked = Command::new("e2fsck").args(["-fn"]).arg(&disk).output().unwrap();
            assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
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
type Damage = fn(&mut Vec<u8>);

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_not_as_it_was_saved_is_refused_by_name() {
    let mut host = Host::new().await;
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
    let damages: [(&str, Damage, &str); 6] = [
        ("disk.ext4", |bytes| bytes[70_000] ^= 1, "disk.ext4 has changed"),
        ("disk.ext4", |bytes| bytes.truncate(1 << 20), "disk.ext4 has another length"),
        ("memory/pages.img", |bytes| bytes[4096] ^= 0x80, "memory/pages.img has changed"),
        ("memory/checkpoint.img", |bytes| bytes.truncate(bytes.len() - 1), "memory/checkpoint.img has another length"),
        ("manifest.json", |bytes| bytes.truncate(200), "its manifest can't be read"),
        (
            "manifest.json",
            |bytes| {
                let at = bytes.len() - 9;
                bytes[at] ^= 1;
            },
            "damaged",
        ),
    ];
    for (file, damage, expected) in damages {
        let path = folder.join(file);
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let why = refusal(&host, &snapshot).await;
        assert!(why.contains("the snapshot is damaged") && why.contains(expected), "{file}: {why}");
        fs::write(&path, whole).unwrap();
    }
    fs::rename(folder.join("memory/pages.img"), folder.join("away")).unwrap();
    assert!(refusal(&host, &snapshot).await.contains("memory/pages.img is missing"));
    fs::rename(folder.join("away"), folder.join("memory/pages.img")).unwrap();
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
    let runsc = host.config.runsc.clone();
    host.config.runsc = engine_that(&host, "case $1 in --version) echo runsc version release-20990101.0; exit;; esac");
    host.restart().await;
    let why = refusal(&host, &snapshot).await;
    assert!(why.contains("another release of the engine") && why.contains("20990101"), "{why}");
    host.config.runsc = runsc;
    host.restart().await;
    // As it was saved, it is taken up, by a server that never saw it made.
    let id = restored(&host, &spec, &snapshot).await;
    assert_eq!(sh(&*host.engine, &id, "echo whole").await.stdout, "whole\n");
    host.engine.destroy(&id).await.unwrap();
}

/// Does what it was asked for.
fn real_engine() -> String {
    format!("{} \"$@\"", harness::required("TIFFIN_RUNSC").display())
}

/// `runsc`, but for what `first` does before it.
fn engine_that(host: &Host, first: &str) -> Option<PathBuf> {
    let path = host.config.data_dir.join("runsc-that");
    let real = harness::required("TIFFIN_RUNSC");
    // A program that is being run can't be written.
    let _ = fs::remove_file(&path);
    fs::write(&path, format!("#!/bin/sh\n{first}\nexec {} \"$@\"\n", real.display())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Some(path)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_fails_is_named_and_leaves_nothing() {
    let mut host = Host::new().await;
    let spec = small(&host);
    let source = host.running_as(spec.clone()).await;
    let snapshot = save(&host, &source).await;
    host.engine.destroy(&source).await.unwrap();
    for (first, reason) in [
        ("case \"$*\" in *restore*) echo no such luck >&2; exit 7;; esac", EndReason::BootFailed),
        ("case \"$*\" in *restore*) exec sleep 1000;; esac", EndReason::BootTimeout),
    ] {
        host.config.runsc = engine_that(&host, first);
        host.config.boot_timeout = Duration::from_secs(3);
        host.restart().await;
        let clone = another(&spec);
        host.engine.create_from(&clone, &snapshot).await.unwrap();
        let Err(EngineError::Ended(report)) = host.engine.start(&clone.id).await else { panic!("it can't start") };
        assert_eq!(report.reason, reason, "{report:?}");
        assert_eq!(harness::leftovers(&host, std::slice::from_ref(&clone.id)), Vec::<String>::new());
        assert!(
            !host.folder(&clone.id).join("memory").exists(),
            "it isn't tried again on a disk that may have changed"
        );
        host.engine.destroy(&clone.id).await.unwrap();
    }
    assert_eq!(host.engine.snapshot_list().await.unwrap(), [snapshot]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_with_commands_or_deleted_files_open_is_not_saved_and_not_disturbed() {
    let host = Host::new().await;
    let spec = small(&host);
    let id = host.running_as(spec.clone()).await;
    let dialled = host.engine.dial(&id, Target::Agent).await.unwrap();
    let token = host.engine.agent_token(&id).await.unwrap();
    // It waits for a file, so that nothing but the connection of its own is open.
    let line = "echo begun; until [ -e /workspace/go ]; do sleep 0.1; done; echo done";
    let mut stream = agent::exec(dialled, &token, shell(line)).await.unwrap();
    assert_eq!(harness::next_line(&mut stream).await, "begun");
    let refused = host.engine.snapshot_save(&id, &SnapshotId::random()).await;
    assert!(matches!(refused, Err(EngineError::WrongState(state)) if state.contains("in touch")), "{refused:?}");
    sh(&*host.engine, &id, "touch /workspace/go").await;
    assert_eq!(harness::next_line(&mut stream).await, "done", "it goes on undisturbed");
    assert!(matches!(stream.next().await.unwrap(), ExecItem::Done(done) if done.exit_code == 0));
    drop(stream);
    let snapshot = save(&host, &id).await;

    // What talks within the VM is no hindrance, a deleted file that is open is one.
    let talk = "import os, socket, signal, threading\nserver = socket.create_server(('127.0.0.1', 8000))\n\
                def serve():\n one, _ = server.accept()\n while (word := one.recv(10)): one.send(word)\n\
                threading.Thread(target=serve, daemon=True).start()\n\
                client = socket.create_connection(('127.0.0.1', 8000))\n\
                def tell(*_): client.send(b'echo'); print(client.recv(10).decode(), flush=True)\n\
                signal.signal(signal.SIGUSR1, tell)\nprint('ready', flush=True)\nwhile True: signal.pause()";
    background(&host, &id, talk, "ready").await;
    let talking = save(&host, &id).await;
    let clone = restored(&host, &spec, &talking).await;
    for one in [&id, &clone] {
        assert_eq!(ask(&host, one).await, "echo\n");
    }
    sh(&*host.engine, &id, "(exec 9> /workspace/gone; rm /workspace/gone; exec sleep 1000) > /dev/null 2>&1 &").await;
    eventually("the file is gone", async || {
        sh(&*host.engine, &id, "ls /workspace").await.stdout.lines().all(|name| name != "gone")
    })
    .await;
    let refused = host.engine.snapshot_save(&id, &SnapshotId::random()).await;
    assert!(matches!(refused, Err(EngineError::WrongState(state)) if state.contains("deleted file")), "{refused:?}");
    assert_eq!(ask(&host, &id).await, "echo\n", "it goes on");
    sh(&*host.engine, &id, "pkill sleep").await;
    let last = save(&host, &id).await;
    let mut expected = vec![snapshot, talking, last];
    expected.sort();
    assert_eq!(host.engine.snapshot_list().await.unwrap(), expected, "nothing is left of what failed");
    for id in [id, clone] {
        host.engine.destroy(&id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_whose_server_is_gone_ends_and_is_no_snapshot() {
    let mut host = Host::new().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_is_killed_while_it_saves_leaves_a_vm_that_starts_again() {
    let mut host = Host::new().await;
    // A save that stays in the middle: with the guest paused and the checkpoint begun.
    host.config.runsc = engine_that(&host, "case \"$*\" in *checkpoint*) exec sleep 1000;; esac");
    host.restart().await;
    let id = host.running_as(small(&host)).await;
    sh(&*host.engine, &id, "echo kept > /workspace/file; sync").await;
    let snapshot = SnapshotId::random();
    let saving = {
        let (engine, id, snapshot) = (host.engine.clone(), id.clone(), snapshot.clone());
        tokio::task::spawn(async move { engine.snapshot_save(&id, &snapshot).await })
    };
    eventually("the save is under way", async || snapshot_folder(&host, &snapshot).join("memory").exists()).await;
    let pid = monitor_pid(&host.folder(&id)).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert!(saving.await.unwrap().is_err());
    assert_eq!(host.engine.snapshot_list().await.unwrap(), []);
    assert!(!snapshot_folder(&host, &snapshot).exists());
    let ended = tokio::time::timeout(Duration::from_secs(20), host.engine.next_end()).await.unwrap();
    assert_eq!((ended.id, ended.report.reason), (id.clone(), EndReason::MonitorLost));
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&id)), Vec::<String>::new());
    host.engine.start(&id).await.unwrap();
    assert_eq!(sh(&*host.engine, &id, "cat /workspace/file").await.stdout, "kept\n");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_pause_failed_after_it_took_effect_goes_on() {
    let mut host = Host::new().await;
    host.config.runsc = engine_that(&host, &format!("case \"$*\" in *' pause '*) {}; exit 1;; esac", real_engine()));
    host.restart().await;
    let id = host.running_as(small(&host)).await;
    hide_socket(&host, &id);
    assert!(host.engine.pause(&id).await.is_err());
    assert_eq!(host.engine.observe(&id).await, Observed::Running);
    assert_eq!(sh(&*host.engine, &id, "echo alive").await.stdout, "alive\n");
    assert!(host.engine.snapshot_save(&id, &SnapshotId::random()).await.is_err());
    assert_eq!(sh(&*host.engine, &id, "echo alive").await.stdout, "alive\n");
    host.engine.destroy(&id).await.unwrap();
}

/// Gives the sandbox's socket another name, which the engine's tool knows.
fn hide_socket(host: &Host, id: &VmId) {
    let pid = monitor_pid(&host.folder(id)).unwrap();
    let state = PathBuf::from(format!("/proc/{pid}/root{}/mnt/runsc", host.folder(id).display()));
    fs::rename(state.join("runsc-vm.sock"), state.join("another.sock")).unwrap();
    let file = state.join("vm_sandbox:vm.state");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("runsc-vm.sock"));
    fs::write(&file, text.replace("runsc-vm.sock", "another.sock")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_socket_is_not_found_is_saved_by_the_tool_alone() {
    let mut host = Host::new().await;
    let paused = host.config.data_dir.join("paused");
    host.config.runsc = engine_that(&host, &format!("case \"$*\" in *' pause '*) touch {};; esac", paused.display()));
    host.restart().await;
    let spec = small(&host);
    let id = host.running_as(spec.clone()).await;
    sh(&*host.engine, &id, "echo kept > /workspace/file").await;
    save(&host, &id).await;
    assert!(!paused.exists(), "the socket is there: the tool isn't needed");
    hide_socket(&host, &id);
    let snapshot = save(&host, &id).await;
    assert!(paused.exists());
    assert_eq!(sh(&*host.engine, &id, "echo alive").await.stdout, "alive\n");
    let clone = restored(&host, &spec, &snapshot).await;
    assert_eq!(sh(&*host.engine, &clone, "cat /workspace/file").await.stdout, "kept\n");
    for id in [id, clone] {
        host.engine.destroy(&id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_can_not_go_on_ends_and_does_not_seem_to_run() {
    let mut host = Host::new().await;
    let real = real_engine();
    let broken = format!("case \"$*\" in *' pause '*) {real}; exit 1;; *' resume '*) exit 1;; esac");
    host.config.runsc = engine_that(&host, &broken);
    host.restart().await;
    let id = host.running_as(small(&host)).await;
    hide_socket(&host, &id);
    assert!(host.engine.pause(&id).await.is_err());
    let ended = tokio::time::timeout(Duration::from_secs(60), host.engine.next_end()).await.unwrap();
    assert_eq!((ended.id, ended.report.reason), (id.clone(), EndReason::EngineLost));
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_a_save_to_give_up_and_the_guest_ends_in_order() {
    let mut host = Host::new().await;
    let go = host.config.data_dir.join("go");
    let holds = format!("case \"$*\" in *checkpoint*) while [ ! -e {} ]; do sleep 0.05; done;; esac", go.display());
    host.config.runsc = engine_that(&host, &holds);
    host.restart().await;
    let id = host.running_as(small(&host)).await;
    let snapshot = SnapshotId::random();
    let saving = {
        let (engine, id, snapshot) = (host.engine.clone(), id.clone(), snapshot.clone());
        tokio::task::spawn(async move { engine.snapshot_save(&id, &snapshot).await })
    };
    eventually("the save is under way", async || snapshot_folder(&host, &snapshot).join("memory").exists()).await;
    let stopping = {
        let (engine, id) = (host.engine.clone(), id.clone());
        tokio::task::spawn(async move { engine.stop(&id, Duration::from_secs(60)).await })
    };
    // The monitor answers beside both.
    assert_eq!(host.engine.observe(&id).await, Observed::Running);
    fs::write(&go, "").unwrap();
    assert_eq!(stopping.await.unwrap().unwrap().reason, EndReason::Requested);
    let _ = saving.await.unwrap();
    let log = engine_log(&host, &id).await;
    assert!(!log.contains("killed"), "{log}");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_host_disk_fails_the_save_and_not_the_vm() {
    let disk = SmallDisk::new(1024);
    let mut host = Host::new().await;
    host.config.data_dir = disk.at().join("data");
    harness::link_image(&host.config.data_dir);
    host.config.min_free_disk_mb = 1;
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
async fn agents_stay_as_long_as_somebody_has_one_in_memory() {
    let mut host = Host::new().await;
    let spec = small(&host);
    let source = host.running_as(spec.clone()).await;
    let snapshot = save(&host, &source).await;
    host.engine.stop(&source, GRACE).await.unwrap();
    let agents = |host: &Host| fs::read_dir(host.config.data_dir.join("agent")).unwrap().count();
    // The same program, but for what no program looks at.
    let newer = host.config.data_dir.join("newer-agent");
    let mut program = fs::read(&host.config.agent).unwrap();
    program.push(0);
    fs::write(&newer, program).unwrap();
    fs::set_permissions(&newer, fs::Permissions::from_mode(0o755)).unwrap();
    host.config.agent = newer;
    host.restart().await;
    assert_eq!(agents(&host), 2, "the snapshot's and the new one");
    let clone = restored(&host, &spec, &snapshot).await;
    host.engine.snapshot_remove(&snapshot).await.unwrap();
    host.restart().await;
    assert_eq!(agents(&host), 2, "the clone still runs it");
    assert_eq!(sh(&*host.engine, &clone, "echo old").await.stdout, "old\n");
    host.engine.stop(&clone, GRACE).await.unwrap();
    host.restart().await;
    assert_eq!(agents(&host), 1, "nobody needs it any more");
    host.engine.start(&clone).await.unwrap();
    assert_eq!(sh(&*host.engine, &clone, "echo new").await.stdout, "new\n");
    for id in [source, clone] {
        host.engine.destroy(&id).await.unwrap();
    }
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

/// Where a test keeps what it needs to see of a log.
async fn engine_log(host: &Host, id: &VmId) -> String {
    host.engine.log_tail(id, LogKind::Engine, 100).await.unwrap().lines.join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_vm_has_the_network_of_its_own_policy() {
    let host = Host::new().await;
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
    assert!(link(&closed), "{}", engine_log(&host, &closed).await);
    for id in [&source, &closed, &opened] {
        host.engine.destroy(id).await.unwrap();
    }
    assert_eq!(harness::leftovers(&host, &[source, closed, opened]), Vec::<String>::new());
}
