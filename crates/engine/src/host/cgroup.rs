//! Control groups: the limits that hold a VM, on hosts with cgroup v2 and with v1 (hybrid ones too).
//!
//! A VM's group is `tiffin/HEX` under each controller's root (v1) or under the one tree (v2), HEX being the digits of
//! its id. A process joins before it becomes the engine, so that nothing of the engine ever runs outside.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::SystemTime,
};

use tiffin_types::{id::VmId, limits, vm::VmSize};

/// The folder that holds all of the platform's groups.
const PARENT: &str = "tiffin";

/// What the engine itself (not the guest) may take beside the VM's memory, in MiB: gVisor's kernel and file server use
/// 25 to 35.
pub const ENGINE_MEM_MB: u64 = 64;

/// Threads and processes on the host for one VM. Under gVisor each guest process costs about two; the engine some.
const HOST_PIDS: u32 = limits::GUEST_PIDS * 3 + 512;

/// A CPU quota's period, in microseconds (the kernel's default).
const CPU_PERIOD_US: u64 = 100_000;

const V1_CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// Which hierarchy this host has.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hierarchy {
    /// One folder per controller, in the order of `V1_CONTROLLERS`.
    V1([PathBuf; 3]),
    /// One tree.
    V2(PathBuf),
}

/// The host's control groups.
#[derive(Debug, Clone)]
pub struct Cgroups {
    hierarchy: Hierarchy,
}

/// One VM's group.
#[derive(Debug, Clone)]
pub struct Group {
    hierarchy: Hierarchy,
    name: String,
}

impl Cgroups {
    /// Finds the host's hierarchy: v2 when its tree has the controllers, else v1.
    ///
    /// # Errors
    /// When neither has `cpu`, `memory` and `pids`.
    pub fn detect() -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        Self::from_mounts(&mounts, |path| fs::read_to_string(path).unwrap_or_default())
    }

    fn from_mounts(mounts: &str, read: impl Fn(&Path) -> String) -> io::Result<Self> {
        let mut v1: [Option<PathBuf>; 3] = [None, None, None];
        for line in mounts.lines() {
            let mut fields = line.split(' ');
            let (Some(_), Some(path), Some(kind), Some(options)) =
                (fields.next(), fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let path = PathBuf::from(path);
            if kind == "cgroup2" {
                let controllers = read(&path.join("cgroup.controllers"));
                let has = |name: &str| controllers.split_whitespace().any(|one| one == name);
                if V1_CONTROLLERS.iter().all(|name| has(name)) {
                    return Ok(Self { hierarchy: Hierarchy::V2(path) });
                }
            } else if kind == "cgroup" {
                for (slot, name) in v1.iter_mut().zip(V1_CONTROLLERS) {
                    if options.split(',').any(|option| option == name) {
                        *slot = Some(path.clone());
                    }
                }
            }
        }
        match v1 {
            [Some(memory), Some(cpu), Some(pids)] => Ok(Self { hierarchy: Hierarchy::V1([memory, cpu, pids]) }),
            _ => Err(io::Error::other("no control groups with the cpu, memory and pids controllers")),
        }
    }

    /// `v1` or `v2`.
    pub fn version(&self) -> &'static str {
        match self.hierarchy {
            Hierarchy::V1(_) => "v1",
            Hierarchy::V2(_) => "v2",
        }
    }

    /// The VM's group, whether or not it exists.
    pub fn group(&self, id: &VmId) -> Group {
        Group { hierarchy: self.hierarchy.clone(), name: id.hex().to_owned() }
    }

    /// The ids of all VMs that have a group.
    pub fn all(&self) -> Vec<VmId> {
        let mut ids: Vec<VmId> = self
            .roots()
            .iter()
            .filter_map(|root| fs::read_dir(root.join(PARENT)).ok())
            .flatten()
            .filter_map(|entry| format!("vm-{}", entry.ok()?.file_name().to_str()?).parse().ok())
            .collect();
        ids.sort();
        ids.dedup();
        ids
    }

    /// Removes the platform's own folder, once no group is left in it.
    pub fn remove_parent(&self) {
        for root in self.roots() {
            let _ = fs::remove_dir(root.join(PARENT));
        }
    }

    fn roots(&self) -> Vec<PathBuf> {
        roots(&self.hierarchy)
    }
}

fn roots(hierarchy: &Hierarchy) -> Vec<PathBuf> {
    match hierarchy {
        Hierarchy::V1(roots) => roots.to_vec(),
        Hierarchy::V2(root) => vec![root.clone()],
    }
}

impl Group {
    /// Makes the group with the limits of a VM of `size`, and `engine_mb` MiB for the engine itself.
    ///
    /// # Errors
    /// When the kernel refuses a folder or a limit, naming it.
    pub fn create(&self, size: VmSize, engine_mb: u64) -> io::Result<()> {
        let mem_bytes = (u64::from(size.mem_mb) + engine_mb) << 20;
        let quota = u64::from(size.cpus) * CPU_PERIOD_US;
        match &self.hierarchy {
            Hierarchy::V1(_) => {
                for dir in self.dirs() {
                    fs::create_dir_all(&dir).map_err(|error| named(&dir, &error))?;
                }
                let [memory, cpu, pids] = &self.dirs()[..] else { unreachable!("three controllers") };
                set(memory, "memory.limit_in_bytes", mem_bytes)?;
                // Swap accounting may be compiled out; then there is no such file, and no limit on swap to set.
                if memory.join("memory.memsw.limit_in_bytes").exists() {
                    set(memory, "memory.memsw.limit_in_bytes", mem_bytes)?;
                }
                set(cpu, "cpu.cfs_period_us", CPU_PERIOD_US)?;
                set(cpu, "cpu.cfs_quota_us", quota)?;
                set(pids, "pids.max", HOST_PIDS)
            }
            Hierarchy::V2(root) => {
                let parent = root.join(PARENT);
                fs::create_dir_all(&parent).map_err(|error| named(&parent, &error))?;
                for dir in [root, &parent] {
                    set(dir, "cgroup.subtree_control", "+cpu +memory +pids")?;
                }
                let dir = parent.join(&self.name);
                fs::create_dir_all(&dir).map_err(|error| named(&dir, &error))?;
                set(&dir, "memory.max", mem_bytes)?;
                if dir.join("memory.swap.max").exists() {
                    set(&dir, "memory.swap.max", 0)?;
                }
                set(&dir, "memory.oom.group", 1)?;
                set(&dir, "cpu.max", format!("{quota} {CPU_PERIOD_US}"))?;
                set(&dir, "pids.max", HOST_PIDS)
            }
        }
    }

    /// Opens what a process writes itself into to join. Opened before a fork, written after it.
    ///
    /// # Errors
    /// When the group doesn't exist.
    pub fn door(&self) -> io::Result<Door> {
        let open = |dir: &PathBuf| {
            let path = dir.join("cgroup.procs");
            OpenOptions::new().write(true).open(&path).map_err(|error| named(&path, &error))
        };
        Ok(Door { files: self.dirs().iter().map(open).collect::<io::Result<_>>()? })
    }

    /// When the group was made; `None` when it isn't there.
    pub fn created(&self) -> Option<SystemTime> {
        self.dirs().iter().find_map(|dir| fs::metadata(dir).ok()?.modified().ok())
    }

    /// How many processes of the group the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let (dir, file) = match &self.hierarchy {
            Hierarchy::V1(_) => (&self.dirs()[0], "memory.oom_control"),
            Hierarchy::V2(_) => (&self.dirs()[0], "memory.events"),
        };
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Kills every process in the group.
    pub fn kill(&self) {
        for dir in self.dirs() {
            let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            for pid in procs.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 1) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
        }
    }

    /// Removes the group; absent is fine.
    ///
    /// # Errors
    /// When a process is still in it.
    pub fn remove(&self) -> io::Result<()> {
        for dir in self.dirs() {
            match fs::remove_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(&dir, &error)),
                _ => {}
            }
        }
        Ok(())
    }

    fn dirs(&self) -> Vec<PathBuf> {
        roots(&self.hierarchy).into_iter().map(|root| root.join(PARENT).join(&self.name)).collect()
    }
}

/// The way into a group.
#[derive(Debug)]
pub struct Door {
    files: Vec<File>,
}

impl Door {
    /// Puts the calling process into the group. Only writes to open files, so it may be called between fork and exec.
    ///
    /// # Errors
    /// The kernel's.
    pub fn enter(&self) -> io::Result<()> {
        for file in &self.files {
            // SAFETY: write(2) on an open descriptor with a static buffer of the length given; it is
            // async-signal-safe, which File's own write isn't promised to be.
            let written = unsafe { libc::write(file.as_raw_fd(), b"0".as_ptr().cast(), 1) };
            if written != 1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

fn set(dir: &Path, file: &str, value: impl std::fmt::Display) -> io::Result<()> {
    let path = dir.join(file);
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(value.to_string().as_bytes()))
        .map_err(|error| named(&path, &error))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
        cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
        cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[test]
    fn a_v2_tree_without_controllers_is_passed_over_for_v1() {
        let found = Cgroups::from_mounts(V1, |_| "hugetlb".into()).unwrap();
        assert_eq!(found.version(), "v1");
        assert_eq!(found.roots()[0], Path::new("/sys/fs/cgroup/memory"));
    }

    #[test]
    fn a_v2_tree_with_controllers_is_taken() {
        let mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        let found = Cgroups::from_mounts(mounts, |_| "cpuset cpu io memory pids".into()).unwrap();
        assert_eq!(found.version(), "v2");
    }

    #[test]
    fn no_controllers_is_an_error() {
        assert!(Cgroups::from_mounts("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", |_| String::new()).is_err());
    }

    #[test]
    fn a_group_of_this_host_comes_and_goes() {
        let id = VmId::random();
        let group = Cgroups::detect().unwrap().group(&id);
        group.create(VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 }, ENGINE_MEM_MB).unwrap();
        assert!(Cgroups::detect().unwrap().all().contains(&id));
        assert_eq!(group.oom_kills(), 0);
        group.door().unwrap();
        group.remove().unwrap();
        group.remove().unwrap();
        assert!(!Cgroups::detect().unwrap().all().contains(&id));
    }
}
