//! The guest's processes as `/proc` shows them, and ending many of them for sure.
//!
//! Never signals process 1, the agent itself.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::init;

/// Rounds of stopping before killing: each catches what was forked during the one before.
const STOP_ROUNDS: usize = 16;

/// On a bare kernel the parent of its threads.
const KERNEL_THREADS: i32 = 2;

/// How often to look whether the killed are gone.
const STEP: Duration = Duration::from_millis(1);

/// Ends every process that `list` gives, until it gives none; false when some are left after `limit`. First stops them
/// all, so that nothing forks faster than it is killed.
pub fn end_all(list: impl Fn() -> Vec<i32>, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut stopped = BTreeSet::new();
    for _ in 0..STOP_ROUNDS {
        let fresh: Vec<i32> = list().into_iter().filter(|pid| stopped.insert(*pid)).collect();
        if fresh.is_empty() {
            break;
        }
        signal(&fresh, Signal::SIGSTOP);
    }
    loop {
        let left = list();
        if left.is_empty() {
            return true;
        }
        signal(&left, Signal::SIGKILL);
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(STEP);
    }
}

fn signal(pids: &[i32], signal: Signal) {
    for pid in pids.iter().filter(|pid| **pid > 1) {
        // One that is gone already is what was wanted.
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}

/// Every process but the agent.
pub fn all() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|pid| *pid > 1).collect()
}

/// How many there are but the agent and those of `hidden`, the kernel's own threads aside.
pub fn count(hidden: &[i32]) -> usize {
    let is_kernels = |pid: i32| {
        let has_its_parent = || Process::read(pid).is_some_and(|one| one.parent == KERNEL_THREADS);
        init::is_bare() && (pid == KERNEL_THREADS || has_its_parent())
    };
    all().into_iter().filter(|pid| !hidden.contains(pid) && !is_kernels(*pid)).count()
}

/// Processes of the session that `root` leads, and their descendants. Misses what left the session and lost its parent.
pub fn session(root: i32) -> Vec<i32> {
    let processes: Vec<Process> =
        all().into_iter().filter_map(Process::read).filter(|process| !process.ended).collect();
    let mut found = BTreeSet::from([root]);
    loop {
        let before = found.len();
        for process in &processes {
            if process.session == root || found.contains(&process.parent) {
                found.insert(process.pid);
            }
        }
        if found.len() == before {
            break;
        }
    }
    processes.iter().map(|process| process.pid).filter(|pid| found.contains(pid)).collect()
}

/// Processes of the session that `root` leads, and no others.
pub fn members(root: i32) -> Vec<i32> {
    let processes = all().into_iter().filter_map(Process::read);
    processes.filter(|process| process.session == root && !process.ended).map(|process| process.pid).collect()
}

#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    session: i32,
    /// A zombie or dead.
    ended: bool,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        Self::parse(pid, &stat)
    }

    /// The name, between the first and the last parenthesis, is the process's own choice and may hold anything.
    fn parse(pid: i32, stat: &[u8]) -> Option<Self> {
        let after_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
        let text = std::str::from_utf8(&stat[after_name..]).ok()?;
        let mut fields = text.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        Some(Process { pid, parent, session, ended: matches!(state, "Z" | "X") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let process = Process::parse(7, b"7 (a) Z 9 (b) S 3 5 6 0 -1").unwrap();
        assert_eq!(process, Process { pid: 7, parent: 3, session: 6, ended: false });
    }

    proptest! {
        #[test]
        fn any_stat_is_read_or_passed_over(stat in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Process::parse(1, &stat).is_none_or(|process| process.pid == 1));
        }
    }
}
