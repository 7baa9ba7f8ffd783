//! Where a path leads: only ever below `/workspace`, links resolved.
//!
//! The checks tell the host's client of a mistake; they are no fence against the guest's user, who may move folders
//! about between check and use. That is the user's right: nothing here is done by anybody else.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tiffin_protocol::{Failure, FailureCode};

use super::{refusal, shown};
use crate::request::failure;

/// The only folder that files are moved in and out of.
pub const ROOT: &str = "/workspace";

/// The longest path, in bytes. With the name of a file in it, it still fits into what the kernel takes.
const MAX_PATH: usize = 3500;

/// Where something is or is to be.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// The part that is there, without links.
    pub existing: PathBuf,
    /// The names below it that aren't.
    pub missing: Vec<OsString>,
}

impl Place {
    /// The whole path.
    pub fn path(&self) -> PathBuf {
        // Not by joining an empty path: that would put a slash behind a file.
        self.missing.iter().fold(self.existing.clone(), |path, name| path.join(name))
    }

    /// Makes the folders above the last missing name; those that were made, the outermost first.
    ///
    /// # Errors
    /// A [`Failure`]; nothing is left behind.
    pub fn make_parents(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut made = Vec::new();
        let mut at = self.existing.clone();
        for name in self.missing.iter().rev().skip(1).rev() {
            at.push(name);
            if let Err(error) = fs::create_dir(&at) {
                unmake(&made);
                return Err(refusal(&error, &at));
            }
            made.push(at.clone());
        }
        Ok(made)
    }
}

/// Removes the folders of [`Place::make_parents`] again, as far as nobody has put something into them.
pub fn unmake(made: &[PathBuf]) {
    for folder in made.iter().rev() {
        let _ = fs::remove_dir(folder);
    }
}

/// The real path of `path`, which must be there.
///
/// # Errors
/// `NotFound`, `Forbidden`.
pub fn existing(path: &str) -> Result<PathBuf, Failure> {
    let path = normal(path)?;
    match fs::canonicalize(&path) {
        Ok(real) => inside(real, &path),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(failure(FailureCode::NotFound, &format!("{}: there is no such file or folder", shown(&path))))
        }
        Err(error) => Err(refusal(&error, &path)),
    }
}

/// Where `path` is or is to be.
///
/// # Errors
/// `Forbidden`.
pub fn to_be(path: &str) -> Result<Place, Failure> {
    let path = normal(path)?;
    let (mut at, mut missing) = (path.clone(), Vec::new());
    while let Err(error) = fs::symlink_metadata(&at) {
        let (io::ErrorKind::NotFound, Some(name)) = (error.kind(), at.file_name()) else {
            return Err(refusal(&error, &path));
        };
        missing.push(name.to_owned());
        at.pop();
    }
    missing.reverse();
    match fs::canonicalize(&at) {
        Ok(real) => Ok(Place { existing: inside(real, &path)?, missing }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(failure(FailureCode::Forbidden, &format!("{} is a link that leads nowhere", shown(&at))))
        }
        Err(error) => Err(refusal(&error, &at)),
    }
}

/// `path` when it says by itself that it is below [`ROOT`]. A slash at its end is left out.
fn normal(path: &str) -> Result<PathBuf, Failure> {
    let refused = |why: &str| Err(failure(FailureCode::Forbidden, &format!("{}: {why}", shown(path.as_ref()))));
    let Some(relative) = path.strip_prefix('/') else {
        return refused("the path must be absolute, such as /workspace/project");
    };
    let relative = relative.strip_suffix('/').unwrap_or(relative);
    if relative.split('/').any(|name| matches!(name, "" | "." | "..")) || relative.contains('\0') {
        return refused("the path must be without empty names, . and ..");
    }
    if path.len() > MAX_PATH {
        return refused("the path is too long");
    }
    let normal = Path::new("/").join(relative);
    if !normal.starts_with(ROOT) {
        return refused("the path must be /workspace or below it");
    }
    Ok(normal)
}

fn inside(real: PathBuf, asked: &Path) -> Result<PathBuf, Failure> {
    if real.starts_with(ROOT) {
        return Ok(real);
    }
    Err(failure(FailureCode::Forbidden, &format!("{} is a link that leads outside {ROOT}", shown(asked))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_normal_absolute_paths_below_the_workspace_are_taken() {
        for (path, normal_path) in
            [("/workspace", "/workspace"), ("/workspace/", "/workspace"), ("/workspace/a b/.c/", "/workspace/a b/.c")]
        {
            assert_eq!(normal(path), Ok(PathBuf::from(normal_path)), "{path}");
        }
        let endless = format!("/workspace/{}", "a/".repeat(MAX_PATH));
        for path in [
            "",
            "/",
            "//",
            "workspace",
            "./workspace",
            "/etc",
            "/workspaces",
            "/workspace/..",
            "/workspace/../etc",
            "/workspace/./a",
            "/workspace//a",
            "//workspace",
            "/workspace/a//",
            "/workspace/a\0b",
            &endless,
        ] {
            assert_eq!(normal(path).unwrap_err().code, FailureCode::Forbidden, "{path:?}");
        }
    }

    proptest! {
        #[test]
        fn any_path_stays_below_the_workspace_or_is_refused(path in "(/?workspace)?(/|\\.|a|\\x00|é){0,12}") {
            if let Ok(taken) = normal(&path) {
                prop_assert!(taken.starts_with(ROOT));
                prop_assert!(!taken.to_str().unwrap().contains("/.."), "{taken:?}");
            }
        }
    }
}
