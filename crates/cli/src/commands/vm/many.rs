//! Calls for several VMs at once: start, stop, pause, resume, rm. One that fails doesn't keep the others from being done.

use clap::Args;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tiffin_types::id::VmId;

use super::OutputArgs;
use crate::{
    client::Client,
    failure::Failure,
    output::{self, Spinner, field},
};

/// Calls that run at once.
const AT_ONCE: usize = 8;

#[derive(Debug, Args)]
pub(crate) struct ManyArgs {
    #[arg(required = true)]
    ids: Vec<VmId>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveArgs {
    #[arg(required_unless_present = "all")]
    ids: Vec<VmId>,
    /// Delete every VM of the account
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Asks for `action` on each.
pub(super) async fn act_on(client: &Client, action: &'static str, args: &ManyArgs) -> Result<(), Failure> {
    let calls = args.ids.iter().map(|id| async move {
        let done = client.post(&format!("/v1/vms/{id}/{action}"), None).await;
        (id.to_string(), done.map(drop))
    });
    let spinner = Spinner::start(format!("{action}: {} VM{}", args.ids.len(), plural(args.ids.len())));
    let done: Vec<_> = stream::iter(calls).buffered(AT_ONCE).collect().await;
    drop(spinner);
    tell_each(done, args.output.json)
}

/// Deletes each.
pub(super) async fn remove(client: &Client, args: &RemoveArgs) -> Result<(), Failure> {
    let ids = if args.all {
        let vms = client.get("/v1/vms").await?;
        vms.as_array().into_iter().flatten().filter_map(|vm| field(vm, "id").parse().ok()).collect()
    } else {
        args.ids.clone()
    };
    let calls = ids.iter().map(|id: &VmId| async move {
        let done = match client.delete(&format!("/v1/vms/{id}")).await {
            // With --all, a VM that somebody else deleted meanwhile is as it should be.
            Err(Failure::Api(error)) if args.all && error.status == 404 => Ok(()),
            done => done,
        };
        (id.to_string(), done)
    });
    let spinner = Spinner::start(format!("deleting {} VM{}", ids.len(), plural(ids.len())));
    let done: Vec<_> = stream::iter(calls).buffered(AT_ONCE).collect().await;
    drop(spinner);
    tell_each(done, args.output.json)
}

/// Prints what became of each: the ids that are done on stdout, the failures on stderr; with `as_json` one array of `{id, error?}`.
fn tell_each(done: Vec<(String, Result<(), Failure>)>, as_json: bool) -> Result<(), Failure> {
    let mut all_done = true;
    let mut told = Vec::new();
    for (id, result) in done {
        match result {
            Ok(()) if as_json => told.push(json!({ "id": id })),
            Ok(()) => output::print(&format!("{id}\n"))?,
            Err(failure) => {
                all_done = false;
                if as_json {
                    told.push(json!({ "id": id, "error": failure.to_string() }));
                }
                output::print_error(&format!("{id}: {}", failure.lines()))?;
            }
        }
    }
    if as_json {
        output::json(&Value::Array(told))?;
    }
    if all_done { Ok(()) } else { Err(Failure::AlreadyTold) }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::Cli;

    #[test]
    fn rm_needs_ids_or_all_and_never_both() {
        assert!(Cli::try_parse_from(["tiffin", "vm", "rm"]).is_err());
        assert!(Cli::try_parse_from(["tiffin", "vm", "rm", "--all"]).is_ok());
        assert!(Cli::try_parse_from(["tiffin", "vm", "rm", "--all", "vm-0123456789abcd"]).is_err());
    }
}
