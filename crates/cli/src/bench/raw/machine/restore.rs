//! QEMU going on from a template of the platform's, with a way to the agent in it: the same guest, the same command.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, anyhow, ensure};
use nix::sched::{CloneFlags, unshare};
use serde::Deserialize;
use tiffin_engine::{
    agent::{self, ExecItem},
    host::network::{self, GUEST_V4},
    qemu::TAP,
};
use tiffin_protocol::{AGENT_PORT, Exec};
use tiffin_types::vm::VmSize;
use tokio::{net::TcpStream, process::Command, time::timeout};

use super::{CALL_LIMIT, RawMachine};

/// Between two attempts to reach the agent.
const RETRY: Duration = Duration::from_millis(2);
/// How long the first may take, and each other twice as long as the one before: what was sent before the guest listens is lost,
/// and TCP would send it again after a second only.
const ATTEMPT: Duration = Duration::from_millis(20);

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

/// As [`WITH_DESCRIPTORS`](super::WITH_DESCRIPTORS), with the tap as standard input; QEMU's own is a socket on which nobody says
/// anything, as the guest takes an end of it for the end of its cable.
const WITH_TAP: &str = "image=$0 disk=$1 state=$2; shift 2; \
                        exec \"$@\" 3<&0 5<\"$image\" 6<>\"$disk\" 7>/dev/null 8>/dev/null 9<\"$state\" 0<&2 2>/dev/null";

impl RawMachine {
    /// Goes on from a template and runs a command there: the time until its end. The machine is gone when this returns.
    pub(in crate::bench) async fn restore(&self, from: &Template, kvm: bool, exec: Exec) -> anyhow::Result<Duration> {
        let disk = self.folder.path().join("restored");
        fs::copy(from.folder.join("disk.ext4"), &disk)?;
        let ram = from.folder.join("memory/ram");
        let memory =
            format!("memory-backend-file,id=memory,size={}M,mem-path={},share=off", from.size.mem_mb, ram.display());
        let mut command = self.command(WITH_TAP, &disk, &from.folder.join("memory/state"));
        command.args(self.arguments(from.size, kvm, true, &format!("tap,id=net,fd={TAP}"), &memory));
        let token = from.token.clone();
        // On a thread of its own, as the network is the thread's.
        let thread = move || std::thread::spawn(move || apart(command, &token, exec)).join();
        tokio::task::spawn_blocking(thread).await?.map_err(|_| anyhow!("the thread for QEMU panicked"))?
    }
}

/// Runs QEMU in a network namespace that is made for it and goes with it.
fn apart(mut command: Command, token: &str, exec: Exec) -> anyhow::Result<Duration> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
    let tap = network::make_tap()?;
    network::configure_gateway(false)?;
    let (_silent, theirs) = UnixStream::pair()?;
    command.stdin(tap).stdout(std::process::Stdio::null()).stderr(OwnedFd::from(theirs)).kill_on_drop(true);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let start = Instant::now();
        let mut child = command.spawn()?;
        let answered = timeout(CALL_LIMIT, first(token, exec)).await;
        let time = start.elapsed();
        child.kill().await?;
        answered.context("the guest that QEMU restored doesn't answer")??;
        Ok(time)
    })
}

/// Runs the command as soon as the agent is there.
async fn first(token: &str, exec: Exec) -> anyhow::Result<()> {
    let mut patience = ATTEMPT;
    let connection = loop {
        match timeout(patience, TcpStream::connect((GUEST_V4, AGENT_PORT))).await {
            Ok(Ok(connection)) => break connection,
            // The guest doesn't hear yet.
            Ok(Err(_)) | Err(_) => tokio::time::sleep(RETRY).await,
        }
        patience *= 2;
    };
    let code = run(connection, token, exec).await?;
    ensure!(code == 0, "the command ended with {code}");
    Ok(())
}

async fn run(connection: TcpStream, token: &str, exec: Exec) -> anyhow::Result<i32> {
    connection.set_nodelay(true)?;
    let mut stream = agent::exec(Box::pin(connection), token, exec).await?;
    loop {
        if let ExecItem::Done(done) = stream.next().await? {
            return Ok(done.exit_code);
        }
    }
}
