//! The guest's file system and identity: mounts, `/workspace`, host name, `/etc/hosts`, `/etc/resolv.conf`, machine id.
//!
//! The image is a stranger's: no link that it planted is followed when something is written, and whatever can't be set
//! up becomes a line on standard error, never a reason to stop.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, fchown, unlinkat};
use tiffin_protocol::Boot;

use crate::init;

/// The user that commands run as, by convention of the platform's images.
const USER: u32 = 1000;

/// Any user may listen on any port, and ping.
const SETTINGS: [(&str, &str); 2] =
    [("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"), ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")];

/// How many threads there may be, the kernel's own among them.
const THREADS: &str = "/proc/sys/kernel/threads-max";

/// A new file's name until it is renamed into place.
const TEMPORARY: &str = ".tiffin-agent.new";

/// Sets up what is missing and says on standard error what could not be.
pub fn set_up(boot: &Boot) {
    mount_missing();
    report("/tmp", folder(Path::new("/tmp"), 0o1777, None));
    report("/workspace", folder(Path::new("/workspace"), 0o755, Some(USER)));
    identify(boot);
}

/// Gives the guest the name, hosts and resolvers of `boot`, and says on standard error what could not be.
pub fn identify(boot: &Boot) {
    report("host name", nix::unistd::sethostname(&boot.hostname).map_err(io::Error::from));
    report("/etc/hostname", replace(&["etc"], "hostname", &format!("{}\n", boot.hostname), 0o644));
    report("/etc/hosts", replace(&["etc"], "hosts", &hosts(boot), 0o644));
    set_resolvers(&boot.resolvers);
}

/// Gives the guest's users what other engines give them of a bare kernel's settings, and then takes the settings from root in
/// the guest: it could name a program there that the kernel starts as its own root, with every capability (`core_pattern`).
pub fn settle(max_pids: u32) {
    if !init::is_bare() {
        return;
    }
    for (setting, value) in SETTINGS {
        report(setting, fs::write(setting, value));
    }
    report(THREADS, at_least(THREADS, max_pids.saturating_mul(2)));
    report("/proc/sys", read_only("/proc/sys").map_err(io::Error::from));
}

/// Raises a setting. A small machine's kernel allows fewer threads than the guest may have, by a guess of what they take.
fn at_least(setting: &str, value: u32) -> io::Result<()> {
    match fs::read_to_string(setting)?.trim().parse() {
        Ok(now) if value <= now => Ok(()),
        Ok(_) | Err(_) => fs::write(setting, value.to_string()),
    }
}

fn read_only(folder: &str) -> nix::Result<()> {
    let none = None::<&str>;
    mount(Some(folder), folder, none, MsFlags::MS_BIND, none)?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(none, folder, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | safe, none)
}

/// Gives the guest those resolvers.
pub fn set_resolvers(resolvers: &[String]) {
    report("/etc/resolv.conf", replace(&["etc"], "resolv.conf", &resolv_conf(resolvers), 0o644));
}

/// Gives the guest the machine id `id`. D-Bus's own copy only changes where there is one: it may be a link to the other.
pub fn set_machine_id(id: &str) {
    let line = format!("{id}\n");
    report("/etc/machine-id", replace(&["etc"], "machine-id", &line, 0o444));
    let copy = Path::new("/var/lib/dbus/machine-id");
    if fs::symlink_metadata(copy).is_ok_and(|metadata| metadata.is_file()) {
        report("/var/lib/dbus/machine-id", replace(&["var", "lib", "dbus"], "machine-id", &line, 0o444));
    }
}

/// Says on standard error what could not be done.
pub fn report(what: &str, done: io::Result<()>) {
    if let Err(error) = done {
        eprintln!("tiffin-agent: {what} not set up: {error}");
    }
}

fn hosts(boot: &Boot) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for address in &boot.addresses {
        text.push_str(&format!("{address}\t{}\n", boot.hostname));
    }
    text
}

fn resolv_conf(resolvers: &[String]) -> String {
    resolvers.iter().map(|resolver| format!("nameserver {resolver}\n")).collect()
}

/// Writes the file `name` of a folder beside the old one and renames it into place, so that a link there is replaced, not
/// followed; nor is one on the way. The folder is given by the names that lead to it from the root; what is missing is made.
fn replace(folder: &[&str], name: &str, content: &str, mode: u32) -> io::Result<()> {
    let folder = enter(folder)?;
    // What an earlier run may have left; usually nothing.
    let _ = unlinkat(&folder, TEMPORARY, UnlinkatFlags::NoRemoveDir);
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(&folder, TEMPORARY, flags, Mode::from_bits_truncate(0o600))?);
    file.write_all(content.as_bytes())?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    renameat(&folder, TEMPORARY, &folder, name)?;
    Ok(())
}

/// Opens the folder that `names` lead to.
fn enter(names: &[&str]) -> io::Result<File> {
    let mut folder = File::open("/")?;
    for name in names {
        match mkdirat(&folder, *name, Mode::from_bits_truncate(0o755)) {
            Err(Errno::EEXIST) | Ok(()) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        folder = File::from(openat(&folder, *name, flags, Mode::empty())?);
    }
    Ok(folder)
}

/// Makes sure that `path` is a folder, not a link to one, of that mode and owner.
fn folder(path: &Path, mode: u32, owner: Option<u32>) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let folder = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)?;
    let now = folder.metadata()?;
    if let Some(owner) = owner
        && (now.uid(), now.gid()) != (owner, owner)
    {
        fchown(&folder, Some(owner.into()), Some(owner.into()))?;
    }
    if now.mode() & 0o7777 != mode {
        folder.set_permissions(fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// What an engine that boots a bare kernel leaves to process 1; an OCI engine has mounted it all.
fn mount_missing() {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // What an image has by these names is no kernel's.
    let has = |path: &str| !init::is_bare() && Path::new(path).exists();
    mount_unless(has("/proc/self"), "/proc", "proc", safe, None);
    mount_unless(has("/sys/kernel"), "/sys", "sysfs", safe, None);
    mount_unless(has("/dev/null"), "/dev", "devtmpfs", MsFlags::MS_NOSUID, Some("mode=755"));
    mount_unless(!init::is_bare(), "/run", "tmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755"));
    let terminals = Path::new("/dev/pts/ptmx").exists();
    mount_unless(
        terminals,
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("mode=620,ptmxmode=666"),
    );
    mount_unless(is_mount_point("/dev/shm", "/dev"), "/dev/shm", "tmpfs", safe, Some("mode=1777"));
    for (name, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let link = Path::new("/dev").join(name);
        if fs::symlink_metadata(&link).is_err() {
            report("/dev links", symlink(target, &link));
        }
    }
}

fn mount_unless(present: bool, at: &str, kind: &str, flags: MsFlags, data: Option<&str>) {
    if present {
        return;
    }
    let mounted = folder(Path::new(at), 0o755, None)
        .and_then(|()| mount(Some(kind), at, Some(kind), flags, data).map_err(io::Error::from));
    report(at, mounted);
}

fn is_mount_point(path: &str, parent: &str) -> bool {
    let device = |path: &str| fs::symlink_metadata(path).map(|metadata| metadata.dev());
    matches!((device(path), device(parent)), (Ok(own), Ok(above)) if own != above)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot() -> Boot {
        Boot {
            token: "t".to_owned(),
            hostname: "box".to_owned(),
            addresses: vec!["10.0.0.2".to_owned(), "fd00::2".to_owned()],
            resolvers: Vec::new(),
            cpus: 1,
            max_pids: 1,
            link: None,
        }
    }

    #[test]
    fn hosts_name_the_guest_by_each_of_its_addresses() {
        let text = hosts(&boot());
        assert!(text.ends_with("10.0.0.2\tbox\nfd00::2\tbox\n"), "{text}");
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"), "{text}");
    }

    #[test]
    fn without_resolvers_the_resolver_file_is_empty() {
        assert_eq!(resolv_conf(&[]), "");
        assert_eq!(resolv_conf(&["1.1.1.1".to_owned(), "::1".to_owned()]), "nameserver 1.1.1.1\nnameserver ::1\n");
    }
}
