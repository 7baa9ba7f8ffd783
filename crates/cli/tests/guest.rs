//! What the agent does, in a real VM: what depends on the guest's kernel, and is tested on Linux in `crates/agent/tests`.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Host, on_both_engines, sh, shell};
use tiffin_engine::{
    Engine, Target,
    agent::{self, AgentError, ExecItem, ExecOutput, Input},
};
use tiffin_protocol::{Boot, Exec, FailureCode, Renew, TerminalSize};
use tiffin_types::{id::VmId, vm::EngineName};

const LIMIT: Duration = Duration::from_secs(30);

on_both_engines!(
    a_command_can_have_a_terminal_that_is_typed_at_resized_and_interrupted,
    an_interactive_shell_behaves_as_behind_a_login,
    a_guest_becomes_another_and_its_old_token_opens_nothing,
    a_shell_that_has_waited_does_as_one_that_is_started_for_its_line,
);

async fn begin(host: &Host, id: &VmId, exec: Exec) -> (Input, ExecOutput) {
    let connection = host.engine.dial(id, Target::Agent).await.unwrap();
    let token = host.engine.agent_token(id).await.unwrap();
    agent::exec(connection, &token, exec).await.unwrap().split()
}

fn terminal(line: &str) -> Exec {
    Exec { stdin: true, terminal: Some(TerminalSize { columns: 80, rows: 24 }), ..shell(line) }
}

/// Reads output until it has `wanted`; all that was read.
async fn expect(stream: &mut (Input, ExecOutput), wanted: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        match tokio::time::timeout(LIMIT, stream.1.next()).await {
            Ok(Ok(ExecItem::Stdout(bytes))) => seen.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} after {seen:?}, before {wanted:?}"),
        }
    }
    seen
}

/// The rest of the output, and the exit code.
async fn finish(stream: &mut (Input, ExecOutput)) -> (String, i32) {
    let mut seen = String::new();
    loop {
        match tokio::time::timeout(LIMIT, stream.1.next()).await {
            Ok(Ok(ExecItem::Stdout(bytes))) => seen.push_str(&String::from_utf8_lossy(&bytes)),
            Ok(Ok(ExecItem::Done(done))) => return (seen, done.exit_code),
            other => panic!("{other:?} after {seen:?}"),
        }
    }
}

async fn a_command_can_have_a_terminal_that_is_typed_at_resized_and_interrupted(engine: EngineName) {
    let host = Host::with(engine).await;
    let id = host.running().await;
    let line = "for n in 0 1 2; do test -t $n || echo $n is none; done; stty size; echo $TERM; : > $(tty) && exit 7";
    let said = finish(&mut begin(&host, &id, terminal(line)).await).await;
    assert_eq!(said, ("24 80\r\nxterm-256color\r\n".to_owned(), 7));

    let mut typed = begin(&host, &id, terminal("echo name?; read name; echo hello $name")).await;
    expect(&mut typed, "name?\r\n").await;
    typed.0.write(b"you\n").await.unwrap();
    assert_eq!(finish(&mut typed).await.0.trim(), "you\r\nhello you");

    let line = "import os, signal, time\ntell = lambda *_: os.write(1, b'%d %d\\n' % os.get_terminal_size())\n\
        signal.signal(signal.SIGWINCH, tell)\nos.write(1, b'ready\\n')\nwhile True: time.sleep(0.02)";
    let mut resized = begin(&host, &id, terminal(&format!("exec python3 -c \"{line}\""))).await;
    expect(&mut resized, "ready").await;
    for (columns, rows) in [(120, 50), (1000, 1)] {
        resized.0.resize(TerminalSize { columns, rows }).await.unwrap();
        expect(&mut resized, &format!("{columns} {rows}")).await;
    }
    resized.0.write(b"\x03").await.unwrap();
    assert_eq!(finish(&mut resized).await.1, 130);

    let mut ended = begin(&host, &id, terminal("cat; echo ended")).await;
    ended.0.write(b"line\n").await.unwrap();
    expect(&mut ended, "line").await;
    ended.0.end().await.unwrap();
    assert!(finish(&mut ended).await.0.ends_with("ended\r\n"));

    let mut gone = begin(&host, &id, terminal("trap '' HUP TERM; echo on; sleep 4321; sleep 4321")).await;
    expect(&mut gone, "on").await;
    drop(gone);
    harness::eventually("the command is gone with its host", async || {
        sh(&*host.engine, &id, "pgrep -c sleep").await.stdout == "0\n"
    })
    .await;

    let expected: String = (1..=20_000).map(|number| format!("{number}\r\n")).collect();
    assert!(finish(&mut begin(&host, &id, terminal("seq 20000")).await).await.0 == expected);
    host.engine.destroy(&id).await.unwrap();
}

async fn an_interactive_shell_behaves_as_behind_a_login(engine: EngineName) {
    let host = Host::with(engine).await;
    let id = host.running().await;
    let mut login = begin(&host, &id, terminal("exec bash --norc -i")).await;
    login.0.write(b"PS1=; echo $((40 + 2)); set -o | grep monitor\n").await.unwrap();
    let seen = expect(&mut login, "on\r\n").await;
    assert!(seen.contains("42\r\n") && !seen.contains("no job control"), "{seen}");
    login.0.write(b"sleep 4321\n").await.unwrap();
    harness::eventually("it sleeps", async || sh(&*host.engine, &id, "pgrep -c sleep").await.stdout == "1\n").await;
    login.0.write(b"\x1a").await.unwrap();
    expect(&mut login, "Stopped").await;
    login.0.write(b"kill -KILL %1\nexit 5\nexit 5\n").await.unwrap();
    assert_eq!(finish(&mut login).await.1, 5);
    host.engine.destroy(&id).await.unwrap();
}

async fn a_guest_becomes_another_and_its_old_token_opens_nothing(engine: EngineName) {
    let host = Host::with(engine).await;
    let id = host.running().await;
    let token = host.engine.agent_token(&id).await.unwrap();
    let machine_id = "00112233445566778899aabbccddeeff";
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let renew = Renew {
        boot: Boot {
            token: "another".to_owned(),
            hostname: "clone".to_owned(),
            addresses: vec!["172.16.0.2".to_owned()],
            resolvers: vec!["172.16.0.1".to_owned()],
            cpus: 1,
            max_pids: 100,
            link: None,
        },
        machine_id: Some(machine_id.to_owned()),
        unix_ms: i64::try_from(since_epoch.as_millis()).unwrap(),
        seed: "0123456789abcdef".to_owned(),
    };
    for token in [token.as_str(), "another"] {
        let connection = host.engine.dial(&id, Target::Agent).await.unwrap();
        let pong = agent::renew(connection, token, renew.clone(), LIMIT).await.unwrap();
        assert!((pong.unix_ms - renew.unix_ms).abs() < 30_000, "{pong:?}");
    }
    let connection = host.engine.dial(&id, Target::Agent).await.unwrap();
    let refused = agent::ping(connection, &token, LIMIT).await;
    assert!(matches!(refused, Err(AgentError::Refused(why)) if why.code == FailureCode::Unauthorized));
    let connection = host.engine.dial(&id, Target::Agent).await.unwrap();
    let line = "hostname; cat /etc/machine-id /etc/resolv.conf; grep -c clone /etc/hosts";
    let mut found = agent::exec(connection, "another", shell(line)).await.unwrap().split();
    assert_eq!(finish(&mut found).await.0, format!("clone\n{machine_id}\nnameserver 172.16.0.1\n1\n"));
    host.engine.destroy(&id).await.unwrap();
}

/// What differs from one process to the next: numbers of more than one digit.
fn steady(text: &str) -> String {
    let mut steady = String::new();
    for part in text.split_inclusive(|sign: char| !sign.is_ascii_digit()) {
        let digits = part.trim_end_matches(|sign: char| !sign.is_ascii_digit());
        steady.push_str(if digits.len() > 1 { "N" } else { digits });
        steady.push_str(&part[digits.len()..]);
    }
    steady
}

async fn a_shell_that_has_waited_does_as_one_that_is_started_for_its_line(engine: EngineName) {
    let host = Host::with(engine).await;
    let id = host.running().await;
    // Bash lists this variable of its own once it has been set, as it is when a shell has waited.
    let how = "set | grep -c ^LINENO=";
    harness::eventually("a shell has waited", async || sh(&*host.engine, &id, how).await.stdout == "1\n").await;
    for line in [
        "echo $0 $# $- $LINENO $? $_ ${PIPESTATUS[*]} $PWD $OLDPWD $SHLVL $((SECONDS < 20))",
        "env",
        "set | grep -v '^LINENO=\\|^SECONDS='",
        "set -o; shopt; ulimit -a; umask; trap; alias; jobs",
        "ls /proc/$$/fd",
        "ps -o pgid=,sid= -p $$ | tr -s ' ' '\\n' | sort -u | wc -l",
        "grep -E '^(Cap|Uid|Gid|Groups|NoNewPrivs)' /proc/self/status",
        "echo )",
        "echo \"unclosed",
        "\nnope\nnope2 $LINENO",
        "cat <<E\n$LINENO\nE",
        "trap 'echo bye $LINENO' EXIT; exit 5",
        "set -e; false; echo not reached",
        "kill -9 $$",
        "sh -c 'kill -9 $$'; echo after",
        "sleep 0.01 & wait $!; echo $?",
        "exec echo hi",
        "python3 -c 'import os; print(os.getpgrp() == os.getpid(), os.getppid())'",
        "true | false | true; echo ${PIPESTATUS[*]}",
    ] {
        let waited = sh(&*host.engine, &id, line).await;
        // One with input is started for its line.
        let (mut input, mut output) = begin(&host, &id, Exec { stdin: true, ..shell(line) }).await;
        input.end().await.unwrap();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = loop {
            match output.next().await.unwrap() {
                ExecItem::Stdout(bytes) => stdout.extend(bytes),
                ExecItem::Stderr(bytes) => stderr.extend(bytes),
                ExecItem::Done(done) => break done.exit_code,
            }
        };
        let told = |bytes: &[u8]| steady(&String::from_utf8_lossy(bytes));
        let (one, other) = (
            (waited.done.exit_code, steady(&waited.stdout), steady(&waited.stderr)),
            (code, told(&stdout), told(&stderr)),
        );
        assert_eq!(one, other, "{line}");
    }
    host.engine.destroy(&id).await.unwrap();
}
