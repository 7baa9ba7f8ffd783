//! `tiffin vm create`: what the arguments ask for, as the API takes it.

use clap::Args;
use ipnet::IpNet;
use reqwest::{
    Method,
    header::{HeaderMap, HeaderValue},
};
use serde_json::{Value, json};
use tiffin_types::{
    id::{ImageId, SnapshotId},
    network::parse_allow_entry,
    vm::EngineName,
};

use super::show;
use crate::{
    client::{Call, Client},
    failure::Failure,
    output::{self, Spinner, field, visible},
};

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// vCPUs, 1 to 8; 1 when not given, or the snapshot's
    #[arg(long)]
    cpu: Option<u32>,
    /// Memory in MiB, 128 to 8192; 256 when not given, or the snapshot's
    #[arg(long, value_name = "MIB")]
    mem: Option<u32>,
    /// Disk (the VM's writable layer) in MiB; the server's default when not given
    #[arg(long, value_name = "MIB")]
    disk: Option<u32>,
    #[command(flatten)]
    egress: EgressArgs,
    /// Go on where this snapshot was taken, instead of booting
    #[arg(long, value_name = "ID")]
    snapshot: Option<SnapshotId>,
    /// The image; the server's default when not given
    #[arg(long, value_name = "ID")]
    image: Option<ImageId>,
    /// What runs it: gvisor or qemu, where the server has it; the server's default when not given, or the snapshot's
    #[arg(long, value_name = "NAME")]
    engine: Option<EngineName>,
    /// Repeating a create with the same key gives the same VM again
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Print the API's JSON
    #[arg(long)]
    json: bool,
    /// Print the id only
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
}

/// What a VM may reach.
#[derive(Debug, Args)]
pub(super) struct EgressArgs {
    /// Let the VM reach this network (CIDR or address, may be repeated); nothing else is reachable
    #[arg(long, value_name = "CIDR", value_parser = parse_allow_entry)]
    allow: Vec<IpNet>,
    /// Let the VM reach the public internet (short for --allow 0.0.0.0/0 --allow ::/0); private ranges stay closed
    #[arg(long)]
    internet: bool,
}

impl EgressArgs {
    /// Whether anything is allowed.
    pub(super) fn is_open(&self) -> bool {
        self.internet || !self.allow.is_empty()
    }

    /// The fields of the API.
    pub(super) fn write(&self, body: &mut Value) {
        let mut allow: Vec<String> = self.allow.iter().map(IpNet::to_string).collect();
        if self.internet {
            allow.extend(["0.0.0.0/0".to_owned(), "::/0".to_owned()]);
        }
        body["outboundInternet"] = self.is_open().into();
        body["allowIps"] = allow.into();
    }
}

/// The header that makes repeating a call safe.
pub(super) fn idempotency(key: Option<&str>) -> Result<HeaderMap, Failure> {
    let mut headers = HeaderMap::new();
    if let Some(key) = key {
        let value = HeaderValue::from_str(key)
            .map_err(|_| anyhow::anyhow!("--idempotency-key: must be 1 to 255 visible ASCII characters"))?;
        headers.insert("idempotency-key", value);
    }
    Ok(headers)
}

/// Creates a VM and shows it.
pub(super) async fn run(client: &Client, args: &CreateArgs) -> Result<(), Failure> {
    let headers = idempotency(args.idempotency_key.as_deref())?;
    let snapshot = match &args.snapshot {
        // A restored VM has the size of the one that was saved: whoever doesn't name it needn't know it.
        Some(id) if args.cpu.is_none() || args.mem.is_none() => client.get(&format!("/v1/snapshots/{id}")).await?,
        Some(_) | None => Value::Null,
    };
    let body = body(args, &snapshot);
    let spinner = Spinner::start("creating the VM");
    let vm = client.json(Call { body: Some(&body), headers, ..Call::new(Method::POST, "/v1/vms") }).await?;
    drop(spinner);
    if args.json {
        output::json(&vm)
    } else if args.quiet {
        output::print(&format!("{}\n", visible(&field(&vm, "id"))))
    } else {
        show(&vm)
    }
}

fn body(args: &CreateArgs, snapshot: &Value) -> Value {
    let saved = |name: &str| snapshot.get(name).and_then(Value::as_u64);
    let size = |asked: Option<u32>, name: &str, default: u64| asked.map(u64::from).or(saved(name)).unwrap_or(default);
    let mut body = json!({ "cpu": size(args.cpu, "cpu", 1), "memMb": size(args.mem, "memMb", 256) });
    args.egress.write(&mut body);
    if let Some(id) = &args.snapshot {
        body["snapshotId"] = id.as_str().into();
    }
    if let Some(disk) = args.disk {
        body["diskSizeMb"] = disk.into();
    }
    if let Some(image) = &args.image {
        body["imageId"] = image.as_str().into();
    }
    if let Some(engine) = args.engine {
        body["engine"] = engine.as_str().into();
    }
    body
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{
        args::{Cli, Command},
        commands::vm::{VmArgs, VmCommand},
    };

    fn asked(args: &[&str]) -> Value {
        let argv = ["tiffin", "vm", "create"].iter().chain(args);
        let Command::Vm(VmArgs { command: VmCommand::Create(args), .. }) = Cli::try_parse_from(argv).unwrap().command
        else {
            panic!("create")
        };
        body(&args, &Value::Null)
    }

    #[test]
    fn a_plain_create_asks_for_a_small_closed_vm() {
        assert_eq!(asked(&[]), json!({"cpu": 1, "memMb": 256, "allowIps": [], "outboundInternet": false}));
    }

    #[test]
    fn what_is_allowed_is_what_was_named() {
        let named = asked(&["--allow", "192.0.2.7", "--allow", "2001:db8::/32", "--disk", "99"]);
        assert_eq!(named["allowIps"], json!(["192.0.2.7/32", "2001:db8::/32"]));
        assert_eq!((&named["outboundInternet"], &named["diskSizeMb"]), (&json!(true), &json!(99)));
        assert_eq!(asked(&["--internet"])["allowIps"], json!(["0.0.0.0/0", "::/0"]));
    }
}
