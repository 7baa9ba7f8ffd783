#![allow(dead_code, unused_imports, unused_macros, reason = "each test program uses a part of it")]
//! Real VMs for tests: an engine over a folder of its own, with the image, the agent and the `runsc` that `make test`
//! names in the environment.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tiffin_engine::{
    Engine, Observed,
    agent::{self, ExecItem},
    monitored::{HostConfig, MachinesConfig, Monitored},
};
use tiffin_protocol::{Command, Exec, ExecDone};
use tiffin_types::{
    id::{Digest, VmId},
    network::EgressPolicy,
    vm::{EngineName, VmSize, VmSpec},
};

/// The value of an environment variable that `make test` sets.
pub(crate) fn required(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run the tests by `make test`")))
}

/// Makes a test on gVisor and one on QEMU of each function that takes the engine's name.
macro_rules! on_both_engines {
    ($($promise:ident),* $(,)?) => {
        mod gvisor {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::$promise(super::EngineName::Gvisor).await;
            })*
        }
        mod qemu {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::$promise(super::EngineName::Qemu).await;
            })*
        }
    };
}
pub(crate) use on_both_engines;

/// A folder with the default image in it, and an engine over it.
pub(crate) struct Host {
    pub(crate) engine: Arc<Monitored>,
    pub(crate) config: HostConfig,
    pub(crate) image: Digest,
    _dir: tempfile::TempDir,
}

impl Host {
    pub(crate) async fn new() -> Self {
        Self::with(EngineName::Gvisor).await
    }

    /// As [`Host::new`], where that engine runs VMs.
    pub(crate) async fn with(engine: EngineName) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (data_dir, run_dir) = (dir.path().join("data"), dir.path().join("run"));
        let image = link_image(&data_dir);
        let config = HostConfig {
            data_dir,
            run_dir,
            runsc: Some(required("TIFFIN_RUNSC")),
            machines: (engine == EngineName::Qemu).then(machines),
            engine,
            agent: required("TIFFIN_AGENT"),
            monitor: env!("CARGO_BIN_EXE_tiffin").into(),
            uplinks: "10.213.0.0/16".parse().unwrap(),
            resolvers: vec![],
            boot_timeout: Duration::from_secs(60),
            logs: Default::default(),
            min_free_disk_mb: 64,
        };
        let engine = open(&config).await;
        Self { engine, config, image, _dir: dir }
    }

    /// Another engine over the same folder: what a restarted server is.
    pub(crate) async fn restart(&mut self) -> Vec<(VmId, Observed)> {
        let engine = Monitored::open(self.config.clone()).unwrap();
        let seen = engine.adopt().await.unwrap();
        self.engine = Arc::new(engine);
        seen
    }

    pub(crate) fn spec(&self) -> VmSpec {
        self.spec_with(EgressPolicy::default())
    }

    pub(crate) fn spec_with(&self, egress: EgressPolicy) -> VmSpec {
        let size = VmSize { cpus: 1, mem_mb: 256, disk_mb: 256 };
        let engine = self.config.engine;
        VmSpec { id: VmId::random(), image: self.image.clone(), kernel: None, size, egress, engine, program: None }
    }

    /// A VM that runs.
    pub(crate) async fn running(&self) -> VmId {
        self.running_as(self.spec()).await
    }

    pub(crate) async fn running_as(&self, spec: VmSpec) -> VmId {
        self.engine.create(&spec).await.unwrap();
        self.engine.start(&spec.id).await.unwrap();
        spec.id
    }

    pub(crate) fn folder(&self, id: &VmId) -> PathBuf {
        self.config.data_dir.join("vms").join(id.as_str())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A failed test leaves its VMs: their monitors are killed, and with them all the rest.
        for entry in std::fs::read_dir(self.config.data_dir.join("vms")).into_iter().flatten().flatten() {
            for log in ["engine.log", "errors.log", "console.log"] {
                let text = std::fs::read_to_string(entry.path().join(log)).unwrap_or_default();
                eprintln!("--- {} {log}\n{text}", entry.path().display());
            }
            if let Some(pid) = monitor_pid(&entry.path()) {
                let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
            }
        }
        for entry in std::fs::read_dir(self.config.run_dir.join("images")).into_iter().flatten().flatten() {
            let _ = std::process::Command::new("umount").args(["-l".as_ref(), entry.path().as_os_str()]).status();
        }
    }
}

/// What `make test` has fetched for machines with a kernel of their own.
fn machines() -> MachinesConfig {
    let kernel = required("TIFFIN_KERNEL");
    MachinesConfig {
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        modules: kernel.with_file_name("modules"),
        kernel,
        kvm: false,
        templates: 8,
    }
}

async fn open(config: &HostConfig) -> Arc<Monitored> {
    let engine = Monitored::open(config.clone()).unwrap();
    engine.adopt().await.unwrap();
    Arc::new(engine)
}

/// Gives a data folder the image that was built for the tests.
pub(crate) fn link_image(data_dir: &Path) -> Digest {
    let blobs = required("TIFFIN_TEST_DATA").join("images/sha256");
    let blob = std::fs::read_dir(&blobs)
        .unwrap_or_else(|e| panic!("{}: {e}", blobs.display()))
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|end| end == "erofs"))
        .expect("an image in the test data");
    let hex = blob.file_stem().unwrap().to_str().unwrap().to_owned();
    let own = data_dir.join("images/sha256");
    std::fs::create_dir_all(&own).unwrap();
    std::os::unix::fs::symlink(blob.canonicalize().unwrap(), own.join(format!("{hex}.erofs"))).unwrap();
    format!("sha256:{hex}").parse().unwrap()
}

/// The pid of the VM's monitor.
pub(crate) fn monitor_pid(folder: &Path) -> Option<i32> {
    let run: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("run.json")).ok()?).ok()?;
    run["process"]["pid"].as_i64()?.try_into().ok()
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) done: ExecDone,
}

pub(crate) fn shell(line: &str) -> Exec {
    Exec {
        command: Command::Shell(line.to_owned()),
        cwd: "/workspace".into(),
        env: Default::default(),
        image_env: Default::default(),
        uid: 1000,
        gid: 1000,
        timeout_ms: 60_000,
        stdout_cap: 1 << 20,
        stderr_cap: 1 << 20,
        stdin: false,
        terminal: None,
    }
}

/// Runs a shell line in the guest.
pub(crate) async fn sh(engine: &dyn Engine, id: &VmId, line: &str) -> Output {
    exec(engine, id, shell(line)).await
}

pub(crate) async fn exec(engine: &dyn Engine, id: &VmId, exec: Exec) -> Output {
    let connection = engine.dial(id, tiffin_engine::Target::Agent).await.unwrap();
    let token = engine.agent_token(id).await.unwrap();
    let mut stream = agent::exec(connection, &token, exec).await.unwrap();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let done = loop {
        match stream.next().await.unwrap() {
            ExecItem::Stdout(bytes) => stdout.extend(bytes),
            ExecItem::Stderr(bytes) => stderr.extend(bytes),
            ExecItem::Done(done) => break done,
        }
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Output { stdout: text(stdout), stderr: text(stderr), done }
}

/// The next line that a running command writes to standard output, in however many pieces, when it writes no more than
/// that.
pub(crate) async fn next_line(stream: &mut agent::ExecStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        match stream.next().await.unwrap() {
            ExecItem::Stdout(bytes) => line.extend(bytes),
            other => panic!("{other:?}"),
        }
    }
    String::from_utf8(line).unwrap().trim_end().to_owned()
}

/// Waits until `what` holds, or fails.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The pids, in the host's namespace, of the children of the VM's monitor whose name is `name`.
pub(crate) fn engine_pids(folder: &Path, name: &str) -> Vec<i32> {
    let Some(monitor) = monitor_pid(folder) else { return vec![] };
    let children = std::fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).unwrap_or_default();
    let is_named =
        |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(name.as_bytes()));
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(is_named).collect()
}

/// Kills what runs the VM, whichever engine that is.
pub(crate) fn kill_engine(folder: &Path) {
    let pids: Vec<i32> = ["runsc-sandbox", "/usr/bin/qemu-system-x86_64"]
        .into_iter()
        .flat_map(|name| engine_pids(folder, name))
        .collect();
    assert_eq!(pids.len(), 1, "one engine in {}", folder.display());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pids[0]), nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Kills the VM's sandbox as the kernel or an operator would.
pub(crate) fn kill_sandbox(folder: &Path) {
    let pids = engine_pids(folder, "runsc-sandbox");
    assert_eq!(pids.len(), 1, "one sandbox in {}", folder.display());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pids[0]), nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// What is still on the host of those VMs, or of this engine's folders, beyond the folders themselves and mounted images.
///
/// The kernel takes down a dead network namespace, and with it the interface on the host, a moment after its last process.
pub(crate) fn leftovers(host: &Host, ids: &[VmId]) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let found = leftovers_now(host, ids);
        if found.is_empty() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn leftovers_now(host: &Host, ids: &[VmId]) -> Vec<String> {
    let mut found = Vec::new();
    let cgroups = tiffin_engine::host::cgroup::Cgroups::detect().unwrap();
    let groups = cgroups.all();
    for id in ids {
        found.extend(groups.iter().filter(|group| *group == id).map(|group| format!("control group {group}")));
        let link = tiffin_engine::host::network::host_link(id);
        if Path::new("/sys/class/net").join(&link).exists() {
            found.push(format!("interface {link}"));
        }
    }
    let data = host.config.data_dir.to_str().unwrap();
    for mount in std::fs::read_to_string("/proc/mounts").unwrap().lines().filter(|line| line.contains(data)) {
        if !mount.contains("/run/images/") {
            found.push(format!("mount {mount}"));
        }
    }
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(data) {
            found.push(format!("process {line}"));
        }
    }
    for device in std::fs::read_dir("/sys/block").unwrap().flatten() {
        let backing = std::fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        if backing.starts_with(data) && !backing.contains("/images/") {
            found.push(format!("loop device of {backing}"));
        }
    }
    found
}
