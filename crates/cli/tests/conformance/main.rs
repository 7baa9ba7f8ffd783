//! The engine conformance suite: every promise of `suite.rs`, on every engine.
//!
//! A new engine adds a [`Subject`] and a line to `on_every_engine`.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "../vms/harness.rs"]
mod harness;
mod suite;

use std::sync::Arc;

use harness::Host;
use suite::{Does, Subject};
use tiffin_engine::{
    Engine, Observed,
    fake::{Fake, FakeProgram},
};
use tiffin_types::{
    id::{Digest, VmId},
    network::EgressPolicy,
    program::{Program, StopSignal},
    vm::{EndReason, EndReport, EngineName, VmSize, VmSpec},
};

struct FakeSubject(Arc<Fake>);

#[async_trait::async_trait]
impl Subject for FakeSubject {
    fn engine(&self) -> Arc<dyn Engine> {
        self.0.clone()
    }

    fn spec(&self) -> VmSpec {
        let size = VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 };
        VmSpec {
            id: VmId::random(),
            image: Digest::from_sha256([7; 32]),
            kernel: None,
            size,
            egress: EgressPolicy::default(),
            engine: EngineName::Fake,
            program: None,
        }
    }

    fn program(&self, does: Does) -> Program {
        let (words, scripted) = match does {
            Does::Exit(code) => (format!("exits {code}"), FakeProgram { exit_code: Some(code), ..Default::default() }),
            Does::Stay => ("stays".to_owned(), FakeProgram::default()),
            Does::Miss => {
                let refused = Some(("there is no such program".to_owned(), 127));
                ("missing".to_owned(), FakeProgram { refused, ..Default::default() })
            }
        };
        self.0.program(&words, scripted);
        program(words.split(' '))
    }

    async fn restart(&mut self) -> Vec<(VmId, Observed)> {
        self.0.adopt().await.unwrap()
    }

    async fn kill_engine_process(&self, id: &VmId) {
        let report = EndReport { reason: EndReason::EngineLost, message: "killed".into(), exit_code: None };
        self.0.kill(id, report);
    }
}

#[async_trait::async_trait]
impl Subject for Host {
    fn engine(&self) -> Arc<dyn Engine> {
        self.engine.clone()
    }

    fn spec(&self) -> VmSpec {
        Host::spec(self)
    }

    fn program(&self, does: Does) -> Program {
        match does {
            Does::Exit(code) => program(["sh", "-c", &format!("exit {code}")]),
            Does::Stay => program(["sleep", "1000"]),
            Does::Miss => program(["/no/such/program"]),
        }
    }

    async fn restart(&mut self) -> Vec<(VmId, Observed)> {
        Host::restart(self).await
    }

    async fn kill_engine_process(&self, id: &VmId) {
        harness::kill_engine(&self.folder(id));
    }
}

fn program<'a>(words: impl IntoIterator<Item = &'a str>) -> Program {
    Program {
        argv: words.into_iter().map(str::to_owned).collect(),
        env: Default::default(),
        cwd: String::new(),
        user: String::new(),
        stop_signal: StopSignal::TERM,
    }
}

macro_rules! on_every_engine {
    ($($promise:ident),* $(,)?) => {
        mod fake {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::suite::$promise(&mut super::FakeSubject(super::Fake::new())).await;
            })*
        }
        mod qemu {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                let mut host = super::Host::with(super::EngineName::Qemu).await;
                super::suite::$promise(&mut host).await;
            })*
        }
        mod gvisor {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::suite::$promise(&mut super::Host::new().await).await;
            })*
        }
    };
}

on_every_engine!(
    a_whole_life,
    starts_that_make_no_sense_are_refused,
    pause_and_resume,
    the_agent_is_reached_by_its_secret_alone,
    destroy_from_any_state,
    destroy_while_starting,
    an_end_by_itself_is_told_once,
    a_new_server_adopts_what_runs,
    a_snapshot_is_taken_up_where_it_was_taken,
    saves_and_restores_that_make_no_sense_are_refused,
    a_restored_vm_is_another_one,
    a_vm_can_be_destroyed_while_it_is_saved_or_restored,
    a_policy_changes_whether_the_vm_runs_or_not,
    a_vm_ends_with_its_program,
    a_program_is_started_once_whoever_asks_again,
    a_program_that_cant_be_started_ends_its_vm,
    an_image_is_let_go_of_when_nothing_is_made_of_it,
);
