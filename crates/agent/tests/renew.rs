//! Becoming another guest: what changes, what must not, and who is let in afterwards.

mod guest;

use std::time::{SystemTime, UNIX_EPOCH};

use guest::{Answer, Guest, TOKEN, argv, shell};
use tiffin_protocol::{Boot, Exec, FailureCode, Kind, Op, Pong, Renew};

const FRESH: &str = "another secret of this test";
const ID: &str = "00112233445566778899aabbccddeeff";

fn now_ms() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    i64::try_from(since_epoch.as_millis()).expect("it is before the year 292 million")
}

fn renew(address: &str) -> Renew {
    Renew {
        boot: Boot {
            token: FRESH.to_owned(),
            hostname: "clone".to_owned(),
            addresses: vec![address.to_owned()],
            resolvers: vec!["8.8.4.4".to_owned()],
            cpus: 1,
            max_pids: guest::MAX_PIDS,
            link: None,
        },
        machine_id: Some(ID.to_owned()),
        unix_ms: now_ms(),
        seed: "00ff".repeat(16),
    }
}

fn ask_as(guest: &Guest, token: &str, op: Op) -> Answer {
    let mut host = guest.dial();
    host.request_as(token, op);
    host.answer()
}

fn root(line: &str) -> Op {
    Op::Exec(Exec { uid: 0, gid: 0, ..shell(line) })
}

#[test]
fn the_guest_has_a_new_identity_and_the_old_token_opens_nothing() {
    let guest = Guest::boot_planted(
        "cd $FOLDER/root; mkdir -p var/lib/dbus; rm -f etc/machine-id var/lib/dbus/machine-id; echo old > var/lib/dbus/machine-id",
    );
    // Again with the new token, as after a lost answer: all stays as it is.
    for token in [TOKEN, FRESH] {
        let answer = ask_as(&guest, token, Op::Renew(renew(guest::ADDRESS)));
        assert_eq!(answer.kind, Kind::Done, "{}", String::from_utf8_lossy(&answer.last));
        let pong: Pong = serde_json::from_slice(&answer.last).unwrap();
        assert!((now_ms() - pong.unix_ms).abs() < 10_000, "{pong:?}");
        let line = "hostname; cat /etc/hostname /etc/resolv.conf /etc/machine-id /var/lib/dbus/machine-id; \
            grep clone /etc/hosts; stat -c %a /etc/machine-id /etc/hosts; ls -A /etc | grep -c tiffin";
        let found = ask_as(&guest, FRESH, root(line));
        let expected = format!("clone\nclone\nnameserver 8.8.4.4\n{ID}\n{ID}\n{}\tclone\n444\n644\n0", guest::ADDRESS);
        assert_eq!(found.text(), expected, "{found:?}");
        assert_eq!(ask_as(&guest, TOKEN, Op::Ping).failure().code, FailureCode::Unauthorized);
        assert_eq!(ask_as(&guest, TOKEN, root("true")).failure().code, FailureCode::Unauthorized);
    }
}

#[test]
fn links_that_the_guest_planted_are_replaced_or_left_never_followed() {
    let guest = Guest::boot_planted(
        "cd $FOLDER/root; echo kept > planted; mkdir -p var/lib odd; rm -rf var/lib/dbus etc/machine-id; \
         echo kept > odd/machine-id; ln -s /odd var/lib/dbus; ln -s /planted etc/machine-id",
    );
    let broken = "rm /etc/hosts /etc/resolv.conf; ln -s /planted /etc/hosts; mkdir /etc/resolv.conf";
    ask_as(&guest, TOKEN, root(broken)).done();
    assert_eq!(ask_as(&guest, TOKEN, Op::Renew(renew(guest::ADDRESS))).kind, Kind::Done);
    let found = ask_as(&guest, FRESH, root("cat /planted /odd/machine-id /etc/machine-id; grep -c clone /etc/hosts"));
    assert_eq!(found.text(), format!("kept\nkept\n{ID}\n1"), "{found:?}");
}

#[test]
fn connections_from_the_new_own_addresses_are_closed_and_the_hosts_are_not() {
    let guest = Guest::boot();
    assert_eq!(ask_as(&guest, TOKEN, Op::Renew(renew("172.16.9.9"))).kind, Kind::Done);
    guest.add_address("172.16.9.9/32");
    let line = "import socket\n\
        for own in ['172.16.9.9', '172.16.0.2', '127.0.0.1']:\n\
        \x20 s = socket.create_connection(('172.16.0.2', 1), 5, (own, 0)); s.settimeout(5)\n\
        \x20 try: print(s.recv(9))\n\
        \x20 except ConnectionResetError: print(b'')";
    let answer = ask_as(&guest, FRESH, Op::Exec(Exec { uid: 0, gid: 0, ..argv(&["python3", "-c", line]) }));
    assert_eq!(answer.text(), "b''\nb''\nb''", "{answer:?}");
    assert_eq!(ask_as(&guest, FRESH, Op::Ping).kind, Kind::Done);
}

#[test]
fn a_renewal_that_makes_no_sense_changes_nothing() {
    let guest = Guest::boot();
    let mut nameless = renew(guest::ADDRESS);
    nameless.boot.hostname = "a b".to_owned();
    let odd = Renew { seed: "xyz".to_owned(), ..renew(guest::ADDRESS) };
    for (field, renew) in [("hostname", nameless), ("seed", odd)] {
        let failure = guest.ask(Op::Renew(renew)).failure();
        assert_eq!(failure.code, FailureCode::BadRequest);
        assert!(failure.message.starts_with(field), "{failure:?}");
    }
    assert_eq!(guest.shell("hostname").text(), "box");
    assert_eq!(ask_as(&guest, FRESH, Op::Renew(renew(guest::ADDRESS))).failure().code, FailureCode::Unauthorized);
}

#[test]
fn what_runs_goes_on_but_for_commands_of_the_callers_that_the_guest_had_before() {
    let guest = Guest::boot();
    guest.shell("setsid sleep 1234 > /dev/null 2>&1 &").done();
    let mut command = guest.dial();
    command.request(Op::Exec(Exec { stdin: true, ..shell("echo before; read line; echo $line; exec sleep 2345") }));
    assert_eq!(command.frame(), Some((Kind::Stdout, b"before\n".to_vec())));
    let mut silent = guest.dial();
    // A change of policy is nothing to whoever is connected.
    let same = Renew {
        machine_id: None,
        boot: Boot { token: TOKEN.to_owned(), ..renew(guest::ADDRESS).boot },
        ..renew(guest::ADDRESS)
    };
    assert_eq!(ask_as(&guest, TOKEN, Op::Renew(same)).kind, Kind::Done);
    command.send(Kind::Stdin, b"after\n");
    assert_eq!(command.frame(), Some((Kind::Stdout, b"after\n".to_vec())));

    assert_eq!(ask_as(&guest, TOKEN, Op::Renew(renew(guest::ADDRESS))).kind, Kind::Done);
    assert_eq!((command.frame(), silent.frame()), (None, None), "the callers of the guest that it was");
    let line = "until ! pgrep -xf 'sleep 2345' > /dev/null; do sleep 0.05; done; pgrep -cxf 'sleep 1234'";
    assert_eq!(
        ask_as(&guest, FRESH, root(line)).text(),
        "1",
        "nobody's commands end, what is in the background goes on"
    );

    // The same request again, as after a lost answer, is nothing to the callers that it has now.
    let mut command = guest.dial();
    command.request_as(FRESH, Op::Exec(Exec { stdin: true, ..shell("echo before; read line; echo $line") }));
    assert_eq!(command.frame(), Some((Kind::Stdout, b"before\n".to_vec())));
    assert_eq!(ask_as(&guest, FRESH, Op::Renew(renew(guest::ADDRESS))).kind, Kind::Done);
    command.send(Kind::Stdin, b"after\n");
    assert_eq!(command.answer().text(), "after");
}

#[test]
fn a_clock_that_the_kernel_does_not_let_be_set_is_told_as_it_is() {
    let guest = Guest::boot();
    let answer = guest.ask(Op::Renew(Renew { unix_ms: 1_000, ..renew(guest::ADDRESS) }));
    let pong: Pong = serde_json::from_slice(&answer.last).unwrap();
    assert!((now_ms() - pong.unix_ms).abs() < 10_000, "{pong:?}");
}
