//! What a VM may reach, tried with real packets: a network namespace stands for the world outside.
//!
//! The addresses are those that are set aside for documentation (RFC 5737, RFC 3849): guarded like private ones, so each
//! is reached only when it is named.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use harness::{Host, eventually, on_both_engines, sh, shell};
use nix::sched::{CloneFlags, unshare};
use tiffin_engine::{Engine, EngineError, Observed, Target, agent};
use tiffin_protocol::Exec;
use tiffin_types::{
    id::{SnapshotId, VmId},
    network::{EgressPolicy, parse_allow_entry},
    vm::{EngineName, VmSpec},
};

on_both_engines!(
    the_world_is_reached_as_far_as_it_is_listed,
    a_policy_that_changes_changes_what_is_open_and_what_comes,
);

/// A host outside: 198.51.100.10 and .11 (and 2001:db8:51::10), each answering on port 8080 with its own address, and
/// on port 8081 with whatever it is sent. The machine itself is 198.51.100.1.
struct World {
    link: String,
    /// Its addresses are there once, whoever tests with them.
    _alone: nix::fcntl::Flock<std::fs::File>,
}

impl World {
    fn new() -> Self {
        let lock = std::fs::File::create(std::env::temp_dir().join("tiffin-test-world.lock")).unwrap();
        let alone = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive).unwrap();
        let link = format!("tw{}", &VmId::random().hex()[..10]);
        let (up, is_up) = std::sync::mpsc::channel();
        let name = link.clone();
        std::thread::spawn(move || {
            // The namespace lives as long as the sockets in it, which live as long as this test.
            let host = std::fs::File::open("/proc/self/ns/net").unwrap();
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let me = nix::unistd::gettid();
            ip_in(
                &host,
                &format!(
                    "link add {name} type veth peer name world netns {me}\n\
                     addr add 198.51.100.1/24 dev {name}\naddr add 2001:db8:51::1/64 dev {name} nodad\n\
                     link set {name} up\n"
                ),
            );
            run(
                Command::new("ip").args(["-batch", "-"]),
                "addr add 198.51.100.10/24 dev world\naddr add 198.51.100.11/24 dev world\n\
                 addr add 2001:db8:51::10/64 dev world nodad\nlink set lo up\nlink set world up\n",
            );
            let listener = TcpListener::bind("[::]:8080").unwrap();
            let echo = TcpListener::bind("[::]:8081").unwrap();
            std::thread::spawn(move || {
                for stream in echo.incoming().flatten() {
                    std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
                }
            });
            up.send(()).unwrap();
            for mut stream in listener.incoming().flatten() {
                // A connection that is closed with something unread is reset.
                let _ = stream.read(&mut [0; 4096]);
                let at = stream.local_addr().unwrap().ip().to_canonical();
                let _ = write!(stream, "HTTP/1.0 200 OK\r\n\r\nI am {at}\n");
            }
        });
        is_up.recv().unwrap();
        Self { link, _alone: alone }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.link]).status();
    }
}

fn ip_in(namespace: &std::fs::File, batch: &str) {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    let fd = std::os::fd::AsRawFd::as_raw_fd(namespace);
    // SAFETY: setns(2) is async-signal-safe and the descriptor is open.
    unsafe {
        command.pre_exec(move || match nix::libc::setns(fd, nix::libc::CLONE_NEWNET) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    run(&mut command, batch);
}

fn run(command: &mut Command, input: &str) {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// A real name server on the machine's loopback, which guests can't reach themselves.
struct Names(Child);

impl Names {
    fn new(port: u16) -> Self {
        let server = Command::new("dnsmasq")
            .args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--pid-file="])
            .args(["--bind-interfaces", "--listen-address=127.0.0.1", "--user=root"])
            .args([format!("--port={port}"), "--address=/world.test/198.51.100.10".into()])
            .spawn()
            .expect("dnsmasq, of the Debian package dnsmasq-base");
        Self(server)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn policy(outbound_internet: bool, allow: &[&str]) -> EgressPolicy {
    EgressPolicy { outbound_internet, allow: allow.iter().map(|entry| parse_allow_entry(entry).unwrap()).collect() }
}

/// What the guest gets from `url`; empty when it gets nothing.
async fn get(host: &Host, id: &VmId, url: &str) -> String {
    let output = sh(&*host.engine, id, &format!("curl -sSg --max-time 4 {url}")).await;
    eprint!("{url}: {}{}", output.stdout, output.stderr);
    output.stdout
}

async fn the_world_is_reached_as_far_as_it_is_listed(engine: EngineName) {
    let _world = World::new();
    let mut host = Host::with(engine).await;
    let _names = Names::new(5399);
    host.config.resolvers = vec!["127.0.0.1:5399".parse().unwrap()];
    host.restart().await;

    let listed = policy(true, &["198.51.100.10/32", "2001:db8:51::10/128"]);
    let open = host.running_as(VmSpec { ..host.spec_with(listed) }).await;
    assert_eq!(get(&host, &open, "http://198.51.100.10:8080").await, "I am 198.51.100.10\n");
    assert_eq!(get(&host, &open, "http://[2001:db8:51::10]:8080").await, "I am 2001:db8:51::10\n");
    assert_eq!(get(&host, &open, "http://world.test:8080").await, "I am 198.51.100.10\n", "names resolve");
    for elsewhere in ["198.51.100.11:8080", "198.51.100.1:22", "172.16.0.1:22", "10.213.0.0:22", "169.254.169.254"] {
        assert_eq!(get(&host, &open, &format!("http://{elsewhere}")).await, "", "{elsewhere}");
    }
    let denied = || async { host.engine.denied(&open).await.unwrap() };
    eventually("the denied connection is told", async || {
        denied()
            .await
            .destinations
            .iter()
            .any(|one| one.address.to_string() == "198.51.100.11" && one.port == Some(8080) && one.protocol == "tcp")
    })
    .await;
    assert!(denied().await.total >= 4, "{:?}", denied().await);
    let log = host.engine.log_tail(&open, tiffin_engine::LogKind::Engine, 100).await.unwrap();
    assert!(log.lines.iter().any(|line| line.contains("denied tcp to 198.51.100.11 port 8080")), "{log:?}");

    // The widest public entry opens no guarded range, and no list at all opens nothing.
    for closed in [policy(true, &["0.0.0.0/0", "::/0"]), policy(true, &[]), policy(false, &["198.51.100.10/32"])] {
        let names = closed.allows_something();
        let id = host.running_as(host.spec_with(closed.clone())).await;
        assert_eq!(get(&host, &id, "http://198.51.100.10:8080").await, "", "{closed:?}");
        assert_eq!(get(&host, &id, "http://[2001:db8:51::10]:8080").await, "", "{closed:?}");
        let resolved = sh(&*host.engine, &id, "getent hosts world.test").await.stdout;
        assert_eq!(resolved.contains("198.51.100.10"), names, "{closed:?}: {resolved}");
        eventually("the denials are counted", async || host.engine.denied(&id).await.unwrap().total > 0).await;
        host.engine.destroy(&id).await.unwrap();
    }

    // The machine's own address opens when it is named exactly.
    let listener = TcpListener::bind("198.51.100.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(stream, "HTTP/1.0 200 OK\r\n\r\nI am the host\n");
        }
    });
    let url = format!("http://198.51.100.1:{port}");
    for (entry, answer) in [("198.51.100.1/32", "I am the host\n"), ("198.51.100.0/24", "")] {
        let id = host.running_as(host.spec_with(policy(true, &[entry]))).await;
        assert_eq!(get(&host, &id, &url).await, answer, "{entry}");
        host.engine.destroy(&id).await.unwrap();
    }

    // VMs don't reach each other, by whatever address; nor does a firewall that was flushed meanwhile matter.
    assert!(Command::new("nft").args(["delete", "table", "inet", "tiffin"]).status().unwrap().success());
    let other = host.running_as(host.spec_with(policy(true, &["10.213.0.0/16", "198.51.100.10/32"]))).await;
    assert_eq!(get(&host, &other, "http://198.51.100.10:8080").await, "I am 198.51.100.10\n");
    let table = Command::new("nft").args(["list", "table", "inet", "tiffin"]).output().unwrap();
    assert!(String::from_utf8_lossy(&table.stdout).contains("masquerade"), "the host's filter is there again");
    for id in [&open, &other] {
        let link = link_of(&host, id).await.unwrap();
        for end in ["host", "gateway"] {
            let address = link[end].as_str().unwrap();
            assert_eq!(get(&host, &other, &format!("--connect-timeout 1 http://{address}:1")).await, "");
        }
    }
    for id in [&open, &other] {
        host.engine.destroy(id).await.unwrap();
    }
    assert_eq!(harness::leftovers(&host, &[open, other]), Vec::<String>::new());
}

/// Talks to the echo outside until it is cut off, and says so.
const TALK: &str = "python3 -u -c \"import socket, time\n\
    s = socket.create_connection(('198.51.100.10', 8081)); s.settimeout(3)\n\
    print('talking')\n\
    try:\n\
    \x20 while True:\n\
    \x20  s.send(b'x'); assert s.recv(1) == b'x'; time.sleep(0.05)\n\
    except OSError: print('cut off')\"";

const PGREP: [&str; 3] = ["pgrep", "-f", "read -[r]u9"];

async fn link_of(host: &Host, id: &VmId) -> Option<serde_json::Value> {
    let launch = std::fs::read(host.folder(id).join("launch.json")).unwrap();
    let launch: serde_json::Value = serde_json::from_slice(&launch).unwrap();
    let link = std::path::Path::new("/sys/class/net").join(tiffin_engine::host::network::host_link(id));
    let uplink = launch["uplink"].clone();
    assert_eq!(link.exists(), !uplink.is_null(), "the file says what there is");
    Some(uplink).filter(|uplink| !uplink.is_null())
}

/// The guest's pid of the shell that waits for the next command.
async fn waiting_shell(host: &Host, id: &VmId) -> String {
    let look = Exec { command: tiffin_protocol::Command::Argv(PGREP.map(str::to_owned).to_vec()), ..shell("") };
    let mut found = String::new();
    eventually("a shell waits", async || {
        found = harness::exec(&*host.engine, id, look.clone()).await.stdout;
        !found.is_empty()
    })
    .await;
    found
}

async fn a_policy_that_changes_changes_what_is_open_and_what_comes(engine: EngineName) {
    let _world = World::new();
    let mut host = Host::with(engine).await;
    let _names = Names::new(5398);
    host.config.resolvers = vec!["127.0.0.1:5398".parse().unwrap()];
    host.restart().await;
    let (ten, eleven) = (policy(true, &["198.51.100.10/32"]), policy(true, &["198.51.100.11/32"]));
    let get_ten = async |host: &Host, id: &VmId| get(host, id, "http://198.51.100.10:8080").await;
    let id = host.running().await;
    assert_eq!(link_of(&host, &id).await, None);
    assert_eq!(get_ten(&host, &id).await, "");
    let names =
        async |host: &Host| sh(&*host.engine, &id, "getent hosts world.test").await.stdout.contains("198.51.100.10");
    assert!(!names(&host).await);

    let waiting = waiting_shell(&host, &id).await;
    host.engine.set_egress(&id, &ten).await.unwrap();
    assert_eq!(waiting_shell(&host, &id).await, waiting, "the shell that waits for the next command waits on");
    assert!(link_of(&host, &id).await.is_some());
    assert_eq!(get_ten(&host, &id).await, "I am 198.51.100.10\n");
    assert!(names(&host).await);
    let dialled = host.engine.dial(&id, Target::Agent).await.unwrap();
    let token = host.engine.agent_token(&id).await.unwrap();
    let mut talk = agent::exec(dialled, &token, shell(TALK)).await.unwrap();
    assert_eq!(harness::next_line(&mut talk).await, "talking");
    // A wider policy cuts nothing off, and gVisor can't save an open connection.
    host.engine.set_egress(&id, &policy(true, &["198.51.100.10/32", "198.51.100.11/32"])).await.unwrap();
    if engine == EngineName::Gvisor {
        let refused = host.engine.snapshot_save(&id, &SnapshotId::random()).await;
        assert!(matches!(refused, Err(EngineError::WrongState(state)) if state.contains("in touch")), "{refused:?}");
    }
    host.engine.set_egress(&id, &eleven).await.unwrap();
    assert_eq!(harness::next_line(&mut talk).await, "cut off");
    drop(talk);
    assert_eq!(get_ten(&host, &id).await, "");
    assert_eq!(get(&host, &id, "http://198.51.100.11:8080").await, "I am 198.51.100.11\n");

    // Another server knows the link as well, and gives it to nobody else.
    assert_eq!(host.restart().await, [(id.clone(), Observed::Running)]);
    let other = host.running_as(host.spec_with(ten.clone())).await;
    assert_ne!(link_of(&host, &id).await, link_of(&host, &other).await);
    host.engine.destroy(&other).await.unwrap();
    host.engine.set_egress(&id, &policy(true, &[])).await.unwrap();
    assert_eq!(link_of(&host, &id).await, None, "allowed nothing, it has no link");
    assert_eq!(get(&host, &id, "http://198.51.100.11:8080").await, "");
    assert!(!names(&host).await);
    assert!(!sh(&*host.engine, &id, "cat /etc/resolv.conf").await.stdout.contains("nameserver"));

    // A paused one is told when it goes on; a stopped one starts with it.
    host.engine.pause(&id).await.unwrap();
    host.engine.set_egress(&id, &ten).await.unwrap();
    host.engine.resume(&id).await.unwrap();
    assert!(names(&host).await);
    assert_eq!(get_ten(&host, &id).await, "I am 198.51.100.10\n");
    host.engine.stop(&id, std::time::Duration::from_secs(3)).await.unwrap();
    host.engine.set_egress(&id, &eleven).await.unwrap();
    host.engine.start(&id).await.unwrap();
    assert_eq!(get_ten(&host, &id).await, "");
    assert_eq!(get(&host, &id, "http://198.51.100.11:8080").await, "I am 198.51.100.11\n");
    host.engine.destroy(&id).await.unwrap();
    assert_eq!(harness::leftovers(&host, &[id, other]), Vec::<String>::new());
}
