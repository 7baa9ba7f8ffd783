//! `tiffin image`: the images that VMs start from.

use std::process::ExitCode;

use camino::Utf8PathBuf;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tiffin_types::id::ImageId;

use crate::{
    args::Connection,
    client::Client,
    commands::{
        image_build, image_import,
        image_upload::{self, Begin},
    },
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
    Ls(ApiArgs),
    /// Show an image, and how far an upload to it is
    Get(OneArgs),
    /// Make an image, of an ext4 filesystem if one is given, and print its id
    Create(CreateArgs),
    /// Import an image from a registry, and print its id
    Import(image_import::ImportArgs),
    /// Upload a filesystem or a kernel to an image
    Upload(UploadArgs),
    /// Make an image the one that VMs are made of when none is named
    SetDefault(OneArgs),
    /// Delete images that nothing is made of
    Rm(RemoveArgs),
    /// Build the default image on this host and make it the default (about a minute; once)
    BuildDefault(image_build::BuildDefaultArgs),
}

#[derive(Debug, Args)]
struct ApiArgs {
    #[command(flatten)]
    connection: Connection,
    /// Print the API's JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct OneArgs {
    /// The image's id, from `tiffin image ls`
    id: ImageId,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// A name to know it by
    name: String,
    /// A sentence about it
    #[arg(long, default_value = "", hide_default_value = true)]
    description: String,
    /// For every account (needs a key with the admin scope)
    #[arg(long)]
    shared: bool,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Debug, Args)]
struct UploadArgs {
    /// The image's id
    id: ImageId,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    api: ApiArgs,
}

/// What is uploaded.
#[derive(Debug, Args)]
struct Files {
    /// An ext4 filesystem (mke2fs -d makes one of a folder)
    #[arg(long, value_name = "FILE")]
    rootfs: Option<Utf8PathBuf>,
    /// A Linux kernel, vmlinux or bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<Utf8PathBuf>,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// The images' ids
    #[arg(required = true)]
    ids: Vec<ImageId>,
    #[command(flatten)]
    connection: Connection,
}

/// Runs `tiffin image`.
pub(crate) async fn run(args: ImageArgs) -> Result<ExitCode, Failure> {
    match args.command {
        ImageCommand::Ls(args) => {
            let images = Client::new(&args.connection)?.get("/v1/images").await?;
            if args.json { output::json(&images)? } else { list(&images)? }
        }
        ImageCommand::Get(args) => {
            let image = Client::new(&args.api.connection)?.get(&path(&args.id)).await?;
            if args.api.json { output::json(&image)? } else { show(&image)? }
        }
        ImageCommand::Create(args) => create(&args).await?,
        ImageCommand::Import(args) => image_import::run(args).await?,
        ImageCommand::Upload(args) => {
            if args.files.rootfs.is_none() && args.files.kernel.is_none() {
                return Err(anyhow::anyhow!("nothing to upload: give --rootfs FILE, --kernel FILE or both").into());
            }
            let client = Client::new(&args.api.connection)?;
            upload(&client, &args.id, &args.files, Begin::WhereItEnded).await?;
            told(&client, &args.id, args.api.json).await?;
        }
        ImageCommand::SetDefault(args) => {
            let client = Client::new(&args.api.connection)?;
            client.post(&format!("{}/set-default", path(&args.id)), None).await?;
            told(&client, &args.id, args.api.json).await?;
        }
        ImageCommand::Rm(args) => return remove(&args).await,
        ImageCommand::BuildDefault(args) => return image_build::run(args).await,
    }
    Ok(ExitCode::SUCCESS)
}

fn path(id: &ImageId) -> String {
    format!("/v1/images/{id}")
}

async fn create(args: &CreateArgs) -> Result<(), Failure> {
    // Before anything is made: a name that is mistyped leaves no empty image.
    for file in [&args.files.rootfs, &args.files.kernel].into_iter().flatten() {
        image_upload::readable(file)?;
    }
    let client = Client::new(&args.api.connection)?;
    let mut body = json!({ "name": args.name, "description": args.description });
    if args.shared {
        body["shared"] = true.into();
    }
    let made = client.post("/v1/images", Some(&body)).await?;
    let id: ImageId =
        field(&made, "id").parse().map_err(|_| Failure::Exchange("the answer names no image".to_owned()))?;
    if let Err(failure) = upload(&client, &id, &args.files, Begin::Anew).await {
        output::print_error(&format!("the image {id} was made, and is empty: upload to it, or delete it\n"))?;
        return Err(failure);
    }
    told(&client, &id, args.api.json).await
}

async fn upload(client: &Client, id: &ImageId, files: &Files, begin: Begin) -> Result<(), Failure> {
    for (part, file) in [("rootfs", &files.rootfs), ("kernel", &files.kernel)] {
        if let Some(file) = file {
            image_upload::send(client, &path(id), part, file, begin).await?;
        }
    }
    Ok(())
}

/// The image as it is now, as JSON; else its id.
async fn told(client: &Client, id: &ImageId, json: bool) -> Result<(), Failure> {
    if json { output::json(&client.get(&path(id)).await?) } else { output::print(&format!("{id}\n")) }
}

async fn remove(args: &RemoveArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    let mut failed = false;
    for id in &args.ids {
        match client.delete(&path(id)).await {
            Ok(()) => output::print(&format!("{id}\n"))?,
            Err(Failure::Api(error)) => {
                failed = true;
                output::print_error(&format!("{id}: error: {}\n", output::visible(&error.message)))?;
            }
            Err(other) => return Err(other),
        }
    }
    if failed { Err(Failure::AlreadyTold) } else { Ok(ExitCode::SUCCESS) }
}

fn list(images: &Value) -> Result<(), Failure> {
    let rows = images
        .as_array()
        .into_iter()
        .flatten()
        .map(|image| {
            vec![
                field(image, "id"),
                field(image, "name"),
                field(image, "isDefault"),
                field(image, "status"),
                mib(image, "baseRootfsBytes"),
                field(image, "createdAt"),
                field(image, "description"),
            ]
        })
        .collect();
    output::table(&["ID", "NAME", "DEFAULT", "STATUS", "MIB", "CREATED", "DESCRIPTION"], rows)
}

fn show(image: &Value) -> Result<(), Failure> {
    let names = [
        ("id", "id"),
        ("name", "name"),
        ("description", "description"),
        ("status", "status"),
        ("error", "error"),
        ("default", "isDefault"),
        ("shared", "isShared"),
        ("filesystem", "hasRootfs"),
        ("kernel", "hasKernel"),
        ("digest", "digest"),
        ("created", "createdAt"),
        ("received bytes", "receivedBytes"),
        ("expected bytes", "expectedBytes"),
        ("files read", "convertedEntries"),
    ];
    let mut pairs: Vec<(&str, String)> = names.iter().map(|(shown, name)| (*shown, field(image, name))).collect();
    pairs.push(("files MiB", mib(image, "baseRootfsBytes")));
    pairs.push(("host MiB", mib(image, "sizeBytes")));
    output::properties(&pairs)
}

fn mib(image: &Value, name: &str) -> String {
    let bytes = image.get(name).and_then(Value::as_u64);
    bytes.map(|bytes| bytes.div_ceil(1 << 20).to_string()).unwrap_or_default()
}
