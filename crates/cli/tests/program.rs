//! VMs that are for one program, on real VMs: who it runs as, what is kept of what it prints, and the VM's end with it.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use harness::{Host, eventually, on_both_engines, sh};
use tiffin_engine::{Ended, Engine, EngineError, Observed, Target};
use tiffin_logs::{Limits, Line, Order, Query, Reader, Stream};
use tiffin_types::{
    id::{SnapshotId, VmId},
    program::{Program, StopSignal},
    vm::{EndReason, EngineName, VmSpec},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const GRACE: Duration = Duration::from_secs(10);

on_both_engines!(
    a_program_has_its_user_and_environment_and_its_vm_ends_with_it,
    a_program_that_cant_be_started_ends_its_vm_in_words_and_prints_nothing,
    a_stop_asks_the_program_by_its_signal_and_hears_it_out,
    nothing_of_much_is_lost_whether_a_server_is_there_or_not,
    a_vm_that_stands_still_gets_its_program_late_and_answers,
    a_root_program_can_neither_command_the_agent_nor_do_more_than_end_its_own_vm,
);

fn program(words: &[&str]) -> Program {
    Program {
        argv: words.iter().map(|word| (*word).to_owned()).collect(),
        env: BTreeMap::new(),
        cwd: String::new(),
        user: String::new(),
        stop_signal: StopSignal::TERM,
    }
}

fn shell(line: &str) -> Program {
    program(&["sh", "-c", line])
}

fn python(code: &str) -> Program {
    program(&["python3", "-c", code])
}

impl Host {
    /// A VM that is up, and whose program isn't started.
    async fn waiting(&self, program: Program) -> VmId {
        program.check().unwrap();
        self.running_as(VmSpec { program: Some(program), ..self.spec() }).await
    }

    async fn started(&self, program: Program) -> VmId {
        let id = self.waiting(program).await;
        self.engine.program_start(&id).await.unwrap();
        id
    }

    /// Runs it to its end: the exit code and the lines.
    async fn run(&self, program: Program) -> (Option<i32>, Vec<Line>) {
        let id = self.started(program).await;
        let Ended { id: ended, report } = next_end(self).await;
        assert_eq!((&ended, report.reason), (&id, EndReason::Exited), "{}", report.message);
        (report.exit_code, self.lines(&id))
    }

    fn lines(&self, id: &VmId) -> Vec<Line> {
        let reader = Reader::open(self.config.data_dir.join("logs").join(id.as_str()));
        let mut query = Query::new(Order::OldestFirst, 1000);
        let mut lines = Vec::new();
        loop {
            let page = reader.page(&query).unwrap();
            lines.extend(page.lines);
            match page.is_end {
                true => return lines,
                false => query.after = Some(page.position),
            }
        }
    }

    async fn prints(&self, id: &VmId, line: &str) {
        eventually(line, async || self.lines(id).iter().any(|printed| printed.message == line)).await;
    }
}

async fn next_end(host: &Host) -> Ended {
    tokio::time::timeout(Duration::from_secs(60), host.engine.next_end()).await.expect("an end is told")
}

fn messages(lines: &[Line]) -> Vec<&str> {
    lines.iter().map(|line| line.message.as_str()).collect()
}

async fn a_program_has_its_user_and_environment_and_its_vm_ends_with_it(engine: EngineName) {
    let host = Host::with(engine).await;
    let (code, lines) = host.run(shell("echo out; echo err >&2; printf unended; exit 3")).await;
    assert_eq!(code, Some(3));
    let mut printed: Vec<_> = lines.iter().map(|line| (line.stream, line.message.as_str())).collect();
    printed.sort_by_key(|(stream, _)| *stream == Some(Stream::Stderr));
    assert_eq!(
        printed,
        [(Some(Stream::Stdout), "out"), (Some(Stream::Stdout), "unended"), (Some(Stream::Stderr), "err")]
    );

    assert_eq!(host.run(shell("echo soon; kill -9 $$")).await.0, Some(137));

    let facts = "import os; print(os.getuid(), os.getgid(), os.getcwd(), os.environ['HOME'], os.environ['LINES'] == 'a\\nb')\n\
        print(sorted(os.environ), os.environ['HOSTNAME'] == open('/etc/hostname').read().strip(), flush=True)\n\
        open('/dev/stdout', 'w').write('by name\\n')";
    let env = BTreeMap::from([("LINES".into(), "a\nb".into()), ("ODD.NAME".into(), "'$(x)' \"é".into())]);
    let asked = Program { env, user: "user".into(), cwd: "/made/here".into(), ..python(facts) };
    let (code, lines) = host.run(asked).await;
    let home = "1000 1000 /made/here /home/user True";
    let names = "['HOME', 'HOSTNAME', 'LC_CTYPE', 'LINES', 'ODD.NAME', 'PATH'] True";
    assert_eq!(messages(&lines), [home, names, "by name"]);
    assert_eq!(code, Some(0));
}

async fn a_program_that_cant_be_started_ends_its_vm_in_words_and_prints_nothing(engine: EngineName) {
    let host = Host::with(engine).await;
    let crlf = "printf '#!/bin/sh\\r\\necho\\r\\n' > /workspace/run; chmod 755 /workspace/run";
    for (asked, prepare, exit_code, words) in [
        (program(&["no-such-program"]), "true", 127, "PATH"),
        (program(&["/workspace/run"]), crlf, 126, "CRLF"),
        (Program { user: "nobody-here".into(), ..program(&["true"]) }, "true", 126, "nobody-here"),
        (Program { cwd: "/etc/passwd".into(), ..program(&["true"]) }, "true", 126, "/etc/passwd"),
    ] {
        let id = host.waiting(asked).await;
        sh(&*host.engine, &id, prepare).await;
        let Err(EngineError::Ended(report)) = host.engine.program_start(&id).await else { panic!("it can't start") };
        assert_eq!((report.reason, report.exit_code), (EndReason::ProgramFailed, Some(exit_code)));
        assert!(report.message.contains(words), "{}", report.message);
        assert_eq!(host.engine.observe(&id).await, Observed::Stopped { end: Some(report) });
        assert!(host.lines(&id).is_empty());
    }
    let more = tokio::time::timeout(Duration::from_millis(200), host.engine.next_end()).await;
    assert!(more.is_err(), "an end that a start returned is not told again: {more:?}");
}

async fn a_stop_asks_the_program_by_its_signal_and_hears_it_out(engine: EngineName) {
    let host = Host::with(engine).await;
    let code = "import signal, sys, time\n\
        def quit(*_): print('quitting', flush=True); time.sleep(0.3); print('done', flush=True); sys.exit(5)\n\
        signal.signal(signal.SIGRTMIN + 3, quit); print('up', flush=True)\n\
        while True: time.sleep(60)";
    let id = host.started(Program { stop_signal: "SIGRTMIN+3".parse().unwrap(), ..python(code) }).await;
    host.prints(&id, "up").await;
    let asked = Instant::now();
    let end = host.engine.stop(&id, GRACE).await.unwrap();
    assert_eq!((end.reason, end.exit_code), (EndReason::Requested, Some(5)));
    assert!(asked.elapsed() < GRACE, "the guest ends with its last process");
    assert_eq!(messages(&host.lines(&id)), ["up", "quitting", "done"]);

    // A further run's lines come behind, and one that stands still is stopped like any other.
    host.engine.start(&id).await.unwrap();
    host.engine.program_start(&id).await.unwrap();
    eventually("it is up again", async || host.lines(&id).len() == 4).await;
    host.engine.pause(&id).await.unwrap();
    assert!(matches!(host.engine.program_start(&id).await, Err(EngineError::WrongState(_))));
    assert_eq!(host.engine.stop(&id, GRACE).await.unwrap().exit_code, Some(5));
    host.engine.destroy(&id).await.unwrap();
    assert_eq!(host.lines(&id).len(), 6, "the lines outlive the VM");
}

/// A million lines, and a server that is gone in between.
async fn nothing_of_much_is_lost_whether_a_server_is_there_or_not(engine: EngineName) {
    let mut host = Host::with(engine).await;
    host.config.logs = Limits::new(1 << 30, Duration::from_secs(86_400), 16 * 1024);
    host.restart().await;
    let code = "import sys\n\
        for n in range(0, 1000000, 100): sys.stdout.write(''.join(f'line {i} of what is printed\\n' for i in range(n, n + 100)))";
    let id = host.started(python(code)).await;
    eventually("it prints", async || !host.lines(&id).is_empty()).await;
    let begun = Instant::now();
    let seen = host.restart().await;
    assert!(seen.iter().any(|(seen, _)| *seen == id));
    match seen[0].1.clone() {
        Observed::Running => assert_eq!(next_end(&host).await.report.exit_code, Some(0)),
        Observed::Stopped { end } => assert_eq!(end.unwrap().exit_code, Some(0)),
        other => panic!("{other:?}"),
    }
    println!("ended {:?} after the restart", begun.elapsed());
    let lines = host.lines(&id);
    assert_eq!(lines.len(), 1_000_000);
    let wrong = lines.iter().enumerate().find(|(n, line)| line.message != format!("line {n} of what is printed"));
    assert_eq!(wrong, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_program_goes_on_in_the_copy_and_both_are_logged() {
    let host = Host::new().await;
    let code = "import time, itertools\n\
        for n in itertools.count(): print('tick', n, flush=True); time.sleep(0.02)";
    let spec = VmSpec { program: Some(python(code)), ..host.spec() };
    let id = host.running_as(spec.clone()).await;
    host.engine.program_start(&id).await.unwrap();
    host.prints(&id, "tick 3").await;
    let snapshot = SnapshotId::random();
    host.engine.snapshot_save(&id, &snapshot).await.unwrap();
    let copy = VmSpec { id: VmId::random(), ..spec };
    host.engine.create_from(&copy, &snapshot).await.unwrap();
    host.engine.start(&copy.id).await.unwrap();
    host.engine.program_start(&copy.id).await.expect("it runs already");
    let number = |line: &Line| line.message.strip_prefix("tick ").unwrap().parse::<u64>().unwrap();
    for vm in [&id, &copy.id] {
        let before = host.lines(vm).len();
        eventually("it goes on", async || host.lines(vm).len() > before + 5).await;
    }
    let (first, last) = {
        let lines = host.lines(&copy.id);
        // The first may be the end of a line that was being printed.
        (number(&lines[1]), number(&lines[lines.len() - 1]))
    };
    assert!(first > 3 && last - first == host.lines(&copy.id).len() as u64 - 2, "{first} {last}");
    let own: Vec<u64> = host.lines(&id).iter().map(number).collect();
    assert!(own.iter().copied().eq(0..own.len() as u64), "{own:?}");
    for vm in [&id, &copy.id] {
        assert_eq!(host.engine.stop(vm, GRACE).await.unwrap().exit_code, Some(143));
    }
}

async fn a_vm_that_stands_still_gets_its_program_late_and_answers(engine: EngineName) {
    let host = Host::with(engine).await;
    let server = "import socket\n\
        s = socket.create_server(('', 8080)); print('listening', flush=True)\n\
        while True:\n  c = s.accept()[0]; c.recv(999); c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nhello'); c.close()";
    let id = host.waiting(python(server)).await;
    host.engine.pause(&id).await.unwrap();
    let begun = Instant::now();
    host.engine.resume(&id).await.unwrap();
    let resumed = begun.elapsed();
    host.engine.program_start(&id).await.unwrap();
    let started = begun.elapsed();
    let answer = loop {
        let Ok(mut stream) = host.engine.dial(&id, Target::Port(8080)).await else { continue };
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        break answer;
    };
    println!("resumed {resumed:?}, program {started:?}, answered {:?}", begun.elapsed());
    assert!(answer.ends_with("hello"), "{answer}");
    host.engine.program_start(&id).await.expect("asked again, it changes nothing");
    host.engine.stop(&id, GRACE).await.unwrap();
}

async fn a_root_program_can_neither_command_the_agent_nor_do_more_than_end_its_own_vm(engine: EngineName) {
    let host = Host::with(engine).await;
    // The kernel would start whatever is named there, as its own root.
    let look = "grep CapEff /proc/self/status; cat /proc/1/mem; mount -t tmpfs x /mnt; \
        (echo '|/bin/true' > /proc/sys/kernel/core_pattern) 2> /dev/null && echo taken";
    let (_, lines) = host.run(shell(look)).await;
    let text = messages(&lines).join("\n");
    // Of Docker's set what the engine gives.
    let expected = match engine {
        EngineName::Gvisor => "CapEff:\t00000000080405fb",
        _ => "CapEff:\t00000000a80425fb",
    };
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("/proc/1/mem: Permission denied") && text.contains("permission denied"), "{text}");
    assert!(!text.contains("taken"), "{text}");
    let forge = |to: &str| format!("for way in {to}; do head -c 100000 /dev/zero > $way; done");
    if engine == EngineName::Gvisor {
        // The agent's descriptors can be opened by root, and what is written there is no frame.
        host.started(shell(&(forge("/proc/1/fd/[3-8]") + "; sleep 60"))).await;
        let end = next_end(&host).await.report;
        assert_eq!(end.reason, EndReason::AgentLost, "{}", end.message);
        assert!(end.message.contains("root"), "{}", end.message);
    } else {
        // A machine's port can be open once, and the agent has it; its descriptors are not to be seen.
        let (code, lines) = host.run(shell(&(forge("/proc/1/fd/[3-8] /dev/vport*") + "; echo over; exit 5"))).await;
        let said = messages(&lines);
        assert!(code == Some(5) && said.contains(&"over"), "{said:?}");
        let with = |words: &str| said.iter().filter(|line| line.contains(words)).count();
        assert_eq!((with("cannot create"), with("resource busy")), (said.len() - 1, 1), "{said:?}");
    }
}

/// A VM that was prepared and waits costs no CPU; a save of one needs its sandbox, and leaves it as it was.
#[tokio::test(flavor = "multi_thread")]
async fn the_sandbox_of_a_vm_that_stands_still_is_stopped_too() {
    let host = Host::new().await;
    let spec = host.spec();
    let id = host.running_as(spec.clone()).await;
    let is_stopped = || {
        let sandboxes = harness::engine_pids(&host.folder(&id), "runsc-sandbox");
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", sandboxes[0])).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    };
    for _ in 0..3 {
        assert!(!is_stopped());
        host.engine.pause(&id).await.unwrap();
        eventually("it is stopped", async || is_stopped()).await;
        host.engine.resume(&id).await.unwrap();
        assert_eq!(sh(&*host.engine, &id, "echo on").await.stdout, "on\n");
    }
    sh(&*host.engine, &id, "echo kept > /dev/shm/kept").await;
    host.engine.pause(&id).await.unwrap();
    let snapshot = SnapshotId::random();
    host.engine.snapshot_save(&id, &snapshot).await.unwrap();
    eventually("it is stopped", async || is_stopped()).await;
    assert_eq!(host.engine.observe(&id).await, Observed::Paused);
    let copy = VmSpec { id: VmId::random(), ..spec };
    host.engine.create_from(&copy, &snapshot).await.unwrap();
    host.engine.start(&copy.id).await.unwrap();
    host.engine.resume(&id).await.unwrap();
    for vm in [&id, &copy.id] {
        assert_eq!(sh(&*host.engine, vm, "cat /dev/shm/kept").await.stdout, "kept\n");
    }
    host.engine.pause(&id).await.unwrap();
    harness::kill_sandbox(&host.folder(&id));
    assert_eq!(next_end(&host).await.report.reason, EndReason::EngineLost, "killed while it is stopped");
}
