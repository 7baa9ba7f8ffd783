//! VMs of QEMU's that begin with a template, against QEMU itself going on from the same one; and what many of them take.

use std::time::{Duration, Instant};

use anyhow::Context;
use tiffin_protocol::{Command, Exec};
use tiffin_types::{id::VmId, vm::VmSize};

use super::{
    Bench, SCENARIO_LIMIT,
    host::{self, Process},
    raw::{RawMachine, Template},
    report::{Figure, Scenario},
    stats::{Samples, ratio},
};
use crate::failure::Failure;

const WARM_UP: usize = 2;
const GOAL: f64 = 1.3;
const COMMAND: &str = "echo hi";
const SIZE: VmSize = VmSize { cpus: 1, mem_mb: 256, disk_mb: 1024 };
const CLONES: usize = 10;
/// For all clones, in MiB.
const CLONES_GOAL: f64 = 800.0;
/// How long the server may take to seal a template after the VM that left it is up.
const SEALED: Duration = Duration::from_secs(30);

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("template");
    let first = match bench.api.create_on("qemu", 1, SIZE.mem_mb).await {
        Ok(created) => created,
        Err(Failure::Api(error)) if error.status == 400 => {
            scenario.notes.push(format!("skipped, as the server has no VMs of QEMU's: {}", error.message));
            return Ok(scenario);
        }
        Err(failure) => return Err(failure.into()),
    };
    let isolation = bench.api.about(&first, "isolation").await?;
    scenario.notes.push(format!("isolation: {isolation}"));
    let template = sealed(bench).await;
    bench.api.delete(&first).await?;
    let mut own = Samples::new("tiffin: create from a template, first command");
    let mut raw = Samples::new("QEMU itself: restore of the same, first command");
    let beside = match (&bench.machine, &template) {
        (Ok(machine), Ok(template)) => Some((machine, template)),
        (Err(why), _) => {
            scenario.notes.push(format!("QEMU itself is not measured: {why}"));
            None
        }
        (_, Err(why)) => {
            scenario.notes.push(format!("QEMU itself is not measured: {why:#}"));
            None
        }
    };
    let (deadline, kvm) = (Instant::now() + SCENARIO_LIMIT, isolation == "hardware-vm");
    for round in 0..WARM_UP + bench.count(20, 3) {
        if Instant::now() > deadline {
            break;
        }
        bench.settle().await;
        let ours = begin(bench).await;
        bench.settle().await;
        let theirs = match beside {
            Some((machine, template)) => Some(restore(machine, template, kvm).await),
            None => None,
        };
        if round >= WARM_UP {
            own.note(ours);
            theirs.into_iter().for_each(|theirs| raw.note(theirs));
        }
    }
    let (all, each) = clones(bench).await?;
    scenario.figures = vec![
        Figure::goal("first command p50, over QEMU itself", "", ratio(own.p50(), raw.p50()), GOAL),
        Figure::goal(format!("{CLONES} VMs of {} MiB, PSS", SIZE.mem_mb), "MiB", all, CLONES_GOAL),
        Figure::plain("of that, one more VM", "MiB", each),
    ];
    if own.p50().is_none() {
        scenario.failure = Some("no VM came up".to_owned());
    }
    scenario.samples = [own, raw].iter().map(Samples::summary).filter(|one| one.count + one.failed > 0).collect();
    Ok(scenario)
}

/// The template that the first VM has left.
async fn sealed(bench: &Bench) -> anyhow::Result<Template> {
    let deadline = Instant::now() + SEALED;
    loop {
        match Template::find(&bench.data_dir, SIZE) {
            Some(template) => return Ok(template),
            None if Instant::now() > deadline => anyhow::bail!("there is no template in {}", bench.data_dir.display()),
            None => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn begin(bench: &Bench) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let id = bench.api.create_on("qemu", 1, SIZE.mem_mb).await?;
    bench.api.exec(&id, COMMAND).await?;
    let time = start.elapsed();
    let mode = bench.api.about(&id, "provisionMode").await?;
    bench.api.delete(&id).await?;
    anyhow::ensure!(mode == "snapshot", "a VM came up by {mode}");
    Ok(time)
}

/// The same command as the API has run.
async fn restore(machine: &RawMachine, template: &Template, kvm: bool) -> anyhow::Result<Duration> {
    let exec = Exec {
        command: Command::Shell(COMMAND.to_owned()),
        cwd: "/workspace".into(),
        env: Default::default(),
        image_env: Default::default(),
        uid: 1000,
        gid: 1000,
        timeout_ms: 30_000,
        stdout_cap: 1 << 20,
        stderr_cap: 1 << 20,
        stdin: false,
        terminal: None,
    };
    machine.restore(template, kvm, exec).await
}

/// What so many VMs take together in MiB, each of which has run a command, and what the last of them added.
async fn clones(bench: &Bench) -> anyhow::Result<(Option<f64>, Option<f64>)> {
    let mut ids: Vec<VmId> = Vec::new();
    let mut before = None;
    for _ in 0..CLONES {
        before = taken(&ids);
        let id = bench.api.create_on("qemu", 1, SIZE.mem_mb).await?;
        bench.api.exec(&id, COMMAND).await.context("a command in a clone")?;
        ids.push(id);
    }
    let all = taken(&ids);
    for id in &ids {
        bench.api.delete(id).await?;
    }
    Ok((all, all.zip(before).map(|(all, before)| all - before)))
}

/// The memory of the VMs' QEMUs and monitors, in MiB.
fn taken(ids: &[VmId]) -> Option<f64> {
    let of_them = |process: &Process| (process.is_qemu() || process.is_tiffin("monitor")) && host::is_of(process, ids);
    let memory = host::processes().into_iter().filter(of_them).filter_map(|process| host::memory(process.pid));
    memory.map(|memory| memory.pss_mb * 1e6 / f64::from(1 << 20)).reduce(|a, b| a + b)
}
