//! A command's environment: the agent's base, overridden by the image's, and that by the request's. Nothing of the agent's own
//! gets in.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use tiffin_protocol::{Failure, FailureCode};

use super::program::c_string;
use crate::request::failure;

/// The base `PATH`.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where users without an account live.
const HOMELESS: &str = "/workspace";

/// Where the guest's accounts are.
pub const PASSWD: &str = "/etc/passwd";

/// Bytes of it that are looked at.
const MAX_PASSWD: u64 = 1 << 20;

/// What the guest knows of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The user's name.
    pub name: String,
    /// The home folder.
    pub home: String,
}

impl Account {
    /// The account of `uid`, or a made-up one where the guest has none. The guest owns the file: it may be anything.
    pub fn of(uid: u32) -> Self {
        let mut passwd = Vec::new();
        // Not to be stuck when it is a FIFO.
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(PASSWD);
        if let Ok(file) = file {
            // What was read before an error is as good as a shorter file.
            let _ = file.take(MAX_PASSWD).read_to_end(&mut passwd);
        }
        Self::find(&passwd, uid)
    }

    fn find(passwd: &[u8], uid: u32) -> Self {
        passwd
            .split(|byte| *byte == b'\n')
            .filter_map(|line| std::str::from_utf8(line).ok())
            .find_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                let [name, _, id, _, _, home, ..] = fields[..] else { return None };
                (id.parse() == Ok(uid) && !line.contains('\0')).then(|| Account {
                    name: name.to_owned(),
                    home: if home.is_empty() { HOMELESS } else { home }.to_owned(),
                })
            })
            .unwrap_or_else(|| Account { name: uid.to_string(), home: HOMELESS.to_owned() })
    }
}

/// The base for `account` in a guest whose best shell is `shell`, with a terminal or without, overridden by `image` and that by
/// `own`, as `NAME=value`.
///
/// # Errors
/// `BadRequest` for a name that is empty or has `=`, and for a NUL.
pub fn merged(
    account: &Account,
    shell: &str,
    terminal: bool,
    image: &BTreeMap<String, String>,
    own: &BTreeMap<String, String>,
) -> Result<Vec<CString>, Failure> {
    let mut merged = BTreeMap::from([
        ("PATH", PATH),
        ("HOME", &account.home),
        ("USER", &account.name),
        ("LOGNAME", &account.name),
        ("TERM", if terminal { super::terminal::TERM } else { "dumb" }),
        ("SHELL", shell),
    ]);
    // UTF-8 by the one category that knows of it: LANG would have each program load a dozen files that say nothing new.
    if !own.contains_key("LANG") && !image.contains_key("LANG") {
        merged.insert("LC_CTYPE", "C.UTF-8");
    }
    for (name, value) in image.iter().chain(own) {
        if name.is_empty() || name.contains('=') {
            return Err(failure(FailureCode::BadRequest, "an environment variable's name is empty or has a ="));
        }
        merged.insert(name, value);
    }
    merged.iter().map(|(name, value)| c_string(&format!("{name}={value}"), "env")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ACCOUNTS: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\nbroken\n\xff\xfe\nu:x:1000:1000::/home/u:/bin/bash\nn:x:7:7:::\n";

    #[test]
    fn an_account_is_found_among_broken_lines() {
        assert_eq!(Account::find(ACCOUNTS, 1000), Account { name: "u".to_owned(), home: "/home/u".to_owned() });
    }

    #[test]
    fn a_user_without_account_or_home_lives_in_the_workspace() {
        assert_eq!(Account::find(ACCOUNTS, 5), Account { name: "5".to_owned(), home: HOMELESS.to_owned() });
        assert_eq!(Account::find(ACCOUNTS, 7).home, HOMELESS);
    }

    #[test]
    fn own_variables_override_the_images_which_override_the_base() {
        let own = BTreeMap::from([("HOME".to_owned(), "/x".to_owned()), ("A".to_owned(), String::new())]);
        let image = BTreeMap::from([("HOME".to_owned(), "/i".to_owned()), ("B".to_owned(), "image".to_owned())]);
        let merged = merged(&Account::find(ACCOUNTS, 0), "/bin/sh", false, &image, &own).unwrap();
        assert!(merged.contains(&c"B=image".to_owned()));
        assert!(merged.contains(&c"HOME=/x".to_owned()) && merged.contains(&c"A=".to_owned()));
        assert!(merged.contains(&c"USER=root".to_owned()));
        assert!(merged.contains(&c"LC_CTYPE=C.UTF-8".to_owned()));
        assert_eq!(merged.iter().filter(|entry| entry.as_bytes().starts_with(b"HOME=")).count(), 1);
    }

    #[test]
    fn a_terminal_has_a_type_unless_the_request_names_another() {
        let account = Account::find(ACCOUNTS, 0);
        let terminal =
            |own: &BTreeMap<String, String>| merged(&account, "/bin/sh", true, &BTreeMap::new(), own).unwrap();
        assert!(terminal(&BTreeMap::new()).contains(&c"TERM=xterm-256color".to_owned()));
        let own = BTreeMap::from([("TERM".to_owned(), "vt100".to_owned())]);
        assert!(terminal(&own).contains(&c"TERM=vt100".to_owned()));
    }

    #[test]
    fn a_language_of_ones_own_is_not_overridden() {
        let own = BTreeMap::from([("LANG".to_owned(), "de_DE.UTF-8".to_owned())]);
        let image = BTreeMap::new();
        for (image, own) in [(&image, &own), (&own, &image)] {
            let merged = merged(&Account::find(ACCOUNTS, 0), "/bin/sh", false, image, own).unwrap();
            assert!(!merged.iter().any(|entry| entry.as_bytes().starts_with(b"LC_CTYPE=")));
        }
    }

    #[test]
    fn broken_names_and_values_are_refused() {
        for (name, value) in [("", "x"), ("A=B", "x"), ("A", "\0"), ("\0", "")] {
            let own = BTreeMap::from([(name.to_owned(), value.to_owned())]);
            let refused = merged(&Account::find(ACCOUNTS, 0), "/bin/sh", false, &BTreeMap::new(), &own).unwrap_err();
            assert_eq!(refused.code, FailureCode::BadRequest, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn any_passwd_gives_an_account_that_fits_an_environment(passwd in proptest::collection::vec(any::<u8>(), 0..400), uid in 0u32..3) {
            prop_assert!(merged(&Account::find(&passwd, uid), "/bin/sh", false, &BTreeMap::new(), &BTreeMap::new()).is_ok());
        }
    }
}
