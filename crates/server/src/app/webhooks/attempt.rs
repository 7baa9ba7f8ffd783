//! One attempt to deliver: sign, send, and judge what comes back.
//!
//! Invariant: it ends within its time limit whatever the receiver does, and keeps nothing of the answer but its status.

use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tiffin_outbound::{Body, Client, OutboundError, Request};
use tiffin_store::{Attempt, Claimed, Verdict, WebhookTarget};
use tiffin_types::time::Timestamp;

use super::signature::sign;
use crate::{config::WebhooksConfig, error::chain};

/// The longest that a receiver may put us off.
const PUT_OFF_MAX: Duration = Duration::from_secs(6 * 3600);
/// Characters of an error that are kept.
const ERROR_CHARS: usize = 300;

/// What a receiver did.
struct Answered {
    status: StatusCode,
    retry_after: Option<Duration>,
}

/// Tries a delivery.
pub(super) async fn attempt(
    client: &Client,
    config: &WebhooksConfig,
    target: &WebhookTarget,
    claimed: &Claimed,
) -> (Attempt, Verdict) {
    let (at, began) = (Timestamp::now(), Instant::now());
    let sending = send(client, config.response_bytes, target, claimed, at);
    let answered = match tokio::time::timeout(config.timeout, sending).await {
        Ok(Ok(answered)) => Ok(answered),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(format!("no answer within {} ms", config.timeout.as_millis())),
    };
    let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let attempt = |status: Option<StatusCode>, error: Option<String>| Attempt {
        at,
        duration_ms,
        status: status.map(|status| status.as_u16()),
        error: error.map(|error| error.chars().take(ERROR_CHARS).collect()),
    };
    let again = |put_off| next(config, claimed.delivery.attempts, put_off);
    match answered {
        Ok(Answered { status, .. }) if status.is_success() => (attempt(Some(status), None), Verdict::Delivered),
        Ok(Answered { status: StatusCode::GONE, .. }) => {
            let error = "the receiver says that it is gone for good".to_owned();
            (attempt(Some(StatusCode::GONE), Some(error)), Verdict::Gone)
        }
        Ok(Answered { status, retry_after }) => {
            let redirect = if status.is_redirection() { ": redirects aren't followed" } else { "" };
            (attempt(Some(status), Some(format!("the receiver answered {status}{redirect}"))), again(retry_after))
        }
        Err(error) => (attempt(None, Some(error)), again(None)),
    }
}

async fn send(
    client: &Client,
    response_bytes: usize,
    target: &WebhookTarget,
    claimed: &Claimed,
    at: Timestamp,
) -> Result<Answered, String> {
    let url = target.url.parse().map_err(|_| "the URL can't be read".to_owned())?;
    let event_id = claimed.delivery.event_id.as_str();
    let timestamp_s = at.as_millis().div_euclid(1000);
    let signature = sign(&target.secrets, event_id, timestamp_s, &claimed.body);
    let mut headers = HeaderMap::new();
    let value = |text: &str| HeaderValue::from_str(text).map_err(|error| error.to_string());
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::USER_AGENT, HeaderValue::from_static(concat!("tiffin/", env!("CARGO_PKG_VERSION"))));
    headers.insert("webhook-id", value(event_id)?);
    headers.insert("webhook-timestamp", HeaderValue::from(timestamp_s));
    headers.insert("webhook-signature", value(&signature)?);
    let request = Request { method: Method::POST, url, headers, body: claimed.body.clone().into() };
    let answer = client.send(request).await.map_err(|error| shown(&error))?;
    skim(answer.body, response_bytes).await;
    Ok(Answered { status: answer.status, retry_after: retry_after(&answer.headers, SystemTime::now()) })
}

/// Lets the receiver finish its answer, as far as that is short. It has taken the event or not already: what is wrong
/// with the rest changes nothing.
async fn skim(mut body: Body, limit: usize) {
    let mut read = 0;
    while read < limit
        && let Some(Ok(piece)) = body.next().await
    {
        read += piece.len();
    }
}

fn shown(error: &OutboundError) -> String {
    match error {
        OutboundError::Refused(refused) => format!("the URL {refused}"),
        other => chain(other),
    }
}

/// How long the receiver asks to be left alone, in seconds or until a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let asked = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).ok()?,
    };
    Some(asked.min(PUT_OFF_MAX))
}

/// When to try again after the attempt that follows `done` others.
fn next(config: &WebhooksConfig, done: u32, put_off: Option<Duration>) -> Verdict {
    let Some(delay) = config.retry_delays.get(usize::try_from(done).unwrap_or(usize::MAX)) else {
        return Verdict::GiveUp;
    };
    // So that what failed together doesn't come back together.
    let spread = delay.mul_f64(rand::random_range(0.8..=1.2));
    let wait = spread.max(put_off.unwrap_or_default());
    Verdict::Again(Timestamp::now().plus_millis(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_may_put_us_off_within_bounds() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let asked = |text: &'static str| {
            retry_after(&HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_static(text))]), now)
        };
        assert_eq!(asked("120"), Some(Duration::from_secs(120)));
        assert_eq!(asked("Sun, 06 Nov 1994 08:50:37 GMT"), Some(Duration::from_secs(60)));
        assert_eq!(asked("99999999999"), Some(PUT_OFF_MAX));
        for nothing in ["", "-1", "soon", "Sun, 06 Nov 1994 08:00:00 GMT", "99999999999999999999999"] {
            assert_eq!(asked(nothing), None, "{nothing}");
        }
    }
}
