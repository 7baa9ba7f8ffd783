//! A terminal that is open: its bytes between the guest and the WebSocket, until one of them ends it.
//!
//! Invariants: what the client doesn't take isn't read from the guest, and the other way round; a client that doesn't
//! answer, or whose key or session is no longer valid, is cut off; a shutdown of the server ends it at once. Returning drops the terminal, which ends its program.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use serde_json::{Value, json};
use tiffin_engine::agent::{AgentError, ExecItem, ExecOutput, Input};
use tiffin_protocol::{ExecDone, TerminalSize};
use tiffin_types::limits;
use tokio::time::{Instant, MissedTickBehavior};

use crate::{
    app::{
        App,
        auth::{Caller, is_still_good},
        terminal::{Session, Terminal},
    },
    error::{AppError, log_cause, to_event},
};

/// A close's reason is at most so long, by the protocol (RFC 6455, section 5.5).
const REASON_BYTES: usize = 123;

/// Codes of closes: RFC 6455, section 7.4, and two of our own.
mod code {
    pub(super) const NORMAL: u16 = 1000;
    pub(super) const GOING_AWAY: u16 = 1001;
    pub(super) const POLICY: u16 = 1008;
    pub(super) const TOO_BIG: u16 = 1009;
    pub(super) const INTERNAL: u16 = 1011;
    pub(super) const VM_ENDED: u16 = 4000;
    pub(super) const REFUSED: u16 = 4001;
}

/// Why a terminal is over.
enum End {
    /// Its program ended.
    Exited(ExecDone),
    /// The agent failed, or the VM ended.
    Failed(AgentError),
    /// It lasted longer than the agent should have let it.
    Late,
    /// The client closed it, or is gone.
    ClientGone,
    /// The client doesn't answer.
    Silent,
    /// Its key was revoked, or its session ended.
    Unwelcome,
    /// The client broke the protocol.
    Broken(u16, String),
    /// The server shuts down.
    Shutdown,
}

/// When the client was heard last; none while what it said waits for the guest.
struct Heard(Mutex<Option<Instant>>);

impl Heard {
    fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    fn is_longer_ago_than(&self, span: Duration) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| at.elapsed() > span)
    }
}

/// Carries the terminal to its end.
pub(super) async fn run(app: Arc<App>, caller: Caller, terminal: Terminal, socket: WebSocket) {
    let Terminal { mut input, mut output, session } = terminal;
    let (mut to_client, mut from_client) = socket.split();
    let heard = Heard(Mutex::new(Some(Instant::now())));
    let end = tokio::select! {
        end = outgoing(&mut output, &mut to_client, &heard, app.config.terminal.ping) => end,
        end = incoming(&mut from_client, &mut input, &heard) => end,
        () = unwelcome(&app, &caller) => End::Unwelcome,
        () = tokio::time::sleep_until(session.deadline) => End::Late,
        () = app.shutdown.cancelled() => End::Shutdown,
    };
    // Whatever the client does now, the program is over: its place is free as soon as it is told why.
    drop((input, output));
    let (last, close) = last_words(end, &session).await;
    drop(session);
    let farewell = async {
        for message in last.into_iter().chain(close.map(|frame| Message::Close(Some(frame)))) {
            to_client.send(message).await?;
        }
        to_client.close().await
    };
    // A client that doesn't take it is gone.
    let _ = tokio::time::timeout(app.config.http.write_timeout, farewell).await;
}

/// Guest to client, with a ping now and then.
async fn outgoing(
    output: &mut ExecOutput,
    client: &mut (impl Sink<Message, Error = axum::Error> + Unpin),
    heard: &Heard,
    every: Duration,
) -> End {
    let mut pings = tokio::time::interval_at(Instant::now() + every, every);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            item = output.next() => match item {
                Ok(ExecItem::Stdout(bytes) | ExecItem::Stderr(bytes)) => Message::Binary(bytes.into()),
                Ok(ExecItem::Done(done)) => return End::Exited(done),
                Err(error) => return End::Failed(error),
            },
            _ = pings.tick() => {
                if heard.is_longer_ago_than(every * 2) {
                    return End::Silent;
                }
                Message::Ping(Default::default())
            }
        };
        if client.send(message).await.is_err() {
            return End::ClientGone;
        }
    }
}

/// Returns when the caller would no longer be let in.
async fn unwelcome(app: &App, caller: &Caller) {
    loop {
        tokio::time::sleep(app.config.terminal.ping).await;
        // A store that doesn't answer now is asked again.
        if matches!(is_still_good(app, caller).await, Ok(false)) {
            return;
        }
    }
}

/// Client to guest.
async fn incoming(
    client: &mut (impl Stream<Item = Result<Message, axum::Error>> + Unpin),
    input: &mut Input,
    heard: &Heard,
) -> End {
    loop {
        let message = match client.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) if is_too_big(&error) => {
                let most = limits::TERMINAL_MESSAGE_BYTES;
                return End::Broken(code::TOO_BIG, format!("a message is larger than {most} bytes: send several"));
            }
            Some(Err(_)) | None => return End::ClientGone,
        };
        heard.set(None);
        let written = match message {
            Message::Binary(bytes) => input.write(&bytes).await,
            Message::Text(text) => match resize(&text) {
                Ok(size) => input.resize(size).await,
                Err(why) => return End::Broken(code::POLICY, why),
            },
            Message::Ping(_) | Message::Pong(_) => Ok(()),
            Message::Close(_) => return End::ClientGone,
        };
        heard.set(Some(Instant::now()));
        if written.is_err() {
            // The guest takes nothing any more; why, its output says.
            std::future::pending::<()>().await;
        }
    }
}

fn is_too_big(error: &axum::Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(|source| source.to_string().contains("too long"))
}

/// The size in `{"resize": {"cols": 120, "rows": 40}}`.
fn resize(text: &str) -> Result<TerminalSize, String> {
    let message: Value = serde_json::from_str(text).unwrap_or_default();
    let side = |name: &str| {
        let side = message.get("resize").and_then(|resize| resize.get(name)).and_then(Value::as_u64);
        side.and_then(|side| u16::try_from(side).ok()).filter(|side| limits::TERMINAL_SIDE.contains(side))
    };
    let expected = "a text message must be {\"resize\": {\"cols\": 1 to 1000, \"rows\": 1 to 1000}}";
    let (Some(columns), Some(rows)) = (side("cols"), side("rows")) else { return Err(expected.to_owned()) };
    Ok(TerminalSize { columns, rows })
}

/// What the client is told: what the program came to, and why the connection closes.
async fn last_words(end: End, session: &Session) -> (Option<Message>, Option<CloseFrame>) {
    let (code, reason) = match end {
        End::Exited(done) => {
            let mut exit = json!({ "exitCode": done.exit_code });
            if done.timed_out {
                exit["timedOut"] = true.into();
            }
            let last = Message::Text(json!({ "exit": exit }).to_string().into());
            return (Some(last), Some(CloseFrame { code: code::NORMAL, reason: Utf8Bytes::default() }));
        }
        End::Failed(error) => told(&session.failure(error).await),
        End::Late => told(&AppError::AgentTimeout),
        End::Silent => (code::POLICY, "no answer to pings".to_owned()),
        End::Unwelcome => (code::POLICY, "unauthorized: the key or session is no longer valid".to_owned()),
        End::Broken(code, why) => (code, why),
        End::Shutdown => (code::GOING_AWAY, "the server shuts down; the VM runs on".to_owned()),
        End::ClientGone => return (None, None),
    };
    (None, Some(CloseFrame { code, reason: cut(reason) }))
}

/// An error as a close: its code and its message.
fn told(error: &AppError) -> (u16, String) {
    log_cause(error, "");
    let (kind, message) = to_event(error);
    let code = match error {
        AppError::Conflict { .. } | AppError::NotFound(_) => code::VM_ENDED,
        AppError::Unprocessable { .. } | AppError::Fields(_) => code::REFUSED,
        _ => code::INTERNAL,
    };
    (code, format!("{kind}: {message}"))
}

/// As much of a reason as a close can hold.
fn cut(mut reason: String) -> Utf8Bytes {
    let end = (0..=REASON_BYTES.min(reason.len())).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
    reason.truncate(end);
    reason.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_resize_has_both_sides_within_their_range() {
        assert_eq!(resize(r#"{"resize":{"cols":120,"rows":40}}"#), Ok(TerminalSize { columns: 120, rows: 40 }));
        for bad in [
            "",
            "{}",
            "[]",
            "resize",
            r#"{"resize":{}}"#,
            r#"{"resize":{"cols":80}}"#,
            r#"{"resize":{"cols":0,"rows":1}}"#,
            r#"{"resize":{"cols":1,"rows":1001}}"#,
            r#"{"resize":{"cols":-1,"rows":1}}"#,
            r#"{"resize":{"cols":"80","rows":24}}"#,
        ] {
            assert!(resize(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_reason_always_fits_a_close(reason in ".{0,200}") {
            prop_assert!(cut(reason.clone()).as_str().len() <= REASON_BYTES);
            prop_assert!(reason.starts_with(cut(reason.clone()).as_str()));
        }
    }
}
