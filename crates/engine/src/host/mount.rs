//! Mounts: image files and disk files as folders, through loop devices that free themselves.
//!
//! Only filesystems that the platform made are ever mounted: an image is packed by the platform's own tools and a disk
//! is formatted by it, and a guest reaches both through files, never as raw blocks.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// From linux/loop.h.
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// From fs/ext4/ext4.h: `_IOW('f', 43, __u32)`.
const EXT4_IOC_CHECKPOINT: libc::c_ulong = 0x4004_662b;
/// From linux/fs.h.
const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A loop device. The kernel frees it when the last user (this handle, a mount) is gone.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _open: OwnedFd,
}

impl LoopDevice {
    /// Attaches `file`.
    ///
    /// # Errors
    /// When there is no loop device to be had, or the file can't be opened.
    pub fn attach(file: &Path, read_only: bool) -> io::Result<Self> {
        let backing = OpenOptions::new().read(true).write(!read_only).open(file)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        // Between "this one is free" and taking it, another process may take it: then ask again.
        for _ in 0..200 {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a device number.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            ensure_node(&path, number)?;
            match Self::configure(&path, &backing, read_only) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                other => return other,
            }
        }
        Err(io::Error::other("no free loop device"))
    }

    fn configure(path: &Path, backing: &File, read_only: bool) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let mut flags = LO_FLAGS_AUTOCLEAR;
        if read_only {
            flags |= LO_FLAGS_READ_ONLY;
        }
        let config = LoopConfig {
            fd: u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?,
            block_size: 0,
            info: LoopInfo64 {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                sizelimit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `config` is to the byte.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { path: path.to_owned(), _open: device.into() })
    }

    /// The device's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Containers and minimal hosts have no udev to make the node of a new loop device.
fn ensure_node(path: &Path, number: i32) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let minor = u64::try_from(number).map_err(io::Error::other)?;
    let kind = nix::sys::stat::SFlag::S_IFBLK;
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
    match nix::sys::stat::mknod(path, kind, mode, nix::sys::stat::makedev(7, minor)) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits until no loop device holds `file`: the kernel lets go of a dead VM's disk a moment after its last process, and
/// mounting it a second time meanwhile would destroy it.
///
/// # Errors
/// `TimedOut` when a device still holds it after `within`.
pub fn wait_detached(file: &Path, within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    while is_attached(file) {
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the disk is still in use by an earlier run"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn is_attached(file: &Path) -> bool {
    let Ok(devices) = fs::read_dir("/sys/block") else { return false };
    devices.filter_map(Result::ok).any(|device| {
        let backing = device.path().join("loop/backing_file");
        fs::read_to_string(backing).is_ok_and(|held| Path::new(held.trim_end()) == file)
    })
}

/// Mounts an image file read-only at `at`, which is made.
///
/// # Errors
/// The kernel's, or those of [`LoopDevice::attach`].
pub fn mount_image(image: &Path, at: &Path) -> io::Result<()> {
    fs::create_dir_all(at)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    // Since Linux 6.12 EROFS reads a file itself; older kernels need a block device (ENOTBLK).
    match mount(Some(image), at, Some("erofs"), flags, None::<&str>) {
        Ok(()) => Ok(()),
        Err(_) => {
            let device = LoopDevice::attach(image, true)?;
            Ok(mount(Some(device.path()), at, Some("erofs"), flags, None::<&str>)?)
        }
    }
}

/// Mounts a VM's disk file at `at`, which is made.
///
/// # Errors
/// The kernel's, or those of [`LoopDevice::attach`].
pub fn mount_disk(disk: &Path, at: &Path) -> io::Result<()> {
    fs::create_dir_all(at)?;
    let device = LoopDevice::attach(disk, false)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    // Without the initialization in the background, nothing but the guest's writes ever changes the disk: see `settle`.
    let options = "errors=remount-ro,noinit_itable";
    Ok(mount(Some(device.path()), at, Some("ext4"), flags, Some(options))?)
}

/// Mounts an overlay of read-only `lower` folders (first on top) and a writable disk at `at`, which is made.
///
/// # Errors
/// The kernel's.
pub fn mount_overlay(lower: &[&Path], disk: &Path, at: &Path) -> io::Result<()> {
    let (upper, work) = (disk.join("upper"), disk.join("work"));
    for dir in [at, &upper, &work] {
        fs::create_dir_all(dir)?;
    }
    let lower: Vec<String> = lower.iter().map(|dir| dir.display().to_string()).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={},metacopy=off,redirect_dir=off,index=off",
        lower.join(":"),
        upper.display(),
        work.display()
    );
    Ok(mount(Some("tiffin"), at, Some("overlay"), MsFlags::MS_NODEV, Some(options.as_str()))?)
}

/// Unmounts `at`; not mounted is fine.
///
/// # Errors
/// `EBUSY` and the kernel's other refusals.
pub fn unmount(at: &Path) -> io::Result<()> {
    match umount2(at, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Takes what is mounted at `at` away from there; who uses it goes on.
///
/// # Errors
/// The kernel's.
pub fn detach(at: &Path) -> io::Result<()> {
    Ok(umount2(at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?)
}

/// Whether something is mounted at `path`.
pub fn is_mounted(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    // Where a filesystem begins, the device changes.
    device(path).is_some() && device(path) != path.parent().and_then(device)
}

/// Writes what is cached for the filesystem of `dir` to its disk.
///
/// # Errors
/// The kernel's; a full or failing host disk shows here.
pub fn sync(dir: &Path) -> io::Result<()> {
    let dir = File::open(dir)?;
    // SAFETY: syncfs(2) on an open descriptor.
    if unsafe { libc::syncfs(dir.as_raw_fd()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes the disk file behind the ext4 filesystem of `dir` one that can be copied, as long as nobody writes: everything
/// cached is on it, and its journal is empty.
///
/// Not by freezing it meanwhile: a filesystem that was frozen by a process that was killed can't be thawed any more once its
/// mounts are gone, and keeps its loop device for ever.
///
/// # Errors
/// The kernel's; a full or failing host disk shows here.
pub fn settle(dir: &Path) -> io::Result<()> {
    sync(dir)?;
    let dir = File::open(dir)?;
    let flags: u32 = 0;
    // SAFETY: EXT4_IOC_CHECKPOINT reads one u32 of flags.
    if unsafe { libc::ioctl(dir.as_raw_fd(), EXT4_IOC_CHECKPOINT, &raw const flags) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        // Before Linux 5.15. Freezing empties the journal, too.
        error if error.raw_os_error() == Some(libc::ENOTTY) => {
            // SAFETY: FIFREEZE and FITHAW take no argument that they look at.
            let frozen = unsafe { libc::ioctl(dir.as_raw_fd(), FIFREEZE, 0) };
            let frozen = if frozen < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
            // SAFETY: as above. What wasn't frozen isn't thawed, which is no failure of its own.
            unsafe { libc::ioctl(dir.as_raw_fd(), FITHAW, 0) };
            frozen
        }
        error => Err(error),
    }
}

/// Free bytes of the filesystem that holds `path`, for unprivileged users.
///
/// # Errors
/// The kernel's.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// A path as a C string for a system call.
///
/// # Errors
/// When it holds a zero byte.
pub fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
