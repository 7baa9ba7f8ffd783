//! `tiffin admin`: what only who is on the server's host may do, straight in its database.

use std::{io::Read, process::ExitCode};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use tiffin_store::Store;
use tiffin_types::limits::PASSWORD_BYTES;

use crate::{commands::settings::Settings, failure::Failure, output};

#[derive(Debug, Args)]
pub(crate) struct AdminArgs {
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Debug, Subcommand)]
enum AdminCommand {
    /// Set a new password and end every session of its user; a server may run meanwhile
    Password(PasswordArgs),
}

#[derive(Debug, Args)]
struct PasswordArgs {
    #[command(flatten)]
    settings: Settings,
    /// Whose password; the setting `admin.email` when not given
    #[arg(long, value_name = "ADDRESS")]
    email: Option<String>,
    /// Read the password from stdin (one line) instead of making a random one and printing it
    #[arg(long)]
    stdin: bool,
}

/// Runs `tiffin admin`.
pub(crate) async fn run(args: AdminArgs) -> Result<ExitCode, Failure> {
    let AdminCommand::Password(args) = args.command;
    let config = args.settings.load(&[])?;
    let email = args.email.clone().unwrap_or_else(|| config.admin_email.clone());
    let (password, is_own) = match args.stdin {
        true => (from_stdin()?, true),
        false => (tiffin_server::random_password(), false),
    };
    let store = Store::open(config.database_url.reveal()).await.context("opening the database")?;
    let set = tiffin_server::set_password(&store, &email, password.clone()).await;
    store.close().await;
    set.map_err(anyhow::Error::from)?;
    if !is_own {
        output::print(&format!("{password}\n"))?;
    }
    output::print_error(&format!("{}: the password is set, and every session has ended\n", output::visible(&email)))?;
    Ok(ExitCode::SUCCESS)
}

/// One line, without its end.
fn from_stdin() -> anyhow::Result<String> {
    let most = PASSWORD_BYTES.end() + 2;
    let mut text = String::new();
    std::io::stdin().take(most as u64).read_to_string(&mut text).context("reading the password from stdin")?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let password = text.strip_suffix('\r').unwrap_or(text);
    if password.contains('\n') {
        bail!("the password on stdin must be one line");
    }
    Ok(password.to_owned())
}
