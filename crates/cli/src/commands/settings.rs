//! The server's settings, for the subcommands that run on its host: the same file, environment and flags for all of them.

use std::path::{Path, PathBuf};

use clap::Args;
use tiffin_server::config::{self, Config};

use crate::failure::Failure;

/// The flags that name settings. Each wins over the environment, which wins over the file.
#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// The file of settings; /etc/tiffin/tiffin.toml when it is there
    #[arg(long, value_name = "FILE", env = "TIFFIN_CONFIG", help_heading = "Settings")]
    config: Option<PathBuf>,
    /// Where VMs, images and the SQLite database live
    #[arg(long, value_name = "DIR", help_heading = "Settings")]
    data_dir: Option<String>,
    /// Any other setting (may be repeated); `tiffin config` lists them
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair, help_heading = "Settings")]
    set: Vec<(String, String)>,
}

impl Settings {
    /// The configuration that file, environment and flags add up to; `more` are flags of the subcommand's own.
    pub(crate) fn load(&self, more: &[(&str, Option<&str>)]) -> Result<Config, Failure> {
        let flags = [("data_dir", self.data_dir.as_deref())].into_iter().chain(more.iter().copied());
        let flags = flags.filter_map(|(key, value)| {
            let value = if key == "data_dir" { absolute(value?) } else { value?.to_owned() };
            Some((key.to_owned(), value))
        });
        let overrides: Vec<(String, String)> = self.set.iter().cloned().chain(flags).collect();
        let standard = Path::new(config::DEFAULT_FILE);
        let file = self.config.as_deref().or_else(|| standard.exists().then_some(standard));
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Config::load(file, environment, &overrides).map_err(|error| anyhow::Error::from(error).into())
    }
}

/// A flag's path is relative to where the user stands; a setting's must be absolute.
fn absolute(path: &str) -> String {
    std::path::absolute(path)
        .ok()
        .and_then(|path| path.into_os_string().into_string().ok())
        .unwrap_or_else(|| path.to_owned())
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}
