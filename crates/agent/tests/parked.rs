//! A shell that waits for its command: nothing tells it from one that is started for it, and it is not used where
//! something could.

mod guest;

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use guest::{Answer, Guest, MAX_PIDS, argv, shell};
use tiffin_protocol::{Boot, Exec, Kind, Op, Pong, Renew, Shutdown};

/// In the arguments of a shell that waits.
const WAITS: &str = "read -ru9";

/// Shows how it was started: bash lists a variable of its own once it has been set, and this one is when it has waited.
const HOW: &str = "set | grep -c ^LINENO=";
const WAITED: &str = "1";
const AFRESH: &str = "0";

/// The default image's profile, and nothing else that a login shell reads.
const LIKE_THE_IMAGE: &str = concat!(
    "cp ",
    env!("CARGO_MANIFEST_DIR"),
    "/../image/recipe/profile $FOLDER/root/etc/profile; rm -rf $FOLDER/root/etc/profile.d; ",
    "mkdir $FOLDER/root/etc/profile.d; rm -rf $FOLDER/root/workspace; sed -i /:1000:1000:/d $FOLDER/root/etc/passwd; ",
    "echo user:x:1000:1000::/workspace:/bin/bash >> $FOLDER/root/etc/passwd; "
);

fn with_parking() -> Guest {
    Guest::boot_planted(LIKE_THE_IMAGE)
}

/// Where a part of the profile does nothing, but might.
fn without_parking() -> Guest {
    Guest::boot_planted(&format!("{LIKE_THE_IMAGE} echo : > $FOLDER/root/etc/profile.d/odd.sh"))
}

/// A guest of that name, otherwise as it was booted, and no new machine.
fn renew_of(hostname: &str, resolvers: Vec<String>) -> Renew {
    let boot = Boot {
        token: guest::TOKEN.to_owned(),
        hostname: hostname.to_owned(),
        addresses: vec![guest::ADDRESS.to_owned()],
        resolvers,
        cpus: 1,
        max_pids: MAX_PIDS,
        link: None,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    let unix_ms = i64::try_from(now.as_millis()).expect("it is before the year 292 million");
    Renew { boot, machine_id: None, unix_ms, seed: String::new() }
}

/// Runs `line` in a shell that has waited for it.
fn waited(guest: &Guest, line: &str) -> Answer {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        guest.wait_for_count(WAITS, 1);
        let waiting = guest.pids(WAITS);
        let answer = guest.shell(line);
        if guest.pids(WAITS) != waiting {
            return answer;
        }
        assert!(Instant::now() < deadline, "the shell that waits isn't used for {line:?}");
    }
}

/// Runs `line` until it says `wanted`, where a shell of no use may still be on its way.
fn in_the_end(guest: &Guest, line: &str, wanted: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while waited(guest, line).text() != wanted {
        assert!(Instant::now() < deadline, "{line:?} doesn't say {wanted:?}");
    }
}

/// What may differ from one process to the next: numbers of more than one digit.
fn steady(output: &[u8]) -> String {
    let text: String = output.iter().map(|byte| char::from(*byte)).collect();
    let mut steady = String::new();
    let mut digits = String::new();
    for sign in text.chars().chain(['\0']) {
        if sign.is_ascii_digit() {
            digits.push(sign);
            continue;
        }
        steady.push_str(if digits.len() > 1 { "N" } else { &digits });
        digits.clear();
        steady.push(sign);
    }
    steady
}

const LINES: &[&str] = &[
    "",
    " ",
    "\n",
    "true",
    "false",
    "/bin/true",
    "/bin/false",
    "exit 3",
    "exit 256",
    "echo hi",
    "echo hi >&2",
    "echo $0 $# $- \"$@\" $LINENO $? $_ ${PIPESTATUS[*]}",
    "echo $?; false; echo $?; (exit 9); echo $?",
    "echo $_; : a b; echo $_",
    "echo 'single' \"double $((6*7))\" $'ansi\\tc' back\\\\slash",
    "echo äöü €; printf '\\xff\\xfe' | od -c",
    "echo $PATH $HOME $USER $LOGNAME $SHELL $TERM $LC_CTYPE $PWD $OLDPWD $SHLVL $IFS",
    "echo $SECONDS $UID $EUID $GROUPS $PPID $BASH $BASH_VERSION $HOSTNAME $HOSTTYPE $COLUMNS $LINES",
    "echo $$ $BASHPID $BASH_SUBSHELL; (echo $BASH_SUBSHELL); bash -c 'echo $SHLVL'",
    "echo \"$BASH_EXECUTION_STRING\"; echo ${#BASH_EXECUTION_STRING}; declare -p BASH_EXECUTION_STRING",
    "echo ${BASH_SOURCE[@]} ${FUNCNAME[@]} ${BASH_LINENO[@]} ${BASH_ARGV[@]} ${BASH_ARGC[@]}; caller",
    "env",
    "env -0 | sort -z | od -c | head -50",
    "set | grep -v '^LINENO=\\|^SECONDS='",
    "declare -p | grep -v ' LINENO\\| SECONDS\\| RANDOM\\| SRANDOM\\| EPOCH'",
    "declare -F; declare -f; alias; trap; jobs; hash; dirs; umask; umask -S",
    "set -o; shopt",
    "ulimit -a",
    "ls -l /proc/self/fd | wc -l; ls /proc/$$/fd",
    "readlink /proc/self/fd/0 /proc/$$/fd/0; [ -p /proc/$$/fd/1 ] && echo pipe; [ -t 0 ] || echo none",
    "ps -o pgid=,sid=,ppid= -p $$ | tr -s ' ' '\\n' | sort -u | wc -l; ps -o tty= -p $$",
    "grep -E '^(Sig[PBIC]|Cap|Uid|Gid|Groups|NoNewPrivs|Seccomp|TracerPid|Threads|Cpus_allowed)' /proc/self/status",
    "grep -E '^(Sig[PBIC]|Uid|Gid|TracerPid|Cpus_allowed)' /proc/$$/status",
    "read x; echo \"$? <$x>\"",
    "cat; echo $?",
    "cat <<E\n$LINENO \"quoted\" $((1+1))\nE\necho after $LINENO",
    "cat <<'E' | tr a-z A-Z\nhere $x\nE",
    "cat <<-E\n\ttabs\n\tE",
    "cat <<E\nnever ended",
    "cat <<< here-string",
    "echo a; echo b; echo $LINENO",
    "\n\necho $LINENO\nnope\n\nnope2 $LINENO",
    "# a comment\necho $LINENO # and another",
    "f() { echo $LINENO ${FUNCNAME[0]} ${BASH_LINENO[@]}; caller 0; return 4; }\nf; echo $?",
    "function g { local x=1; declare -p x; }; g; declare -F",
    "echo )",
    "echo \"unclosed",
    "echo 'unclosed",
    "if true",
    "if x\nfi",
    "for i in a b; do echo $i; done; done",
    "echo $(",
    "echo `",
    "case x in",
    "((1+)); echo $?",
    "echo ${x!}",
    "echo ok; echo )",
    "echo ok\necho )",
    "nope",
    "nope; echo $?",
    "./nope",
    "/etc/passwd",
    "/",
    "exec nope",
    "exec echo hi",
    "exec 3>&1; echo to three >&3; ls /proc/self/fd | wc -l",
    "exec 9>&1; echo to nine >&9",
    "echo x >&9",
    "set -e; false; echo not reached",
    "set -eu; echo $unset; echo not reached",
    "set -o pipefail; false | true; echo $?",
    "set -x; echo traced; x=1",
    "set -v; echo one\necho two",
    "set -n; echo not run",
    "set -- a b c; echo $# $2; shift; echo $1",
    "trap 'echo bye $? $LINENO' EXIT; exit 5",
    "trap 'echo bye' EXIT; /bin/true",
    "trap 'echo err $LINENO' ERR; false; echo on",
    "trap 'echo debug $BASH_COMMAND' DEBUG; echo x; x=2",
    "trap 'echo term' TERM; kill $$; echo on",
    "trap '' INT; grep SigIgn /proc/self/status; trap -p",
    "kill -9 $$",
    "kill -TERM $$",
    "kill -INT $$; echo on",
    "sh -c 'kill -11 $$'",
    "sh -c 'kill -11 $$'; echo after",
    "sh -c 'kill -11 $$' | cat; echo ${PIPESTATUS[*]}",
    "echo a | sh -c 'kill -TERM $$'",
    "(exit 3) && echo yes || echo no $?",
    "! true; echo $?",
    "true | false | true; echo ${PIPESTATUS[*]}",
    "return 3",
    "break; continue; echo $?",
    "local x; echo $?",
    "sleep 0.01 & wait $!; echo $?; wait; jobs",
    "sleep 0.01 & echo started",
    "coproc cat; echo x >&${COPROC[1]}; read y <&${COPROC[0]}; echo $y",
    "echo <(echo x) | sed 's/[0-9]*$//'; cat <(echo from process)",
    "alias ll='echo aliased'; ll",
    "shopt -s expand_aliases\nalias ll='echo aliased'\nll",
    "echo !x; echo !!; set -o | grep hist; history | wc -l",
    "eval 'echo $LINENO; nope'; eval 'echo )'; echo $?",
    "echo 'echo sourced $LINENO $0 $SECONDS ${BASH_SOURCE[0]}; return 6' > s.sh; . ./s.sh; echo $?",
    "printf '#!/bin/bash\\necho script $0 $LINENO $#' > r.sh; chmod +x r.sh; ./r.sh a",
    "printf 'echo no interpreter $0' > n.sh; chmod +x n.sh; ./n.sh",
    "bash -c 'echo $0 $- $SHLVL' x; sh -c 'echo $0'; bash -lc 'echo $-'",
    "cd /; pwd; echo $OLDPWD; cd - ; cd /nope",
    "umask 077; touch m; stat -c %a m; rm m",
    "getopts ab: o -a; echo $o $OPTIND; echo $OPTERR",
    "select x in a b; do echo $x; done",
    "time true",
    "test -t 1; echo $?; [ -e /workspace ]; echo $?; [[ abc =~ b(c) ]]; echo ${BASH_REMATCH[1]}",
    "a=(1 2 3); echo ${a[@]:1} ${#a[@]}; declare -A m=([k]=v); echo ${m[k]}",
    "x=abc; echo ${x^^} ${x/b/B} ${x:1:1} ${y:-default} ${!x} ${x@Q}; echo {1..3} *nomatch*",
    "echo *; touch b a; echo *; echo ~ ~root ~nobody; rm a b",
    "python3 -c 'import sys, os; print(sys.argv, os.getcwd(), len(os.environ), os.getpgrp() == os.getpid())'",
    "python3 -c 'import signal; print([signal.getsignal(s) for s in (1, 2, 13, 15, 17)])'",
    "unset BASH_EXECUTION_STRING; echo ${BASH_EXECUTION_STRING-none}; LINENO=40; echo $LINENO; SECONDS=7; echo $SECONDS",
    "unset LINENO SECONDS; echo \"<$LINENO> <$SECONDS>\"",
    "echo -n; echo -e 'a\\tb'; echo -- x",
    "\techo tab first\r",
    "echo \u{1b}[31m\u{7f}\u{1}",
    "exec -a other bash -c 'echo $0'",
    "exec > /dev/null; echo gone",
    "set +B; echo {a,b}; set -f; echo *",
    "sleep 0.01; /bin/true",
    "true && /bin/false",
    "true; sh -c 'exit 12'",
    "{ echo group; exit 2; }",
    "( echo subshell; exit 2 )",
    "nohup true; nice true; timeout 1 true; env -i /bin/echo clean; echo $?",
    "command -v ls; type cd; which bash",
    "wait; disown; fg; bg; echo $?",
    "enable -n echo; builtin echo hi; help : | head -1",
    "BASH_EXECUTION_STRING+=M; echo $BASH_EXECUTION_STRING",
    "source /etc/profile; echo $_",
    "logout",
    "suspend",
    "exit nope",
    "A=1 B=2 env | grep '^[AB]='; export C=3; env | grep ^C=",
    "readonly R=1; R=2; echo on",
    "printf '%s\\n' \"${BASH_EXECUTION_STRING:0:9}\"; mapfile -t l < /etc/hostname; echo ${#l[@]}",
];

#[test]
fn a_shell_that_has_waited_does_as_one_that_is_started_for_its_line() {
    let long = format!("echo {}", "x".repeat(4080));
    let longest = format!("x='{}'; echo ${{#x}} $LINENO", "y\n".repeat(2000));
    let lines = || LINES.iter().copied().chain([long.as_str(), longest.as_str()]);
    let told = |answer: &Answer| (answer.done().exit_code, steady(&answer.stdout), steady(&answer.stderr));
    // One guest after the other: this thread is in the network of one.
    let parked = with_parking();
    let ones: Vec<_> = lines().map(|line| told(&waited(&parked, line))).collect();
    drop(parked);
    let afresh = without_parking();
    let others = lines().map(|line| told(&afresh.shell(line)));
    let different: Vec<_> =
        lines().zip(ones.into_iter().zip(others)).filter(|(_, (one, other))| one != other).collect();
    assert!(different.is_empty(), "{different:#?}");
}

#[test]
fn it_is_used_for_what_it_fits_and_for_nothing_else() {
    let guest = with_parking();
    assert_eq!(waited(&guest, HOW).text(), WAITED);
    let env = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
    let others = [
        Exec { env: env("A", "b"), ..shell(HOW) },
        Exec { env: env("HOME", "/tmp"), ..shell(HOW) },
        Exec { cwd: "/tmp".to_owned(), ..shell(HOW) },
        Exec { uid: 0, gid: 0, ..shell(HOW) },
        Exec { gid: 0, ..shell(HOW) },
        shell(&format!("{HOW}{}", " ".repeat(4096))),
        argv(&["bash", "-lc", HOW]),
    ];
    for other in others {
        guest.wait_for_count(WAITS, 1);
        assert_eq!(guest.exec(other.clone()).text(), AFRESH, "{other:?}");
    }
    let mut host = guest.dial();
    host.request(Op::Exec(Exec { stdin: true, ..shell(&format!("cat; {HOW}")) }));
    host.send(Kind::Stdin, b"read ");
    host.send(Kind::StdinEnd, b"");
    assert_eq!(host.answer().text(), format!("read {AFRESH}"));
    // An environment that says what holds anyway is no other.
    let same = Exec { env: env("TERM", "dumb"), ..shell(HOW) };
    let deadline = Instant::now() + Duration::from_secs(30);
    while guest.exec(same.clone()).text() != WAITED {
        assert!(Instant::now() < deadline);
    }
    let option = guest.shell("-x");
    assert_eq!((option.done().exit_code, option.stdout.len()), (2, 0), "{option:?}");
}

#[test]
fn what_has_changed_since_it_was_started_is_noticed() {
    let changes = [
        "echo 'export ADDED=yes' > /etc/profile.d/added.sh",
        "echo 'export ADDED=yes' >> /etc/profile.d/there.sh",
        "sed -i 's/^export PATH/export PATH ADDED=yes/' /etc/profile",
        "echo 'export ADDED=yes' > /workspace/.bash_profile",
        "echo 'export ADDED=yes' > /workspace/.profile",
        "hostname other; echo 'ADDED=yes' > /etc/profile.d/added.sh",
    ];
    for change in changes {
        let guest = Guest::boot_planted(&format!("{LIKE_THE_IMAGE} echo A=b > $FOLDER/root/etc/profile.d/there.sh"));
        assert_eq!(waited(&guest, "echo $A $HOSTNAME").text(), "b box");
        guest.wait_for_count(WAITS, 1);
        assert_eq!(guest.exec(Exec { uid: 0, gid: 0, ..shell(change) }).done().exit_code, 0, "{change}");
        assert_eq!(guest.shell("echo $ADDED").text(), "yes", "{change}");
    }
    let guest = with_parking();
    guest.wait_for_count(WAITS, 1);
    let moved = "mv /workspace /old; mkdir /workspace; chown 1000:1000 /workspace";
    guest.exec(Exec { uid: 0, gid: 0, cwd: "/".to_owned(), ..shell(moved) }).done();
    assert_eq!(guest.shell("touch here; pwd -P; ls /old").text(), "/workspace");
}

#[test]
fn one_that_knows_an_old_host_name_is_not_used() {
    let guest = with_parking();
    assert_eq!(waited(&guest, "echo $HOSTNAME").text(), "box");
    guest.wait_for_count(WAITS, 1);
    let renew = renew_of("clone", Vec::new());
    assert_eq!(guest.ask(Op::Renew(renew)).kind, Kind::Done);
    assert_eq!(guest.shell("echo $HOSTNAME").text(), "clone");
    in_the_end(&guest, &format!("echo $HOSTNAME; {HOW}"), &format!("clone\n{WAITED}"));
}

#[test]
fn one_of_another_account_makes_room_for_the_next() {
    let guest = with_parking();
    guest.wait_for_count(WAITS, 1);
    let moved =
        "mkdir /home/other; sed -i 's#^user:x:1000:1000::/workspace:#user:x:1000:1000::/home/other:#' /etc/passwd";
    assert_eq!(guest.exec(Exec { uid: 0, gid: 0, ..shell(moved) }).done().exit_code, 0);
    assert_eq!(guest.shell("echo $HOME").text(), "/home/other");
    in_the_end(&guest, &format!("echo $HOME; {HOW}"), &format!("/home/other\n{WAITED}"));
}

#[test]
fn it_waits_on_where_the_guest_learns_its_resolvers_alone() {
    let guest = with_parking();
    let own = "echo mine > /etc/hostname; cp /etc/hosts /etc/machine-id /tmp";
    assert_eq!(guest.exec(Exec { uid: 0, gid: 0, ..shell(own) }).done().exit_code, 0);
    assert_eq!(waited(&guest, HOW).text(), WAITED);
    guest.wait_for_count(WAITS, 1);
    let waiting = guest.pids(WAITS);
    let renew = renew_of("box", vec!["9.9.9.10".to_owned()]);
    assert_eq!(guest.ask(Op::Renew(renew.clone())).kind, Kind::Done);
    assert_eq!(guest.pids(WAITS), waiting);
    let told = "cat /etc/resolv.conf /etc/hostname; cmp /etc/hosts /tmp/hosts && cmp /etc/machine-id /tmp/machine-id";
    assert_eq!(guest.exec(argv(&["sh", "-c", told])).text(), "nameserver 9.9.9.10\nmine");
    let other = Renew { machine_id: Some("0123456789abcdef".repeat(2)), ..renew };
    assert_eq!(guest.ask(Op::Renew(other)).kind, Kind::Done);
    let told = "cat /etc/resolv.conf /etc/hostname; cat /etc/machine-id";
    let expected = format!("nameserver 9.9.9.10\nbox\n{}", "0123456789abcdef".repeat(2));
    assert_eq!(guest.exec(argv(&["sh", "-c", told])).text(), expected);
    in_the_end(&guest, HOW, WAITED);
    assert!(!guest.pids(WAITS).iter().any(|pid| waiting.contains(pid)), "whoever becomes another starts another shell");
}

#[test]
fn where_the_profile_does_more_than_assign_no_shell_waits() {
    for odd in ["echo hi > /dev/null", "A=$(date)", ". /etc/os-release", "umask 077"] {
        let guest = Guest::boot_planted(&format!("{LIKE_THE_IMAGE} echo '{odd}' > $FOLDER/root/etc/profile.d/odd.sh"));
        assert_eq!(guest.shell(HOW).text(), AFRESH, "{odd}");
        assert_eq!(guest.shell(HOW).text(), AFRESH, "{odd}");
        assert_eq!(guest.count(WAITS), 0, "{odd}");
    }
    let own =
        format!("{LIKE_THE_IMAGE} mkdir $FOLDER/root/workspace; echo 'echo mine' > $FOLDER/root/workspace/.profile");
    assert_eq!(Guest::boot_planted(&own).shell("echo on").text(), "mine\non");
}

#[test]
fn one_that_was_killed_or_stopped_costs_time_and_nothing_else() {
    let guest = with_parking();
    for signal in ["KILL", "TERM", "HUP", "STOP"] {
        guest.wait_for_count(WAITS, 1);
        // It may have been gone before it could be found.
        let killed = guest.exec(argv(&["pkill", &format!("-{signal}"), "-f", WAITS])).done();
        assert!(killed.exit_code == 0 || killed.exit_code == 1, "{killed:?}");
        assert_eq!(guest.shell("echo alive").text(), "alive");
    }
    // The last one harmed may only now be found out, and a command be started afresh for it.
    in_the_end(&guest, HOW, WAITED);
}

#[test]
fn its_command_is_ended_as_any_other() {
    let guest = with_parking();
    let limited = "trap '' TERM; setsid -f sleep 4321; sleep 4321 & sleep 4321; true";
    guest.wait_for_count(WAITS, 1);
    let done = guest.exec(Exec { timeout_ms: 1500, ..shell(limited) }).done();
    assert_eq!((done.exit_code, done.timed_out), (-1, true));
    assert_eq!(guest.count("sleep\x004321"), 0);
    guest.wait_for_count(WAITS, 1);
    let mut host = guest.dial();
    host.request(Op::Exec(shell(limited)));
    guest.wait_for_count("sleep\x004321", 3);
    drop(host);
    guest.wait_for_count("sleep\x004321", 0);
    assert_eq!(waited(&guest, HOW).text(), WAITED);
}

#[test]
fn none_is_started_beside_a_command() {
    let guest = with_parking();
    guest.wait_for_count(WAITS, 1);
    let mut host = guest.dial();
    host.request(Op::Exec(argv(&["sleep", "4321"])));
    guest.wait_for_count("sleep\x004321", 1);
    assert_eq!(waited(&guest, HOW).text(), WAITED, "that which has waited before is used");
    // It looks for a while; what it looks for isn't found in its own line.
    let looks = format!("for i in 1 2 3 4 5; do sleep 0.1; pgrep -f 'read -[r]u9'; done; {HOW}");
    for line in [HOW, &looks, HOW] {
        assert_eq!(guest.shell(line).text(), AFRESH, "{line}");
    }
    assert_eq!(guest.count(WAITS), 0);
    drop(host);
    assert_eq!(waited(&guest, HOW).text(), WAITED);
}

#[test]
fn it_is_no_process_of_the_guests_but_counts_in_its_bound() {
    let guest = with_parking();
    guest.wait_for_count(WAITS, 1);
    let pong: Pong = serde_json::from_slice(&guest.ask(Op::Ping).last).unwrap();
    assert_eq!(pong.processes, 0);
    let line = "import os, time\nn = 0\ntry:\n  while n < 500:\n    if os.fork() == 0: time.sleep(60); os._exit(0)\n    n += 1\nexcept OSError: pass\nprint(n)";
    let forked: u32 = guest.exec(argv(&["python3", "-c", line])).text().parse().unwrap();
    assert!((MAX_PIDS - 5..MAX_PIDS - 1).contains(&forked), "{forked}");
    assert_eq!(guest.shell("echo alive").text(), "alive", "though there is no room for another");
}

#[test]
fn many_at_once_are_all_served() {
    let guest = with_parking();
    std::thread::scope(|scope| {
        let guest = &guest;
        let running: Vec<_> = (0..8)
            .map(|number| {
                scope.spawn(move || {
                    (0..8).all(|round| {
                        let answer = guest.shell(&format!("echo {number} {round}; exit {number}"));
                        answer.text() == format!("{number} {round}") && answer.done().exit_code == number
                    })
                })
            })
            .collect();
        assert!(running.into_iter().all(|thread| thread.join().unwrap()));
    });
}

#[test]
fn a_shutdown_is_not_held_up() {
    let mut guest = with_parking();
    guest.wait_for_count(WAITS, 1);
    let begun = Instant::now();
    assert_eq!(guest.ask(Op::Shutdown(Shutdown { grace_ms: 20_000 })).kind, Kind::Done);
    assert_eq!(guest.wait_for_end().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!(guest.count(WAITS), 0);
}

#[test]
fn a_shell_that_waits_has_the_images_environment_once_a_command_has_told_it() {
    let guest = with_parking();
    let image_env = BTreeMap::from([("A".to_owned(), "image".to_owned()), ("PATH".to_owned(), "/bin:/own".to_owned())]);
    let line = format!("echo $A $PATH; {HOW}");
    let exec = Exec { image_env, ..shell(&line) };
    guest.wait_for_count(WAITS, 1);
    assert_eq!(guest.exec(exec.clone()).text(), format!("image /bin:/own\n{AFRESH}"), "what waited had none");
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        guest.wait_for_count(WAITS, 1);
        let answer = guest.exec(exec.clone());
        let said = answer.text();
        if said == format!("image /bin:/own\n{WAITED}") {
            break;
        }
        assert_eq!(said, format!("image /bin:/own\n{AFRESH}"));
        assert!(Instant::now() < deadline, "no shell waits with the image's environment");
    }
}
