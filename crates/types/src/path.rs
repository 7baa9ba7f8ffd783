//! Paths of files in guests, as clients name them: below `/workspace`, in one spelling.
//!
//! The guest's agent looks at where links really lead; this is about names alone.

use std::{fmt, str::FromStr};

use crate::limits::PATH_BYTES;

/// The folder that clients' files live in.
pub const WORKSPACE: &str = "/workspace";

/// The path of `/workspace` or of something below it: absolute, no `.` and no `..`, single slashes, none at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestPath(String);

/// What a [`GuestPath`] is, for error texts.
pub const EXPECTED: &str = "must be an absolute path at or below /workspace, of at most 4096 bytes, without .. and NUL";

/// The text is no [`GuestPath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{EXPECTED}")]
pub struct BadPath;

impl GuestPath {
    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is `/workspace` itself, which can be no file.
    pub fn is_workspace(&self) -> bool {
        self.0 == WORKSPACE
    }

    /// The last name in it.
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// What stands behind the last dot of its name; a name that begins with its only dot has none.
    pub fn extension(&self) -> Option<&str> {
        self.name().rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).map(|(_, end)| end)
    }
}

impl FromStr for GuestPath {
    type Err = BadPath;

    fn from_str(text: &str) -> Result<Self, BadPath> {
        if text.len() > PATH_BYTES || !text.starts_with('/') || text.contains('\0') {
            return Err(BadPath);
        }
        let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        if parts.first() != Some(&&WORKSPACE[1..]) || parts.contains(&"..") {
            return Err(BadPath);
        }
        Ok(Self(format!("/{}", parts.join("/"))))
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spellings_of_one_path_become_one() {
        for (text, path) in [
            ("/workspace", "/workspace"),
            ("/workspace/", "/workspace"),
            ("//workspace//a/./b/", "/workspace/a/b"),
            ("/./workspace/a b/…", "/workspace/a b/…"),
            ("/workspace/...", "/workspace/..."),
        ] {
            assert_eq!(text.parse::<GuestPath>().map(|path| path.to_string()).as_deref(), Ok(path));
        }
    }

    #[test]
    fn what_leads_or_may_lead_outside_is_refused() {
        let long = format!("/workspace/{}", "a".repeat(4096));
        for text in [
            "",
            "/",
            "a",
            "workspace",
            "./workspace",
            "/work",
            "/workspaces",
            "/workspace2/a",
            "/etc/passwd",
            "/workspace/..",
            "/workspace/../etc",
            "/workspace/a/../b",
            "/workspace/a\0",
            "/../workspace",
            &long,
        ] {
            assert_eq!(text.parse::<GuestPath>(), Err(BadPath), "{text:?}");
        }
    }

    #[test]
    fn an_extension_is_behind_the_last_dot() {
        let extension = |text: &str| text.parse::<GuestPath>().unwrap().extension().map(str::to_owned);
        assert_eq!(extension("/workspace/a.b/c.d.ts").as_deref(), Some("ts"));
        assert_eq!(extension("/workspace/a.b/c"), None);
        assert_eq!(extension("/workspace/.ts"), None);
    }

    proptest! {
        #[test]
        fn whatever_is_taken_is_below_the_workspace_and_reads_back(text in "[/.a]{0,12}") {
            let text = format!("/workspace{text}");
            if let Ok(path) = text.parse::<GuestPath>() {
                prop_assert!(path.is_workspace() || path.as_str().starts_with("/workspace/"));
                prop_assert!(!path.as_str().split('/').any(|part| part == ".." || part == "."));
                prop_assert_eq!(path.as_str().parse::<GuestPath>(), Ok(path.clone()));
            }
        }
    }
}
