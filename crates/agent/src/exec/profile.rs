//! What a login shell is started by and reads when it starts: whether reading it early gives what reading it late would,
//! and whether it is still what was read.
//!
//! The rule is conservative. A shell may start early only where `/etc/profile` is the default image's own text, byte for
//! byte, all that this includes is plain assignments (`is_plain`), and the user has no profile. Then nothing is run,
//! written, printed, or taken from anything but these files and the environment. Where any of it has changed since, or a
//! file has come or gone, the shell that was started early is of no use any more.
//!
//! It doesn't notice that the program's libraries have changed: that takes root in the guest, and what runs keeps them.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::environment::PASSWD;

/// The default image's `/etc/profile`.
const KNOWN: &[u8] = include_bytes!("../../../image/recipe/profile");

const PROFILE: &str = "/etc/profile";
const PARTS: &str = "/etc/profile.d";

/// Where bash looks for the user's own, below the home folder.
const OWN: [&str; 3] = [".bash_profile", ".bash_login", ".profile"];

/// More files than this in `/etc/profile.d` are too many to look at before each command.
const MAX_PARTS: usize = 16;

/// Bytes of a file that are looked at; a longer one is not plain.
const MAX_FILE: u64 = 16 * 1024;

/// Names that mean something to bash or to the linker, or begin like one that does. The locale's are none of them: it is
/// the same whenever it is set.
const SPECIAL: [&str; 30] = [
    "BASH",
    "CDPATH",
    "COLUMNS",
    "COMP",
    "DIRSTACK",
    "ENV",
    "EPOCH",
    "EUID",
    "EXECIGNORE",
    "FCEDIT",
    "FIGNORE",
    "FUNC",
    "GLOB",
    "GROUPS",
    "HIST",
    "HOME",
    "HOST",
    "IFS",
    "INPUTRC",
    "LD_",
    "LINENO",
    "MACHTYPE",
    "OLDPWD",
    "OPT",
    "POSIXLY",
    "PS",
    "PWD",
    "RANDOM",
    "SECONDS",
    "TMOUT",
];

/// More of them.
const SPECIAL_TOO: [&str; 9] =
    ["SHELL", "SHLVL", "SRANDOM", "TEXTDOMAIN", "TIMEFORMAT", "TZ", "UID", "PIPESTATUS", "PPID"];

/// What a login shell would find, at one moment.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    host: Option<std::ffi::OsString>,
    folder: Option<Stamp>,
    files: Vec<(PathBuf, Option<Stamp>)>,
}

/// What tells one state of a file from another. Of a folder that commands work in, only what it is and who may enter.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    mode: u32,
    owner: (u32, u32),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Whether a login shell leaves a `PATH` that it was given: there is no profile, or the default image's, which does. Others mostly
/// set one of their own.
pub fn keeps_path() -> bool {
    !Path::new(PROFILE).exists() || read(Path::new(PROFILE)).is_some_and(|text| text == KNOWN)
}

impl Fingerprint {
    /// What `shell` would find for a user at home in `home`, started in `folder`; none where it may not start early.
    pub fn take(shell: &str, home: &str, folder: &str) -> Option<Self> {
        let mut files: Vec<_> = [PASSWD, shell, PROFILE, PARTS].map(PathBuf::from).into();
        files.extend(OWN.map(|name| Path::new(home).join(name)));
        files.extend(parts()?);
        // Stamped before they are read: what changes in between is noticed.
        let found = Self::of(folder, files);
        let own = |file: &Path| OWN.iter().any(|name| file.ends_with(name));
        let may = read(Path::new(PROFILE))? == KNOWN
            && found.files.iter().all(|(file, stamp)| match stamp {
                _ if file.starts_with(PARTS) && file != Path::new(PARTS) => {
                    read(file).is_some_and(|text| is_plain(&text))
                }
                Some(_) => !own(file),
                None => own(file) || file == Path::new(PARTS) || file == Path::new(PASSWD),
            });
        may.then_some(found)
    }

    /// Whether all is as it was.
    pub fn still_holds(&self, folder: &str) -> bool {
        *self == Self::of(folder, self.files.iter().map(|(file, _)| file.clone()).collect())
    }

    fn of(folder: &str, files: Vec<PathBuf>) -> Self {
        let entered = |stamp: Stamp| Stamp { size: 0, modified: (0, 0), changed: (0, 0), ..stamp };
        Fingerprint {
            host: nix::unistd::gethostname().ok(),
            folder: Stamp::of(Path::new(folder)).map(entered),
            files: files.into_iter().map(|file| (file.clone(), Stamp::of(&file))).collect(),
        }
    }
}

impl Stamp {
    fn of(file: &Path) -> Option<Self> {
        let found = fs::metadata(file).ok()?;
        Some(Stamp {
            device: found.dev(),
            inode: found.ino(),
            mode: found.mode(),
            owner: (found.uid(), found.gid()),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// The parts that the profile includes; none when they are too many.
fn parts() -> Option<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(PARTS) else { return Some(Vec::new()) };
    let files: Vec<PathBuf> = entries
        .take(MAX_PARTS + 1)
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "sh"))
        .collect();
    (files.len() <= MAX_PARTS).then_some(files)
}

/// A file's text, when it is a short regular one. Isn't stuck on a FIFO.
fn read(file: &Path) -> Option<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(file).ok()?;
    let mut text = Vec::new();
    (file.metadata().ok()?.is_file()).then_some(())?;
    file.take(MAX_FILE + 1).read_to_end(&mut text).ok()?;
    (text.len() as u64 <= MAX_FILE).then_some(text)
}

/// Whether `text` is nothing but empty lines, comments, and lines that give constants to variables, or export them, which
/// mean nothing to the shell itself: `A=b`, `export A=b`, `export A`, and `: "${A=b}"` as the default image has it.
fn is_plain(text: &[u8]) -> bool {
    text.split(|byte| *byte == b'\n').all(|line| {
        std::str::from_utf8(line).is_ok_and(|line| {
            let line = line.trim_matches([' ', '\t']);
            line.is_empty() || line.starts_with('#') || is_plain_line(line)
        })
    })
}

fn is_plain_line(line: &str) -> bool {
    if let Some(default) = line.strip_prefix(": \"${").and_then(|rest| rest.strip_suffix("}\"")) {
        return default.split_once('=').is_some_and(|(name, value)| is_name(name) && value.bytes().all(is_literal));
    }
    let exported = line.strip_prefix("export ");
    match exported.unwrap_or(line).split_once('=') {
        Some((name, value)) => is_name(name) && is_constant(value),
        None => exported.is_some_and(is_name),
    }
}

fn is_name(name: &str) -> bool {
    let shaped = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    shaped
        && name != "_"
        && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
        && !SPECIAL.iter().chain(&SPECIAL_TOO).any(|special| name.starts_with(special))
}

fn is_constant(value: &str) -> bool {
    let quoted = |byte: u8| is_literal(byte) || b" ;&|<>()[]{}*?#~'".contains(&byte);
    match value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(inner) => inner.bytes().all(quoted),
        None => value.bytes().all(is_literal),
    }
}

/// Whether `byte` stands for itself, quoted or not.
fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_./:@%+,=-".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn constants_are_plain_and_nothing_else_is() {
        for plain in [
            "",
            "# a\n\n",
            "export A=b\nexport B",
            "A=\n",
            "  PATH=/a:/b\nexport GOPATH=\"/w x/(y)\"",
            "JAVA_HOME=/j",
            "LC_ALL=C",
            ": \"${LC_CTYPE=C.UTF-8}\"\nexport LC_CTYPE",
        ] {
            assert!(is_plain(plain.as_bytes()), "{plain:?}");
        }
        for odd in [
            "echo hi",
            "export",
            "export ",
            ": \"${A=$(id)}\"",
            ": \"${A=~}\"",
            ": \"${A:=b}\"",
            ": \"${IFS=b}\"",
            ": ${A=b}",
            "A=$(id)",
            "A=`id`",
            "A=$PATH",
            "A=b c",
            "A=b;id",
            "A=~/x",
            "export A B",
            "export 1A",
            "export A=b B=c",
            ". /x",
            "A=\"$B\"",
            "A=\"b\\\\\"",
            "A=\"b\"\"c",
            "unset A",
            "A+=b",
            "A[0]=b",
            "1A=b",
            "=b",
            "_=b",
            "A='b'",
            "A=b\r",
            "umask 077",
            "IFS=x",
            "BASH_ENV=/x",
            "LD_PRELOAD=/x",
            "PS1=x",
            "TMOUT=1",
            "HOME=/x",
            "SECONDS=9",
            "if true; then",
            "A=\"b",
            "export  -n A",
            "\u{feff}A=b",
        ] {
            assert!(!is_plain(odd.as_bytes()), "{odd:?}");
        }
    }

    #[test]
    fn a_file_that_changes_comes_or_goes_is_noticed() {
        let folder = std::env::temp_dir().join(format!("tiffin-fingerprint-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (file, work) = (folder.join("file"), folder.to_str().unwrap());
        let take = || Fingerprint::of(work, vec![file.clone()]);
        let absent = take();
        assert!(absent.still_holds(work));
        fs::write(&file, "a").unwrap();
        assert!(!absent.still_holds(work), "it has come");
        let written = take();
        assert!(written.still_holds(work));
        fs::rename(&file, folder.join("old")).unwrap();
        fs::write(&file, "a").unwrap();
        assert!(!written.still_holds(work), "it is another of the same text");
        fs::remove_dir_all(&folder).unwrap();
        assert!(!absent.still_holds(work), "the working folder is gone");
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = is_plain(&text);
        }

        #[test]
        fn no_text_with_an_expansion_is_plain(before in "[A-Z]{1,5}=[a-z]{0,5}", sign in "[$`\\\\!]", after in "[a-z(){}]{0,5}") {
            let text = format!("{before}{sign}{after}");
            prop_assert!(!is_plain(text.as_bytes()));
        }
    }
}
