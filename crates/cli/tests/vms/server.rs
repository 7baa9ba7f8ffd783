#![allow(dead_code, reason = "each test program uses a part of it")]
//! The whole program with real VMs: `tiffin serve` over folders of its own, spoken to over HTTP, killed and started again.
//!
//! Dropping a [`Site`] ends the server and every VM it ever made, by what its folders and logs name, and nothing else.

use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tiffin_engine::host::{cgroup::Cgroups, network::host_link};
use tiffin_store::{NewImage, Store};
use tiffin_types::{
    id::{Digest, ImageId, VmId},
    vm::EngineName,
};

use crate::harness::{eventually, link_image, monitor_pid, required};

/// An answer: its status, `Retry-After` and body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) retry_after: Option<String>,
    pub(crate) body: Value,
}

impl Answer {
    /// The VM's id, from the answer to a create.
    pub(crate) fn id(&self) -> VmId {
        assert_eq!(self.status, 201, "{self:?}");
        self.body["id"].as_str().unwrap().parse().unwrap()
    }
}

/// What a command in a VM wrote to its standard output, if it could be run.
pub(crate) fn stdout(answer: &Answer) -> &str {
    answer.body["stdout"].as_str().unwrap_or("")
}

/// A data folder, a run folder and the server on them, if one runs.
pub(crate) struct Site {
    folder: tempfile::TempDir,
    pub(crate) data: PathBuf,
    run: PathBuf,
    engine: EngineName,
    /// What the next server is started with.
    pub(crate) settings: Vec<String>,
    server: Option<Child>,
    url: String,
    http: reqwest::Client,
}

impl Site {
    /// Folders with the default image and a running server.
    pub(crate) async fn start(settings: &[&str]) -> Self {
        Self::start_with(EngineName::Gvisor, settings).await
    }

    /// As [`Site::start`], where that engine runs VMs, and no other can be had.
    pub(crate) async fn start_with(engine: EngineName, settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        Self::open(engine, folder, data, settings).await
    }

    /// As [`Site::start`], with the data in a folder that the caller chose.
    pub(crate) async fn start_on(folder: tempfile::TempDir, data: PathBuf, settings: &[&str]) -> Self {
        Self::open(EngineName::Gvisor, folder, data, settings).await
    }

    async fn open(engine: EngineName, folder: tempfile::TempDir, data: PathBuf, settings: &[&str]) -> Self {
        let digest = link_image(&data);
        let image = insert_image(&data, "default", digest, json!({})).await;
        let store = open_store(&data).await;
        assert!(store.image_set_default(&image).await.unwrap());
        store.close().await;
        let mut site = Self {
            run: folder.path().join("run"),
            data,
            folder,
            engine,
            settings: settings.iter().map(|setting| (*setting).to_owned()).collect(),
            server: None,
            url: String::new(),
            http: reqwest::Client::builder().timeout(Duration::from_secs(90)).build().unwrap(),
        };
        site.serve(None).await;
        site
    }

    /// Adds an image of the default one's files and a configuration of its own, while no server runs.
    pub(crate) async fn add_image(&self, name: &str, config: Value) -> ImageId {
        assert!(self.server.is_none(), "a server runs");
        let blob = fs::read_dir(self.data.join("images/sha256")).unwrap().next().unwrap().unwrap().path();
        let digest = format!("sha256:{}", blob.file_stem().unwrap().to_str().unwrap()).parse().unwrap();
        insert_image(&self.data, name, digest, config).await
    }

    fn command(&self, port: u16, fault: Option<&str>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiffin"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TIFFIN_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"]);
        command.arg(&self.data).arg("--write-key").arg(self.folder.path().join("key"));
        command.args(["--set", &format!("run_dir={}", self.run.display())]);
        let (runsc, kernel) = match self.engine {
            EngineName::Qemu => (self.folder.path().join("no-runsc"), Some(required("TIFFIN_KERNEL"))),
            _ => (required("TIFFIN_RUNSC"), None),
        };
        let paths = [("runsc", Some(runsc)), ("qemu.kernel", kernel), ("agent", Some(required("TIFFIN_AGENT")))];
        for (setting, path) in paths.into_iter().filter_map(|(setting, path)| Some((setting, path?))) {
            command.args(["--set", &format!("{setting}={}", path.display())]);
        }
        command.args(["--set", &format!("engine={}", self.engine.as_str())]);
        for rate in ["vm_create", "exec", "run", "upload", "download", "import"] {
            command.args(["--set", &format!("rate.{rate}_per_min=0")]);
        }
        // What is on the host is what the API lists, except in tests of the pool, which set it.
        command.args(["--set", "pool.max_vms=0", "--set", "ingress.listen=off"]);
        for setting in &self.settings {
            command.args(["--set", setting]);
        }
        if let Some(point) = fault {
            command.env("TIFFIN_FAULT", point);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Starts a server, armed with that fault point, and waits until it answers.
    pub(crate) async fn serve(&mut self, fault: Option<&str>) {
        assert!(self.server.is_none(), "a server runs");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = fs::File::options().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = self.command(port, fault);
        self.server = Some(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
        self.url = format!("http://127.0.0.1:{port}");
        eventually("the server answers", async || {
            assert_eq!(self.server.as_mut().unwrap().try_wait().unwrap(), None, "the server ended");
            let health = self.http.get(format!("{}/health", self.url)).send().await;
            health.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
    }

    /// Starts another server on the same folders; how it ends, and what it says.
    pub(crate) fn second_server(&self) -> std::process::Output {
        self.command(0, None).output().unwrap()
    }

    /// Kills the server and waits for its end.
    pub(crate) async fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.ended().await;
    }

    /// Sends the server a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.server.as_ref().unwrap().id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }

    /// Waits for the server's end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let mut server = self.server.take().unwrap();
        let mut status = None;
        eventually("the server is gone", async || {
            status = server.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }

    /// Where the server answers.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The administrator's key.
    pub(crate) fn key(&self) -> String {
        fs::read_to_string(self.folder.path().join("key")).unwrap().trim().to_owned()
    }

    /// The server's process.
    pub(crate) fn server_pid(&self) -> u32 {
        self.server.as_ref().unwrap().id()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("server.log")
    }

    /// All that this site's servers logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub(crate) fn folder(&self, id: &VmId) -> PathBuf {
        self.data.join("vms").join(id.as_str())
    }
}

async fn open_store(data: &Path) -> Store {
    Store::open(&format!("sqlite://{}", data.join("tiffin.db").display())).await.unwrap()
}

async fn insert_image(data: &Path, name: &str, digest: Digest, config: Value) -> ImageId {
    let image = NewImage {
        account_id: None,
        name: name.to_owned(),
        description: String::new(),
        digest: Some(digest),
        size_bytes: 1,
        rootfs_bytes: 1,
        config,
    };
    let store = open_store(data).await;
    let image = store.image_insert(image).await.unwrap();
    store.close().await;
    image.id
}

/// Requests.
impl Site {
    /// Asks the server; an error when it doesn't answer.
    pub(crate) async fn try_ask(
        &self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: Option<Value>,
    ) -> reqwest::Result<Answer> {
        let api_key = fs::read_to_string(self.folder.path().join("key")).unwrap();
        let mut request = self.http.request(method.parse().unwrap(), format!("{}{path}", self.url));
        request = request.header("x-api-key", api_key.trim());
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await?;
        let retry_after = response.headers().get("retry-after").map(|value| value.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        let text = response.text().await?;
        Ok(Answer { status, retry_after, body: serde_json::from_str(&text).unwrap_or(Value::Null) })
    }

    /// Uploads bytes; an error when the server breaks off.
    pub(crate) async fn try_upload(&self, path: &str, bytes: Vec<u8>) -> reqwest::Result<Answer> {
        self.try_upload_with(path, &[], bytes).await
    }

    /// The same with further headers.
    pub(crate) async fn try_upload_with(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        bytes: Vec<u8>,
    ) -> reqwest::Result<Answer> {
        let mut request = self.http.put(format!("{}{path}", self.url)).header("x-api-key", self.key());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.header("content-type", "application/octet-stream").body(bytes).send().await?;
        let status = response.status().as_u16();
        let text = response.text().await?;
        Ok(Answer { status, retry_after: None, body: serde_json::from_str(&text).unwrap_or(Value::Null) })
    }

    pub(crate) async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        self.try_ask(method, path, None, body).await.unwrap()
    }

    /// What the server answers where it speaks no JSON.
    pub(crate) async fn text(&self, path: &str) -> String {
        let api_key = fs::read_to_string(self.folder.path().join("key")).unwrap();
        let request = self.http.get(format!("{}{path}", self.url)).header("x-api-key", api_key.trim());
        request.send().await.unwrap().text().await.unwrap()
    }

    /// A VM that runs.
    pub(crate) async fn create(&self) -> VmId {
        self.ask("POST", "/v1/vms", Some(small())).await.id()
    }

    /// Runs a shell line in a VM.
    pub(crate) async fn exec(&self, id: &VmId, line: &str) -> Answer {
        self.ask("POST", &format!("/v1/vms/{id}/exec"), Some(json!({ "cmd": line, "timeoutMs": 60_000 }))).await
    }

    /// The same, for what must succeed; its standard output.
    pub(crate) async fn sh(&self, id: &VmId, line: &str) -> String {
        let answer = self.exec(id, line).await;
        assert_eq!((answer.status, &answer.body["exitCode"]), (200, &json!(0)), "{answer:?}");
        stdout(&answer).to_owned()
    }

    pub(crate) async fn get(&self, id: &VmId) -> Answer {
        self.ask("GET", &format!("/v1/vms/{id}"), None).await
    }

    pub(crate) async fn delete(&self, id: &VmId) {
        let answer = self.ask("DELETE", &format!("/v1/vms/{id}"), None).await;
        assert_eq!(answer.status, 204, "{answer:?}");
    }

    /// Waits for a VM's state, and answers how the VM is then.
    pub(crate) async fn until(&self, id: &VmId, state: &str) -> Value {
        let mut seen = Value::Null;
        eventually(&format!("{id} is {state}"), async || {
            seen = self.get(id).await.body;
            seen["state"] == state
        })
        .await;
        seen
    }

    /// Every VM in the list, with its state.
    pub(crate) async fn list(&self) -> Vec<(VmId, String)> {
        let answer = self.ask("GET", "/v1/vms", None).await;
        let vms = answer.body.as_array().unwrap().iter();
        vms.map(|vm| (vm["id"].as_str().unwrap().parse().unwrap(), vm["state"].as_str().unwrap().to_owned())).collect()
    }
}

/// The smallest VM.
pub(crate) fn small() -> Value {
    json!({ "cpu": 1, "memMb": 128, "allowIps": [], "diskSizeMb": 64 })
}

/// What is on the host.
impl Site {
    /// Every VM that a server of this site ever had to do with.
    pub(crate) fn ever_seen(&self) -> BTreeSet<VmId> {
        let log = self.log();
        let logged = log.split("vm-").skip(1).filter_map(|rest| format!("vm-{}", rest.get(..14)?).parse().ok());
        let folders = fs::read_dir(self.data.join("vms")).into_iter().flatten().flatten();
        logged.chain(folders.filter_map(|entry| entry.file_name().to_str()?.parse().ok())).collect()
    }

    /// Waits until the host has exactly the VMs of the API's list: their folders and, of those that are up, a monitor.
    pub(crate) async fn is_tidy(&self) {
        let mut found = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            found = self.strays().await;
            if found.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("left on the host: {found:#?}");
    }

    async fn strays(&self) -> Vec<String> {
        let listed = self.list().await;
        let up = |id: &VmId| listed.iter().any(|(one, state)| one == id && (state == "RUNNING" || state == "PAUSED"));
        let mut found = Vec::new();
        let groups = Cgroups::detect().unwrap().all();
        for id in self.ever_seen() {
            let has_folder = self.folder(&id).exists();
            if has_folder && !listed.iter().any(|(one, _)| *one == id) {
                found.push(format!("folder of {id}"));
            }
            if up(&id) != groups.contains(&id) {
                found.push(format!("{id}: up {}, control group {}", up(&id), groups.contains(&id)));
            }
            if !up(&id) && Path::new("/sys/class/net").join(host_link(&id)).exists() {
                found.push(format!("interface of {id}"));
            }
        }
        let belongs = |text: &str| listed.iter().any(|(id, _)| up(id) && text.contains(id.as_str()));
        found.extend(traces(&self.data).into_iter().filter(|trace| !belongs(trace)));
        found
    }
}

/// Mounts, loop devices and processes that name that folder, the server and mounted images aside.
fn traces(data: &Path) -> Vec<String> {
    let name = data.join("vms").to_str().unwrap().to_owned();
    let mut found = Vec::new();
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    found.extend(mounts.lines().filter(|line| line.contains(&name)).map(|line| format!("mount {line}")));
    for device in fs::read_dir("/sys/block").unwrap().flatten() {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        if backing.starts_with(&name) {
            found.push(format!("loop device of {backing}"));
        }
    }
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let line = String::from_utf8_lossy(&fs::read(process.path().join("cmdline")).unwrap_or_default()).into_owned();
        if line.contains(&name) {
            found.push(format!("process {}", line.replace('\0', " ")));
        }
    }
    found
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            // It may have ended already.
            let _ = server.kill();
            let _ = server.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the servers' log\n{}", self.log());
        }
        let cgroups = Cgroups::detect();
        for id in self.ever_seen() {
            let folder = self.folder(&id);
            if std::thread::panicking() {
                for log in ["engine.log", "errors.log"] {
                    eprintln!("--- {id} {log}\n{}", fs::read_to_string(folder.join(log)).unwrap_or_default());
                }
            }
            end_monitor(&folder);
            if let Ok(cgroups) = &cgroups {
                let deadline = Instant::now() + Duration::from_secs(5);
                // Its processes take a moment to die.
                while cgroups.group(&id).remove().is_err() && Instant::now() < deadline {
                    cgroups.group(&id).kill();
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        for entry in fs::read_dir(self.run.join("images")).into_iter().flatten().flatten() {
            let _ = Command::new("umount").args(["-l".as_ref(), entry.path().as_os_str()]).status();
        }
    }
}

/// Kills a VM's monitor, and with it the VM, if the process is still that monitor; waits for its end.
fn end_monitor(folder: &Path) {
    let Some(pid) = monitor_pid(folder) else { return };
    let is_monitor = || {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(folder.to_str().unwrap())
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while is_monitor() && Instant::now() < deadline {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(5));
    }
}
