//! QEMU going on from a template of the platform's, with a way to the agent in it: the same guest, the same command.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, ensure};
use serde::Deserialize;
use tiffin_engine::{
    agent::{self, ExecItem},
    host::network::{GATEWAY_V4, GUEST_V4},
};
use tiffin_protocol::{AGENT_PORT, Exec};
use tiffin_types::vm::VmSize;
use tokio::{net::TcpStream, time::timeout};

use super::{CALL_LIMIT, RawMachine};

/// Between two attempts to reach the agent.
const RETRY: Duration = Duration::from_millis(2);
/// How long one may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// A template of the server's, as its manifest tells it.
pub(in crate::bench) struct Template {
    folder: PathBuf,
    size: VmSize,
    /// The agent's secret in it.
    token: String,
}

#[derive(Deserialize)]
struct Envelope {
    manifest: String,
}

#[derive(Deserialize)]
struct Manifest {
    size: VmSize,
    token: String,
}

impl Template {
    /// The latest of that size, if there is one.
    pub(in crate::bench) fn find(data_dir: &Path, size: VmSize) -> Option<Self> {
        let folders = fs::read_dir(data_dir.join("templates/machines")).ok()?.flatten().map(|entry| entry.path());
        let templates = folders.filter_map(|folder| {
            let file = folder.join("manifest.json");
            let modified: SystemTime = fs::metadata(&file).ok()?.modified().ok()?;
            let envelope: Envelope = serde_json::from_slice(&fs::read(&file).ok()?).ok()?;
            let Manifest { size, token } = serde_json::from_str(&envelope.manifest).ok()?;
            Some((modified, Self { folder, size, token }))
        });
        templates.filter(|(_, template)| template.size == size).max_by_key(|(modified, _)| *modified).map(|one| one.1)
    }
}

impl RawMachine {
    /// Goes on from a template and runs a command there: the time until its end. The machine is gone when this returns.
    pub(in crate::bench) async fn restore(&self, from: &Template, kvm: bool, exec: Exec) -> anyhow::Result<Duration> {
        let disk = self.folder.path().join("restored");
        fs::copy(from.folder.join("disk.ext4"), &disk)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let network = format!(
            "user,id=net,net={GUEST_V4}/24,host={GATEWAY_V4},restrict=on,hostfwd=tcp:127.0.0.1:{port}-{GUEST_V4}:{AGENT_PORT}"
        );
        let ram = from.folder.join("memory/ram");
        let memory =
            format!("memory-backend-file,id=memory,size={}M,mem-path={},share=off", from.size.mem_mb, ram.display());
        let mut command = self.command(&disk, &from.folder.join("memory/state"));
        command.args(self.arguments(from.size, kvm, true, &network, &memory));
        // The guest takes the end of its standard input for the end of its cable.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let start = Instant::now();
        let mut child = command.spawn()?;
        let answered = timeout(CALL_LIMIT, first(port, &from.token, exec)).await;
        let time = start.elapsed();
        child.kill().await?;
        answered.context("the guest that QEMU restored doesn't answer")??;
        Ok(time)
    }
}

/// Runs the command as soon as the agent is there.
async fn first(port: u16, token: &str, exec: Exec) -> anyhow::Result<()> {
    loop {
        match timeout(ATTEMPT, run(port, token, exec.clone())).await {
            Ok(Ok(code)) => {
                ensure!(code == 0, "the command ended with {code}");
                return Ok(());
            }
            // QEMU isn't up, or has the port and not yet the guest.
            Ok(Err(_)) | Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}

async fn run(port: u16, token: &str, exec: Exec) -> anyhow::Result<i32> {
    let connection = TcpStream::connect(("127.0.0.1", port)).await?;
    connection.set_nodelay(true)?;
    let mut stream = agent::exec(Box::pin(connection), token, exec).await?;
    loop {
        if let ExecItem::Done(done) = stream.next().await? {
            return Ok(done.exit_code);
        }
    }
}
