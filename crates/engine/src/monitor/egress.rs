//! Changing what a running guest may reach.
//!
//! The new policy is in `launch.json`, with an uplink exactly when something is allowed. The gateway's rules are replaced
//! in one step and judge every packet, so what was open before is judged anew. Whatever fails before that leaves
//! the old policy in force.

use std::{io, path::Path, sync::PoisonError};

use tiffin_types::network::EgressPolicy;

use super::{
    agent,
    boot::{connect_uplink, on_host},
    launch::{self, LAUNCH, Launch, Phase, Reply},
    state::{Reach, Vm},
};
use crate::host::{filter, network};

/// Puts the policy of `launch.json` in force.
pub(super) fn change(vm: &Vm) -> Reply {
    let _alone = vm.tools.lock().unwrap_or_else(PoisonError::into_inner);
    let phase = vm.phase();
    if !matches!(phase, Phase::Running | Phase::Paused) {
        return Reply::NotRunning;
    }
    match change_in(vm, phase) {
        Ok(()) => Reply::Done,
        Err(message) => {
            vm.errors.line(format!("changing the network policy: {message}"));
            Reply::refused("the network policy could not be changed".into())
        }
    }
}

fn change_in(vm: &Vm, phase: Phase) -> Result<(), String> {
    let launch: Launch = launch::read(&vm.folder, LAUNCH)
        .and_then(|launch| launch.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)))
        .map_err(|e| format!("reading {}: {e}", Path::new(LAUNCH).display()))?;
    let (old, new) = (vm.reach(), Reach { egress: launch.spec.egress, uplink: launch.uplink });
    if let (None, Some(uplink)) = (old.uplink, new.uplink)
        && let Err(error) = connect_uplink(vm, uplink, &launch.resolvers)
    {
        disconnect(vm);
        return Err(error);
    }
    let opened = only_in(&new.egress, &old.egress);
    if let Err(error) = replace_rules(vm, &new, &opened) {
        close(vm, &opened);
        if old.uplink.is_none() {
            disconnect(vm);
        }
        return Err(error);
    }
    // The new policy is in force: nothing may fail any more.
    vm.set_reach(new.clone());
    close(vm, &only_in(&old.egress, &new.egress));
    if old.uplink.is_some() && new.uplink.is_none() {
        disconnect(vm);
    }
    vm.engine_log.line("the network policy has changed");
    if old.uplink.is_some() == new.uplink.is_some() && !vm.owes_news() {
        return Ok(());
    }
    match phase {
        // It is told when it goes on.
        Phase::Paused => vm.owe_news(true),
        Phase::Starting | Phase::Running | Phase::Ended => tell(vm),
    }
    Ok(())
}

/// Tells the guest its resolvers. One that doesn't take it keeps its old ones, and is told again by the next change, or
/// when it goes on: the policy is not the guest's to hold up.
pub(super) fn tell(vm: &Vm) {
    vm.owe_news(true);
    match agent::tell_network(vm) {
        Ok(()) => vm.owe_news(false),
        Err(error) => vm.errors.line(format!("telling the guest of its network: {error}")),
    }
}

/// What `one` lets through to the host itself and `other` doesn't.
fn only_in(one: &EgressPolicy, other: &EgressPolicy) -> EgressPolicy {
    EgressPolicy {
        outbound_internet: one.outbound_internet,
        allow: one.allow.iter().filter(|net| !other.outbound_internet || !other.allow.contains(net)).copied().collect(),
    }
}

fn replace_rules(vm: &Vm, new: &Reach, opened: &EgressPolicy) -> Result<(), String> {
    if new.uplink.is_some() {
        on_host(vm, || filter::open_host(&vm.launch.spec.id, opened)).map_err(|e| format!("the host's filter: {e}"))?;
    }
    filter::apply_gateway(&new.egress, &vm.host_addresses).map_err(|e| format!("the packet filter: {e}"))
}

/// Closes on the host what the gateway no longer lets through, or never did.
fn close(vm: &Vm, closed: &EgressPolicy) {
    if let Err(error) = on_host(vm, || filter::close_host(&vm.launch.spec.id, closed)) {
        vm.errors.line(format!("closing the host's filter: {error}"));
    }
}

/// Takes the link to the host away. A failure leaves a link that no rule lets anything through.
fn disconnect(vm: &Vm) {
    if let Err(error) = network::remove_uplink() {
        vm.errors.line(format!("removing the uplink: {error}"));
    }
}
