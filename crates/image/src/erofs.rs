//! From a folder to an EROFS file; and from a tree in memory (`erofs/write.rs`), for what strangers send as archives.
//!
//! The same folder gives the same bytes: times are set to 0 and the filesystem's id is fixed. Owners, modes, links and
//! extended attributes are kept. Nothing is compressed and nothing is inlined, because gVisor maps the file as it is.

mod layout;
pub(crate) mod tree;
pub(crate) mod write;

pub(crate) use layout::{XATTR_BYTES, xattr_bytes};

use std::{fs::OpenOptions, io, process::Command, time::Duration};

use camino::Utf8Path;

use crate::tool::{self, ToolError};

/// What any folder may take. One of a few gigabytes takes well under a minute.
const LIMIT: Duration = Duration::from_secs(300);
/// Slower than this a disk doesn't write.
const BYTES_A_SECOND: u64 = 8 << 20;
/// A filesystem's id, fixed so that it doesn't change the digest.
const UUID: &str = "74696666-696e-4000-8000-000000000000";
/// The size must be a multiple of this, or the tail can't be mapped.
const BLOCK: u64 = 4096;

/// No EROFS file could be made.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// `mkfs.erofs` is missing or failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The file could not be read or written.
    #[error("the EROFS file")]
    Io(#[from] io::Error),
}

/// Writes the filesystem under `root`, with files of so many bytes, to `target`, which must exist and is overwritten in
/// place. How long it may take follows the size.
///
/// # Errors
/// When `mkfs.erofs` is missing, fails or takes too long; `target` then holds anything.
pub fn make(root: &Utf8Path, bytes: u64, target: &Utf8Path) -> Result<(), ErofsError> {
    let mut command = Command::new("mkfs.erofs");
    command.args(["--quiet", "-Enoinline_data", "-T0", "-U", UUID, target.as_str(), root.as_str()]);
    tool::run(command, limit(bytes), &mut |_| {})?;
    let file = OpenOptions::new().write(true).open(target)?;
    let size = file.metadata()?.len();
    file.set_len(size.next_multiple_of(BLOCK))?;
    Ok(())
}

fn limit(bytes: u64) -> Duration {
    LIMIT + Duration::from_secs(bytes / BYTES_A_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_folder_has_more_time() {
        assert_eq!(limit(1 << 20), LIMIT);
        assert!(limit(64 << 30) >= LIMIT + Duration::from_secs(2 * 3600));
    }
}
