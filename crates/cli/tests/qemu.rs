//! What the QEMU engine promises beyond the conformance suite: a kernel of the guest's own, and an emulator that is
//! confined as if it were the guest's.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;

use std::{collections::BTreeSet, fs, time::Duration};

use harness::{Host, sh};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tiffin_engine::{Engine, LogKind};
use tiffin_types::{
    id::VmId,
    program::{Program, StopSignal},
    vm::{EndReason, EngineName, Isolation, VmSize, VmSpec},
};

fn emulator(host: &Host, id: &VmId) -> i32 {
    let pids = harness::engine_pids(&host.folder(id), "/usr/bin/qemu-system-x86_64");
    assert_eq!(pids.len(), 1, "{pids:?}");
    pids[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_has_a_kernel_of_its_own_and_what_was_asked_for() {
    let host = Host::with(EngineName::Qemu).await;
    // No KVM is given to it here.
    assert_eq!(host.engine.default_kind().isolation, Isolation::EmulatedVm);
    let size = VmSize { cpus: 2, mem_mb: 256, disk_mb: 128 };
    let id = host.running_as(VmSpec { size, ..host.spec() }).await;
    let kernel = host.config.machines.as_ref().unwrap().kernel.with_file_name("package");
    let package = fs::read_to_string(kernel).unwrap();
    let release = package.trim().strip_prefix("linux-image-").unwrap();
    let ask =
        "uname -r; nproc; id -u; hostname; pwd; cat /proc/1/comm; ls /modules /image 2>&1; grep MemTotal /proc/meminfo";
    let output = sh(&*host.engine, &id, ask).await.stdout;
    for expected in [release, "\n2\n1000\n", id.as_str(), "/workspace", "tiffin-agent"] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    assert_eq!(output.matches("No such file").count(), 2, "the first steps' folders are gone: {output}");
    let kib: u64 = output.split("MemTotal:").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!((170_000..262_144).contains(&kib), "256 MiB but what the kernel has taken: {kib} KiB");

    // The image is read-only, the disk has its size and outlives a stop, and memory doesn't.
    let fill = "echo kept > kept; head -c 200M /dev/zero > big; rm big; touch /usr/bin/x; echo gone > /dev/shm/gone; ls -d /sys/block/vd*";
    let filled = sh(&*host.engine, &id, fill).await;
    assert!(
        filled.stderr.contains("No space left on device") && filled.stderr.contains("Permission denied"),
        "{filled:?}"
    );
    assert_eq!(fs::metadata(host.folder(&id).join("disk.ext4")).unwrap().len(), 128 << 20);
    host.engine.stop(&id, Duration::from_secs(5)).await.unwrap();
    host.engine.start(&id).await.unwrap();
    assert_eq!(sh(&*host.engine, &id, "cat kept; ls /dev/shm").await.stdout, "kept\n");
    host.engine.destroy(&id).await.unwrap();
    assert_eq!(harness::leftovers(&host, &[id]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_emulator_is_nobody_and_sees_nothing() {
    let host = Host::with(EngineName::Qemu).await;
    let (id, other) = (host.running().await, host.running().await);
    let pid = emulator(&host, &id);
    let proc = |pid: i32, name: &str| format!("/proc/{pid}/{name}");
    let status = fs::read_to_string(proc(pid, "status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let user: u32 = field("Uid:")[0].parse().unwrap();
    assert!(user >= 0x7000_0000, "{user}");
    for (name, all) in [("Uid:", user.to_string()), ("Gid:", user.to_string())] {
        assert_eq!(field(name), vec![all; 4]);
    }
    assert_eq!(field("Groups:"), Vec::<String>::new());
    for name in ["CapEff:", "CapPrm:", "CapInh:"] {
        assert_eq!(field(name), ["0000000000000000"], "{name}");
    }
    assert_eq!((&field("NoNewPrivs:")[0][..], &field("Seccomp:")[0][..]), ("1", "2"));
    assert_eq!(field("NSpid:").last().unwrap(), "1", "alone in its namespace");
    let other_status = fs::read_to_string(proc(emulator(&host, &other), "status")).unwrap();
    assert!(!other_status.contains(&format!("Uid:\t{user}\t")), "each VM has a user of its own");

    let monitor = harness::monitor_pid(&host.folder(&id)).unwrap();
    for namespace in ["mnt", "net", "pid", "ipc", "uts"] {
        let of = |pid: i32| fs::read_link(proc(pid, &format!("ns/{namespace}"))).unwrap();
        let seen: BTreeSet<_> =
            [of(pid), of(monitor), of(std::process::id().cast_signed()), of(emulator(&host, &other))]
                .into_iter()
                .collect();
        let expected = if matches!(namespace, "uts") { 3 } else { 4 };
        assert!(seen.len() >= expected, "{namespace}: {seen:?}");
    }
    let links = fs::read_to_string(proc(pid, "net/dev")).unwrap();
    assert_eq!(links.lines().skip(2).count(), 1, "nothing but its own lo: {links}");

    let names = |at: String| -> BTreeSet<String> {
        let entries = fs::read_dir(at).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let root = names(proc(pid, "root"));
    let known = ["dev", "etc", "initramfs", "kernel", "lib", "lib32", "lib64", "libx32", "usr"];
    assert!(root.iter().all(|name| known.contains(&name.as_str())), "{root:?}");
    assert_eq!(names(proc(pid, "root/dev")), ["null", "urandom"].map(str::to_owned).into());
    assert!(names(proc(pid, "root/etc")).len() <= 1);
    let mounts = fs::read_to_string(proc(pid, "mountinfo")).unwrap();
    for mount in mounts.lines().filter(|line| !line.contains(" /dev/")) {
        let options = mount.split_whitespace().nth(5).unwrap();
        assert!(options.split(',').any(|option| option == "ro"), "{mount}");
        assert!(options.contains("nosuid"), "{mount}");
    }
    assert!(names(proc(pid, "fd")).len() < 40);
    for id in [id, other] {
        host.engine.destroy(&id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_stood_still_has_the_right_time_when_it_goes_on() {
    let host = Host::with(EngineName::Qemu).await;
    let id = host.running().await;
    host.engine.pause(&id).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    host.engine.resume(&id).await.unwrap();
    let told = sh(&*host.engine, &id, "date +%s.%N").await.stdout;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let behind = now - told.trim().parse::<f64>().unwrap();
    assert!((-1.0..4.0).contains(&behind), "{behind} s behind, the answer's way included");
    assert_eq!(sh(&*host.engine, &id, "echo on").await.stdout, "on\n");
    host.engine.destroy(&id).await.unwrap();
}

/// An emulator that a guest has taken over may do anything, but not hang for ever.
#[tokio::test(flavor = "multi_thread")]
async fn an_emulator_that_hangs_is_ended() {
    let host = Host::with(EngineName::Qemu).await;
    let id = host.running().await;
    kill(Pid::from_raw(emulator(&host, &id)), Signal::SIGSTOP).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(90), host.engine.next_end()).await.unwrap();
    assert_eq!((ended.id, ended.report.reason), (id.clone(), EndReason::EngineLost), "{}", ended.report.message);
    assert_eq!(harness::leftovers(&host, std::slice::from_ref(&id)), Vec::<String>::new());
    host.engine.start(&id).await.unwrap();
    assert_eq!(sh(&*host.engine, &id, "echo again").await.stdout, "again\n");
    host.engine.destroy(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_is_none_is_named_and_leaves_nothing() {
    let host = Host::with(EngineName::Qemu).await;
    let kernels = host.config.data_dir.join("kernels");
    let prepared = fs::read_dir(&kernels).unwrap().next().unwrap().unwrap().path();
    fs::write(prepared.join("kernel"), b"no kernel at all").unwrap();
    let spec = host.spec();
    host.engine.create(&spec).await.unwrap();
    let refused = host.engine.start(&spec.id).await.unwrap_err();
    let said = host.engine.log_tail(&spec.id, LogKind::EngineErrors, 20).await.unwrap().lines.join("\n");
    assert!(said.contains("kernel"), "{refused}: {said}");
    host.engine.destroy(&spec.id).await.unwrap();
    assert_eq!(harness::leftovers(&host, &[spec.id]), Vec::<String>::new());
}

/// The machine's memory is fixed: who goes without is for the guest's kernel to say, and the VM goes on.
#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory_a_guest_loses_what_took_it_and_goes_on() {
    let host = Host::with(EngineName::Qemu).await;
    let id = host.running().await;
    sh(&*host.engine, &id, "echo kept > /dev/shm/kept").await;
    let hungry = "x = [bytearray(16 << 20) for _ in range(200)]";
    let killed = sh(&*host.engine, &id, &format!("python3 -c '{hungry}'; echo $?")).await;
    assert_eq!(killed.stdout, "137\n", "{killed:?}");
    assert_eq!(sh(&*host.engine, &id, "cat /dev/shm/kept").await.stdout, "kept\n");
    host.engine.destroy(&id).await.unwrap();

    let program = Program {
        argv: ["python3", "-c", hungry].map(str::to_owned).to_vec(),
        env: Default::default(),
        cwd: String::new(),
        user: String::new(),
        stop_signal: StopSignal::TERM,
    };
    let id = host.running_as(VmSpec { program: Some(program), ..host.spec() }).await;
    host.engine.program_start(&id).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(90), host.engine.next_end()).await.unwrap();
    assert_eq!((ended.id, ended.report.reason, ended.report.exit_code), (id.clone(), EndReason::Exited, Some(137)));
    host.engine.destroy(&id).await.unwrap();
}
