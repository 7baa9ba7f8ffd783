//! The command line's top level: the subcommands and what they share. Each subcommand's own arguments stand beside its code.

use clap::{Parser, Subcommand};

use crate::{
    bench,
    commands::{
        account, admin, completion, config, doctor, host, image, ingress, key, logs, serve, snapshot, vm, webhook,
    },
};

/// Runs other people's code in isolated VMs.
#[derive(Debug, Parser)]
#[command(name = "tiffin", version, arg_required_else_help = true, max_term_width = 120)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the server
    Serve(serve::ServeArgs),
    /// Create VMs, run commands in them, read their logs, delete them
    Vm(vm::VmArgs),
    /// Show what a VM's program prints
    Logs(logs::LogsArgs),
    /// Saved VMs, of which others are made
    Snapshot(snapshot::SnapshotArgs),
    /// Images that VMs start from
    Image(image::ImageArgs),
    /// How VMs are reached from outside
    Ingress(ingress::IngressArgs),
    /// API keys (needs a key with the admin scope)
    Key(key::KeyArgs),
    /// Accounts (needs a key with the admin scope)
    Account(account::AccountArgs),
    /// Webhooks: who is told of what happens (needs a key with the admin scope)
    Webhook(webhook::WebhookArgs),
    /// Set a password, on the server's host
    Admin(admin::AdminArgs),
    /// See whether this host can run VMs, and what it lacks
    Doctor(doctor::DoctorArgs),
    /// List the server's settings
    Config(config::ConfigArgs),
    /// Clear this host of VMs
    Host(host::HostArgs),
    /// Measure a running server, and runsc beside it
    Bench(bench::BenchArgs),
    /// Print a completion script for a shell
    Completion(completion::CompletionArgs),
}

impl Command {
    /// The exit code of an error that is Tiffin's own: what runs something in a VM keeps it apart from that one's.
    pub(crate) fn own_error_code(&self) -> u8 {
        match self {
            Command::Vm(vm::VmArgs {
                command: vm::VmCommand::Exec(_) | vm::VmCommand::Run(_) | vm::VmCommand::Shell(_),
                ..
            }) => vm::exec::OWN_ERROR,
            _ => 1,
        }
    }
}

/// How to reach a server.
#[derive(Clone, clap::Args)]
pub(crate) struct Connection {
    /// The server's address
    #[arg(
        long,
        global = true,
        env = "TIFFIN_URL",
        default_value = "http://127.0.0.1:3000",
        help_heading = "Connection"
    )]
    pub(crate) url: String,

    /// An API key; prefer the environment, since other users of this machine can see arguments
    #[arg(long, global = true, env = "TIFFIN_API_KEY", hide_env_values = true, help_heading = "Connection")]
    pub(crate) api_key: Option<String>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("url", &self.url).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_api_key_is_never_shown() {
        let cli = Cli::try_parse_from(["tiffin", "vm", "ls", "--api-key", "tfn_secret"]).unwrap();
        assert!(!format!("{cli:?}").contains("tfn_secret"));
        let mut command = Cli::command();
        for name in ["vm", "key"] {
            let help = command.find_subcommand_mut(name).unwrap().render_long_help().to_string();
            assert!(help.contains("TIFFIN_API_KEY") && !help.contains("TIFFIN_API_KEY="), "{help}");
        }
    }

    #[test]
    fn a_vm_id_is_checked_before_it_is_sent() {
        let refused = Cli::try_parse_from(["tiffin", "vm", "get", "../admin"]).unwrap_err();
        assert!(refused.to_string().contains("14 hexadecimal digits"), "{refused}");
    }

    #[test]
    fn exec_keeps_what_follows_the_dashes_as_it_is() {
        let cli =
            Cli::try_parse_from(["tiffin", "vm", "exec", "vm-0123456789abcd", "--env", "A=b", "--", "ls", "--json"])
                .unwrap();
        assert_eq!(cli.command.own_error_code(), 125);
        let Command::Vm(vm::VmArgs { command: vm::VmCommand::Exec(args), .. }) = cli.command else { panic!("exec") };
        assert_eq!(args.command, ["ls", "--json"]);
        assert!(!args.json);
    }
}
