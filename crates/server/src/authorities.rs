//! Certificates of authorities that the configuration adds to the system's, read once at start.

use std::fs;

use camino::Utf8Path;
use tiffin_outbound::{BadCertificates, Roots};

/// The certificates of additional authorities can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BadAuthorities {
    /// The file can't be read.
    #[error("can't read {path}, which the setting {key} names: {error}")]
    Unreadable {
        /// The setting.
        key: &'static str,
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// What is in it isn't certificates.
    #[error("the setting {key}: {error}")]
    Bad {
        /// The setting.
        key: &'static str,
        /// Which.
        error: BadCertificates,
    },
}

/// The system's authorities, and those in the file that the setting `key` names.
pub(crate) fn roots(key: &'static str, file: Option<&Utf8Path>) -> Result<Roots, BadAuthorities> {
    let Some(path) = file else { return Ok(Roots::default()) };
    let unreadable = |error| BadAuthorities::Unreadable { key, path: path.to_string(), error };
    let pem = fs::read(path).map_err(unreadable)?;
    Roots::with_extra(&pem).map_err(|error| BadAuthorities::Bad { key, error })
}
