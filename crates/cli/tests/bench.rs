//! The bench as a program, against a scripted server: what it counts, reports and fails on. No engine is measured.

#![allow(clippy::unwrap_used, reason = "test code: a failure here is the test's failure")]

mod server;

use std::process::{Command, Output};

use serde_json::{Value, json};

use server::{Answer, Server};

const EXEC: &str = "POST /v1/vms/vm-0123456789abcd/exec";

/// A server that gives everybody the same VM.
fn server(create: Answer, exec: Answer) -> Server {
    Server::start(vec![
        ("GET /v1/vms", Answer::json(200, json!([]))),
        ("POST /v1/vms", create),
        (EXEC, exec),
        ("DELETE /v1/vms/vm-0123456789abcd", Answer::empty(204)),
    ])
}

fn created() -> Answer {
    Answer::json(201, json!({"id": "vm-0123456789abcd", "state": "RUNNING"}))
}

fn bench(server: &Server, scenario: &str) -> (Output, Value) {
    let args = ["bench", "--quick", "--no-raw", "--json", "-", "--scenario", scenario, "--url", &server.url];
    let out = Command::new(env!("CARGO_BIN_EXE_tiffin")).args(args).env_remove("TIFFIN_API_KEY").output().unwrap();
    let report = serde_json::from_slice(&out.stdout).unwrap_or(Value::Null);
    (out, report)
}

fn figure(report: &Value, name: &str) -> Value {
    let figures = report["scenarios"][0]["figures"].as_array().unwrap();
    figures.iter().find(|figure| figure["name"] == name).unwrap_or_else(|| panic!("no {name} in {report:#}")).clone()
}

#[test]
fn tti_times_each_vm_to_its_first_output_and_says_that_the_engine_was_not_measured() {
    let server = server(created(), Answer::events("event: stdout\ndata: {\"data\":\"hi\\n\"}\n\n"));
    let (out, report) = bench(&server, "tti");
    assert!(out.status.success(), "{report:#}");
    let samples = &report["scenarios"][0]["samples"][0];
    assert_eq!((&samples["count"], &samples["failed"]), (&json!(3), &json!(0)));
    assert!(samples["p50Ms"].as_f64().unwrap() > 0.0);
    assert_eq!(figure(&report, "p50, over runsc run without network")["measured"], Value::Null);
    assert!(report["environment"]["runsc"].as_str().unwrap().starts_with("not measured"));
}

#[test]
fn the_platforms_share_of_an_exec_is_what_the_guest_did_not_take() {
    let answer = Answer::json(200, json!({"exitCode": 0, "stdout": "", "stderr": ""}));
    let server = server(created(), answer.with_header("server-timing", "guest;dur=0.001"));
    let (out, report) = bench(&server, "exec");
    assert!(out.status.success(), "{report:#}");
    let share = figure(&report, "the platform's share, p50");
    assert!(share["measured"].as_f64().unwrap() > 0.0 && share["goalAtMost"] == 3.0, "{share}");
}

#[test]
fn a_refused_create_of_a_burst_is_no_failure_and_an_error_is() {
    let refusal = |status: u16| Answer::json(status, json!({"message": "full", "code": "no_capacity"}));
    let answer = || Answer::empty(204);
    let (out, report) = bench(&server(refusal(503).with_header("retry-after", "1"), answer()), "burst");
    assert!(out.status.success(), "{report:#}");
    assert_eq!(figure(&report, "refused with 429 or 503")["measured"], 10.0);
    assert_eq!(report["scenarios"][0]["notes"], Value::Null);
    let (out, report) = bench(&server(refusal(503), answer()), "burst");
    assert!(out.status.success() && report["scenarios"][0]["notes"][0].as_str().unwrap().contains("Retry-After"));
    let (out, report) = bench(&server(refusal(500), answer()), "burst");
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(figure(&report, "failed otherwise")["reached"], false);
}

#[test]
fn where_there_are_no_vms_of_qemus_they_are_passed_over_with_a_word() {
    let refusal =
        Answer::json(400, json!({"message": "engine: this host has gvisor alone", "code": "invalid_parameter"}));
    let (out, report) = bench(&server(refusal, Answer::empty(204)), "qemu");
    assert!(out.status.success(), "{report:#}");
    let told = report["scenarios"][0]["notes"][0].as_str().unwrap();
    assert!(told.starts_with("skipped") && told.contains("gvisor alone"), "{told}");
}

#[test]
fn what_a_failing_scenario_created_is_deleted() {
    let server = server(created(), Answer::json(500, json!({"message": "broken", "code": "internal"})));
    let (out, report) = bench(&server, "density");
    assert_eq!(out.status.code(), Some(1));
    assert!(report["scenarios"][0]["failure"].as_str().unwrap().contains("broken"), "{report:#}");
    assert!(server.requests().iter().any(|asked| asked.method == "DELETE"));
}

#[test]
fn without_a_server_it_ends_at_once_with_what_to_do() {
    let out =
        Command::new(env!("CARGO_BIN_EXE_tiffin")).args(["bench", "--url", "http://127.0.0.1:1"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("make up"));
}
