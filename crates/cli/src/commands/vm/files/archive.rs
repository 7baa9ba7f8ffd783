//! Folders as archives: this machine's own, packed; a VM's, unpacked as what they are, somebody else's.

use std::{
    fs::{self, File},
    io::{self, Seek, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use tar::{Archive, Builder, EntryType};

/// A folder's files and folders as a tar.gz, in a file without a name, to be read from its start.
pub(super) fn pack(folder: &Path) -> Result<File> {
    ensure!(folder.is_dir(), "{} is no folder", folder.display());
    let packed = tempfile::tempfile().context("can't make a temporary file")?;
    let mut archive = Builder::new(GzEncoder::new(packed, Compression::default()));
    archive.follow_symlinks(false);
    pack_into(&mut archive, folder, Path::new(""))?;
    let mut packed = archive.into_inner()?.finish()?;
    packed.flush()?;
    packed.rewind()?;
    Ok(packed)
}

fn pack_into(archive: &mut Builder<impl Write>, folder: &Path, name: &Path) -> Result<()> {
    let at = folder.join(name);
    let mut names: Vec<_> = fs::read_dir(&at)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>())
        .with_context(|| format!("can't read {}", at.display()))?;
    names.sort();
    for entry in names {
        let name = name.join(entry);
        let path = folder.join(&name);
        let kind = fs::symlink_metadata(&path).with_context(|| format!("can't read {}", path.display()))?.file_type();
        if kind.is_dir() {
            archive.append_dir(&name, &path)?;
            pack_into(archive, folder, &name)?;
        } else if kind.is_file() {
            archive.append_path_with_name(&path, &name).with_context(|| format!("can't read {}", path.display()))?;
        } else {
            bail!("{} is no file and no folder (a link?): VMs take none; copy what it stands for", path.display());
        }
    }
    Ok(())
}

/// Unpacks a tar.gz of unknown origin as the folder `to`, which must not be there: first beside it in `beside`, then under its name.
pub(super) fn unpack(mut packed: File, to: &Path, beside: &Path) -> Result<()> {
    packed.rewind()?;
    let fresh = tempfile::Builder::new()
        .prefix(".tiffin-")
        .tempdir_in(beside)
        .with_context(|| format!("can't write to {}", beside.display()))?;
    let mut archive = Archive::new(GzDecoder::new(io::BufReader::new(packed)));
    for entry in archive.entries()? {
        let mut entry = entry.context("the archive from the VM can't be read")?;
        let name = entry.path().context("a name in the archive from the VM can't be read")?.into_owned();
        let at = fresh.path().join(plain(&name)?);
        let mode = entry.header().mode().unwrap_or(0o644);
        match entry.header().entry_type() {
            EntryType::Directory => fs::create_dir_all(&at)?,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                fs::create_dir_all(at.parent().context("a file without a name")?)?;
                // New, so nothing that is there is written through; executable or not is all that is taken of the mode.
                let mode = if mode & 0o111 == 0 { 0o666 } else { 0o777 };
                let mut file = File::options().write(true).create_new(true).mode(mode).open(&at)?;
                io::copy(&mut entry, &mut file).with_context(|| format!("can't write {}", name.display()))?;
            }
            _ => bail!("{} in the VM is no file and no folder (a link?): nothing was copied", name.display()),
        }
    }
    let folder = fresh.keep();
    let placed = fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).and_then(|()| fs::rename(&folder, to));
    placed.with_context(|| {
        // What can't be placed isn't left either.
        let _ = fs::remove_dir_all(&folder);
        format!("can't write {}", to.display())
    })
}

/// The name, if it is one below a folder: no `..`, not absolute.
fn plain(name: &Path) -> Result<PathBuf> {
    let mut plain = PathBuf::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                bail!("the archive from the VM names {}, which leads out of it: nothing was copied", name.display());
            }
        }
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hostile(kind: EntryType, name: &str, link: &str) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut tar = Builder::new(GzEncoder::new(file, Compression::fast()));
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(if kind.is_file() { 1 } else { 0 });
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        tar.append(&header, if kind.is_file() { &b"x"[..] } else { &[] }).unwrap();
        tar.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn a_folder_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir_all(from.join("sub/empty")).unwrap();
        fs::write(from.join("sub/run"), "#!").unwrap();
        fs::set_permissions(from.join("sub/run"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(from.join("plain"), "text").unwrap();
        let to = dir.path().join("to");
        unpack(pack(&from).unwrap(), &to, dir.path()).unwrap();
        assert!(to.join("sub/empty").is_dir());
        assert_eq!(fs::read_to_string(to.join("plain")).unwrap(), "text");
        let mode = |name: &str| fs::metadata(to.join(name)).unwrap().permissions().mode() & 0o100;
        assert_eq!((mode("sub/run"), mode("plain")), (0o100, 0));
    }

    #[test]
    fn what_leads_out_or_is_no_file_is_refused_and_leaves_nothing() {
        for (kind, name, link) in [
            (EntryType::Regular, "../out", ""),
            (EntryType::Regular, "a/../../out", ""),
            (EntryType::Regular, "/out", ""),
            (EntryType::Symlink, "a", "/etc/passwd"),
            (EntryType::Link, "a", "/etc/passwd"),
            (EntryType::Fifo, "a", ""),
            (EntryType::Char, "a", ""),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let beside = dir.path().join("in");
            fs::create_dir(&beside).unwrap();
            assert!(unpack(hostile(kind, name, link), &beside.join("to"), &beside).is_err(), "{name}");
            assert_eq!(fs::read_dir(&beside).unwrap().count(), 0, "{name}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{name}");
        }
    }

    #[test]
    fn a_link_of_ones_own_is_told_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(pack(dir.path()).unwrap_err().to_string().contains("link"));
    }
}
