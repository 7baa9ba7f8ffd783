//! Where the first start's API key and login go: to stdout, or to files. They are shown this once, so their places are made
//! sure of before they exist.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use tiffin_server::FirstLogin;

use crate::output;

/// Places for a key and for a login.
pub(super) struct KeyPlace {
    key: Place,
    login: Place,
}

/// A place for a secret.
enum Place {
    Stdout,
    File {
        /// Where it will be; what is there now stays if no secret is made.
        path: PathBuf,
        draft: PathBuf,
        file: File,
    },
}

impl KeyPlace {
    /// Makes sure that both can be written: the key to `path`, the login beside it.
    pub(super) fn prepare(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self { key: Place::Stdout, login: Place::Stdout }) };
        Ok(Self { key: Place::prepare(path)?, login: Place::prepare(&beside(path, ".login"))? })
    }

    /// Takes what was made.
    pub(super) fn hand_over(self, key: Option<&str>, login: Option<&FirstLogin>) -> anyhow::Result<()> {
        let login = login.map(|login| format!("email {}\npassword {}", login.email, login.password));
        // Both, though the first fails: neither can be made again.
        let written = self.key.hand_over("The API key of the account admin", key);
        written.and(self.login.hand_over("The login of its administrator", login.as_deref()))
    }
}

impl Place {
    fn prepare(path: &Path) -> anyhow::Result<Self> {
        let draft = beside(path, ".new");
        // A draft that a killed start left is nobody's secret.
        let _ = std::fs::remove_file(&draft);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft);
        let file = file.with_context(|| format!("--write-key: can't write {}", draft.display()))?;
        Ok(Self::File { path: path.to_owned(), draft, file })
    }

    fn hand_over(self, what: &str, secret: Option<&str>) -> anyhow::Result<()> {
        match (self, secret) {
            (Self::Stdout, None) => Ok(()),
            (Self::Stdout, Some(secret)) => show(what, secret),
            (Self::File { draft, .. }, None) => {
                std::fs::remove_file(&draft).with_context(|| format!("removing {}", draft.display()))
            }
            (Self::File { path, draft, mut file }, Some(secret)) => {
                let written = file
                    .write_all(format!("{secret}\n").as_bytes())
                    .and_then(|()| file.sync_all())
                    .and_then(|()| std::fs::rename(&draft, &path));
                match written {
                    Ok(()) => {
                        tracing::info!(file = %path.display(), "{what} is made and in the file");
                        Ok(())
                    }
                    // Better shown than lost.
                    Err(error) => {
                        tracing::error!(%error, file = %path.display(), "{what} can't be written; it is printed");
                        show(what, secret)
                    }
                }
            }
        }
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn show(what: &str, secret: &str) -> anyhow::Result<()> {
    output::print(&format!("{what}, shown this once:\n{secret}\n"))
        .with_context(|| format!("{what} could not be printed"))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn login() -> FirstLogin {
        FirstLogin { email: "a@b".into(), password: "secret".into() }
    }

    #[test]
    fn a_key_and_a_login_are_written_for_their_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        KeyPlace::prepare(Some(&path)).unwrap().hand_over(Some("tfn_x"), Some(&login())).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "tfn_x\n");
        let beside = folder.path().join("key.login");
        assert_eq!(fs::read_to_string(&beside).unwrap(), "email a@b\npassword secret\n");
        for file in [path, beside] {
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_later_start_leaves_the_files_as_they_are_and_one_that_makes_a_login_alone_writes_that() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        fs::write(&path, "tfn_old\n").unwrap();
        KeyPlace::prepare(Some(&path)).unwrap().hand_over(None, None).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "tfn_old\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        KeyPlace::prepare(Some(&path)).unwrap().hand_over(None, Some(&login())).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "tfn_old\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused_before_a_key_is_made() {
        assert!(KeyPlace::prepare(Some(Path::new("/nonexistent/key"))).is_err());
    }
}
