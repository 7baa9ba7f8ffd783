//! A guest without an engine: the real agent as process 1 of its own namespaces (pid, network, mount, host name, cgroup)
//! over a throw-away overlay of this machine's root, joined to the test's own network namespace by a veth pair. Needs root.
//!
//! Everything of it goes when it is dropped. The clock is the machine's own, so the agent may not set it.

#![allow(dead_code, reason = "each test binary uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tiffin_protocol::{
    AGENT_PORT, Boot, Command, Event, Exec, ExecDone, Failure, HEADER, Kind, Op, Request, decode_header, encode,
};

pub(crate) const TOKEN: &str = "a secret of this test";
pub(crate) const ADDRESS: &str = "172.16.0.2";
pub(crate) const MAX_PIDS: u32 = 60;
const PATIENCE: Duration = Duration::from_secs(20);

const SCRIPT: &str = r#"
set -e
echo $$ > $GROUP/leaf/cgroup.procs
mount --make-rprivate /
mount -t tmpfs tmpfs $FOLDER
mkdir $FOLDER/upper $FOLDER/work $FOLDER/root
mount -t overlay overlay -o lowerdir=/,upperdir=$FOLDER/upper,workdir=$FOLDER/work $FOLDER/root
mount --rbind /dev $FOLDER/root/dev
cp $AGENT $FOLDER/root/agent
eval "$PLANT"
ip link add eth0 type veth peer name gw0 netns $HOST
ip addr add 172.16.0.2/30 dev eth0; ip link set eth0 up; ip link set lo up
exec setpriv --bounding-set=-sys_time unshare --pid --fork --kill-child --mount-proc=$FOLDER/root/proc chroot $FOLDER/root /agent
"#;

pub(crate) struct Guest {
    init: Child,
    group: PathBuf,
    folder: PathBuf,
    said: Mutex<Receiver<(Kind, Vec<u8>)>>,
}

impl Guest {
    pub(crate) fn boot() -> Self {
        Self::boot_planted("true")
    }

    /// Boots after `plant`, a shell command that may change the guest's root in `$FOLDER/root`.
    pub(crate) fn boot_planted(plant: &str) -> Self {
        let boot = Boot {
            token: TOKEN.to_owned(),
            hostname: "box".to_owned(),
            addresses: vec![ADDRESS.to_owned()],
            resolvers: vec!["9.9.9.9".to_owned()],
            cpus: 1,
            max_pids: MAX_PIDS,
            link: None,
        };
        let line = serde_json::to_string(&boot).unwrap() + "\n";
        let (guest, first) = Self::start(plant, line.as_bytes());
        assert!(matches!(first, Event::Ready { .. }), "{first:?}");
        ip("addr add 172.16.0.1/30 dev gw0");
        ip("link set gw0 up");
        guest
    }

    /// Starts the agent with `line` on standard input, up to its first event.
    pub(crate) fn start(plant: &str, line: &[u8]) -> (Self, Event) {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
        let name = format!("tiffin-test-{}-{}", std::process::id(), nix::unistd::gettid());
        let hierarchy = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new).into_iter().find(|path| path.is_dir());
        let group = hierarchy.expect("control groups are mounted").join(&name);
        std::fs::create_dir_all(group.join("leaf")).unwrap();
        let folder = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(&folder).unwrap();
        let init = Process::new("sh")
            .args([
                "-c",
                r#"echo $$ > $GROUP/cgroup.procs; exec unshare --net --mount --uts --ipc --cgroup sh -c "$SCRIPT""#,
            ])
            .env("SCRIPT", SCRIPT)
            .env("PLANT", plant)
            .env("GROUP", &group)
            .env("FOLDER", &folder)
            .env("AGENT", env!("CARGO_BIN_EXE_tiffin-agent"))
            .env("HOST", nix::unistd::gettid().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, said) = channel();
        let mut guest = Guest { init, group, folder, said: Mutex::new(said) };
        let mut stdout = guest.init.stdout.take().unwrap();
        std::thread::spawn(move || {
            while let Some(frame) = read_frame(&mut stdout) {
                if sender.send(frame).is_err() {
                    break;
                }
            }
        });
        // An agent that refuses may not have read all.
        let _ = guest.init.stdin.take().unwrap().write_all(line);
        let (kind, first) = guest.said().expect("the agent says something");
        assert_eq!(kind, Kind::Event);
        (guest, serde_json::from_slice(&first).unwrap())
    }

    /// What comes next on the agent's standard output; `None` at its end.
    pub(crate) fn said(&self) -> Option<(Kind, Vec<u8>)> {
        match self.said.lock().unwrap().recv_timeout(PATIENCE) {
            Ok(frame) => Some(frame),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("the agent says nothing"),
        }
    }

    /// All that the agent says until it ends: what the program prints, and how it ended.
    pub(crate) fn hear_out(&self) -> Heard {
        let mut heard = Heard::default();
        while let Some((kind, payload)) = self.said() {
            match kind {
                Kind::Stdout => heard.stdout.extend(payload),
                Kind::Stderr => heard.stderr.extend(payload),
                Kind::Event => match serde_json::from_slice(&payload).unwrap() {
                    Event::Exited { code, signal } => heard.exit = Some((code, signal)),
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?} from the agent"),
            }
        }
        heard
    }

    /// Gives the guest's interface another address, as nobody in the guest may.
    pub(crate) fn add_address(&self, address: &str) {
        let pid = self.init.id().to_string();
        let add = ["-t", &pid, "-n", "ip", "address", "add", address, "dev", "eth0"];
        assert!(Process::new("nsenter").args(add).status().unwrap().success(), "{address}");
    }

    pub(crate) fn dial(&self) -> Host {
        let address: SocketAddr = format!("{ADDRESS}:{AGENT_PORT}").parse().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                Ok(socket) => {
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.set_write_timeout(Some(PATIENCE)).unwrap();
                    socket.set_nodelay(true).unwrap();
                    return Host { socket };
                }
                // Freshly set up, the link may still be finding its carrier.
                Err(error) => assert!(Instant::now() < deadline, "can't dial: {error}"),
            }
        }
    }

    pub(crate) fn ask(&self, op: Op) -> Answer {
        let mut host = self.dial();
        host.request(op);
        host.answer()
    }

    pub(crate) fn exec(&self, exec: Exec) -> Answer {
        self.ask(Op::Exec(exec))
    }

    pub(crate) fn shell(&self, line: &str) -> Answer {
        self.exec(shell(line))
    }

    /// How many processes [`Guest::pids`] gives.
    pub(crate) fn count(&self, mark: &str) -> usize {
        self.pids(mark).len()
    }

    /// Processes in the guest whose command line has `mark`, as the agent's host sees them.
    pub(crate) fn pids(&self, mark: &str) -> Vec<String> {
        let mut pids = Vec::new();
        walk(&self.group, &mut |folder| {
            let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().map(str::to_owned));
        });
        let marked = |pid: &&String| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(mark) && !String::from_utf8_lossy(&line).contains("unshare")
        };
        pids.iter().filter(marked).cloned().collect()
    }

    pub(crate) fn wait_for_count(&self, mark: &str, wanted: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.count(mark) != wanted {
            assert!(Instant::now() < deadline, "{} processes of {mark:?}, not {wanted}", self.count(mark));
            std::thread::yield_now();
        }
    }

    pub(crate) fn wait_for_end(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.init.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the guest doesn't end");
            std::thread::yield_now();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
        let deadline = Instant::now() + PATIENCE;
        while self.group.exists() && Instant::now() < deadline {
            walk(&self.group, &mut |folder| drop(std::fs::remove_dir(folder)));
        }
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// Children first.
fn walk(folder: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), visit);
        }
    }
    visit(folder);
}

fn ip(arguments: &str) {
    let status = Process::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

pub(crate) fn shell(line: &str) -> Exec {
    command(Command::Shell(line.to_owned()))
}

pub(crate) fn argv(words: &[&str]) -> Exec {
    command(Command::Argv(words.iter().map(|word| (*word).to_owned()).collect()))
}

fn command(command: Command) -> Exec {
    Exec {
        command,
        cwd: "/workspace".to_owned(),
        env: BTreeMap::new(),
        image_env: BTreeMap::new(),
        uid: 1000,
        gid: 1000,
        timeout_ms: 15_000,
        stdout_cap: 1 << 20,
        stderr_cap: 1 << 20,
        stdin: false,
        terminal: None,
    }
}

/// What a program printed, and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Option<(i32, Option<i32>)>,
}

impl Heard {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

/// The host's side of a connection.
pub(crate) struct Host {
    pub(crate) socket: TcpStream,
}

impl Host {
    pub(crate) fn request(&mut self, op: Op) {
        self.request_as(TOKEN, op);
    }

    pub(crate) fn request_as(&mut self, token: &str, op: Op) {
        let request = Request { token: token.to_owned(), op };
        self.send(Kind::Request, &serde_json::to_vec(&request).unwrap());
    }

    pub(crate) fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.socket.write_all(&encode(kind, payload)).unwrap();
    }

    pub(crate) fn frame(&mut self) -> Option<(Kind, Vec<u8>)> {
        read_frame(&mut self.socket)
    }

    pub(crate) fn answer(&mut self) -> Answer {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.frame().expect("a last frame") {
                (Kind::Stdout, bytes) => stdout.extend(bytes),
                (Kind::Stderr, bytes) => stderr.extend(bytes),
                (kind @ (Kind::Done | Kind::Failed), last) => return Answer { kind, last, stdout, stderr },
                (other, _) => panic!("{other:?} from the agent"),
            }
        }
    }
}

fn read_frame(input: &mut impl Read) -> Option<(Kind, Vec<u8>)> {
    let mut header = [0; HEADER];
    input.read_exact(&mut header).ok()?;
    let mut frame = vec![0; decode_header(header).unwrap()];
    input.read_exact(&mut frame).ok()?;
    let payload = frame.split_off(1);
    Some((Kind::from_byte(frame[0]).unwrap(), payload))
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) kind: Kind,
    pub(crate) last: Vec<u8>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Answer {
    pub(crate) fn done(&self) -> ExecDone {
        assert_eq!(self.kind, Kind::Done, "{}", String::from_utf8_lossy(&self.last));
        serde_json::from_slice(&self.last).unwrap()
    }

    pub(crate) fn failure(&self) -> Failure {
        assert_eq!(self.kind, Kind::Failed, "{}", String::from_utf8_lossy(&self.last));
        serde_json::from_slice(&self.last).unwrap()
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap().trim_end()
    }
}
