//! The names that an archive may give its entries.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::staging;

/// The longest name of a file or folder, in bytes: the kernel's own limit.
const MAX_NAME: usize = 255;

/// The longest path in an archive, in bytes.
pub const MAX_PATH: usize = 2000;

/// The path that an entry's name means, relative to where the archive is unpacked; empty for that folder itself.
///
/// # Errors
/// The rule that it breaks.
pub fn relative(name: &[u8]) -> Result<PathBuf, &'static str> {
    if name.is_empty() {
        return Err("a name may not be empty");
    }
    if name[0] == b'/' {
        return Err("a name may not be absolute");
    }
    if name.len() > MAX_PATH {
        return Err("a name with its folders may not be longer than 2000 bytes");
    }
    let mut path = PathBuf::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("a name may not have .. in it"),
            part if part.contains(&0) => return Err("a name may not have a NUL in it"),
            part if part.len() > MAX_NAME => return Err("a name may not be longer than 255 bytes"),
            part if staging::is_part(part) => return Err("names that begin with .tiffin-part- are reserved"),
            part => path.push(OsStr::from_bytes(part)),
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Component;

    #[test]
    fn dots_and_doubled_slashes_mean_nothing() {
        for (name, path) in [("./", ""), (".", ""), ("./a//b/./c", "a/b/c"), ("a/", "a"), (" ", " "), ("...", "...")] {
            assert_eq!(relative(name.as_bytes()), Ok(PathBuf::from(path)), "{name:?}");
        }
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused() {
        let long = "a".repeat(256);
        let deep = "a/".repeat(1001);
        for name in
            ["", "/", "/a", "..", "../a", "a/..", "a/../b", "a\0b", ".tiffin-part-1", "a/.tiffin-part-", &long, &deep]
        {
            assert!(relative(name.as_bytes()).is_err(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_stays_inside(name in proptest::collection::vec(prop_oneof![Just(b'/'), Just(b'.'), Just(0), any::<u8>()], 0..40)) {
            if let Ok(path) = relative(&name) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{path:?}");
            }
        }
    }
}
