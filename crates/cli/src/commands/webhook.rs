//! `tiffin webhook`: who is told of what happens, through the admin calls of the API.

use std::{process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tiffin_types::id::WebhookId;
use tokio::time::Instant;

use crate::{
    args::Connection,
    client::Client,
    failure::Failure,
    output::{self, Spinner, field, visible},
};

const HOOKS: &str = "/v1/admin/webhooks";
/// How long a test is waited for: an attempt of the server ends within two minutes.
const TEST_LIMIT: Duration = Duration::from_secs(130);
const TEST_POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(crate) struct WebhookArgs {
    #[command(subcommand)]
    command: WebhookCommand,
    #[command(flatten)]
    connection: Connection,
    /// Print the API's JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum WebhookCommand {
    /// Make a webhook and print the secret that it signs with; it can't be shown again
    Create {
        /// A name to know it by
        name: String,
        /// Where to deliver to
        // Not `url`: that is the server's.
        #[arg(value_name = "URL")]
        receiver: String,
        /// An event to tell of, such as vm_state (may be repeated); all when not given
        #[arg(long = "event", value_name = "TYPE")]
        events: Vec<String>,
        /// Tell of nothing yet
        #[arg(long)]
        disabled: bool,
    },
    /// List the webhooks
    #[command(visible_alias = "list")]
    Ls,
    /// Deliver a ping and wait for what comes of the first attempt
    Test {
        /// The webhook
        id: WebhookId,
    },
    /// List the latest deliveries
    Deliveries {
        /// The webhook
        id: WebhookId,
        /// How many, from 1 to 200
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Delete webhooks, and what waits to be delivered to them
    #[command(visible_alias = "delete")]
    Rm {
        /// The webhooks
        #[arg(required = true)]
        ids: Vec<WebhookId>,
    },
}

/// Runs `tiffin webhook`.
pub(crate) async fn run(args: WebhookArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    match args.command {
        WebhookCommand::Create { name, receiver, events, disabled } => {
            let mut body = json!({ "name": name, "url": receiver, "enabled": !disabled });
            if !events.is_empty() {
                body["eventTypes"] = events.into();
            }
            let webhook = client.post(HOOKS, Some(&body)).await?;
            if args.json { output::json(&webhook)? } else { show_new(&webhook)? }
        }
        WebhookCommand::Ls => {
            let webhooks = client.get(HOOKS).await?;
            if args.json { output::json(&webhooks)? } else { list(&webhooks)? }
        }
        WebhookCommand::Test { id } => {
            let delivery = test(&client, &id).await?;
            if args.json {
                output::json(&delivery)?;
            } else {
                deliveries(&json!([delivery]))?;
            }
            if delivery["state"] != "delivered" {
                return Ok(ExitCode::FAILURE);
            }
        }
        WebhookCommand::Deliveries { id, limit } => {
            let list = client.get(&format!("{HOOKS}/{id}/deliveries?limit={limit}")).await?;
            if args.json { output::json(&list)? } else { deliveries(&list)? }
        }
        WebhookCommand::Rm { ids } => remove(&client, &ids, args.json).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The delivery of a ping, once it was tried.
async fn test(client: &Client, id: &WebhookId) -> Result<Value, Failure> {
    let path = format!("{HOOKS}/{id}");
    let begun = client.post(&format!("{path}/test"), None).await?;
    let spinner = Spinner::start("waiting for the first attempt");
    let deadline = Instant::now() + TEST_LIMIT;
    loop {
        let list = client.get(&format!("{path}/deliveries?limit=200")).await?;
        let found = list.as_array().into_iter().flatten().find(|one| one["id"] == begun["id"]).cloned();
        let was_tried = |delivery: &Value| delivery["attempts"].as_array().is_some_and(|tried| !tried.is_empty());
        if let Some(delivery) = found.filter(was_tried) {
            drop(spinner);
            return Ok(delivery);
        }
        if Instant::now() > deadline {
            let id = visible(&field(&begun, "id")).into_owned();
            return Err(Failure::Exchange(format!("{id} wasn't tried yet: see `tiffin webhook deliveries`")));
        }
        tokio::time::sleep(TEST_POLL).await;
    }
}

/// One that fails doesn't keep the others from being deleted.
async fn remove(client: &Client, ids: &[WebhookId], as_json: bool) -> Result<(), Failure> {
    let (mut told, mut all_done) = (Vec::new(), true);
    for id in ids {
        match client.delete(&format!("{HOOKS}/{id}")).await {
            Ok(()) if as_json => told.push(json!({ "id": id })),
            Ok(()) => output::print(&format!("{id}\n"))?,
            Err(failure) => {
                all_done = false;
                told.push(json!({ "id": id, "error": failure.to_string() }));
                output::print_error(&format!("{id}: {}", failure.lines()))?;
            }
        }
    }
    if as_json {
        output::json(&Value::Array(told))?;
    }
    if all_done { Ok(()) } else { Err(Failure::AlreadyTold) }
}

/// The secret alone on stdout, so that it can be captured; what goes with it on stderr.
fn show_new(webhook: &Value) -> Result<(), Failure> {
    output::print(&format!("{}\n", visible(&field(webhook, "secret"))))?;
    output::print_error(&format!(
        "{}: signs with this secret. Keep it now: it is not shown again.\n",
        visible(&field(webhook, "id"))
    ))
}

fn list(webhooks: &Value) -> Result<(), Failure> {
    let row = |webhook: &Value| {
        let enabled = match (webhook["enabled"] == true, field(webhook, "disabledReason")) {
            (true, _) => "yes".to_owned(),
            (false, reason) if reason.is_empty() => "no".to_owned(),
            (false, reason) => format!("no: {reason}"),
        };
        let text = |name: &str| field(webhook, name);
        vec![text("id"), text("name"), enabled, text("eventTypes"), text("failingSince"), text("url")]
    };
    let rows = webhooks.as_array().into_iter().flatten().map(row).collect();
    output::table(&["ID", "NAME", "ENABLED", "EVENTS", "FAILING SINCE", "URL"], rows)
}

fn deliveries(list: &Value) -> Result<(), Failure> {
    let row = |delivery: &Value| {
        let text = |name: &str| field(delivery, name);
        let last = delivery["attempts"].as_array().and_then(|attempts| attempts.last()).cloned().unwrap_or_default();
        let tried = ["at", "status", "durationMs"].map(|name| field(&last, name));
        let ends = [text("nextAttemptAt"), field(&last, "error")];
        [text("id"), text("eventType"), text("state")].into_iter().chain(tried).chain(ends).collect()
    };
    let rows = list.as_array().into_iter().flatten().map(row).collect();
    output::table(&["ID", "EVENT", "STATE", "TRIED", "STATUS", "MS", "NEXT", "ERROR"], rows)
}
