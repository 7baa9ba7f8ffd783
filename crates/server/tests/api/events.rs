//! `/v1/admin/events`: what is written down, as it is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::harness::{Server, send, until};

/// A stream of events, read as far as asked.
struct Stream {
    response: reqwest::Response,
    text: String,
}

impl Stream {
    async fn open(server: &Server, after: Option<&str>) -> Result<Self> {
        let mut request = server.client.get(format!("{}/v1/admin/events", server.url)).header("X-API-Key", &server.key);
        if let Some(id) = after {
            request = request.header("Last-Event-ID", id);
        }
        let response = request.send().await?;
        ensure!(response.status() == 200, "{}", response.status());
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Ok(Self { response, text: String::new() })
    }

    /// The next event: its name, id and data.
    async fn next(&mut self) -> Result<(String, String, Value)> {
        let read = async {
            while !self.text.contains("\n\n") {
                let chunk = self.response.chunk().await?.context("the stream ended")?;
                self.text.push_str(std::str::from_utf8(&chunk)?);
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(20), read).await.context("no event came")??;
        let (event, rest) = self.text.split_once("\n\n").context("an event")?;
        let found = parts(event)?;
        self.text = rest.to_owned();
        Ok(found)
    }
}

/// An event's name, id and data.
fn parts(event: &str) -> Result<(String, String, Value)> {
    let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim().to_owned();
    Ok((field("event:"), field("id:"), serde_json::from_str(&field("data:"))?))
}

/// A stream of events over a connection that takes no more than it must.
struct Stalled {
    socket: TcpStream,
    bytes: Vec<u8>,
}

impl Stalled {
    async fn open(server: &Server, after: &str) -> Result<Self> {
        let address = server.url.strip_prefix("http://").context("an address")?;
        let socket = TcpSocket::new_v4()?;
        // Set before it connects: the sender learns of it then.
        socket.set_recv_buffer_size(32 * 1024)?;
        let mut socket = socket.connect(address.parse()?).await?;
        // An answer in this version comes without anything in between its bytes.
        let head =
            format!("GET /v1/admin/events HTTP/1.0\r\nX-API-Key: {}\r\nLast-Event-ID: {after}\r\n\r\n", server.key);
        socket.write_all(head.as_bytes()).await?;
        let mut stalled = Self { socket, bytes: Vec::new() };
        let head = stalled.until(b"\r\n\r\n").await?;
        ensure!(head.contains(" 200 "), "{head}");
        Ok(stalled)
    }

    async fn next(&mut self) -> Result<(String, String, Value)> {
        parts(&self.until(b"\n\n").await?)
    }

    /// What comes up to there.
    async fn until(&mut self, end: &[u8]) -> Result<String> {
        loop {
            if let Some(length) = self.bytes.windows(end.len()).position(|window| window == end) {
                let text: Vec<u8> = self.bytes.drain(..length + end.len()).collect();
                return Ok(String::from_utf8(text)?);
            }
            let read = tokio::time::timeout(Duration::from_secs(20), self.socket.read_buf(&mut self.bytes));
            ensure!(read.await.context("nothing came")?? > 0, "the stream ended");
        }
    }
}

#[tokio::test]
async fn events_come_live_and_a_stream_resumes_where_it_was() -> Result<()> {
    let server = Server::start().await?;
    let mut stream = Stream::open(&server, None).await?;
    let vm = server.vm().await?;
    let (name, first, data) = stream.next().await?;
    assert_eq!((name.as_str(), &data["id"]), ("vm_state", &json!(first)));
    let began = data["details"]["state"].as_str().context("a state")?.to_owned();
    drop(stream);
    server.act(&format!("{vm}/stop")).await?.ok(204);
    let mut stream = Stream::open(&server, Some(&first)).await?;
    server.delete(&vm).await?.ok(204);
    let (mut states, mut operations, mut last) = (vec![began], Vec::new(), first);
    while operations.len() < 3 || states.last().is_none_or(|state| state != "DELETED") {
        let (name, id, data) = stream.next().await?;
        assert!(id > last, "each once and in order");
        last = id;
        match name.as_str() {
            "vm_state" => states.push(data["details"]["state"].as_str().context("a state")?.to_owned()),
            _ => operations.push(data["event"].as_str().context("an operation")?.to_owned()),
        }
    }
    assert!(states.ends_with(&["RUNNING", "STOPPING", "STOPPED", "DELETED"].map(str::to_owned)), "{states:?}");
    assert_eq!(operations, ["vm_create", "vm_stop", "vm_delete"]);
    let bad = server.request(Method::GET, "/v1/admin/events").header("Last-Event-ID", "nonsense");
    send(bad).await?.refused(400, "invalid_parameter");
    Ok(())
}

#[tokio::test]
async fn streams_are_bounded_a_place_comes_free_and_a_shutdown_ends_them() -> Result<()> {
    let server = Server::start_with(&[("limits.event_streams", "1"), ("http.shutdown_grace_ms", "20000")]).await?;
    let one = Stream::open(&server, None).await?;
    server.get("/v1/admin/events").await?.refused(429, "too_many");
    drop(one);
    let mut again = None;
    until("its place is free", async || {
        again = Stream::open(&server, None).await.ok();
        Ok(again.is_some())
    })
    .await?;
    server.stop().await;
    let mut rest = again.context("a stream")?.response;
    while let Ok(Some(_)) = rest.chunk().await {}
    Ok(())
}

/// Leaves so many entries, by calls that are refused.
async fn flood(server: &Server, key: &str, entries: usize) -> Result<()> {
    let vm = format!("{}/v1/vms/vm-00000000000000", server.url);
    let calls = stream::iter(0..entries).map(|_| send(server.client.delete(&vm).header("X-API-Key", key)));
    calls
        .buffer_unordered(32)
        .try_for_each(async |reply| {
            ensure!(reply.status == 403, "{}", reply.text);
            Ok(())
        })
        .await
}

/// The ids of the newest entries, oldest first, back to the one after that id.
async fn ids_after(server: &Server, after: &str) -> Result<Vec<String>> {
    let (mut ids, mut before) = (Vec::new(), String::new());
    loop {
        let page = server.get(&format!("/v1/admin/activity?limit=1000{before}")).await?.ok(200);
        let page: Vec<String> = page
            .as_array()
            .context("a list")?
            .iter()
            .filter_map(|entry| Some(entry["id"].as_str()?.to_owned()))
            .collect();
        let last = page.last().cloned();
        ids.extend(page.into_iter().take_while(|id| id.as_str() > after));
        match last.filter(|last| last.as_str() > after) {
            Some(last) => before = format!("&before={last}"),
            None => break,
        }
    }
    ids.reverse();
    Ok(ids)
}

#[tokio::test]
async fn a_reader_that_falls_behind_is_told_so_and_catches_up() -> Result<()> {
    let server = Server::start().await?;
    // A long name, which each entry tells: so fewer fill the buffers.
    let body = json!({ "name": "\u{1F371}".repeat(100), "scopes": ["read"], "accountId": server.account().await? });
    let key = server.post("/v1/admin/api-keys", &body).await?.ok(201)["key"].as_str().context("a key")?.to_owned();
    let mut told = ids_after(&server, "").await?.pop().context("an entry")?;
    // Neither the kernel's nor the connection's buffers take them all: those take 4 MB or so, which differs.
    for entries in [8_000, 16_000, 32_000] {
        let mut stalled = Stalled::open(&server, &told).await?;
        // It has read what was there, and waits for what comes.
        flood(&server, &key, 1).await?;
        told = stalled.next().await?.1;
        flood(&server, &key, entries).await?;
        // Thousands of entries are many pages: a machine with other work takes its time for them.
        let deadline = Instant::now() + Duration::from_secs(90);
        let all = loop {
            let all = ids_after(&server, &told).await?;
            if all.len() == entries {
                break all;
            }
            anyhow::ensure!(Instant::now() < deadline, "{} of {entries} are written", all.len());
            tokio::time::sleep(Duration::from_millis(500)).await;
        };
        let (mut seen, mut is_missed) = (Vec::new(), false);
        while seen.len() < all.len() && !is_missed {
            let (name, id, data) = stalled.next().await?;
            is_missed = name == "missed";
            if is_missed {
                assert!(data["message"].as_str().context("a message")?.contains("Last-Event-ID"), "{data}");
            } else {
                seen.push(id);
            }
        }
        if is_missed {
            println!("{} of {entries} were told before", seen.len());
            assert!(stalled.next().await.is_err(), "the stream ends");
            let last = seen.last().context("something was told before")?;
            let mut resumed = Stalled::open(&server, last).await?;
            while seen.len() < all.len() {
                seen.push(resumed.next().await?.1);
            }
            assert!(seen == all, "each once and in order");
            return Ok(());
        }
        assert!(seen == all, "each once and in order");
        told = seen.pop().context("entries")?;
    }
    anyhow::bail!("a reader was never told that it fell behind")
}
