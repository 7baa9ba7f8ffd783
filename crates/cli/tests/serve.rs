//! `tiffin serve` as a program, with the fake engine: its first start, its end, and what it refuses.

#![allow(clippy::unwrap_used, reason = "test code: a failure here is the test's failure")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tiffin_store::{NewImage, Store};
use tiffin_types::id::Digest;

const DEADLINE: Duration = Duration::from_secs(20);

fn tiffin() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiffin"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TIFFIN_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

fn serve(folder: &Path, port: u16) -> Command {
    let mut command = tiffin();
    command.args(["serve", "--set", "engine=fake", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"]);
    command.arg(folder.join("data")).args(["--set", &format!("run_dir={}", folder.join("run").display())]);
    command.args(["--set", "rate.vm_create_per_min=0", "--set", "rate.exec_per_min=0", "--set", "ingress.listen=off"]);
    command
}

/// A running server; killed when dropped.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    /// Starts one and waits until it answers.
    fn start(folder: &Path, more: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = serve(folder, port).args(more).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut server = Self { child, url: format!("http://127.0.0.1:{port}") };
        let deadline = Instant::now() + DEADLINE;
        while !healthy(port) {
            assert!(server.child.try_wait().unwrap().is_none(), "the server ended");
            assert!(Instant::now() < deadline, "the server doesn't answer");
            std::thread::yield_now();
        }
        server
    }

    /// Runs a client command with a key.
    fn client(&self, key: &str, args: &[&str]) -> Output {
        tiffin().args(args).env("TIFFIN_URL", &self.url).env("TIFFIN_API_KEY", key).output().unwrap()
    }

    /// Tells it to stop and waits for its end; what it wrote to stdout.
    fn stop(mut self) -> (ExitStatus, Vec<String>) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), Signal::SIGTERM).unwrap();
        let lines = BufReader::new(self.child.stdout.take().unwrap()).lines().map(Result::unwrap).collect();
        (self.child.wait().unwrap(), lines)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a server there says that it is well; one that is still starting has its listener's queue to wait in.
fn healthy(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let mut answer = String::new();
    let asked = stream
        .set_read_timeout(Some(DEADLINE))
        .and_then(|()| stream.write_all(b"GET /health HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"))
        .and_then(|()| stream.read_to_string(&mut answer));
    asked.is_ok() && answer.starts_with("HTTP/1.1 200")
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

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_first_start_prints_a_key_that_works_the_next_none_and_two_at_once_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &[]);
    let (status, printed) = server.stop();
    assert!(status.success());
    let key = printed.iter().find(|line| line.starts_with("tfn_")).unwrap().clone();
    assert!(printed.contains(&"email admin@tiffin.local".to_owned()), "{printed:?}");
    assert!(
        printed.iter().any(|line| line.strip_prefix("password ").is_some_and(|word| word.len() == 24)),
        "{printed:?}"
    );
    let again = Server::start(folder.path(), &[]);
    let second = serve(folder.path(), 0).output().unwrap();
    assert!(text(&second.stderr).contains("a server runs on"), "{}", text(&second.stderr));
    let listed = again.client(&key, &["vm", "ls"]);
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    assert_eq!(again.client("tfn_wrong", &["vm", "ls"]).status.code(), Some(1));
    let (_, printed) = again.stop();
    assert!(printed.is_empty(), "{printed:?}");
}

#[test]
fn a_vm_is_created_used_and_deleted_by_the_client_commands() {
    let folder = tempfile::tempdir().unwrap();
    add_default_image(folder.path());
    let file = folder.path().join("key");
    let server = Server::start(folder.path(), &["--write-key", file.to_str().unwrap()]);
    let key = std::fs::read_to_string(&file).unwrap();
    let run = |args: &[&str]| server.client(key.trim(), args);

    let created = run(&["vm", "create", "--quiet"]);
    assert!(created.status.success(), "{}", text(&created.stderr));
    let id = text(&created.stdout);
    let id = id.trim();
    assert_eq!(text(&run(&["vm", "exec", id, "--", "echo", "hello"]).stdout), "hello\n");
    assert_eq!(run(&["vm", "exec", id, "--", "exit 7"]).status.code(), Some(7));
    assert_eq!(run(&["vm", "exec", id, "--timeout", "0.05", "--", "sleep 9"]).status.code(), Some(124));
    assert!(run(&["vm", "pause", id]).status.success());
    let paused = run(&["vm", "exec", id, "--", "echo"]);
    assert_eq!(paused.status.code(), Some(125));
    assert!(text(&paused.stderr).contains("PAUSED"), "{}", text(&paused.stderr));
    assert!(run(&["vm", "resume", id]).status.success() && run(&["vm", "stop", id]).status.success());
    assert!(text(&run(&["vm", "get", id]).stdout).contains("STOPPED"));
    let accounts: Vec<serde_json::Value> = serde_json::from_slice(&run(&["account", "ls", "--json"]).stdout).unwrap();
    let account = accounts[0]["id"].as_str().unwrap();
    for reading in [
        ["vm", "logs", id].as_slice(),
        &["vm", "network", id],
        &["image", "ls"],
        &["account", "ls"],
        &["account", "get", account],
    ] {
        let read = run(reading);
        assert!(read.status.success(), "{reading:?}: {}", text(&read.stderr));
    }
    assert!(run(&["vm", "rm", id]).status.success());
    let gone = run(&["vm", "get", id]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains("VM not found"), "{}", text(&gone.stderr));

    let (status, printed) = server.stop();
    assert!(status.success() && printed.is_empty(), "with --write-key the key is not printed: {printed:?}");
}

#[test]
fn a_new_key_does_what_its_scope_says_until_it_is_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    let server = Server::start(folder.path(), &["--write-key", file.to_str().unwrap()]);
    let admin = std::fs::read_to_string(&file).unwrap();
    let made = server.client(admin.trim(), &["key", "create", "reader", "--scope", "read", "--json"]);
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let (id, key) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    assert!(server.client(key, &["vm", "ls"]).status.success());
    assert_eq!(server.client(key, &["account", "ls"]).status.code(), Some(1));
    assert!(server.client(admin.trim(), &["key", "revoke", id]).status.success());
    let revoked = server.client(key, &["vm", "ls"]);
    assert!(text(&revoked.stderr).contains("TIFFIN_API_KEY"), "{}", text(&revoked.stderr));
}

/// Logs in over plain HTTP; the answer's status line.
fn log_in(url: &str, email: &str, password: &str) -> String {
    let body = format!("{{\"email\":\"{email}\",\"password\":\"{password}\"}}");
    let head =
        format!("POST /auth/login HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.lines().next().unwrap().to_owned()
}

#[test]
fn the_first_password_works_until_the_host_sets_another() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    let server =
        Server::start(folder.path(), &["--write-key", file.to_str().unwrap(), "--set", "admin.email=Ada@Example.org"]);
    let login = std::fs::read_to_string(folder.path().join("key.login")).unwrap();
    let (email, password) = login.trim().split_once("\npassword ").unwrap();
    assert_eq!(email, "email ada@example.org");
    assert!(log_in(&server.url, "ada@example.org", password).contains("200"));
    let data = folder.path().join("data");
    let reset = |more: &[&str], stdin: &str| {
        let mut command = tiffin();
        command.args(["admin", "password", "--data-dir"]).arg(&data).args(more);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let made = reset(&["--email", "ada@example.org"], "");
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert!(log_in(&server.url, "ada@example.org", password).contains("401"));
    assert!(log_in(&server.url, "ada@example.org", text(&made.stdout).trim()).contains("200"));
    assert!(reset(&["--email", "ada@example.org", "--stdin"], "a password of mine\n").status.success());
    assert!(log_in(&server.url, "ada@example.org", "a password of mine").contains("200"));
    for (more, stdin, says) in [
        (&["--email", "ada@example.org", "--stdin"][..], "short\n", "12 to 256"),
        (&["--email", "ada@example.org", "--stdin"], "two lines of it\nand this\n", "one line"),
        (&[], "", "nobody logs in with admin@tiffin.local"),
    ] {
        let refused = reset(more, stdin);
        assert!(!refused.status.success() && text(&refused.stderr).contains(says), "{}", text(&refused.stderr));
    }
    assert!(log_in(&server.url, "ada@example.org", "a password of mine").contains("200"));
}

#[test]
fn a_setting_that_is_wrong_is_named_and_nothing_starts() {
    let folder = tempfile::tempdir().unwrap();
    let out = serve(folder.path(), 0).args(["--set", "exec.max_concurrent=many"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("exec.max_concurrent must be a whole number"), "{}", text(&out.stderr));
    assert!(!folder.path().join("data").exists());
}

#[test]
fn certificates_that_can_not_be_used_stop_the_start_and_the_setting_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (absent, none) = (folder.path().join("absent.pem"), folder.path().join("none.pem"));
    std::fs::write(&none, "no certificate").unwrap();
    for key in ["registry.ca_file", "webhooks.ca_file"] {
        for (file, why) in [(&absent, "No such file"), (&none, "no PEM block of type CERTIFICATE")] {
            let setting = format!("{key}={}", file.display());
            let output = serve(folder.path(), 0).args(["--set", &setting]).output().unwrap();
            let said = text(&output.stderr);
            assert!(!output.status.success() && said.contains(key) && said.contains(why), "{setting}: {said}");
        }
    }
}

#[test]
fn an_unfit_host_is_refused_with_what_is_missing_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let out =
        serve(folder.path(), 0).args(["--set", "engine=gvisor", "--set", "runsc=/nonexistent/runsc"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let told = text(&out.stderr);
    assert!(told.contains("FAIL gvisor: no /nonexistent/runsc") && told.contains("install runsc"), "{told}");
    assert!(!folder.path().join("data").exists());
}

#[test]
fn every_setting_is_listed_and_no_hidden_one() {
    let out = tiffin().args(["config", "--json"]).output().unwrap();
    let listed: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
    let names: Vec<&str> = listed.iter().map(|key| key["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"listen") && names.contains(&"quota.vms") && !names.contains(&"fault"), "{names:?}");
    assert!(text(&tiffin().arg("config").output().unwrap().stdout).contains("listen = 127.0.0.1:3000\n"));
}
