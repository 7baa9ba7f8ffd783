//! What the gVisor engine promises beyond the conformance suite: limits that hold, faults that leave nothing behind.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;

use std::{path::Path, time::Duration};

use harness::{Host, exec, monitor_pid, sh, shell};
use tiffin_engine::{Ended, Engine, EngineError, LogKind, Observed, agent::ExecItem, host::cgroup::Cgroups};
use tiffin_types::{
    id::VmId,
    vm::{EndReason, VmSize, VmSpec},
};

const GRACE: Duration = Duration::from_secs(3);

async fn next_end(host: &Host) -> Ended {
    tokio::time::timeout(Duration::from_secs(30), host.engine.next_end()).await.expect("an end is told")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_is_what_was_asked_for() {
    let host = Host::new().await;
    let id = host.running().await;
    let output = sh(&*host.engine, &id, "id; nproc; hostname; pwd; head -1 /proc/meminfo; cat /etc/resolv.conf").await;
    assert_eq!(output.done.exit_code, 0, "{output:?}");
    for expected in ["uid=1000", "gid=1000", "groups=1000", "\n1\n", id.as_str(), "/workspace", "262144 kB"] {
        assert!(output.stdout.contains(expected), "{expected}: {output:?}");
    }
    assert!(!output.stdout.contains("nameserver"), "nothing is allowed, so there is no resolver: {output:?}");
    let written = sh(&*host.engine, &id, "touch /workspace/mine && touch /etc/not-mine").await;
    assert!(written.stderr.contains("Permission denied"), "{written:?}");
    host.engine.destroy(&id).await.unwrap();
    assert_eq!(harness::leftovers(&host, &[id]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_outlives_a_stop_and_memory_does_not() {
    let host = Host::new().await;
    let id = host.running().await;
    sh(&*host.engine, &id, "echo kept > /workspace/file; echo gone > /dev/shm/file; sleep 1000 &").await;
    host.engine.stop(&id, GRACE).await.unwrap();
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&id)), Vec::<String>::new());
    host.engine.start(&id).await.unwrap();
    let output = sh(&*host.engine, &id, "cat /workspace/file; ls /dev/shm; pgrep sleep").await;
    assert_eq!(output.stdout, "kept\n", "{output:?}");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn over_its_memory_a_vm_ends_as_oom_and_can_start_again() {
    let host = Host::new().await;
    let id = host.running().await;
    let engine = host.engine.clone();
    let hungry = id.clone();
    let command = tokio::task::spawn(async move {
        let dialled = engine.dial(&hungry, tiffin_engine::Target::Agent).await.unwrap();
        let token = engine.agent_token(&hungry).await.unwrap();
        let line = "python3 -c 'x = [bytearray(16 << 20) for _ in range(200)]'";
        let mut stream = tiffin_engine::agent::exec(dialled, &token, shell(line)).await.unwrap();
        // Its last words may come or not; that it ends is what counts.
        while let Ok(item) = stream.next().await {
            if matches!(item, ExecItem::Done(_)) {
                break;
            }
        }
    });
    let ended = next_end(&host).await;
    assert_eq!((ended.id, ended.report.reason), (id.clone(), EndReason::Oom));
    assert!(ended.report.message.contains("256 MiB"), "{}", ended.report.message);
    let told = tokio::time::timeout(Duration::from_secs(5), command).await;
    assert!(told.is_ok(), "whoever ran the command is told of the end");
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&id)), Vec::<String>::new());
    host.engine.start(&id).await.unwrap();
    assert_eq!(sh(&*host.engine, &id, "echo up").await.stdout, "up\n");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_busy_processes_of_a_one_cpu_vm_share_that_cpu() {
    let host = Host::new().await;
    let id = host.running().await;
    let mut busy = shell("for i in 1 2; do (while :; do :; done) & done; wait");
    busy.timeout_ms = 3000;
    let before = cpu_seconds(&id);
    let output = exec(&*host.engine, &id, busy).await;
    let used = cpu_seconds(&id) - before;
    assert!(output.done.timed_out);
    let wall = Duration::from_micros(output.done.duration_us).as_secs_f64();
    assert!(used <= wall * 1.2 + 0.3, "{used} s of CPU in {wall} s");
    assert!(used >= 0.5, "it ran at all: {used} s");
    host.engine.destroy(&id).await.unwrap();
}

/// What the VM's control group has used.
fn cpu_seconds(id: &VmId) -> f64 {
    if Cgroups::detect().unwrap().version() == "v1" {
        let roots = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];
        let stat = roots.iter().map(|root| Path::new(root).join("tiffin").join(id.hex()));
        let dir = stat.into_iter().find(|dir| dir.exists()).unwrap();
        // Where cpuacct is another hierarchy, the group's processes are asked one by one.
        if let Ok(ns) = std::fs::read_to_string(dir.join("cpuacct.usage")) {
            return ns.trim().parse::<f64>().unwrap() / 1e9;
        }
        let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        return procs.lines().map(process_cpu_seconds).sum();
    }
    let stat = std::fs::read_to_string(format!("/sys/fs/cgroup/tiffin/{}/cpu.stat", id.hex())).unwrap();
    let usec = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
    usec.parse::<f64>().unwrap() / 1e6
}

fn process_cpu_seconds(pid: &str) -> f64 {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return 0.0 };
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = [11, 12, 13, 14].iter().map(|n| fields[*n].parse::<u64>().unwrap()).sum();
    ticks as f64 / 100.0
}

/// Nanoseconds that the timers of the VM's sandbox may be late.
fn timer_slack(host: &Host, id: &VmId) -> u64 {
    let sandboxes = harness::engine_pids(&host.folder(id), "runsc-sandbox");
    let slack = std::fs::read_to_string(format!("/proc/{}/timerslack_ns", sandboxes[0])).unwrap();
    slack.trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn timers_may_be_late_only_while_nothing_goes_on_in_the_guest() {
    const EXACT: u64 = 50_000;
    let host = Host::new().await;
    let id = host.running().await;
    let rests = async |when: &str| harness::eventually(when, async || timer_slack(&host, &id) == 10_000_000).await;
    rests("it rests soon after its boot").await;

    let asked = sh(&*host.engine, &id, "sleep 2.5");
    let looked = async {
        let mut seen = vec![];
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            seen.push(timer_slack(&host, &id));
        }
        seen
    };
    let (_, seen) = tokio::join!(asked, looked);
    assert_eq!(seen, [EXACT; 4], "while a command runs, however idle");
    rests("it rests after the command").await;

    let busy = "setsid sh -c 'while :; do cat /etc/hostname; done' > /dev/null 2>&1 < /dev/null & echo $!";
    let pid = sh(&*host.engine, &id, busy).await.stdout;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(timer_slack(&host, &id), EXACT, "busy by itself");
    sh(&*host.engine, &id, &format!("kill {pid}")).await;
    rests("it rests after that").await;
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_monitor_takes_its_vm_along_and_leaves_nothing() {
    let host = Host::new().await;
    let id = host.running().await;
    kill(monitor_pid(&host.folder(&id)).unwrap());
    let ended = next_end(&host).await;
    assert_eq!((ended.id, ended.report.reason), (id.clone(), EndReason::MonitorLost));
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&id)), Vec::<String>::new());
    host.engine.start(&id).await.expect("it can be started again");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_at_any_moment_of_a_start_leaves_nothing() {
    let host = Host::new().await;
    let small = VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 };
    for delay_ms in (0..40).chain([60, 90, 150]) {
        let spec = VmSpec { size: small, ..host.spec() };
        host.engine.create(&spec).await.unwrap();
        if delay_ms % 2 == 1 {
            // Its second start: the run before may still be cleared away.
            host.engine.start(&spec.id).await.unwrap();
            host.engine.stop(&spec.id, GRACE).await.unwrap();
        }
        let (engine, id) = (host.engine.clone(), spec.id.clone());
        let start = tokio::spawn(async move { engine.start(&id).await });
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        host.engine.destroy(&spec.id).await.unwrap_or_else(|error| panic!("after {delay_ms} ms: {error:?}"));
        let _ = start.await.unwrap();
        assert_eq!(host.engine.observe(&spec.id).await, Observed::Absent);
        assert!(!host.folder(&spec.id).exists(), "after {delay_ms} ms");
        assert_eq!(harness::leftovers(&host, &[spec.id]), Vec::<String>::new(), "after {delay_ms} ms");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_was_killed_without_a_server_is_found_by_the_next() {
    let mut host = Host::new().await;
    let id = host.running().await;
    let pid = monitor_pid(&host.folder(&id)).unwrap();
    // The old engine is still watching; what counts is what a new one sees.
    kill(pid);
    harness::eventually("the monitor is gone", async || !Path::new(&format!("/proc/{pid}")).exists()).await;
    let seen = host.restart().await;
    let [(_, Observed::Stopped { end: Some(end) })] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(end.reason, EndReason::MonitorLost);
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&id)), Vec::<String>::new());
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recycled_pid_is_never_taken_for_the_monitor() {
    let mut host = Host::new().await;
    let id = host.running().await;
    host.engine.stop(&id, GRACE).await.unwrap();
    // As if the monitor's pid had been given to this very process since.
    let run = host.folder(&id).join("run.json");
    let mut told: serde_json::Value = serde_json::from_slice(&std::fs::read(&run).unwrap()).unwrap();
    told["process"]["pid"] = std::process::id().into();
    std::fs::write(&run, told.to_string()).unwrap();
    let seen = host.restart().await;
    assert!(matches!(&seen[..], [(_, Observed::Stopped { .. })]), "{seen:?}");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_end_is_the_vms_end_and_is_named() {
    let host = Host::new().await;
    let id = host.running().await;
    let dialled = host.engine.dial(&id, tiffin_engine::Target::Agent).await.unwrap();
    let token = host.engine.agent_token(&id).await.unwrap();
    // Even the guest's root can't kill PID 1 by a signal; its shutdown, asked for behind the platform's back, can.
    tiffin_engine::agent::shutdown(dialled, &token, Duration::ZERO, Duration::from_secs(10)).await.unwrap();
    let ended = next_end(&host).await;
    assert_eq!((ended.id, ended.report.reason), (id.clone(), EndReason::AgentLost));
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&id)), Vec::<String>::new());
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_that_can_not_work_says_so_and_leaves_nothing() {
    let mut host = Host::new().await;
    let unknown = VmSpec { image: tiffin_types::id::Digest::from_sha256([1; 32]), ..host.spec() };
    assert!(matches!(host.engine.create(&unknown).await, Err(EngineError::Invalid(_))));
    assert_eq!(host.engine.observe(&unknown.id).await, Observed::Absent);

    let broken = host.config.data_dir.join("broken-runsc");
    std::fs::write(&broken, "#!/bin/sh\necho no such luck >&2\nexit 7\n").unwrap();
    std::fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    host.config.runsc = Some(broken);
    host.restart().await;
    let spec = host.spec();
    host.engine.create(&spec).await.unwrap();
    let Err(EngineError::Ended(report)) = host.engine.start(&spec.id).await else { panic!("it can't start") };
    assert_eq!(report.reason, EndReason::BootFailed);
    let console = host.engine.log_tail(&spec.id, LogKind::Console, 10).await.unwrap();
    assert!(console.lines.iter().any(|line| line.ends_with("no such luck")), "{console:?}");
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&spec.id)), Vec::<String>::new());
    host.engine.destroy(&spec.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_never_answers_is_ended_in_time() {
    let mut host = Host::new().await;
    let data_dir = host.config.data_dir.clone();
    let script = |body: &str| {
        let path = data_dir.join("script");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        path
    };
    // Not agents: one never says anything, one ends at once.
    for (body, reason) in [("exec sleep 1000", EndReason::BootTimeout), ("exit 3", EndReason::AgentLost)] {
        host.config.agent = script(body);
        host.config.boot_timeout = Duration::from_secs(3);
        host.restart().await;
        let spec = host.spec();
        host.engine.create(&spec).await.unwrap();
        let Err(EngineError::Ended(report)) = host.engine.start(&spec.id).await else { panic!("it can't start") };
        assert_eq!(report.reason, reason, "{report:?}");
        assert_eq!(harness::leftovers(&host, std::slice::from_ref(&spec.id)), Vec::<String>::new());
        host.engine.destroy(&spec.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_room_refuses_before_anything_is_made() {
    let mut host = Host::new().await;
    host.config.min_free_disk_mb = u64::MAX >> 21;
    host.restart().await;
    let spec = VmSpec { size: VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 }, ..host.spec() };
    let refused = host.engine.create(&spec).await;
    assert!(matches!(refused, Err(EngineError::NoCapacity(_))), "{refused:?}");
    assert_eq!(host.engine.observe(&spec.id).await, Observed::Absent);
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}
