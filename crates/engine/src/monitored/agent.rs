//! The agent's program, as guests find it: in a folder of its own per version, which is laid over each guest's root.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// Copies the agent into the data folder, unless that version is there already, and gives the folder to lay over a root:
/// it holds `.tiffin/tiffin-agent`.
pub(super) fn install(agent: &Path, data_dir: &Path) -> io::Result<PathBuf> {
    let program = fs::read(agent)?;
    let version = hex::encode(&Sha256::digest(&program)[..16]);
    let dir = data_dir.join("agent").join(version);
    let inner = dir.join(".tiffin");
    let at = inner.join("tiffin-agent");
    if fs::read(&at).is_ok_and(|installed| installed == program) {
        return Ok(dir);
    }
    fs::create_dir_all(&inner)?;
    // The root of every guest shows these folders' modes.
    for folder in [&dir, &inner] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    let unfinished = inner.join("tiffin-agent.tmp");
    fs::write(&unfinished, &program)?;
    fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o755))?;
    fs::rename(&unfinished, &at)?;
    Ok(dir)
}

/// Removes every version but that in `own` and those that are `needed`, by the names of their folders.
pub(super) fn remove_others(own: &Path, needed: &BTreeSet<String>) -> io::Result<()> {
    let Some(all) = own.parent() else { return Ok(()) };
    for entry in fs::read_dir(all)? {
        let path = entry?.path();
        let is_needed = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| needed.contains(name));
        if path != own && !is_needed {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
