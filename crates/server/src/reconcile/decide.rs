//! What to do about a VM, by its record and by what the engine sees. Pure.

use tiffin_engine::Observed;
use tiffin_types::vm::{EndReason, EndReport, Lifetime, VmEvent, VmState};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// It is as it should be, or can't be told: ask again later.
    Nothing,
    /// The record lags behind: apply the event.
    Record(VmEvent),
    /// Its run is over: record how.
    End(EndReport),
    /// A start was cut short once the guest was up: go on with it.
    FinishStart,
    /// A stop was cut short: go on with it.
    FinishStop,
    /// It runs though its record says that it's down: stop it, the record stays.
    PutDown,
    /// Its creator never got an answer, nor an id to ask for: remove it and free its idempotency key.
    Abandon(EndReport),
    /// It was for one run, which is over: remove it.
    Discard,
    /// Its record says that it's gone: remove what is left.
    Remove,
}

/// What a record says that matters here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recorded {
    pub(super) state: VmState,
    /// Whether it ever came up.
    pub(super) was_up: bool,
    /// Of a VM that runs its image's program.
    pub(super) lifetime: Option<Lifetime>,
}

/// What to do about a VM that nobody is changing now. `hint` is how its run ended, by someone who knows.
pub(super) fn decide(recorded: Recorded, observed: &Observed, hint: Option<&EndReport>) -> Action {
    let Recorded { state, was_up, lifetime } = recorded;
    let (is_one_time, is_cached) = (lifetime == Some(Lifetime::OneTime), lifetime == Some(Lifetime::Cached));
    // Who made a cached VM has an answer, with its id.
    let unanswered = !was_up && !is_cached;
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
        (S::Starting, O::Running | O::Paused) if lifetime.is_some() => Action::FinishStart,
        (S::Starting, O::Running | O::Paused) => Action::Record(VmEvent::Ready),
        (S::Starting, O::Stopped { end }) if unanswered => Action::Abandon(best(&of_this_start(end), boot_cut_short())),
        (S::Starting, O::Absent) if unanswered => Action::Abandon(best(&None, boot_cut_short())),
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
        (S::Stopped | S::Error, _) if is_one_time => Action::Discard,
        // Prepared: booted, and nothing of its program has run.
        (S::Stopped, O::Paused) if is_cached => Action::Nothing,
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

    const LIFETIMES: [Option<Lifetime>; 3] = [None, Some(Lifetime::OneTime), Some(Lifetime::Cached)];

    /// A sandbox's.
    fn decide(state: VmState, was_up: bool, observed: &Observed, hint: Option<&EndReport>) -> Action {
        super::decide(Recorded { state, was_up, lifetime: None }, observed, hint)
    }

    fn of_service(lifetime: Lifetime, state: VmState, observed: &Observed) -> Action {
        super::decide(Recorded { state, was_up: false, lifetime: Some(lifetime) }, observed, None)
    }

    /// The state after the action is done, as the layers below would do it.
    fn after(state: VmState, action: &Action) -> VmState {
        match action {
            Action::Nothing | Action::PutDown => state,
            Action::Record(event) => state.after(*event).expect("the table allows what is decided"),
            Action::End(end) => {
                state.after(end.reason.event()).or(state.after(VmEvent::Fail)).expect("only live VMs end")
            }
            Action::FinishStart => state.after(VmEvent::Ready).expect("only what starts is up then"),
            Action::FinishStop => VmState::Stopped,
            Action::Abandon(_) | Action::Discard | Action::Remove => VmState::Deleted,
        }
    }

    #[test]
    fn every_decision_is_one_that_the_transition_table_allows() {
        for state in VmState::ALL {
            for observed in every_observation() {
                for (was_up, lifetime) in
                    [false, true].into_iter().flat_map(|up| LIFETIMES.map(|lifetime| (up, lifetime)))
                {
                    after(state, &super::decide(Recorded { state, was_up, lifetime }, &observed, None));
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

    #[test]
    fn a_run_that_was_the_only_one_takes_its_vm_with_it() {
        for state in [VmState::Stopped, VmState::Error] {
            for observed in every_observation() {
                let expected = if observed == Observed::Unknown { Action::Nothing } else { Action::Discard };
                assert_eq!(of_service(Lifetime::OneTime, state, &observed), expected, "{state} {observed:?}");
            }
        }
    }

    #[test]
    fn a_program_is_started_before_its_vm_counts_as_running() {
        for lifetime in [Lifetime::OneTime, Lifetime::Cached] {
            for observed in [Observed::Running, Observed::Paused] {
                assert_eq!(of_service(lifetime, VmState::Starting, &observed), Action::FinishStart);
            }
        }
    }

    #[test]
    fn a_cached_vm_may_stand_ready_while_it_is_down_and_is_kept_when_its_start_fails() {
        assert_eq!(of_service(Lifetime::Cached, VmState::Stopped, &Observed::Paused), Action::Nothing);
        assert_eq!(of_service(Lifetime::Cached, VmState::Stopped, &Observed::Running), Action::PutDown);
        assert_eq!(of_service(Lifetime::Cached, VmState::Starting, &Observed::Absent), Action::End(boot_cut_short()));
        assert_eq!(
            of_service(Lifetime::OneTime, VmState::Starting, &Observed::Absent),
            Action::Abandon(boot_cut_short())
        );
        assert!(matches!(of_service(Lifetime::Cached, VmState::Created, &Observed::Paused), Action::Abandon(_)));
    }
}
