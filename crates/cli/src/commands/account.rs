//! `tiffin account`: accounts and their quotas, through the admin calls of the API.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tiffin_types::id::AccountId;

use crate::{
    args::Connection,
    client::Client,
    failure::Failure,
    output::{self, field},
};

#[derive(Debug, Args)]
pub(crate) struct AccountArgs {
    #[command(subcommand)]
    command: AccountCommand,
    #[command(flatten)]
    connection: Connection,
    /// Print the API's JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum AccountCommand {
    /// Make an account
    Create(CreateArgs),
    /// List the accounts
    #[command(visible_alias = "list")]
    Ls,
    /// Show one account and what it uses
    Get {
        /// The account's id, from `tiffin account ls`
        id: AccountId,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// A name to know it by
    name: String,
    #[command(flatten)]
    quota: Option<QuotaArgs>,
}

/// A quota is given whole or not at all: then the server's default holds.
#[derive(Debug, Args)]
#[group(id = "quota")]
struct QuotaArgs {
    /// Quota: VMs that exist
    #[arg(long, requires_all = ["cpus", "mem", "disk"])]
    vms: Option<u32>,
    /// Quota: vCPUs of running VMs
    #[arg(long, requires_all = ["vms", "mem", "disk"])]
    cpus: Option<u32>,
    /// Quota: memory of running VMs
    #[arg(long, value_name = "MIB", requires_all = ["vms", "cpus", "disk"])]
    mem: Option<u64>,
    /// Quota: disk of VMs that exist
    #[arg(long, value_name = "MIB", requires_all = ["vms", "cpus", "mem"])]
    disk: Option<u64>,
}

/// Runs `tiffin account`.
pub(crate) async fn run(args: AccountArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    match args.command {
        AccountCommand::Create(create) => {
            let account = client.post("/v1/admin/accounts", Some(&body(&create))).await?;
            if args.json {
                output::json(&account)?;
            } else {
                output::print(&format!("{}\n", output::visible(&field(&account, "id"))))?;
            }
        }
        AccountCommand::Ls => {
            let accounts = client.get("/v1/admin/accounts").await?;
            if args.json { output::json(&accounts)? } else { list(&accounts)? }
        }
        AccountCommand::Get { id } => {
            let account = client.get(&format!("/v1/admin/accounts/{id}")).await?;
            if args.json { output::json(&account)? } else { list(&Value::Array(vec![account]))? }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn body(args: &CreateArgs) -> Value {
    let mut body = json!({ "name": args.name });
    if let Some(quota) = &args.quota {
        body["quota"] = json!({ "vms": quota.vms, "cpus": quota.cpus, "memMb": quota.mem, "diskMb": quota.disk });
    }
    body
}

fn list(accounts: &Value) -> Result<(), Failure> {
    let rows = accounts
        .as_array()
        .into_iter()
        .flatten()
        .map(|account| {
            let quota = account.get("quota").unwrap_or(&Value::Null);
            let usage = account.get("usage").unwrap_or(&Value::Null);
            let mut row = vec![field(account, "id"), field(account, "name")];
            row.extend(
                ["vms", "cpus", "memMb", "diskMb"].iter().map(|name| of(&field(usage, name), &field(quota, name))),
            );
            row.push(field(account, "createdAt"));
            row
        })
        .collect();
    output::table(&["ID", "NAME", "VMS", "CPUS", "MEM MB", "DISK MB", "CREATED"], rows)
}

/// `used/limit`, or the limit alone where the use isn't told.
fn of(used: &str, limit: &str) -> String {
    if used.is_empty() { limit.to_owned() } else { format!("{used}/{limit}") }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::Cli;

    #[test]
    fn a_quota_is_given_whole_or_not_at_all() {
        let parse =
            |args: &[&str]| Cli::try_parse_from(["tiffin", "account", "create", "a"].iter().chain(args)).is_ok();
        assert!(parse(&[]));
        assert!(parse(&["--vms", "1", "--cpus", "1", "--mem", "128", "--disk", "64"]));
        assert!(!parse(&["--vms", "1"]));
        assert!(!parse(&["--cpus", "1", "--mem", "128", "--disk", "64"]));
    }
}
