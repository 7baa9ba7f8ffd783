//! Terminals of fake VMs: what is typed is echoed, and a line is a command when it is one of these: `size` (answers
//! `ROWS COLS`), `flood` (writes for ever), `hang` (the agent hangs up), `exit N`. Ctrl-D ends it with 0.

use std::{io, time::Duration};

use tiffin_protocol::{Exec, ExecDone, Kind, TerminalSize};
use tokio::io::{DuplexStream, ReadHalf, WriteHalf};

use super::{
    Shared,
    guest::{Running, json, read_frame, send},
};

/// Serves one terminal.
pub(super) async fn serve(
    fake: &Shared,
    exec: &Exec,
    size: TerminalSize,
    reader: &mut ReadHalf<DuplexStream>,
    writer: &mut WriteHalf<DuplexStream>,
) -> io::Result<()> {
    let _running = Running::new(fake);
    let limit = Duration::from_millis(exec.timeout_ms);
    let (exit_code, timed_out) = match tokio::time::timeout(limit, session(size, reader, writer)).await {
        Ok(Ok(Some(code))) => (code, false),
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) => return Err(error),
        Err(_) => (-1, true),
    };
    let done = ExecDone { exit_code, timed_out, stdout_truncated: false, stderr_truncated: false, duration_us: 1 };
    send(writer, Kind::Done, &json(&done)).await
}

/// The exit code; `None` when the agent hangs up.
async fn session(
    mut size: TerminalSize,
    reader: &mut ReadHalf<DuplexStream>,
    writer: &mut WriteHalf<DuplexStream>,
) -> io::Result<Option<i32>> {
    let mut line = Vec::new();
    loop {
        let (kind, bytes) = read_frame(reader).await?;
        match kind {
            Kind::Stdin => {}
            Kind::Resize => {
                size = serde_json::from_slice(&bytes)?;
                continue;
            }
            Kind::StdinEnd => return Ok(Some(0)),
            other => return Err(io::Error::other(format!("a {other:?} frame in a terminal"))),
        }
        send(writer, Kind::Stdout, &bytes).await?;
        for byte in bytes {
            match byte {
                4 => return Ok(Some(0)),
                b'\r' | b'\n' => match String::from_utf8_lossy(&std::mem::take(&mut line)).as_ref() {
                    "size" => {
                        let text = format!("{} {}\r\n", size.rows, size.columns);
                        send(writer, Kind::Stdout, text.as_bytes()).await?;
                    }
                    "flood" => loop {
                        send(writer, Kind::Stdout, &[b'x'; 32 * 1024]).await?;
                    },
                    "hang" => return Ok(None),
                    line => {
                        if let Some(code) = line.strip_prefix("exit ") {
                            return Ok(Some(code.parse().unwrap_or(2)));
                        }
                    }
                },
                other => line.push(other),
            }
        }
    }
}
