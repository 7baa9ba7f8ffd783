//! The program that a VM is started for: what an image says it is, with its creator's environment.
//!
//! Invariant: a [`Program`] that passed [`Program::check`] fits into the kernel's and the agent protocol's limits. What it
//! means (the user's number, whether there is such a file) is for the guest to find out. Environments hold secrets:
//! nothing here shows a value.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::limits;

/// A program, as images name theirs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program and its arguments. A name without a slash is looked up in the environment's `PATH`.
    pub argv: Vec<String>,
    /// Its environment. The guest adds `PATH`, `HOME` and `HOSTNAME` where they are missing, and nothing else.
    pub env: BTreeMap<String, String>,
    /// Absolute folder that it starts in, made if need be; empty for `/`.
    pub cwd: String,
    /// `name`, `uid`, either with `:group` or `:gid`, or nothing for root; by the guest's own `/etc/passwd` and
    /// `/etc/group`.
    pub user: String,
    /// What asks it to end.
    pub stop_signal: StopSignal,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program")
            .field("argv", &self.argv)
            .field("env", &self.env.keys())
            .field("cwd", &self.cwd)
            .field("user", &self.user)
            .field("stop_signal", &self.stop_signal)
            .finish()
    }
}

/// Why a program can't be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// The image names none.
    #[error("the image has neither an entrypoint nor a command: nothing says what to run")]
    Empty,
    /// Too many arguments, or too long ones.
    #[error(
        "the program and its arguments must be at most {} words of {} bytes together",
        limits::PROGRAM_ARGS_MAX,
        limits::PROGRAM_ARGS_BYTES
    )]
    ArgsTooLarge,
    /// A name in the environment is empty, or has `=` or a NUL.
    #[error("the name of an environment variable must not be empty nor contain '=' or a NUL byte")]
    EnvName,
    /// A value holds a NUL.
    #[error("the environment variable {0} contains a NUL byte")]
    EnvValue(String),
    /// Too many variables, or too long ones.
    #[error(
        "the environment, the image's and the request's together, must be at most {} variables of {} bytes each and {} \
         together",
        limits::PROGRAM_ENV_VARS_MAX,
        limits::ENV_VAR_BYTES,
        limits::ENV_BYTES
    )]
    EnvTooLarge,
    /// No folder.
    #[error("the working directory must be an absolute path of at most {} bytes without a NUL", limits::PATH_BYTES)]
    Cwd,
    /// No user.
    #[error(
        "the user must be a name or number, optionally with ':' and a group, of at most {} bytes",
        limits::PROGRAM_USER_BYTES
    )]
    User,
    /// A word of the program holds a NUL.
    #[error("an argument contains a NUL byte")]
    ArgNul,
    /// All together don't fit into a request to the guest.
    #[error("the program, its arguments and its environment are too large together; fewer control characters may do")]
    TooLarge,
    /// No signal.
    #[error("{0:?} is no signal; one is named such as SIGTERM, SIGRTMIN+3 or 15")]
    StopSignal(String),
}

impl Program {
    /// Whether it keeps to the limits.
    ///
    /// # Errors
    /// [`ProgramError`], the first that is found.
    pub fn check(&self) -> Result<(), ProgramError> {
        if self.argv.first().is_none_or(|program| program.is_empty()) {
            return Err(ProgramError::Empty);
        }
        if self.argv.iter().any(|word| word.contains('\0')) {
            return Err(ProgramError::ArgNul);
        }
        let bytes: usize = self.argv.iter().map(|word| word.len() + 1).sum();
        if self.argv.len() > limits::PROGRAM_ARGS_MAX || bytes > limits::PROGRAM_ARGS_BYTES {
            return Err(ProgramError::ArgsTooLarge);
        }
        check_env(&self.env)?;
        let absolute = self.cwd.is_empty() || self.cwd.starts_with('/');
        if !absolute || self.cwd.len() > limits::PATH_BYTES || self.cwd.contains('\0') {
            return Err(ProgramError::Cwd);
        }
        if self.user.len() > limits::PROGRAM_USER_BYTES || self.user.chars().any(|c| c.is_control()) {
            return Err(ProgramError::User);
        }
        let all = self.argv.iter().chain(self.env.keys()).chain(self.env.values()).chain([&self.cwd, &self.user]);
        if all.map(|text| json_bytes(text)).sum::<usize>() > limits::PROGRAM_JSON_BYTES {
            return Err(ProgramError::TooLarge);
        }
        Ok(())
    }
}

fn check_env(env: &BTreeMap<String, String>) -> Result<(), ProgramError> {
    let mut bytes = 0;
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(ProgramError::EnvName);
        }
        if value.contains('\0') {
            return Err(ProgramError::EnvValue(name.clone()));
        }
        let own = name.len() + value.len();
        if own > limits::ENV_VAR_BYTES {
            return Err(ProgramError::EnvTooLarge);
        }
        bytes += own;
    }
    if env.len() > limits::PROGRAM_ENV_VARS_MAX || bytes > limits::ENV_BYTES {
        return Err(ProgramError::EnvTooLarge);
    }
    Ok(())
}

/// What `text` takes as JSON, with its quotes and a comma.
fn json_bytes(text: &str) -> usize {
    let escaped = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    text.bytes().map(escaped).sum::<usize>() + 3
}

/// A signal, by its number on Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct StopSignal(u8);

/// The names of the first signals, by number.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];
/// The first and the last real-time signal, as the C library counts them.
const REAL_TIME: (u8, u8) = (34, 64);

impl StopSignal {
    /// SIGTERM: what asks a program to end unless its image says otherwise.
    pub const TERM: StopSignal = StopSignal(15);

    /// Its number.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl Default for StopSignal {
    fn default() -> Self {
        Self::TERM
    }
}

impl From<StopSignal> for u8 {
    fn from(signal: StopSignal) -> u8 {
        signal.0
    }
}

impl TryFrom<u8> for StopSignal {
    type Error = ProgramError;
    fn try_from(number: u8) -> Result<Self, ProgramError> {
        match number {
            1..=31 | 34..=64 => Ok(StopSignal(number)),
            other => Err(ProgramError::StopSignal(other.to_string())),
        }
    }
}

impl FromStr for StopSignal {
    type Err = ProgramError;

    /// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `RTMAX-1`; nothing is SIGTERM.
    fn from_str(text: &str) -> Result<Self, ProgramError> {
        let unknown = || ProgramError::StopSignal(text.chars().take(40).collect());
        if text.is_empty() {
            return Ok(Self::TERM);
        }
        if let Ok(number) = text.parse::<u8>() {
            return Self::try_from(number);
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let named = NAMES.iter().zip(1..).find(|(known, _)| **known == name).map(|(_, number)| number);
        named.or_else(|| real_time(name)).map(StopSignal).ok_or_else(unknown)
    }
}

fn real_time(name: &str) -> Option<u8> {
    let (first, last) = REAL_TIME;
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(sign)?.parse::<u8>().ok(),
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => first.checked_add(offset(rest, '+')?)?,
        (None, Some(rest)) => last.checked_sub(offset(rest, '-')?)?,
        (None, None) => return None,
    };
    (first..=last).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn program() -> Program {
        Program {
            argv: vec!["run".into(), "-v".into()],
            env: BTreeMap::from([("KEY".into(), "hush".into())]),
            cwd: "/srv".into(),
            user: "www:data".into(),
            stop_signal: StopSignal::TERM,
        }
    }

    fn with(change: impl FnOnce(&mut Program)) -> Result<(), ProgramError> {
        let mut program = program();
        change(&mut program);
        program.check()
    }

    #[test]
    fn a_usual_program_is_fine_and_reads_back() {
        assert_eq!(program().check(), Ok(()));
        let text = serde_json::to_string(&program()).unwrap();
        assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program());
    }

    #[test]
    fn no_value_of_the_environment_is_shown() {
        let shown = format!("{:?} {:#?}", program(), program());
        assert!(shown.contains("KEY") && !shown.contains("hush"), "{shown}");
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_here() {
        use ProgramError as E;
        assert_eq!(with(|p| p.argv.clear()), Err(E::Empty));
        assert_eq!(with(|p| p.argv[0].clear()), Err(E::Empty));
        assert_eq!(with(|p| p.argv.push("a\0".into())), Err(E::ArgNul));
        assert_eq!(with(|p| p.argv.push("a".repeat(limits::PROGRAM_ARGS_BYTES))), Err(E::ArgsTooLarge));
        assert_eq!(with(|p| p.argv = vec!["a".into(); limits::PROGRAM_ARGS_MAX + 1]), Err(E::ArgsTooLarge));
        for name in ["", "A=B", "A\0"] {
            assert_eq!(with(|p| drop(p.env.insert(name.into(), "x".into()))), Err(E::EnvName), "{name:?}");
        }
        assert_eq!(with(|p| drop(p.env.insert("A".into(), "\0".into()))), Err(E::EnvValue("A".into())));
        let long = "x".repeat(limits::ENV_VAR_BYTES);
        assert_eq!(with(|p| drop(p.env.insert("A".into(), long))), Err(E::EnvTooLarge));
        let many =
            |p: &mut Program| p.env = (0..=limits::PROGRAM_ENV_VARS_MAX).map(|n| (n.to_string(), "".into())).collect();
        assert_eq!(with(many), Err(E::EnvTooLarge));
        for cwd in ["srv", "./", "/\0"] {
            assert_eq!(with(|p| p.cwd = cwd.into()), Err(E::Cwd), "{cwd:?}");
        }
        assert_eq!(with(|p| p.user = "a\nb".into()), Err(E::User));
    }

    #[test]
    fn what_would_not_fit_into_a_request_is_refused() {
        let full = "\u{1}".repeat(limits::ENV_VAR_BYTES - 10);
        let env = (0..7).map(|n| (n.to_string(), full.clone())).collect();
        assert_eq!(with(|p| p.env = env), Err(ProgramError::TooLarge));
    }

    #[test]
    fn nothing_is_a_fine_folder_and_user() {
        assert_eq!(with(|p| (p.cwd, p.user) = (String::new(), String::new())), Ok(()));
    }

    #[test]
    fn signals_have_all_their_names() {
        for (text, number) in [
            ("", 15),
            ("SIGTERM", 15),
            ("TERM", 15),
            ("sigquit", 3),
            ("9", 9),
            ("SIGWINCH", 28),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("SIGRTMAX", 64),
            ("SYS", 31),
            ("HUP", 1),
        ] {
            assert_eq!(text.parse::<StopSignal>().map(StopSignal::number), Ok(number), "{text:?}");
        }
        for text in
            ["0", "32", "65", "300", "SIG", "SIGNOPE", "SIGRTMIN-1", "SIGRTMIN+31", "SIGRTMAX-99", "-1", "RTMIN+"]
        {
            assert!(text.parse::<StopSignal>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_never_larger_as_json_than_counted(words in proptest::collection::vec("[\\x00-\\x{7f}é]{0,40}", 1..5)) {
            let counted: usize = words.iter().map(|word| json_bytes(word)).sum();
            prop_assert!(serde_json::to_string(&words).unwrap().len() <= counted + 2);
        }

        #[test]
        fn any_text_is_a_signal_or_none(text in ".{0,12}") {
            if let Ok(signal) = text.parse::<StopSignal>() {
                prop_assert!((1..=64).contains(&signal.number()));
            }
        }
    }
}
