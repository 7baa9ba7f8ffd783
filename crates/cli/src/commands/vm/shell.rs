//! `tiffin vm shell`: a terminal in a VM, in this one.
//!
//! Invariant: however it ends, a signal and an error included, this terminal is as it was before.

mod keyboard;

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use futures_util::{Sink, SinkExt, StreamExt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};
use tiffin_types::{id::VmId, limits};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_tungstenite::tungstenite::{self, Message, protocol::CloseFrame};

use super::exec::{command_line, exit_code};
use crate::{
    client::{Client, query},
    failure::Failure,
};
use keyboard::Keyboard;

/// How long the connection may take.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// How long telling the server that we leave may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
#[command(after_help = "\
Without a command: a login shell. One word after -- is a shell command line, several words are one program and its
arguments, as for `tiffin vm exec`. Works without a terminal too: what comes on standard input is typed, and its end is
Ctrl-D.

Exit codes are those of `tiffin vm exec`.")]
pub(crate) struct ShellArgs {
    id: VmId,
    /// The command
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// How the session is over.
enum End {
    /// With the server's last word.
    Exited(Value),
    /// By a signal to this program.
    Signal(SignalKind),
}

/// Opens the terminal; the exit code is its program's.
pub(crate) async fn run(client: &Client, args: &ShellArgs) -> Result<ExitCode, Failure> {
    let (cols, rows) = size().unwrap_or(limits::TERMINAL_DEFAULT);
    let (cols, rows) = (cols.to_string(), rows.to_string());
    let line = command_line(&args.command);
    let mut parameters = vec![("cols", cols.as_str()), ("rows", rows.as_str())];
    if !args.command.is_empty() {
        parameters.push(("cmd", line.as_str()));
    }
    let path = query(&format!("/v1/vms/{}/terminal", args.id), &parameters);
    let open = tokio::time::timeout(OPEN_LIMIT, client.websocket(&path)).await;
    let socket = open.map_err(|_| Failure::Exchange("the server didn't answer in time".to_owned()))??;
    let raw = Raw::enter()?;
    let end = session(socket).await;
    drop(raw);
    match end? {
        End::Exited(exit) => exit_code(&exit),
        End::Signal(kind) => Ok(ExitCode::from(128 + u8::try_from(kind.as_raw_value()).unwrap_or(0))),
    }
}

async fn session<S>(socket: S) -> Result<End, Failure>
where
    S: Sink<Message, Error = tungstenite::Error> + StreamExt<Item = Result<Message, tungstenite::Error>> + Unpin,
{
    let (mut to_server, mut from_server) = socket.split();
    let mut exit = None;
    let mut keyboard = Keyboard::start();
    let mut signals = Signals::new()?;
    let end = loop {
        tokio::select! {
            message = from_server.next() => match message {
                Some(Ok(Message::Binary(bytes))) => show(&bytes)?,
                Some(Ok(Message::Text(text))) => exit = last_word(&text).or(exit),
                Some(Ok(Message::Close(frame))) => return over(exit, frame),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(error)) => return Err(broken(&error)),
                None => return over(exit, None),
            },
            typed = keyboard.next() => {
                to_server.send(Message::Binary(typed.into())).await.map_err(|error| broken(&error))?;
            }
            _ = signals.resized.recv() => {
                if let Some((cols, rows)) = size() {
                    let message = json!({ "resize": { "cols": cols, "rows": rows } }).to_string();
                    to_server.send(Message::Text(message.into())).await.map_err(|error| broken(&error))?;
                }
            }
            _ = signals.ended.recv() => break End::Signal(SignalKind::terminate()),
            _ = signals.hung_up.recv() => break End::Signal(SignalKind::hangup()),
            _ = signals.interrupted.recv() => break End::Signal(SignalKind::interrupt()),
        }
    };
    // The server notices a connection that is just gone, too.
    let _ = tokio::time::timeout(CLOSE_LIMIT, to_server.close()).await;
    Ok(end)
}

/// What comes from outside while the terminal is open. (In raw mode Ctrl-C is a byte like another.)
struct Signals {
    resized: Signal,
    ended: Signal,
    hung_up: Signal,
    interrupted: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            resized: signal(SignalKind::window_change())?,
            ended: signal(SignalKind::terminate())?,
            hung_up: signal(SignalKind::hangup())?,
            interrupted: signal(SignalKind::interrupt())?,
        })
    }
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// How the program ended, if the message says so.
fn last_word(text: &str) -> Option<Value> {
    serde_json::from_str::<Value>(text).ok()?.get("exit").cloned()
}

fn over(exit: Option<Value>, frame: Option<CloseFrame>) -> Result<End, Failure> {
    let why = || match frame {
        Some(frame) if !frame.reason.is_empty() => frame.reason.to_string(),
        Some(frame) => format!("the server closed the terminal ({})", u16::from(frame.code)),
        None => "the server closed the terminal without a word".to_owned(),
    };
    exit.map(End::Exited).ok_or_else(|| Failure::Exchange(crate::output::visible(&why()).into_owned()))
}

fn broken(error: &tungstenite::Error) -> Failure {
    Failure::Exchange(format!("the connection to the server broke off: {error}"))
}

/// This terminal's columns and rows, if it is one.
fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    let side = |side: u16| side.clamp(*limits::TERMINAL_SIDE.start(), *limits::TERMINAL_SIDE.end());
    (size.ws_col > 0 && size.ws_row > 0).then(|| (side(size.ws_col), side(size.ws_row)))
}

/// This terminal, passing on every key as it is typed, until it is dropped. Nothing where standard input is no terminal.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Result<Self, Failure> {
        let Ok(before) = tcgetattr(io::stdin()) else { return Ok(Self(None)) };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(io::Error::from)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // A terminal that is gone needs nothing.
            let _ = tcsetattr(io::stdin(), OptionalActions::Drain, before);
        }
    }
}
