//! From a Debian tree to a sandbox's: the user, the workspace, a profile that starts no process, nothing of the machine
//! that it was built on.

use std::{
    collections::HashSet,
    fs::{self, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    process::Command,
    time::Duration,
};

use camino::Utf8Path;

use super::{BuildError, recipe};
use crate::tool;

const COMPILE_LIMIT: Duration = Duration::from_secs(180);
const USER: u32 = 1000;

/// Adapts the tree in place.
pub(super) fn adapt(root: &Utf8Path) -> Result<(), BuildError> {
    let made = user(root).and_then(|()| system_files(root)).and_then(|()| clear(root));
    made.map_err(BuildError::io(root))?;
    compile_python(root)
}

/// Bytes of the files under `root`; a file with several names counts once.
pub(super) fn bytes(root: &Utf8Path) -> io::Result<u64> {
    let (mut total, mut seen, mut folders) = (0, HashSet::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir_utf8()? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                folders.push(entry.into_path());
            } else if metadata.is_file() && (metadata.nlink() == 1 || seen.insert(metadata.ino())) {
                total += metadata.len();
            }
        }
    }
    Ok(total)
}

/// `user` (1000:1000) with a home and the workspace. Nobody has a password.
fn user(root: &Utf8Path) -> io::Result<()> {
    append(&root.join("etc/passwd"), &format!("user:x:{USER}:{USER}:user:/home/user:/bin/bash\n"))?;
    append(&root.join("etc/group"), &format!("user:x:{USER}:\n"))?;
    append(&root.join("etc/shadow"), "user:*:19000:0:99999:7:::\n")?;
    append(&root.join("etc/gshadow"), "user:*::\n")?;
    for folder in ["home/user", "home/user/.cache", "home/user/.cache/deno", "workspace"] {
        let path = root.join(folder);
        fs::create_dir(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        chown(&path, Some(USER), Some(USER))?;
    }
    Ok(())
}

fn system_files(root: &Utf8Path) -> io::Result<()> {
    let env: String = recipe::ENV
        .iter()
        // The profile itself keeps a PATH that the caller chose.
        .filter(|(name, _)| *name != "PATH")
        .map(|(name, value)| format!(": \"${{{name}={value}}}\"\nexport {name}\n"))
        .collect();
    for (path, text) in [
        ("etc/profile", recipe::PROFILE),
        ("etc/profile.d/00-env.sh", &env),
        ("etc/hostname", "localhost\n"),
        ("etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"),
        ("etc/resolv.conf", ""),
        ("etc/machine-id", ""),
        ("etc/default/locale", "LC_CTYPE=C.UTF-8\n"),
    ] {
        replace(&root.join(path), text)?;
    }
    // The mirror that the image was built from may be private, and commands have no rights to install packages anyway.
    remove(&root.join("etc/apt/sources.list"))?;
    empty(&root.join("etc/apt/sources.list.d"))
}

/// Leaves out what only the build needed, and what would differ from one build to the next.
fn clear(root: &Utf8Path) -> io::Result<()> {
    for folder in ["var/lib/apt/lists", "var/cache/apt", "var/cache/debconf", "var/log", "tmp", "run", "dev"] {
        empty(&root.join(folder))?;
    }
    for file in ["etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "var/cache/ldconfig/aux-cache"]
    {
        remove(&root.join(file))?;
    }
    for backup in ["passwd-", "group-", "shadow-", "gshadow-"] {
        remove(&root.join("etc").join(backup))?;
    }
    Ok(())
}

/// Python checks a compiled module against its source's time, which the image sets to 0, and would compile all anew at
/// each start. Modules compiled for good are not checked.
fn compile_python(root: &Utf8Path) -> Result<(), BuildError> {
    let mut command = Command::new("chroot");
    command.args([root.as_str(), "/usr/bin/python3", "-m", "compileall", "-q", "-f"]);
    command.args(["--invalidation-mode", "unchecked-hash", "/usr/lib/python3", "/usr/lib/python3.11"]);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LANG", "C.UTF-8");
    tool::run(command, COMPILE_LIMIT, &mut |_| {})?;
    Ok(())
}

fn append(path: &Utf8Path, text: &str) -> io::Result<()> {
    OpenOptions::new().append(true).open(path)?.write_all(text.as_bytes())
}

/// Writes a file anew, never through a link that stands in its place.
fn replace(path: &Utf8Path, text: &str) -> io::Result<()> {
    remove(path)?;
    fs::write(path, text)?;
    fs::set_permissions(path, Permissions::from_mode(0o644))
}

fn remove(path: &Utf8Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn empty(folder: &Utf8Path) -> io::Result<()> {
    for entry in folder.read_dir_utf8()? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
