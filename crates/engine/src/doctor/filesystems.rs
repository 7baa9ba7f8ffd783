//! EROFS, ext4 and overlay, by mounting small ones the way a VM's root is put together.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::{Check, DoctorInput, tools};
use crate::host::mount as mounts;

const NAME: &str = "filesystems";
/// The smallest that holds ext4 with a journal, in bytes.
const DISK_BYTES: u64 = 8 << 20;
/// How long a mount may stay busy.
const BUSY: Duration = Duration::from_secs(3);

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    let scratch = match Scratch::new() {
        Ok(scratch) => scratch,
        Err(error) => {
            return vec![Check::fail(
                NAME,
                format!("no temporary folder: {error}"),
                "make room in the temporary folder",
            )];
        }
    };
    vec![match probe(&scratch.path) {
        Ok(()) => Check::ok(NAME, "EROFS, ext4 and overlay can be mounted"),
        Err(failure) => Check::fail(NAME, format!("{}: {}", failure.what, failure.error), failure.remedy),
    }]
}

struct Failure {
    what: &'static str,
    remedy: &'static str,
    error: io::Error,
}

fn failed(what: &'static str, remedy: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure { what, remedy, error }
}

fn probe(dir: &Path) -> Result<(), Failure> {
    // This thread's alone: no mount made here shows outside, and all go with the thread.
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>))
        .map_err(|error| failed("a private mount namespace", "see the line on namespaces")(error.into()))?;

    let (tree, image, lower) = (dir.join("tree"), dir.join("image"), dir.join("lower"));
    let (disk, upper, root) = (dir.join("disk"), dir.join("upper"), dir.join("root"));
    let packed = fs::create_dir(&tree).and_then(|()| fs::write(tree.join("file"), "from the image")).and_then(|()| {
        tools::first_line(Command::new("mkfs.erofs").args(["-Enoinline_data", "-T0"]).arg(&image).arg(&tree))
    });
    packed.map_err(failed("packing an EROFS image", "apt-get install erofs-utils"))?;
    mounts::mount_image(&image, &lower).map_err(failed("mounting EROFS", "modprobe erofs; modprobe loop"))?;

    let formatted = fs::File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .and_then(|()| tools::first_line(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&disk)));
    formatted.map_err(failed("formatting ext4", "apt-get install e2fsprogs"))?;
    mounts::mount_disk(&disk, &upper).map_err(failed("mounting ext4", "modprobe ext4; modprobe loop"))?;

    mounts::mount_overlay(&[&lower], &upper, &root).map_err(failed("mounting an overlay", "modprobe overlay"))?;
    let written = fs::write(root.join("file"), "changed").and_then(|()| fs::read_to_string(lower.join("file")));
    let undone = [&root, &upper, &lower].into_iter().try_for_each(|at| unmount(at));
    let below = written.map_err(failed("writing to an overlay", "modprobe overlay"))?;
    undone.map_err(failed("unmounting", "see the kernel's log (dmesg)"))?;
    if below == "from the image" {
        Ok(())
    } else {
        Err(failed("an overlay", "use another kernel")(io::Error::other("a write went through to the image")))
    }
}

/// A child that another probe has just forked holds what was open in the mount until its exec: busy for a moment.
fn unmount(at: &Path) -> io::Result<()> {
    let deadline = Instant::now() + BUSY;
    loop {
        match mounts::unmount(at) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// A folder that goes with the probe.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("tiffin-doctor-{}", hex::encode(rand::random::<[u8; 6]>())));
        fs::create_dir(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Where the probe failed half way, something may still be mounted in the thread's namespace.
        for at in ["root", "upper", "lower"] {
            let _ = unmount(&self.path.join(at));
        }
        let _ = fs::remove_dir_all(&self.path);
    }
}
