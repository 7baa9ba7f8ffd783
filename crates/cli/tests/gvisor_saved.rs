//! What gVisor alone has of saving: what it can't save, and a tool and a socket that fail it.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/saved.rs"]
mod saved;

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use harness::{Host, eventually, monitor_pid, sh, shell};
use saved::{TALK, another, ask, background, restored, save, small, snapshot_folder};
use tiffin_engine::{
    Engine, EngineError, LogKind, Observed, Target,
    agent::{self, ExecItem},
};
use tiffin_types::{
    id::{SnapshotId, VmId},
    vm::EndReason,
};

const GRACE: Duration = Duration::from_secs(3);

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
    background(&host, &id, TALK, "ready").await;
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
    let log = host.engine.log_tail(&id, LogKind::Engine, 100).await.unwrap().lines.join("\n");
    assert!(!log.contains("killed"), "{log}");
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
