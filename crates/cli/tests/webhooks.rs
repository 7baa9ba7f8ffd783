//! Webhooks of the whole program, on the fake engine: the client's commands, and deliveries over a `kill -9`.

#![allow(clippy::unwrap_used, reason = "test code: a failure here is the test's failure")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tiffin_store::{NewImage, Store};
use tiffin_types::id::Digest;

const DEADLINE: Duration = Duration::from_secs(60);

fn tiffin() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiffin"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TIFFIN_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A server with its folder's data; killed when dropped.
struct Server {
    child: Child,
    url: String,
    key: String,
}

impl Server {
    fn start(folder: &Path, more: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (data, run, key) = (folder.join("data"), folder.join("run"), folder.join("key"));
        let mut command = tiffin();
        command.args(["serve", "--set", "engine=fake", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"]);
        command.arg(data).args([
            "--set",
            &format!("run_dir={}", run.display()),
            "--set",
            "pool.max_vms=0",
            "--set",
            "ingress.listen=off",
        ]);
        command.args(["--set", "webhooks.allow_http=true", "--set", "webhooks.allow_networks=127.0.0.1/32"]);
        command.args(["--set", "webhooks.timeout_ms=1000"]);
        command.args(["--set", &format!("webhooks.retry_delays_s={}", ["1"; 30].join(","))]).args(more);
        command.args(["--write-key", key.to_str().unwrap()]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut server = Self { child, url: format!("http://127.0.0.1:{port}"), key: String::new() };
        until("the server", || {
            assert!(server.child.try_wait().unwrap().is_none(), "the server ended");
            let health = server.client(&["vm", "ls"]);
            let is_up = health.status.success() || !text(&health.stderr).contains("can't reach");
            is_up.then_some(())
        });
        server.key = std::fs::read_to_string(key).unwrap().trim().to_owned();
        server
    }

    fn client(&self, args: &[&str]) -> Output {
        tiffin().args(args).env("TIFFIN_URL", &self.url).env("TIFFIN_API_KEY", &self.key).output().unwrap()
    }

    /// A command that succeeds; what it says.
    fn done(&self, args: &[&str]) -> String {
        let out = self.client(args);
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        text(&out.stdout)
    }

    /// Waits until the server has killed itself.
    fn until_killed(mut self) {
        let status = until("the server's end", || self.child.try_wait().unwrap());
        assert_eq!(status.signal(), Some(9), "{status}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Registers an image that the fake engine takes for granted.
fn add_default_image(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        std::fs::create_dir_all(folder.join("data")).unwrap();
        let store = Store::open(&format!("sqlite://{}", folder.join("data/tiffin.db").display())).await.unwrap();
        let image = NewImage {
            account_id: None,
            name: "test".to_owned(),
            description: String::new(),
            digest: Some(Digest::from_sha256([7; 32])),
            size_bytes: 1,
            rootfs_bytes: 1,
            config: serde_json::json!({}),
        };
        let image = store.image_insert(image).await.unwrap();
        assert!(store.image_set_default(&image.id).await.unwrap());
        store.close().await;
    });
}

/// A receiver that answers with the status of the moment, and remembers what it took.
struct Receiver {
    url: String,
    status: Arc<AtomicU16>,
    taken: Arc<Mutex<Vec<Value>>>,
}

impl Receiver {
    fn start(status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let receiver = Self { url, status: Arc::new(AtomicU16::new(status)), taken: Arc::default() };
        let (status, taken) = (Arc::clone(&receiver.status), Arc::clone(&receiver.taken));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A server that is killed leaves half a request.
                let _ = take(stream.unwrap(), status.load(Ordering::SeqCst), &taken);
            }
        });
        receiver
    }

    fn taken(&self) -> Vec<Value> {
        self.taken.lock().unwrap().clone()
    }
}

fn take(mut stream: TcpStream, status: u16, taken: &Mutex<Vec<Value>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut line, mut length) = (String::new(), 0);
    while reader.read_line(&mut line)? > 2 {
        if let Some((_, bytes)) = line.to_lowercase().split_once("content-length:") {
            length = bytes.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if status == 200 {
        taken.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
    }
    write!(stream, "HTTP/1.1 {status} Said\r\ncontent-length: 0\r\n\r\n")
}

#[test]
fn what_happened_just_before_the_server_was_killed_is_delivered_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    add_default_image(folder.path());
    let receiver = Receiver::start(500);
    let server = Server::start(folder.path(), &["--set", "fault=after_running_commit"]);
    server.done(&["webhook", "create", "states", &receiver.url, "--event", "vm_state"]);
    assert!(!server.client(&["vm", "create"]).status.success());
    server.until_killed();
    assert!(receiver.taken().is_empty());
    receiver.status.store(200, Ordering::SeqCst);
    let _server = Server::start(folder.path(), &[]);
    for state in ["STARTING", "RUNNING"] {
        until(state, || receiver.taken().into_iter().find(|event| event["data"]["state"] == state));
    }
}

#[test]
fn what_was_being_delivered_when_the_server_was_killed_is_delivered_again() {
    let folder = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(200);
    let server = Server::start(folder.path(), &["--set", "fault=before_delivery_settle"]);
    server.done(&["webhook", "create", "x", &receiver.url, "--event", "vm_delete"]);
    let listed: Value = serde_json::from_str(&server.done(&["webhook", "ls", "--json"])).unwrap();
    assert!(!server.client(&["webhook", "test", listed[0]["id"].as_str().unwrap()]).status.success());
    server.until_killed();
    let server = Server::start(folder.path(), &[]);
    let twice = until("the second time", || Some(receiver.taken()).filter(|taken| taken.len() > 1));
    assert_eq!(twice[0], twice[1]);
    until("the end of it", || {
        let table = server.done(&["webhook", "deliveries", listed[0]["id"].as_str().unwrap()]);
        table.contains("delivered").then_some(())
    });
}

#[test]
fn a_webhook_is_made_tested_looked_at_and_deleted_by_the_commands() {
    let folder = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(200);
    let server = Server::start(folder.path(), &[]);
    let made = server.client(&["webhook", "create", "billing", &receiver.url, "--event", "vm_state"]);
    assert!(text(&made.stdout).starts_with("whsec_") && text(&made.stdout).lines().count() == 1);
    let id = text(&made.stderr).split(':').next().unwrap().to_owned();
    let listed = server.done(&["webhook", "ls"]);
    assert!(listed.contains(&id) && listed.contains("billing") && !listed.contains("whsec_"), "{listed}");
    assert!(server.done(&["webhook", "test", &id]).contains("delivered"));
    assert_eq!(receiver.taken()[0]["type"], "ping");
    receiver.status.store(500, Ordering::SeqCst);
    let failed = server.client(&["webhook", "test", &id]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(text(&failed.stdout).contains("answered 500"), "{}", text(&failed.stdout));
    let tried = server.done(&["webhook", "deliveries", &id, "--limit", "5"]);
    assert!(tried.contains("500") && tried.contains("delivered"), "{tried}");
    assert_eq!(server.done(&["webhook", "rm", &id]).trim(), id);
    assert_eq!(server.client(&["webhook", "rm", &id]).status.code(), Some(1));
    let refused = server.client(&["webhook", "create", "x", "https://169.254.169.254/"]);
    assert!(text(&refused.stderr).contains("isn't public"), "{}", text(&refused.stderr));
}
