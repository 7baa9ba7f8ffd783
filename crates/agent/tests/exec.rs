//! Commands: what they get, what they give, and how they end by themselves.

mod guest;

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use guest::{Guest, argv, shell};
use tiffin_protocol::{Exec, FailureCode, Kind, Op, encode};

#[test]
fn output_exit_codes_and_signals_are_told() {
    let guest = Guest::boot();
    let both = guest.shell("echo out; echo err >&2; exit 7");
    assert_eq!((both.text(), both.stderr.as_slice(), both.done().exit_code), ("out", &b"err\n"[..], 7));
    assert!(!both.done().timed_out && !both.done().stdout_truncated);
    assert_eq!(guest.shell("kill -9 $$").done().exit_code, 137);
    // A real-time signal, which has no name.
    assert_eq!(guest.shell("kill -40 $$").done().exit_code, 168);
    let slept = guest.exec(argv(&["sleep", "0.2"])).done();
    assert!((200_000..2_000_000).contains(&slept.duration_us), "{slept:?}");
}

#[test]
fn commands_run_as_their_user_with_nothing_of_the_agents() {
    let guest = Guest::boot();
    let answer = guest.shell(
        "id -u; id -G; pwd; umask; nproc; hostname; ls /proc/self/fd | wc -l; ps -o sid= -p $$ | tr -d ' '; echo $$",
    );
    let lines: Vec<&str> = answer.text().lines().collect();
    assert_eq!(lines[..7], ["1000", "1000", "/workspace", "0022", "1", "box", "4"], "{answer:?}");
    assert_eq!(lines[7], lines[8], "leads its own session");
    let status = guest.exec(argv(&["grep", "-E", "^Sig(Blk|Ign)|^Groups|^CapEff", "/proc/self/status"]));
    for line in status.text().lines() {
        let value = line.split(':').nth(1).unwrap().trim();
        assert!(value.is_empty() || value.bytes().all(|byte| byte == b'0'), "{line}");
    }
    let hidden = guest.shell(
        "cat /proc/1/environ /proc/1/mem /proc/1/maps; ls /proc/1/fd /run/tiffin-agent; tr '\\0' ' ' < /proc/1/cmdline",
    );
    assert_eq!(hidden.text(), "/agent");
    assert_eq!(hidden.stderr.windows(17).filter(|words| words == b"Permission denied").count(), 5, "{hidden:?}");
}

#[test]
fn the_environment_is_the_base_overridden_by_the_requests() {
    let guest = Guest::boot();
    let env = BTreeMap::from([("TERM".to_owned(), "xterm".to_owned()), ("A b".to_owned(), "c\nd".to_owned())]);
    let answer = guest.exec(Exec { env, uid: 0, gid: 0, ..argv(&["env"]) });
    for line in ["TERM=xterm", "A b=c", "d", "HOME=/root", "USER=root", "LOGNAME=root"] {
        assert!(answer.text().lines().any(|found| found == line), "{line} in {}", answer.text());
    }
    assert!(answer.text().contains("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
    let bare = guest.exec(Exec { env: BTreeMap::from([("A=B".to_owned(), String::new())]), ..argv(&["env"]) });
    assert_eq!(bare.failure().code, FailureCode::BadRequest);
}

#[test]
fn the_images_environment_lies_beneath_the_requests_and_its_path_outlives_the_profile() {
    let guest = Guest::boot_planted(
        "printf 'PATH=/nowhere\\nFROM_PROFILE=1\\nexport PATH FROM_PROFILE\\n' > $FOLDER/root/etc/profile; mkdir $FOLDER/root/own; \
         printf '#!/bin/sh\\necho found\\n' > $FOLDER/root/own/tool; chmod 755 $FOLDER/root/own/tool; ",
    );
    let env = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let path = "/own:/it's here:/usr/bin:/bin";
    let image_env = env(&[("PATH", path), ("A", "image"), ("B", "image")]);
    let with = |exec: Exec| Exec { image_env: image_env.clone(), env: env(&[("B", "request")]), ..exec };
    let line = "tool; echo $PATH $A $B $FROM_PROFILE; no-such-command; shopt -q login_shell && echo login";
    let answer = guest.exec(with(shell(line)));
    assert_eq!(answer.text(), format!("found\n{path} image request 1\nlogin"), "{answer:?}");
    assert!(String::from_utf8_lossy(&answer.stderr).contains("line 1: no-such-command"), "{answer:?}");
    assert_eq!(guest.exec(with(argv(&["tool"]))).text(), "found");
    // A request's own wins, and nothing of an image means the profile as it is.
    let own = Exec { env: env(&[("PATH", "/usr/bin:/own")]), ..with(shell("echo $PATH")) };
    assert_eq!(guest.exec(own).text(), "/usr/bin:/own");
    assert_eq!(guest.exec(shell("echo $PATH")).text(), "/nowhere");
}

#[test]
fn what_can_not_start_says_why() {
    let guest = Guest::boot();
    let cases = [
        (Exec { cwd: "/missing".to_owned(), ..shell("true") }, FailureCode::BadCwd),
        (Exec { cwd: "/etc/passwd".to_owned(), ..shell("true") }, FailureCode::BadCwd),
        (argv(&["no-such-program"]), FailureCode::BadCommand),
        (argv(&["/etc/passwd"]), FailureCode::BadCommand),
        (argv(&["/missing/program"]), FailureCode::BadCommand),
        (argv(&[""]), FailureCode::BadCommand),
        (argv(&[]), FailureCode::BadRequest),
    ];
    for (exec, code) in cases {
        let said = format!("{exec:?}");
        assert_eq!(guest.exec(exec).failure().code, code, "{said}");
    }
    assert_eq!(guest.shell("echo alive").text(), "alive");
}

#[test]
fn caps_are_exact_and_the_command_is_not_held_up() {
    let guest = Guest::boot();
    let capped = Exec { stdout_cap: 1000, stderr_cap: 3, ..shell("head -c 500000 /dev/zero; echo -n abcd >&2") };
    let answer = guest.exec(capped);
    assert_eq!((answer.stdout.len(), answer.stderr.as_slice()), (1000, &b"abc"[..]));
    assert!(answer.done().stdout_truncated && answer.done().stderr_truncated);
    assert_eq!(answer.done().exit_code, 0);
    let whole = guest.exec(Exec { stdout_cap: 1000, stderr_cap: 0, ..shell("head -c 1000 /dev/zero") });
    assert_eq!(whole.stdout.len(), 1000);
    assert!(!whole.done().stdout_truncated && !whole.done().stderr_truncated);
}

#[test]
fn megabytes_of_binary_output_arrive_unchanged() {
    let guest = Guest::boot();
    let line = "import sys; sys.stdout.buffer.write(bytes(i * 7 % 256 for i in range(3_000_000)))";
    let answer = guest.exec(Exec { stdout_cap: 4 << 20, ..argv(&["python3", "-c", line]) });
    let expected: Vec<u8> = (0..3_000_000u64).map(|i| (i * 7 % 256) as u8).collect();
    assert!(answer.stdout == expected, "{} bytes", answer.stdout.len());
}

#[test]
fn megabytes_of_input_come_back_from_cat() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    let input: Vec<u8> = (0..5_000_000u64).map(|i| (i * 11 % 251) as u8).collect();
    host.request(Op::Exec(Exec { stdin: true, stdout_cap: 8 << 20, ..argv(&["cat"]) }));
    let mut writer = host.socket.try_clone().unwrap();
    let sent = input.clone();
    let feeding = std::thread::spawn(move || {
        for part in sent.chunks(70_000) {
            writer.write_all(&encode(Kind::Stdin, part)).unwrap();
        }
        writer.write_all(&encode(Kind::StdinEnd, b"")).unwrap();
    });
    let answer = host.answer();
    feeding.join().unwrap();
    assert!(answer.stdout == input, "{} bytes", answer.stdout.len());
    assert_eq!(answer.done().exit_code, 0);
}

#[test]
fn input_that_nobody_reads_neither_harms_nor_hangs() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    let go_on = format!("/tmp/tiffin-go-on-{}", std::process::id());
    let wait = format!("exec 0<&-; echo closed; until [ -e {go_on} ]; do sleep 0.05; done");
    host.request(Op::Exec(Exec { stdin: true, ..shell(&wait) }));
    for _ in 0..100 {
        host.send(Kind::Stdin, &[7; 60_000]);
    }
    guest.shell(&format!("touch {go_on}"));
    assert_eq!(host.answer().text(), "closed");
    assert_eq!(guest.exec(argv(&["cat"])).stdout, b"", "without input it is empty");
}

#[test]
fn output_streams_as_it_comes() {
    let guest = Guest::boot();
    let mut host = guest.dial();
    host.request(Op::Exec(Exec { stdin: true, ..shell("echo first; read line; echo second $line") }));
    assert_eq!(host.frame(), Some((Kind::Stdout, b"first\n".to_vec())));
    host.send(Kind::Stdin, b"go\n");
    assert_eq!(host.answer().text(), "second go");
}

#[test]
fn a_background_process_lives_on_and_does_not_hold_up_the_answer() {
    let guest = Guest::boot();
    let begun = Instant::now();
    let answer = guest.shell("sleep 1234 & echo started");
    assert_eq!(answer.text(), "started");
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(guest.count("sleep\x001234"), 1);
    assert_eq!(guest.shell("echo again").text(), "again");
    assert_eq!(guest.count("sleep\x001234"), 1);
}

#[test]
fn many_commands_at_once_all_get_their_own_answers() {
    let guest = Guest::boot();
    std::thread::scope(|scope| {
        let guest = &guest;
        let running: Vec<_> = (0..12)
            .map(|number| {
                scope.spawn(move || {
                    (0..10)
                        .all(|_| guest.exec(argv(&["sh", "-c", &format!("exit {number}")])).done().exit_code == number)
                })
            })
            .collect();
        assert!(running.into_iter().all(|thread| thread.join().unwrap()));
    });
}
