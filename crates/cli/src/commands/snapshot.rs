//! `tiffin snapshot`: saved VMs, of which others are made by `tiffin vm create --snapshot`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tiffin_types::id::{SnapshotId, VmId};

use crate::{
    args::Connection,
    client::Client,
    failure::Failure,
    output::{self, Spinner, field, visible},
};

#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
    #[command(flatten)]
    connection: Connection,
    /// Print the API's JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Save a running VM's memory, CPU state and disk; the VM runs on
    Create {
        /// The VM
        vm: VmId,
        /// A name to know it by
        #[arg(long)]
        name: Option<String>,
        /// Print the id only
        #[arg(long, short, conflicts_with = "json")]
        quiet: bool,
    },
    /// List the snapshots
    #[command(visible_alias = "list")]
    Ls,
    /// Show one snapshot
    Get {
        /// The snapshot
        id: SnapshotId,
    },
    /// Delete snapshots; VMs that were made of them live on
    #[command(visible_alias = "delete")]
    Rm {
        /// The snapshots
        #[arg(required = true)]
        ids: Vec<SnapshotId>,
    },
}

/// Runs `tiffin snapshot`.
pub(crate) async fn run(args: SnapshotArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    match args.command {
        SnapshotCommand::Create { vm, name, quiet } => {
            let body = name.map_or_else(|| json!({}), |name| json!({ "name": name }));
            let spinner = Spinner::start("saving the VM");
            let snapshot = client.post(&format!("/v1/vms/{vm}/snapshots"), Some(&body)).await?;
            drop(spinner);
            match quiet {
                true => output::print(&format!("{}\n", visible(&field(&snapshot, "id"))))?,
                false => show(&snapshot, args.json)?,
            }
        }
        SnapshotCommand::Ls => {
            let snapshots = client.get("/v1/snapshots").await?;
            if args.json { output::json(&snapshots)? } else { list(&snapshots)? }
        }
        SnapshotCommand::Get { id } => {
            show(&client.get(&format!("/v1/snapshots/{id}")).await?, args.json)?;
        }
        SnapshotCommand::Rm { ids } => remove(&client, &ids, args.json).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// One that fails doesn't keep the others from being deleted.
async fn remove(client: &Client, ids: &[SnapshotId], as_json: bool) -> Result<(), Failure> {
    let (mut told, mut all_done) = (Vec::new(), true);
    for id in ids {
        match client.delete(&format!("/v1/snapshots/{id}")).await {
            Ok(()) if as_json => told.push(json!({ "id": id })),
            Ok(()) => output::print(&format!("{id}\n"))?,
            Err(failure) => {
                all_done = false;
                told.push(json!({ "id": id, "error": failure.to_string() }));
                output::print_error(&format!("{id}: {}", failure.lines()))?;
            }
        }
    }
    if as_json {
        output::json(&Value::Array(told))?;
    }
    if all_done { Ok(()) } else { Err(Failure::AlreadyTold) }
}

fn show(snapshot: &Value, as_json: bool) -> Result<(), Failure> {
    if as_json {
        return output::json(snapshot);
    }
    output::properties(&[
        ("id", field(snapshot, "id")),
        ("name", field(snapshot, "name")),
        ("state", field(snapshot, "state")),
        ("of VM", field(snapshot, "vmId")),
        ("cpu", field(snapshot, "cpu")),
        ("memory MB", field(snapshot, "memMb")),
        ("disk MB", field(snapshot, "diskSizeMb")),
        ("image", field(snapshot, "imageId")),
        ("takes MB", mib(snapshot)),
        ("created", field(snapshot, "createdAt")),
    ])
}

fn list(snapshots: &Value) -> Result<(), Failure> {
    let row = |snapshot: &Value| {
        let text = |name: &str| field(snapshot, name);
        let size = [text("cpu"), text("memMb"), mib(snapshot)];
        let ends = [text("createdAt"), text("name")];
        [text("id"), text("state"), text("vmId")].into_iter().chain(size).chain(ends).collect()
    };
    let rows = snapshots.as_array().into_iter().flatten().map(row).collect();
    output::table(&["ID", "STATE", "OF VM", "CPU", "MEM MB", "TAKES MB", "CREATED", "NAME"], rows)
}

fn mib(snapshot: &Value) -> String {
    let bytes = snapshot.get("sizeBytes").and_then(Value::as_u64);
    bytes.map(|bytes| bytes.div_ceil(1 << 20).to_string()).unwrap_or_default()
}
