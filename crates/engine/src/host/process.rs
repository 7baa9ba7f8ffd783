//! Processes of the host: running a tool with a deadline, and naming a process so that a recycled pid is never meant.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{SysconfVar, sysconf},
};
use serde::{Deserialize, Serialize};

/// The longest that a host tool (`ip`, `nft`, `mke2fs`) may take before it is killed.
const TOOL_TIMEOUT: Duration = Duration::from_secs(20);

/// A process, by its pid and the moment of its start: a pid alone may name another one tomorrow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid in the host's namespace.
    pub pid: i32,
    /// Its start in clock ticks since the host's boot, field 22 of `/proc/PID/stat` (proc(5)).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has `pid` now; `None` when there is none.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self { pid, start_ticks: start_ticks(&stat)? })
    }

    /// Whether the very same process still exists and is no zombie.
    pub fn is_alive(self) -> bool {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)) else { return false };
        start_ticks(&stat) == Some(self.start_ticks) && !matches!(state(&stat), Some("Z" | "X"))
    }

    /// Kills the very same process, if it still exists.
    pub fn kill(self) {
        if self.is_alive() {
            // A failure means that it ended in between, which is what was wanted.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// The fields of `/proc/PID/stat` that follow the command's name, which may itself hold spaces and parentheses.
fn after_name(stat: &str) -> Option<&str> {
    stat.rsplit_once(") ").map(|(_, rest)| rest)
}

fn state(stat: &str) -> Option<&str> {
    after_name(stat)?.split(' ').next()
}

fn start_ticks(stat: &str) -> Option<u64> {
    after_name(stat)?.split(' ').nth(19)?.parse().ok()
}

/// The processor time that a process has taken, without its children's; `None` when it is gone.
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks = sysconf(SysconfVar::CLK_TCK).ok()??;
    let ticks_a_second = u64::try_from(ticks).ok()?.max(1);
    Some(Duration::from_millis(cpu_ticks(&stat)?.saturating_mul(1000) / ticks_a_second))
}

/// Fields 14 and 15 of `/proc/PID/stat` (proc(5)): in the process and in the kernel for it.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = after_name(stat)?.split(' ').skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    next()?.checked_add(next()?)
}

/// The id of the host's present boot (random, made by the kernel): tells a restart of the host.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A host tool failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started.
    #[error("{tool} could not be started")]
    Start {
        /// The tool.
        tool: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("{tool} failed ({status}): {stderr}")]
    Failed {
        /// The tool.
        tool: String,
        /// Its exit status.
        status: String,
        /// The beginning of what it wrote to standard error.
        stderr: String,
    },
    /// It took too long and was killed.
    #[error("{tool} took longer than {} s", within.as_secs())]
    TimedOut {
        /// The tool.
        tool: String,
        /// How long it had.
        within: Duration,
    },
}

/// Runs a host tool to its end with `input` on its standard input, and gives what it wrote to standard output.
///
/// # Errors
/// [`ToolError`], with what the tool said.
pub fn run(command: Command, input: &str) -> Result<String, ToolError> {
    run_within(command, input, TOOL_TIMEOUT)
}

/// As [`run`], for a tool that may take longer than others.
///
/// # Errors
/// [`ToolError`], with what the tool said.
pub fn run_within(mut command: Command, input: &str, within: Duration) -> Result<String, ToolError> {
    let tool = Path::new(command.get_program())
        .file_name()
        .map_or_else(|| "tool".into(), |name| name.to_string_lossy().into_owned());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|source| ToolError::Start { tool: tool.clone(), source })?;
    let mut stdin = child.stdin.take();
    let input = input.to_owned();
    // The tool may say no before it has read everything; its status tells, so a broken pipe here is no error.
    let writer = std::thread::spawn(move || stdin.as_mut().map(|pipe| pipe.write_all(input.as_bytes())));
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = wait_or_kill(&mut child, Instant::now() + within)
        .map_err(|source| ToolError::Start { tool: tool.clone(), source })?
        .ok_or_else(|| ToolError::TimedOut { tool: tool.clone(), within })?;
    let _ = writer.join();
    let stderr = stderr.join().unwrap_or_default();
    if !status.success() {
        let stderr = stderr.trim().chars().take(500).collect();
        return Err(ToolError::Failed { tool, status: status.to_string(), stderr });
    }
    Ok(stdout.join().unwrap_or_default())
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            let _ = pipe.take(4 * 1024 * 1024).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits for a child's end, and kills it at the deadline (`None`).
fn wait_or_kill(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    let ended = wait_until(child, deadline)?;
    if ended.is_none() {
        child.kill()?;
        child.wait()?;
    }
    Ok(ended)
}

/// Waits for a child's end; `None` when it hasn't come by the deadline.
///
/// # Errors
/// The kernel's.
pub fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    let process = open_process(child.id())?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        // It is readable once the process has ended. What is rounded down is looked at once more.
        let timeout = PollTimeout::try_from(left.max(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A descriptor of a child that hasn't been waited for.
fn open_process(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) gives a new descriptor that nobody else owns, or -1, which is checked.
    unsafe {
        match libc::syscall(libc::SYS_pidfd_open, pid, 0) {
            fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_another_start_time_is_another_process() {
        let me = ProcessId::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.is_alive());
        assert!(!ProcessId { start_ticks: me.start_ticks + 1, ..me }.is_alive());
    }

    #[test]
    fn a_name_with_parentheses_and_spaces_hides_nothing() {
        let stat = "7 (a) S 9 (b) R 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(state(stat), Some("R"));
        assert_eq!(start_ticks(stat), Some(4242));
        assert_eq!(cpu_ticks(stat), Some(11 + 12));
    }

    #[test]
    fn a_killed_child_is_not_alive() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        id.kill();
        child.wait().unwrap();
        assert!(!id.is_alive());
    }

    #[test]
    fn a_tools_words_are_in_its_error() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat >&2; exit 3"]);
        let error = run(command, "no such thing").unwrap_err().to_string();
        assert!(error.contains("no such thing") && error.contains('3'), "{error}");
    }
}
