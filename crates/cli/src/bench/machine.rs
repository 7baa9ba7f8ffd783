//! VMs of QEMU's: their cold boot, against QEMU itself booting to an init of one word; and a command in one that runs, beside
//! the same in a VM of gVisor's.

use std::time::{Duration, Instant};

use tiffin_types::{id::VmId, vm::VmSize};

use super::{
    Bench, SCENARIO_LIMIT,
    raw::RawMachine,
    report::{Figure, Scenario},
    stats::{Samples, ratio},
};
use crate::failure::Failure;

const WARM_UP: usize = 2;
const BOOT_GOAL: f64 = 1.3;
const EXEC_GOAL_MS: f64 = 10.0;
const COMMAND: &str = "/bin/true";
const MEM_MB: u32 = 256;
const DISK_MB: u32 = 1024;
/// After a command another shell starts to wait for the next one, which an emulated processor takes that long for.
const BREATH: Duration = Duration::from_millis(300);

struct Found {
    boot: Samples,
    raw_boot: Samples,
    exec: Samples,
    share: Samples,
    gvisor: Samples,
}

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut found = Found {
        boot: Samples::new("tiffin: start of a stopped VM, qemu"),
        raw_boot: Samples::new("QEMU itself, to an init's first word"),
        exec: Samples::new("tiffin: exec /bin/true, qemu"),
        share: Samples::new("of that, beyond the time in the guest"),
        gvisor: Samples::new("tiffin: exec /bin/true, gvisor"),
    };
    let first = match bench.api.create_on("qemu", bench.cpus(), MEM_MB).await {
        Ok(created) => created,
        Err(Failure::Api(error)) if error.status == 400 => {
            let notes = vec![format!("skipped, as the server has no VMs of QEMU's: {}", error.message)];
            return Ok(Scenario { notes, ..Scenario::new("qemu") });
        }
        Err(failure) => return Err(failure.into()),
    };
    let isolation = bench.api.about(&first, "isolation").await?;
    let mut scenario = Scenario::new("qemu");
    scenario.notes.push(format!("isolation: {isolation}"));
    found.execs(bench, &first).await?;
    match &bench.machine {
        Ok(raw) => found.boots(bench, &first, Some(raw), isolation == "hardware-vm").await,
        Err(why) => {
            scenario.notes.push(format!("QEMU itself is not measured: {why}"));
            found.boots(bench, &first, None, false).await;
        }
    }
    bench.api.delete(&first).await?;
    Ok(found.scenario(scenario))
}

impl Found {
    /// A VM that was stopped boots, where a new one would begin with a template.
    async fn boots(&mut self, bench: &Bench, own: &VmId, raw: Option<&RawMachine>, kvm: bool) {
        let cpus = u32::try_from(bench.cpus()).unwrap_or(1);
        let size = VmSize { cpus, mem_mb: MEM_MB, disk_mb: DISK_MB };
        let deadline = Instant::now() + SCENARIO_LIMIT;
        for round in 0..WARM_UP + bench.count(20, 3) {
            if Instant::now() > deadline {
                break;
            }
            bench.settle().await;
            let booted = bench.api.restart(own).await;
            bench.settle().await;
            let beside = match raw {
                Some(raw) => Some(raw.boot(size, kvm).await),
                None => None,
            };
            if round >= WARM_UP {
                self.boot.note(booted);
                beside.into_iter().for_each(|beside| self.raw_boot.note(beside));
            }
        }
    }

    async fn execs(&mut self, bench: &Bench, machine: &VmId) -> anyhow::Result<()> {
        let gvisor = bench.api.create_on("gvisor", bench.cpus(), MEM_MB).await?;
        let deadline = Instant::now() + SCENARIO_LIMIT;
        for round in 0..WARM_UP + bench.count(100, 10) {
            if Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(BREATH).await;
            let own = bench.api.exec(machine, COMMAND).await;
            let beside = bench.api.exec(&gvisor, COMMAND).await;
            if round < WARM_UP {
                continue;
            }
            if let Ok(own) = &own
                && let Some(guest) = own.guest
            {
                self.share.note(Ok(own.total.saturating_sub(guest)));
            }
            self.exec.note(own.map(|own| own.total));
            self.gvisor.note(beside.map(|beside| beside.total));
        }
        bench.api.delete(&gvisor).await
    }

    fn scenario(&self, mut scenario: Scenario) -> Scenario {
        let boot = ratio(self.boot.p50(), self.raw_boot.p50());
        scenario.figures = vec![
            Figure::goal("boot p50, over QEMU itself to an init", "", boot, BOOT_GOAL),
            Figure::goal("exec p50", "ms", self.exec.p50(), EXEC_GOAL_MS),
            Figure::plain("exec p50, over gvisor's", "", ratio(self.exec.p50(), self.gvisor.p50())),
        ];
        if self.boot.p50().is_none() || self.exec.p50().is_none() {
            scenario.failure = Some("no VM came up, or no command succeeded".to_owned());
        }
        let all = [&self.boot, &self.raw_boot, &self.exec, &self.share, &self.gvisor];
        scenario.samples = all.map(Samples::summary).into_iter().filter(|one| one.count + one.failed > 0).collect();
        scenario
    }
}
