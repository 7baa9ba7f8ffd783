//! Request bodies: JSON objects, bounded in size and time, read field by field; and bytes that are passed on as they come.
//!
//! Invariant: whatever the body is, the answer names what is wrong with it, every wrong field at once; a field that
//! nobody asked for is an error, as a misspelt one would otherwise be ignored without a word (but in the dialect that has it
//! so).

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, BodyDataStream, HttpBody},
    extract::{FromRequest, Request},
    http::{HeaderMap, header},
};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::{
    app::App,
    error::{AppError, FieldError},
};

/// So much of a body that is too large is read and dropped: many clients read no answer before they have sent all.
const DRAINED: usize = 64 << 20;

/// A JSON object that came as a body.
pub(crate) struct JsonObject(Map<String, Value>);

impl FromRequest<Arc<App>> for JsonObject {
    type Rejection = AppError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, AppError> {
        let (parts, body) = request.into_parts();
        is_json(&parts.headers)?;
        let read = read(&parts.headers, body, app.config.limits.body_bytes);
        let bytes =
            tokio::time::timeout(app.config.http.body_timeout, read).await.map_err(|_| AppError::BodyTimeout)??;
        parse(&bytes)
    }
}

/// As [`JsonObject`], where a missing body is an empty object.
pub(crate) struct OptionalJsonObject(pub(crate) JsonObject);

impl FromRequest<Arc<App>> for OptionalJsonObject {
    type Rejection = AppError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, AppError> {
        if request.body().is_end_stream() {
            return Ok(Self(JsonObject(Map::new())));
        }
        JsonObject::from_request(request, app).await.map(Self)
    }
}

impl JsonObject {
    /// The SHA-256 of the object, the same for the same fields in another order or spacing.
    pub(crate) fn sha256(&self) -> [u8; 32] {
        let text = serde_json::to_vec(&self.0).expect("a parsed object is JSON again");
        Sha256::digest(text).into()
    }

    /// Its fields, to be taken one by one.
    pub(crate) fn fields(self) -> Fields {
        Fields { object: self.0, errors: Vec::new() }
    }
}

/// A missing type is let through: what follows must be JSON anyway.
fn is_json(headers: &HeaderMap) -> Result<(), AppError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let essence = value.to_str().unwrap_or("").split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    Err(AppError::MediaType { what: "JSON", types: "application/json" })
}

/// How many bytes the client says that it sends.
fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok())
}

async fn read(headers: &HeaderMap, body: Body, limit: usize) -> Result<Vec<u8>, AppError> {
    let announced = announced(headers);
    if announced.is_some_and(|bytes| bytes > limit as u64) && headers.contains_key(header::EXPECT) {
        // The client asks before it sends.
        return Err(AppError::TooLarge(limit));
    }
    let (mut bytes, mut seen) = (Vec::new(), 0_usize);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| AppError::BadRequest("the body broke off: send it whole".into()))?;
        seen = seen.saturating_add(chunk.len());
        if seen > limit.saturating_add(DRAINED) {
            break;
        }
        if seen <= limit {
            bytes.extend_from_slice(&chunk);
        }
    }
    if seen > limit { Err(AppError::TooLarge(limit)) } else { Ok(bytes) }
}

/// A body that is passed on as it comes: pieces, until it is over or breaks off.
pub(crate) struct RawBody {
    pieces: BodyDataStream,
    announced: Option<u64>,
    /// Whether the client waits for a word before it sends.
    asks_first: bool,
}

impl RawBody {
    /// The body of a request whose type is one of `types`; `limit` is the most that is taken.
    pub(crate) async fn new(
        request: Request,
        types: &[&str],
        wanted: (&'static str, &'static str),
        limit: u64,
        patience: Duration,
    ) -> Result<Self, AppError> {
        let (parts, body) = request.into_parts();
        let value = parts.headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or(""));
        let essence = value.unwrap_or("").split(';').next().unwrap_or("").trim().to_ascii_lowercase();
        let asks_first = parts.headers.contains_key(header::EXPECT);
        let body = Self { pieces: body.into_data_stream(), announced: announced(&parts.headers), asks_first };
        let refused = if !types.contains(&essence.as_str()) {
            AppError::MediaType { what: wanted.0, types: wanted.1 }
        } else if body.announced.is_some_and(|bytes| bytes > limit) {
            AppError::TooLarge(usize::try_from(limit).unwrap_or(usize::MAX))
        } else {
            return Ok(body);
        };
        body.drain(patience).await;
        Err(refused)
    }

    /// Reads and drops what is left of a body that is of no use any more: many clients read no answer before they have
    /// sent all. Bounded in bytes and time.
    pub(crate) async fn drain(mut self, patience: Duration) {
        if self.asks_first || self.announced.is_some_and(|bytes| bytes > DRAINED as u64) {
            return;
        }
        let all = async {
            let mut seen = 0_usize;
            while let Some(Ok(piece)) = self.pieces.next().await {
                seen = seen.saturating_add(piece.len());
                if seen > DRAINED {
                    return;
                }
            }
        };
        // The answer goes out anyway.
        let _ = tokio::time::timeout(patience, all).await;
    }

    /// The pieces, for who outlives the request's handler.
    pub(crate) fn into_pieces(self) -> BodyDataStream {
        self.pieces
    }

    /// How many bytes the client says that it sends.
    pub(crate) fn announced(&self) -> Option<u64> {
        self.announced
    }

    /// The pieces.
    pub(crate) fn pieces(&mut self) -> &mut BodyDataStream {
        &mut self.pieces
    }
}

fn parse(bytes: &[u8]) -> Result<JsonObject, AppError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(AppError::BadRequest("the body is empty: send a JSON object".into()));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(JsonObject(object)),
        Ok(_) => Err(AppError::BadRequest("the body is JSON, but no object: send an object, {...}".into())),
        Err(error) => Err(AppError::BadRequest(format!("the body is not valid JSON: {error}"))),
    }
}

/// An object's fields, and what is wrong with those that were taken so far.
pub(crate) struct Fields {
    object: Map<String, Value>,
    errors: Vec<FieldError>,
}

impl From<Map<String, Value>> for Fields {
    fn from(object: Map<String, Value>) -> Self {
        Self { object, errors: Vec::new() }
    }
}

impl Fields {
    /// Whether the field is given.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// The field, removed; `None` when it's missing.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.object.remove(name)
    }

    /// Notes that a field is wrong.
    pub(crate) fn wrong(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.errors.push(FieldError { field: field.into(), message: message.into() });
    }

    /// A field that must be there; `read` makes a value of it, or `None` when it isn't `expected`.
    pub(crate) fn required<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(Value) -> Option<T>,
    ) -> Option<T> {
        let Some(value) = self.take(name) else {
            self.wrong(name, format!("is missing; it {expected}"));
            return None;
        };
        let made = read(value);
        if made.is_none() {
            self.wrong(name, expected);
        }
        made
    }

    /// A field that may be missing, then it is `default`. `null` is not missing.
    pub(crate) fn optional<T>(
        &mut self,
        name: &str,
        default: T,
        expected: &str,
        read: impl FnOnce(Value) -> Option<T>,
    ) -> Option<T> {
        if self.object.contains_key(name) { self.required(name, expected, read) } else { Some(default) }
    }

    /// A list of texts, each without NUL; missing is empty. `check` tells what else an entry must be.
    pub(crate) fn texts(
        &mut self,
        name: &str,
        most: usize,
        check: impl Fn(&str) -> Result<(), String>,
    ) -> Option<Vec<String>> {
        let expected = format!("must be a list of at most {most} texts");
        let given = self.optional(name, Vec::new(), &expected, |value| match value {
            Value::Array(given) if given.len() <= most => Some(given),
            _ => None,
        })?;
        let mut texts = Vec::with_capacity(given.len());
        for (at, value) in given.into_iter().enumerate() {
            match text(value).filter(|text| !text.contains('\0')) {
                None => self.wrong(format!("{name}[{at}]"), "must be a text without NUL"),
                Some(text) => match check(&text) {
                    Ok(()) => texts.push(text),
                    Err(message) => self.wrong(format!("{name}[{at}]"), message),
                },
            }
        }
        Some(texts)
    }

    /// The field's object, whose own fields are then taken from what is returned.
    pub(crate) fn finish_with<T>(mut self, value: Option<T>, known: &str) -> Result<T, AppError> {
        let unknown: Vec<String> = self.object.keys().cloned().collect();
        for name in unknown {
            let shown: String = name.chars().take(64).collect();
            self.wrong(shown, format!("is no field of this request: {known}"));
        }
        self.finish_leniently(value)
    }

    /// As [`Fields::finish_with`], where fields that nobody took are no error.
    pub(crate) fn finish_leniently<T>(self, value: Option<T>) -> Result<T, AppError> {
        match value {
            Some(value) if self.errors.is_empty() => Ok(value),
            _ => Err(AppError::Fields(self.errors)),
        }
    }
}

/// A whole number in a range. `2.0` is none: JSON that writes a fraction may mean one.
pub(crate) fn whole<T: TryFrom<u64> + PartialOrd>(
    range: std::ops::RangeInclusive<T>,
) -> impl FnOnce(Value) -> Option<T> {
    move |value| value.as_u64().and_then(|number| T::try_from(number).ok()).filter(|number| range.contains(number))
}

/// A text.
pub(crate) fn text(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A name for people: within the range of lengths, nothing that isn't shown.
pub(crate) fn name(value: Value) -> Option<String> {
    let name = text(value)?;
    let fits = tiffin_types::limits::NAME_CHARS.contains(&name.chars().count());
    (fits && !name.chars().any(char::is_control) && name.trim() == name).then_some(name)
}

/// What [`name`] takes.
pub(crate) const NAME: &str = "must be a text of 1 to 100 characters without control characters or blanks at the ends";
