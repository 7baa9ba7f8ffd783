//! The process that moves files: the agent's own program, started as the user.
//!
//! Its answer goes to the slip; its exit code says nothing. It trusts nobody: who runs it by hand gets no more than what
//! the shell could do.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use tiffin_protocol::{Failure, FileAction, FilesDone};

use super::{content, list, pack, staging, unpack};

/// The word that makes the agent's program the tool.
pub const WORD: &str = "files";

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Job {
    /// Move files.
    Act {
        /// How.
        action: FileAction,
        /// Where the answer goes.
        slip: PathBuf,
    },
    /// Remove what a killed tool left of `action`.
    Sweep {
        /// What it was about.
        action: FileAction,
    },
}

/// The command that does `job`.
pub fn arguments(job: &Job) -> Vec<String> {
    let job = serde_json::to_string(job).expect("strings and numbers are JSON");
    vec!["/proc/self/exe".to_owned(), WORD.to_owned(), job]
}

/// Does the job that `argument` names.
pub fn main(argument: &str) -> ExitCode {
    let Ok(job) = serde_json::from_str(argument) else {
        eprintln!("tiffin-agent: this is for the agent itself");
        return ExitCode::from(2);
    };
    match job {
        Job::Act { action, slip } => {
            let answer = act(&action);
            // The slip is there already: nothing is made, and no link is followed.
            let slip = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(slip);
            let told = slip.and_then(|mut slip| slip.write_all(&serde_json::to_vec(&answer)?));
            if told.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Job::Sweep { action } => {
            staging::sweep_for(&action);
            ExitCode::SUCCESS
        }
    }
}

fn act(action: &FileAction) -> Result<FilesDone, Failure> {
    match action {
        FileAction::Unpack { dest, limits } => unpack::run(dest, limits, stream(io::stdin())?),
        FileAction::Pack { path } => pack::run(path, stream(io::stdout())?),
        FileAction::List { path, max_entries } => list::run(path, *max_entries, stream(io::stdout())?),
        FileAction::Read { path } => content::read(path, stream(io::stdout())?),
        FileAction::Write { path, max_bytes } => content::write(path, *max_bytes, stream(io::stdin())?),
    }
}

/// A standard stream without the standard library's buffer.
fn stream(stream: impl AsFd) -> Result<std::fs::File, Failure> {
    let own =
        stream.as_fd().try_clone_to_owned().map_err(|error| super::refusal(&error, "standard stream".as_ref()))?;
    Ok(own.into())
}
