//! The client commands as a user runs them: the real binary against a small scripted server.

#![allow(clippy::unwrap_used, reason = "test code: a failure here is the test's failure")]

mod server;

use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use server::{Answer, Server};

const VM: &str = "vm-0123456789abcd";
const OTHER: &str = "vm-fedcba98765432";

fn tiffin(url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiffin"));
    command.args(args).env("TIFFIN_URL", url).env("TIFFIN_API_KEY", "tfn_test").stdin(Stdio::null());
    command
}

fn run(server: &Server, args: &[&str]) -> Output {
    tiffin(&server.url, args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn vm(id: &str, state: &str) -> Value {
    json!({"id": id, "state": state, "cpu": 1, "memMb": 256, "guestIp": "10.0.0.2", "createdAt": "2026-11-20T10:00:00.000Z",
        "provisionMode": "boot", "imageId": null, "outboundInternet": false, "allowIps": []})
}

fn refusal(status: u16, message: &str, code: &str) -> Answer {
    Answer::json(status, json!({"message": message, "code": code, "requestId": "req-1"}))
}

#[test]
fn create_sends_the_key_and_the_body_and_prints_the_id() {
    let server = Server::start(vec![("POST /v1/vms", Answer::json(201, vm(VM, "RUNNING")))]);
    let out = run(&server, &["vm", "create", "--quiet", "--mem", "512", "--idempotency-key", "k1"]);
    assert!(out.status.success());
    assert_eq!(text(&out.stdout), format!("{VM}\n"));
    assert!(out.stderr.is_empty(), "no spinner where stderr is no terminal: {}", text(&out.stderr));
    let asked = server.requests();
    assert_eq!(asked[0].header("x-api-key"), Some("tfn_test"));
    assert_eq!(asked[0].header("idempotency-key"), Some("k1"));
    assert_eq!(asked[0].body["memMb"], 512);
}

#[test]
fn a_list_is_a_table_and_with_json_the_apis_own_answer() {
    let answer = json!([vm(VM, "RUNNING"), vm(OTHER, "STOPPED")]);
    let server = Server::start(vec![("GET /v1/vms", Answer::json(200, answer.clone()))]);
    let table = run(&server, &["vm", "ls"]);
    let lines: Vec<&str> = text(&table.stdout).lines().collect();
    assert!(lines[0].starts_with("ID ") && lines[1].starts_with(VM) && lines[2].contains("STOPPED"), "{lines:?}");
    assert_eq!(lines[1].find("RUNNING"), lines[0].find("STATE"));
    let out = run(&server, &["vm", "ls", "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap(), answer);
}

#[test]
fn the_commands_output_and_exit_code_are_passed_on() {
    let events = concat!(
        ": open\n\n",
        "event: stdout\r\ndata: {\"data\":\"hello\\n\"}\r\n\r\n",
        "event: stderr\ndata: {\"data\":\"careful\\n\"}\n\n",
        "event: exit\ndata: {\"exitCode\":7}\n\n",
    );
    let server = Server::start(vec![("POST /v1/vms/vm-0123456789abcd/exec", Answer::events(events))]);
    let out = run(&server, &["vm", "exec", VM, "--env", "A=1", "--timeout", "2", "--", "echo", "a b"]);
    assert_eq!((text(&out.stdout), text(&out.stderr)), ("hello\n", "careful\n"));
    assert_eq!(out.status.code(), Some(7));
    let asked = &server.requests()[0];
    assert_eq!(asked.body, json!({"cmd": "echo 'a b'", "env": {"A": "1"}, "timeoutMs": 2000}));
    assert_eq!(asked.header("accept"), Some("text/event-stream"));
}

#[test]
fn a_command_over_its_time_is_124_and_an_error_of_tiffin_is_125() {
    let path = "POST /v1/vms/vm-0123456789abcd/exec";
    let exec = |answer| run(&Server::start(vec![(path, answer)]), &["vm", "exec", VM, "--", "true"]);
    let timed_out = exec(Answer::events("event: exit\ndata: {\"exitCode\":-1,\"timedOut\":true}\n\n"));
    assert_eq!(timed_out.status.code(), Some(124));
    let stopped = exec(refusal(409, "the VM is STOPPED", "wrong_state"));
    assert_eq!(stopped.status.code(), Some(125));
    assert_eq!(text(&stopped.stderr), "error: the VM is STOPPED (wrong_state, request req-1)\n");
    let lost = exec(Answer::events("event: error\ndata: {\"message\":\"the VM ended\",\"code\":\"vm_ended\"}\n\n"));
    assert_eq!(lost.status.code(), Some(125));
    assert_eq!(text(&lost.stderr), "error: the VM ended (vm_ended)\n");
    let cut = exec(Answer::events("event: stdout\ndata: {\"data\":\"x\"}\n\n"));
    assert_eq!((cut.status.code(), text(&cut.stdout)), (Some(125), "x"));
    let wrong = tiffin("http://127.0.0.1:1", &["vm", "exec", "nonsense", "--", "true"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(125));
}

#[test]
fn output_comes_while_the_command_still_runs() {
    use std::io::Read;
    let (answer, release) =
        Answer::held_events("event: stdout\ndata: {\"data\":\"first\"}\n\n", "event: exit\ndata: {\"exitCode\":0}\n\n");
    let server = Server::start(vec![("POST /v1/vms/vm-0123456789abcd/exec", answer)]);
    let mut child = tiffin(&server.url, &["vm", "exec", VM, "--", "slow"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 5];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"first");
    assert!(child.try_wait().unwrap().is_none());
    release.send(()).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_reader_that_leaves_ends_the_command_quietly() {
    let many: Vec<Value> = (0..5000).map(|_| vm(VM, "RUNNING")).collect();
    let server = Server::start(vec![("GET /v1/vms", Answer::json(200, many.into()))]);
    for args in [["vm", "ls"].as_slice(), &["vm", "ls", "--json"]] {
        let mut child = tiffin(&server.url, args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let out = child.wait_with_output().unwrap();
        assert_eq!((out.status.code(), text(&out.stderr)), (Some(141), ""));
    }
}

#[test]
fn no_server_is_told_with_how_to_start_one() {
    let out = tiffin("http://127.0.0.1:1", &["vm", "ls"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let lines = text(&out.stderr);
    assert!(lines.starts_with("error: can't reach the server at http://127.0.0.1:1: "), "{lines}");
    assert!(lines.contains("make up") && lines.contains("tiffin serve"), "{lines}");
}

#[test]
fn rm_goes_on_after_a_failure_and_says_what_is_left() {
    let server = Server::start(vec![
        ("DELETE /v1/vms/vm-0123456789abcd", refusal(404, "VM not found", "not_found")),
        ("DELETE /v1/vms/vm-fedcba98765432", Answer::empty(204)),
    ]);
    let out = run(&server, &["vm", "rm", VM, OTHER]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(text(&out.stdout), format!("{OTHER}\n"));
    assert!(text(&out.stderr).starts_with(&format!("{VM}: error: VM not found")), "{}", text(&out.stderr));
}

#[test]
fn rm_all_deletes_each_and_takes_one_already_gone_as_done() {
    let server = Server::start(vec![
        ("GET /v1/vms", Answer::json(200, json!([vm(VM, "RUNNING"), vm(OTHER, "ERROR")]))),
        ("DELETE /v1/vms/vm-0123456789abcd", refusal(404, "VM not found", "not_found")),
        ("DELETE /v1/vms/vm-fedcba98765432", Answer::empty(204)),
    ]);
    let out = run(&server, &["vm", "rm", "--all"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(text(&out.stdout), format!("{VM}\n{OTHER}\n"));
}

#[test]
fn a_guests_console_cannot_control_the_terminal() {
    let answer = json!({"type": "firecracker.stdout.log", "lines": ["boot", "\u{1b}[2Jgone"], "truncated": false});
    let server = Server::start(vec![("GET /v1/vms/vm-0123456789abcd/logs", Answer::json(200, answer))]);
    let out = run(&server, &["vm", "logs", VM, "--tail", "5"]);
    assert_eq!(text(&out.stdout), "boot\n\\u{1b}[2Jgone\n");
    assert_eq!(server.requests()[0].query, "type=firecracker.stdout.log&tail=5");
}

#[test]
fn what_a_program_printed_is_shown_page_by_page() {
    let line = |id: u64, message: &str| json!({"id": id, "at": "2026-11-20T10:00:00.123Z", "level": "info", "message": message});
    let first = json!({"lines": [line(0, "one"), line(1, "\u{1b}[2Jtwo")], "pagination": "abc",
        "from": "2026-11-20 10:00:00 UTC", "to": "2026-11-20 10:00:01 UTC"});
    let path = "GET /v1/vms/vm-0123456789abcd/logs/search";
    let server = Server::start(vec![
        (path, Answer::json(200, first)),
        (path, Answer::json(200, json!({"lines": [line(2, "three")]}))),
    ]);
    let out = run(&server, &["logs", "0123456789abcd", "--search", "o r", "--since", "2026-11-20T10:00:00Z"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let shown: Vec<&str> = text(&out.stdout).lines().collect();
    assert_eq!(shown[0], "2026-11-20T10:00:00.123Z info  one");
    assert!(shown[1].ends_with("\\u{1b}[2Jtwo") && shown[2].ends_with("three"), "{shown:?}");
    let asked = server.requests();
    assert_eq!(asked[0].query, "order=oldest_first&batch=1000&query=o+r&from=2026-11-20T10%3A00%3A00Z");
    assert_eq!(
        asked[1].query,
        "order=oldest_first&batch=1000&query=o+r&pagination=abc&from=2026-11-20+10%3A00%3A00+UTC&to=2026-11-20+10%3A00%3A01+UTC"
    );
}

#[test]
fn a_stream_of_lines_that_breaks_off_is_taken_up_after_the_last_one() {
    let line = |id: u64| {
        let data =
            json!({"id": id, "at": "2026-11-20T10:00:00.123Z", "level": "error", "message": format!("line {id}")});
        format!("id: {id}\nevent: line\ndata: {data}\n\n")
    };
    let path = "GET /v1/vms/vm-0123456789abcd/logs/stream";
    let server = Server::start(vec![
        (path, Answer::events(&format!("{}{}", line(7), line(8)))),
        (path, Answer::json(503, json!({"message": "restarting", "code": "x", "requestId": "r"}))),
        (
            path,
            Answer::events(&format!("event: missed\ndata: {{\"lines\":2}}\n\n{}event: end\ndata: {{}}\n\n", line(11))),
        ),
    ]);
    let out = run(&server, &["logs", VM, "--follow", "--tail", "2", "--plain"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(text(&out.stdout), "line 7\nline 8\nline 11\n");
    assert!(text(&out.stderr).contains("2 lines were forgotten"), "{}", text(&out.stderr));
    let asked = server.requests();
    let after: Vec<_> = asked.iter().map(|asked| asked.header("last-event-id")).collect();
    assert_eq!((asked[0].query.as_str(), after), ("tail=2", vec![None, Some("8"), Some("8")]));
}

#[test]
fn what_the_network_refused_is_listed() {
    let answer = json!({"outboundInternet": true, "allowIps": ["198.51.100.0/24"],
        "denied": {"total": 9, "destinations": [{"address": "192.0.2.1", "protocol": "tcp", "port": 25, "count": 9}]}});
    let server = Server::start(vec![("GET /v1/vms/vm-0123456789abcd/network", Answer::json(200, answer))]);
    let out = run(&server, &["vm", "network", VM]);
    let shown = text(&out.stdout);
    assert!(
        shown.contains("192.0.2.1        tcp       25    9\n") && shown.ends_with("9 packets refused\n"),
        "{shown}"
    );
}

const SNAPSHOT: &str = "snap-0123456789abcd";

fn snapshot() -> Value {
    json!({"id": SNAPSHOT, "vmId": VM, "state": "READY", "name": "after setup", "createdAt": "2026-11-20T10:00:00.000Z", "cpu": 2,
        "memMb": 512, "diskSizeMb": 1024, "imageId": "01JD4W5C1QZX6M0V5K2B8N7T3A", "sizeBytes": 41_000_000})
}

#[test]
fn a_snapshot_is_made_listed_and_deleted() {
    let server = Server::start(vec![
        ("POST /v1/vms/vm-0123456789abcd/snapshots", Answer::json(201, snapshot())),
        ("GET /v1/snapshots", Answer::json(200, json!([snapshot()]))),
        ("DELETE /v1/snapshots/snap-0123456789abcd", Answer::empty(204)),
    ]);
    let out = run(&server, &["snapshot", "create", VM, "--name", "after setup", "--quiet"]);
    assert_eq!(text(&out.stdout), format!("{SNAPSHOT}\n"));
    assert_eq!(server.requests()[0].body, json!({"name": "after setup"}));
    let list = run(&server, &["snapshot", "ls"]);
    let shown = text(&list.stdout);
    assert!(shown.starts_with("ID ") && shown.contains(SNAPSHOT) && shown.contains(" 40 "), "{shown}");
    let gone = run(&server, &["snapshot", "rm", SNAPSHOT, "snap-fedcba98765432"]);
    assert_eq!((gone.status.code(), text(&gone.stdout)), (Some(1), format!("{SNAPSHOT}\n").as_str()));
    assert!(text(&gone.stderr).starts_with("snap-fedcba98765432: error: "), "{}", text(&gone.stderr));
}

#[test]
fn a_vm_of_a_snapshot_has_its_size_unless_another_is_named() {
    let answers = || {
        vec![
            ("GET /v1/snapshots/snap-0123456789abcd", Answer::json(200, snapshot())),
            ("POST /v1/vms", Answer::json(201, vm(VM, "RUNNING"))),
        ]
    };
    let server = Server::start(answers());
    assert!(run(&server, &["vm", "create", "--quiet", "--snapshot", SNAPSHOT]).status.success());
    let body = &server.requests()[1].body;
    assert_eq!((&body["cpu"], &body["memMb"], &body["snapshotId"]), (&json!(2), &json!(512), &json!(SNAPSHOT)));
    assert!(body.get("diskSizeMb").is_none());
    let server = Server::start(answers());
    assert!(
        run(&server, &["vm", "create", "--quiet", "--snapshot", SNAPSHOT, "--cpu", "1", "--mem", "128"])
            .status
            .success()
    );
    let asked = server.requests();
    assert_eq!((asked.len(), &asked[0].body["cpu"], &asked[0].body["memMb"]), (1, &json!(1), &json!(128)));
}

#[test]
fn a_fork_prints_its_clones_and_has_the_sources_network_unless_told() {
    let path = "POST /v1/vms/vm-0123456789abcd/fork";
    let fork = |args: &[&str]| {
        let server = Server::start(vec![(path, Answer::json(201, json!([vm(OTHER, "RUNNING")])))]);
        let out = run(&server, &[&["vm", "fork", VM][..], args].concat());
        assert_eq!(text(&out.stdout), format!("{OTHER}\n"), "{}", text(&out.stderr));
        server.requests()[0].body.clone()
    };
    assert_eq!(fork(&["--count", "3"]), json!({"count": 3}));
    assert_eq!(fork(&["--closed"]), json!({"count": 1, "outboundInternet": false, "allowIps": []}));
    let open = json!({"count": 1, "outboundInternet": true, "allowIps": ["192.0.2.7/32"]});
    assert_eq!(fork(&["--allow", "192.0.2.7"]), open);
}

#[test]
fn a_new_key_stands_alone_on_stdout() {
    let answer = json!({"id": "key-0123456789abcd", "key": "tfn_new", "scopes": ["read"], "expiresAt": null});
    let server = Server::start(vec![("POST /v1/admin/api-keys", Answer::json(201, answer))]);
    let out = run(&server, &["key", "create", "ci", "--scope", "read", "--scope", "write"]);
    assert_eq!(text(&out.stdout), "tfn_new\n");
    assert!(text(&out.stderr).contains("expires never"));
    assert_eq!(server.requests()[0].body, json!({"name": "ci", "scopes": ["read", "write"]}));
}

#[test]
fn a_missing_key_is_told_with_where_to_find_one() {
    let server = Server::start(vec![("GET /v1/images", refusal(401, "missing API key", "unauthorized"))]);
    let out = run(&server, &["image", "ls"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("TIFFIN_API_KEY"), "{}", text(&out.stderr));
}

const IMAGE: &str = "01JD4W5C1QZX6M0V5K2B8N7T3A";

fn image(status: &str) -> Value {
    json!({"id": IMAGE, "name": "mine", "description": "", "createdAt": "2026-11-20T10:00:00.000Z", "isDefault": false,
        "hasKernel": false, "hasRootfs": true, "baseRootfsBytes": 3_000_000, "sizeBytes": 4_000_000, "isShared": false,
        "status": status})
}

#[test]
fn an_image_is_made_and_its_files_are_sent_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let (rootfs, kernel) = (folder.path().join("rootfs"), folder.path().join("kernel"));
    std::fs::write(&rootfs, vec![b'r'; 700_000]).unwrap();
    std::fs::write(&kernel, b"kernel").unwrap();
    let server = Server::start(vec![
        ("POST /v1/images", Answer::json(201, image("empty"))),
        ("PUT /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A/rootfs", Answer::empty(204)),
        ("PUT /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A/kernel", Answer::empty(204)),
    ]);
    let args = ["image", "create", "mine", "--rootfs", rootfs.to_str().unwrap(), "--kernel", kernel.to_str().unwrap()];
    let out = run(&server, &args);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!((text(&out.stdout), text(&out.stderr)), (format!("{IMAGE}\n").as_str(), ""));
    let asked = server.requests();
    assert_eq!(asked[0].body, json!({"name": "mine", "description": ""}));
    for (asked, length) in asked[1..].iter().zip([700_000, 6]) {
        assert_eq!(asked.header("content-type"), Some("application/octet-stream"));
        assert_eq!(asked.header("content-length"), Some(length.to_string().as_str()));
        assert_eq!(asked.length, length);
    }
}

#[test]
fn an_upload_of_the_same_file_goes_on_where_an_earlier_one_ended() {
    let folder = tempfile::tempdir().unwrap();
    let rootfs = folder.path().join("rootfs");
    std::fs::write(&rootfs, b"hello world").unwrap();
    let mut kept = image("failed");
    let digest = "sha256:b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9";
    kept["partialUploads"] = json!([{ "part": "rootfs", "receivedBytes": 6, "expectedBytes": 11, "digest": digest }]);
    let put = || ("PUT /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A/rootfs", Answer::empty(204));
    let server =
        Server::start(vec![put(), ("GET /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A", Answer::json(200, kept.clone()))]);
    let out = run(&server, &["image", "upload", IMAGE, "--rootfs", rootfs.to_str().unwrap()]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let asked = &server.requests()[1];
    assert_eq!((asked.header("content-range"), asked.length), (Some("bytes 6-10/11"), 5));
    assert_eq!(asked.header("repr-digest"), Some("sha-256=:uU0nuZNNPgilLlLX2n2r+sSE7+N6U4DukIj3rOLvzek=:"));

    // What is kept of another file is nothing to go on with.
    kept["partialUploads"][0]["digest"] = json!(digest.replace('b', "c"));
    let server = Server::start(vec![put(), ("GET /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A", Answer::json(200, kept))]);
    assert!(run(&server, &["image", "upload", IMAGE, "--rootfs", rootfs.to_str().unwrap()]).status.success());
    let asked = &server.requests()[1];
    assert_eq!((asked.header("content-range"), asked.length), (None, 11));
}

#[test]
fn a_file_that_is_not_there_makes_no_image() {
    let server = Server::start(vec![]);
    let out = run(&server, &["image", "create", "mine", "--rootfs", "/nonexistent/rootfs"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("/nonexistent/rootfs"), "{}", text(&out.stderr));
    let folder = run(&server, &["image", "upload", IMAGE, "--rootfs", "/etc"]);
    assert!(text(&folder.stderr).contains("mke2fs -d"), "{}", text(&folder.stderr));
    let nothing = run(&server, &["image", "upload", IMAGE]);
    assert!(text(&nothing.stderr).contains("--rootfs FILE"), "{}", text(&nothing.stderr));
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn a_refused_filesystem_is_told_with_the_reason_and_what_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let rootfs = folder.path().join("rootfs");
    std::fs::write(&rootfs, b"\x1f\x8b").unwrap();
    let server = Server::start(vec![
        ("POST /v1/images", Answer::json(201, image("empty"))),
        (
            "PUT /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A/rootfs",
            refusal(422, "this is no ext4 filesystem: it is compressed with gzip", "bad_filesystem"),
        ),
    ]);
    let out = run(&server, &["image", "create", "mine", "--rootfs", rootfs.to_str().unwrap()]);
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(1), ""));
    let told = text(&out.stderr);
    assert!(told.contains("compressed with gzip") && told.contains(&format!("the image {IMAGE} was made")), "{told}");
}

#[test]
fn images_are_listed_shown_made_the_default_and_deleted() {
    let server = Server::start(vec![
        ("GET /v1/images", Answer::json(200, json!([image("ready")]))),
        ("GET /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A", Answer::json(200, image("ready"))),
        ("POST /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A/set-default", Answer::empty(204)),
        ("DELETE /v1/images/01JD4W5C1QZX6M0V5K2B8N7T3A", refusal(409, "the image is in use by 2 VMs", "in_use")),
    ]);
    let table = run(&server, &["image", "ls"]);
    assert!(text(&table.stdout).contains("ready   3"), "{}", text(&table.stdout));
    let shown = run(&server, &["image", "get", IMAGE]);
    assert!(text(&shown.stdout).contains("files MiB   3\n"), "{}", text(&shown.stdout));
    assert_eq!(text(&run(&server, &["image", "set-default", IMAGE]).stdout), format!("{IMAGE}\n"));
    let out = run(&server, &["image", "rm", IMAGE]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("in use by 2 VMs"), "{}", text(&out.stderr));
}

#[test]
fn completion_scripts_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let out = tiffin("http://127.0.0.1:1", &["completion", shell]).output().unwrap();
        assert!(out.status.success() && text(&out.stdout).contains("exec"), "{shell}");
    }
}

#[test]
fn an_import_takes_the_password_from_the_environment_or_stdin_and_prints_the_id() {
    let image = "01JD4W5C1QZX6M0V5K2B8N7T3A";
    let answer = Answer::json(200, json!({ "imageId": image }));
    let server = Server::start(vec![("POST /v1/image/import", answer)]);
    let out = tiffin(&server.url, &["image", "import", "ghcr.io/a/b:1", "--username", "me"])
        .env("TIFFIN_REGISTRY_PASSWORD", "from-env")
        .output()
        .unwrap();
    assert_eq!(text(&out.stdout), format!("{image}\n"), "{}", text(&out.stderr));
    let mut piped = tiffin(&server.url, &["image", "import", "a", "--password-stdin"]);
    let mut child = piped.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"from-stdin\n").unwrap();
    assert!(child.wait_with_output().unwrap().status.success());
    assert!(run(&server, &["image", "import", "a"]).status.success());
    let bodies: Vec<Value> = server.requests().into_iter().map(|asked| asked.body).collect();
    assert_eq!(bodies[0], json!({ "imageUri": "ghcr.io/a/b:1", "username": "me", "password": "from-env" }));
    assert_eq!(bodies[1], json!({ "imageUri": "a", "password": "from-stdin" }));
    assert_eq!(bodies[2], json!({ "imageUri": "a", "password": "" }));
    let refused = run(&server, &["image", "import", "a", "--username", "me"]);
    assert!(text(&refused.stderr).contains("TIFFIN_REGISTRY_PASSWORD"), "{}", text(&refused.stderr));
    let refused = run(&server, &["image", "import", "a", "--password-stdin"]);
    assert!(text(&refused.stderr).contains("one line"), "{}", text(&refused.stderr));
}
