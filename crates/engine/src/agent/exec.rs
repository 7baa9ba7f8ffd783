//! Commands, terminals and scripts: output and an exit code, both ways at once.

use tiffin_protocol::{Exec, ExecDone, Kind, Op, Script, Source, TerminalSize};

use super::{
    AgentError, answer,
    frames::{Reader, Writer, open, to_json},
    take_from, unexpected,
};
use crate::Connection;

/// Bytes of one frame of input.
const CHUNK: usize = 64 * 1024;

/// What a running command sends.
#[derive(Debug)]
pub enum ExecItem {
    /// Bytes of standard output, in order; a terminal's output too.
    Stdout(Vec<u8>),
    /// Bytes of standard error, in order.
    Stderr(Vec<u8>),
    /// It has ended; nothing follows.
    Done(ExecDone),
}

/// A command, or a script, that runs in a guest.
pub struct ExecStream {
    input: Input,
    output: ExecOutput,
    program: Option<Program>,
}

/// What a running command is given. Dropping it ends nothing while the output is there.
pub struct Input(Writer);

/// What a running command gives.
pub struct ExecOutput {
    reader: Reader,
    stdout_left: u64,
    stderr_left: u64,
    result_left: u64,
    result: Vec<u8>,
}

/// A script's source, which goes to the agent while its output is waited for.
struct Program {
    text: Vec<u8>,
    /// How much of it is on its way.
    taken: usize,
    ended: bool,
}

/// Starts a command. Its time limit is the agent's to keep; callers add a deadline of their own.
///
/// # Errors
/// [`AgentError::Lost`] when the connection breaks, [`AgentError::RequestTooLarge`].
pub async fn exec(connection: Connection, token: &str, exec: Exec) -> Result<ExecStream, AgentError> {
    let caps = [exec.stdout_cap, exec.stderr_cap, 0];
    start(connection, token, Op::Exec(exec), caps, None).await
}

/// Starts a script; `program` is its text when its source is [`Source::Inline`], and unused otherwise. Its outcome is
/// [`ExecStream::take_result`] once it has ended.
///
/// # Errors
/// As [`exec`].
pub async fn script(
    connection: Connection,
    token: &str,
    script: Script,
    program: Vec<u8>,
) -> Result<ExecStream, AgentError> {
    let caps = [script.stdout_cap, script.stderr_cap, script.result_cap];
    let program = match &script.source {
        Source::Inline => Some(Program { text: program, taken: 0, ended: false }),
        Source::Path(_) => None,
    };
    start(connection, token, Op::Script(script), caps, program).await
}

async fn start(
    connection: Connection,
    token: &str,
    op: Op,
    [stdout_left, stderr_left, result_left]: [u64; 3],
    program: Option<Program>,
) -> Result<ExecStream, AgentError> {
    let (writer, reader) = open(connection, token, op).await?;
    let output = ExecOutput { reader, stdout_left, stderr_left, result_left, result: Vec::new() };
    Ok(ExecStream { input: Input(writer), output, program })
}

impl ExecStream {
    /// The next piece of output, or the end. Giving up waiting loses nothing.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the command could not be started; the others when the guest misbehaves or is gone.
    pub async fn next(&mut self) -> Result<ExecItem, AgentError> {
        if let Some(program) = &mut self.program {
            tokio::select! {
                item = self.output.next() => return item,
                // Where the program can't be sent, the output says why.
                _ = program.send(&mut self.input.0) => self.program = None,
            }
        }
        self.output.next().await
    }

    /// What the script said of itself: JSON of an outcome, from the guest and unread; `None` when it said nothing.
    pub fn take_result(&mut self) -> Option<Vec<u8>> {
        Some(std::mem::take(&mut self.output.result)).filter(|result| !result.is_empty())
    }

    /// Input and output, for use at once. The connection closes when both are dropped.
    pub fn split(self) -> (Input, ExecOutput) {
        (self.input, self.output)
    }
}

impl ExecOutput {
    /// As [`ExecStream::next`].
    ///
    /// # Errors
    /// As [`ExecStream::next`].
    pub async fn next(&mut self) -> Result<ExecItem, AgentError> {
        loop {
            let (kind, payload) = self.reader.next().await?;
            match kind {
                // It takes nothing from a cap, so there could be no end of them.
                Kind::Stdout | Kind::Stderr | Kind::Result if payload.is_empty() => {
                    return Err(AgentError::Protocol("an empty frame of output".into()));
                }
                Kind::Stdout => {
                    take_from(&mut self.stdout_left, payload.len())?;
                    return Ok(ExecItem::Stdout(payload));
                }
                Kind::Stderr => {
                    take_from(&mut self.stderr_left, payload.len())?;
                    return Ok(ExecItem::Stderr(payload));
                }
                Kind::Result => {
                    take_from(&mut self.result_left, payload.len())?;
                    self.result.extend(payload);
                }
                Kind::Done | Kind::Failed => return answer(kind, &payload).map(ExecItem::Done),
                Kind::Request | Kind::Stdin | Kind::StdinEnd | Kind::Event | Kind::Resize => {
                    return Err(unexpected(kind));
                }
            }
        }
    }
}

impl Input {
    pub(super) fn new(writer: Writer) -> Self {
        Self(writer)
    }

    /// Sends bytes to the standard input; waits while the guest doesn't take them.
    ///
    /// # Errors
    /// [`AgentError::Lost`]; the output may still say why.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        for chunk in bytes.chunks(CHUNK) {
            self.0.send(Kind::Stdin, chunk).await?;
        }
        Ok(())
    }

    /// Ends the standard input.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub async fn end(&mut self) -> Result<(), AgentError> {
        self.0.send(Kind::StdinEnd, &[]).await
    }

    /// Gives the command's terminal another size.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub async fn resize(&mut self, size: TerminalSize) -> Result<(), AgentError> {
        self.0.send(Kind::Resize, &to_json(&size)).await
    }
}

impl Program {
    /// Sends what is left of it, and its end. Giving up loses nothing.
    async fn send(&mut self, to: &mut Writer) -> Result<(), AgentError> {
        loop {
            to.flush().await?;
            let rest = &self.text[self.taken..];
            if self.ended {
                return Ok(());
            } else if rest.is_empty() {
                to.queue(Kind::StdinEnd, &[]);
                self.ended = true;
            } else {
                let chunk = &rest[..rest.len().min(CHUNK)];
                to.queue(Kind::Stdin, chunk);
                self.taken += chunk.len();
            }
        }
    }
}
