//! What can be seen of VMs on the host: processes and their memory, and traces that a deleted VM may have left.
//!
//! It only reads `/proc` and `/sys`, and it sees what this process may see: run as root.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tiffin_types::id::VmId;

const POLL: Duration = Duration::from_millis(100);
/// Folders of control groups that are looked at, so that a strange tree can't hold the bench up.
const CGROUPS_MAX: usize = 20_000;

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    args: Vec<String>,
}

/// A process's memory, in MB (10^6 bytes).
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    pub(super) rss_mb: f64,
    pub(super) pss_mb: f64,
}

impl Process {
    /// Whether it is this program with that subcommand.
    pub(super) fn is_tiffin(&self, subcommand: &str) -> bool {
        let program = self.args.first().map(|path| path.rsplit('/').next().unwrap_or(path));
        program.is_some_and(|name| name.starts_with("tiffin"))
            && self.args.get(1).is_some_and(|word| word == subcommand)
    }

    /// Whether it is one of gVisor's.
    pub(super) fn is_runsc(&self) -> bool {
        self.args.first().is_some_and(|path| path.rsplit('/').next().unwrap_or(path).starts_with("runsc"))
    }

    /// Whether it is QEMU.
    pub(super) fn is_qemu(&self) -> bool {
        self.args.first().is_some_and(|path| path.rsplit('/').next().unwrap_or(path).starts_with("qemu-system"))
    }
}

/// Every process that can be seen now.
pub(super) fn processes() -> Vec<Process> {
    let pids = entries(Path::new("/proc")).filter_map(|name| name.parse().ok());
    pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let args = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        Some(Process { pid, args })
    })
    .collect()
}

/// The monitor of a VM, which holds its namespaces, and the VM's folder.
pub(super) fn monitor_of(id: &VmId) -> Option<(i32, PathBuf)> {
    processes().into_iter().filter(|process| process.is_tiffin("monitor")).find_map(|process| {
        let folder = Path::new(process.args.get(2)?);
        folder.ends_with(id.as_str()).then(|| (process.pid, folder.to_owned()))
    })
}

/// A process's memory; `None` when it is gone or not ours to see.
pub(super) fn memory(pid: i32) -> Option<Memory> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let mb = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<f64>().ok()? * 1024.0 / 1e6)
    };
    Some(Memory { rss_mb: mb("Rss:")?, pss_mb: mb("Pss:")? })
}

/// The process that listens on a TCP port of this host.
pub(super) fn listener(port: u16) -> Option<i32> {
    let sockets: BTreeSet<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .flat_map(|file| listening(&fs::read_to_string(file).unwrap_or_default(), port))
        .collect();
    processes().into_iter().map(|process| process.pid).find(|pid| {
        let folder = format!("/proc/{pid}/fd");
        entries(Path::new(&folder)).any(|fd| {
            fs::read_link(format!("{folder}/{fd}")).is_ok_and(|target| sockets.contains(&*target.to_string_lossy()))
        })
    })
}

/// The sockets (`socket:[inode]`) that listen on `port` in a table of `/proc/net/tcp`'s form.
fn listening(table: &str, port: u16) -> Vec<String> {
    let on_port = format!(":{port:04X}");
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.len() > 9 && row[1].ends_with(&on_port) && row[3] == "0A")
        .map(|row| format!("socket:[{}]", row[9]))
        .collect()
}

/// How many files a process has open; `None` when it is gone or not ours to see.
pub(super) fn open_files(pid: i32) -> Option<usize> {
    fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count)
}

/// How many network namespaces have a process in them or a name.
pub(super) fn network_namespaces() -> usize {
    let of_processes: BTreeSet<_> =
        processes().iter().filter_map(|process| fs::read_link(format!("/proc/{}/ns/net", process.pid)).ok()).collect();
    of_processes.len() + entries(Path::new("/run/netns")).count()
}

/// Waits until no trace of the VMs is left; the traces that are left at the limit.
pub(super) async fn wait_until_clean(ids: &[VmId], limit: Duration) -> Vec<String> {
    let deadline = Instant::now() + limit;
    loop {
        let left = traces_of(ids);
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether a process carries the name of one of the VMs, or is in its control groups.
pub(super) fn is_of(process: &Process, ids: &[VmId]) -> bool {
    let names = |text: &str| ids.iter().any(|id| text.contains(id.hex()));
    let group = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
    process.args.iter().any(|word| names(word)) || names(&group)
}

/// Everything on the host that carries the name of one of the VMs.
fn traces_of(ids: &[VmId]) -> Vec<String> {
    if ids.is_empty() {
        return Vec::new();
    }
    let names = |text: &str| ids.iter().any(|id| text.contains(id.hex()));
    let mut found = Vec::new();
    for process in processes() {
        if is_of(&process, ids) {
            found.push(format!("process {} ({})", process.pid, process.args.join(" ")));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter(|line| names(line)).filter_map(|line| line.split(' ').nth(4));
    found.extend(points.map(|point| format!("mount {point}")));
    for device in entries(Path::new("/sys/block")) {
        let file = fs::read_to_string(format!("/sys/block/{device}/loop/backing_file")).unwrap_or_default();
        if names(&file) {
            found.push(format!("loop device {device}"));
        }
    }
    let links = entries(Path::new("/sys/class/net")).chain(entries(Path::new("/run/netns")));
    found.extend(links.filter(|link| names(link)).map(|link| format!("network {link}")));
    found.extend(control_groups(names));
    found
}

/// Control groups whose name `matches`.
fn control_groups(matches: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new("/sys/fs/cgroup").to_path_buf()];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        seen += 1;
        if seen > CGROUPS_MAX {
            break;
        }
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            // A link (`cpu` beside `cpu,cpuacct`) would be walked twice.
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if matches(&entry.file_name().to_string_lossy()) {
                found.push(format!("control group {}", entry.path().display()));
            } else {
                folders.push(entry.path());
            }
        }
    }
    found
}

/// The names in a folder; none where it can't be read.
fn entries(folder: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn this_process_is_seen_with_its_memory_and_its_port() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(processes().iter().any(|process| process.pid == own));
        let memory = memory(own).unwrap();
        assert!(memory.rss_mb > 0.5 && memory.pss_mb <= memory.rss_mb, "{memory:?}");
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(listener(socket.local_addr().unwrap().port()), Some(own));
    }

    #[test]
    fn a_command_line_tells_the_monitor_from_the_server() {
        let process = |args: &[&str]| Process { pid: 1, args: args.iter().map(|word| (*word).to_owned()).collect() };
        assert!(process(&["/usr/local/bin/tiffin", "monitor", "x"]).is_tiffin("monitor"));
        assert!(!process(&["tiffin", "serve"]).is_tiffin("monitor"));
        assert!(!process(&["grep", "monitor"]).is_tiffin("monitor"));
        assert!(process(&["runsc-sandbox", "--root=x"]).is_runsc() && !process(&[""]).is_runsc());
    }

    #[tokio::test]
    async fn a_process_that_carries_a_vms_name_is_a_trace_of_it_until_it_ends() {
        let (id, other) = (VmId::random(), VmId::random());
        let mut child = std::process::Command::new("sh")
            .args(["-c", "echo; read x", id.hex()])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // `spawn` returns while the kernel still lays out the new arguments: /proc shows none until then.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let traces = traces_of(std::slice::from_ref(&id));
        assert_eq!(traces.len(), 1, "{traces:?}");
        assert!(traces[0].starts_with(&format!("process {}", child.id())));
        assert!(traces_of(&[other]).is_empty() && traces_of(&[]).is_empty());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(wait_until_clean(&[id], Duration::from_secs(5)).await.is_empty());
    }
}
