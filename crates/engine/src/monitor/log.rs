//! A VM's logs: bounded files of lines that begin with a time.
//!
//! A file that is full becomes the `.1` beside it, so that a guest that prints without end fills twice the bound and no
//! more. Lines are written as they come: what a killed monitor had read is on disk.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use tiffin_types::time::Timestamp;

use crate::{LogKind, LogTail};

/// Bytes of one file before it is turned over.
const FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes that a guest may write to a log in a second.
const BYTES_PER_SECOND: usize = 1024 * 1024;
/// Bytes of a line; a longer one is split.
const LINE_BYTES: usize = 16 * 1024;

/// The file of a log.
pub fn file_name(kind: LogKind) -> &'static str {
    match kind {
        LogKind::Engine => "engine.log",
        LogKind::Console => "console.log",
        LogKind::EngineErrors => "errors.log",
    }
}

/// A log that is being written.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    open: Mutex<Option<(File, u64)>>,
}

impl Log {
    /// The log of that kind in a VM's folder; the file is opened at the first line.
    pub fn new(dir: &Path, kind: LogKind) -> Self {
        Self { path: dir.join(file_name(kind)), open: Mutex::new(None) }
    }

    /// Writes a line. A failure (the host's disk is full) loses the line and nothing else: there is no one to tell.
    pub fn line(&self, text: impl AsRef<[u8]>) {
        let mut stamped = Vec::new();
        stamp(&mut stamped, text.as_ref());
        let _ = self.append(&stamped);
    }

    fn append(&self, line: &[u8]) -> io::Result<()> {
        let mut open = self.open.lock().map_err(|_| io::Error::other("a writer panicked"))?;
        if open.as_ref().is_some_and(|(_, length)| *length >= FILE_BYTES) {
            *open = None;
            fs::rename(&self.path, turned_over(&self.path))?;
        }
        let (file, length) = match open.as_mut() {
            Some(one) => one,
            None => {
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
                let length = file.metadata()?.len();
                open.insert((file, length))
            }
        };
        file.write_all(line)?;
        *length += line.len() as u64;
        Ok(())
    }

    /// Writes what comes from `from`, line by line, until it ends. What comes faster than a MiB a second waits in
    /// its pipe: the work is the monitor's, which no control group of the VM's limits.
    pub fn copy_from(&self, mut from: impl Read) {
        let mut held = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        let (mut second, mut taken) = (Instant::now(), 0);
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            held.extend_from_slice(&buffer[..length]);
            let _ = self.append(&take_lines(&mut held));
            taken += length;
            let passed = second.elapsed();
            if passed >= Duration::from_secs(1) {
                (second, taken) = (Instant::now(), 0);
            } else if taken >= BYTES_PER_SECOND {
                std::thread::sleep(Duration::from_secs(1) - passed);
                (second, taken) = (Instant::now(), 0);
            }
        }
        if !held.is_empty() {
            self.line(&held);
        }
    }
}

/// The whole lines of `held`, each with the time, which are taken out of it; so is a line that is too long already.
fn take_lines(held: &mut Vec<u8>) -> Vec<u8> {
    let mut stamped = Vec::new();
    let mut begin = 0;
    while let Some(length) = held[begin..].iter().position(|byte| *byte == b'\n') {
        stamp(&mut stamped, &held[begin..begin + length]);
        begin += length + 1;
    }
    if held.len() - begin >= LINE_BYTES {
        stamp(&mut stamped, &held[begin..]);
        begin = held.len();
    }
    held.drain(..begin);
    stamped
}

fn stamp(onto: &mut Vec<u8>, line: &[u8]) {
    onto.extend_from_slice(Timestamp::now().to_string().as_bytes());
    onto.push(b' ');
    onto.extend_from_slice(line);
    onto.push(b'\n');
}

fn turned_over(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The last `lines` lines of a log in a VM's folder.
///
/// # Errors
/// The kernel's; a log that isn't there is empty.
pub fn tail(dir: &Path, kind: LogKind, lines: usize) -> io::Result<LogTail> {
    let path = dir.join(file_name(kind));
    let Some((newest, modified)) = read_end(&path)? else { return Ok(LogTail::default()) };
    let older = read_end(&turned_over(&path))?.map(|(bytes, _)| bytes).unwrap_or_default();
    let text = [older, newest].concat();
    let mut all: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    if all.last().is_some_and(|line| line.is_empty()) {
        all.pop();
    }
    let truncated = all.len() > lines;
    let lines = all[all.len().saturating_sub(lines)..].iter();
    Ok(LogTail {
        lines: lines.map(|line| String::from_utf8_lossy(&line[..line.len().min(LINE_BYTES)]).into_owned()).collect(),
        truncated,
        updated_at_ms: modified,
    })
}

/// A file's last bytes, at most one file's worth, and when it was written.
fn read_end(path: &Path) -> io::Result<Option<(Vec<u8>, Option<i64>)>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let meta = file.metadata()?;
    file.seek(SeekFrom::Start(meta.len().saturating_sub(FILE_BYTES + LINE_BYTES as u64)))?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES + LINE_BYTES as u64).read_to_end(&mut bytes)?;
    let modified = meta.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    Ok(Some((bytes, modified.and_then(|since| i64::try_from(since.as_millis()).ok()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_its_tail_is_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path(), LogKind::Console);
        let line = vec![b'x'; 8000];
        for _ in 0..2000 {
            log.line(&line);
        }
        log.line("last");
        let bytes: u64 = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes < 2 * FILE_BYTES + 20_000, "{bytes}");
        let tail = tail(dir.path(), LogKind::Console, 2).unwrap();
        assert!(tail.truncated && tail.lines.len() == 2 && tail.lines[1].ends_with(" last"));
    }

    #[test]
    fn lines_without_end_and_binary_are_split_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path(), LogKind::Console);
        log.copy_from(&[&[0xffu8; 40_000][..], b"\nend"].concat()[..]);
        let tail = tail(dir.path(), LogKind::Console, 100).unwrap();
        assert!(tail.lines.len() >= 3 && tail.lines.last().unwrap().ends_with(" end"));
    }

    #[test]
    fn a_guest_that_prints_without_pause_is_slowed_down() {
        let dir = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        Log::new(dir.path(), LogKind::Console).copy_from(&vec![b'\n'; BYTES_PER_SECOND + 20_000][..]);
        assert!(begun.elapsed() >= Duration::from_secs(1));
    }

    #[test]
    fn a_log_that_is_not_there_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(tail(dir.path(), LogKind::Engine, 10).unwrap(), LogTail::default());
    }
}
