//! The far end of a fake VM's connection: speaks the agent's protocol, with scripted commands.
//!
//! Beyond the script table it knows `echo X`, `echo X > PATH`, `cat PATH`, `exit N`, `sleep SECONDS` and `printenv NAME`;
//! any other line is echoed. What is written below `/dev/shm` is in memory, anything else on the VM's disk.
//! Working directories under `/missing` don't exist.

use std::{
    io,
    time::{Duration, Instant},
};

use tiffin_protocol::{
    Command, Exec, ExecDone, Failure, FailureCode, HEADER, Kind, Op, Pong, Request, decode_header, encode,
};
use tiffin_types::id::VmId;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

use super::{Shared, files, scripts, terminal};

/// Every fake VM's agent token.
pub const TOKEN: &str = "fake-agent-token";

/// What a command, or a program for a JavaScript runtime, does.
#[derive(Debug, Clone, Default)]
pub struct Script {
    /// Pieces of output, in order.
    pub stdout: Vec<Vec<u8>>,
    /// Pieces of error output, in order, after the output.
    pub stderr: Vec<Vec<u8>>,
    /// The outcome of a program, as its guest writes it: JSON, or what should be.
    pub result: Vec<u8>,
    /// Exit code.
    pub exit_code: i32,
    /// How long it runs after its output.
    pub delay: Duration,
    /// Whether the agent hangs up instead of answering.
    pub hang_up: bool,
    /// Whether the agent never answers, not even at the time limit.
    pub silent: bool,
}

/// Counts a command for as long as it runs.
pub(super) struct Running<'a>(&'a Shared);

impl<'a> Running<'a> {
    pub(super) fn new(fake: &'a Shared) -> Self {
        fake.lock().commands += 1;
        Self(fake)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.lock().commands -= 1;
    }
}

/// Serves one operation; ends when it is answered or when the host hangs up.
pub(super) async fn serve(fake: &Shared, id: &VmId, connection: DuplexStream) {
    let (mut reader, mut writer) = tokio::io::split(connection);
    // A host that is gone hears no answer.
    let _ = answer(fake, id, &mut reader, &mut writer).await;
}

async fn answer(
    fake: &Shared,
    id: &VmId,
    reader: &mut ReadHalf<DuplexStream>,
    writer: &mut WriteHalf<DuplexStream>,
) -> io::Result<()> {
    let (_, request) = read_frame(reader).await?;
    let request: Request = serde_json::from_slice(&request)?;
    if request.token != TOKEN {
        return fail(writer, FailureCode::Unauthorized, "wrong token").await;
    }
    match request.op {
        Op::Ping => send(writer, Kind::Done, &json(&pong())).await,
        Op::Shutdown(_) => send(writer, Kind::Done, b"{}").await,
        Op::Program(_) | Op::Renew(_) => fail(writer, FailureCode::Internal, "not in this fake yet").await,
        Op::Files(request) => files::serve(fake, id, request, reader, writer).await,
        Op::Script(request) => scripts::serve(fake, request, reader, writer).await,
        Op::Exec(exec) => match exec.terminal {
            Some(size) => terminal::serve(fake, &exec, size, reader, writer).await,
            None => {
                let _running = Running::new(fake);
                tokio::select! {
                    ran = run(fake, id, &exec, writer) => ran,
                    () = hung_up(reader) => Ok(()),
                }
            }
        },
    }
}

/// The next frame from the host.
pub(super) async fn read_frame(reader: &mut ReadHalf<DuplexStream>) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).await?;
    let mut bytes = vec![0; decode_header(header).map_err(io::Error::other)?];
    reader.read_exact(&mut bytes).await?;
    let kind = Kind::from_byte(bytes.remove(0)).map_err(io::Error::other)?;
    Ok((kind, bytes))
}

/// Returns when the host has hung up; what it still sends is dropped.
pub(super) async fn hung_up(reader: &mut ReadHalf<DuplexStream>) {
    let mut buffer = [0; 1024];
    while !matches!(reader.read(&mut buffer).await, Ok(0) | Err(_)) {}
}

async fn run(fake: &Shared, id: &VmId, exec: &Exec, writer: &mut WriteHalf<DuplexStream>) -> io::Result<()> {
    if exec.cwd.starts_with("/missing") {
        return fail(writer, FailureCode::BadCwd, "no such directory").await;
    }
    let script = script_for(fake, id, exec);
    play(&script, (exec.stdout_cap, exec.stderr_cap, exec.timeout_ms), writer).await
}

/// Does what the script says, within the caps of stdout and stderr and the time limit.
pub(super) async fn play(
    script: &Script,
    (stdout_cap, stderr_cap, timeout_ms): (u64, u64, u64),
    writer: &mut WriteHalf<DuplexStream>,
) -> io::Result<()> {
    let began = Instant::now();
    if script.silent {
        std::future::pending::<()>().await;
    }
    if script.hang_up {
        return Ok(());
    }
    let stdout_truncated = write_capped(writer, Kind::Stdout, &script.stdout, stdout_cap).await?;
    let stderr_truncated = write_capped(writer, Kind::Stderr, &script.stderr, stderr_cap).await?;
    let limit = Duration::from_millis(timeout_ms);
    let timed_out = script.delay >= limit;
    let delay = script.delay.min(limit);
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    for chunk in script.result.chunks(32 * 1024) {
        send(writer, Kind::Result, chunk).await?;
    }
    let done = ExecDone {
        exit_code: if timed_out { -1 } else { script.exit_code },
        timed_out,
        stdout_truncated,
        stderr_truncated,
        duration_us: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
    };
    send(writer, Kind::Done, &json(&done)).await
}

fn script_for(fake: &Shared, id: &VmId, exec: &Exec) -> Script {
    let line = match &exec.command {
        Command::Shell(line) => line.clone(),
        Command::Argv(words) => words.join(" "),
    };
    if let Some(script) = fake.lock().scripts.get(&line) {
        return script.clone();
    }
    let says = |text: &str| Script { stdout: vec![format!("{text}\n").into_bytes()], ..Script::default() };
    match line.split_once(' ') {
        Some(("echo", text)) => match text.split_once(" > ") {
            Some((text, path)) => written(fake, id, path, text),
            None => says(text),
        },
        Some(("cat", path)) => match read(fake, id, path) {
            Some(text) => says(&text),
            None => Script { exit_code: 1, ..Script::default() },
        },
        Some(("printenv", name)) => match exec.env.get(name).or(exec.image_env.get(name)) {
            Some(value) => says(value),
            None => Script { exit_code: 1, ..Script::default() },
        },
        Some(("exit", code)) => Script { exit_code: code.parse().unwrap_or(2), ..Script::default() },
        Some(("sleep", seconds)) => {
            let delay = Duration::try_from_secs_f64(seconds.parse().unwrap_or(0.0)).unwrap_or_default();
            Script { delay, ..Script::default() }
        }
        _ => says(&line),
    }
}

fn written(fake: &Shared, id: &VmId, path: &str, text: &str) -> Script {
    if let Some(vm) = fake.lock().vms.get_mut(id) {
        let files = if path.starts_with("/dev/shm/") { &mut vm.memory } else { &mut vm.disk };
        files.insert(path.to_owned(), text.to_owned());
    }
    Script::default()
}

fn read(fake: &Shared, id: &VmId, path: &str) -> Option<String> {
    let state = fake.lock();
    let vm = state.vms.get(id)?;
    vm.memory.get(path).or_else(|| vm.disk.get(path)).cloned()
}

/// Writes up to `cap` bytes; tells whether there was more.
async fn write_capped(
    writer: &mut WriteHalf<DuplexStream>,
    kind: Kind,
    pieces: &[Vec<u8>],
    cap: u64,
) -> io::Result<bool> {
    let mut left = usize::try_from(cap).unwrap_or(usize::MAX);
    for piece in pieces {
        let fits = piece.len().min(left);
        for chunk in piece[..fits].chunks(32 * 1024) {
            send(writer, kind, chunk).await?;
        }
        left -= fits;
        if fits < piece.len() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Ends the operation with a failure.
pub(super) async fn fail(writer: &mut WriteHalf<DuplexStream>, code: FailureCode, message: &str) -> io::Result<()> {
    send(writer, Kind::Failed, &json(&Failure { code, message: message.into() })).await
}

/// Sends one frame.
pub(super) async fn send(writer: &mut WriteHalf<DuplexStream>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    writer.write_all(&encode(kind, payload)).await
}

/// A value as a payload.
pub(super) fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("strings and numbers are JSON")
}

fn pong() -> Pong {
    Pong { version: "fake".into(), unix_ms: tiffin_types::time::Timestamp::now().as_millis(), processes: 0 }
}
