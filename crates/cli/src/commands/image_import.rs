//! `tiffin image import`: an image from a registry, with a bar that shows how far it is.

use std::{
    io::{IsTerminal, Read},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    args::Connection,
    client::{Call, Client},
    failure::Failure,
    output::{self, Arriving, field},
};

/// From the request to the answer: large images through narrow lines. The server's own limit is shorter.
const LIMIT: Duration = Duration::from_secs(12 * 3600);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(500);
const PASSWORD_BYTES: u64 = 64 << 10;
/// Where the password is, unless it comes by stdin.
const PASSWORD: &str = "TIFFIN_REGISTRY_PASSWORD";

#[derive(Debug, Args)]
#[command(after_help = "\
The password or token comes from TIFFIN_REGISTRY_PASSWORD or from stdin, never from an argument:
  aws ecr get-login-password | tiffin image import --password-stdin 1234.dkr.ecr.eu-west-1.amazonaws.com/app:1.0")]
pub(crate) struct ImportArgs {
    /// The image, such as ghcr.io/team/app:1.0; without a host, Docker Hub
    reference: String,
    /// The user of the registry; with a password and without a user, AWS, as ECR has it
    #[arg(long, short, value_name = "NAME")]
    username: Option<String>,
    /// Read the password or token from stdin (one line)
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    connection: Connection,
    /// Print the API's JSON
    #[arg(long)]
    json: bool,
}

/// Runs `tiffin image import`.
pub(crate) async fn run(args: ImportArgs) -> Result<(), Failure> {
    let password = match args.password_stdin {
        true => from_stdin()?,
        #[allow(clippy::disallowed_methods, reason = "as clap's arguments, which would show it in the help")]
        false => std::env::var(PASSWORD).unwrap_or_default(),
    };
    if args.username.is_some() && password.is_empty() {
        return Err(
            anyhow::anyhow!("there is no password for --username: give it by --password-stdin or {PASSWORD}").into()
        );
    }
    let mut body = json!({ "imageUri": args.reference, "password": password });
    if let Some(username) = &args.username {
        body["username"] = username.as_str().into();
    }
    let client = Client::new(&args.connection)?;
    let call = Call { body: Some(&body), limit: LIMIT, ..Call::new(Method::POST, "/v1/image/import") };
    let bar = Arriving::start(format!("importing {}", args.reference));
    let answer = tokio::select! {
        answer = client.json(call) => answer?,
        never = show(&client, &args.reference, &bar) => match never {},
    };
    drop(bar);
    if args.json { output::json(&answer) } else { output::print(&format!("{}\n", field(&answer, "imageId"))) }
}

/// Shows how far the import is, for as long as somebody looks.
async fn show(client: &Client, reference: &str, bar: &Arriving) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(LOOK).await;
        if !bar.is_shown() {
            continue;
        }
        // A look that fails shows nothing; the import itself says what is wrong.
        let Ok(Value::Array(imports)) = client.get("/v1/images/imports").await else { continue };
        if let Some(import) = imports.iter().rev().find(|import| field(import, "imageUri") == reference) {
            let number = |name: &str| import.get(name).and_then(Value::as_u64);
            let files = number("convertedEntries").filter(|files| *files > 0);
            bar.show(number("receivedBytes").unwrap_or(0), number("expectedBytes"), files);
        }
    }
}

fn from_stdin() -> anyhow::Result<String> {
    if std::io::stdin().is_terminal() {
        bail!("stdin is a terminal: pipe the password into it, or set {PASSWORD}");
    }
    let mut text = String::new();
    std::io::stdin().take(PASSWORD_BYTES).read_to_string(&mut text).context("reading the password from stdin")?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.is_empty() || line.contains(['\n', '\r']) {
        bail!("the password on stdin must be one line");
    }
    Ok(line.to_owned())
}
