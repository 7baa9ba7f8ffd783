//! Control groups in the guest: a bound on the processes of all commands together, and one group (a job) for each
//! command, so that what it started can be found and ended whatever session it went to.
//!
//! The groups depend on the kernel:
//!
//! | kernel | bound | jobs |
//! |---|---|---|
//! | Linux, v2 | `pids.max` of `commands` | below `commands` |
//! | Linux, v1 | `pids.max` of `commands` | below `commands` |
//! | gVisor | the same, but not counting groups below, and not exact | in its `job` hierarchy |
//!
//! gVisor asks but one of the groups that a task is in, whichever its map gives first, whether it may start another. A task is in one of
//! each of seven hierarchies, so what is above the bound is refused one time in seven. Who goes on past refusals meets the
//! bound that the host's kernel has for the sandbox, which ends the VM.
//!
//! Only root can reach them: they are mounted below a folder of mode 0700. Making a group costs, so empty ones are kept
//! and used again. A command may join when the bound is reached (or nobody could end what fills the guest), it just
//! can't fork; connections bound how many do.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};

/// Where they are mounted.
const ROOT: &str = "/run/tiffin-agent";

/// Empty jobs to keep.
const KEPT: usize = 8;

/// Jobs with processes left behind to look at, each time that one is given back.
const SWEPT: usize = 4;

/// How long the killed processes of a job may take to vanish.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// The guest's groups.
#[derive(Debug)]
pub struct Jobs {
    layout: Option<Layout>,
    next: AtomicU64,
    empty: Mutex<Vec<Job>>,
    /// Given back while background processes lived in them.
    left: Mutex<VecDeque<Job>>,
}

#[derive(Debug)]
struct Layout {
    /// Where jobs are made.
    parent: PathBuf,
    /// The bound's `cgroup.procs`, where joining a job doesn't count by itself.
    bound: Option<File>,
}

/// One command's group.
#[derive(Debug)]
pub struct Job {
    folder: PathBuf,
    procs: File,
}

impl Jobs {
    /// Mounts the groups and bounds all commands together to `max_pids` processes and threads.
    ///
    /// # Errors
    /// When the guest's kernel has no such groups, or they don't hold.
    pub fn mount(max_pids: u32) -> io::Result<Self> {
        make_private(Path::new(ROOT))?;
        let pids = Path::new(ROOT).join("pids");
        make_private(&pids)?;
        let unified = mount_unified(&pids).is_ok();
        if !unified {
            mount_group("cgroup", &pids, Some("pids"))?;
        }
        let commands = pids.join("commands");
        make_private(&commands)?;
        fs::write(commands.join("pids.max"), max_pids.to_string())?;
        let jobs = Path::new(ROOT).join("jobs");
        make_private(&jobs)?;
        let layout = if !unified && mount_group("cgroup", &jobs, Some("job")).is_ok() {
            Layout { parent: jobs, bound: Some(open_procs(&commands)?) }
        } else {
            Layout { parent: commands, bound: None }
        };
        let jobs = Jobs { layout: Some(layout), ..Jobs::absent() };
        if let Some(job) = jobs.take()? {
            jobs.give_back(job);
        }
        Ok(jobs)
    }

    /// No groups: commands are found by session and descent.
    pub fn absent() -> Self {
        Jobs { layout: None, next: AtomicU64::new(0), empty: Mutex::default(), left: Mutex::default() }
    }

    /// An empty job; none where the guest has no groups.
    ///
    /// # Errors
    /// When no further group can be made.
    pub fn take(&self) -> io::Result<Option<Job>> {
        let Some(layout) = &self.layout else { return Ok(None) };
        if let Some(job) = lock(&self.empty).pop() {
            return Ok(Some(job));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let folder = layout.parent.join(format!("job{number}"));
        make_private(&folder)?;
        let procs = open_procs(&folder)?;
        Ok(Some(Job { folder, procs }))
    }

    /// Gives `job` back for another command, now or when its last process has ended.
    pub fn give_back(&self, job: Job) {
        let mut candidates = vec![job];
        {
            let mut left = lock(&self.left);
            let looked_at = left.len().min(SWEPT);
            candidates.extend(left.drain(..looked_at));
        }
        for job in candidates {
            if !job.pids().is_empty() {
                lock(&self.left).push_back(job);
                continue;
            }
            let mut empty = lock(&self.empty);
            if empty.len() < KEPT {
                empty.push(job);
            } else {
                let _ = fs::remove_dir(&job.folder);
            }
        }
    }

    /// The descriptors that a process must write `0` to in order to join `job`.
    pub fn entries(&self, job: Option<&Job>) -> [Option<RawFd>; 2] {
        let bound = self.layout.as_ref().and_then(|layout| layout.bound.as_ref());
        [bound.map(AsRawFd::as_raw_fd), job.map(|job| job.procs.as_raw_fd())]
    }
}

impl Job {
    /// Ends every process in it; false when some could not be ended.
    pub fn end(&self) -> bool {
        crate::processes::end_all(|| self.pids(), KILL_LIMIT)
    }

    fn pids(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }
}

fn open_procs(group: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(group.join("cgroup.procs"))
}

fn mount_group(kind: &str, at: &Path, data: Option<&str>) -> nix::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tiffin"), at, Some(kind), flags, data)
}

/// Mounts the v2 hierarchy, and takes it away again when it can't bound processes.
fn mount_unified(at: &Path) -> io::Result<()> {
    mount_group("cgroup2", at, None)?;
    fs::write(at.join("cgroup.subtree_control"), "+pids").inspect_err(|_| {
        let _ = umount(at);
    })
}

/// Makes a folder that only root can enter. One that is there already (from an earlier run, or planted in the image) is
/// taken over; anything else in its place is an error.
pub(crate) fn make_private(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if !fs::symlink_metadata(folder)?.is_dir() {
                return Err(error);
            }
            lchown(folder, Some(0), Some(0))?;
            fs::set_permissions(folder, Permissions::from_mode(0o700))
        }
        made => made,
    }
}

/// A poisoned lock would mean a panic, which ends the agent anyway.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
