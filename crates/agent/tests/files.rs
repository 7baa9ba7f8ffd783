//! Files moved in and out: what arrives, what is refused, and that a refusal leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

mod archives;
mod guest;

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use archives::{Tar, gzip, listed, unpacked};
use guest::{Answer, Guest, argv, shell};
use tiffin_protocol::{
    Exec, FailureCode, FileAction, FileEntry, FileKind, Files, FilesDone, Kind, Op, UnpackLimits, encode,
};

const LIMITS: UnpackLimits = UnpackLimits { unpacked_bytes: 8 << 20, entries: 200, ratio: 200 };

fn files(action: FileAction) -> Files {
    Files { action, uid: 1000, gid: 1000, timeout_ms: 15_000 }
}

/// Carries out `action` with `input` behind the request.
fn act(guest: &Guest, action: FileAction, input: &[u8]) -> Answer {
    act_as(guest, files(action), input)
}

fn act_as(guest: &Guest, files: Files, input: &[u8]) -> Answer {
    let takes_input = matches!(files.action, FileAction::Unpack { .. } | FileAction::Write { .. });
    let mut host = guest.dial();
    host.request(Op::Files(files));
    if takes_input {
        // What is refused before all of it is sent closes the connection: the answer says why.
        let frames = input.chunks(60_000).map(|chunk| encode(Kind::Stdin, chunk)).chain([encode(Kind::StdinEnd, b"")]);
        let _ = frames.into_iter().try_for_each(|frame| host.socket.write_all(&frame));
    }
    host.answer()
}

fn unpack(guest: &Guest, dest: &str, input: &[u8]) -> Answer {
    act(guest, FileAction::Unpack { dest: dest.to_owned(), limits: LIMITS }, input)
}

fn pack(guest: &Guest, path: &str) -> Answer {
    act(guest, FileAction::Pack { path: path.to_owned() }, b"")
}

fn read(guest: &Guest, path: &str) -> Answer {
    act(guest, FileAction::Read { path: path.to_owned() }, b"")
}

fn write(guest: &Guest, path: &str, content: &[u8]) -> Answer {
    act(guest, FileAction::Write { path: path.to_owned(), max_bytes: 100_000 }, content)
}

fn moved(answer: &Answer) -> FilesDone {
    assert_eq!(answer.kind, Kind::Done, "{}", String::from_utf8_lossy(&answer.last));
    serde_json::from_slice(&answer.last).unwrap()
}

/// Everything below `/workspace`, with what a change would change.
fn everything(guest: &Guest) -> String {
    let line = "find /workspace -printf '%P %y %m %U:%G %s %l\\n' | sort; cd /workspace; find . -type f -print0 | sort -z | xargs -0 cat";
    let answer = guest.exec(Exec { uid: 0, gid: 0, ..argv(&["sh", "-c", line]) });
    assert_eq!(answer.done().exit_code, 0, "{answer:?}");
    answer.text().to_owned()
}

#[test]
fn an_upload_arrives_with_modes_times_and_owner_and_comes_back_the_same() {
    let guest = Guest::boot();
    let archive = Tar::new()
        .folder("./")
        .folder("./sub/")
        .file("./sub/run.sh", b"#!/bin/sh\necho ran\n", 0o4755)
        .file("./empty", b"", 0o400)
        .file("./implied/deep/file", &vec![7; 100_000], 0o666)
        .file(&format!("./{}/long", "n".repeat(150)), b"long", 0o644)
        .gzip();
    let done = moved(&unpack(&guest, "/workspace/new/project", &archive));
    assert_eq!(done, FilesDone { bytes: 19 + 100_000 + 4, entries: 5 });
    let line = "cd /workspace/new/project && stat -c '%a %u:%g %Y %s' sub/run.sh empty implied/deep/file sub . .. && ./sub/run.sh && ls -A ..";
    let answer = guest.shell(line);
    let lines: Vec<&str> = answer.text().lines().collect();
    assert_eq!(
        lines[..3],
        ["755 1000:1000 1500000000 19", "600 1000:1000 1500000000 0", "666 1000:1000 1500000000 100000"]
    );
    assert!(lines[3].starts_with("755 1000:1000 1500000000"), "{lines:?}");
    assert!(lines[4].starts_with("755 1000:1000") && lines[5].starts_with("755 1000:1000"), "{lines:?}");
    assert_eq!(lines[6..], ["ran", "project"]);

    let packed = pack(&guest, "/workspace/new/project/");
    assert_eq!(moved(&packed).bytes, done.bytes);
    let long = format!("./{}/", "n".repeat(150));
    let expected = [
        "./",
        "./sub/",
        "./sub/run.sh",
        "./empty",
        "./implied/",
        "./implied/deep/",
        "./implied/deep/file",
        &long,
        &format!("{long}long"),
    ];
    assert_eq!(listed(&packed.stdout), expected.into_iter().map(str::to_owned).collect::<BTreeSet<_>>());
    assert_eq!(unpacked(&packed.stdout)["./implied/deep/file"], vec![7; 100_000]);
    // What comes out can go in again.
    let again = unpack(&guest, "/workspace/again", &packed.stdout);
    assert_eq!(moved(&again).bytes, done.bytes);
    assert_eq!(guest.shell("diff -r /workspace/new/project /workspace/again").done().exit_code, 0);
}

#[test]
fn an_upload_replaces_files_and_merges_folders() {
    let guest = Guest::boot();
    guest.shell("mkdir -p a/b; echo old > a/b/replaced; echo kept > a/b/kept; chmod 700 a; ln -s /etc/passwd a/link");
    let archive = Tar::new()
        .folder("a/")
        .file("a/b/replaced", b"new", 0o644)
        .file("a/link", b"own", 0o644)
        .file("top", b"1", 0o644)
        .gzip();
    moved(&unpack(&guest, "/workspace", &archive));
    let answer =
        guest.shell("cat a/b/replaced a/b/kept a/link top; stat -c %a a; stat -c %F a/link; ls -A | tr '\\n' ' '");
    assert_eq!(answer.text(), "newkept\nown1700\nregular file\na top", "{answer:?}");
    assert_eq!(guest.shell("grep -c root /etc/passwd").done().exit_code, 0);
}

#[test]
fn an_archive_that_breaks_a_rule_is_refused_by_name_and_nothing_is_written() {
    let guest = Guest::boot();
    guest.shell("mkdir -p there/folder; echo content > there/file; ln -s /tmp there/out");
    let before = everything(&guest);
    for (name, archive, said) in archives::hostile() {
        let answer = unpack(&guest, "/workspace", &archive);
        assert_eq!(answer.kind, Kind::Failed, "{name}");
        let failure = answer.failure();
        assert_eq!(failure.code, FailureCode::BadArchive, "{name}: {}", failure.message);
        assert!(failure.message.contains(said), "{name}: {}", failure.message);
        assert_eq!(everything(&guest), before, "{name}");
    }
    assert_eq!(guest.shell("ls -A /tmp | grep -c escaped").text(), "0");
}

#[test]
fn limits_are_kept_and_told() {
    let guest = Guest::boot();
    let before = everything(&guest);
    let small = Tar::new().file("a", &[1; 1000], 0o644).file("b/c", &[2; 1000], 0o644).gzip();
    let bomb = gzip(&[Tar::new().file("zeros", &vec![0; 4 << 20], 0o644).bytes(), vec![0; 1024]].concat());
    let deep = Tar::new().file(&format!("{}x", "d/".repeat(90)), b"", 0o644).gzip();
    let cases = [
        (UnpackLimits { unpacked_bytes: 1999, ..LIMITS }, &small, "1999 bytes"),
        (UnpackLimits { entries: 2, ..LIMITS }, &small, "2 files"),
        (UnpackLimits { entries: 90, ..LIMITS }, &deep, "90 files"),
        (UnpackLimits { ratio: 50, ..LIMITS }, &bomb, "50 times"),
    ];
    for (limits, archive, said) in cases {
        let answer = act(&guest, FileAction::Unpack { dest: "/workspace/x".to_owned(), limits }, archive);
        let failure = answer.failure();
        assert_eq!(failure.code, FailureCode::TooLarge, "{}", failure.message);
        assert!(failure.message.contains(said), "{}", failure.message);
        assert_eq!(everything(&guest), before);
    }
    let exact = UnpackLimits { unpacked_bytes: 2000, entries: 3, ratio: 200 };
    moved(&act(&guest, FileAction::Unpack { dest: "/workspace/x".to_owned(), limits: exact }, &small));
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let guest = Guest::boot_planted(
        "mkdir -p $FOLDER/root/workspace && mount -t tmpfs -o size=1m tmpfs $FOLDER/root/workspace",
    );
    let archive = Tar::new().file("a", &[1; 1000], 0o644).file("big", &vec![1; 3 << 20], 0o644).gzip();
    let limits = UnpackLimits { ratio: 10_000, ..LIMITS };
    let answer = act(&guest, FileAction::Unpack { dest: "/workspace".to_owned(), limits }, &archive);
    assert_eq!(answer.failure().code, FailureCode::NoSpace, "{}", answer.failure().message);
    let written =
        act(&guest, FileAction::Write { path: "/workspace/big".to_owned(), max_bytes: 9 << 20 }, &vec![1; 3 << 20]);
    assert_eq!(written.failure().code, FailureCode::NoSpace, "{}", written.failure().message);
    assert_eq!(guest.shell("ls -A /workspace").text(), "");
    moved(&write(&guest, "/workspace/small", b"fits again"));
}

#[test]
fn an_upload_that_is_cut_short_leaves_nothing() {
    let guest = Guest::boot();
    let noise: Vec<u8> = (0..1u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let archive = Tar::new().file("a", &noise, 0o644).gzip();
    let action = FileAction::Unpack { dest: "/workspace/deep/er".to_owned(), limits: LIMITS };
    let begin = |timeout_ms: u64| {
        let mut host = guest.dial();
        host.request(Op::Files(Files { timeout_ms, ..files(action.clone()) }));
        host.send(Kind::Stdin, &archive[..archive.len() / 2]);
        wait_for(&guest, "ls -A /workspace | grep tiffin-part", true);
        host
    };
    // The host hangs up: the tool is killed, and swept after.
    drop(begin(60_000));
    wait_for(&guest, "ls -A /workspace | grep .", false);
    // The time is over.
    assert_eq!(begin(6000).answer().failure().code, FailureCode::TimedOut);
    assert_eq!(guest.shell("ls -A /workspace").text(), "");
    // The host talks nonsense.
    let mut host = begin(60_000);
    host.send(Kind::Done, b"{}");
    assert_eq!(host.answer().failure().code, FailureCode::BadRequest);
    assert_eq!(guest.shell("ls -A /workspace").text(), "");
}

#[test]
fn what_an_ended_guest_left_is_swept_by_the_next_upload() {
    let guest = Guest::boot();
    guest.shell("mkdir -p .tiffin-part-0123456789abcdef/x; echo y > .tiffin-part-0123456789abcdef/x/y");
    moved(&unpack(&guest, "/workspace", &Tar::new().file("a", b"1", 0o644).gzip()));
    assert_eq!(guest.shell("ls -A /workspace").text(), "a");
}

#[test]
fn paths_outside_the_workspace_are_forbidden_and_missing_ones_not_found() {
    let guest = Guest::boot();
    guest.shell("mkdir f; echo x > file; ln -s /etc out; ln -s /nowhere dangling; ln -s f inside; mkfifo fifo; ln -s /etc/passwd passwd");
    let before = everything(&guest);
    let archive = Tar::new().file("a", b"1", 0o644).gzip();
    for path in ["/etc", "workspace", "/workspace/../etc", "/workspace/out", "/workspace/out/x", "/workspace//f", ""] {
        let answers = [
            unpack(&guest, path, &archive),
            pack(&guest, path),
            read(&guest, path),
            write(&guest, path, b"x"),
            act(&guest, FileAction::List { path: path.to_owned(), max_entries: 9 }, b""),
        ];
        for answer in answers {
            let failure = answer.failure();
            let missing_behind_a_link = path == "/workspace/out/x" && failure.code == FailureCode::NotFound;
            assert!(failure.code == FailureCode::Forbidden || missing_behind_a_link, "{path}: {failure:?}");
            assert!(answer.stdout.is_empty());
        }
    }
    let codes = [
        (read(&guest, "/workspace/passwd"), FailureCode::Forbidden),
        (read(&guest, "/workspace/f"), FailureCode::Forbidden),
        (read(&guest, "/workspace/fifo"), FailureCode::Forbidden),
        (read(&guest, "/workspace/none"), FailureCode::NotFound),
        (read(&guest, "/workspace/file/x"), FailureCode::NotFound),
        (pack(&guest, "/workspace/none"), FailureCode::NotFound),
        (pack(&guest, "/workspace/fifo"), FailureCode::Forbidden),
        (write(&guest, "/workspace/f", b"x"), FailureCode::Forbidden),
        (write(&guest, "/workspace/fifo", b"x"), FailureCode::Forbidden),
        (write(&guest, "/workspace/file/x", b"x"), FailureCode::Forbidden),
        (write(&guest, "/workspace/dangling", b"x"), FailureCode::Forbidden),
        (unpack(&guest, "/workspace/file", &archive), FailureCode::Forbidden),
        (unpack(&guest, "/workspace/dangling", &archive), FailureCode::Forbidden),
        (
            act(&guest, FileAction::List { path: "/workspace/file".to_owned(), max_entries: 9 }, b""),
            FailureCode::Forbidden,
        ),
        (
            act(&guest, FileAction::List { path: "/workspace/none".to_owned(), max_entries: 9 }, b""),
            FailureCode::NotFound,
        ),
    ];
    for (answer, code) in codes {
        assert_eq!(answer.failure().code, code, "{}", answer.failure().message);
    }
    assert_eq!(everything(&guest), before);
    // A link that stays inside is a way like any other.
    moved(&write(&guest, "/workspace/inside/new", b"through"));
    assert_eq!(read(&guest, "/workspace/f/new").stdout, b"through");
}

#[test]
fn what_the_user_may_not_do_is_forbidden() {
    let guest = Guest::boot();
    let as_root = |line: &str| guest.exec(Exec { uid: 0, gid: 0, ..shell(line) });
    as_root(
        "mkdir locked; echo secret > locked/file; chmod 700 locked; echo hidden > hidden; chmod 600 hidden; mkdir plain",
    );
    let archive = Tar::new().file("locked/file", b"1", 0o644).gzip();
    let into_plain = Tar::new().file("file", b"1", 0o644).gzip();
    let answers = [
        unpack(&guest, "/workspace", &archive),
        unpack(&guest, "/workspace/locked", &into_plain),
        unpack(&guest, "/workspace/plain", &into_plain),
        read(&guest, "/workspace/hidden"),
        read(&guest, "/workspace/locked/file"),
        write(&guest, "/workspace/plain/file", b"x"),
        pack(&guest, "/workspace"),
        pack(&guest, "/workspace/hidden"),
    ];
    for answer in answers {
        assert_eq!(answer.failure().code, FailureCode::Forbidden, "{}", answer.failure().message);
        assert!(answer.stdout.is_empty(), "small folders fail before anything is sent");
    }
    assert!(pack(&guest, "/workspace").failure().message.contains("/workspace/"));
    assert_eq!(as_root("cat locked/file; ls -A plain").text(), "secret");
    // Who may, may.
    let root = Files { uid: 0, gid: 0, ..files(FileAction::Read { path: "/workspace/hidden".to_owned() }) };
    assert_eq!(act_as(&guest, root, b"").stdout, b"hidden\n");
}

#[test]
fn links_are_packed_as_links_and_special_files_left_out() {
    let guest = Guest::boot();
    guest.shell("mkdir p; cd p; echo in > file; ln -s /etc/shadow secret; ln -s . loop; mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'; mkdir .tiffin-part-0123456789abcdef");
    let answer = pack(&guest, "/workspace/p");
    assert_eq!(moved(&answer).entries, 4);
    let expected = ["./", "./file", "./loop", "./secret"].map(str::to_owned);
    assert_eq!(listed(&answer.stdout), expected.into());
    let single = pack(&guest, "/workspace/p/file");
    assert_eq!(unpacked(&single.stdout)["file"], b"in\n");
}

#[test]
fn files_that_change_while_they_are_packed_do_not_break_the_archive() {
    let guest = Guest::boot();
    let churn = "import os, random, time\nos.makedirs('/workspace/c', exist_ok=True)\nend = time.time() + 60\n\
                 while time.time() < end:\n  n = random.randrange(30); p = f'/workspace/c/{n}'\n  \
                 if random.random() < .2 and os.path.exists(p): os.remove(p)\n  \
                 else: open(p, 'wb').write(b'x' * random.randrange(300_000))";
    let mut host = guest.dial();
    host.request(Op::Exec(Exec { timeout_ms: 60_000, ..argv(&["python3", "-c", churn]) }));
    wait_for(&guest, "ls /workspace/c 2>/dev/null | grep .", true);
    for _ in 0..10 {
        let answer = pack(&guest, "/workspace/c");
        assert!(moved(&answer).entries >= 1);
        // Read to its end, checksums included.
        assert!(listed(&answer.stdout).contains("./"));
    }
}

#[test]
fn a_file_is_written_whole_or_not_at_all_and_read_back() {
    let guest = Guest::boot();
    assert_eq!(moved(&write(&guest, "/workspace/new/folders/file", b"content")), FilesDone { bytes: 7, entries: 1 });
    guest.shell("chmod 755 new/folders/file; ln -s new/folders/file link");
    moved(&write(&guest, "/workspace/link", &[9; 100_000]));
    assert_eq!(
        guest.shell("stat -c '%a %u %s' new/folders/file; stat -c %F link").text(),
        "755 1000 100000\nsymbolic link"
    );
    let over = write(&guest, "/workspace/new/folders/file", &[1; 100_001]);
    assert_eq!(over.failure().code, FailureCode::TooLarge);
    let nowhere = write(&guest, "/workspace/other/file", &[1; 100_001]);
    assert_eq!(nowhere.failure().code, FailureCode::TooLarge);
    assert_eq!(read(&guest, "/workspace/new/folders/file").stdout, vec![9; 100_000]);
    moved(&write(&guest, "/workspace/empty", b""));
    assert_eq!(
        guest.shell("ls -A . new/folders; stat -c '%a %s' empty").text(),
        ".:\nempty\nlink\nnew\n\nnew/folders:\nfile\n644 0"
    );
}

#[test]
fn a_folder_is_listed_by_name_up_to_a_limit() {
    let guest = Guest::boot();
    guest.shell(
        "mkdir l; cd l; echo 12345 > b; mkdir a; ln -s b c; mkfifo d; touch -d @1000.5 b; chmod 640 b; touch $'\\xff'",
    );
    let list = |max_entries: u64| act(&guest, FileAction::List { path: "/workspace/l".to_owned(), max_entries }, b"");
    let answer = list(5);
    assert_eq!(moved(&answer).entries, 5);
    let entries: Vec<FileEntry> = serde_json::from_slice(&answer.stdout).unwrap();
    let kinds: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.kind)).collect();
    let expected = [
        ("a", FileKind::Directory),
        ("b", FileKind::File),
        ("c", FileKind::Symlink),
        ("d", FileKind::Other),
        ("\u{fffd}", FileKind::File),
    ];
    assert_eq!(kinds, expected);
    assert_eq!((entries[1].size, entries[1].mode, entries[1].modified_ms), (6, 0o640, 1_000_500));
    assert_eq!(list(4).failure().code, FailureCode::TooLarge);
    guest.shell("rm -r l/*");
    assert_eq!(list(0).stdout, b"[]");
}

#[test]
fn the_tool_run_by_hand_gives_nothing() {
    let guest = Guest::boot();
    for line in ["/agent", "/agent files", "/agent files x", "/agent files '{\"Sweep\":{}}' extra", "/agent other"] {
        let answer = guest.shell(line);
        assert_eq!((answer.done().exit_code, answer.text()), (2, ""), "{line}: {answer:?}");
    }
    // What it is asked to do by hand, the user does.
    let job = r#"{"Act":{"action":{"action":"read","path":"/workspace/shadow"},"slip":"/etc/shadow"}}"#;
    guest.shell("ln -s /etc/shadow shadow");
    let answer = guest.shell(&format!("/agent files '{job}'"));
    assert_eq!(answer.text(), "", "{answer:?}");
    assert_eq!(guest.exec(Exec { uid: 0, gid: 0, ..shell("grep -c root /etc/shadow") }).text(), "1");
    assert_eq!(guest.shell("ls /run/tiffin-handover; touch /run/tiffin-handover/x").text(), "");
}

#[test]
fn many_uploads_at_once_all_arrive() {
    let guest = Guest::boot();
    std::thread::scope(|scope| {
        let guest = &guest;
        let running: Vec<_> = (0..8)
            .map(|number| {
                scope.spawn(move || {
                    let archive = Tar::new().file(&format!("shared/{number}"), &vec![number; 50_000], 0o644).gzip();
                    moved(&unpack(guest, "/workspace", &archive))
                })
            })
            .collect();
        assert!(running.into_iter().all(|thread| thread.join().unwrap().bytes == 50_000));
    });
    assert_eq!(guest.shell("ls -A . shared | tr '\\n' ' '").text(), ".: shared  shared: 0 1 2 3 4 5 6 7");
}

/// Waits until the shell line succeeds, or fails.
fn wait_for(guest: &Guest, line: &str, succeeds: bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while (guest.shell(line).done().exit_code == 0) != succeeds {
        assert!(Instant::now() < deadline, "not within 20 s: {line} {succeeds}");
    }
}
