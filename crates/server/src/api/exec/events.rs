//! A command's output as server-sent events.
//!
//! Invariant: a client that goes away or stops reading ends the command at its deadline at the latest; a character that
//! arrives in two pieces is sent whole.

use std::{convert::Infallible, sync::Arc};

use axum::response::{
    IntoResponse, Response, Sse,
    sse::{Event, KeepAlive},
};
use futures_util::stream;
use serde_json::json;
use tiffin_engine::agent::ExecItem;
use tokio::sync::mpsc;

use crate::{
    app::{App, exec::Running},
    error::{AppError, log_cause, to_event},
};

/// Events that wait for a slow client.
const WAITING: usize = 16;

/// Answers with the events of a running command. What fails before any output is an ordinary error.
pub(crate) async fn respond(app: &Arc<App>, mut running: Running, request_id: String) -> Result<Response, AppError> {
    let first = running.next().await?;
    let (sender, receiver) = mpsc::channel(WAITING);
    app.tasks.spawn(pump(running, first, sender, request_id));
    let events = stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|event| (Ok::<Event, Infallible>(event), receiver))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

/// Returning drops the command, which kills it if it still runs.
async fn pump(mut running: Running, first: ExecItem, client: mpsc::Sender<Event>, request_id: String) {
    let (mut stdout, mut stderr) = (Decoder::default(), Decoder::default());
    let deadline = running.deadline();
    let mut next = Ok(first);
    loop {
        let (events, over) = match next {
            Ok(ExecItem::Stdout(bytes)) => (output("stdout", stdout.push(&bytes)), false),
            Ok(ExecItem::Stderr(bytes)) => (output("stderr", stderr.push(&bytes)), false),
            Ok(ExecItem::Done(done)) => {
                let mut events = output("stdout", stdout.finish());
                events.extend(output("stderr", stderr.finish()));
                let mut exit = json!({ "exitCode": done.exit_code });
                if done.timed_out {
                    exit["timedOut"] = true.into();
                }
                if done.stdout_truncated || done.stderr_truncated {
                    exit["truncated"] = true.into();
                }
                let outcome = running.outcome();
                for (name, value) in [("result", outcome.result), ("error", outcome.error)] {
                    if let Some(value) = value {
                        exit[name] = value;
                    }
                }
                events.push(event("exit", &exit));
                (events, true)
            }
            Err(error) => {
                log_cause(&error, &request_id);
                let (code, message) = to_event(&error);
                let body = json!({ "code": code, "message": message, "requestId": request_id });
                (vec![event("error", &body)], true)
            }
        };
        for event in events {
            if !matches!(tokio::time::timeout_at(deadline, client.send(event)).await, Ok(Ok(()))) {
                return;
            }
        }
        if over {
            return;
        }
        next = tokio::select! {
            next = running.next() => next,
            () = client.closed() => return,
        };
    }
}

fn output(name: &str, text: String) -> Vec<Event> {
    if text.is_empty() { Vec::new() } else { vec![event(name, &json!({ "data": text }))] }
}

/// JSON is one line whatever the output holds.
fn event(name: &str, data: &serde_json::Value) -> Event {
    Event::default().event(name).data(data.to_string())
}

/// UTF-8 that comes in pieces; what is none becomes U+FFFD.
#[derive(Default)]
struct Decoder {
    /// The beginning of a character whose rest hasn't come: at most three bytes.
    pending: Vec<u8>,
}

impl Decoder {
    fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.pending);
        all.extend_from_slice(bytes);
        let mut text = String::with_capacity(all.len());
        let mut chunks = all.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            if chunk.invalid().is_empty() {
                continue;
            }
            if chunks.peek().is_none() && may_go_on(chunk.invalid()) {
                self.pending = chunk.invalid().to_vec();
            } else {
                text.push('\u{fffd}');
            }
        }
        text
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Whether more bytes could make a character of these.
fn may_go_on(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(pieces: &[&[u8]]) -> String {
        let mut decoder = Decoder::default();
        let mut text: String = pieces.iter().map(|piece| decoder.push(piece)).collect();
        text.push_str(&decoder.finish());
        text
    }

    #[test]
    fn a_character_in_two_pieces_is_sent_whole() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(&[b'a', 0xe2, 0x82]), "a");
        assert_eq!(decoder.push(&[0xac, b'b']), "€b");
        assert_eq!(decoded(&[&[0xf0, 0x9f], &[0x98], &[0x80]]), "😀");
    }

    proptest! {
        #[test]
        fn pieces_decode_to_what_the_whole_decodes_to(bytes: Vec<u8>, cut in 0usize..200) {
            let cut = cut.min(bytes.len());
            let whole = String::from_utf8_lossy(&bytes).into_owned();
            prop_assert_eq!(decoded(&[&bytes[..cut], &bytes[cut..]]), whole);
        }
    }
}
