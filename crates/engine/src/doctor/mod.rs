//! The doctor: can this host run VMs, and if not, what is to be done about it.
//!
//! Every probe does what a VM would need and undoes it, rather than look whether something is installed: it makes a
//! control group, loads packet filter rules in a namespace of its own, mounts the three filesystems, lets a virtual CPU
//! run. Invariants: a probe leaves nothing behind, and [`check`] answers within 15 seconds whatever hangs. It
//! changes nothing and repairs nothing; how its answers look is the caller's business.

mod agent;
mod cgroups;
mod disk;
mod engines;
mod filesystems;
mod images;
mod kernel;
pub mod kvm;
mod network;
mod nftables;
mod port;
mod privileges;
mod tools;

#[cfg(test)]
mod tests;

use std::{
    net::SocketAddr,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use camino::Utf8PathBuf;
use serde::Serialize;
use tiffin_types::vm::EngineName;

/// How long a probe may take. They run side by side, in a fraction of a second; a server that starts again on a host that
/// its VMs keep busy must not be refused for being slow.
const LIMIT: Duration = Duration::from_secs(15);

/// What the doctor is to look at.
#[derive(Debug, Clone)]
pub struct DoctorInput {
    /// Where VMs and images live, or will.
    pub data_dir: Utf8PathBuf,
    /// Where images are mounted, or will be.
    pub run_dir: Utf8PathBuf,
    /// What runs VMs unless another is asked for; `None` is for the server to pick.
    pub engine: Option<EngineName>,
    /// gVisor's program; looked for on `PATH` when not named.
    pub runsc: Option<Utf8PathBuf>,
    /// QEMU's program; looked for on `PATH` when not named.
    pub qemu: Option<Utf8PathBuf>,
    /// The kernel of QEMU's VMs, where there are to be any.
    pub kernel: Option<Utf8PathBuf>,
    /// The guest agent; looked for beside this program when not named.
    pub agent: Option<Utf8PathBuf>,
    /// Where the server listens; not looked at when not named (when it already does).
    pub listen: Option<SocketAddr>,
    /// Where its ingress listens, in the same way.
    pub ingress: Option<SocketAddr>,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// VMs run, but something will not work, or not well.
    Warn,
    /// No VM can run.
    Fail,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it; always there when the level isn't `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), remedy: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, level: Level::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, level: Level::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// A probe and the name of its (first) answer.
type Probe = (&'static str, fn(&DoctorInput) -> Vec<Check>);

const PROBES: [Probe; 13] = [
    ("privileges", privileges::check),
    ("kernel", kernel::check),
    ("cgroups", cgroups::check),
    ("nftables", nftables::check),
    ("filesystems", filesystems::check),
    ("tools", tools::check),
    ("gvisor", engines::check),
    ("agent", agent::check),
    ("kvm", kvm::check),
    ("disk", disk::check),
    ("images", images::check),
    ("network", network::check),
    ("port", port::check),
];

/// Looks at everything, at once, and answers in a fixed order within 15 seconds. Blocks.
pub fn check(input: &DoctorInput) -> Vec<Check> {
    run(&PROBES, input, LIMIT)
}

/// Whether a server must not start on such a host.
pub fn must_refuse(checks: &[Check]) -> bool {
    checks.iter().any(|check| check.level == Level::Fail)
}

/// Runs the probes on a thread each: some move their thread to namespaces of its own, and one that hangs is left to
/// itself.
fn run(probes: &[Probe], input: &DoctorInput, limit: Duration) -> Vec<Check> {
    let deadline = Instant::now() + limit;
    let input = Arc::new(input.clone());
    let (sender, receiver) = mpsc::channel();
    for (index, (_, probe)) in probes.iter().copied().enumerate() {
        let (sender, input) = (sender.clone(), Arc::clone(&input));
        std::thread::spawn(move || {
            // Nobody listens any more after the deadline.
            let _ = sender.send((index, probe(&input)));
        });
    }
    drop(sender);

    let mut answers: Vec<Option<Vec<Check>>> = vec![None; probes.len()];
    while let Ok((index, checks)) = receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        answers[index] = Some(checks);
    }
    let unanswered = |name| {
        let remedy = "see whether the host is overloaded or a disk hangs, then run tiffin doctor again";
        vec![Check::fail(name, format!("no answer within {} ms", limit.as_millis()), remedy)]
    };
    let answers = answers.into_iter().zip(probes);
    answers.flat_map(|(checks, (name, _))| checks.unwrap_or_else(|| unanswered(*name))).collect()
}
