//! Running the programs that images are made with: bounded in time and in what is kept of their output.
//!
//! Invariant: when [`run`] returns, or its process is killed, the program is gone too.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    time::{Duration, Instant},
};

use nix::sys::{
    prctl,
    signal::{Signal, killpg},
    stat::{Mode, umask},
};

/// Lines of stderr kept for the error.
const ERROR_LINES: usize = 20;
/// Bytes of a line kept.
const LINE_BYTES: u64 = 4096;
/// Bytes of stdout kept.
const OUTPUT_BYTES: u64 = 4 << 20;

/// A program that an image is made with failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started.
    #[error("can't run {program} (is it installed?)")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended badly.
    #[error("{program} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        program: String,
        /// Its exit status.
        status: ExitStatus,
        /// The end of its stderr.
        stderr: String,
    },
    /// It took too long and was killed.
    #[error("{program} was stopped after {} s: {stderr}", .limit.as_secs())]
    TooSlow {
        /// The program.
        program: String,
        /// The limit.
        limit: Duration,
        /// The end of its stderr.
        stderr: String,
    },
}

enum Output {
    Stderr(String),
    Stdout(Vec<u8>),
}

/// Runs a command to its end, handing each line of its stderr to `on_line`, and returns its stdout (at most 4 MiB).
pub(crate) fn run(mut command: Command, limit: Duration, on_line: &mut dyn FnMut(&str)) -> Result<Vec<u8>, ToolError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let deadline = Instant::now() + limit;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let in_child = || {
        // What is made must not depend on who makes it.
        umask(Mode::from_bits_truncate(0o022));
        prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into)
    };
    // SAFETY: between fork and exec the closure only calls umask and prctl, which are async-signal-safe; it allocates
    // nothing.
    unsafe { command.pre_exec(in_child) };
    let mut child = command.spawn().map_err(|source| ToolError::Start { program: program.clone(), source })?;

    let output = readers(&mut child);
    let mut last = VecDeque::with_capacity(ERROR_LINES);
    let mut stdout = Vec::new();
    let status = loop {
        match output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Output::Stdout(bytes)) => stdout = bytes,
            Ok(Output::Stderr(line)) => {
                on_line(&line);
                if last.len() == ERROR_LINES {
                    last.pop_front();
                }
                last.push_back(line);
            }
            Err(RecvTimeoutError::Disconnected) => break wait_until(&mut child, deadline),
            Err(RecvTimeoutError::Timeout) => break None,
        }
    };
    let stderr = Vec::from(last).join("\n");
    match status {
        Some(status) if status.success() => Ok(stdout),
        Some(status) => Err(ToolError::Failed { program, status, stderr }),
        None => {
            kill(&mut child);
            Err(ToolError::TooSlow { program, limit, stderr })
        }
    }
}

/// Reads both pipes on threads of their own; the channel closes when both have ended.
fn readers(child: &mut Child) -> Receiver<Output> {
    let (sender, receiver) = mpsc::sync_channel(64);
    if let Some(stderr) = child.stderr.take() {
        let sender = sender.clone();
        std::thread::spawn(move || read_lines(stderr, &sender));
    }
    if let Some(mut stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = (&mut stdout).take(OUTPUT_BYTES).read_to_end(&mut bytes);
            // The rest is read too, so that the program isn't stopped by a full pipe.
            let drained = read.and_then(|_| std::io::copy(&mut stdout, &mut std::io::sink()));
            // An unreadable pipe shows as missing output; the exit status tells the rest.
            drop(drained);
            let _ = sender.send(Output::Stdout(bytes));
        });
    }
    receiver
}

fn read_lines(stderr: impl Read, sender: &SyncSender<Output>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if !text.is_empty() && sender.send(Output::Stderr(text)).is_err() {
            return;
        }
    }
}

fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => return None,
        }
    }
}

fn kill(child: &mut Child) {
    // The group's id is the child's, and the child has not been waited for, so the id can't have been reused.
    let group = nix::unistd::Pid::from_raw(child.id().cast_signed());
    // Both fail only when there is nothing left to end.
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failing_program_is_reported_with_its_last_words() {
        let error =
            run(shell("echo first >&2; echo why >&2; exit 3"), Duration::from_secs(10), &mut |_| {}).unwrap_err();
        let ToolError::Failed { stderr, status, .. } = error else { panic!("{error}") };
        assert_eq!(stderr, "first\nwhy");
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_its_children() {
        let started = Instant::now();
        let error = run(shell("sleep 60 & sleep 60"), Duration::from_millis(200), &mut |_| {}).unwrap_err();
        assert!(matches!(error, ToolError::TooSlow { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn output_beyond_the_bound_is_dropped_and_does_not_block() {
        let stdout = run(shell("head -c 9000000 /dev/zero"), Duration::from_secs(20), &mut |_| {}).unwrap();
        assert_eq!(stdout.len() as u64, OUTPUT_BYTES);
    }

    #[test]
    fn what_a_program_makes_has_the_same_mode_whoever_runs_it() {
        assert_eq!(run(shell("umask"), Duration::from_secs(10), &mut |_| {}).unwrap(), b"0022\n");
    }

    #[test]
    fn a_missing_program_says_so() {
        let error = run(Command::new("/nonexistent/tool"), Duration::from_secs(1), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/tool"), "{error}");
    }
}
