//! `tiffin serve`: looks at the host, opens the store and the engine, and serves until it is told to stop.
//!
//! Order matters: nothing is opened on a host that can't run VMs, and no key is made before its place is there.

mod first_key;
mod logging;
mod start;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tiffin_image::convert::Converter;
use tiffin_server::{Config, config::EngineChoice};
use tiffin_store::Store;
use tiffin_types::vm::EngineName;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use self::first_key::KeyPlace;
use crate::{
    commands::{
        data_dir::{DataLock, private_folder},
        doctor,
        settings::Settings,
    },
    failure::Failure,
};

/// Tasks that are still blocked when the server has ended get this long.
const LEFTOVERS: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
#[command(after_help = "\
The first start makes the account `admin` and its administrator, and prints an API key and a password, once.
SIGTERM and SIGINT end the server after the requests in flight; VMs run on, and the next start takes them over.
A second signal ends it at once.")]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    settings: Settings,
    /// Where the API listens
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Settings")]
    listen: Option<String>,
    /// Write the first start's API key to this file, and its login to FILE.login, readable by their owner only, instead of
    /// printing them
    #[arg(long, value_name = "FILE")]
    write_key: Option<PathBuf>,
}

/// Runs `tiffin serve`.
pub(crate) fn run(args: &ServeArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load(&[("listen", args.listen.as_deref())])?;
    logging::start(&config.log);
    if config.engine != EngineChoice::Named(EngineName::Fake) {
        doctor::refuse_unfit_host(&config)?;
    }
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(anyhow::Error::from)?;
    let served = runtime.block_on(serve(config, args.write_key.as_deref()));
    runtime.shutdown_timeout(LEFTOVERS);
    served.map(|()| ExitCode::SUCCESS)
}

async fn serve(config: Config, write_key: Option<&std::path::Path>) -> Result<(), Failure> {
    // Before anything is made: a signal that comes from here on is not lost.
    let mut signals = Signals::new()?;
    private_folder(config.data_dir.as_std_path())?;
    let _lock = DataLock::take(config.data_dir.as_std_path())?;
    let key_place = KeyPlace::prepare(write_key)?;
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("can't listen on {}", config.listen))?;
    let store = Store::open(config.database_url.reveal()).await.context("opening the database")?;
    let key = tiffin_server::first_key(&store, config.quota).await.context("making the first account")?;
    let login = tiffin_server::first_login(&store, &config.admin_email).await.context("making the first user")?;
    key_place.hand_over(key.as_deref(), login.as_ref())?;
    let engine = start::engine(&config)?;
    // As a monitor, the converter is the very program that the server is.
    let converter = Converter::confined(start::SELF);
    let shutdown = CancellationToken::new();
    let told_twice = async {
        signals.next().await;
        shutdown.cancel();
        signals.next().await;
    };
    let closing = store.clone();
    tokio::select! {
        served = tiffin_server::serve(config, engine, store, converter, listener, shutdown.clone()) => {
            closing.close().await;
            served.map_err(|error| anyhow::Error::from(error).into())
        }
        () = told_twice => Err(anyhow::anyhow!("told to stop twice: requests were cut; VMs run on").into()),
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Every connection and every VM takes a few descriptors; the usual soft limit of 1024 is too little for both.
fn raise_file_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files can't be raised");
    }
}
