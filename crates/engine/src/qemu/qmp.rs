//! QEMU's control socket (QMP, docs/interop/qmp-spec of QEMU): one command at a time, its answer, and no events.
//!
//! What answers is QEMU, which a guest may have taken over: lines have a bound, and an answer is only told from an error.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// Bytes of a line; the longest answers that are asked for are some hundreds.
const MAX_LINE: u64 = 64 * 1024;
/// Lines before an answer: events that nobody asked for.
const MAX_EVENTS: usize = 1024;

/// A connection that is ready for commands.
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets.
    ///
    /// # Errors
    /// When QEMU isn't there within the time, or doesn't speak so.
    pub fn greet(stream: UnixStream, within: Duration) -> io::Result<Self> {
        let mut qmp = Self { stream: BufReader::new(stream) };
        let deadline = Instant::now() + within;
        if qmp.line(deadline)?.get("QMP").is_none() {
            return Err(io::Error::other("no greeting"));
        }
        qmp.ask("qmp_capabilities", &json!({}), within)?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returned.
    ///
    /// # Errors
    /// What QEMU said, or that it said nothing within the time.
    pub fn ask(&mut self, command: &str, arguments: &Value, within: Duration) -> io::Result<Value> {
        let deadline = Instant::now() + within;
        let mut line =
            serde_json::to_vec(&json!({ "execute": command, "arguments": arguments })).map_err(io::Error::other)?;
        line.push(b'\n');
        self.stream.get_ref().set_write_timeout(Some(within))?;
        self.stream.get_mut().write_all(&line)?;
        for _ in 0..MAX_EVENTS {
            let mut answer = self.line(deadline)?;
            if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            }
            if let Some(error) = answer.get("error") {
                let said: String = error["desc"].as_str().unwrap_or("an error").chars().take(200).collect();
                return Err(io::Error::other(format!("{command}: {said}")));
            }
        }
        Err(io::Error::other(format!("{command}: no answer among many events")))
    }

    fn line(&mut self, deadline: Instant) -> io::Result<Value> {
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            let room = MAX_LINE.saturating_sub(line.len() as u64);
            match (&mut self.stream).take(room).read_until(b'\n', &mut line) {
                Ok(0) if room == 0 => return Err(io::Error::other("a line without end")),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if line.ends_with(b"\n") => return serde_json::from_slice(&line).map_err(io::Error::other),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn answered(lines: &'static str) -> io::Result<Qmp> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(lines.as_bytes()).unwrap();
        let greeted = Qmp::greet(ours, SOON);
        // It is heard until then.
        drop(theirs);
        greeted
    }

    #[test]
    fn events_are_passed_over() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let lines = "{\"QMP\":{}}\n{\"return\":{}}\n{\"event\":\"STOP\"}\n{\"return\":{\"running\":false}}\n";
        theirs.write_all(lines.as_bytes()).unwrap();
        let mut qmp = Qmp::greet(ours, SOON).unwrap();
        assert_eq!(qmp.ask("query-status", &json!({}), SOON).unwrap()["running"], false);
    }

    #[test]
    fn an_error_is_told_in_qemus_words() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let lines = "{\"QMP\":{}}\n{\"return\":{}}\n{\"error\":{\"class\":\"GenericError\",\"desc\":\"not now\"}}\n";
        theirs.write_all(lines.as_bytes()).unwrap();
        let error = Qmp::greet(ours, SOON).unwrap().ask("stop", &json!({}), SOON).unwrap_err();
        assert_eq!(error.to_string(), "stop: not now");
    }

    #[test]
    fn who_greets_otherwise_or_hangs_up_is_refused() {
        assert!(answered("{\"hello\":1}\n").is_err());
        assert!(answered("{\"QMP\":{}}\n").is_err());
        assert!(answered("nonsense\n").is_err());
    }

    #[test]
    fn who_says_nothing_is_not_waited_for_longer_than_asked() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let begun = Instant::now();
        assert!(Qmp::greet(ours, Duration::from_millis(50)).is_err());
        assert!(begun.elapsed() < SOON);
    }
}
