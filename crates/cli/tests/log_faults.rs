//! What a program prints while its server is killed again and again: every line is in the pages once, and a follower that
//! takes its stream up again misses none and sees none twice.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/server.rs"]
mod server;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use harness::eventually;
use serde_json::{Value, json};
use server::Site;
use tiffin_logs::Reader;
use tiffin_types::id::VmId;

/// How often the server is killed.
const KILLS: u32 = 8;
/// Prints, with short pauses, until it is told that it is enough; and a last burst.
const PROGRAM: &str = "import itertools, os, sys, time\n\
    def put(begin, lines): sys.stdout.write(''.join(f'line {n}\\n' for n in range(begin, begin + lines))); sys.stdout.flush()\n\
    for n in itertools.count(0, 50):\n \
    put(n, 50); time.sleep(0.02)\n \
    if os.path.exists('/tmp/enough'): put(n + 50, 5000); break";

/// A client that finds the server wherever it is, and waits while it is down.
#[derive(Clone)]
struct Client {
    http: reqwest::Client,
    url: Arc<Mutex<String>>,
    key: String,
    vm: VmId,
}

impl Client {
    async fn open(&self, path: &str, last: Option<u64>) -> reqwest::Result<reqwest::Response> {
        let url = self.url.lock().unwrap().clone();
        let mut request = self.http.get(format!("{url}/v1/vms/{}/logs/{path}", self.vm)).header("x-api-key", &self.key);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        request.send().await
    }

    /// A page; asked for until there is an answer.
    async fn page(&self, query: &str) -> Value {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let text = match self.open(&format!("search?batch=1000&{query}"), None).await {
                Ok(answer) if answer.status() == 200 => answer.text().await,
                Ok(answer) => panic!("{}: {}", answer.status(), answer.text().await.unwrap_or_default()),
                Err(error) => Err(error),
            };
            match text {
                Ok(text) => return serde_json::from_str(&text).unwrap(),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// All pages, from the first to the last: the numbers of their lines. `count` tells how many pages there were so far.
    async fn pages(&self, order: &str, count: &AtomicU64) -> Vec<u64> {
        let mut numbers = Vec::new();
        let mut query = format!("order={order}");
        loop {
            let page = self.page(&query).await;
            numbers.extend(page["lines"].as_array().unwrap().iter().map(number));
            count.fetch_add(1, Ordering::AcqRel);
            let Some(pagination) = page["pagination"].as_str() else { return numbers };
            let encoded = |name: &str| page[name].as_str().unwrap().replace(':', "%3A").replace(' ', "%20");
            query = format!("order={order}&pagination={pagination}&from={}&to={}", encoded("from"), encoded("to"));
        }
    }

    /// Follows from the first line to the end of the VM, over as many streams as it takes; how many those were.
    async fn follow(&self, seen: &AtomicU64) -> u32 {
        let mut streams = 0;
        loop {
            let next = seen.load(Ordering::Acquire);
            let begin = if next == 0 { "stream?tail=1000000000" } else { "stream" };
            if let Ok(mut answer) = self.open(begin, next.checked_sub(1)).await {
                assert_eq!(answer.status(), 200);
                streams += 1;
                let mut text = Vec::new();
                while let Ok(Some(chunk)) = answer.chunk().await {
                    text.extend_from_slice(&chunk);
                    // What a broken stream has of an event is none.
                    while let Some(length) = text.windows(2).position(|end| end == b"\n\n") {
                        let event: Vec<u8> = text.drain(..length + 2).collect();
                        if told(std::str::from_utf8(&event).unwrap(), seen) {
                            return streams;
                        }
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Takes an event that a follower got: a line is the next, or nothing else than the end, which it says.
fn told(event: &str, seen: &AtomicU64) -> bool {
    let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    match field("event:") {
        Some("line") => {
            let line: Value = serde_json::from_str(field("data:").unwrap()).unwrap();
            let next = seen.fetch_add(1, Ordering::AcqRel);
            assert_eq!((number(&line), field("id:")), (next, Some(next.to_string().as_str())));
            false
        }
        Some("end") => true,
        // A heartbeat.
        None => false,
        Some(other) => panic!("{other}: {event}"),
    }
}

/// A line's number, which is also what it says.
fn number(line: &Value) -> u64 {
    let number = line["id"].as_u64().unwrap();
    assert_eq!(line["message"], format!("line {number}"));
    number
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_there_once_and_told_once_however_often_the_server_is_killed() {
    let mut site = Site::start(&[]).await;
    site.kill().await;
    let config = json!({ "Entrypoint": ["python3", "-c", PROGRAM], "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"] });
    let image = site.add_image("printer", config).await;
    site.serve(None).await;
    let started = site.ask("POST", "/v1/vm/start", Some(json!({ "imageId": image }))).await;
    assert_eq!(started.status, 200, "{started:?}");
    let vm: VmId = format!("vm-{}", started.body["id"].as_str().unwrap()).parse().unwrap();
    let http = reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).build().unwrap();
    let url = Arc::new(Mutex::new(site.url().to_owned()));
    let client = Client { http, url: Arc::clone(&url), key: site.key(), vm: vm.clone() };

    let (seen, pages, is_over) =
        (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
    let follower = tokio::spawn({
        let (client, seen) = (client.clone(), Arc::clone(&seen));
        async move { client.follow(&seen).await }
    });
    let pager = tokio::spawn({
        let (client, pages, is_over) = (client.clone(), Arc::clone(&pages), Arc::clone(&is_over));
        async move {
            while !is_over.load(Ordering::Acquire) {
                let numbers = client.pages("oldest_first", &pages).await;
                assert!((0..).zip(&numbers).all(|(want, got)| want == *got), "a pass has a gap or a line twice");
            }
        }
    });

    let log = Reader::open(site.data.join("logs").join(vm.as_str()));
    let end = || log.end().unwrap().0;
    for nth in 0..KILLS {
        let before = (end(), seen.load(Ordering::Acquire), pages.load(Ordering::Acquire));
        eventually("it is printed, followed and paged further", async || {
            assert!(!follower.is_finished() && !pager.is_finished(), "ended before kill {nth}");
            let (printed, told, paged) = before;
            end() > printed + 500 && seen.load(Ordering::Acquire) > told && pages.load(Ordering::Acquire) > paged
        })
        .await;
        site.kill().await;
        let printed = end();
        eventually("it prints while there is no server", async || end() > printed).await;
        site.serve(None).await;
        site.url().clone_into(&mut url.lock().unwrap());
    }
    site.sh(&vm, "touch /tmp/enough").await;
    let streams = tokio::time::timeout(Duration::from_secs(90), follower).await.expect("the VM ends").unwrap();
    is_over.store(true, Ordering::Release);
    pager.await.unwrap();
    let lines = end();
    println!("{lines} lines, {streams} streams, {} pages", pages.load(Ordering::Acquire));
    assert_eq!(seen.load(Ordering::Acquire), lines, "the follower saw every line");
    assert!(streams > KILLS, "{streams} streams");
    let all: Vec<u64> = (0..lines).collect();
    assert!(client.pages("oldest_first", &pages).await == all);
    assert!(client.pages("newest_first", &pages).await.into_iter().rev().eq(all));
    site.is_tidy().await;
}
