//! `tiffin vm logs`: the last lines of one of a VM's logs.

use clap::{Args, ValueEnum};
use serde_json::Value;
use tiffin_types::id::VmId;

use super::OutputArgs;
use crate::{
    client::Client,
    failure::Failure,
    output::{self, visible},
};

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    id: VmId,
    /// Which log
    #[arg(long = "type", value_enum, default_value = "console")]
    kind: LogKind,
    /// Lines, at most 1000
    #[arg(long, value_name = "N", default_value_t = 200)]
    tail: u32,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogKind {
    /// What the guest wrote to its console
    Console,
    /// The engine's own log, with refused connections
    Engine,
    /// The engine's errors
    Errors,
}

impl LogKind {
    /// The log's name in the API.
    fn as_str(self) -> &'static str {
        match self {
            LogKind::Console => "firecracker.stdout.log",
            LogKind::Engine => "firecracker.log",
            LogKind::Errors => "firecracker.stderr.log",
        }
    }
}

/// Prints the lines; what a guest wrote can't control the terminal.
pub(super) async fn run(client: &Client, args: &LogsArgs) -> Result<(), Failure> {
    let logs = client.get(&format!("/v1/vms/{}/logs?type={}&tail={}", args.id, args.kind.as_str(), args.tail)).await?;
    if args.output.json {
        return output::json(&logs);
    }
    let lines = logs.get("lines").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    output::print(&lines.map(|line| format!("{}\n", visible(line))).collect::<String>())
}
