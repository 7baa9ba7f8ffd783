//! `tiffin host`: what concerns this machine as a whole, without a server.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};

use crate::{
    commands::{data_dir::DataLock, settings::Settings},
    failure::Failure,
    output,
};

#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    #[command(subcommand)]
    command: HostCommand,
}

#[derive(Debug, Subcommand)]
enum HostCommand {
    /// End every VM of a data folder and remove what its server set up on the host; disks and images stay
    Clean(CleanArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Refused while a server runs on the data folder.")]
struct CleanArgs {
    #[command(flatten)]
    settings: Settings,
}

/// Runs `tiffin host`.
pub(crate) fn run(args: &HostArgs) -> Result<ExitCode, Failure> {
    let HostCommand::Clean(clean) = &args.command;
    let config = clean.settings.load(&[])?;
    let (data_dir, run_dir) = (config.data_dir.as_std_path(), config.run_dir.as_std_path());
    // Without the folder there was never a server, and there is nothing to lock.
    let _lock = if data_dir.exists() { Some(DataLock::take(data_dir)?) } else { None };
    let cleaned = tiffin_engine::monitored::clean(data_dir, run_dir).context("cleaning the host")?;
    output::print(&format!("ended {} VMs, released {} images\n", cleaned.vms, cleaned.images))?;
    Ok(ExitCode::SUCCESS)
}
