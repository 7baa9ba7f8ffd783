//! `runsc` itself, without the platform: what the platform is compared with.
//!
//! It starts from the same image (EROFS, read by the sandbox itself: nothing is mounted on the host) with a writable
//! layer in memory, as user 1000 in /workspace, as the platform's commands do.
//!
//! The variant with a network gets a network namespace of its own with only loopback in it. There a tmpfs lies over
//! `/proc/sys/net`, in a mount namespace of its own, because some kernels show the host's settings in every namespace
//! and `runsc` takes that for the host's network.

mod machine;
mod snapshot;
mod tar;

use std::{
    cell::{Cell, RefCell},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use camino::Utf8Path;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, process::Command, time::timeout};

use super::BenchArgs;
pub(super) use machine::{RawMachine, restore::Template};
pub(super) use tar::Tar;

/// Bound on every call of `runsc`.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// `$0` is the runsc; sets up the namespaces' insides, then becomes it.
const IN_OWN_NETWORK: &str = "mount -t tmpfs none /proc/sys/net && ip link set lo up && exec \"$0\" \"$@\"";

/// With or without a network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Network {
    None,
    Own,
}

/// A `runsc` with a folder of its own for state and bundles.
pub(super) struct Raw {
    runsc: PathBuf,
    version: String,
    folder: TempDir,
    next: Cell<u32>,
    alive: RefCell<Vec<String>>,
}

impl Raw {
    /// Finds `runsc` and the image.
    pub(super) async fn new(args: &BenchArgs) -> anyhow::Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "only root can run runsc by itself");
        let runsc = match &args.runsc {
            Some(path) => path.clone(),
            None => find_runsc(&args.data_dir).context("no runsc found: name it with --runsc")?,
        };
        let rootfs = match &args.rootfs {
            Some(path) => path.clone(),
            None => default_image(&args.data_dir)?,
        };
        let rootfs = rootfs.canonicalize().with_context(|| format!("the image {}", rootfs.display()))?;
        let folder = tempfile::Builder::new().prefix("tiffin-bench-").tempdir()?;
        for (bundle, command) in
            [("echo", ["/bin/bash", "-lc", "echo hi"]), ("idle", ["/bin/bash", "-c", "exec sleep 3600"])]
        {
            let path = folder.path().join(bundle);
            std::fs::create_dir_all(path.join("rootfs"))?;
            std::fs::write(path.join("config.json"), specification(&rootfs, &command).to_string())?;
        }
        let version =
            Command::new(&runsc).arg("--version").output().await.with_context(|| runsc.display().to_string())?;
        let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
        let version = version.trim_start_matches("runsc version ").to_owned();
        Ok(Self { runsc, version, folder, next: Cell::new(0), alive: RefCell::default() })
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// `runsc run` of `bash -lc 'echo hi'`: the time to its first output. It is gone when this returns.
    pub(super) async fn first_output(&self, network: Network) -> anyhow::Result<Duration> {
        let id = self.new_id();
        let start = Instant::now();
        let mut child = self.run(network, "echo", &id, &[]).stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("a pipe was asked for")?;
        let mut first = [0; 16];
        let read = timeout(CALL_LIMIT, output.read(&mut first)).await.context("runsc run took too long")??;
        let time = start.elapsed();
        let status = timeout(CALL_LIMIT, child.wait()).await.context("runsc run took too long")??;
        self.delete(&id).await;
        ensure!(read > 0 && status.success(), "runsc run: {status}");
        Ok(time)
    }

    /// Starts a container that does nothing; its id.
    pub(super) async fn start_idle(&self) -> anyhow::Result<String> {
        let id = self.new_id();
        let status = timeout(CALL_LIMIT, self.run(Network::Own, "idle", &id, &["--detach"]).status()).await??;
        ensure!(status.success(), "runsc run --detach: {status}");
        Ok(id)
    }

    /// `runsc exec` of a command in a running container: the time until it is over.
    pub(super) async fn exec(&self, id: &str, command: &[&str]) -> anyhow::Result<Duration> {
        let mut exec = Command::new(&self.runsc);
        exec.args(self.options(Network::Own)).args(["exec", "--user", "1000:1000", id]).args(command);
        quiet(&mut exec);
        let start = Instant::now();
        let status = timeout(CALL_LIMIT, exec.status()).await.context("runsc exec took too long")??;
        let time = start.elapsed();
        ensure!(status.success(), "runsc exec: {status}");
        Ok(time)
    }

    /// Ends and removes every container that is left.
    pub(super) async fn delete_all(&self) {
        let left: Vec<String> = self.alive.borrow().clone();
        for id in left {
            self.delete(&id).await;
        }
    }

    async fn delete(&self, id: &str) {
        let mut delete = Command::new(&self.runsc);
        delete.args(self.options(Network::None)).args(["delete", "--force", id]);
        // What can't be deleted is seen as a leftover; there is nothing else to do about it here.
        let _ = timeout(CALL_LIMIT, quiet(&mut delete).status()).await;
        self.alive.borrow_mut().retain(|other| other != id);
    }

    fn run(&self, network: Network, bundle: &str, id: &str, flags: &[&str]) -> Command {
        self.start("run", network, bundle, id, flags)
    }

    /// `runsc VERB` of a new container.
    fn start(&self, verb: &str, network: Network, bundle: &str, id: &str, flags: &[&str]) -> Command {
        let mut command = match network {
            Network::None => Command::new(&self.runsc),
            Network::Own => {
                let mut command = Command::new("unshare");
                command.args(["--net", "--mount", "sh", "-c", IN_OWN_NETWORK]).arg(&self.runsc);
                command
            }
        };
        command
            .args(self.options(network))
            .arg(verb)
            .args(flags)
            .arg("--bundle")
            .arg(self.folder.path().join(bundle))
            .arg(id);
        quiet(&mut command);
        command
    }

    fn options(&self, network: Network) -> Vec<String> {
        let network = match network {
            Network::None => "none",
            Network::Own => "sandbox",
        };
        let root = self.folder.path().join("state");
        let root = format!("--root={}", root.display());
        [&root, "--platform=systrap", &format!("--network={network}")].map(str::to_owned).to_vec()
    }

    fn new_id(&self) -> String {
        let id = self.new_name();
        self.alive.borrow_mut().push(id.clone());
        id
    }

    fn new_name(&self) -> String {
        let number = self.next.replace(self.next.get() + 1);
        format!("bench-{}-{number:05}", std::process::id())
    }
}

/// No input, no output and no words; killed when dropped. A pipe would stay open in a detached sandbox.
fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true)
}

fn specification(rootfs: &Path, command: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 1000, "gid": 1000},
            "args": command,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/workspace", "LANG=C.UTF-8"],
            "cwd": "/workspace",
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "bench",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]},
        "annotations": {
            "dev.gvisor.spec.rootfs.source": rootfs,
            "dev.gvisor.spec.rootfs.type": "erofs",
            "dev.gvisor.spec.rootfs.overlay": "memory",
        },
    })
}

/// The runsc on the search path, or the one that `make up` fetched.
fn find_runsc(data_dir: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let fetched = [data_dir.join("bin"), data_dir.join("engines"), PathBuf::from(".tiffin/bin")];
    std::env::split_paths(&path).chain(fetched).map(|folder| folder.join("runsc")).find(|file| file.is_file())
}

fn default_image(data_dir: &Path) -> anyhow::Result<PathBuf> {
    let data_dir = Utf8Path::from_path(data_dir).context("the data folder's name is no UTF-8")?;
    let Some(image) = tiffin_image::default_image::find_default(data_dir)? else {
        bail!("no default image in {data_dir}: build it with `tiffin image build-default`, or name one with --rootfs");
    };
    let blobs = tiffin_image::blob::BlobStore::open(&data_dir.join("images"))?;
    Ok(blobs.path(&image.digest).into_std_path_buf())
}
