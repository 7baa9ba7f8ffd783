//! The `tiffin` binary: joins the server, the per-VM monitor and the user's commands.
//!
//! Invariant: the monitor and the readers of uploaded filesystems and of layers are entered before anything else happens in the process,
//! no thread, no runtime and no argument parser, because they make namespaces and the one forks. Everything else is parsed by [`args`] and dispatched by [`run`].

mod args;
mod bench;
mod client;
mod commands;
mod failure;
mod output;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;
use tiffin_image::{convert, layers};

use crate::{
    args::{Cli, Command},
    failure::Failure,
};

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    let arguments = || argv[2..].iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>();
    match argv.get(1).and_then(|word| word.to_str()) {
        Some("monitor") => return tiffin_engine::monitor::main(&arguments()),
        Some(convert::SUBCOMMAND) => return convert::main(&arguments()),
        Some(layers::SUBCOMMAND) => return layers::main(&arguments()),
        Some(_) | None => {}
    }
    let cli = match Cli::try_parse_from(&argv) {
        Ok(cli) => cli,
        Err(refused) => return usage(&refused, &argv),
    };
    let own_error = cli.command.own_error_code();
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => failure.report(own_error),
    }
}

/// Prints help, the version or what is wrong with the arguments.
fn usage(refused: &clap::Error, argv: &[OsString]) -> ExitCode {
    let printed = refused.print();
    if !refused.use_stderr() {
        return if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(failure::CLOSED_PIPE) };
    }
    let mut words = argv.iter().take_while(|word| *word != "--");
    let ours = words.any(|word| word == "vm") && words.any(|word| word == "exec" || word == "run" || word == "shell");
    ExitCode::from(if ours { commands::vm::exec::OWN_ERROR } else { failure::USAGE })
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Vm(args) => on_one_thread(commands::vm::run(args)),
        Command::Logs(args) => on_one_thread(commands::logs::run(args)),
        Command::Snapshot(args) => on_one_thread(commands::snapshot::run(args)),
        Command::Ingress(args) => on_one_thread(commands::ingress::run(args)),
        Command::Key(args) => on_one_thread(commands::key::run(args)),
        Command::Account(args) => on_one_thread(commands::account::run(args)),
        Command::Webhook(args) => on_one_thread(commands::webhook::run(args)),
        Command::Admin(args) => on_one_thread(commands::admin::run(args)),
        Command::Image(args) => on_one_thread(commands::image::run(args)),
        Command::Bench(args) => on_one_thread(bench::run(args)),
        Command::Serve(args) => commands::serve::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Host(args) => commands::host::run(&args),
        Command::Config(args) => commands::config::run(&args),
        Command::Completion(args) => commands::completion::run(&args),
    }
}

/// Runs a client command: it waits for one server most of the time, so one thread is enough.
fn on_one_thread<F: Future<Output = Result<ExitCode, Failure>>>(command: F) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(anyhow::Error::from)?;
    runtime.block_on(command)
}
