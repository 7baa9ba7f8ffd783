//! The program that a guest is for: how it starts, what it prints, and the guest's end with it.

mod guest;

use std::time::{Duration, Instant};

use guest::{Guest, Heard};
use tiffin_protocol::{FailureCode, Kind, Op, Program, ProgramStarted, Shutdown};

const MARK: &str = "sleep\x004321";

fn program(words: &[&str]) -> Program {
    Program {
        argv: words.iter().map(|word| (*word).to_owned()).collect(),
        env: Default::default(),
        cwd: String::new(),
        user: String::new(),
        stop_signal: 15,
    }
}

fn shell(line: &str) -> Program {
    program(&["sh", "-c", line])
}

fn start(guest: &Guest, program: Program) -> ProgramStarted {
    let answer = guest.ask(Op::Program(program));
    assert_eq!(answer.kind, Kind::Done, "{}", String::from_utf8_lossy(&answer.last));
    serde_json::from_slice(&answer.last).expect("an answer")
}

/// Runs it in a guest of its own, to the end of both.
fn run(program: Program) -> Heard {
    let mut guest = Guest::boot();
    assert!(!start(&guest, program).already);
    let heard = guest.hear_out();
    assert_eq!(guest.wait_for_end().code(), Some(0));
    heard
}

#[test]
fn a_program_has_its_user_its_environment_its_folder_and_nothing_of_the_agents() {
    let plant = "echo 'web:x:2000:2001::/srv/web:' >> $FOLDER/root/etc/passwd; \
                 echo 'data:x:2002:web' >> $FOLDER/root/etc/group";
    let mut guest = Guest::boot_planted(plant);
    let line = "import os; print(os.getuid(), os.getgid(), sorted(os.getgroups()), os.getcwd(), os.readlink('/proc/self/fd/0'))\n\
        print(sorted(os.listdir('/proc/self/fd'))[:3], os.getsid(0) == os.getpid())\n\
        print(open('/proc/self/environ', 'rb').read())";
    let odd = [("EMPTY", ""), ("LINES", "a\nb"), ("x.y-z", "=é\u{1}\"")];
    let env = odd.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().collect();
    let asked = Program { env, cwd: "/made/for it".into(), user: "web".into(), ..program(&["python3", "-c", line]) };
    start(&guest, asked);
    let heard = guest.hear_out();
    guest.wait_for_end();
    let expected = "2000 2001 [2002] /made/for it /dev/null\n\
        ['0', '1', '2'] True\n\
        b'EMPTY=\\x00HOME=/srv/web\\x00HOSTNAME=box\\x00LINES=a\\nb\\x00\
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\\x00x.y-z==\\xc3\\xa9\\x01\"\\x00'\n";
    assert_eq!(heard.text(), expected, "{}", String::from_utf8_lossy(&heard.stderr));
}

#[test]
fn the_guest_ends_with_its_program_and_says_how() {
    for (line, exit) in [("exit 0", (0, None)), ("exit 7", (7, None)), ("kill -9 $$", (137, Some(9)))] {
        let heard = run(shell(&format!("echo out; echo err >&2; {line}")));
        assert_eq!(heard.exit, Some(exit), "{line}");
        assert_eq!((heard.stdout.as_slice(), heard.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    }
}

#[test]
fn it_is_started_once() {
    let mut guest = Guest::boot();
    assert!(!start(&guest, shell("echo one; exec sleep 4321")).already);
    assert!(start(&guest, shell("echo two; exec sleep 4321")).already);
    assert_eq!(guest.said(), Some((Kind::Stdout, b"one\n".to_vec())));
    guest.wait_for_count(MARK, 1);
    guest.ask(Op::Shutdown(Shutdown { grace_ms: 5000 }));
    assert_eq!(guest.hear_out().exit, Some((143, Some(15))));
    assert_eq!(guest.wait_for_end().code(), Some(0));
}

#[test]
fn what_cant_be_started_is_said_in_words_and_another_may_be() {
    let plant = "cd $FOLDER/root; printf '#!/bin/sh\\r\\necho\\r\\n' > crlf; echo 'echo' > plain; echo > secret; \
                 printf '\\177ELF\\2\\1\\1\\0\\0\\0\\0\\0\\0\\0\\0\\0\\2\\0\\267\\0' > arm; chmod 755 crlf plain arm; chmod 700 secret";
    let mut guest = Guest::boot_planted(plant);
    let with = |change: fn(&mut Program)| {
        let mut program = program(&["true"]);
        change(&mut program);
        program
    };
    for (program, code, words) in [
        (program(&["no-such-program"]), FailureCode::NotFound, "PATH"),
        (program(&["/no/such"]), FailureCode::NotFound, "\"/no/such\""),
        (with(|p| drop(p.env.insert("PATH".into(), "/nowhere".into()))), FailureCode::NotFound, "PATH"),
        (program(&["/crlf"]), FailureCode::BadCommand, "CRLF"),
        (program(&["/plain"]), FailureCode::BadCommand, "#!"),
        (program(&["/arm"]), FailureCode::BadCommand, "aarch64"),
        (program(&["/etc/passwd"]), FailureCode::BadCommand, "executable"),
        (program(&["/etc"]), FailureCode::BadCommand, "is no file"),
        (with(|p| (p.argv, p.user) = (vec!["/secret".into()], "1000".into())), FailureCode::BadCommand, "user"),
        (with(|p| p.user = "nobody-here".into()), FailureCode::BadUser, "nobody-here"),
        (with(|p| p.user = "root:no-group".into()), FailureCode::BadUser, "no-group"),
        (with(|p| p.cwd = "/etc/passwd".into()), FailureCode::BadCwd, "/etc/passwd"),
    ] {
        let failed = guest.ask(Op::Program(program)).failure();
        assert!(failed.code == code && failed.message.contains(words), "{words}: {failed:?}");
    }
    start(&guest, shell("echo after all"));
    let heard = guest.hear_out();
    assert_eq!((heard.text(), heard.exit), ("after all\n", Some((0, None))));
    guest.wait_for_end();
}

#[test]
fn shutdown_asks_the_program_by_its_own_signal_before_the_others() {
    let mut guest = Guest::boot();
    let child = "(trap 'echo child; exit' TERM; echo up; while :; do sleep 0.05; done) & ";
    let line = format!("trap 'echo quit; sleep 0.3; exit 5' QUIT; {child} while :; do sleep 0.05; done");
    start(&guest, Program { stop_signal: 3, ..shell(&line) });
    assert_eq!(guest.said(), Some((Kind::Stdout, b"up\n".to_vec())));
    guest.ask(Op::Shutdown(Shutdown { grace_ms: 10_000 }));
    let heard = guest.hear_out();
    assert_eq!((heard.text(), heard.exit), ("quit\nchild\n", Some((5, None))));
    assert_eq!(guest.wait_for_end().code(), Some(0));
}

#[test]
fn a_program_that_ignores_its_signal_is_killed_after_the_grace() {
    let mut guest = Guest::boot();
    start(&guest, shell("trap '' TERM; echo up; while :; do sleep 0.05; done"));
    guest.said();
    let begun = Instant::now();
    guest.ask(Op::Shutdown(Shutdown { grace_ms: 300 }));
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(guest.hear_out().exit, Some((137, Some(9))));
    guest.wait_for_end();
}

#[test]
fn what_is_left_behind_is_heard_out_and_ended() {
    let left = "(trap 'echo bye; exit' TERM; echo up >&2; while :; do sleep 0.05; done) & setsid -f sleep 4321; ";
    let mut guest = Guest::boot();
    start(&guest, shell(&format!("{left} while ! [ -e /workspace/go ]; do sleep 0.05; done; exit 4")));
    assert_eq!(guest.said(), Some((Kind::Stderr, b"up\n".to_vec())));
    // The guest ends with it, so nobody waits for its answer.
    let mut host = guest.dial();
    host.request(Op::Exec(guest::shell("touch /workspace/go")));
    let heard = guest.hear_out();
    assert_eq!((heard.text(), heard.exit), ("bye\n", Some((4, None))));
    assert_eq!(guest.wait_for_end().code(), Some(0));
    assert_eq!(guest.count(MARK), 0);
}

#[test]
fn a_program_that_closes_its_outputs_runs_on() {
    let mut guest = Guest::boot();
    start(&guest, shell("echo last; exec > /dev/null 2>&1; while ! [ -e /workspace/go ]; do sleep 0.05; done; exit 3"));
    assert_eq!(guest.said(), Some((Kind::Stdout, b"last\n".to_vec())));
    let mut host = guest.dial();
    host.request(Op::Exec(guest::shell("touch /workspace/go")));
    assert_eq!(guest.hear_out().exit, Some((3, None)));
    guest.wait_for_end();
}

#[test]
fn much_output_of_both_kinds_arrives_whole_and_in_order() {
    let line = "import os, threading\n\
        def fill(fd):\n  for n in range(200): os.write(fd, bytes((n + i) % 256 for i in range(10007)))\n\
        t = threading.Thread(target=fill, args=(2,)); t.start(); fill(1); t.join()";
    let heard = run(program(&["python3", "-c", line]));
    let expected: Vec<u8> = (0..200).flat_map(|n| (0..10_007).map(move |i| ((n + i) % 256) as u8)).collect();
    assert!(heard.stdout == expected && heard.stderr == expected, "{} {}", heard.stdout.len(), heard.stderr.len());
    assert_eq!(heard.exit, Some((0, None)));
}

#[test]
fn a_user_can_open_the_outputs_by_name() {
    let line = "echo named > /dev/stdout; echo error > /dev/stderr";
    let heard = run(Program { user: "1000:1000".into(), ..shell(line) });
    assert_eq!((heard.text(), heard.stderr.as_slice()), ("named\n", &b"error\n"[..]));
}

#[test]
fn root_in_the_guest_has_no_way_into_the_agent() {
    let line = "grep Cap /proc/self/status; cat /proc/1/mem; cat /proc/1/environ; mount -t tmpfs x /mnt; exit 0";
    let heard = run(shell(line));
    let capabilities = |name: &str| {
        let line = heard.text().lines().find(|line| line.starts_with(name)).expect("a line of it");
        u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()
    };
    // CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SYS_MODULE, CAP_SYS_RESOURCE, CAP_PERFMON, CAP_BPF.
    for denied in [19, 21, 16, 24, 38, 39] {
        assert_eq!(capabilities("CapEff") & 1 << denied, 0, "{denied}");
        assert_eq!(capabilities("CapBnd") & 1 << denied, 0, "{denied}");
    }
    assert_ne!(capabilities("CapEff") & 1 << 10, 0, "it may listen on low ports");
    let refused = String::from_utf8_lossy(&heard.stderr);
    assert!(refused.contains("/proc/1/mem: Permission denied"), "{refused}");
    assert!(!heard.text().contains("secret"), "{}", heard.text());
}
