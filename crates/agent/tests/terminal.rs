//! Commands with a terminal.

mod guest;

use std::collections::BTreeMap;
use std::io::Write;

use guest::{Guest, Host, argv, shell};
use tiffin_protocol::{Exec, FailureCode, Kind, Op, TerminalSize, encode};

fn terminal(exec: Exec) -> Exec {
    Exec { stdin: true, terminal: Some(TerminalSize { columns: 80, rows: 24 }), ..exec }
}

fn begin(guest: &Guest, line: &str) -> Host {
    let mut host = guest.dial();
    host.request(Op::Exec(terminal(shell(line))));
    host
}

fn resize(columns: u16, rows: u16) -> Vec<u8> {
    let json = format!(r#"{{"columns":{columns},"rows":{rows}}}"#);
    encode(Kind::Resize, json.as_bytes())
}

/// Reads output until it has `wanted`.
fn expect(host: &mut Host, wanted: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        match host.frame() {
            Some((Kind::Stdout, bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} after {seen:?}, before {wanted:?}"),
        }
    }
    seen
}

#[test]
fn all_streams_are_a_terminal_of_the_users_own_and_its_exit_code_is_told() {
    let guest = Guest::boot();
    let line = "for n in 0 1 2; do test -t $n || echo $n is none; done; stty size; echo $TERM; echo err >&2; \
        stat -c %u $(tty); ps -o tty=,tpgid= -p $$ | tr -s ' ' | cut -d' ' -f1 | grep -c pts; : > /dev/tty && exit 7";
    let answer = guest.exec(terminal(shell(line)));
    assert_eq!(answer.text(), "24 80\r\nxterm-256color\r\nerr\r\n1000\r\n1", "{answer:?}");
    assert_eq!((answer.stderr.len(), answer.done().exit_code), (0, 7));
    let env = BTreeMap::from([("TERM".to_owned(), "vt100".to_owned())]);
    assert_eq!(guest.exec(terminal(Exec { env, ..shell("echo $TERM") })).text(), "vt100");
    let status = guest.exec(terminal(argv(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])));
    assert!(status.text().lines().all(|line| line.trim_end().ends_with("0000000000000000")), "{status:?}");
}

#[test]
fn what_is_typed_is_echoed_and_read() {
    let guest = Guest::boot();
    let mut host = begin(&guest, "echo name?; read name; echo hello $name");
    expect(&mut host, "name?");
    host.send(Kind::Stdin, b"you\n");
    assert_eq!(host.answer().text(), "you\r\nhello you");
}

#[test]
fn a_new_size_is_seen_and_signalled() {
    let guest = Guest::boot();
    // Not by a trap of bash's: it loses a signal that comes while it runs the trap for the one before.
    let line = "import os, signal, time\n\
        tell = lambda *_: os.write(1, b'%d %d\\n' % os.get_terminal_size())\n\
        signal.signal(signal.SIGWINCH, tell)\n\
        os.write(1, b'ready\\n')\n\
        while True: time.sleep(0.02)";
    let mut host = guest.dial();
    host.request(Op::Exec(terminal(argv(&["python3", "-c", line]))));
    expect(&mut host, "ready");
    host.socket.write_all(&[resize(90, 30), resize(120, 50)].concat()).unwrap();
    expect(&mut host, "120 50");
    host.socket.write_all(&resize(1000, 1)).unwrap();
    expect(&mut host, "1000 1");
}

#[test]
fn control_c_interrupts_and_the_signal_is_told() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    host.request(Op::Exec(terminal(argv(&["sleep", "4321"]))));
    guest.wait_for_count("sleep\x004321", 1);
    host.send(Kind::Stdin, b"\x03");
    assert_eq!(host.answer().done().exit_code, 130);
    assert_eq!(guest.count("sleep\x004321"), 0);
}

#[test]
fn an_interactive_shell_has_job_control() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    host.request(Op::Exec(terminal(argv(&["bash", "--norc", "--noediting", "-i"]))));
    host.send(Kind::Stdin, b"PS1=; echo $((40 + 2)); set -o | grep monitor\n");
    let seen = expect(&mut host, "on\r\n");
    assert!(seen.contains("42\r\n") && !seen.contains("no job control"), "{seen}");
    host.send(Kind::Stdin, b"sleep 4321\n");
    guest.wait_for_count("sleep\x004321", 1);
    host.send(Kind::Stdin, b"\x1a");
    expect(&mut host, "Stopped");
    // A shell that hasn't seen it end yet warns once.
    host.send(Kind::Stdin, b"kill -KILL %1\nexit 5\nexit 5\n");
    let answer = host.answer();
    assert_eq!(answer.done().exit_code, 5, "{}", answer.text());
}

#[test]
fn the_end_of_input_is_typed_and_a_size_may_still_come() {
    let guest = Guest::boot();
    let mut host = begin(&guest, "stty -echo; echo on; cat; echo ended; read x; echo $?; stty size");
    expect(&mut host, "on");
    host.send(Kind::Stdin, b"line\n");
    expect(&mut host, "line");
    host.send(Kind::StdinEnd, b"");
    expect(&mut host, "ended");
    host.socket.write_all(&resize(70, 20)).unwrap();
    // It is one key, not an end for good: whoever reads on waits.
    guest.wait_for_count("stty -echo", 1);
    drop(host);
    guest.wait_for_count("stty -echo", 0);
}

#[test]
fn a_host_that_hangs_up_takes_the_terminals_command_with_it() {
    let guest = Guest::boot();
    let mut host = begin(&guest, "trap '' HUP TERM INT; setsid -f sleep 4321; echo on; sleep 4321; sleep 4321");
    expect(&mut host, "on");
    drop(host);
    guest.wait_for_count("sleep\x004321", 0);
}

#[test]
fn the_time_limit_holds_and_what_it_said_before_is_told() {
    let guest = Guest::boot();
    let answer = guest.exec(Exec { timeout_ms: 500, ..terminal(shell("echo on; sleep 4321")) });
    assert_eq!((answer.text(), answer.done().exit_code, answer.done().timed_out), ("on", -1, true));
}

#[test]
fn much_output_arrives_whole_and_is_cut_exactly_at_its_cap() {
    let guest = Guest::boot();
    let answer = guest.exec(terminal(argv(&["seq", "100000"])));
    let expected: String = (1..=100_000).map(|number| format!("{number}\r\n")).collect();
    assert!(answer.stdout == expected.as_bytes(), "{} bytes", answer.stdout.len());
    let cut = guest.exec(Exec { stdout_cap: 10, ..terminal(argv(&["seq", "100000"])) });
    assert_eq!((cut.stdout.as_slice(), cut.done().stdout_truncated), (&b"1\r\n2\r\n3\r\n4"[..], true));
}

#[test]
fn much_input_arrives_whole_in_raw_mode() {
    let guest = Guest::boot();
    let mut host = begin(&guest, "stty raw -echo; echo on; head -c 500000");
    expect(&mut host, "on");
    let input: Vec<u8> = (0..500_000u32).map(|i| (i * 7 % 256) as u8).collect();
    let mut writer = host.socket.try_clone().unwrap();
    let sent = input.clone();
    let feeding = std::thread::spawn(move || {
        for part in sent.chunks(30_000) {
            writer.write_all(&encode(Kind::Stdin, part)).unwrap();
        }
    });
    let answer = host.answer();
    feeding.join().unwrap();
    assert!(answer.stdout == input, "{} bytes", answer.stdout.len());
}

#[test]
fn a_background_process_does_not_hold_up_the_answer() {
    let guest = Guest::boot();
    let answer = guest.exec(terminal(shell("setsid -f sleep 4321; echo started")));
    assert_eq!(answer.text(), "started");
    assert_eq!(guest.count("sleep\x004321"), 1);
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_runs() {
    let guest = Guest::boot();
    let sized = |columns, rows| Exec { terminal: Some(TerminalSize { columns, rows }), ..terminal(shell("true")) };
    let unread = Exec { stdin: false, ..terminal(shell("true")) };
    for (exec, word) in [(sized(0, 24), "columns"), (sized(80, 1001), "rows"), (unread, "stdin")] {
        let failure = guest.exec(exec).failure();
        assert_eq!(failure.code, FailureCode::BadRequest);
        assert!(failure.message.contains(word), "{failure:?}");
    }
    for exec in [terminal(argv(&["sleep", "4321"])), Exec { stdin: true, ..argv(&["sleep", "4321"]) }] {
        let mut host = guest.dial();
        host.request(Op::Exec(exec));
        guest.wait_for_count("sleep\x004321", 1);
        // Too large for the one, and of no meaning for the other.
        host.socket.write_all(&resize(80, 1001)).unwrap();
        assert_eq!(host.answer().failure().code, FailureCode::BadRequest);
        assert_eq!(guest.count("sleep\x004321"), 0);
    }
    assert_eq!(
        guest.exec(terminal(Exec { cwd: "/missing".to_owned(), ..shell("true") })).failure().code,
        FailureCode::BadCwd
    );
}
