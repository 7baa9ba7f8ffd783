//! `tiffin logs`: what a VM's program prints, searched or followed.
//!
//! Invariant: a stream that breaks off (a server that is restarted) is taken up after the last line that came, so that no
//! line is lost or printed twice. What a program prints can't control the terminal.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use reqwest::{
    Method,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use serde_json::Value;
use tiffin_types::{id::VmId, time::Timestamp};

use crate::{
    args::Connection,
    client::{Call, Client, query, sse::Parser},
    failure::Failure,
    output::{self, field, visible},
};

/// The API's largest page.
const BATCH: usize = 1000;
/// A stream may stay open for so long.
const STREAM_LIMIT: Duration = Duration::from_secs(30 * 86_400);
/// How often in a row a stream that broke off is taken up again, and the pauses before.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The VM, running or gone: vm-0123456789abcd or 0123456789abcd
    #[arg(value_parser = vm_id)]
    id: VmId,
    /// Go on with what is printed, until the VM is gone
    #[arg(long, short)]
    follow: bool,
    /// Only lines with this text, in upper or lower case
    #[arg(long, value_name = "TEXT")]
    search: Option<String>,
    /// Only lines from then on: 90s, 10m, 2h, 1d ago, or a date such as 2026-07-19T13:32:56Z
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only lines until then, in the same forms
    #[arg(long, value_name = "TIME", conflicts_with = "follow")]
    until: Option<String>,
    /// Only the newest lines, this many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    tail: Option<u32>,
    /// Print the lines alone, without time and level
    #[arg(long, conflicts_with = "json")]
    plain: bool,
    /// Print a line of JSON for each
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

fn vm_id(text: &str) -> Result<VmId, String> {
    text.parse().or_else(|_| format!("vm-{text}").parse()).map_err(|error: tiffin_types::id::IdError| error.to_string())
}

/// Prints the lines.
pub(crate) async fn run(args: LogsArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&args.connection)?;
    match (args.follow, args.tail) {
        (true, tail) => follow(&client, &args, tail).await?,
        (false, Some(tail)) => newest(&client, &args, tail as usize).await?,
        (false, None) => all(&client, &args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints page after page.
async fn all(client: &Client, args: &LogsArgs) -> Result<(), Failure> {
    let mut pages = Pages::new(args, "oldest_first", BATCH);
    while let Some(lines) = pages.next(client).await? {
        lines.iter().try_for_each(|line| show(args, line))?;
    }
    Ok(())
}

/// Prints the newest lines, oldest first.
async fn newest(client: &Client, args: &LogsArgs, tail: usize) -> Result<(), Failure> {
    let mut pages = Pages::new(args, "newest_first", tail.clamp(50, BATCH));
    let mut lines = Vec::new();
    while lines.len() < tail
        && let Some(page) = pages.next(client).await?
    {
        lines.extend(page);
    }
    lines.truncate(tail);
    lines.iter().rev().try_for_each(|line| show(args, line))
}

/// A search's pages.
struct Pages {
    path: String,
    parameters: Vec<(&'static str, String)>,
    /// What the last page said, `None` once there is no more.
    more: Option<Vec<(&'static str, String)>>,
}

impl Pages {
    fn new(args: &LogsArgs, order: &str, batch: usize) -> Self {
        let mut parameters = vec![("order", order.to_owned()), ("batch", batch.to_string())];
        parameters.extend(args.search.clone().map(|text| ("query", text)));
        let bounds = [("from", &args.since), ("to", &args.until)];
        let first = bounds.into_iter().filter_map(|(name, text)| Some((name, moment(text.as_deref()?)))).collect();
        Self { path: format!("/v1/vms/{}/logs/search", args.id), parameters, more: Some(first) }
    }

    async fn next(&mut self, client: &Client) -> Result<Option<Vec<Value>>, Failure> {
        let Some(more) = self.more.take() else { return Ok(None) };
        let all: Vec<(&str, &str)> =
            self.parameters.iter().chain(&more).map(|(name, text)| (*name, text.as_str())).collect();
        let mut page = client.get(&query(&self.path, &all)).await?;
        let named = |name| page.get(name).and_then(Value::as_str).map(|text| (name, text.to_owned()));
        if let (Some(pagination), Some(from), Some(to)) = (named("pagination"), named("from"), named("to")) {
            self.more = Some(vec![pagination, from, to]);
        }
        match page.get_mut("lines").map(Value::take) {
            Some(Value::Array(lines)) => Ok(Some(lines)),
            _ => Err(Failure::Exchange("the answer has no lines".to_owned())),
        }
    }
}

/// Prints lines as they come; a stream that breaks off is taken up again.
async fn follow(client: &Client, args: &LogsArgs, tail: Option<u32>) -> Result<(), Failure> {
    let path = format!("/v1/vms/{}/logs/stream", args.id);
    let mut parameters: Vec<(&str, String)> = args.search.iter().map(|text| ("query", text.clone())).collect();
    match (tail, &args.since) {
        (Some(tail), _) => parameters.push(("tail", tail.to_string())),
        (None, Some(since)) => parameters.push(("from", moment(since))),
        // All there is.
        (None, None) => parameters.push(("tail", 1_000_000_000.to_string())),
    }
    let parameters: Vec<(&str, &str)> = parameters.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let path = query(&path, &parameters);
    let mut last: Option<u64> = None;
    let (mut is_open, mut tries) = (false, 0);
    loop {
        let before = last;
        match stream(client, args, &path, &mut last, &mut is_open).await {
            Ok(true) => return Ok(()),
            Ok(false) | Err(Failure::Exchange(_) | Failure::Unreachable { .. }) if is_open && tries < TRIES => {}
            // It is about to stop, or has just begun.
            Err(Failure::Api(refused)) if is_open && tries < TRIES && refused.status == 503 => {}
            Ok(false) => return Err(Failure::Exchange("the server ends the stream again and again".to_owned())),
            Err(failure) => return Err(failure),
        }
        tries = if last == before { tries + 1 } else { 0 };
        tokio::time::sleep((PAUSE * (tries + 1)).min(PAUSE_MAX)).await;
    }
}

/// Prints one stream; whether it came to the log's end.
async fn stream(
    client: &Client,
    args: &LogsArgs,
    path: &str,
    last: &mut Option<u64>,
    is_open: &mut bool,
) -> Result<bool, Failure> {
    let resume = last.map(|last| (HeaderName::from_static("last-event-id"), HeaderValue::from(last)));
    let call = Call { headers: HeaderMap::from_iter(resume), limit: STREAM_LIMIT, ..Call::new(Method::GET, path) };
    let mut answer = client.send(call).await?;
    *is_open = true;
    let mut parser = Parser::default();
    while let Some(chunk) = client.chunk(&mut answer).await? {
        for event in parser.push(&chunk).map_err(|error| Failure::Exchange(error.to_string()))? {
            let data: Value = serde_json::from_str(&event.data)
                .map_err(|error| Failure::Exchange(format!("an event of the stream is no JSON: {error}")))?;
            match event.name.as_str() {
                "line" => {
                    show(args, &data)?;
                    *last = data.get("id").and_then(Value::as_u64).or(*last);
                }
                "missed" => {
                    let lines = field(&data, "lines");
                    output::print_error(&format!("tiffin: {lines} lines were forgotten before they came here\n"))?;
                }
                "end" => return Ok(true),
                // A later server may send more kinds.
                _ => {}
            }
        }
    }
    Ok(false)
}

fn show(args: &LogsArgs, line: &Value) -> Result<(), Failure> {
    if args.json {
        return output::print(&format!("{line}\n"));
    }
    let message = field(line, "message");
    if args.plain {
        return output::print(&format!("{}\n", visible(&message)));
    }
    let (at, level) = (field(line, "at"), field(line, "level"));
    output::print(&format!("{at} {:<5} {}\n", visible(&level), visible(&message)))
}

/// A time as the API takes it: some time ago, or what the user wrote, which the server judges.
fn moment(text: &str) -> String {
    ago_ms(text).map_or_else(|| text.to_owned(), |ms| Timestamp::now().plus_millis(-ms).to_string())
}

fn ago_ms(text: &str) -> Option<i64> {
    let unit = text.chars().last()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    let count: u32 = text.strip_suffix(unit)?.parse().ok()?;
    i64::from(count).checked_mul(seconds * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_ago_are_told_from_dates() {
        assert_eq!(["90s", "10m", "2h", "1d"].map(ago_ms), [90_000, 600_000, 7_200_000, 86_400_000].map(Some));
        for date in ["", "m", "-5m", "10", "2026-07-19T13:32:56Z", "1.5h"] {
            assert_eq!(ago_ms(date), None);
            assert_eq!(moment(date), date);
        }
    }
}
