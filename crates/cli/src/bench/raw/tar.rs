//! `tar` in a VM of the platform's by `runsc exec`, the archive in a pipe: what one would do without the API.

use std::{
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tiffin_types::id::VmId;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use super::{CALL_LIMIT, Raw, quiet};
use crate::bench::host;

/// More than any archive here.
const ARCHIVE_BYTES: u64 = 64 << 20;

/// `tar` in one VM.
pub(in crate::bench) struct Tar<'a> {
    raw: &'a Raw,
    /// The VM's monitor, in whose namespaces the container is.
    monitor: i32,
    state: PathBuf,
}

impl Raw {
    /// For a VM that runs on this host.
    pub(in crate::bench) fn tar_in(&self, id: &VmId) -> anyhow::Result<Tar<'_>> {
        let (monitor, folder) = host::monitor_of(id).context("the VM's monitor isn't on this host")?;
        Ok(Tar { raw: self, monitor, state: folder.join("mnt/runsc") })
    }
}

impl Tar<'_> {
    /// Unpacks into a folder that is there.
    pub(in crate::bench) async fn unpack(&self, folder: &str, archive: &[u8]) -> anyhow::Result<Duration> {
        let mut command = self.command(&["-xzf", "-", "-C", folder]);
        let start = Instant::now();
        let mut child = command.stdin(Stdio::piped()).spawn()?;
        let mut input = child.stdin.take().context("a pipe was asked for")?;
        let written = async {
            input.write_all(archive).await?;
            drop(input);
            child.wait().await
        };
        let status = timeout(CALL_LIMIT, written).await.context("runsc exec took too long")??;
        ensure!(status.success(), "runsc exec tar: {status}");
        Ok(start.elapsed())
    }

    /// Packs a folder.
    pub(in crate::bench) async fn pack(&self, folder: &str) -> anyhow::Result<(Duration, Vec<u8>)> {
        let mut command = self.command(&["-czf", "-", "-C", folder, "."]);
        let (start, mut packed) = (Instant::now(), Vec::new());
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("a pipe was asked for")?.take(ARCHIVE_BYTES);
        let read = async {
            output.read_to_end(&mut packed).await?;
            child.wait().await
        };
        let status = timeout(CALL_LIMIT, read).await.context("runsc exec took too long")??;
        ensure!(status.success(), "runsc exec tar: {status}");
        Ok((start.elapsed(), packed))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.monitor)).args(["--mount", "--pid", "--"]).arg(&self.raw.runsc);
        command.arg("--root").arg(&self.state).args(["--platform=systrap", "--network=sandbox", "--ignore-cgroups"]);
        command.args(["exec", "--user", "1000:1000", "vm", "/bin/tar"]).args(args);
        quiet(&mut command);
        command
    }
}
