//! `tiffin vm create`: what the arguments ask for, as the API takes it.

use clap::Args;
use ipnet::IpNet;
use reqwest::{
    Method,
    header::{HeaderMap, HeaderValue},
};
use serde_json::{Value, json};
use tiffin_types::{id::ImageId, network::parse_allow_entry};

use super::show;
use crate::{
    client::{Call, Client},
    failure::Failure,
    output::{self, Spinner, field, visible},
};

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// vCPUs, 1 to 8
    #[arg(long, default_value_t = 1)]
    cpu: u32,
    /// Memory in MiB, 128 to 8192
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    mem: u32,
    /// Disk (the VM's writable layer) in MiB; the server's default when not given
    #[arg(long, value_name = "MIB")]
    disk: Option<u32>,
    /// Let the VM reach this network (CIDR or address, may be repeated); nothing else is reachable
    #[arg(long, value_name = "CIDR", value_parser = parse_allow_entry)]
    allow: Vec<IpNet>,
    /// Let the VM reach the public internet (short for --allow 0.0.0.0/0 --allow ::/0); private ranges stay closed
    #[arg(long)]
    internet: bool,
    /// The image; the server's default when not given
    #[arg(long, value_name = "ID")]
    image: Option<ImageId>,
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

/// Creates a VM and shows it.
pub(super) async fn run(client: &Client, args: &CreateArgs) -> Result<(), Failure> {
    let mut headers = HeaderMap::new();
    if let Some(key) = &args.idempotency_key {
        let value = HeaderValue::from_str(key)
            .map_err(|_| anyhow::anyhow!("--idempotency-key: must be 1 to 255 visible ASCII characters"))?;
        headers.insert("idempotency-key", value);
    }
    let spinner = Spinner::start("creating the VM");
    let vm = client.json(Call { body: Some(&body(args)), headers, ..Call::new(Method::POST, "/v1/vms") }).await?;
    drop(spinner);
    if args.json {
        output::json(&vm)
    } else if args.quiet {
        output::print(&format!("{}\n", visible(&field(&vm, "id"))))
    } else {
        show(&vm)
    }
}

fn body(args: &CreateArgs) -> Value {
    let mut allow: Vec<String> = args.allow.iter().map(IpNet::to_string).collect();
    if args.internet {
        allow.extend(["0.0.0.0/0".to_owned(), "::/0".to_owned()]);
    }
    let mut body = json!({
        "cpu": args.cpu,
        "memMb": args.mem,
        "outboundInternet": !allow.is_empty(),
        "allowIps": allow,
    });
    if let Some(disk) = args.disk {
        body["diskSizeMb"] = disk.into();
    }
    if let Some(image) = &args.image {
        body["imageId"] = image.as_str().into();
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
        body(&args)
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
