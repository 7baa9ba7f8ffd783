//! What the default image is made of. Everything that decides its content is here or in `recipe/`, and in the hash.

use sha2::{Digest as _, Sha256};

use crate::config::ImageConfig;

/// Bump when the code that adapts the tree changes what comes out.
const REVISION: &str = "2";

/// The Debian release.
pub(super) const SUITE: &str = "bookworm";
/// The `/etc/profile` of the image; it starts no process.
pub(super) const PROFILE: &str = include_str!("../../recipe/profile");
const PACKAGES: &str = include_str!("../../recipe/packages.txt");
const DENO: &str = include_str!("../../recipe/deno.pin");

/// The environment of every command. UTF-8 by `LC_CTYPE` alone: with `LANG` each bash would read a dozen locale files
/// that say nothing new, which costs it a third of its start in a sandbox.
pub(super) const ENV: [(&str, &str); 4] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("LC_CTYPE", "C.UTF-8"),
    ("DENO_DIR", "/home/user/.cache/deno"),
    ("DENO_NO_UPDATE_CHECK", "1"),
];

/// What is left out of every package: documentation and translations.
pub(super) const EXCLUDED: [&str; 7] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/locale/*",
    "/usr/share/bash-completion/*",
    "/usr/share/gitweb/*",
];

/// A pinned Deno release.
pub(super) struct DenoPin {
    pub(super) version: &'static str,
    /// SHA-512 of the npm archive, hexadecimal.
    pub(super) sha512: &'static str,
}

/// The names of the packages.
pub(super) fn packages() -> impl Iterator<Item = &'static str> {
    lines(PACKAGES)
}

/// The Deno release.
pub(super) fn deno() -> DenoPin {
    let field = |name: &str| {
        lines(DENO)
            .find_map(|line| line.strip_prefix(name).map(str::trim))
            .expect("recipe/deno.pin has a version and a sha512")
    };
    DenoPin { version: field("version "), sha512: field("sha512 ") }
}

/// How commands start in the image.
pub(super) fn config() -> ImageConfig {
    ImageConfig {
        env: ENV.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        working_dir: "/workspace".to_owned(),
        user: "1000:1000".to_owned(),
        ..ImageConfig::default()
    }
}

/// Names the recipe: 64 hexadecimal digits that change when anything in it does.
pub fn recipe_hash() -> String {
    let config = serde_json::to_string(&config()).expect("a record of strings is always JSON");
    let excluded = EXCLUDED.join("\n");
    hash(&[REVISION, SUITE, PACKAGES, DENO, PROFILE, &config, &excluded])
}

/// Hashes the parts so that moving text from one to the next changes the result.
fn hash(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hex::encode(hasher.finalize())
}

fn lines(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_is_complete() {
        let pin = deno();
        assert_eq!(pin.version.split('.').count(), 3, "{}", pin.version);
        assert_eq!(hex::decode(pin.sha512).unwrap().len(), 64);
    }

    #[test]
    fn packages_are_names_and_hold_what_is_promised() {
        let names: Vec<&str> = packages().collect();
        for promised in ["bash", "coreutils", "git", "curl", "ca-certificates", "python3", "nodejs"] {
            assert!(names.contains(&promised), "{promised}");
        }
        assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')), "{names:?}");
    }

    #[test]
    fn the_hash_changes_with_every_part_and_with_where_a_part_ends() {
        let base = hash(&["a", "bc"]);
        assert_eq!(base, hash(&["a", "bc"]));
        assert_ne!(base, hash(&["ab", "c"]));
        assert_ne!(base, hash(&["a", "bd"]));
        assert_ne!(base, hash(&["a", "bc", ""]));
    }

    #[test]
    fn the_profile_starts_no_process() {
        for line in lines(PROFILE) {
            assert!(!line.contains("$(") && !line.contains('`'), "{line}");
        }
    }
}
