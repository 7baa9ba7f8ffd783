//! `tiffin doctor`: what this host lacks for running VMs. The server asks the same questions at its start.

use std::process::ExitCode;

use clap::Args;
use tiffin_engine::doctor::{self, Check, DoctorInput, Level};
use tiffin_server::{Config, config::EngineChoice};

use crate::{
    commands::settings::Settings,
    failure::Failure,
    output::{self, Spinner},
};

#[derive(Debug, Args)]
#[command(after_help = "Exits 1 when something is missing without which no VM can run.")]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    settings: Settings,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs `tiffin doctor`.
pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load(&[])?;
    let spinner = Spinner::start("looking at the host");
    let checks = doctor::check(&input(&config));
    drop(spinner);
    if args.json {
        output::json(&serde_json::to_value(&checks).map_err(anyhow::Error::from)?)?;
    } else {
        output::table(&["", "CHECK", "FOUND"], checks.iter().map(row).collect())?;
        let remedies: String = checks.iter().filter_map(remedy).collect();
        if !remedies.is_empty() {
            output::print(&format!("\n{remedies}"))?;
        }
    }
    Ok(if doctor::must_refuse(&checks) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Looks at the host for the server: warnings are logged, failures refuse its start.
pub(crate) fn refuse_unfit_host(config: &Config) -> Result<(), Failure> {
    let checks = doctor::check(&input(config));
    for check in checks.iter().filter(|check| check.level == Level::Warn) {
        tracing::warn!(check = check.name, remedy = check.remedy, "{}", check.found);
    }
    if !doctor::must_refuse(&checks) {
        return Ok(());
    }
    let failed: String = checks.iter().filter(|check| check.level == Level::Fail).filter_map(remedy).collect();
    Err(anyhow::anyhow!("this host can't run VMs:\n{}", failed.trim_end()).into())
}

fn input(config: &Config) -> DoctorInput {
    DoctorInput {
        engine: match config.engine {
            EngineChoice::Named(name) => Some(name),
            EngineChoice::Auto => None,
        },
        qemu: config.qemu.program.clone(),
        kernel: config.qemu.kernel.clone(),
        data_dir: config.data_dir.clone(),
        run_dir: config.run_dir.clone(),
        runsc: config.runsc.clone(),
        agent: config.agent.clone(),
        listen: Some(config.listen),
        ingress: config.ingress.listen,
    }
}

fn row(check: &Check) -> Vec<String> {
    vec![word(check.level).to_owned(), check.name.to_owned(), check.found.clone()]
}

/// `fail NAME: what was found` and what to do about it; nothing where all is well.
fn remedy(check: &Check) -> Option<String> {
    let remedy = check.remedy.as_deref()?;
    let found = output::visible(&check.found);
    Some(format!("{} {}: {found}\n    {}\n", word(check.level), check.name, output::visible(remedy)))
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warn => "warn",
        Level::Fail => "FAIL",
    }
}
