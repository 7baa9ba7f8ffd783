//! VMs that run their image's program, real ones, over HTTP, through the ingress and from the command line.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/busybox.rs"]
mod busybox;
#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/outside.rs"]
mod outside;
#[path = "../../server/tests/api/registry.rs"]
mod registry;
#[path = "vms/server.rs"]
mod server;

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use harness::{eventually, on_both_engines};
use outside::Outside;
use registry::{Image, Registry};
use serde_json::{Value, json};
use server::Site;
use tiffin_types::{id::VmId, vm::EngineName};

const PATIENCE: Duration = Duration::from_secs(60);
const PORT: u16 = 8080;

/// Counts its starts on its disk and serves the count; ends with what is written to `out/end`, and prints what comes in `out/say`.
const PROGRAM: &str = "umask 0; echo start >> out/starts; wc -l < out/starts > out/index.html; rm -f out/end; touch out/say; \
    echo serving start $(cat out/index.html); httpd -p 8080 -h out; httpd -p 8081 -h out; tail -f out/say & \
    until [ -e out/end ]; do sleep 0.05; done; echo over; exit $(cat out/end)";

/// A server with the ingress, and the id of an image with the program.
async fn site(engine: EngineName) -> (Site, Registry, String) {
    let settings = ["ingress.listen=127.0.0.1:0", "images.min_free_disk_mb=64"];
    let (site, registry) = (Site::start_with(engine, &settings).await, Registry::open().await.unwrap());
    let names = ["sh", "cat", "httpd", "mv", "rm", "sleep", "tail", "touch", "wc"];
    let config =
        json!({ "Entrypoint": ["/bin/sh", "-c", PROGRAM], "Env": ["PATH=/bin"], "User": "www", "WorkingDir": "/srv" });
    registry.push("app", "1", &Image::new(&[busybox::layer(&names)], &config)).await.unwrap();
    let image = post(&site, "/v1/image/import", Some(json!({ "imageUri": registry.image("app:1") }))).await;
    let image = image["imageId"].as_str().unwrap().to_owned();
    (site, registry, image)
}

/// Asks for what must succeed.
async fn post(site: &Site, path: &str, body: Option<Value>) -> Value {
    let answer = site.ask("POST", path, body).await;
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    answer.body
}

/// The id in the other dialect's form.
fn vm_id(vm: &Value) -> VmId {
    format!("vm-{}", vm["id"].as_str().unwrap()).parse().unwrap()
}

/// Has the program end with that code.
async fn end_with(site: &Site, id: &VmId, code: u8) {
    site.sh(id, &format!("cd /srv/out; echo {code} > next; mv next end")).await;
}

/// Waits until the program's page has that text.
async fn serves(web: &Outside<'_>, text: &str) {
    let mut answer = (0, String::new());
    let what = format!("the page has {text:?}");
    eventually(&what, async || {
        answer = web.curl("", &[]).await;
        // Up, and not listening yet: nothing else is to be seen.
        assert!(answer.0 == 200 || answer.1.contains("x-tiffin-error: not_listening"), "{answer:?}");
        answer.0 == 200
    })
    .await;
    assert!(answer.1.ends_with(&format!("\r\n\r\n{text}\n")), "{answer:?}");
}

on_both_engines!(a_cached_vm_serves_keeps_its_disk_ends_with_its_program_and_starts_anew);

async fn a_cached_vm_serves_keeps_its_disk_ends_with_its_program_and_starts_anew(engine: EngineName) {
    let (mut site, _registry, image) = site(engine).await;
    let vm = post(&site, "/v1/vm/cache", Some(json!({ "imageId": image, "port": PORT, "diskSize": 1 }))).await;
    assert_eq!((&vm["state"], &vm["volumeGB"]), (&json!("stopped"), &json!(1)), "{vm}");
    let (id, name, hostname) = (vm_id(&vm), vm["id"].as_str().unwrap(), vm["hostname"].as_str().unwrap().to_owned());
    let (path, state) = (format!("/v1/vm/cached/{name}"), async |site: &Site| {
        site.ask("GET", &format!("/v1/vm/{name}"), None).await.body
    });
    {
        let web = Outside::named(&site, &hostname).await;
        let down = async || {
            let (status, answer) = web.curl("", &[]).await;
            assert!(status == 503 && answer.contains("x-tiffin-error: vm_not_running"), "{answer}");
        };
        down().await;
        for start in ["1", "2"] {
            post(&site, &format!("{path}/start"), None).await;
            serves(&web, start).await;
            assert_eq!(site.ask("POST", &format!("{path}/start"), None).await.status, 409, "it runs");
            post(&site, &format!("{path}/stop"), None).await;
            assert_eq!(state(&site).await["state"], "stopped");
            down().await;
        }
        post(&site, &format!("{path}/start"), None).await;
        serves(&web, "3").await;
    }
    // The server's end is none of the VM's, and what it remembered of its names is in its records.
    site.kill().await;
    site.serve(None).await;
    let web = Outside::named(&site, &hostname).await;
    serves(&web, "3").await;

    end_with(&site, &id, 7).await;
    let mut ended = Value::Null;
    eventually("the program's end stops it", async || {
        ended = state(&site).await;
        ended["state"] == "stopped"
    })
    .await;
    assert_eq!((&ended["end"]["reason"], &ended["end"]["exitCode"]), (&json!("exited"), &json!(7)), "{ended}");
    assert_eq!(web.curl("", &[]).await.0, 503);
    post(&site, &format!("{path}/start"), None).await;
    serves(&web, "4").await;
    let logs = site.ask("GET", &format!("{path}/logs?query=SERVING"), None).await.body;
    let lines: Vec<&str> =
        logs["lines"].as_array().unwrap().iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(lines, ["serving start 1", "serving start 2", "serving start 3", "serving start 4"]);

    post(&site, &format!("{path}/destroy"), None).await;
    assert_eq!(state(&site).await["state"], "destroyed");
    assert_eq!(web.curl("", &[]).await.0, 404);
    assert_eq!(site.ask("POST", &format!("{path}/start"), None).await.status, 409);
    site.is_tidy().await;
}

fn tiffin(site: &Site, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiffin"));
    command.args(args).env("TIFFIN_URL", site.url()).env("TIFFIN_API_KEY", site.key()).stdin(Stdio::null());
    command
}

fn run(site: &Site, args: &[&str]) -> Output {
    tiffin(site, args).output().unwrap()
}

/// What a command that succeeds prints.
fn prints(site: &Site, args: &[&str]) -> String {
    let out = run(site, args);
    assert!(out.status.success() && out.stderr.is_empty(), "{args:?}: {out:?}");
    String::from_utf8(out.stdout).unwrap()
}

/// A command that goes on, and its lines as they come. It is killed with this.
struct Following(Child, Receiver<String>);

impl Following {
    fn start(site: &Site, args: &[&str]) -> Self {
        let mut child = tiffin(site, args).stdout(Stdio::piped()).spawn().unwrap();
        let (lines, seen) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        Self(child, seen)
    }

    fn next(&self) -> String {
        self.1.recv_timeout(PATIENCE).expect("a line comes")
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_exposes_ports_trusts_the_ingress_and_follows_what_is_printed() {
    let (site, _registry, image) = site(EngineName::Gvisor).await;
    let vm = post(&site, "/v1/vm/start", Some(json!({ "imageId": image, "port": PORT }))).await;
    let (id, named) = (vm_id(&vm), Outside::named(&site, vm["hostname"].as_str().unwrap()).await);
    let vm = id.as_str();
    assert_eq!(prints(&site, &["ingress", "ca"]), named.authority);
    ports(&site, vm).await;

    let mut following = Following::start(&site, &["logs", vm, "--follow", "--plain"]);
    assert_eq!(following.next(), "serving start 1", "what was printed before");
    let searching = Following::start(&site, &["logs", vm, "-f", "--plain", "--search", "SECOND"]);
    site.sh(&id, "echo first >> /srv/out/say; echo second >> /srv/out/say").await;
    assert_eq!([following.next(), following.next()], ["first", "second"]);
    assert_eq!(searching.next(), "second");
    end_with(&site, &id, 0).await;
    assert_eq!(following.next(), "over");
    let ended = tokio::task::spawn_blocking(move || (following.0.wait().unwrap(), following.1.recv().is_err()));
    let (status, is_all) = tokio::time::timeout(PATIENCE, ended).await.expect("it ends with the VM").unwrap();
    assert!(status.success() && is_all, "{status:?}");
    eventually("the VM is gone", async || site.get(&id).await.status == 404).await;
    assert_eq!(prints(&site, &["logs", vm, "--plain"]), "serving start 1\nfirst\nsecond\nover\n");
    assert!(String::from_utf8(run(&site, &["vm", "ports", vm]).stderr).unwrap().contains("not_found"));
    assert!(run(&site, &["vm", "ports", vm]).stdout.is_empty());
    site.is_tidy().await;
}

/// A port is given a URL, answers by it, is listed, and has it taken away.
async fn ports(site: &Site, vm: &str) {
    let url = prints(site, &["vm", "expose", vm, "8081"]);
    assert_eq!(prints(site, &["vm", "expose", vm, "8081"]), url, "the same again is the same");
    let hostname = url.trim_end().strip_prefix("https://").unwrap().split(':').next().unwrap();
    let web = Outside::named(site, hostname).await;
    assert_eq!(format!("{}\n", web.url), url);
    serves(&web, "1").await;
    let listed = prints(site, &["vm", "ports", vm]);
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        (lines.len(), &lines[0][..], &lines[1][..2]),
        (2, &["PORT", "URL", "SINCE"][..], &["8081", &web.url][..])
    );
    let listed: Value = serde_json::from_str(&prints(site, &["vm", "ports", vm, "--json"])).unwrap();
    assert_eq!((&listed[0]["port"], &listed[0]["url"]), (&json!(8081), &json!(web.url)));
    let agent = tiffin_protocol::AGENT_PORT.to_string();
    for (refused, word) in
        [([vm, "0"], "1..=65535"), ([vm, &agent], "port"), (["vm-00000000000000", "80"], "not_found")]
    {
        let out = run(site, &[&["vm", "expose"][..], &refused].concat());
        let text = String::from_utf8(out.stderr).unwrap();
        assert!(!out.status.success() && out.stdout.is_empty() && text.contains(word), "{refused:?}: {text}");
    }
    assert_eq!(prints(site, &["vm", "unexpose", vm, "8081"]), "");
    assert_eq!(web.curl("", &[]).await.0, 404);
    assert_eq!(prints(site, &["vm", "ports", vm]).lines().count(), 1, "the heading alone");
}
