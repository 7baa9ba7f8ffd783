//! How the agent comes up: a guest set up, or a clear word on why not.

mod guest;

use std::process::{Command, Stdio};

use guest::{Guest, MAX_PIDS, argv, shell};
use tiffin_protocol::{Event, Exec};

/// Users of their own: where a guest has no process groups, its user's processes are counted over the whole machine,
/// those of tests beside it included.
const ODD: u32 = 63_001;
const UNGROUPED: u32 = 63_002;

#[test]
fn the_guest_is_set_up_and_planted_links_are_not_followed() {
    let guest = Guest::boot_planted(
        "cd $FOLDER/root; echo kept > planted; for name in resolv.conf hosts hostname; do rm -f etc/$name; ln -s /planted etc/$name; done",
    );
    let answer = guest.shell("cat /etc/hostname /etc/resolv.conf /planted; grep box /etc/hosts; stat -c '%u %a' /workspace /tmp; find /etc -maxdepth 1 -name 'resolv.conf' -type f");
    let expected = "box\nnameserver 9.9.9.9\nkept\n172.16.0.2\tbox\n1000 755\n0 1777\n/etc/resolv.conf";
    assert_eq!(answer.text(), expected, "{answer:?}");
}

#[test]
fn an_odd_root_does_not_keep_the_agent_down() {
    let guest = Guest::boot_planted(
        "cd $FOLDER/root; rm -rf workspace run; mkdir elsewhere; ln -s /elsewhere workspace; mv etc odd; ln -s odd etc; echo > run",
    );
    let answer = guest.exec(Exec {
        cwd: "/".to_owned(),
        uid: ODD,
        ..shell("stat -c '%u' /elsewhere; ls /odd/.tiffin-agent.new; echo alive")
    });
    assert_eq!(answer.text(), "0\nalive", "{answer:?}");
}

#[test]
fn without_process_groups_commands_are_still_bounded_and_ended() {
    let guest = Guest::boot_planted("rm -rf $FOLDER/root/run; echo > $FOLDER/root/run");
    let line = "sleep 4321 & setsid sleep 4321 & sh -c 'setsid sleep 4321; true' & wait";
    let done = guest.exec(Exec { timeout_ms: 700, uid: UNGROUPED, ..shell(line) }).done();
    assert_eq!((done.exit_code, done.timed_out), (-1, true));
    assert_eq!(guest.count("sleep\x004321"), 0);
    let bomb = "import os, time\nn = 0\ntry:\n  while n < 500:\n    if os.fork() == 0: time.sleep(60); os._exit(0)\n    n += 1\nexcept OSError: pass\nprint(n)";
    let forked: u32 = guest.exec(Exec { uid: UNGROUPED, ..argv(&["python3", "-c", bomb]) }).text().parse().unwrap();
    assert!(forked <= MAX_PIDS, "{forked}");
}

#[test]
fn a_boot_line_that_is_none_is_told_and_ends_the_agent() {
    for line in [&b"{}\n"[..], b"\xff\n", &[b'x'; 70_000]] {
        let (mut guest, event) = Guest::start("true", line);
        assert!(matches!(event, Event::Failed { .. }), "{event:?}");
        assert_eq!(guest.wait_for_end().code(), Some(1));
    }
}

#[test]
fn it_refuses_to_run_as_anything_but_process_1() {
    let agent = Command::new(env!("CARGO_BIN_EXE_tiffin-agent")).stdin(Stdio::null()).output().unwrap();
    assert_eq!(agent.status.code(), Some(2));
    assert!(agent.stdout.is_empty());
}
