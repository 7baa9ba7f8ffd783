//! What every engine must do, whichever it is. One function per promise; `main.rs` runs each on each engine.

use std::{sync::Arc, time::Duration};

use tiffin_engine::{Engine, EngineError, LogKind, Observed, Target, agent};
use tiffin_protocol::AGENT_PORT;
use tiffin_types::{
    id::{SnapshotId, VmId},
    network::EgressPolicy,
    program::Program,
    vm::{EndReason, EndReport, VmSize, VmSpec},
};

use crate::harness::{eventually, sh};

/// An engine under test.
#[async_trait::async_trait]
pub(crate) trait Subject: Send {
    fn engine(&self) -> Arc<dyn Engine>;
    fn spec(&self) -> VmSpec;
    /// A program for a VM of this engine.
    fn program(&self, does: Does) -> Program;
    /// A new server over the same host: what its engine's `adopt` saw.
    async fn restart(&mut self) -> Vec<(VmId, Observed)>;
    /// Kills what runs the VM, from outside and without asking anyone.
    async fn kill_engine_process(&self, id: &VmId);
}

/// What a program does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Does {
    /// It ends at once with that code.
    Exit(i32),
    /// It runs until it is stopped.
    Stay,
    /// It isn't there.
    Miss,
}

const GRACE: Duration = Duration::from_secs(3);

async fn created(subject: &dyn Subject) -> VmId {
    let spec = subject.spec();
    subject.engine().create(&spec).await.unwrap();
    spec.id
}

async fn running(subject: &dyn Subject) -> VmId {
    let id = created(subject).await;
    subject.engine().start(&id).await.unwrap();
    id
}

async fn next_end(engine: &dyn Engine) -> tiffin_engine::Ended {
    tokio::time::timeout(Duration::from_secs(20), engine.next_end()).await.expect("an end is told")
}

async fn says_hello(engine: &dyn Engine, id: &VmId) {
    assert_eq!(sh(engine, id, "echo hello").await.stdout, "hello\n");
}

/// One VM, from nothing to nothing.
pub(crate) async fn a_whole_life(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let spec = subject.spec();
    let id = spec.id.clone();
    assert_eq!(engine.observe(&id).await, Observed::Absent);
    engine.create(&spec).await.unwrap();
    engine.create(&spec).await.expect("creating what exists, as it is, is fine");
    assert_eq!(engine.observe(&id).await, Observed::Stopped { end: None });
    for _ in 0..2 {
        engine.start(&id).await.unwrap();
        assert_eq!(engine.observe(&id).await, Observed::Running);
        says_hello(&*engine, &id).await;
        let end = engine.stop(&id, GRACE).await.unwrap();
        assert_eq!(end.reason, EndReason::Requested);
        assert!(matches!(engine.observe(&id).await, Observed::Stopped { end: Some(_) }));
    }
    engine.stop(&id, GRACE).await.expect("stopping what is down is fine");
    engine.destroy(&id).await.unwrap();
    assert_eq!(engine.observe(&id).await, Observed::Absent);
    engine.destroy(&id).await.expect("destroying what is gone is fine");
}

/// A running VM isn't started twice, and one that doesn't exist not at all.
pub(crate) async fn starts_that_make_no_sense_are_refused(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let id = running(subject).await;
    assert!(matches!(engine.start(&id).await, Err(EngineError::WrongState(_))));
    let nobody = VmId::random();
    assert!(matches!(engine.start(&nobody).await, Err(EngineError::Absent)));
    assert!(matches!(engine.stop(&nobody, GRACE).await, Err(EngineError::Absent)));
    assert!(matches!(engine.log_tail(&nobody, LogKind::Engine, 1).await, Err(EngineError::Absent)));
    assert!(engine.dial(&nobody, Target::Agent).await.is_err());
    says_hello(&*engine, &id).await;
    engine.destroy(&id).await.unwrap();
}

/// A paused VM stands still and goes on as it was.
pub(crate) async fn pause_and_resume(subject: &mut dyn Subject) {
    let engine = subject.engine();
    assert!(engine.default_kind().capabilities.pause, "all engines so far can");
    let id = running(subject).await;
    engine.pause(&id).await.unwrap();
    assert_eq!(engine.observe(&id).await, Observed::Paused);
    engine.resume(&id).await.unwrap();
    assert_eq!(engine.observe(&id).await, Observed::Running);
    says_hello(&*engine, &id).await;
    engine.pause(&id).await.unwrap();
    assert_eq!(engine.stop(&id, GRACE).await.unwrap().reason, EndReason::Requested, "a paused VM can be stopped");
    assert!(engine.pause(&id).await.is_err());
    engine.destroy(&id).await.unwrap();
}

/// The agent answers to its secret only, and its port is no port like others.
pub(crate) async fn the_agent_is_reached_by_its_secret_alone(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let id = running(subject).await;
    let within = Duration::from_secs(5);
    let token = engine.agent_token(&id).await.unwrap();
    let dial = || async { engine.dial(&id, Target::Agent).await.unwrap() };
    let pong = agent::ping(dial().await, &token, within).await.unwrap();
    assert!((pong.unix_ms - tiffin_types::time::Timestamp::now().as_millis()).abs() < 2000, "the guest's clock");
    let refused = agent::ping(dial().await, "wrong", within).await;
    assert!(matches!(refused, Err(agent::AgentError::Refused(_))), "{refused:?}");
    assert!(engine.dial(&id, Target::Port(AGENT_PORT)).await.is_err());
    engine.destroy(&id).await.unwrap();
}

/// A VM can be destroyed in any state, without a stop.
pub(crate) async fn destroy_from_any_state(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let stopped = created(subject).await;
    let up = running(subject).await;
    let paused = running(subject).await;
    engine.pause(&paused).await.unwrap();
    for id in [stopped, up, paused] {
        engine.destroy(&id).await.unwrap();
        assert_eq!(engine.observe(&id).await, Observed::Absent);
        assert!(matches!(engine.start(&id).await, Err(EngineError::Absent)));
    }
}

/// A VM that is destroyed while it starts is gone, and its start fails.
pub(crate) async fn destroy_while_starting(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let id = created(subject).await;
    let starting = {
        let (engine, id) = (Arc::clone(&engine), id.clone());
        tokio::task::spawn(async move { engine.start(&id).await })
    };
    eventually("the start is under way", async || !matches!(engine.observe(&id).await, Observed::Stopped { .. })).await;
    engine.destroy(&id).await.unwrap();
    assert_eq!(engine.observe(&id).await, Observed::Absent);
    // It may have come up in the moment before; then the destroy took it down.
    let _ = starting.await.unwrap();
    assert_eq!(engine.observe(&id).await, Observed::Absent);
}

/// An end that nobody asked for is told once, with its reason; the VM can be started again.
pub(crate) async fn an_end_by_itself_is_told_once(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let id = running(subject).await;
    subject.kill_engine_process(&id).await;
    let ended = next_end(&*engine).await;
    assert_eq!((ended.id, ended.report.reason), (id.clone(), EndReason::EngineLost));
    let Observed::Stopped { end: Some(EndReport { reason, .. }) } = engine.observe(&id).await else {
        panic!("it is down")
    };
    assert_eq!(reason, EndReason::EngineLost);
    engine.start(&id).await.unwrap();
    engine.stop(&id, GRACE).await.unwrap();
    let more = tokio::time::timeout(Duration::from_millis(200), engine.next_end()).await;
    assert!(more.is_err(), "an end that stop returned is not told again: {more:?}");
    engine.destroy(&id).await.unwrap();
}

/// VMs outlive the server, and the next one goes on with them.
pub(crate) async fn a_new_server_adopts_what_runs(subject: &mut dyn Subject) {
    let (up, down) = (running(subject).await, created(subject).await);
    let paused = running(subject).await;
    subject.engine().pause(&paused).await.unwrap();
    let mut seen = subject.restart().await;
    seen.sort_by(|a, b| a.0.cmp(&b.0));
    let mut expected = vec![
        (up.clone(), Observed::Running),
        (down.clone(), Observed::Stopped { end: None }),
        (paused.clone(), Observed::Paused),
    ];
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(seen, expected);
    let engine = subject.engine();
    says_hello(&*engine, &up).await;
    engine.resume(&paused).await.unwrap();
    assert_eq!(engine.stop(&paused, GRACE).await.unwrap().reason, EndReason::Requested);
    subject.kill_engine_process(&up).await;
    assert_eq!(next_end(&*engine).await.report.reason, EndReason::EngineLost, "the adopted VM is watched");
    for id in [up, down, paused] {
        engine.destroy(&id).await.unwrap();
    }
    assert_eq!(subject.restart().await, [], "nothing is left to adopt");
}

/// A VM's memory and files, as far as commands can tell that every engine runs.
async fn keep(engine: &dyn Engine, id: &VmId, what: &str) {
    for place in ["/dev/shm/kept", "/workspace/kept"] {
        sh(engine, id, &format!("echo {what} > {place}")).await;
    }
}

async fn kept(engine: &dyn Engine, id: &VmId) -> (String, String) {
    let read = async |place: &str| sh(engine, id, &format!("cat {place}")).await.stdout.trim().to_owned();
    (read("/dev/shm/kept").await, read("/workspace/kept").await)
}

fn both(what: &str) -> (String, String) {
    (what.to_owned(), what.to_owned())
}

/// Another VM of the same image and size.
fn another(spec: &VmSpec) -> VmSpec {
    VmSpec { id: VmId::random(), ..spec.clone() }
}

/// A running or paused VM is saved and goes on; VMs made of the snapshot go on from there, each for itself, and boot
/// after that. The snapshot may go as soon as a VM is made.
pub(crate) async fn a_snapshot_is_taken_up_where_it_was_taken(subject: &mut dyn Subject) {
    let engine = subject.engine();
    if !engine.default_kind().capabilities.snapshot {
        return;
    }
    let spec = subject.spec();
    let source = spec.id.clone();
    engine.create(&spec).await.unwrap();
    engine.start(&source).await.unwrap();
    keep(&*engine, &source, "first").await;
    let (running, paused) = (SnapshotId::random(), SnapshotId::random());
    let saved = engine.snapshot_save(&source, &running).await.unwrap();
    assert!(saved.size_bytes > 0, "{saved:?}");
    assert_eq!(engine.observe(&source).await, Observed::Running);
    keep(&*engine, &source, "second").await;
    engine.pause(&source).await.unwrap();
    engine.snapshot_save(&source, &paused).await.unwrap();
    assert_eq!(engine.observe(&source).await, Observed::Paused, "it goes on as it was");
    engine.resume(&source).await.unwrap();
    let mut listed = engine.snapshot_list().await.unwrap();
    listed.sort();
    let mut expected = vec![running.clone(), paused.clone()];
    expected.sort();
    assert_eq!(listed, expected);

    let (one, two, three) = (another(&spec), another(&spec), another(&spec));
    for (clone, snapshot) in [(&one, &running), (&two, &running), (&three, &paused)] {
        engine.create_from(clone, snapshot).await.unwrap();
        engine.create_from(clone, snapshot).await.expect("creating what exists, as it is, is fine");
        assert_eq!(engine.observe(&clone.id).await, Observed::Stopped { end: None });
    }
    for snapshot in [&running, &paused] {
        engine.snapshot_remove(snapshot).await.unwrap();
        engine.snapshot_remove(snapshot).await.expect("removing what is gone is fine");
    }
    assert_eq!(engine.snapshot_list().await.unwrap(), []);
    for (clone, expected) in [(&one, "first"), (&two, "first"), (&three, "second")] {
        engine.start(&clone.id).await.unwrap();
        assert_eq!(engine.observe(&clone.id).await, Observed::Running);
        assert_eq!(kept(&*engine, &clone.id).await, both(expected));
    }
    keep(&*engine, &one.id, "mine").await;
    assert_eq!(kept(&*engine, &two.id).await, both("first"), "two VMs of one snapshot share nothing");
    assert_eq!(kept(&*engine, &source).await, both("second"));
    engine.stop(&one.id, GRACE).await.unwrap();
    engine.start(&one.id).await.unwrap();
    assert_eq!(kept(&*engine, &one.id).await, (String::new(), "mine".into()), "later starts boot");
    for id in [&source, &one.id, &two.id, &three.id] {
        engine.destroy(id).await.unwrap();
    }
}

/// What can't be saved or restored is refused, and nothing is left.
pub(crate) async fn saves_and_restores_that_make_no_sense_are_refused(subject: &mut dyn Subject) {
    let engine = subject.engine();
    if !engine.default_kind().capabilities.snapshot {
        return;
    }
    let spec = subject.spec();
    let snapshot = SnapshotId::random();
    assert!(engine.snapshot_save(&spec.id, &snapshot).await.is_err(), "there is no such VM");
    engine.create(&spec).await.unwrap();
    assert!(matches!(engine.snapshot_save(&spec.id, &snapshot).await, Err(EngineError::WrongState(_))));
    assert_eq!(engine.snapshot_list().await.unwrap(), []);
    let missing = engine.create_from(&another(&spec), &snapshot).await;
    assert!(matches!(missing, Err(EngineError::BadSnapshot(_))), "{missing:?}");
    engine.start(&spec.id).await.unwrap();
    engine.snapshot_save(&spec.id, &snapshot).await.unwrap();
    assert!(engine.snapshot_save(&spec.id, &snapshot).await.is_err(), "the name is taken");
    assert_eq!(engine.snapshot_list().await.unwrap(), std::slice::from_ref(&snapshot), "and the snapshot still there");
    for size in [
        VmSize { cpus: spec.size.cpus + 1, ..spec.size },
        VmSize { mem_mb: spec.size.mem_mb * 2, ..spec.size },
        VmSize { disk_mb: spec.size.disk_mb * 2, ..spec.size },
    ] {
        let other = VmSpec { size, ..another(&spec) };
        let refused = engine.create_from(&other, &snapshot).await;
        assert!(matches!(refused, Err(EngineError::Invalid(_))), "{refused:?}");
        assert_eq!(engine.observe(&other.id).await, Observed::Absent);
    }
    says_hello(&*engine, &spec.id).await;
    engine.destroy(&spec.id).await.unwrap();
    engine.snapshot_remove(&snapshot).await.unwrap();
    assert_eq!(subject.restart().await, [], "nothing is left to adopt");
}

/// A VM made of a snapshot is adopted, watched and ended as any other; its secret is its own.
pub(crate) async fn a_restored_vm_is_another_one(subject: &mut dyn Subject) {
    let engine = subject.engine();
    if !engine.default_kind().capabilities.snapshot {
        return;
    }
    let spec = subject.spec();
    engine.create(&spec).await.unwrap();
    engine.start(&spec.id).await.unwrap();
    let snapshot = SnapshotId::random();
    engine.snapshot_save(&spec.id, &snapshot).await.unwrap();
    let clone = another(&spec);
    engine.create_from(&clone, &snapshot).await.unwrap();
    engine.start(&clone.id).await.unwrap();
    let mut seen = subject.restart().await;
    seen.sort_by(|a, b| a.0.cmp(&b.0));
    let mut expected = vec![(spec.id.clone(), Observed::Running), (clone.id.clone(), Observed::Running)];
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(seen, expected);
    let engine = subject.engine();
    assert_eq!(engine.snapshot_list().await.unwrap(), std::slice::from_ref(&snapshot), "snapshots outlive the server");
    for id in [&spec.id, &clone.id] {
        says_hello(&*engine, id).await;
    }
    subject.kill_engine_process(&clone.id).await;
    let ended = next_end(&*engine).await;
    assert_eq!((ended.id, ended.report.reason), (clone.id.clone(), EndReason::EngineLost));
    says_hello(&*engine, &spec.id).await;
    engine.start(&clone.id).await.unwrap();
    says_hello(&*engine, &clone.id).await;
    for id in [&spec.id, &clone.id] {
        engine.destroy(id).await.unwrap();
    }
    engine.snapshot_remove(&snapshot).await.unwrap();
}

/// A destroy wins over a save and over a restore.
pub(crate) async fn a_vm_can_be_destroyed_while_it_is_saved_or_restored(subject: &mut dyn Subject) {
    let engine = subject.engine();
    if !engine.default_kind().capabilities.snapshot {
        return;
    }
    let spec = subject.spec();
    engine.create(&spec).await.unwrap();
    engine.start(&spec.id).await.unwrap();
    let (first, second) = (SnapshotId::random(), SnapshotId::random());
    engine.snapshot_save(&spec.id, &first).await.unwrap();
    let clone = another(&spec);
    engine.create_from(&clone, &first).await.unwrap();
    let starting = {
        let (engine, id) = (Arc::clone(&engine), clone.id.clone());
        tokio::task::spawn(async move { engine.start(&id).await })
    };
    eventually("the start is under way", async || !matches!(engine.observe(&clone.id).await, Observed::Stopped { .. }))
        .await;
    engine.destroy(&clone.id).await.unwrap();
    let _ = starting.await.unwrap();
    assert_eq!(engine.observe(&clone.id).await, Observed::Absent);

    let saving = {
        let (engine, id, into) = (Arc::clone(&engine), spec.id.clone(), second.clone());
        tokio::task::spawn(async move { engine.snapshot_save(&id, &into).await })
    };
    tokio::task::yield_now().await;
    engine.destroy(&spec.id).await.unwrap();
    // It may have been saved in the moment before.
    let was_saved = saving.await.unwrap().is_ok();
    assert_eq!(engine.observe(&spec.id).await, Observed::Absent);
    assert_eq!(engine.snapshot_list().await.unwrap().contains(&second), was_saved);
    for snapshot in [&first, &second] {
        engine.snapshot_remove(snapshot).await.unwrap();
    }
    assert_eq!(subject.restart().await, [], "nothing is left to adopt");
}

/// What a VM may reach can be changed at any time, and holds for later runs.
pub(crate) async fn a_policy_changes_whether_the_vm_runs_or_not(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let listed = |net: &str| EgressPolicy { outbound_internet: true, allow: vec![net.parse().expect("a network")] };
    assert!(matches!(engine.set_egress(&VmId::random(), &EgressPolicy::default()).await, Err(EngineError::Absent)));
    let id = created(subject).await;
    engine.set_egress(&id, &listed("192.0.2.0/24")).await.unwrap();
    engine.start(&id).await.unwrap();
    for policy in [EgressPolicy::default(), listed("192.0.2.0/25"), listed("198.51.100.0/24"), EgressPolicy::default()]
    {
        engine.set_egress(&id, &policy).await.unwrap();
        engine.set_egress(&id, &policy).await.expect("the same again is fine");
        says_hello(&*engine, &id).await;
    }
    engine.pause(&id).await.unwrap();
    engine.set_egress(&id, &listed("192.0.2.0/24")).await.unwrap();
    assert_eq!(engine.observe(&id).await, Observed::Paused);
    engine.resume(&id).await.unwrap();
    says_hello(&*engine, &id).await;
    engine.stop(&id, GRACE).await.unwrap();
    engine.start(&id).await.unwrap();
    says_hello(&*engine, &id).await;
    engine.destroy(&id).await.unwrap();
}

/// Whether or not VMs of it run, and again once there are new ones.
pub(crate) async fn an_image_is_let_go_of_when_nothing_is_made_of_it(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let image = subject.spec().image;
    assert!(engine.image_release(&image).await.unwrap(), "nothing was made of it yet");
    let (one, other) = (running(subject).await, created(subject).await);
    assert!(!engine.image_release(&image).await.unwrap());
    engine.destroy(&one).await.unwrap();
    assert!(!engine.image_release(&image).await.unwrap(), "one that never ran needs it too");
    engine.start(&other).await.unwrap();
    says_hello(&*engine, &other).await;
    engine.stop(&other, GRACE).await.unwrap();
    assert!(!engine.image_release(&image).await.unwrap(), "one that is down needs it too");
    engine.destroy(&other).await.unwrap();
    for _ in 0..2 {
        assert!(engine.image_release(&image).await.unwrap());
    }
    let new = running(subject).await;
    says_hello(&*engine, &new).await;
    engine.destroy(&new).await.unwrap();
    assert!(engine.image_release(&image).await.unwrap());
}

/// A VM with a program that is up, and whose program isn't started.
async fn waiting(subject: &dyn Subject, does: Does) -> VmId {
    let spec = VmSpec { program: Some(subject.program(does)), ..subject.spec() };
    subject.engine().create(&spec).await.unwrap();
    subject.engine().create(&spec).await.expect("creating what exists, as it is, is fine");
    subject.engine().start(&spec.id).await.unwrap();
    spec.id
}

/// With its program a VM ends, and says so once. The next run is like the first.
pub(crate) async fn a_vm_ends_with_its_program(subject: &mut dyn Subject) {
    let engine = subject.engine();
    assert!(matches!(engine.program_start(&VmId::random()).await, Err(EngineError::Absent)));
    let without = running(subject).await;
    assert!(matches!(engine.program_start(&without).await, Err(EngineError::Invalid(_))));
    says_hello(&*engine, &without).await;
    let id = waiting(subject, Does::Exit(7)).await;
    for _ in 0..2 {
        assert_eq!(engine.observe(&id).await, Observed::Running, "nothing runs before it is started");
        engine.program_start(&id).await.unwrap();
        let ended = next_end(&*engine).await;
        assert_eq!((&ended.id, ended.report.reason, ended.report.exit_code), (&id, EndReason::Exited, Some(7)));
        assert_eq!(engine.observe(&id).await, Observed::Stopped { end: Some(ended.report) });
        assert!(matches!(engine.program_start(&id).await, Err(EngineError::WrongState(_))));
        engine.start(&id).await.unwrap();
    }
    for id in [id, without] {
        engine.destroy(&id).await.unwrap();
    }
}

/// A program's start can be repeated, also by the next server, and waits for no pause.
pub(crate) async fn a_program_is_started_once_whoever_asks_again(subject: &mut dyn Subject) {
    let id = waiting(subject, Does::Stay).await;
    let engine = subject.engine();
    engine.pause(&id).await.unwrap();
    assert!(matches!(engine.program_start(&id).await, Err(EngineError::WrongState(_))));
    engine.resume(&id).await.unwrap();
    engine.program_start(&id).await.unwrap();
    engine.program_start(&id).await.expect("it runs");
    assert_eq!(subject.restart().await, [(id.clone(), Observed::Running)]);
    let engine = subject.engine();
    engine.program_start(&id).await.expect("it runs");
    says_hello(&*engine, &id).await;
    assert_eq!(engine.stop(&id, GRACE).await.unwrap().reason, EndReason::Requested);
    let more = tokio::time::timeout(Duration::from_millis(200), engine.next_end()).await;
    assert!(more.is_err(), "an end that stop returned is not told again: {more:?}");
    engine.destroy(&id).await.unwrap();
}

/// What can't be run is the VM's end, returned and not told again.
pub(crate) async fn a_program_that_cant_be_started_ends_its_vm(subject: &mut dyn Subject) {
    let engine = subject.engine();
    let id = waiting(subject, Does::Miss).await;
    let Err(EngineError::Ended(report)) = engine.program_start(&id).await else { panic!("there is none") };
    assert_eq!((report.reason, report.exit_code), (EndReason::ProgramFailed, Some(127)));
    assert_eq!(engine.observe(&id).await, Observed::Stopped { end: Some(report) });
    let more = tokio::time::timeout(Duration::from_millis(200), engine.next_end()).await;
    assert!(more.is_err(), "{more:?}");
    engine.destroy(&id).await.unwrap();
}
