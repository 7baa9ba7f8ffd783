//! What programs print: searched and followed, in both dialects.

use std::path::PathBuf;

use anyhow::{Context, Result};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tiffin_logs::{Limits, Stream, Writer};
use tiffin_types::time::Timestamp;

use crate::harness::{Server, id_of, send, until};

/// 2023-11-14 22:13:20 UTC and a little.
fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000 + millis)
}

/// Writes as a VM's monitor does.
fn writer(server: &Server, vm: &str) -> Writer {
    let folder: PathBuf = server.data_dir().join("logs").join(id_of(vm).as_str());
    let writer = Writer::open(folder, Limits::default());
    assert!(writer.trouble().is_none());
    writer
}

fn print(writer: &mut Writer, lines: std::ops::Range<i64>) {
    for number in lines {
        writer.push(Stream::Stdout, format!("Line {number}\n").as_bytes(), at(number));
    }
}

fn messages(page: &Value) -> Vec<&str> {
    page["lines"].as_array().expect("lines").iter().map(|line| line["message"].as_str().expect("a message")).collect()
}

/// A stream of events, read as it comes.
struct Events {
    answer: Response,
    text: String,
}

impl Events {
    async fn open(server: &Server, path: &str, after: Option<&str>) -> Result<Self> {
        let mut request = server.request(Method::GET, path);
        if let Some(after) = after {
            request = request.header("Last-Event-ID", after);
        }
        let answer = request.send().await?.error_for_status()?;
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Ok(Self { answer, text: String::new() })
    }

    /// The next event's name, id and data.
    async fn next(&mut self) -> Result<(String, String, Value)> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    event.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap_or("").to_owned()
                };
                let found = (field("event"), field("id"), field("data"));
                self.text = rest.to_owned();
                if !found.0.is_empty() {
                    return Ok((found.0, found.1, serde_json::from_str(&found.2)?));
                }
                continue;
            }
            let chunk = self.answer.chunk().await?.context("the stream goes on")?;
            self.text.push_str(std::str::from_utf8(&chunk)?);
        }
    }

    async fn lines(&mut self, numbers: std::ops::Range<u64>) -> Result<()> {
        for number in numbers {
            let (name, id, line) = self.next().await?;
            assert_eq!((name.as_str(), id), ("line", number.to_string()));
            assert_eq!((&line["id"], &line["message"]), (&json!(number), &json!(format!("Line {number}"))));
        }
        Ok(())
    }
}

#[tokio::test]
async fn lines_are_searched_page_by_page_also_when_the_vm_is_gone() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let search = format!("{vm}/logs/search");
    assert_eq!(server.get(&search).await?.ok(200), json!({ "lines": [] }));
    let mut writer = writer(&server, &vm);
    print(&mut writer, 0..250);
    writer.push(Stream::Stderr, b"{\"level\":\"warn\"}\nbad \xff\n", at(300));

    let first = server.get(&format!("{search}?query=LINE&from=2023-11-14T22:13:20+0000")).await?.ok(200);
    assert_eq!(first["lines"][99], json!({ "id": 99, "at": at(99), "level": "info", "message": "Line 99" }));
    assert_eq!((&first["from"], messages(&first).len()), (&json!("2023-11-14 22:13:20 UTC"), 100));
    // As the answer has them; the spaces become what a query has for them.
    let more = |page: &Value| {
        let text = |name: &str| page[name].as_str().expect("a text").replace(' ', "+");
        format!("query=line&pagination={}&from={}&to={}", text("pagination"), text("from"), text("to"))
    };
    server.delete(&vm).await?.ok(204);
    server.get(&vm).await?.refused(404, "not_found");
    let second = server.get(&format!("{search}?batch=140&{}", more(&first))).await?.ok(200);
    let third = server.get(&format!("{search}?{}", more(&second))).await?.ok(200);
    let seen = [messages(&first), messages(&second), messages(&third)].concat();
    assert_eq!(seen, (0..250).map(|number| format!("Line {number}")).collect::<Vec<_>>());
    assert!(third.get("pagination").is_none() && third.get("from").is_none() && third.get("to").is_none());

    let newest = server.get(&format!("{search}?order=newest_first&batch=50")).await?.ok(200);
    assert_eq!(
        (&newest["lines"][0]["level"], &newest["lines"][0]["message"]),
        (&json!("error"), &json!("bad \u{fffd}"))
    );
    assert_eq!(newest["lines"][1]["level"], "warn");

    // The other dialect has the same lines in another form.
    let id = id_of(&vm);
    for path in [format!("/v1/vm/{}/logs", id.hex()), format!("/cakework/v1/vm/cached/{}/logs", id.hex())] {
        let page = server.get(&format!("{path}?from=2023-11-14%2022:13:20.001%20UTC")).await?.ok(200);
        assert_eq!(page["lines"][0], json!({ "timestamp": at(1).as_millis(), "level": "info", "message": "Line 1" }));
        assert_eq!(page["lines"].as_array().context("lines")?.len(), 100);
        assert!(page["pagination"].is_string() && page["to"].as_str().context("a date")?.ends_with(" UTC"));
    }
    Ok(())
}

#[tokio::test]
async fn wrong_queries_are_refused_by_name_and_other_accounts_see_nothing() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let cakework = format!("/v1/vm/{}/logs", id_of(&vm).hex());
    for search in [format!("{vm}/logs/search"), cakework.clone()] {
        let wrong = "batch=1001&order=up&pagination=x&from=now&to=then&query=a%0Ab";
        let reply = server.get(&format!("{search}?{wrong}")).await?;
        reply.refused(400, "invalid_parameter");
        let fields = reply.json()["details"]["fields"].to_string();
        for field in ["batch", "order", "pagination", "from", "to", "query"] {
            assert!(fields.contains(&format!("{field:?}")), "{field} in {fields}");
        }
        let message = server.get(&format!("{search}?limit=5")).await?.refused(400, "invalid_parameter");
        assert!(message.contains("limit") && message.contains("batch"), "{message}");
    }
    let stream = format!("{vm}/logs/stream");
    for (query, field) in [
        ("tail=-1", "tail"),
        ("tail=1&from=2023-11-14T22:13:20Z", "tail"),
        ("from=yesterday", "from"),
        ("query=a%0Ab", "query"),
        ("batch=50", "batch"),
    ] {
        let message = server.get(&format!("{stream}?{query}")).await?.refused(400, "invalid_parameter");
        assert!(message.contains(field), "{message}");
    }
    let request = server.request(Method::GET, &stream).header("Last-Event-ID", "last");
    send(request).await?.refused(400, "invalid_parameter");
    let other = server.other_key("other", &["read", "write"]).await?;
    for path in [format!("{vm}/logs/search"), stream, cakework] {
        server.get_as(&other, &path).await?.refused(404, "not_found");
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_tells_each_line_once_across_restarts_and_ends_with_the_vm() -> Result<()> {
    let mut server = Server::start().await?;
    let vm = server.vm().await?;
    let stream = format!("{vm}/logs/stream");
    let mut writer = writer(&server, &vm);
    print(&mut writer, 0..5);
    let mut events = Events::open(&server, &format!("{stream}?tail=2"), None).await?;
    events.lines(3..5).await?;
    print(&mut writer, 5..600);
    events.lines(5..600).await?;
    server.restart().await?;
    print(&mut writer, 600..603);
    let mut events = Events::open(&server, &stream, Some("599")).await?;
    events.lines(600..603).await?;
    let mut found = Events::open(&server, &format!("{stream}?tail=1000&query=LINE+9"), None).await?;
    for id in ["9", "90", "91"] {
        assert_eq!(found.next().await?.1, id);
    }
    let mut timed = Events::open(&server, &format!("{stream}?from=2023-11-14T22:13:20.601Z"), None).await?;
    timed.lines(601..603).await?;
    server.delete(&vm).await?.ok(204);
    print(&mut writer, 603..604);
    drop(writer);
    events.lines(603..604).await?;
    assert_eq!(events.next().await?.0, "end");
    assert!(events.answer.chunk().await?.is_none());
    // Of a VM that is gone, all is told, and the end.
    let mut late = Events::open(&server, &format!("{stream}?tail=1"), None).await?;
    late.lines(603..604).await?;
    assert_eq!(late.next().await?.0, "end");
    Ok(())
}

#[tokio::test]
async fn streams_are_bounded_and_say_what_was_forgotten() -> Result<()> {
    let server = Server::start_with(&[("limits.log_streams", "1")]).await?;
    let vm = server.vm().await?;
    let stream = format!("{vm}/logs/stream");
    let folder = server.data_dir().join("logs").join(id_of(&vm).as_str());
    let limits = Limits { total_bytes: 40 * 1024, segment_bytes: 2000, ..Limits::default() };
    let mut writer = Writer::open(folder, limits);
    print(&mut writer, 0..1000);
    let mut events = Events::open(&server, &stream, Some("0")).await?;
    let (name, _, data) = events.next().await?;
    assert_eq!(name, "missed");
    let next = data["lines"].as_u64().context("a number")? + 1;
    events.lines(next..1000).await?;
    server.get(&stream).await?.refused(429, "too_many");
    drop(events);
    until("its place is free", async || Ok(server.request(Method::GET, &stream).send().await?.status() == 200)).await
}
