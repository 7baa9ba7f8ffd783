//! `tiffin key`: API keys, through the admin calls of the API.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tiffin_types::{
    account::Scope,
    id::{AccountId, ApiKeyId},
    time::Timestamp,
};

use crate::{
    args::Connection,
    client::Client,
    failure::Failure,
    output::{self, field},
};

#[derive(Debug, Args)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
    #[command(flatten)]
    connection: Connection,
    /// Print the API's JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key and print it; it can't be shown again
    Create(CreateArgs),
    /// List the keys
    #[command(visible_alias = "list")]
    Ls,
    /// Revoke a key: it stops working at once
    Revoke {
        /// The key's id, from `tiffin key ls`
        id: ApiKeyId,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// A name to know it by
    name: String,
    /// The account it is for; the account of the key in use when not given
    #[arg(long, value_name = "ID")]
    account: Option<AccountId>,
    /// What it may do: read, write or admin (may be repeated)
    #[arg(long = "scope", value_name = "SCOPE", default_value = "write")]
    scopes: Vec<Scope>,
    /// When it stops working, such as 2027-01-31T00:00:00Z; never when not given
    #[arg(long, value_name = "TIME")]
    expires_at: Option<Timestamp>,
}

/// Runs `tiffin key`.
pub(crate) async fn run(args: KeyArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    match args.command {
        KeyCommand::Create(create) => {
            let key = client.post("/v1/admin/api-keys", Some(&body(&create))).await?;
            if args.json { output::json(&key)? } else { show_new(&key)? }
        }
        KeyCommand::Ls => {
            let keys = client.get("/v1/admin/api-keys").await?;
            if args.json { output::json(&keys)? } else { list(&keys)? }
        }
        KeyCommand::Revoke { id } => {
            client.delete(&format!("/v1/admin/api-keys/{id}")).await?;
            if args.json { output::json(&json!({ "id": id }))? } else { output::print(&format!("{id}\n"))? }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn body(args: &CreateArgs) -> Value {
    let mut body = json!({ "name": args.name, "scopes": args.scopes });
    if let Some(account) = &args.account {
        body["accountId"] = account.as_str().into();
    }
    if let Some(at) = args.expires_at {
        body["expiresAt"] = at.to_string().into();
    }
    body
}

/// The key alone on stdout, so that it can be captured; what goes with it on stderr.
fn show_new(key: &Value) -> Result<(), Failure> {
    output::print(&format!("{}\n", output::visible(&field(key, "key"))))?;
    output::print_error(&format!(
        "{}: scopes {}, expires {}. Keep it now: it is not shown again.\n",
        output::visible(&field(key, "id")),
        output::visible(&field(key, "scopes")),
        or(&output::visible(&field(key, "expiresAt")), "never"),
    ))
}

fn list(keys: &Value) -> Result<(), Failure> {
    let names = ["id", "name", "prefix", "accountId", "scopes", "expiresAt", "lastUsedAt"];
    let rows = keys
        .as_array()
        .into_iter()
        .flatten()
        .map(|key| {
            let mut row: Vec<String> = names.iter().map(|name| or(&field(key, name), "never")).collect();
            row.push(or(&field(key, "revokedAt"), "no"));
            row
        })
        .collect();
    output::table(&["ID", "NAME", "PREFIX", "ACCOUNT", "SCOPES", "EXPIRES", "LAST USED", "REVOKED"], rows)
}

fn or(text: &str, otherwise: &str) -> String {
    if text.is_empty() { otherwise } else { text }.to_owned()
}
