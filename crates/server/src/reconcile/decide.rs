//! What to do about a VM, by its record and by what the engine sees. Pure.

use tiffin_engine::Observed;
use tiffin_types::vm::{EndReason, EndReport, VmEvent, VmState};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// It is as it should be, or can't be told: ask again later.
    Nothing,
    /// The record lags behind: apply the event.
    Record(VmEvent),
    /// Its run is over: record how.
    End(EndReport),
    /// A stop was cut short: go on with it.
    FinishStop,
    /// It runs though its record says that it's down: stop it, the record stays.
    PutDown,
    /// Its creator never got an answer, nor an id to ask for: remove it and free its idempotency key.
    Abandon(EndReport),
    /// Its record says that it's gone: remove what is left.
    Remove,
}

/// What to do about a VM that nobody is changing now. `was_up` is whether it ever came up, `hint` how its run ended, by
/// someone who knows.
pub(super) fn decide(state: VmState, was_up: bool, observed: &Observed, hint: Option<&EndReport>) -> Action {
    use Observed as O;
    use VmState as S;
    let best =
        |known: &Option<EndReport>, otherwise: EndReport| known.clone().or_else(|| hint.cloned()).unwrap_or(otherwise);
    // Nobody stops a VM that starts: that is how the run before ended, and this one never began.
    let of_this_start = |end: &Option<EndReport>| end.clone().filter(|end| end.reason != EndReason::Requested);
    let down = |known: &Option<EndReport>, otherwise: EndReport| Action::End(best(known, otherwise));
    match (state, observed) {
        (_, O::Unknown) => Action::Nothing,
        (S::Deleted, _) => Action::Remove,
        (S::Created, _) => Action::Abandon(boot_cut_short()),
        (S::Starting, O::Running | O::Paused) => Action::Record(VmEvent::Ready),
        (S::Starting, O::Stopped { end }) if !was_up => Action::Abandon(best(&of_this_start(end), boot_cut_short())),
        (S::Starting, O::Absent) if !was_up => Action::Abandon(best(&None, boot_cut_short())),
        (S::Starting, O::Stopped { end }) => down(&of_this_start(end), boot_cut_short()),
        (S::Starting, O::Absent) => down(&None, boot_cut_short()),
        (S::Starting | S::Running | S::Paused, O::Starting) => Action::Nothing,
        (S::Running, O::Paused) => Action::Record(VmEvent::Pause),
        (S::Paused, O::Running) => Action::Record(VmEvent::Resume),
        (S::Running, O::Running) | (S::Paused, O::Paused) => Action::Nothing,
        (S::Running | S::Paused, O::Stopped { end }) => down(end, lost()),
        (S::Running | S::Paused | S::Stopping, O::Absent) => down(&None, lost()),
        (S::Stopping, O::Starting | O::Running | O::Paused) => Action::FinishStop,
        (S::Stopping, O::Stopped { end }) => down(end, stopped()),
        (S::Stopped | S::Error, O::Starting | O::Running | O::Paused) => Action::PutDown,
        (S::Stopped | S::Error, O::Stopped { .. } | O::Absent) => Action::Nothing,
    }
}

fn boot_cut_short() -> EndReport {
    report(EndReason::BootFailed, "The server restarted while the VM came up.")
}

fn lost() -> EndReport {
    report(EndReason::EngineLost, "It was found down, and nothing tells why.")
}

fn stopped() -> EndReport {
    report(EndReason::Requested, "Stopped on request.")
}

fn report(reason: EndReason, message: &str) -> EndReport {
    EndReport { reason, message: message.into(), exit_code: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_observation() -> Vec<Observed> {
        let oom = report(EndReason::Oom, "out of memory");
        vec![
            Observed::Absent,
            Observed::Stopped { end: None },
            Observed::Stopped { end: Some(oom) },
            Observed::Starting,
            Observed::Running,
            Observed::Paused,
            Observed::Unknown,
        ]
    }

    /// The state after the action is done, as the layers below would do it.
    fn after(state: VmState, action: &Action) -> VmState {
        match action {
            Action::Nothing | Action::PutDown => state,
            Action::Record(event) => state.after(*event).expect("the table allows what is decided"),
            Action::End(end) => {
                state.after(end.reason.event()).or(state.after(VmEvent::Fail)).expect("only live VMs end")
            }
            Action::FinishStop => VmState::Stopped,
            Action::Abandon(_) | Action::Remove => VmState::Deleted,
        }
    }

    #[test]
    fn every_decision_is_one_that_the_transition_table_allows() {
        for state in VmState::ALL {
            for observed in every_observation() {
                for was_up in [false, true] {
                    after(state, &decide(state, was_up, &observed, None));
                }
            }
        }
    }

    #[test]
    fn what_is_recorded_as_up_and_seen_down_ends_with_the_best_known_reason() {
        let oom = report(EndReason::Oom, "out of memory");
        let hint = report(EndReason::AgentLost, "agent lost");
        let seen = Observed::Stopped { end: Some(oom.clone()) };
        assert_eq!(decide(VmState::Running, true, &seen, Some(&hint)), Action::End(oom));
        assert_eq!(decide(VmState::Running, true, &Observed::Absent, Some(&hint)), Action::End(hint));
        assert_eq!(decide(VmState::Running, true, &Observed::Absent, None), Action::End(lost()));
    }

    #[test]
    fn a_vm_that_never_came_up_is_abandoned_and_one_that_did_keeps_its_record() {
        let oom = report(EndReason::Oom, "out of memory");
        let seen = Observed::Stopped { end: Some(oom.clone()) };
        assert_eq!(decide(VmState::Starting, false, &seen, None), Action::Abandon(oom.clone()));
        assert_eq!(decide(VmState::Starting, true, &seen, None), Action::End(oom));
        assert_eq!(decide(VmState::Starting, false, &Observed::Absent, None), Action::Abandon(boot_cut_short()));
        assert_eq!(decide(VmState::Starting, false, &Observed::Running, None), Action::Record(VmEvent::Ready));
    }

    #[test]
    fn a_start_that_never_began_is_not_taken_for_the_stop_before_it() {
        let seen = Observed::Stopped { end: Some(stopped()) };
        assert_eq!(decide(VmState::Starting, true, &seen, None), Action::End(boot_cut_short()));
        assert_eq!(decide(VmState::Stopping, true, &seen, None), Action::End(stopped()));
    }

    #[test]
    fn nothing_is_done_about_what_cannot_be_told() {
        for state in VmState::ALL {
            assert_eq!(decide(state, true, &Observed::Unknown, None), Action::Nothing, "{state}");
        }
    }

    #[test]
    fn a_second_look_at_a_settled_vm_finds_nothing_to_do() {
        for state in VmState::ALL {
            for observed in every_observation() {
                let action = decide(state, true, &observed, None);
                let settled = after(state, &action);
                if matches!(action, Action::Record(_)) && observed == Observed::Running {
                    assert_eq!(decide(settled, true, &observed, None), Action::Nothing);
                }
                if matches!(action, Action::End(_)) {
                    assert_eq!(decide(settled, true, &observed, None), Action::Nothing);
                }
            }
        }
    }
}
