//! Why the kernel wouldn't run a program, in words that help whoever made the image.
//!
//! The kernel says "no such file" also of a script whose interpreter is missing, and "exec format error" of all that it
//! doesn't know: a look at the file tells more. The file is a stranger's: little of it is read, and none of it is shown but
//! an interpreter's name.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use tiffin_protocol::{Failure, FailureCode};

use crate::request::failure;

/// Bytes of the file that are looked at: the kernel's own limit for an interpreter's line.
const HEAD: usize = 256;

/// The processor that this program was built for, as ELF numbers it.
const OWN_MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };

/// What it means that none of `candidates` could be run for `name`.
pub fn explain(name: &str, candidates: &[CString], errno: Errno) -> Failure {
    let there = candidates.iter().find_map(|path| Found::at(path));
    match there {
        None if errno == Errno::ENOENT && name.contains('/') => {
            failure(FailureCode::NotFound, &format!("there is no {name:?} in the VM"))
        }
        None if errno == Errno::ENOENT => {
            failure(FailureCode::NotFound, &format!("there is no {name:?} in any folder of the program's PATH"))
        }
        None => failure(FailureCode::BadCommand, &format!("{name:?} can't be run: {}", errno.desc())),
        Some(found) => failure(FailureCode::BadCommand, &format!("{:?} {}", found.path, found.why(errno))),
    }
}

/// A file of that name.
struct Found {
    path: String,
    is_file: bool,
    mode: u32,
    head: Vec<u8>,
}

impl Found {
    fn at(path: &CStr) -> Option<Self> {
        let os = OsStr::from_bytes(path.to_bytes());
        let metadata = std::fs::metadata(os).ok()?;
        let mut head = Vec::new();
        if metadata.is_file() {
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(os);
            if let Ok(file) = file {
                // What was read before an error says as much.
                let _ = file.take(HEAD as u64).read_to_end(&mut head);
            }
        }
        let path = path.to_string_lossy().into_owned();
        Some(Found { path, is_file: metadata.is_file(), mode: metadata.mode(), head })
    }

    fn why(&self, errno: Errno) -> String {
        if !self.is_file {
            return "is no file".to_owned();
        }
        if self.mode & 0o111 == 0 {
            return "is not executable: give it the permission (chmod +x) in the image".to_owned();
        }
        match (errno, self.interpreter(), self.machine()) {
            (Errno::ENOENT | Errno::ENOEXEC, Some(line), _) if line.ends_with('\r') => {
                "has Windows line ends (CRLF): its first line names an interpreter that doesn't exist; save it with LF alone"
                    .to_owned()
            }
            (Errno::ENOENT, Some(line), _) => {
                let interpreter: String = line.split_whitespace().next().unwrap_or_default().chars().take(100).collect();
                format!("is a script for {interpreter:?}, which the VM doesn't have")
            }
            (_, _, Some(machine)) if machine != OWN_MACHINE => {
                format!("is built for another processor ({}); the VM's is {}", machine_name(machine), machine_name(OWN_MACHINE))
            }
            (Errno::ENOENT, None, Some(_)) => {
                "needs a dynamic loader that the VM doesn't have: it is built for another C library".to_owned()
            }
            (Errno::ENOEXEC, None, None) => {
                "is neither a script that begins with #! nor a program that this system can run".to_owned()
            }
            (Errno::EACCES, ..) => "may not be run by the program's user".to_owned(),
            _ => format!("can't be run: {}", errno.desc()),
        }
    }

    /// What follows `#!` on the first line, its carriage return included.
    fn interpreter(&self) -> Option<String> {
        let line = self.head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
        Some(String::from_utf8_lossy(line).into_owned())
    }

    /// The processor that an ELF file is for.
    fn machine(&self) -> Option<u16> {
        let bytes = self.head.strip_prefix(b"\x7fELF").and_then(|rest| rest.get(14..16))?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    }
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "x86".to_owned(),
        40 => "arm".to_owned(),
        62 => "x86_64".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "riscv".to_owned(),
        other => format!("ELF machine {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn told(content: &[u8], mode: u32, errno: Errno) -> (FailureCode, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let candidate = CString::new(path.as_os_str().as_bytes()).unwrap();
        let told = explain("run", &[c"/no/such/run".to_owned(), candidate], errno);
        (told.code, told.message)
    }

    #[test]
    fn each_cause_has_words_of_its_own() {
        let elf =
            |machine: u8| [b"\x7fELF".as_slice(), &[2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, machine, 0]].concat();
        for (content, mode, errno, words) in [
            (b"#!/bin/sh\r\necho\r\n".to_vec(), 0o755, Errno::ENOENT, "CRLF"),
            (b"#!/bin/zsh -e\n".to_vec(), 0o755, Errno::ENOENT, "\"/bin/zsh\""),
            (b"#!/bin/sh\n".to_vec(), 0o644, Errno::EACCES, "chmod"),
            (b"#!/bin/sh\n".to_vec(), 0o700, Errno::EACCES, "user"),
            (b"echo hello\n".to_vec(), 0o755, Errno::ENOEXEC, "#!"),
            (Vec::new(), 0o755, Errno::ENOEXEC, "#!"),
            (elf(183), 0o755, Errno::ENOEXEC, "aarch64"),
            (elf(62), 0o755, Errno::ENOENT, "loader"),
            (elf(62), 0o755, Errno::ENOMEM, "can't be run"),
        ] {
            let (code, message) = told(&content, mode, errno);
            assert!(code == FailureCode::BadCommand && message.contains(words), "{words}: {message}");
        }
    }

    #[test]
    fn what_is_not_there_is_told_from_what_cant_be_run() {
        let missing = explain("run", &[c"/no/such/run".to_owned()], Errno::ENOENT);
        assert_eq!(missing.code, FailureCode::NotFound);
        assert!(missing.message.contains("PATH"), "{}", missing.message);
        assert_eq!(explain("/no/run", &[c"/no/run".to_owned()], Errno::ENOENT).code, FailureCode::NotFound);
        assert_eq!(explain("/dev", &[c"/dev".to_owned()], Errno::EACCES).code, FailureCode::BadCommand);
    }
}
