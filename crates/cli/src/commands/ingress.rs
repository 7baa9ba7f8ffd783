//! `tiffin ingress`: how VMs are reached from outside.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::{
    args::Connection,
    client::Client,
    failure::Failure,
    output::{self, field},
};

#[derive(Debug, Args)]
pub(crate) struct IngressArgs {
    #[command(subcommand)]
    command: IngressCommand,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Subcommand)]
enum IngressCommand {
    /// Print the certificate that clients are to trust, in PEM
    Ca,
}

/// Runs `tiffin ingress`.
pub(crate) async fn run(args: IngressArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    match args.command {
        IngressCommand::Ca => {
            let ingress = client.get("/v1/ingress").await?;
            let certificate = field(&ingress, "caCertificate");
            if certificate.is_empty() {
                return Err(anyhow::anyhow!(
                    "the ingress has no authority of its own: it is off, or its certificate comes from files"
                )
                .into());
            }
            output::print(&certificate)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
