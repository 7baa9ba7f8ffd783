//! The programs that the platform calls, and how the doctor asks any program for its version.

use std::{
    io::{self, Read},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use super::{Check, DoctorInput};

/// How long a program has to tell its version.
const LIMIT: Duration = Duration::from_secs(8);
/// What is read of its answer; less than a pipe holds, so that nothing has to be read while it runs.
const ANSWER_BYTES: u64 = 4096;

struct Tool {
    name: &'static str,
    version: &'static str,
    package: &'static str,
}

const TOOLS: [Tool; 4] = [
    Tool { name: "ip", version: "-V", package: "iproute2" },
    Tool { name: "nft", version: "--version", package: "nftables" },
    Tool { name: "mke2fs", version: "-V", package: "e2fsprogs" },
    Tool { name: "mkfs.erofs", version: "-V", package: "erofs-utils" },
];

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    TOOLS.iter().map(one).collect()
}

fn one(tool: &Tool) -> Check {
    let remedy = format!("apt-get install {}", tool.package);
    // mkfs.erofs 1.5 tells its version and exits with 1.
    match ask(Command::new(tool.name).arg(tool.version)) {
        Ok((_, version)) => Check::ok(tool.name, version),
        Err(error) => Check::fail(tool.name, error.to_string(), remedy),
    }
}

/// The first line that a program prints, on stdout or else on stderr; an error when it fails.
pub(super) fn first_line(command: &mut Command) -> io::Result<String> {
    let (status, line) = ask(command)?;
    if status.success() { Ok(line) } else { Err(io::Error::other(format!("{line} ({status})"))) }
}

/// Runs a program to its end, and kills it when it takes too long.
fn ask(command: &mut Command) -> io::Result<(ExitStatus, String)> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        read(stdout, &mut answer)?;
    }
    if let Some(stderr) = child.stderr.take() {
        read(stderr, &mut answer)?;
    }
    let line = answer.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned();
    Ok((status, line))
}

fn read(pipe: impl Read, answer: &mut String) -> io::Result<()> {
    let mut bytes = Vec::new();
    pipe.take(ANSWER_BYTES).read_to_end(&mut bytes)?;
    answer.push_str(&String::from_utf8_lossy(&bytes));
    answer.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_is_known_by_its_version_and_a_missing_one_by_its_package() {
        let found = one(&Tool { name: "mkfs.erofs", version: "-V", package: "erofs-utils" });
        assert!(found.remedy.is_none() && found.found.contains("1."), "{found:?}");
        let missing = one(&Tool { name: "tiffin-no-such-tool", version: "-V", package: "nosuch" });
        assert_eq!(missing.remedy.as_deref(), Some("apt-get install nosuch"));
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let started = Instant::now();
        assert_eq!(first_line(Command::new("sleep").arg("60")).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}
