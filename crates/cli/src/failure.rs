//! What ends a command badly: how it is told (one line, then the fields and the remedy) and which exit code it gives.

use std::{io, process::ExitCode};

use serde_json::Value;

use crate::output::visible;

/// Exit code for arguments that are wrong.
pub(crate) const USAGE: u8 = 2;
/// Exit code when whoever reads our output is gone: 128 + SIGPIPE, as other programs have it.
pub(crate) const CLOSED_PIPE: u8 = 141;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The server refused, in the API's own words.
    #[error("{0}")]
    Api(Box<ApiError>),
    /// No server at the address.
    #[error("can't reach the server at {url}: {reason}")]
    Unreachable { url: String, reason: String },
    /// The server was reached, and the exchange failed.
    #[error("{0}")]
    Exchange(String),
    /// Whoever read our output went away.
    #[error("the output was closed")]
    Closed,
    /// Everything was already said, line by line.
    #[error("not all could be done")]
    AlreadyTold,
    /// Anything else.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// An error answer of the API.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    /// HTTP status; 0 for an error inside a stream.
    pub(crate) status: u16,
    pub(crate) message: String,
    pub(crate) code: String,
    pub(crate) request_id: Option<String>,
    pub(crate) details: Value,
    /// Seconds from `Retry-After`.
    pub(crate) retry_after: Option<String>,
}

impl ApiError {
    /// Reads an error answer's body; one that isn't the API's (a proxy's page) becomes a plain sentence.
    pub(crate) fn read(status: u16, body: &[u8], retry_after: Option<String>) -> Self {
        let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let text = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_owned);
        Self {
            status,
            message: text("message").unwrap_or_else(|| format!("the server answered {status}")),
            code: text("code").unwrap_or_else(|| format!("http_{status}")),
            request_id: text("requestId"),
            details: body.get("details").cloned().unwrap_or(Value::Null),
            retry_after,
        }
    }

    fn remedy(&self) -> Option<String> {
        match self.status {
            401 => Some(
                "set TIFFIN_API_KEY to a valid key (`make up` leaves one in .tiffin/env; `tiffin serve` prints one at its first start)"
                    .to_owned(),
            ),
            404 if self.message.starts_with("VM ") => {
                Some("it doesn't exist or belongs to another account; `tiffin vm ls` lists yours".to_owned())
            }
            429 | 503 => self.retry_after.as_ref().map(|seconds| format!("try again in {seconds} s")),
            _ => None,
        }
    }
}

impl Failure {
    /// Tells the user on stderr, and gives the exit code; `own_error` is the code for errors of Tiffin itself.
    pub(crate) fn report(&self, own_error: u8) -> ExitCode {
        match self {
            Failure::Closed => ExitCode::from(CLOSED_PIPE),
            Failure::AlreadyTold => ExitCode::from(own_error),
            _ => {
                // Nothing can be done where stderr itself is gone.
                let _ = io::Write::write_all(&mut io::stderr(), self.lines().as_bytes());
                ExitCode::from(own_error)
            }
        }
    }

    /// What is printed: `error: …` on one line, the fields at fault and the remedy indented below it.
    pub(crate) fn lines(&self) -> String {
        let mut lines = match self {
            Failure::Api(error) => {
                let mut line = format!("error: {} ({}", visible(&error.message), visible(&error.code));
                if let Some(id) = &error.request_id {
                    line.push_str(&format!(", request {}", visible(id)));
                }
                line.push_str(")\n");
                line
            }
            Failure::Other(error) => format!("error: {error:#}\n"),
            other => format!("error: {other}\n"),
        };
        match self {
            Failure::Api(error) => {
                for (field, what) in fields(&error.details) {
                    lines.push_str(&format!("  {}: {}\n", visible(&field), visible(&what)));
                }
                if let Some(remedy) = error.remedy() {
                    lines.push_str(&format!("  {remedy}\n"));
                }
            }
            Failure::Unreachable { .. } => {
                lines.push_str(
                    "  start it with `make up` or `tiffin serve`, or name another with --url or TIFFIN_URL\n",
                );
            }
            _ => {}
        }
        lines
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Failure::Api(Box::new(error))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Failure::Closed } else { Failure::Other(error.into()) }
    }
}

/// The fields that an error's `details` name: an object's entries, or a list of `{field, message}`.
fn fields(details: &Value) -> Vec<(String, String)> {
    match details {
        Value::Object(map) => match map.get("fields") {
            Some(list @ Value::Array(_)) => fields(list),
            _ => map.iter().map(|(name, value)| (name.clone(), plain(value))).collect(),
        },
        Value::Array(list) => {
            list.iter().filter_map(|entry| Some((plain(entry.get("field")?), plain(entry.get("message")?)))).collect()
        }
        _ => Vec::new(),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(status: u16, body: &str) -> String {
        Failure::from(ApiError::read(status, body.as_bytes(), Some("7".to_owned()))).lines()
    }

    #[test]
    fn an_api_error_is_one_line_with_its_code_and_request_and_then_its_fields() {
        let text = api(
            400,
            r#"{"message":"cpu must be 1 to 8","code":"invalid","requestId":"r1","details":[{"field":"cpu","message":"1 to 8"}]}"#,
        );
        assert_eq!(text, "error: cpu must be 1 to 8 (invalid, request r1)\n  cpu: 1 to 8\n");
        let text = api(409, r#"{"message":"m","code":"c","details":{"state":"STOPPED","n":3}}"#);
        assert_eq!(text, "error: m (c)\n  n: 3\n  state: STOPPED\n");
    }

    #[test]
    fn a_missing_key_and_a_full_server_come_with_what_to_do() {
        assert!(api(401, r#"{"message":"no","code":"unauthorized"}"#).contains("TIFFIN_API_KEY"));
        assert!(api(503, r#"{"message":"no","code":"no_capacity"}"#).contains("try again in 7 s"));
    }

    #[test]
    fn an_answer_that_is_not_the_apis_is_still_told() {
        assert_eq!(api(502, "<html>"), "error: the server answered 502 (http_502)\n");
    }

    #[test]
    fn an_answer_cannot_move_the_terminals_cursor() {
        assert!(!api(400, "{\"message\":\"\\u001b[2J\",\"code\":\"x\"}").contains('\u{1b}'));
    }
}
