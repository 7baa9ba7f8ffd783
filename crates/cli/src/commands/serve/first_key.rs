//! Where the first start's API key goes: to stdout, or to a file. It is shown this once, so its place is made sure of
//! before the key exists.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::output;

/// A place for a key.
pub(super) enum KeyPlace {
    Stdout,
    File {
        /// Where it will be; what is there now stays if no key is made.
        path: PathBuf,
        draft: PathBuf,
        file: File,
    },
}

impl KeyPlace {
    /// Makes sure that a key can be written.
    pub(super) fn prepare(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self::Stdout) };
        let mut draft = path.as_os_str().to_owned();
        draft.push(".new");
        let draft = PathBuf::from(draft);
        // A draft that a killed start left is nobody's key.
        let _ = std::fs::remove_file(&draft);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft);
        let file = file.with_context(|| format!("--write-key: can't write {}", draft.display()))?;
        Ok(Self::File { path: path.to_owned(), draft, file })
    }

    /// Takes the key, if one was made.
    pub(super) fn hand_over(self, key: Option<&str>) -> anyhow::Result<()> {
        match (self, key) {
            (Self::Stdout, None) => Ok(()),
            (Self::Stdout, Some(key)) => show(key),
            (Self::File { draft, .. }, None) => {
                std::fs::remove_file(&draft).with_context(|| format!("removing {}", draft.display()))
            }
            (Self::File { path, draft, mut file }, Some(key)) => {
                let written = file
                    .write_all(format!("{key}\n").as_bytes())
                    .and_then(|()| file.sync_all())
                    .and_then(|()| std::fs::rename(&draft, &path));
                match written {
                    Ok(()) => {
                        tracing::info!(file = %path.display(), "the account admin is made; its API key is in the file");
                        Ok(())
                    }
                    // Better shown than lost.
                    Err(error) => {
                        tracing::error!(%error, file = %path.display(), "the API key can't be written; it is printed");
                        show(key)
                    }
                }
            }
        }
    }
}

fn show(key: &str) -> anyhow::Result<()> {
    let text = format!("The API key of the account admin, shown this once:\n{key}\n");
    output::print(&text).context("the API key could not be printed")
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_key_is_written_for_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        KeyPlace::prepare(Some(&path)).unwrap().hand_over(Some("tfn_x")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "tfn_x\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_later_start_leaves_the_file_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        fs::write(&path, "tfn_old\n").unwrap();
        KeyPlace::prepare(Some(&path)).unwrap().hand_over(None).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "tfn_old\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused_before_a_key_is_made() {
        assert!(KeyPlace::prepare(Some(Path::new("/nonexistent/key"))).is_err());
    }
}
