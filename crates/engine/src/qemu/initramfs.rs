//! The guest's first files: the agent as `/init`, and the kernel's modules that lead to its root.
//!
//! One archive in the kernel's own form (cpio "newc", Documentation/driver-api/early-userspace/buffer-format.rst of
//! Linux), not compressed: an emulated processor takes longer to unpack it than the host's cache to hand it over.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// What a machine's devices and root need, beside what those need themselves, in two lists that are loaded beside each other:
/// what leads to its filesystems, and the rest. What a kernel has built in is left out.
const MODULES: [(&str, &[&str]); 2] = [
    ("order", &["virtio_mmio", "virtio_blk", "erofs"]),
    ("beside", &["overlay", "virtio_net", "virtio_console", "virtio_rng"]),
];

/// Folders deeper than this below a kernel's modules are no kernel's.
const DEPTH: usize = 12;

/// Writes the archive of `agent` and of the modules found below `modules`.
///
/// # Errors
/// What can't be read or written, by name.
pub fn write(agent: &Path, modules: &Path, to: &mut impl Write) -> io::Result<()> {
    let mut archive = Archive { to, inode: 0 };
    for folder in ["dev", "proc", "sys", "image", "disk", "root", "modules", "agent", "agent/.tiffin"] {
        archive.add(folder, 0o040_755, &[])?;
    }
    archive.add("agent/.tiffin/tiffin-agent", 0o100_755, &named(agent, fs::read(agent))?)?;
    archive.add("init", 0o120_777, b"/agent/.tiffin/tiffin-agent")?;
    add_modules(modules, &mut archive)?;
    archive.add("TRAILER!!!", 0, &[])
}

/// Writes an archive of one program, the `/init`: the least that a kernel boots with.
///
/// # Errors
/// What can't be written.
pub fn write_least(init: &[u8], to: &mut impl Write) -> io::Result<()> {
    let mut archive = Archive { to, inode: 0 };
    archive.add("init", 0o100_755, init)?;
    archive.add("TRAILER!!!", 0, &[])
}

/// Below the release of the kernel that they are of: the guest may boot another, which they don't fit.
fn add_modules(folder: &Path, archive: &mut Archive<impl Write>) -> io::Result<()> {
    let (mut of, mut written, mut lists) = (None, Vec::new(), Vec::new());
    for (list, names) in MODULES {
        let mut order = String::new();
        for (name, path) in in_order(folder, names)? {
            order += &format!("{name}.ko\n");
            // What both lists need is in both, and once here.
            if written.contains(&name) {
                continue;
            }
            let content = named(&path, fs::read(&path))?;
            let said =
                release(&content).ok_or_else(|| io::Error::other(format!("the module {name} names no kernel")))?;
            if let Some(release) = of.as_ref().filter(|release| **release != said) {
                let message = format!("the module {name} is of the kernel {said}, others are of {release}");
                return Err(io::Error::other(message));
            }
            if of.is_none() {
                archive.add(&format!("modules/{said}"), 0o040_755, &[])?;
            }
            archive.add(&format!("modules/{said}/{name}.ko"), 0o100_644, &content)?;
            of = Some(said);
            written.push(name);
        }
        lists.push((list, order));
    }
    // Without any, all is built in.
    let Some(release) = of else { return Ok(()) };
    lists
        .iter()
        .try_for_each(|(list, order)| archive.add(&format!("modules/{release}/{list}"), 0o100_644, order.as_bytes()))
}

fn named<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// The modules of those names, each after those that it needs.
fn in_order(folder: &Path, names: &[&str]) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = BTreeMap::new();
    find(folder, DEPTH, &mut found)?;
    let mut order = Vec::new();
    for name in names {
        add(name, &found, &mut order, DEPTH)?;
    }
    Ok(order)
}

fn add(
    name: &str,
    found: &BTreeMap<String, PathBuf>,
    order: &mut Vec<(String, PathBuf)>,
    depth: usize,
) -> io::Result<()> {
    let Some(path) = found.get(name) else { return Ok(()) };
    if order.iter().any(|(added, _)| added == name) {
        return Ok(());
    }
    if depth == 0 {
        return Err(io::Error::other(format!("the module {name} needs itself")));
    }
    for needed in needs(&named(path, fs::read(path))?) {
        add(&needed, found, order, depth - 1)?;
    }
    order.push((name.to_owned(), path.clone()));
    Ok(())
}

/// The modules below a folder, by their names as the kernel has them.
fn find(folder: &Path, depth: usize, found: &mut BTreeMap<String, PathBuf>) -> io::Result<()> {
    for entry in named(folder, fs::read_dir(folder))? {
        let path = entry?.path();
        if path.is_dir() && depth > 0 {
            find(&path, depth - 1, found)?;
        } else if path.extension().is_some_and(|end| end == "ko")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            found.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

/// What a module says that it needs: `depends=a,b`.
fn needs(module: &[u8]) -> Vec<String> {
    let names = said(module, b"\0depends=").unwrap_or_default();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// The release of the kernel that a module is of, as `uname -r` has it: `vermagic=RELEASE OPTIONS`.
fn release(module: &[u8]) -> Option<String> {
    said(module, b"\0vermagic=")?.split(' ').next().filter(|release| !release.is_empty()).map(str::to_owned)
}

/// What a module says of that among the strings of its section `.modinfo`.
fn said(module: &[u8], key: &[u8]) -> Option<String> {
    let at = module.windows(key.len()).position(|window| window == key)?;
    let rest = &module[at + key.len()..];
    let end = rest.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

struct Archive<'a, W> {
    to: &'a mut W,
    inode: u32,
}

impl<W: Write> Archive<'_, W> {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let mut header = String::from("070701");
        // Inode, mode, owner, group, links, time, size, device, device's own number, name's length, checksum.
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            header += &format!("{field:08X}");
        }
        self.to.write_all(header.as_bytes())?;
        self.to.write_all(name.as_bytes())?;
        self.pad(header.len() + name.len(), 1)?;
        self.to.write_all(content)?;
        self.pad(content.len(), 0)
    }

    /// At least `least` zeros, up to the next multiple of 4.
    fn pad(&mut self, length: usize, least: usize) -> io::Result<()> {
        let zeros = least + (length + least).next_multiple_of(4) - (length + least);
        self.to.write_all(&[0; 4][..zeros])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(needs: &str) -> Vec<u8> {
        module_of("6.1.0-test", needs)
    }

    fn module_of(release: &str, needs: &str) -> Vec<u8> {
        format!("\u{7f}ELF\0license=GPL\0depends={needs}\0name=x\0vermagic={release} SMP\0").into_bytes()
    }

    #[test]
    fn modules_are_of_one_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        fs::write(&agent, b"12345").unwrap();
        fs::write(dir.path().join("erofs.ko"), module_of("6.1", "")).unwrap();
        fs::write(dir.path().join("overlay.ko"), module_of("6.2", "")).unwrap();
        let refused = write(&agent, dir.path(), &mut Vec::new()).unwrap_err().to_string();
        assert!(refused.contains("6.1") && refused.contains("6.2"), "{refused}");
    }

    #[test]
    fn modules_come_after_those_that_they_need() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("drivers/virtio");
        fs::create_dir_all(&deep).unwrap();
        for (name, needs) in [
            ("virtio_ring.ko", ""),
            ("virtio.ko", "virtio_ring"),
            ("virtio-rng.ko", "virtio"),
            ("virtio_blk.ko", "virtio,virtio-ring"),
            ("other.ko", ""),
        ] {
            fs::write(deep.join(name), module(needs)).unwrap();
        }
        let names = ["virtio_blk", "virtio_rng", "built_in"];
        let order: Vec<String> = in_order(dir.path(), &names).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(order, ["virtio_ring", "virtio", "virtio_blk", "virtio_rng"]);
    }

    #[test]
    fn modules_that_need_each_other_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("erofs.ko"), module("overlay")).unwrap();
        fs::write(dir.path().join("overlay.ko"), module("erofs")).unwrap();
        assert!(in_order(dir.path(), &["erofs"]).unwrap_err().to_string().contains("needs itself"));
    }

    #[test]
    fn the_archive_is_as_the_kernel_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        fs::write(&agent, b"12345").unwrap();
        fs::write(dir.path().join("erofs.ko"), module("")).unwrap();
        let mut archive = Vec::new();
        write(&agent, dir.path(), &mut archive).unwrap();
        assert_eq!(archive.len() % 4, 0);
        let mut names = Vec::new();
        let mut rest = &archive[..];
        loop {
            let field = |at: usize| {
                let text = std::str::from_utf8(&rest[6 + at * 8..14 + at * 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&rest[..6], b"070701");
            let (size, name_size) = (field(6), field(11));
            let name = std::str::from_utf8(&rest[110..110 + name_size - 1]).unwrap().to_owned();
            let content = (110 + name_size).next_multiple_of(4);
            if name == "agent/.tiffin/tiffin-agent" {
                assert_eq!(&rest[content..content + size], b"12345");
            }
            names.push(name.clone());
            if name == "TRAILER!!!" {
                break;
            }
            rest = &rest[(content + size).next_multiple_of(4)..];
        }
        for name in ["init", "modules/6.1.0-test/erofs.ko", "modules/6.1.0-test/order", "modules/6.1.0-test/beside"] {
            assert!(names.contains(&name.to_owned()), "{name}: {names:?}");
        }
    }
}
