//! `tiffin vm expose`, `unexpose` and `ports`: which of a VM's ports are reached from outside.

use clap::Args;
use serde_json::Value;
use tiffin_types::id::VmId;

use super::{OneArgs, OutputArgs};
use crate::{
    client::Client,
    failure::Failure,
    output::{self, field},
};

#[derive(Debug, Args)]
pub(crate) struct PortArgs {
    id: VmId,
    /// The port that the program in the VM listens on
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    #[command(flatten)]
    output: OutputArgs,
}

/// Prints the URL.
pub(super) async fn expose(client: &Client, args: &PortArgs) -> Result<(), Failure> {
    let port = client.put(&format!("/v1/vms/{}/ports/{}", args.id, args.port)).await?;
    if args.output.json { output::json(&port) } else { output::print(&format!("{}\n", field(&port, "url"))) }
}

pub(super) async fn unexpose(client: &Client, args: &PortArgs) -> Result<(), Failure> {
    client.delete(&format!("/v1/vms/{}/ports/{}", args.id, args.port)).await
}

pub(super) async fn list(client: &Client, args: &OneArgs) -> Result<(), Failure> {
    let ports = client.get(&format!("/v1/vms/{}/ports", args.id)).await?;
    if args.output.json {
        return output::json(&ports);
    }
    let row = |port: &Value| ["port", "url", "createdAt"].iter().map(|name| field(port, name)).collect();
    output::table(&["PORT", "URL", "SINCE"], ports.as_array().into_iter().flatten().map(row).collect())
}
