//! Deno, from its npm package, by the machine's own npm configuration; used only when it is what is pinned.

use std::{fs, os::unix::fs::PermissionsExt, process::Command, time::Duration};

use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha512};

use super::{BuildError, recipe};
use crate::tool;

/// On a slow line, forty megabytes.
const LIMIT: Duration = Duration::from_secs(600);
const UNPACK_LIMIT: Duration = Duration::from_secs(60);

/// Fetches and checks the archive; returns the unpacked binary.
pub(super) fn fetch(work: &Utf8Path) -> Result<Utf8PathBuf, BuildError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(BuildError::Architecture(std::env::consts::ARCH));
    }
    let folder = work.join("deno");
    fs::create_dir_all(&folder).map_err(BuildError::io(&folder))?;
    let pin = recipe::deno();
    let package = format!("@deno/linux-x64-glibc@{}", pin.version);
    let mut command = Command::new("npm");
    command.args(["pack", "--silent", &package]).current_dir(&folder);
    tool::run(command, LIMIT, &mut |_| {})?;

    let archive = folder.join(format!("deno-linux-x64-glibc-{}.tgz", pin.version));
    let found = hex::encode(Sha512::digest(fs::read(&archive).map_err(BuildError::io(&archive))?));
    if found != pin.sha512 {
        return Err(BuildError::Pin { what: package, expected: pin.sha512.to_owned(), found });
    }
    let mut command = Command::new("tar");
    command.args(["-xzf", archive.as_str(), "-C", folder.as_str(), "--no-same-owner", "package/deno"]);
    tool::run(command, UNPACK_LIMIT, &mut |_| {})?;
    Ok(folder.join("package/deno"))
}

/// Puts the binary where every user finds it.
pub(super) fn install(binary: &Utf8Path, root: &Utf8Path) -> Result<(), BuildError> {
    let target = root.join("usr/local/bin/deno");
    fs::rename(binary, &target).map_err(BuildError::io(&target))?;
    fs::set_permissions(&target, fs::Permissions::from_mode(0o755)).map_err(BuildError::io(&target))
}
