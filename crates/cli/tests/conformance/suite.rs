//! What every engine must do, whichever it is. One function per promise; `main.rs` runs each on each engine.

use std::{sync::Arc, time::Duration};

use tiffin_engine::{Engine, EngineError, LogKind, Observed, Target, agent};
use tiffin_protocol::AGENT_PORT;
use tiffin_types::{
    id::VmId,
    vm::{EndReason, EndReport, VmSpec},
};

use crate::harness::{eventually, sh};

/// An engine under test.
#[async_trait::async_trait]
pub(crate) trait Subject: Send {
    fn engine(&self) -> Arc<dyn Engine>;
    fn spec(&self) -> VmSpec;
    /// A new server over the same host: what its engine's `adopt` saw.
    async fn restart(&mut self) -> Vec<(VmId, Observed)>;
    /// Kills what runs the VM, from outside and without asking anyone.
    async fn kill_engine_process(&self, id: &VmId);
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
    assert!(engine.capabilities().pause, "all engines so far can");
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
