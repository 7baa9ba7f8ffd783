use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt};

use super::*;

fn input() -> DoctorInput {
    DoctorInput {
        engine: None,
        qemu: None,
        kernel: None,
        data_dir: "/tmp/tiffin-doctor-test/data".into(),
        run_dir: "/tmp/tiffin-doctor-test/run".into(),
        runsc: None,
        agent: None,
        listen: None,
        ingress: None,
    }
}

fn runsc_that_prints(line: &str) -> (tempfile::TempDir, Check) {
    let folder = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(folder.path().join("runsc")).unwrap();
    fs::write(&path, format!("#!/bin/sh\necho '{line}'\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let checks = engines::check(&DoctorInput { runsc: Some(path), ..input() });
    (folder, checks.into_iter().find(|check| check.name == "gvisor").unwrap())
}

#[test]
fn a_runsc_that_is_missing_fails_with_a_remedy() {
    let input = DoctorInput { runsc: Some("/nonexistent/runsc".into()), ..input() };
    let check = &engines::check(&input)[0];
    assert_eq!(check.level, Level::Fail);
    assert!(check.found.contains("/nonexistent/runsc"), "{check:?}");
    assert!(check.remedy.as_ref().unwrap().contains("backports"), "{check:?}");
}

#[test]
fn a_runsc_that_is_missing_is_missed_by_nobody_where_vms_are_qemus() {
    let missing = DoctorInput { runsc: Some("/nonexistent/runsc".into()), ..input() };
    let level = |engine| engines::check(&DoctorInput { engine, ..missing.clone() })[0].level;
    assert_eq!(level(Some(EngineName::Qemu)), Level::Warn);
    assert_eq!([level(Some(EngineName::Gvisor)), level(None)], [Level::Fail; 2]);
}

#[test]
fn an_old_runsc_is_refused_and_a_new_one_taken() {
    for (line, level) in [
        ("runsc version 0.0~20221219.0", Level::Fail),
        ("runsc version release-20240728.0", Level::Fail),
        ("runsc version 0.0~20240729.0", Level::Ok),
        ("runsc version release-20260105.0", Level::Ok),
        ("something else", Level::Fail),
    ] {
        let (_folder, check) = runsc_that_prints(line);
        assert_eq!(check.level, level, "{line}: {check:?}");
    }
}

#[test]
fn a_probe_that_hangs_is_reported_and_holds_nothing_up() {
    let probes: [Probe; 2] = [
        ("hangs", |_| {
            loop {
                std::thread::park();
            }
        }),
        ("answers", |_| vec![Check::ok("answers", "yes")]),
    ];
    let started = Instant::now();
    let checks = run(&probes, &input(), Duration::from_millis(100));
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(
        checks.iter().map(|check| (check.name, check.level)).collect::<Vec<_>>(),
        [("hangs", Level::Fail), ("answers", Level::Ok)]
    );
    assert!(must_refuse(&checks));
    assert!(!must_refuse(&checks[1..]));
}

#[test]
fn every_complaint_comes_with_a_remedy_and_every_name_once() {
    let checks = check(&input());
    for check in &checks {
        assert_eq!(check.level == Level::Ok, check.remedy.is_none(), "{check:?}");
        assert!(!check.found.is_empty(), "{check:?}");
        assert_eq!(checks.iter().filter(|other| other.name == check.name).count(), 1, "{}", check.name);
    }
}

#[test]
fn the_whole_examination_is_quick_and_leaves_nothing_behind() {
    // Tests that run beside this one have control groups and mounts of their own: what is looked for is what stays.
    let groups = || {
        let dirs = ["memory", "cpu", "pids", "."].map(|name| format!("/sys/fs/cgroup/{name}/tiffin"));
        let entries = dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect::<BTreeSet<_>>()
    };
    let is_empty =
        |group: &std::path::PathBuf| fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|p| p.is_empty());
    let before = groups();
    let started = Instant::now();
    let checks = check(&input());
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    assert!(checks.len() >= PROBES.len() - 1, "{checks:?}");
    let deadline = Instant::now() + Duration::from_secs(5);
    while let Some(left) = groups().difference(&before).find(|group| is_empty(group)) {
        assert!(Instant::now() < deadline, "{} is left behind", left.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("tiffin-doctor-"), "{mounts}");
}
