//! The gate at which the engine's launcher waits until all that it stands on is there.
//!
//! The launcher takes a tenth of a boot to get to its first question, what the bundle says; until then it needs nothing.
//! So it is started at once, and its log is a FIFO: opening one to write waits for a reader (fifo(7)), and the launcher
//! opens its log just before it looks for the bundle. One that didn't would find no bundle and give up.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{sys::stat::Mode, unistd::mkfifo};

/// A gate that is shut.
pub(super) struct Gate {
    path: PathBuf,
    /// The FIFO itself, whatever has its name.
    fifo: File,
}

impl Gate {
    /// Makes it. Nothing may be there yet by its name.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let fifo = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
        Ok(Self { path: path.to_owned(), fifo })
    }

    /// Lets through who waits, and whoever comes.
    pub(super) fn open(self) -> io::Result<()> {
        // Who comes from now on finds a file.
        let mut name = OsString::from(&self.path);
        name.push(".open");
        File::create(&name)?;
        fs::rename(&name, &self.path)?;
        let there = format!("/proc/self/fd/{}", self.fifo.as_raw_fd());
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(there).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Child, Command, Stdio},
        thread,
        time::Duration,
    };

    use super::*;

    fn writer(path: &Path) -> Child {
        let mut command = Command::new("sh");
        // Opens it and writes nothing: a reader that has let it through is gone by then.
        command.args(["-c", ": >> \"$1\"; echo through", "sh"]).arg(path);
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn said(child: Child) -> String {
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    }

    #[test]
    fn who_waits_is_let_through_and_so_is_who_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let gate = Gate::new(&path).unwrap();
        let mut waits = writer(&path);
        thread::sleep(Duration::from_millis(200));
        assert!(waits.try_wait().unwrap().is_none());
        gate.open().unwrap();
        assert_eq!(said(waits), "through\n");
        assert_eq!(said(writer(&path)), "through\n");
        assert!(fs::metadata(&path).unwrap().is_file());
    }

    #[test]
    fn nobody_is_let_through_a_gate_that_is_never_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let gate = Gate::new(&path).unwrap();
        let mut waits = writer(&path);
        drop(gate);
        thread::sleep(Duration::from_millis(200));
        assert!(waits.try_wait().unwrap().is_none());
        waits.kill().unwrap();
        assert_eq!(said(waits), "");
    }
}
