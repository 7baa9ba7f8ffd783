//! What the frames say, as JSON.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

/// The TCP port that the agent listens on, on the guest's address. Below 1024, so that an unprivileged guest process
/// can't take it. Never reachable through anything but the host's own dial.
pub const AGENT_PORT: u16 = 1;

/// What the monitor tells the agent on standard input, as one line of JSON, before anything else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The secret that every request must carry.
    pub token: String,
    /// The guest's host name.
    pub hostname: String,
    /// The guest's own addresses, for `/etc/hosts`.
    pub addresses: Vec<String>,
    /// Name servers for `/etc/resolv.conf`; empty when nothing outside is reachable.
    pub resolvers: Vec<String>,
    /// vCPUs: commands are bound to that many, so that the guest's programs size themselves to it.
    pub cpus: u32,
    /// Processes and threads that commands may have at once, all together.
    pub max_pids: u32,
    /// The guest's own link, where it has a kernel of its own to set it up by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<Link>,
}

/// A guest's way out: its one network device's address and whom it is next to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Bits of the address that its neighbours share.
    pub prefix: u8,
    /// Where everything goes that isn't for a neighbour.
    pub gateway: Ipv4Addr,
    /// The same in IPv6: address, bits, gateway.
    pub v6: Option<(Ipv6Addr, u8, Ipv6Addr)>,
}

/// A request: the secret, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`Boot::token`].
    pub token: String,
    /// What to do.
    pub op: Op,
}

/// What the agent can be asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// Answer [`Pong`].
    Ping,
    /// Run a command; answers [`ExecDone`], or [`Failure`] when it could not be started.
    Exec(Exec),
    /// Run a program in a JavaScript runtime; answers [`ExecDone`] after [`Kind::Result`](crate::Kind::Result) frames.
    Script(Script),
    /// Move files in or out; answers [`FilesDone`].
    Files(Files),
    /// Start the program that the guest is for; answers [`ProgramStarted`], also when it runs already.
    Program(Program),
    /// Become another guest, after a restore, or learn what has changed; answers [`Pong`].
    Renew(Renew),
    /// End every process in the guest (the program by its own signal, the others by SIGTERM, all by SIGKILL after the
    /// grace), sync, and exit; answers `{}` first.
    Shutdown(Shutdown),
}

/// Answer to [`Op::Ping`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The agent's version.
    pub version: String,
    /// The guest's clock, milliseconds since the Unix epoch.
    pub unix_ms: i64,
    /// Processes in the guest, the agent aside.
    pub processes: u32,
}

/// How to end the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// How long processes have between SIGTERM and SIGKILL, in milliseconds.
    pub grace_ms: u64,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments, or a shell's command line.
    pub command: Command,
    /// Working directory. Missing or no directory: [`FailureCode::BadCwd`].
    pub cwd: String,
    /// Environment beyond the agent's base (`PATH`, `HOME`, `USER`, `LANG`, ...) and the image's; overrides both.
    pub env: BTreeMap<String, String>,
    /// The image's own environment; overrides the agent's base. A `PATH` of either is one that no profile changes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub image_env: BTreeMap<String, String>,
    /// User id to run as.
    pub uid: u32,
    /// Group id to run as; no supplementary groups.
    pub gid: u32,
    /// After this many milliseconds the whole process group is killed.
    pub timeout_ms: u64,
    /// Bytes of standard output to send before cutting; further output is read and dropped.
    pub stdout_cap: u64,
    /// The same for standard error.
    pub stderr_cap: u64,
    /// Whether [`Kind::Stdin`](crate::Kind::Stdin) frames follow; otherwise standard input is `/dev/null`.
    pub stdin: bool,
    /// A terminal of this size for all three streams instead of pipes: output comes as
    /// [`Kind::Stdout`](crate::Kind::Stdout), [`Kind::Resize`](crate::Kind::Resize) changes the size, and `stdin` must
    /// be true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
}

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// The program that a guest is for. Unlike a command it belongs to no connection: what it prints goes to the monitor as
/// [`Kind::Stdout`](crate::Kind::Stdout) and [`Kind::Stderr`](crate::Kind::Stderr) frames on the agent's standard output,
/// and when it ends, the guest does.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program and its arguments; a name without a slash is looked up in `PATH`.
    pub argv: Vec<String>,
    /// All of its environment but `PATH`, `HOME` and `HOSTNAME`, which the agent adds where they are missing. Secret.
    pub env: BTreeMap<String, String>,
    /// Working directory, made if need be; empty for `/`.
    pub cwd: String,
    /// `name` or `uid`, optionally `:group` or `:gid`; empty for root. Unknown: [`FailureCode::BadUser`].
    pub user: String,
    /// The number of the signal that asks it to end.
    pub stop_signal: u8,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Program { argv, env, cwd, user, stop_signal } = self;
        let mut shown = f.debug_struct("Program");
        shown.field("argv", argv).field("env", &env.keys()).field("cwd", cwd).field("user", user);
        shown.field("stop_signal", stop_signal).finish()
    }
}

/// Answer to [`Op::Program`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStarted {
    /// Whether it was running already.
    pub already: bool,
}

/// A program for a JavaScript runtime. It sees `result.set(value)` and `result.error(value)`; what they were given comes
/// as JSON of an [`Outcome`] in [`Kind::Result`](crate::Kind::Result) frames before the last frame; no frame, no outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// What runs it.
    pub runtime: Runtime,
    /// The program.
    pub source: Source,
    /// The program's arguments.
    pub args: Vec<String>,
    /// Environment beyond the agent's base and the image's; under Deno the program may read these names and no others.
    pub env: BTreeMap<String, String>,
    /// As [`Exec::image_env`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub image_env: BTreeMap<String, String>,
    /// Further options of the runtime, before the program.
    pub flags: Vec<String>,
    /// Whether the program may use the network, as far as the VM may.
    pub network: bool,
    /// User id to run as.
    pub uid: u32,
    /// Group id to run as.
    pub gid: u32,
    /// After this many milliseconds the whole process group is killed.
    pub timeout_ms: u64,
    /// As [`Exec::stdout_cap`].
    pub stdout_cap: u64,
    /// As [`Exec::stderr_cap`].
    pub stderr_cap: u64,
    /// Bytes of the outcome; a larger one is an error of the program's.
    pub result_cap: u64,
}

/// What runs a [`Script`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    /// Deno, for TypeScript and JavaScript.
    Deno,
    /// Node.js.
    Node,
}

/// Where a [`Script`]'s program is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// In [`Kind::Stdin`](crate::Kind::Stdin) frames, up to [`Kind::StdinEnd`](crate::Kind::StdinEnd). Relative imports
    /// start at `/workspace`.
    Inline,
    /// In this file of the guest, below `/workspace`.
    Path(String),
}

/// What a [`Script`] said of itself. Comes from the guest: nothing in it is to be trusted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// What `result.set` was given last: any JSON value, `null` too.
    #[serde(default, deserialize_with = "some_value", skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    /// What `result.error` was given last, or what was thrown and not caught.
    #[serde(default, deserialize_with = "some_value", skip_serializing_if = "Option::is_none")]
    pub error: Option<serde_json::Value>,
}

/// A field that is there is `Some`, also when it is null.
fn some_value<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<serde_json::Value>, D::Error> {
    serde_json::Value::deserialize(from).map(Some)
}

/// Files to move. All paths are absolute and below `/workspace` once links are followed, else
/// [`FailureCode::Forbidden`]; what is done there is done by `uid` and `gid`, not by root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// What to do.
    pub action: FileAction,
    /// User id to act as.
    pub uid: u32,
    /// Group id to act as.
    pub gid: u32,
    /// After this many milliseconds it is given up with [`FailureCode::TimedOut`].
    pub timeout_ms: u64,
}

/// What to do with files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum FileAction {
    /// Unpack a gzipped tar, which comes in [`Kind::Stdin`](crate::Kind::Stdin) frames up to
    /// [`Kind::StdinEnd`](crate::Kind::StdinEnd), into the folder `dest`, which is made if need be. What breaks a rule
    /// ([`FailureCode::BadArchive`], [`FailureCode::TooLarge`]) or is cut short leaves nothing behind.
    Unpack {
        /// The folder.
        dest: String,
        /// What it may come to.
        limits: UnpackLimits,
    },
    /// Send a file, or a folder with all in it, as a gzipped tar in [`Kind::Stdout`](crate::Kind::Stdout) frames.
    Pack {
        /// The file or folder.
        path: String,
    },
    /// Send the entries of a folder as a JSON list of [`FileEntry`], by name, in [`Kind::Stdout`](crate::Kind::Stdout)
    /// frames; [`FailureCode::TooLarge`] when there are more than `max_entries`.
    List {
        /// The folder.
        path: String,
        /// The most entries.
        max_entries: u64,
    },
    /// Send a regular file's bytes in [`Kind::Stdout`](crate::Kind::Stdout) frames.
    Read {
        /// The file.
        path: String,
    },
    /// Write a regular file, whole or not at all, with the bytes of [`Kind::Stdin`](crate::Kind::Stdin) frames up to
    /// [`Kind::StdinEnd`](crate::Kind::StdinEnd). Folders on the way are made.
    Write {
        /// The file.
        path: String,
        /// The most bytes.
        max_bytes: u64,
    },
}

/// What an archive may come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnpackLimits {
    /// Bytes of all files.
    pub unpacked_bytes: u64,
    /// Files and folders.
    pub entries: u64,
    /// Unpacked bytes for each compressed one, counted once a mebibyte is unpacked.
    pub ratio: u64,
}

/// What is in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileEntry {
    /// Its name; invalid UTF-8 replaced.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Bytes of a file; 0 for everything else.
    pub size: u64,
    /// Permission bits, such as 0o644.
    pub mode: u32,
    /// When it was last changed, milliseconds since the Unix epoch.
    pub modified_ms: i64,
}

/// What a [`FileEntry`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A folder.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, socket or FIFO.
    Other,
}

/// What moving files came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesDone {
    /// Bytes of files, unpacked.
    pub bytes: u64,
    /// Files and folders.
    pub entries: u64,
}

/// What a guest is from now on. The request carries the token that was right until then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// Its identity: token, host name, addresses, resolvers.
    pub boot: Boot,
    /// A new machine id (`/etc/machine-id`), 32 lower-case hexadecimal digits; none leaves it alone.
    pub machine_id: Option<String>,
    /// The time, milliseconds since the Unix epoch.
    pub unix_ms: i64,
    /// Fresh randomness for the kernel's generator, in hexadecimal.
    pub seed: String,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// By the login shell: `bash -lc LINE`, or `sh -lc LINE` where the guest has no bash.
    Shell(String),
    /// Directly; the program is looked up in `PATH`.
    Argv(Vec<String>),
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecDone {
    /// The exit code; 128 + the signal's number when a signal ended it; -1 at the time limit.
    pub exit_code: i32,
    /// Whether the time limit ended it.
    pub timed_out: bool,
    /// Whether standard output was cut at its cap.
    pub stdout_truncated: bool,
    /// Whether standard error was cut at its cap.
    pub stderr_truncated: bool,
    /// From before the fork to the reaped exit, in microseconds of the guest's monotonic clock.
    pub duration_us: u64,
}

/// Why an operation could not be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub code: FailureCode,
    /// One sentence for a person.
    pub message: String,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The token is wrong.
    Unauthorized,
    /// The request can't be read or breaks the protocol.
    BadRequest,
    /// The working directory is missing or no directory.
    BadCwd,
    /// The program is missing or can't be run.
    BadCommand,
    /// The guest knows no such user or group.
    BadUser,
    /// The guest has no room for another process.
    NoRoom,
    /// There is no such file.
    NotFound,
    /// The path leads outside `/workspace`, is of the wrong type, or the user may not.
    Forbidden,
    /// The archive breaks a rule; the message says which, and by what entry.
    BadArchive,
    /// A limit of the request is reached; the message says which.
    TooLarge,
    /// The guest's disk is full.
    NoSpace,
    /// The time limit of a file operation is reached.
    TimedOut,
    /// The agent failed.
    Internal,
}

/// What the agent tells the monitor on standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It is set up and listens.
    Ready {
        /// The agent's version.
        version: String,
    },
    /// Set-up failed; the agent exits after this.
    Failed {
        /// What failed.
        message: String,
    },
    /// The program ended; the guest ends next. What processes that it left print until then comes behind this.
    Exited {
        /// Its exit code, or 128 + the number of the signal that ended it.
        code: i32,
        /// The number of the signal that ended it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_of_a_programs_environment_is_shown() {
        let program = Program {
            argv: vec!["run".into()],
            env: BTreeMap::from([("KEY".into(), "hush".into())]),
            cwd: String::new(),
            user: String::new(),
            stop_signal: 15,
        };
        let shown = format!("{:?}", Request { token: "t".into(), op: Op::Program(program) });
        assert!(shown.contains("KEY") && !shown.contains("hush"), "{shown}");
    }
}
