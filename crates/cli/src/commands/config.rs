//! `tiffin config`: every setting of the server, with its default and its meaning.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};
use tiffin_server::config::{KEYS, Key};

use crate::{failure::Failure, output};

#[derive(Debug, Args)]
#[command(after_help = "\
A setting is given in the file (/etc/tiffin/tiffin.toml, or --config), in the environment, or as a flag
(tiffin serve --set KEY=VALUE). The environment wins over the file, a flag over both.")]
pub(crate) struct ConfigArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints the settings.
pub(crate) fn run(args: &ConfigArgs) -> Result<ExitCode, Failure> {
    let shown = KEYS.iter().filter(|key| !key.hidden);
    if args.json {
        output::json(&shown.map(as_json).collect())?;
    } else {
        output::print(&shown.map(as_text).collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn as_text(key: &Key) -> String {
    let default = if key.default.is_empty() { format!("({})", key.unset) } else { key.default.to_owned() };
    format!("{} = {default}\n    {}\n    {}; environment: {}\n\n", key.name, key.doc, key.allowed, key.variable())
}

fn as_json(key: &Key) -> Value {
    json!({
        "name": key.name,
        "environment": key.variable(),
        "default": (!key.default.is_empty()).then_some(key.default),
        "unset": (!key.unset.is_empty()).then_some(key.unset),
        "allowed": key.allowed.to_string(),
        "doc": key.doc,
    })
}
