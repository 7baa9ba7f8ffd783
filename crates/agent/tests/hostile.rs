//! Who may not talk to the agent, and what may be said to it: anything, without harm.

mod guest;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use guest::{Guest, argv, shell};
use tiffin_protocol::{Exec, FailureCode, Kind, Op, encode};

#[test]
fn a_wrong_token_is_refused_and_nothing_runs() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    host.request_as("a wrong secret", Op::Exec(shell("touch /workspace/ran")));
    assert_eq!(host.answer().failure().code, FailureCode::Unauthorized);
    assert_eq!(host.frame(), None, "then it is closed");
    assert_ne!(guest.exec(argv(&["test", "-e", "/workspace/ran"])).done().exit_code, 0);
}

#[test]
fn hostile_bytes_are_answered_or_dropped_and_the_agent_lives() {
    let guest = Guest::boot();
    let oversized = [&u32::MAX.to_be_bytes()[..], &[1; 100]].concat();
    let hostile: [Vec<u8>; 8] = [
        oversized,
        vec![0, 0, 0, 0],
        vec![0, 0, 0, 1, 99],
        encode(Kind::Stdin, b"no request"),
        encode(Kind::Request, b"{"),
        encode(Kind::Request, &[0xff; 1000]),
        encode(Kind::Request, &vec![b'['; (1 << 20) - 1]),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ];
    for bytes in hostile {
        let mut host = guest.dial();
        // The agent may have closed before it has read everything.
        let _ = host.socket.write_all(&bytes);
        if let Some((kind, _)) = host.frame() {
            assert_eq!(kind, Kind::Failed, "{:?}", &bytes[..bytes.len().min(20)]);
        }
    }
    // A frame that never gets whole, and a connection that says nothing: closed by the host.
    for part in [&encode(Kind::Request, b"{}")[..4], &[]] {
        guest.dial().socket.write_all(part).unwrap();
    }
    assert_eq!(guest.shell("echo alive").text(), "alive");
}

#[test]
fn a_broken_input_frame_ends_the_command() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    host.request(Op::Exec(Exec { stdin: true, ..argv(&["sleep", "4321"]) }));
    guest.wait_for_count("sleep\x004321", 1);
    host.send(Kind::Done, b"{}");
    assert_eq!(host.answer().failure().code, FailureCode::BadRequest);
    assert_eq!(guest.count("sleep\x004321"), 0);
}

#[test]
fn the_guest_itself_is_not_served() {
    let guest = Guest::boot();
    for address in ["127.0.0.1", "172.16.0.2", "::1"] {
        let line = format!(
            "import socket; s = socket.create_connection(('{address}', 1), 5); s.settimeout(5); print(s.recv(9))"
        );
        let answer = guest.exec(argv(&["python3", "-c", &line]));
        let reset = String::from_utf8_lossy(&answer.stderr).contains("ConnectionReset");
        assert!(answer.text() == "b''" || reset, "{address}: {answer:?}");
    }
}

#[test]
fn connections_beyond_the_bound_are_closed_and_the_agent_serves_again() {
    let guest = Guest::boot();
    let mut open: Vec<_> = (0..64).map(|_| guest.dial()).collect();
    let mut beyond = guest.dial();
    assert_eq!(beyond.socket.read(&mut [0; 1]).unwrap_or(0), 0, "closed at once");
    open[63].request(Op::Ping);
    assert_eq!(open[63].answer().kind, Kind::Done);
    drop(open);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut host = guest.dial();
        // Until the agent has seen the others close, it may still close this one, even while it is being written to.
        let request = serde_json::to_vec(&tiffin_protocol::Request { token: guest::TOKEN.to_owned(), op: Op::Ping });
        let sent = host.socket.write_all(&encode(Kind::Request, &request.unwrap()));
        if sent.is_ok() && host.frame().is_some_and(|(kind, _)| kind == Kind::Done) {
            break;
        }
        assert!(Instant::now() < deadline, "not served again");
    }
}

#[test]
fn a_silent_connection_is_closed_after_ten_seconds() {
    let guest = Guest::boot();
    let begun = Instant::now();
    let mut host = guest.dial();
    assert_eq!(host.answer().failure().code, FailureCode::BadRequest);
    assert!((9..15).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
}
