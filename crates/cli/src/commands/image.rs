//! `tiffin image`: the images that VMs start from.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::{
    args::Connection,
    client::Client,
    commands::image_build,
    failure::Failure,
    output::{self, field},
};

#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// List the images
    #[command(visible_alias = "list")]
    Ls(ListArgs),
    /// Build the default image on this host and make it the default (about a minute; once)
    BuildDefault(image_build::BuildDefaultArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    connection: Connection,
    /// Print the API's JSON
    #[arg(long)]
    json: bool,
}

/// Runs `tiffin image`.
pub(crate) async fn run(args: ImageArgs) -> Result<ExitCode, Failure> {
    match args.command {
        ImageCommand::Ls(args) => {
            let images = Client::new(&args.connection)?.get("/v1/images").await?;
            if args.json { output::json(&images)? } else { list(&images)? }
        }
        ImageCommand::BuildDefault(args) => return image_build::run(args).await,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(images: &Value) -> Result<(), Failure> {
    let rows = images
        .as_array()
        .into_iter()
        .flatten()
        .map(|image| {
            let bytes = image.get("baseRootfsBytes").and_then(Value::as_u64);
            vec![
                field(image, "id"),
                field(image, "name"),
                field(image, "isDefault"),
                bytes.map(|bytes| bytes.div_ceil(1 << 20).to_string()).unwrap_or_default(),
                field(image, "createdAt"),
                field(image, "description"),
            ]
        })
        .collect();
    output::table(&["ID", "NAME", "DEFAULT", "MIB", "CREATED", "DESCRIPTION"], rows)
}
