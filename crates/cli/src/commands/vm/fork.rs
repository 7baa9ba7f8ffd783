//! `tiffin vm fork`: running clones of a running VM.

use clap::Args;
use reqwest::Method;
use serde_json::json;
use tiffin_types::id::VmId;

use super::create::{EgressArgs, idempotency};
use crate::{
    client::{Call, Client},
    failure::Failure,
    output::{self, Spinner, field, visible},
};

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    id: VmId,
    /// How many clones, 1 to 16
    #[arg(long, short, default_value_t = 1)]
    count: u32,
    #[command(flatten)]
    egress: EgressArgs,
    /// Let the clones reach nothing, whatever the source may; without this, --allow and --internet, what the source may
    #[arg(long, conflicts_with_all = ["allow", "internet"])]
    closed: bool,
    /// Repeating a fork with the same key gives the same clones again
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Print the API's JSON
    #[arg(long)]
    json: bool,
}

/// Forks a VM and prints the ids of its clones.
pub(super) async fn run(client: &Client, args: &ForkArgs) -> Result<(), Failure> {
    let headers = idempotency(args.idempotency_key.as_deref())?;
    let mut body = json!({ "count": args.count });
    if args.closed || args.egress.is_open() {
        args.egress.write(&mut body);
    }
    let spinner = Spinner::start("forking the VM");
    let path = format!("/v1/vms/{}/fork", args.id);
    let clones = client.json(Call { body: Some(&body), headers, ..Call::new(Method::POST, &path) }).await?;
    drop(spinner);
    if args.json {
        return output::json(&clones);
    }
    for clone in clones.as_array().into_iter().flatten() {
        output::print(&format!("{}\n", visible(&field(clone, "id"))))?;
    }
    Ok(())
}
