//! `tiffin image build-default`: builds the default image on the server's host and makes it everybody's default.
//!
//! Invariant: it may be repeated and may run beside a server. An image that is there is found, not built; a digest is
//! registered once.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde_json::json;
use tiffin_image::default_image::{BuildOptions, DefaultImage, Step, build_default};
use tiffin_store::{Image, NewImage, Store};

use crate::{
    commands::{data_dir::private_folder, settings::Settings},
    failure::Failure,
    output::{self, Steps},
};

const NAME: &str = "default";

#[derive(Debug, Args)]
pub(crate) struct BuildDefaultArgs {
    #[command(flatten)]
    settings: Settings,
    /// Build it even where it is there already
    #[arg(long)]
    force: bool,
    /// A Debian mirror (http://...), instead of the machine's own
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Where the files are put together (about 1 GB); below the data folder when not given
    #[arg(long, value_name = "DIR")]
    work_dir: Option<camino::Utf8PathBuf>,
    /// Print the image as JSON
    #[arg(long)]
    json: bool,
}

/// Builds and registers.
pub(crate) async fn run(args: BuildDefaultArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load(&[])?;
    private_folder(config.data_dir.as_std_path())?;
    let options = BuildOptions {
        data_dir: config.data_dir.clone(),
        work_dir: args.work_dir.clone(),
        mirror: args.mirror.clone(),
        force: args.force,
    };
    let steps = Steps::start();
    let built = build_default(&options, &|step| show(&steps, step));
    drop(steps);
    let built = built.map_err(anyhow::Error::from)?;
    let store = Store::open(config.database_url.reveal()).await.context("opening the database")?;
    let image = register(&store, &built).await.context("registering the image")?;
    store.close().await;
    if args.json {
        output::json(&json!({
            "id": image.id, "name": image.name, "digest": built.digest, "sizeBytes": built.size_bytes,
            "rootfsBytes": built.rootfs_bytes, "packages": built.packages,
        }))?;
    } else {
        output::print(&format!("{}\n", image.id))?;
        let mib = built.size_bytes.div_ceil(1 << 20);
        output::print_error(&format!(
            "{}: {mib} MiB, {} packages, the default image\n",
            built.digest,
            built.packages.len()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn register(store: &Store, built: &DefaultImage) -> anyhow::Result<Image> {
    let known = store.image_by_digest(&built.digest).await?.filter(|image| image.account_id.is_none());
    let image = match known {
        Some(image) => image,
        None => store.image_insert(new_image(built)?).await?,
    };
    anyhow::ensure!(store.image_set_default(&image.id).await?, "the image {} is gone", image.id);
    Ok(image)
}

fn new_image(built: &DefaultImage) -> anyhow::Result<NewImage> {
    let find = |name: &str| built.packages.iter().find(|package| package.name == name).map(|package| &package.version);
    let tools = ["bash", "git", "curl", "python3", "nodejs", "deno"];
    let tools: Vec<String> = tools.iter().filter_map(|name| Some(format!("{name} {}", find(name)?))).collect();
    Ok(NewImage {
        account_id: None,
        name: NAME.to_owned(),
        description: format!("Debian with {}", tools.join(", ")),
        digest: Some(built.digest.clone()),
        size_bytes: i64::try_from(built.size_bytes)?,
        rootfs_bytes: i64::try_from(built.rootfs_bytes)?,
        config: serde_json::to_value(&built.config)?,
    })
}

fn show(steps: &Steps, step: Step) {
    match step {
        Step::Found => steps.done("the image is here already"),
        Step::Waiting => steps.doing("waiting for another build"),
        Step::Packages => steps.doing("fetching and unpacking Debian packages"),
        Step::Deno => steps.doing("fetching Deno"),
        Step::Adapting => steps.doing("making the tree fit for a sandbox"),
        Step::Writing => steps.doing("writing the image"),
        Step::Detail(line) => steps.detail(&line),
        Step::Done(part, took) => steps.done(&format!("{part}: {:.1} s", took.as_secs_f64())),
    }
}
