//! What the frames say, as JSON.

use std::collections::BTreeMap;

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
    /// End every process in the guest (SIGTERM, then SIGKILL after the grace), sync, and exit; answers `{}` first.
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
    /// Environment beyond the agent's base (`PATH`, `HOME`, `USER`, `LANG`, ...); overrides it.
    pub env: BTreeMap<String, String>,
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
    /// The guest has no room for another process.
    NoRoom,
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
}
