//! How commands and the guest are ended: by time, by the host, by shutdown; and that bounds hold.

mod guest;

use std::time::{Duration, Instant};

use guest::{Guest, MAX_PIDS, argv, shell};
use tiffin_protocol::{Exec, Kind, Op, Pong, Shutdown};

/// Leaves the session, loses its parent, ignores what can be ignored, and holds the output open.
const STUBBORN: &str = "trap '' TERM HUP INT; sleep 4321 & setsid sleep 4321 & (setsid setsid -f sleep 4321 &) ; \
    setsid -f sh -c 'trap \"\" TERM; setsid -f sleep 4321; sleep 4321'; ";
const MARK: &str = "sleep\x004321";

#[test]
fn the_time_limit_ends_everything_that_the_command_started() {
    let guest = Guest::boot();
    let begun = Instant::now();
    let answer = guest.exec(Exec { timeout_ms: 700, ..shell(&format!("{STUBBORN} echo on; wait; sleep 4321")) });
    let done = answer.done();
    assert_eq!((answer.text(), done.exit_code, done.timed_out), ("on", -1, true));
    assert!((700..5000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    assert_eq!(guest.count(MARK), 0);
}

#[test]
fn the_time_limit_spares_what_another_command_left_running() {
    let guest = Guest::boot();
    guest.shell("sleep 5555 > /dev/null 2>&1 &").done();
    let limited = guest.exec(Exec { timeout_ms: 200, ..argv(&["sleep", "4321"]) });
    assert!(limited.done().timed_out);
    assert_eq!((guest.count(MARK), guest.count("sleep\x005555")), (0, 1));
}

#[test]
fn a_command_that_forks_without_end_ends_at_its_time_limit() {
    let guest = Guest::boot();
    let bomb = Exec { timeout_ms: 1000, ..shell("bomb() { bomb | bomb & }; bomb; sleep 60") };
    assert!(guest.exec(bomb).done().timed_out);
    assert_eq!(guest.shell("echo alive").text(), "alive");
    let pong: Pong = serde_json::from_slice(&guest.ask(Op::Ping).last).unwrap();
    assert_eq!(pong.processes, 0);
}

#[test]
fn commands_together_have_no_more_processes_than_allowed() {
    let guest = Guest::boot();
    let line = "import os, time\nn = 0\ntry:\n  while n < 500:\n    if os.fork() == 0: time.sleep(60); os._exit(0)\n    n += 1\nexcept OSError: pass\nprint(n)";
    let forked: u32 = guest.exec(argv(&["python3", "-c", line])).text().parse().unwrap();
    assert!((MAX_PIDS - 5..=MAX_PIDS).contains(&forked), "{forked}");
    let again: u32 = guest.exec(argv(&["python3", "-c", line])).text().parse().unwrap();
    assert!(again <= 1, "{again}");
}

#[test]
fn a_host_that_goes_away_takes_the_command_with_it() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    host.request(Op::Exec(shell(&format!("{STUBBORN} echo on; wait; sleep 4321"))));
    assert_eq!(host.frame(), Some((Kind::Stdout, b"on\n".to_vec())));
    assert_ne!(guest.count(MARK), 0);
    drop(host);
    guest.wait_for_count(MARK, 0);
}

#[test]
fn a_host_that_goes_away_is_noticed_behind_input_that_nobody_reads() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    host.request(Op::Exec(Exec { stdin: true, ..argv(&["sleep", "4321"]) }));
    for _ in 0..4 {
        host.send(Kind::Stdin, &[1; 60_000]);
    }
    guest.wait_for_count(MARK, 1);
    drop(host);
    guest.wait_for_count(MARK, 0);
}

#[test]
fn a_host_that_reads_nothing_holds_up_the_command_not_its_time_limit() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    let endless = Exec { timeout_ms: 1500, stdout_cap: u64::MAX, ..argv(&["yes", "4321"]) };
    host.request(Op::Exec(endless));
    guest.wait_for_count("yes\x004321", 1);
    guest.wait_for_count("yes\x004321", 0);
    let answer = host.answer();
    assert!(answer.done().timed_out);
    assert!(answer.stdout.len() > 100_000, "{} bytes", answer.stdout.len());
}

#[test]
fn shutdown_lets_processes_end_in_their_own_time() {
    let mut guest = Guest::boot();
    let tidy = "trap 'echo tidy > /dev/shm/tiffin-test; exit' TERM; while :; do sleep 0.05; done";
    let begun = Instant::now();
    guest.shell(&format!("({tidy}) > /dev/null 2>&1 & (sleep 4321) > /dev/null 2>&1 &")).done();
    let answer = guest.ask(Op::Shutdown(Shutdown { grace_ms: 10_000 }));
    assert_eq!((answer.kind, answer.last.as_slice()), (Kind::Done, &b"{}"[..]));
    assert_eq!(guest.wait_for_end().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(guest.count(MARK), 0);
}

#[test]
fn shutdown_ends_the_stubborn_after_the_grace() {
    let mut guest = Guest::boot();
    guest.shell("(trap '' TERM; while :; do sleep 4321; done) > /dev/null 2>&1 & sleep 0.2").done();
    let begun = Instant::now();
    let answer = guest.ask(Op::Shutdown(Shutdown { grace_ms: 400 }));
    assert_eq!(answer.kind, Kind::Done);
    assert!((400..5000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    assert_eq!(guest.wait_for_end().code(), Some(0));
}
