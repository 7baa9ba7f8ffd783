//! `tiffin vm run`: runs a TypeScript or JavaScript file of this machine in a VM, and passes on what `vm exec` does.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_types::{id::VmId, limits};

use super::exec::{GRACE, carry_out, env_pair, seconds};
use crate::{
    client::{Call, Client},
    failure::Failure,
};

#[derive(Debug, Args)]
#[command(after_help = "\
The file is read here and runs there: Deno runs .ts, .mts, .cts and .tsx, Node.js .js, .mjs and .cjs.
What the program gave to result.set() is printed last, as one line of JSON.

Exit codes are those of `tiffin vm exec`; a program that ended with an error has 1.")]
pub(crate) struct RunArgs {
    id: VmId,
    /// The program's file, or - for standard input
    file: PathBuf,
    /// Run it by Deno, whatever its name
    #[arg(long, conflicts_with = "js")]
    ts: bool,
    /// Run it by Node.js, whatever its name
    #[arg(long)]
    js: bool,
    /// Set an environment variable (may be repeated)
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = env_pair)]
    env: Vec<(String, String)>,
    /// Time limit in seconds, fractions allowed [default: 30]
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Print the API's JSON at the end, instead of the output as it comes
    #[arg(long)]
    json: bool,
    /// The program's arguments
    #[arg(last = true, value_name = "ARG")]
    args: Vec<String>,
}

/// Runs the program; the exit code is the program's.
pub(crate) async fn run(client: &Client, args: &RunArgs) -> Result<ExitCode, Failure> {
    let path = format!("/v1/vms/{}/run-{}", args.id, runtime(args)?);
    let mut body = json!({ "code": code(&args.file)?, "args": args.args });
    body["env"] = args.env.iter().map(|(name, value)| Value::from(format!("{name}={value}"))).collect();
    if let Some(timeout) = args.timeout {
        body["timeoutMs"] = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).into();
    }
    let limit = args.timeout.unwrap_or(Duration::from_millis(limits::EXEC_TIMEOUT_MS_DEFAULT)) + GRACE;
    let call = Call { body: Some(&body), limit, ..Call::new(Method::POST, &path) };
    carry_out(client, call, args.json).await
}

fn runtime(args: &RunArgs) -> Result<&'static str, Failure> {
    let ending = args.file.extension().and_then(|ending| ending.to_str());
    match ending {
        _ if args.ts => Ok("ts"),
        _ if args.js => Ok("js"),
        Some("ts" | "mts" | "cts" | "tsx") => Ok("ts"),
        Some("js" | "mjs" | "cjs") => Ok("js"),
        _ => {
            let shown = args.file.display();
            Err(anyhow::anyhow!("{shown}: its name doesn't say what runs it; give --ts or --js").into())
        }
    }
}

fn code(file: &Path) -> Result<String, Failure> {
    let most = limits::SCRIPT_CODE_BYTES.end() + 1;
    let (mut code, shown) = (Vec::new(), file.display());
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(most as u64).read_to_end(&mut code)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(most as u64).read_to_end(&mut code))
    };
    read.with_context(|| format!("can't read {shown}"))?;
    if code.len() == most {
        return Err(anyhow::anyhow!("{shown} is larger than {} bytes, the most that is run", most - 1).into());
    }
    Ok(String::from_utf8(code).with_context(|| format!("{shown} is no text in UTF-8"))?)
}
