//! `tiffin bench`: measures a running server over HTTP, and `runsc` and QEMU themselves beside it in the same run.
//!
//! Machines differ and are noisy, so the figures that count are ratios: each measurement of the platform alternates
//! with one of `runsc` on the same image, and both see the same machine. Every loop is bounded in count and time.
//!
//! Invariant: what a scenario creates is deleted after it, however it ended. A missed goal is reported, not an error;
//! a scenario that couldn't measure is.

mod api;
mod burst;
mod density;
mod exec;
mod files;
mod host;
mod logs;
mod machine;
mod pool;
mod program;
mod raw;
mod report;
mod script;
mod snapshot;
mod stats;
mod template;
mod tti;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::{Args, ValueEnum};
use tiffin_engine::qemu::QEMU;

use crate::{
    args::Connection,
    client::Client,
    failure::Failure,
    output::{self, Spinner},
};
use api::Api;
use raw::{Raw, RawMachine};
use report::{Environment, Report, Scenario};

/// How long one scenario may take before what it has is taken.
const SCENARIO_LIMIT: Duration = Duration::from_secs(300);

#[derive(Debug, Args)]
#[command(after_help = "\
Needs a running server; beside it `runsc` is measured, for which it must run as root on the server's host.
Exits 0 when everything was measured, whether or not the goals were reached; 1 when a scenario failed.")]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    connection: Connection,
    /// Measure only this (may be repeated)
    #[arg(long = "scenario", value_enum)]
    scenarios: Vec<Which>,
    /// Few repetitions: to see that it works, not to compare
    #[arg(long)]
    quick: bool,
    /// Write the report as JSON to this file as well; - is stdout, instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The server's data folder, where the default image is found
    #[arg(long, value_name = "DIR", env = "TIFFIN_DATA_DIR", default_value = "/var/lib/tiffin")]
    data_dir: PathBuf,
    /// The image that runsc starts from (EROFS); the default image when not given
    #[arg(long, value_name = "FILE")]
    rootfs: Option<PathBuf>,
    /// The runsc to measure
    #[arg(long, value_name = "FILE", env = "TIFFIN_RUNSC")]
    runsc: Option<PathBuf>,
    /// The kernel that QEMU itself boots: the server's setting `qemu.kernel`
    #[arg(long, value_name = "FILE", env = "TIFFIN_QEMU__KERNEL")]
    kernel: Option<PathBuf>,
    /// The QEMU to measure
    #[arg(long, value_name = "FILE", env = "TIFFIN_QEMU__PROGRAM", default_value = QEMU)]
    qemu: PathBuf,
    /// For the scenario `program`: an image whose program prints as fast as it can for some seconds
    #[arg(long, value_name = "ID")]
    program_image: Option<String>,
    /// Measure the platform alone
    #[arg(long)]
    no_raw: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// From create to the first command's output
    Tti,
    /// The same where the server has a VM ready; only by name, as the others want its pool off
    Pool,
    /// A command in a running VM
    Exec,
    /// VMs of QEMU's, where the server has them: their boot against QEMU itself, and a command beside gVisor's
    Qemu,
    /// New ones of them, which begin with a template, against QEMU itself going on from it; and the memory of ten
    Template,
    /// Saving a VM and going on from it
    Snapshot,
    /// A TypeScript program in a running VM
    Script,
    /// A folder into a VM and out of it
    Files,
    /// Many creates at once
    Burst,
    /// Memory of many running VMs
    Density,
    /// The store of what programs print, against grep; only by name, as it needs no VM
    Logs,
    /// A program's lines on their way into its log; only by name, as it needs an image
    Program,
}

impl Which {
    /// What is measured when nothing is chosen: all that wants a server without a pool.
    const USUAL: [Which; 9] = [
        Which::Tti,
        Which::Exec,
        Which::Qemu,
        Which::Template,
        Which::Snapshot,
        Which::Script,
        Which::Files,
        Which::Burst,
        Which::Density,
    ];

    fn name(self) -> &'static str {
        match self {
            Which::Tti => "tti",
            Which::Pool => "pool",
            Which::Exec => "exec",
            Which::Qemu => "qemu",
            Which::Template => "template",
            Which::Snapshot => "snapshot",
            Which::Script => "script",
            Which::Files => "files",
            Which::Burst => "burst",
            Which::Density => "density",
            Which::Logs => "logs",
            Which::Program => "program",
        }
    }
}

/// Between two samples.
const SETTLE: Duration = Duration::from_millis(100);

/// What the scenarios work with.
struct Bench {
    api: Api,
    /// `Err` says why runsc isn't measured.
    raw: Result<Raw, String>,
    /// `Err` says why QEMU itself isn't.
    machine: Result<RawMachine, String>,
    data_dir: PathBuf,
    program_image: Option<String>,
    quick: bool,
}

impl Bench {
    /// vCPUs of a VM that is compared with `runsc`, which nothing holds to less than the whole host.
    fn cpus(&self) -> usize {
        std::thread::available_parallelism().map_or(1, usize::from).min(8)
    }

    /// Lets the machine come to rest. What was measured before goes on for a moment (a sandbox forgets a process, a VM is
    /// cleared away), and without a pause whoever is measured next pays for it.
    async fn settle(&self) {
        tokio::time::sleep(SETTLE).await;
    }

    /// `full` repetitions, or `quick` ones.
    fn count(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }
}

/// Runs `tiffin bench`.
pub(crate) async fn run(args: BenchArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    // Says at once, and in the API's words, that there is no server or no key.
    client.get("/v1/vms").await?;
    let raw =
        if args.no_raw { Err("--no-raw".to_owned()) } else { Raw::new(&args).await.map_err(|e| format!("{e:#}")) };
    let machine = match args.no_raw {
        true => Err("--no-raw".to_owned()),
        false => RawMachine::new(&args).map_err(|e| format!("{e:#}")),
    };
    let (data_dir, program_image) = (args.data_dir.clone(), args.program_image.clone());
    let bench = Bench { api: Api::new(client), raw, machine, data_dir, program_image, quick: args.quick };
    let chosen = if args.scenarios.is_empty() { Which::USUAL.to_vec() } else { args.scenarios.clone() };
    let mut report = Report { environment: Environment::read(&bench).await, scenarios: Vec::new() };
    for which in chosen {
        report.scenarios.push(measure(&bench, which).await?);
    }
    tell(&report, args.json.as_deref())?;
    Ok(if report.scenarios.iter().all(|scenario| scenario.failure.is_none()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs one scenario and clears up after it.
async fn measure(bench: &Bench, which: Which) -> Result<Scenario, Failure> {
    let spinner = Spinner::start(format!("measuring {}", which.name()));
    let start = Instant::now();
    let run = async {
        match which {
            Which::Tti => tti::run(bench).await,
            Which::Pool => pool::run(bench).await,
            Which::Exec => exec::run(bench).await,
            Which::Qemu => machine::run(bench).await,
            Which::Template => template::run(bench).await,
            Which::Snapshot => snapshot::run(bench).await,
            Which::Script => script::run(bench).await,
            Which::Files => files::run(bench).await,
            Which::Burst => burst::run(bench).await,
            Which::Density => density::run(bench).await,
            Which::Logs => logs::run(bench).await,
            Which::Program => program::run(bench).await,
        }
    };
    let outcome = tokio::select! {
        outcome = run => Some(outcome),
        _ = tokio::signal::ctrl_c() => None,
    };
    bench.api.delete_all().await;
    if let Ok(raw) = &bench.raw {
        raw.delete_all().await;
    }
    drop(spinner);
    let mut scenario = match outcome {
        None => return Err(anyhow::anyhow!("interrupted; what the bench made is deleted").into()),
        Some(Ok(scenario)) => scenario,
        Some(Err(error)) => Scenario { failure: Some(format!("{error:#}")), ..Scenario::new(which.name()) },
    };
    scenario.seconds = start.elapsed().as_secs_f64();
    Ok(scenario)
}

fn tell(report: &Report, json: Option<&std::path::Path>) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(report).map_err(anyhow::Error::from)?;
    match json {
        Some(path) if path.as_os_str() == "-" => return output::print(&format!("{text}\n")),
        Some(path) => std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))?,
        None => {}
    }
    report.print()
}
