//! Many small VMs running at once: what the server, the monitors, the agents and the sandboxes take of memory.
//!
//! A monitor is a process of the same program as the server, so most of its resident pages are shared by all of them:
//! what one more VM costs is its proportional share (PSS), which is what the goal is held against.

use anyhow::ensure;
use futures_util::{StreamExt, stream};
use tiffin_types::id::VmId;

use super::{
    Bench,
    host::{self, Memory, Process},
    report::{Figure, Scenario},
};

const CREATES_AT_ONCE: usize = 4;
const AGENTS_ASKED: usize = 5;
const MEM_MB: u32 = 128;

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let count = bench.count(50, 4);
    let earlier: Vec<i32> = host::processes().iter().map(|process| process.pid).collect();
    let creates = (0..count).map(|_| bench.api.create(1, MEM_MB));
    let created: Vec<_> = stream::iter(creates).buffer_unordered(CREATES_AT_ONCE).collect().await;
    let ids: Vec<VmId> = created.into_iter().collect::<Result<_, _>>()?;
    let mut agents = Vec::new();
    for id in ids.iter().take(AGENTS_ASKED) {
        agents.push(agent_mb(bench, id).await?);
    }
    let new: Vec<Process> = host::processes().into_iter().filter(|process| !earlier.contains(&process.pid)).collect();
    let of = |part: &dyn Fn(&Process) -> bool| per_vm(new.iter().filter(|process| part(process)), count);
    let monitor = of(&|process| process.is_tiffin("monitor"));
    let sandbox = of(&|process| process.is_runsc());
    let server = bench.api.port().and_then(host::listener).and_then(host::memory).map(|memory| memory.rss_mb);
    let agent = agents.iter().copied().reduce(f64::max);
    let both = monitor.and_then(|monitor| Some(monitor.pss_mb + agent?));
    let mut scenario = Scenario::new("density");
    scenario.figures = vec![
        Figure::plain(format!("VMs of {MEM_MB} MiB running"), "", Some(ids.len() as f64)),
        Figure::goal("server, RSS", "MB", server, 60.0),
        Figure::goal("monitor (PSS) and agent (RSS), one VM", "MB", both, 8.0),
        Figure::plain("monitor, PSS", "MB", monitor.map(|memory| memory.pss_mb)),
        Figure::plain("monitor, RSS", "MB", monitor.map(|memory| memory.rss_mb)),
        Figure::plain("agent, RSS in the guest, the largest", "MB", agent),
        Figure::plain("sandbox, PSS", "MB", sandbox.map(|memory| memory.pss_mb)),
        Figure::plain("sandbox, RSS", "MB", sandbox.map(|memory| memory.rss_mb)),
    ];
    if monitor.is_none() {
        scenario.notes.push("no monitor processes seen: is the server on this host?".to_owned());
    }
    Ok(scenario)
}

/// The sum over the processes, divided by the VMs; `None` where there is no such process.
fn per_vm<'a>(processes: impl Iterator<Item = &'a Process>, vms: usize) -> Option<Memory> {
    let all: Vec<Memory> = processes.filter_map(|process| host::memory(process.pid)).collect();
    let sum = |part: fn(&Memory) -> f64| all.iter().map(part).sum::<f64>() / vms as f64;
    (!all.is_empty()).then(|| Memory { rss_mb: sum(|memory| memory.rss_mb), pss_mb: sum(|memory| memory.pss_mb) })
}

/// The resident memory of the guest's process 1, in MB.
async fn agent_mb(bench: &Bench, id: &VmId) -> anyhow::Result<f64> {
    let status = bench.api.exec(id, "grep VmRSS /proc/1/status").await?.stdout;
    let kib: Option<f64> = status.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    ensure!(kib.is_some(), "the guest tells no VmRSS: {status:?}");
    Ok(kib.unwrap_or_default() * 1024.0 / 1e6)
}
