//! The first steps on a bare kernel: where the agent is `/init` of an initramfs, it loads the kernel's modules, lays the
//! VM's disk over the image and goes on as the process 1 of that root.
//!
//! ```text
//!   /init -> /agent/.tiffin/tiffin-agent     /modules/RELEASE/order, beside: names of files there, in the order to load them
//!   /dev/vda: the image, EROFS               /dev/vdb: the VM's disk, ext4
//!   root: overlay of /agent over the image, written to the disk's `upper`
//! ```
//!
//! The modules are of one kernel; another one, which came with the image, has to have all of it built in (`init/needs.rs`).
//!
//! Under an OCI engine all of this is done before the agent starts. What fails here is told to the monitor, where the way to
//! it is there, and on the kernel's console ([`tell`]), and the guest ends: there is nobody to go on without a root.

mod needs;

use std::{
    convert::Infallible,
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
    sync::{
        LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::channel::Channel;

/// The agent's first argument once it is the process 1 of its root.
pub const WORD: &str = "bare";

/// The name of the virtio port that leads to the monitor.
pub const PORT: &str = "tiffin";

/// Where an initramfs has the modules, below the release of the kernel that they are of.
const MODULES: &str = "/modules";

/// Where the agent is in the root.
const AGENT: &str = "/.tiffin/tiffin-agent";

/// How long the machine's devices may take to show.
const DEVICES: Duration = Duration::from_secs(30);

/// Between two looks for them.
const STEP: Duration = Duration::from_millis(2);

/// Whether this process is the `/init` of an initramfs.
pub fn is_first() -> bool {
    std::env::args_os().next().is_some_and(|name| name == "/init") && Path::new(MODULES).exists()
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

/// Whether the guest's processor is emulated by QEMU, by the name that it tells of its hypervisor.
pub fn is_emulated() -> bool {
    is_bare() && *EMULATED
}

#[cfg(target_arch = "x86_64")]
static EMULATED: LazyLock<bool> = LazyLock::new(|| {
    // SAFETY: every x86-64 processor has the instruction; one without this leaf tells something else.
    #[allow(unused_unsafe, reason = "newer compilers know that it is safe")]
    let told = unsafe { std::arch::x86_64::__cpuid(0x4000_0000) };
    [told.ebx, told.ecx, told.edx].map(u32::to_le_bytes) == [*b"TCGT", *b"CGTC", *b"GTCG"]
});

#[cfg(not(target_arch = "x86_64"))]
static EMULATED: LazyLock<bool> = LazyLock::new(|| false);

/// Sets the root up and goes on there; returns only when it can't.
///
/// # Errors
/// What failed, in words.
pub fn set_up_root() -> Result<Infallible, String> {
    let named = |what: &str, error: io::Error| format!("{what}: {error}");
    for (at, kind) in [("/dev", "devtmpfs"), ("/proc", "proc"), ("/sys", "sysfs")] {
        mount_at(kind, kind, at, MsFlags::empty(), "").map_err(|e| named(at, e))?;
    }
    // On a second processor, where there is one; what both lists need, the kernel loads once.
    let beside = std::thread::spawn(|| load_modules("beside"));
    if !load_modules("order")? {
        needs::check(Path::new("/"))?;
    }
    let (image, disk) = (appears("/dev/vda")?, appears("/dev/vdb")?);
    mount_at(&image, "erofs", "/image", MsFlags::MS_RDONLY | MsFlags::MS_NODEV, "")
        .map_err(|e| named("the image", e))?;
    let quiet = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    mount_at(&disk, "ext4", "/disk", quiet, "errors=remount-ro,noinit_itable").map_err(|e| named("the disk", e))?;
    for folder in ["/disk/upper", "/disk/work"] {
        fs::create_dir_all(folder).map_err(|e| named(folder, e))?;
    }
    beside.join().map_err(|_| "the thread that loads modules panicked")??;
    let layers =
        "lowerdir=/agent:/image,upperdir=/disk/upper,workdir=/disk/work,metacopy=off,redirect_dir=off,index=off";
    mount_at("tiffin", "overlay", "/root", MsFlags::MS_NODEV, layers).map_err(|e| named("the root", e))?;
    let port = port().map_err(|e| named("the port to the monitor", e))?;
    for at in ["/sys", "/proc", "/dev"] {
        umount2(at, MntFlags::MNT_DETACH).map_err(|e| named(at, e.into()))?;
    }
    // The initramfs can't be unmounted: the root is put over it. What it had is in the kernel's memory as long as it is.
    let _ = fs::remove_dir_all(MODULES);
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
    match mount(Some(source), at, Some(kind), flags, Some(options)) {
        Err(Errno::ENODEV) => Err(io::Error::other(format!("the kernel has no {kind}: build it in"))),
        mounted => Ok(mounted?),
    }
}

/// Tells the monitor that the root can't be set up, as far as there is a way to it.
pub fn tell(message: &str) {
    eprintln!("tiffin-agent: {message}");
    if let Some(port) = find_port() {
        Channel::new(port).failed(message);
    }
}

/// Loads what a list of the running kernel's modules names, in its order; whether there are such modules.
fn load_modules(list: &str) -> Result<bool, String> {
    let release = nix::sys::utsname::uname().map_err(|e| format!("the kernel's release: {e}"))?;
    let folder = Path::new(MODULES).join(release.release());
    if !folder.exists() {
        return Ok(false);
    }
    let order = fs::read_to_string(folder.join(list)).map_err(|e| format!("the list of modules: {e}"))?;
    for name in order.lines() {
        load_module(&folder.join(name)).map_err(|e| format!("the module {name}: {e}"))?;
    }
    Ok(true)
}

/// Loads a module without its signature, whose check takes a fifth of the time in an emulated machine: the module comes from the
/// host, as the kernel does. A kernel that wants it gets it.
fn load_module(path: &Path) -> io::Result<()> {
    let module = fs::read(path)?;
    let bare = without_signature(&module);
    init_module(bare).or_else(|error| if bare.len() < module.len() { init_module(&module) } else { Err(error) })
}

fn init_module(module: &[u8]) -> io::Result<()> {
    // SAFETY: init_module(2) reads from memory of that length, and a string of no bytes.
    let loaded = unsafe { libc::syscall(libc::SYS_init_module, module.as_ptr(), module.len(), c"".as_ptr()) };
    match io::Error::last_os_error() {
        error if loaded != 0 && error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// What stands before a module's signature (`struct module_signature` of Linux): the length of that is in the four bytes
/// before the mark at the end, the last of twelve.
fn without_signature(module: &[u8]) -> &[u8] {
    let bare = || {
        let rest = module.strip_suffix(b"~Module signature appended~\n")?;
        let (_, length) = rest.split_last_chunk()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        rest.get(..rest.len().checked_sub(12)?.checked_sub(length)?)
    };
    bare().unwrap_or(module)
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

/// Waits for the way to the monitor.
fn port() -> io::Result<File> {
    let deadline = Instant::now() + DEVICES;
    loop {
        if let Some(port) = find_port() {
            return Ok(port);
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::NotFound.into());
        }
        std::thread::sleep(STEP);
    }
}

/// The virtio port that is named [`PORT`], once it is there.
fn find_port() -> Option<File> {
    let mut ports = fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten();
    let is_it =
        |port: &fs::DirEntry| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT);
    let device = Path::new("/dev").join(ports.find(is_it)?.file_name());
    File::options().read(true).write(true).open(device).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_left_out_and_what_is_none_stays() {
        let signed = |length: u32| {
            let mut module = b"module and signature".to_vec();
            module.extend([0, 0, 2, 0, 0, 0, 0, 0]);
            module.extend(length.to_be_bytes());
            module.extend(b"~Module signature appended~\n");
            module
        };
        assert_eq!(without_signature(&signed(14)), b"module");
        for none in [&signed(21)[..], b"module", b"~Module signature appended~\n", b""] {
            assert_eq!(without_signature(none), none);
        }
    }
}
