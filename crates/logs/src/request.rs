//! A query of logs as clients ask it, and the answer as they get it.
//!
//! Invariants: a query without an end (`to`) ends with the second in which its first page was asked for, so that paging comes
//! to an end while a program prints. An answer that isn't the last carries a token and the bounds of its query; the token
//! alone says where to go on, and bounds that come back with it must be the ones that went with it.

use std::io;

use tiffin_types::time::Timestamp;

use crate::{Budget, Line, Needle, Order, Query, Reader, date, token::Token};

/// Lines of a page.
const BATCH: std::ops::RangeInclusive<usize> = 50..=1000;
/// Lines of a page when the request names none.
const BATCH_DEFAULT: usize = 100;

/// A query's parameters, as they were sent; empty where they weren't.
#[derive(Debug, Clone, Copy, Default)]
pub struct Parameters<'a> {
    /// Text to search for.
    pub query: Option<&'a str>,
    /// Lines of a page.
    pub batch: Option<&'a str>,
    /// `oldest_first` or `newest_first`.
    pub order: Option<&'a str>,
    /// What the answer before carried.
    pub pagination: Option<&'a str>,
    /// The earliest time.
    pub from: Option<&'a str>,
    /// The latest time.
    pub to: Option<&'a str>,
}

/// A parameter that can't be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {message}")]
pub struct WrongParameter {
    /// Its name.
    pub field: &'static str,
    /// What it must be.
    pub message: String,
}

/// A query that can be answered.
#[derive(Debug, Clone)]
pub struct Request {
    needle: Option<Needle>,
    batch: usize,
    order: Order,
    from: Option<Timestamp>,
    to: Option<Timestamp>,
    token: Option<Token>,
    bound_to: String,
}

/// Lines, and how to ask for more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// In the order that was asked for.
    pub lines: Vec<Line>,
    /// If there may be more.
    pub more: Option<More>,
}

/// What to send along with the same query for the next page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct More {
    /// The place.
    pub pagination: String,
    /// The earliest time.
    pub from: String,
    /// The latest time.
    pub to: String,
}

impl Request {
    /// Reads a query's parameters. `log` names what is queried: a token holds for it alone.
    ///
    /// # Errors
    /// All that are wrong.
    pub fn read(log: &str, sent: &Parameters<'_>) -> Result<Self, Vec<WrongParameter>> {
        let mut wrong = Vec::new();
        let text = sent.query.filter(|text| !text.is_empty());
        let needle = text.and_then(|text| or_wrong(&mut wrong, "query", Needle::new(text).map_err(|e| e.to_string())));
        let batch = sent.batch.map(|text| text.parse().ok().filter(|batch| BATCH.contains(batch)).ok_or_else(batch_is));
        let batch = batch.and_then(|batch| or_wrong(&mut wrong, "batch", batch));
        let order = sent.order.and_then(|text| or_wrong(&mut wrong, "order", order(text)));
        let mut moment = |field, text: Option<&str>| {
            let read = |text| date::read(text).ok_or_else(|| format!("must be a date such as {}", date::FORMS));
            text.and_then(|text| or_wrong(&mut wrong, field, read(text)))
        };
        let (from, to) = (moment("from", sent.from), moment("to", sent.to));
        if from.zip(to).is_some_and(|(from, to)| from > to) {
            wrong.push(WrongParameter { field: "from", message: "must not be later than to: exchange them".into() });
        }
        let bound_to = format!("{log}\0{}", text.unwrap_or_default().to_lowercase());
        let token = sent.pagination.filter(|text| !text.is_empty()).and_then(|text| {
            let read = Token::decode(text, &bound_to).ok_or_else(|| {
                "must be as an answer carried it, sent with the same id and query; leave it out to begin anew"
                    .to_owned()
            });
            or_wrong(&mut wrong, "pagination", read)
        });
        if let Some(token) = &token {
            wrong.extend(differing(token, sent.order.and(order), from, to));
        }
        if !wrong.is_empty() {
            return Err(wrong);
        }
        let order = token.as_ref().map_or(order.unwrap_or(Order::OldestFirst), |token| token.order);
        Ok(Self { needle, batch: batch.unwrap_or(BATCH_DEFAULT), order, from, to, token, bound_to })
    }

    /// Answers it from that log.
    ///
    /// # Errors
    /// The kernel's.
    pub fn answer(&self, log: &Reader, now: Timestamp, budget: Budget) -> io::Result<Answer> {
        let token = match &self.token {
            Some(token) => *token,
            None => self.begin(log, now)?,
        };
        let (text, after) = (self.needle.clone(), token.place);
        let (from, to) = (token.from, Some(token.to));
        let page = log.page(&Query { text, batch: self.batch, order: self.order, after, from, to, budget })?;
        let more = page.next().map(|place| Token { place: Some(place), ..token }.more(&self.bound_to));
        Ok(Answer { lines: page.lines, more })
    }

    /// The query's bounds, which its later pages keep.
    fn begin(&self, log: &Reader, now: Timestamp) -> io::Result<Token> {
        let times = log.times()?;
        let oldest = times.map(|(oldest, _)| oldest);
        let newest = times.map_or(now, |(_, newest)| newest.max(now));
        let to = self.to.unwrap_or_else(|| date::second_after(newest));
        let shown_from = date::second_before(self.from.or(oldest).unwrap_or(now).min(to));
        Ok(Token { order: self.order, from: self.from, to, shown_from, place: None })
    }
}

impl Token {
    fn more(&self, bound_to: &str) -> More {
        More {
            pagination: self.encode(bound_to),
            from: date::write(self.shown_from),
            to: date::write(date::second_after(self.to)),
        }
    }
}

/// What doesn't go with the token that came along.
fn differing(
    token: &Token,
    order: Option<Order>,
    from: Option<Timestamp>,
    to: Option<Timestamp>,
) -> impl Iterator<Item = WrongParameter> {
    let order = order.is_some_and(|order| order != token.order).then_some("order");
    let from = from.is_some_and(|from| date::second_before(from) != token.shown_from).then_some("from");
    let to = to.is_some_and(|to| date::second_after(to) != date::second_after(token.to)).then_some("to");
    [order, from, to].into_iter().flatten().map(|field| WrongParameter {
        field,
        message: "must be that of the answer which carried this pagination; leave pagination out to begin anew".into(),
    })
}

fn order(text: &str) -> Result<Order, String> {
    match text {
        "oldest_first" => Ok(Order::OldestFirst),
        "newest_first" => Ok(Order::NewestFirst),
        _ => Err("must be oldest_first (when it isn't given) or newest_first".to_owned()),
    }
}

fn batch_is() -> String {
    format!("must be a whole number from {} to {} ({BATCH_DEFAULT} when it isn't given)", BATCH.start(), BATCH.end())
}

fn or_wrong<T>(wrong: &mut Vec<WrongParameter>, field: &'static str, read: Result<T, String>) -> Option<T> {
    read.map_err(|message| wrong.push(WrongParameter { field, message })).ok()
}
