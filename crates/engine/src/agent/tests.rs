use std::collections::BTreeMap;

use proptest::prelude::*;
use tiffin_protocol::{
    Exec, ExecDone, FailureCode, FileAction, Files, FilesDone, HEADER, Request, Runtime, Script, Source, TerminalSize,
    decode_header, encode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

fn exec_request() -> Exec {
    Exec {
        command: tiffin_protocol::Command::Shell("true".into()),
        cwd: "/".into(),
        env: Default::default(),
        image_env: Default::default(),
        uid: 1000,
        gid: 1000,
        timeout_ms: 1000,
        stdout_cap: 10,
        stderr_cap: 10,
        stdin: false,
        terminal: None,
    }
}

/// A guest that answers any exec with `bytes`, whatever they are.
async fn against(bytes: Vec<u8>) -> (ExecStream, DuplexStream) {
    let (host, mut guest) = tokio::io::duplex(4 * 1024 * 1024);
    guest.write_all(&bytes).await.unwrap();
    (exec(Box::pin(host), "token", exec_request()).await.unwrap(), guest)
}

#[tokio::test]
async fn output_beyond_the_cap_is_the_agents_fault() {
    let mut bytes = encode(Kind::Stdout, b"0123456789");
    bytes.extend(encode(Kind::Stdout, b"x"));
    let (mut stream, _guest) = against(bytes).await;
    assert!(matches!(stream.next().await, Ok(ExecItem::Stdout(out)) if out == b"0123456789"));
    assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));
}

#[tokio::test]
async fn a_frame_that_claims_gigabytes_is_refused_unallocated() {
    let (mut stream, _guest) = against(vec![0xff, 0xff, 0xff, 0xff, 4]).await;
    assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));
}

#[tokio::test]
async fn frames_out_of_place_and_broken_json_are_refused() {
    for bytes in [
        encode(Kind::Request, b"{}"),
        encode(Kind::Event, b"{}"),
        encode(Kind::Stdout, b""),
        encode(Kind::Done, b"[]"),
        encode(Kind::Failed, b"\xff"),
        encode(Kind::Done, &vec![b' '; MAX_ANSWER + 1]),
    ] {
        let (mut stream, _guest) = against(bytes).await;
        assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));
    }
}

#[tokio::test]
async fn a_guest_that_hangs_up_is_lost() {
    let (mut stream, guest) = against(vec![0, 0]).await;
    drop(guest);
    assert!(matches!(stream.next().await, Err(AgentError::Lost(_))));
}

#[tokio::test]
async fn a_silent_guest_times_out() {
    let (host, _guest) = tokio::io::duplex(1024);
    let answer = ping(Box::pin(host), "token", Duration::from_millis(20)).await;
    assert!(matches!(answer, Err(AgentError::TimedOut)));
}

fn done() -> ExecDone {
    ExecDone { exit_code: 0, timed_out: false, stdout_truncated: false, stderr_truncated: false, duration_us: 1 }
}

fn script_request(source: Source) -> Script {
    Script {
        runtime: Runtime::Deno,
        source,
        args: vec![],
        env: BTreeMap::new(),
        image_env: BTreeMap::new(),
        flags: vec![],
        network: false,
        uid: 1000,
        gid: 1000,
        timeout_ms: 1000,
        stdout_cap: 10,
        stderr_cap: 10,
        result_cap: 10,
    }
}

fn files_request(action: FileAction) -> Files {
    Files { action, uid: 1000, gid: 1000, timeout_ms: 1000 }
}

/// The next frame that the host sent.
async fn sent(guest: &mut DuplexStream) -> (Kind, Vec<u8>) {
    let mut header = [0; HEADER];
    guest.read_exact(&mut header).await.unwrap();
    let mut frame = vec![0; decode_header(header).unwrap()];
    guest.read_exact(&mut frame).await.unwrap();
    (Kind::from_byte(frame[0]).unwrap(), frame[1..].to_vec())
}

#[tokio::test]
async fn giving_up_waiting_in_the_middle_of_a_frame_loses_nothing() {
    let mut bytes = encode(Kind::Stdout, b"01234");
    bytes.extend(encode(Kind::Done, &frames::to_json(&done())));
    let (mut stream, mut guest) = against(vec![]).await;
    let mut items = Vec::new();
    for byte in bytes {
        guest.write_all(&[byte]).await.unwrap();
        // One poll, and away with it.
        tokio::select! {
            biased;
            item = stream.next() => items.push(item.unwrap()),
            () = std::future::ready(()) => {}
        }
    }
    assert!(matches!(&items[..], [ExecItem::Stdout(out), ExecItem::Done(_)] if out == b"01234"), "{items:?}");
}

#[tokio::test]
async fn what_is_read_is_what_is_asked_for_and_the_rest_waits_in_the_guest() {
    let (host, mut guest) = tokio::io::duplex(1024);
    let mut exec_all = exec_request();
    exec_all.stdout_cap = u64::MAX;
    let mut stream = exec(Box::pin(host), "token", exec_all).await.unwrap();
    sent(&mut guest).await;
    let frame = encode(Kind::Stdout, &[b'x'; 600]);
    guest.write_all(&frame).await.unwrap();
    let second = guest.write_all(&frame);
    tokio::pin!(second);
    assert!(futures_pending(second.as_mut()).await, "the pipe is full and nobody reads");
    assert!(matches!(stream.next().await, Ok(ExecItem::Stdout(out)) if out.len() == 600));
    second.await.unwrap();
}

async fn futures_pending<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
    tokio::select! {
        biased;
        _ = future => false,
        () = std::future::ready(()) => true,
    }
}

#[tokio::test]
async fn a_terminal_is_written_resized_and_read_at_once() {
    let (host, mut guest) = tokio::io::duplex(1024);
    let (mut input, mut output) = exec(Box::pin(host), "token", exec_request()).await.unwrap().split();
    sent(&mut guest).await;
    let writing = async {
        // More than the pipe holds: it takes the guest's reading, while the guest writes too.
        input.write(&[b'a'; 200_000]).await.unwrap();
        input.resize(TerminalSize { columns: 132, rows: 50 }).await.unwrap();
        input.end().await.unwrap();
    };
    let reading = async { output.next().await.unwrap() };
    let guest = async {
        guest.write_all(&encode(Kind::Stdout, b"hi")).await.unwrap();
        let mut typed = 0;
        loop {
            match sent(&mut guest).await {
                (Kind::Stdin, bytes) => typed += bytes.len(),
                (Kind::Resize, size) => assert_eq!(size, br#"{"columns":132,"rows":50}"#),
                (Kind::StdinEnd, _) => return typed,
                (kind, _) => panic!("{kind:?}"),
            }
        }
    };
    let ((), item, typed) = tokio::join!(writing, reading, guest);
    assert!(matches!(item, ExecItem::Stdout(out) if out == b"hi"));
    assert_eq!(typed, 200_000);
}

#[tokio::test]
async fn a_program_goes_in_while_output_comes_out_and_its_result_is_kept() {
    let (host, mut guest) = tokio::io::duplex(1024);
    let text: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    let mut stream = script(Box::pin(host), "t", script_request(Source::Inline), text.clone()).await.unwrap();
    let guest = async {
        let (kind, request) = sent(&mut guest).await;
        let request: Request = serde_json::from_slice(&request).unwrap();
        assert!(matches!((kind, request.op), (Kind::Request, Op::Script(_))));
        let mut program = Vec::new();
        for n in 0.. {
            // It talks before it has read all.
            if n < 3 {
                guest.write_all(&encode(Kind::Stdout, b"x")).await.unwrap();
            }
            match sent(&mut guest).await {
                (Kind::Stdin, bytes) => program.extend(bytes),
                (Kind::StdinEnd, _) => break,
                (kind, _) => panic!("{kind:?}"),
            }
        }
        for frame in [encode(Kind::Result, b"{\"re"), encode(Kind::Result, b"s\":"), encode(Kind::Stderr, b"y")] {
            guest.write_all(&frame).await.unwrap();
        }
        guest.write_all(&encode(Kind::Done, &frames::to_json(&done()))).await.unwrap();
        program
    };
    let host = async {
        let mut items = 0;
        while !matches!(stream.next().await.unwrap(), ExecItem::Done(_)) {
            items += 1;
        }
        items
    };
    let (program, items) = tokio::join!(guest, host);
    assert!(program == text);
    assert_eq!(items, 4);
    assert_eq!(stream.take_result().as_deref(), Some(b"{\"res\":".as_slice()));
}

#[tokio::test]
async fn a_script_that_is_refused_before_its_program_was_read_says_why() {
    let (host, mut guest) = tokio::io::duplex(1024);
    let program = vec![b' '; 500_000];
    let mut stream = script(Box::pin(host), "t", script_request(Source::Inline), program).await.unwrap();
    let failure = Failure { code: FailureCode::BadCommand, message: "no deno".into() };
    guest.write_all(&encode(Kind::Failed, &frames::to_json(&failure))).await.unwrap();
    assert!(matches!(stream.next().await, Err(AgentError::Refused(refused)) if refused == failure));
}

#[tokio::test]
async fn a_result_beyond_its_cap_or_from_a_command_is_the_agents_fault() {
    let (host, mut guest) = tokio::io::duplex(1024);
    let request = script_request(Source::Path("/workspace/a.ts".into()));
    let mut stream = script(Box::pin(host), "t", request, vec![]).await.unwrap();
    guest.write_all(&encode(Kind::Result, b"0123456789")).await.unwrap();
    guest.write_all(&encode(Kind::Result, b"0")).await.unwrap();
    assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));

    for bytes in [encode(Kind::Result, b"1"), encode(Kind::Result, b"")] {
        let (mut stream, _guest) = against(bytes).await;
        assert!(matches!(stream.next().await, Err(AgentError::Protocol(_))));
    }
}

#[tokio::test]
async fn files_come_out_up_to_the_callers_cap() {
    let (host, mut guest) = tokio::io::duplex(1024);
    let read = files_request(FileAction::Read { path: "/workspace/a".into() });
    let (_input, mut output) = files(Box::pin(host), "t", read.clone(), 10).await.unwrap();
    let end = encode(Kind::Done, &frames::to_json(&FilesDone { bytes: 10, entries: 1 }));
    guest.write_all(&encode(Kind::Stdout, b"0123456789")).await.unwrap();
    guest.write_all(&end).await.unwrap();
    assert!(matches!(output.next().await, Ok(FilesItem::Bytes(bytes)) if bytes == b"0123456789"));
    assert!(matches!(output.next().await, Ok(FilesItem::Done(done)) if done.bytes == 10));

    let (host, mut guest) = tokio::io::duplex(1024);
    let (_input, mut output) = files(Box::pin(host), "t", read, 9).await.unwrap();
    guest.write_all(&encode(Kind::Stdout, b"0123456789")).await.unwrap();
    assert!(matches!(output.next().await, Err(AgentError::OutputTooLarge)));
}

#[tokio::test]
async fn files_that_answer_with_anything_else_are_refused() {
    for bytes in [encode(Kind::Stderr, b"x"), encode(Kind::Stdout, b""), encode(Kind::Result, b"x")] {
        let (host, mut guest) = tokio::io::duplex(1024);
        let read = files_request(FileAction::Pack { path: "/workspace".into() });
        let (_input, mut output) = files(Box::pin(host), "t", read, 100).await.unwrap();
        guest.write_all(&bytes).await.unwrap();
        assert!(matches!(output.next().await, Err(AgentError::Protocol(_))));
    }
}

#[tokio::test]
async fn a_request_that_fits_into_no_frame_is_refused_before_it_is_sent() {
    let (host, _guest) = tokio::io::duplex(1024);
    let mut request = exec_request();
    request.env = BTreeMap::from([("A".to_owned(), "\u{1}".repeat(200_000))]);
    assert!(matches!(exec(Box::pin(host), "t", request).await, Err(AgentError::RequestTooLarge)));
}

proptest! {
    #[test]
    fn no_bytes_from_a_guest_panic_or_are_taken_for_more_than_they_are(bytes: Vec<u8>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut stream, guest) = against(bytes).await;
            drop(guest);
            let mut taken = 0;
            while let Ok(ExecItem::Stdout(out) | ExecItem::Stderr(out)) = stream.next().await {
                taken += out.len();
            }
            assert!(taken <= 20);
        });
    }
}
