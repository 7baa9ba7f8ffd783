//! The first steps on a bare kernel: where the agent is `/init` of an initramfs, it loads the kernel's modules, lays the
//! VM's disk over the image and goes on as the process 1 of that root.
//!
//! ```text
//!   /init -> /agent/.tiffin/tiffin-agent     /modules/order: names of files there, in the order to load them
//!   /dev/vda: the image, EROFS               /dev/vdb: the VM's disk, ext4
//!   root: overlay of /agent over the image, written to the disk's `upper`
//! ```
//!
//! Under an OCI engine all of this is done before the agent starts. What fails here is told on the kernel's console, and the
//! guest ends: there is nobody to go on without a root.

use std::{
    convert::Infallible,
    ffi::CString,
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The agent's first argument once it is the process 1 of its root.
pub const WORD: &str = "bare";

/// The name of the virtio port that leads to the monitor.
pub const PORT: &str = "tiffin";

/// Where the agent is in the root.
const AGENT: &str = "/.tiffin/tiffin-agent";

/// How long the machine's devices may take to show.
const DEVICES: Duration = Duration::from_secs(30);

/// Between two looks for them.
const STEP: Duration = Duration::from_millis(2);

/// Whether this process is the `/init` of an initramfs.
pub fn is_first() -> bool {
    std::env::args_os().next().is_some_and(|name| name == "/init") && Path::new("/modules/order").exists()
}

static BARE: AtomicBool = AtomicBool::new(false);

/// Remembers that the guest has a kernel of its own, and that all of it is this process's to set up and to end.
pub fn note_bare() {
    BARE.store(true, Ordering::Relaxed);
}

/// Whether the guest has a kernel of its own.
pub fn is_bare() -> bool {
    BARE.load(Ordering::Relaxed)
}

/// Sets the root up and goes on there; returns only when it can't.
///
/// # Errors
/// What failed, in words.
pub fn set_up_root() -> Result<Infallible, String> {
    let named = |what: &str, error: io::Error| format!("{what}: {error}");
    for (at, kind) in [("/dev", "devtmpfs"), ("/proc", "proc"), ("/sys", "sysfs")] {
        mount_at(kind, kind, at, MsFlags::empty(), "").map_err(|e| named(at, e))?;
    }
    load_modules(Path::new("/modules"))?;
    let (image, disk) = (appears("/dev/vda")?, appears("/dev/vdb")?);
    mount_at(&image, "erofs", "/image", MsFlags::MS_RDONLY | MsFlags::MS_NODEV, "")
        .map_err(|e| named("the image", e))?;
    let quiet = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    mount_at(&disk, "ext4", "/disk", quiet, "errors=remount-ro,noinit_itable").map_err(|e| named("the disk", e))?;
    for folder in ["/disk/upper", "/disk/work"] {
        fs::create_dir_all(folder).map_err(|e| named(folder, e))?;
    }
    let layers =
        "lowerdir=/agent:/image,upperdir=/disk/upper,workdir=/disk/work,metacopy=off,redirect_dir=off,index=off";
    mount_at("tiffin", "overlay", "/root", MsFlags::MS_NODEV, layers).map_err(|e| named("the root", e))?;
    let port = port().map_err(|e| named("the port to the monitor", e))?;
    for at in ["/sys", "/proc", "/dev"] {
        umount2(at, MntFlags::MNT_DETACH).map_err(|e| named(at, e.into()))?;
    }
    // The initramfs can't be unmounted: the root is put over it. What it had is in the kernel's memory as long as it is.
    let _ = fs::remove_dir_all("/modules");
    std::env::set_current_dir("/root").map_err(|e| named("/root", e))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(|e| named("the root", e.into()))?;
    std::os::unix::fs::chroot(".").and_then(|()| std::env::set_current_dir("/")).map_err(|e| named("the root", e))?;
    let output = port.try_clone().map_err(|e| named("the port to the monitor", e))?;
    let error = Command::new(AGENT)
        .arg(WORD)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(port)
        .stdout(output)
        .exec();
    Err(named(AGENT, error))
}

fn mount_at(source: &str, kind: &str, at: &str, flags: MsFlags, options: &str) -> io::Result<()> {
    fs::create_dir_all(at)?;
    Ok(mount(Some(source), at, Some(kind), flags, Some(options))?)
}

/// Loads what `order` names, in its order.
fn load_modules(folder: &Path) -> Result<(), String> {
    let order = fs::read_to_string(folder.join("order")).map_err(|e| format!("the list of modules: {e}"))?;
    for name in order.lines() {
        load_module(&folder.join(name)).map_err(|e| format!("the module {name}: {e}"))?;
    }
    Ok(())
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let parameters = CString::default();
    // SAFETY: finit_module(2) reads from an open file and a string of no bytes.
    let loaded = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    match io::Error::last_os_error() {
        error if loaded != 0 && error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// Waits until the device is there.
fn appears(device: &str) -> Result<String, String> {
    let deadline = Instant::now() + DEVICES;
    while !Path::new(device).exists() {
        if Instant::now() >= deadline {
            return Err(format!("the machine has no {device}"));
        }
        std::thread::sleep(STEP);
    }
    Ok(device.to_owned())
}

/// The virtio port that is named [`PORT`].
fn port() -> io::Result<File> {
    let deadline = Instant::now() + DEVICES;
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
                let device: PathBuf = Path::new("/dev").join(entry.file_name());
                return File::options().read(true).write(true).open(device);
            }
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::NotFound.into());
        }
        std::thread::sleep(STEP);
    }
}
