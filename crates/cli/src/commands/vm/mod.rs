//! `tiffin vm`: the VMs of the key's account. What is more than one call has a file of its own.

mod create;
pub(crate) mod exec;
mod files;
mod fork;
mod logs;
mod many;
mod ports;
mod run;
mod shell;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;
use tiffin_types::id::VmId;

use crate::{
    args::Connection,
    client::Client,
    failure::Failure,
    output::{self, field},
};

#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    #[command(subcommand)]
    pub(crate) command: VmCommand,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a VM and start it
    Create(create::CreateArgs),
    /// List the VMs
    #[command(visible_alias = "list")]
    Ls(OutputArgs),
    /// Show one VM
    Get(OneArgs),
    /// Start stopped VMs
    Start(many::ManyArgs),
    /// Shut running VMs down; their disks stay
    Stop(many::ManyArgs),
    /// Freeze running VMs
    Pause(many::ManyArgs),
    /// Let paused VMs go on
    Resume(many::ManyArgs),
    /// Make running clones of a running VM, which runs on
    Fork(fork::ForkArgs),
    /// Delete VMs, running or not, with their disks
    #[command(visible_alias = "delete")]
    Rm(many::RemoveArgs),
    /// Run a command in a VM and pass on its output and exit code
    Exec(exec::ExecArgs),
    /// Run a TypeScript or JavaScript file in a VM
    Run(run::RunArgs),
    /// Open a terminal in a VM
    Shell(shell::ShellArgs),
    /// Copy files and folders to and from a VM
    Cp(files::CopyArgs),
    /// List a folder of a VM
    Files(files::FilesArgs),
    /// Show the last lines of a VM's log
    Logs(logs::LogsArgs),
    /// Give a port of a VM a URL by which it is reached from outside, and print that
    Expose(ports::PortArgs),
    /// Take a port's URL away
    Unexpose(ports::PortArgs),
    /// List a VM's ports that are reached from outside
    Ports(OneArgs),
    /// Show which connections the VM's network has refused
    Network(OneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Print the API's JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct OneArgs {
    id: VmId,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `tiffin vm`.
pub(crate) async fn run(args: VmArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    match args.command {
        VmCommand::Create(args) => create::run(&client, &args).await?,
        VmCommand::Ls(args) => list(&client, &args).await?,
        VmCommand::Get(args) => get(&client, &args).await?,
        VmCommand::Start(args) => many::act_on(&client, "start", &args).await?,
        VmCommand::Stop(args) => many::act_on(&client, "stop", &args).await?,
        VmCommand::Pause(args) => many::act_on(&client, "pause", &args).await?,
        VmCommand::Resume(args) => many::act_on(&client, "resume", &args).await?,
        VmCommand::Fork(args) => fork::run(&client, &args).await?,
        VmCommand::Rm(args) => many::remove(&client, &args).await?,
        VmCommand::Exec(args) => return exec::run(&client, &args).await,
        VmCommand::Run(args) => return run::run(&client, &args).await,
        VmCommand::Shell(args) => return shell::run(&client, &args).await,
        VmCommand::Cp(args) => files::copy(&client, &args).await?,
        VmCommand::Files(args) => files::list(&client, &args).await?,
        VmCommand::Logs(args) => logs::run(&client, &args).await?,
        VmCommand::Expose(args) => ports::expose(&client, &args).await?,
        VmCommand::Unexpose(args) => ports::unexpose(&client, &args).await?,
        VmCommand::Ports(args) => ports::list(&client, &args).await?,
        VmCommand::Network(args) => network(&client, &args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(client: &Client, args: &OutputArgs) -> Result<(), Failure> {
    let vms = client.get("/v1/vms").await?;
    if args.json {
        return output::json(&vms);
    }
    let rows = vms
        .as_array()
        .into_iter()
        .flatten()
        .map(|vm| {
            let outbound = if field(vm, "outboundInternet") == "yes" { field(vm, "allowIps") } else { String::new() };
            let outbound = if outbound.is_empty() { "none".to_owned() } else { outbound };
            let mut row: Vec<String> =
                ["id", "state", "cpu", "memMb", "diskSizeMb"].iter().map(|name| field(vm, name)).collect();
            row.extend([outbound, field(vm, "engine"), field(vm, "createdAt")]);
            row
        })
        .collect();
    output::table(&["ID", "STATE", "CPU", "MEM MB", "DISK MB", "OUTBOUND", "ENGINE", "CREATED"], rows)
}

async fn get(client: &Client, args: &OneArgs) -> Result<(), Failure> {
    let vm = client.get(&format!("/v1/vms/{}", args.id)).await?;
    if args.output.json { output::json(&vm) } else { show(&vm) }
}

fn show(vm: &Value) -> Result<(), Failure> {
    let error = vm.get("error").filter(|error| error.is_object());
    let error = error.map(|e| format!("{} ({})", field(e, "message"), field(e, "code"))).unwrap_or_default();
    let end = vm.get("end").map(|end| field(end, "message")).unwrap_or_default();
    output::properties(&[
        ("id", field(vm, "id")),
        ("state", field(vm, "state")),
        ("error", error),
        ("last run", end),
        ("cpu", field(vm, "cpu")),
        ("memory MB", field(vm, "memMb")),
        ("disk MB", field(vm, "diskSizeMb")),
        ("image", field(vm, "imageId")),
        ("guest address", field(vm, "guestIp")),
        ("outbound", field(vm, "outboundInternet")),
        ("allowed", field(vm, "allowIps")),
        ("engine", field(vm, "engine")),
        ("isolation", field(vm, "isolation")),
        ("provisioned by", field(vm, "provisionMode")),
        ("created", field(vm, "createdAt")),
        ("started", field(vm, "startedAt")),
    ])
}

async fn network(client: &Client, args: &OneArgs) -> Result<(), Failure> {
    let network = client.get(&format!("/v1/vms/{}/network", args.id)).await?;
    if args.output.json {
        return output::json(&network);
    }
    output::properties(&[("outbound", field(&network, "outboundInternet")), ("allowed", field(&network, "allowIps"))])?;
    let denied = network.get("denied").unwrap_or(&Value::Null);
    let rows: Vec<Vec<String>> = denied
        .get("destinations")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|to| ["address", "protocol", "port", "count"].iter().map(|name| field(to, name)).collect())
        .collect();
    if !rows.is_empty() {
        output::table(&["REFUSED ADDRESS", "PROTOCOL", "PORT", "PACKETS"], rows)?;
    }
    let total = field(denied, "total");
    output::print(&format!("{} packets refused\n", if total.is_empty() { "0" } else { &total }))
}
