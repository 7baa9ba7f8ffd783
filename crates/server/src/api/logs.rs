//! `/v1/vms/{id}/logs/search` and `/v1/vms/{id}/logs/stream`: what users' programs print.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::HeaderMap,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::stream;
use serde::Serialize;
use serde_json::json;
use tiffin_logs::{Answer, Line, Needle, Request, WrongParameter, read_date};
use tiffin_types::{id::VmId, time::Timestamp};
use utoipa::ToSchema;

use super::request::{Id, Parameters};
use crate::{
    app::{
        App,
        auth::Caller,
        logs::{self, Begin, Followed},
    },
    error::{AppError, FieldError},
};

/// Between two heartbeats, which are comments.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Lines before its end that a stream may begin at.
const TAIL_MAX: u64 = 1_000_000_000;

/// A line that a program printed.
#[derive(Serialize, ToSchema)]
pub(crate) struct LogLine {
    /// Its number among the VM's lines; they count from 0.
    id: u64,
    /// When it was printed.
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// `info` from stdout, `error` from stderr; a line of JSON with a `level` or `severity` has its own.
    #[schema(example = "info")]
    level: String,
    /// Without its end. Bytes that are no UTF-8 are U+FFFD.
    message: String,
}

/// Lines, and how to ask for more.
#[derive(Serialize, ToSchema)]
pub(crate) struct LogPage {
    /// In the order that was asked for.
    lines: Vec<LogLine>,
    /// If there may be more: send it, `from` and `to` along with the same query.
    #[serde(skip_serializing_if = "Option::is_none")]
    pagination: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2023-03-07 06:12:56 UTC")]
    from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2023-03-08 06:11:56 UTC")]
    to: Option<String>,
}

impl From<Line> for LogLine {
    fn from(line: Line) -> Self {
        Self { id: line.number, at: Timestamp::from_millis(line.time_ms), level: line.level, message: line.message }
    }
}

/// Search what a VM's program printed
///
/// Lines of the program that the VM was made for, oldest first unless `order` says otherwise; also after the VM is
/// gone, for as long as logs are kept. A page with `pagination` isn't the last: it may have fewer lines than `batch`, even
/// none, when a search takes long.
#[utoipa::path(get, path = "/v1/vms/{id}/logs/search", operation_id = "log_list", tag = "VMs",
    params(("id" = String, Path),
        ("query" = Option<String>, Query, description = "Only lines with this text, in upper or lower case"),
        ("batch" = Option<u32>, Query, minimum = 50, maximum = 1000, description = "Lines; 100 when missing"),
        ("order" = Option<String>, Query, description = "`oldest_first` (when missing) or `newest_first`"),
        ("pagination" = Option<String>, Query, description = "From the page before"),
        ("from" = Option<String>, Query, description = "Only lines from then on: `2022-07-19T13:32:56+0000`, `2022-07-19T13:32:56Z` or `2022-07-19 13:32:56 UTC`"),
        ("to" = Option<String>, Query, description = "Only lines until then, in one of these forms")),
    responses((status = 200, description = "Lines", body = LogPage)))]
pub(crate) async fn log_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    parameters: Parameters,
) -> Result<Json<LogPage>, AppError> {
    let answer = answer(&app, &caller, &id, parameters).await?;
    let lines = answer.lines.into_iter().map(Into::into).collect();
    let (pagination, from, to) = match answer.more {
        Some(more) => (Some(more.pagination), Some(more.from), Some(more.to)),
        None => (None, None, None),
    };
    Ok(Json(LogPage { lines, pagination, from, to }))
}

/// What a query of a VM's lines comes to, in either dialect.
pub(super) async fn answer(
    app: &Arc<App>,
    caller: &Caller,
    id: &VmId,
    mut parameters: Parameters,
) -> Result<Answer, AppError> {
    let [query, batch, order, pagination, from, to] =
        ["query", "batch", "order", "pagination", "from", "to"].map(|name| parameters.take(name));
    parameters.finish("query, batch, order, pagination, from and to are")?;
    let sent = tiffin_logs::Parameters {
        query: query.as_deref(),
        batch: batch.as_deref(),
        order: order.as_deref(),
        pagination: pagination.as_deref(),
        from: from.as_deref(),
        to: to.as_deref(),
    };
    let named = |wrong: WrongParameter| FieldError { field: wrong.field.to_owned(), message: wrong.message };
    let request =
        Request::read(id.as_str(), &sent).map_err(|wrong| AppError::Fields(wrong.into_iter().map(named).collect()))?;
    logs::log_list(app, caller, id, request).await
}

/// Follow what a VM's program prints
///
/// Server-sent events: `line` with a line as data and its number as id; `missed`, `{"lines": 12}`, when lines were forgotten
/// before this reader came to them; `end` when the VM is gone and all is told. A stream that breaks off is taken up without
/// loss by `Last-Event-ID`. Without it, it begins with what comes, at `from`, or `tail` lines before the end.
#[utoipa::path(get, path = "/v1/vms/{id}/logs/stream", operation_id = "log_follow", tag = "VMs",
    params(("id" = String, Path),
        ("Last-Event-ID" = Option<String>, Header, description = "The last line that was received"),
        ("query" = Option<String>, Query, description = "Only lines with this text, in upper or lower case"),
        ("tail" = Option<u64>, Query, maximum = 1_000_000_000, description = "Begin so many lines before the end"),
        ("from" = Option<String>, Query, description = "Begin with the lines from then on, as in a search")),
    responses((status = 200, description = "Lines until one side ends it", body = String, content_type = "text/event-stream"),
        (status = 429)))]
pub(crate) async fn log_follow(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    headers: HeaderMap,
    mut parameters: Parameters,
) -> Result<Response, AppError> {
    let text = parameters.take("query").filter(|text| !text.is_empty());
    let text = text.map(|text| Needle::new(&text)).transpose();
    let text = text.map_err(|error| AppError::field("query", error.to_string()))?;
    let tail = parameters.optional("tail", None, &format!("must be a whole number from 0 to {TAIL_MAX}"), |text| {
        text.parse().ok().filter(|lines| *lines <= TAIL_MAX).map(Some)
    })?;
    let dates = "must be a date such as 2022-07-19T13:32:56Z";
    let from = parameters.optional("from", None, dates, |text| read_date(text).map(Some))?;
    parameters.finish("query, tail and from are")?;
    if tail.is_some() && from.is_some() {
        return Err(AppError::field("tail", "says where to begin, as from does: send one of them"));
    }
    let last = match headers.get("last-event-id").map(|value| value.to_str().unwrap_or("?")) {
        None | Some("") => None,
        Some(text) => Some(text.parse().map_err(|_| {
            AppError::field("Last-Event-ID", "must be the id of a line, a whole number, or be left out")
        })?),
    };
    let begin = match (last, from) {
        (Some(last), _) => Begin::After(last),
        (None, Some(from)) => Begin::From(from),
        (None, None) => Begin::Tail(tail.unwrap_or(0)),
    };
    let follower = logs::log_follow(&app, &caller, &id, begin, text).await?;
    let events = stream::unfold(follower, |mut follower| async {
        let event = event(follower.next().await?);
        Some((Ok::<Event, Infallible>(event), follower))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)).into_response())
}

fn event(followed: Followed) -> Event {
    match followed {
        Followed::Line(line) => {
            let line = LogLine::from(line);
            let data = serde_json::to_string(&line).expect("plain structs with string keys always serialize");
            Event::default().id(line.id.to_string()).event("line").data(data)
        }
        Followed::Missed(lines) => Event::default().event("missed").data(json!({ "lines": lines }).to_string()),
        Followed::End => Event::default().event("end").data("{}"),
    }
}
