//! From the configuration to an engine: which one, and where its programs are.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context, bail};
use tiffin_engine::{
    Engine,
    doctor::kvm,
    fake::Fake,
    monitored::{HostConfig, MachinesConfig},
    qemu::QEMU,
};
use tiffin_server::{Config, config::EngineChoice};
use tiffin_types::vm::EngineName;

/// This program. Not by its path: a monitor is the very program that the server is, also when an upgrade has replaced the
/// file.
pub(super) const SELF: &str = "/proc/self/exe";
const DNS_PORT: u16 = 53;
/// Space of the data folder's filesystem that VMs leave free: the database and the logs need some, too.
const MIN_FREE_DISK_MB: u64 = 512;

/// The engine that the configuration names.
pub(super) fn engine(config: &Config) -> anyhow::Result<Arc<dyn Engine>> {
    match config.engine {
        EngineChoice::Named(EngineName::Fake) => {
            tracing::warn!("engine = fake: nothing runs and nothing is isolated; for tests only");
            Ok(Fake::new())
        }
        EngineChoice::Named(EngineName::Firecracker) => {
            bail!("engine = firecracker: this version doesn't have it; set auto, gvisor or qemu")
        }
        EngineChoice::Auto | EngineChoice::Named(EngineName::Gvisor | EngineName::Qemu) => {
            let engine = tiffin_engine::open(host_config(config)?).context("preparing the host")?;
            let names: Vec<&str> = engine.kinds().iter().map(|kind| kind.name.as_str()).collect();
            tracing::info!(default = engine.default_kind().name.as_str(), "engines: {}", names.join(", "));
            Ok(engine)
        }
    }
}

fn host_config(config: &Config) -> anyhow::Result<HostConfig> {
    let program = std::env::current_exe().context("where this program is")?;
    let beside = || program.parent().map(|folder| folder.join("tiffin-agent"));
    let named = |path: &Option<camino::Utf8PathBuf>| path.as_ref().map(|path| path.clone().into_std_path_buf());
    let machines = machines(config)?;
    Ok(HostConfig {
        data_dir: config.data_dir.clone().into(),
        run_dir: config.run_dir.clone().into(),
        runsc: named(&config.runsc).or_else(|| on_path("runsc")).filter(|runsc| runsc.is_file()),
        engine: match config.engine {
            EngineChoice::Named(name) => name,
            EngineChoice::Auto if machines.as_ref().is_some_and(|machines| machines.kvm) => EngineName::Qemu,
            EngineChoice::Auto => EngineName::Gvisor,
        },
        machines,
        agent: named(&config.agent).or_else(beside).context("no guest agent")?,
        uplinks: config.network.uplink,
        resolvers: resolvers(config),
        // The engine gives up first, so that it can say why and clear up before the server stops waiting for it.
        boot_timeout: config.vm.start_timeout * 4 / 5,
        logs: config.logs,
        min_free_disk_mb: MIN_FREE_DISK_MB,
        monitor: SELF.into(),
    })
}

/// What VMs with a kernel of their own are made of, where one is named.
fn machines(config: &Config) -> anyhow::Result<Option<MachinesConfig>> {
    let qemu = &config.qemu;
    let Some(kernel) = &qemu.kernel else { return Ok(None) };
    let program = qemu.program.clone().map(PathBuf::from).or_else(|| on_path(QEMU));
    Ok(Some(MachinesConfig {
        qemu: program.with_context(|| format!("no {QEMU} on PATH: install it, or unset qemu.kernel"))?,
        kernel: kernel.clone().into(),
        modules: qemu.modules.clone().unwrap_or_else(|| kernel.with_file_name("modules")).into(),
        kvm: kvm::works(),
        templates: qemu.templates,
    }))
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Whom guests' names are asked of: as configured, else as the host itself asks.
fn resolvers(config: &Config) -> Vec<SocketAddr> {
    let addresses = config.network.resolvers.clone().unwrap_or_else(|| {
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        name_servers(&text)
    });
    if addresses.is_empty() {
        tracing::warn!("no name servers: names don't resolve in VMs; set network.resolvers");
    }
    addresses.into_iter().map(|address| SocketAddr::new(address, DNS_PORT)).collect()
}

/// The `nameserver` lines of a resolv.conf; an address with a zone (`fe80::1%eth0`) is left out.
fn name_servers(text: &str) -> Vec<IpAddr> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    lines.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_resolvers_read_them() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # why\nnameserver fe80::1%eth0\n";
        let expected: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(name_servers(text), expected);
    }
}
