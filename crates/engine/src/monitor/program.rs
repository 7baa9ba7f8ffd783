//! Starting the guest's program: asked of the agent, and the end of the guest where that can't be.

use std::sync::PoisonError;

use tiffin_protocol::{Failure, FailureCode};
use tiffin_types::vm::{EndReason, EndReport};

use super::{
    agent::{self, Answer},
    launch::{Phase, Reply},
    state::Vm,
};

/// What shells end with when there is no such program, and when it can't be run.
const MISSING: i32 = 127;
const UNFIT: i32 = 126;

/// Characters of the guest's word that are passed on.
const MAX_MESSAGE: usize = 500;

/// Has the agent start the program of the VM's spec, unless it runs already.
pub(super) fn start(vm: &Vm) -> Reply {
    let _alone = vm.tools.lock().unwrap_or_else(PoisonError::into_inner);
    if vm.phase() != Phase::Running || vm.stop_requested() {
        return Reply::NotRunning;
    }
    let Some(program) = &vm.launch.spec.program else {
        return Reply::refused("the VM has no program".into());
    };
    match agent::start_program(vm, program) {
        Ok(Answer::Done) => {
            vm.engine_log.line("the program runs");
            Reply::Done
        }
        Ok(Answer::Failed(failed)) => {
            vm.decide(report(&failed));
            Reply::ProgramFailed
        }
        Err(error) => {
            vm.errors.line(format!("starting the program: {error}"));
            Reply::refused("the guest did not answer".into())
        }
    }
}

fn report(failed: &Failure) -> EndReport {
    let exit_code = match failed.code {
        FailureCode::NotFound => Some(MISSING),
        FailureCode::BadCommand | FailureCode::BadCwd | FailureCode::BadUser => Some(UNFIT),
        FailureCode::Unauthorized
        | FailureCode::BadRequest
        | FailureCode::NoRoom
        | FailureCode::Forbidden
        | FailureCode::BadArchive
        | FailureCode::TooLarge
        | FailureCode::NoSpace
        | FailureCode::TimedOut
        | FailureCode::Internal => None,
    };
    let why: String = failed.message.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect();
    EndReport {
        reason: EndReason::ProgramFailed,
        message: format!("the VM's program could not be started: {why}"),
        exit_code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_told_from_one_that_cant_be_run_as_shells_do() {
        let code = |code| report(&Failure { code, message: "no".into() }).exit_code;
        assert_eq!(code(FailureCode::NotFound), Some(127));
        assert_eq!(code(FailureCode::BadUser), Some(126));
        assert_eq!(code(FailureCode::NoRoom), None);
    }

    #[test]
    fn a_guests_word_is_bounded_and_printable() {
        let message = format!("\u{1b}[2J{}", "x".repeat(10_000));
        let told = report(&Failure { code: FailureCode::BadCommand, message }).message;
        assert!(told.len() < 600 && !told.contains('\u{1b}'), "{}", told.len());
    }
}
