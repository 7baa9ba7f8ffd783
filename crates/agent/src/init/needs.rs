//! What a guest needs of its kernel, and what to say to whoever built one that lacks it.

use std::{fs, path::Path};

/// Filesystems, and the options of the kernel's build that give them.
const FILESYSTEMS: [(&str, &str); 3] =
    [("erofs", "CONFIG_EROFS_FS"), ("ext4", "CONFIG_EXT4_FS"), ("overlay", "CONFIG_OVERLAY_FS")];

/// The same for what tells of the devices and drives them, with the place where it shows. Without ACPI nobody tells of them.
const DRIVERS: [(&str, &str, &str); 5] = [
    ("ACPI", "CONFIG_ACPI", "sys/firmware/acpi"),
    ("virtio_mmio", "CONFIG_VIRTIO_MMIO", "sys/bus/platform/drivers/virtio-mmio"),
    ("virtio_blk", "CONFIG_VIRTIO_BLK", "sys/bus/virtio/drivers/virtio_blk"),
    ("virtio_net", "CONFIG_VIRTIO_NET", "sys/bus/virtio/drivers/virtio_net"),
    ("virtio_console", "CONFIG_VIRTIO_CONSOLE", "sys/bus/virtio/drivers/virtio_console"),
];

/// Looks for all of it below `root`, where `/proc` and `/sys` are.
///
/// # Errors
/// What is missing, and what to do.
pub(super) fn check(root: &Path) -> Result<(), String> {
    let known = fs::read_to_string(root.join("proc/filesystems")).map_err(|e| format!("/proc/filesystems: {e}"))?;
    let knows = |name: &str| known.lines().any(|line| line.split_whitespace().next_back() == Some(name));
    let drivers =
        DRIVERS.iter().filter(|(_, _, place)| !root.join(place).exists()).map(|(name, option, _)| (*name, *option));
    let filesystems = FILESYSTEMS.iter().filter(|(name, _)| !knows(name)).copied();
    let (names, options): (Vec<&str>, Vec<&str>) = drivers.chain(filesystems).unzip();
    if names.is_empty() {
        return Ok(());
    }
    let release =
        nix::sys::utsname::uname().map(|uts| uts.release().to_string_lossy().into_owned()).unwrap_or_default();
    Err(format!(
        "the kernel {release} has no {}: build that in, not as modules ({})",
        names.join(", "),
        options.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel shows that has everything.
    fn whole() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (_, _, place) in DRIVERS {
            fs::create_dir_all(root.path().join(place)).unwrap();
        }
        fs::create_dir_all(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/filesystems"), "nodev\tsysfs\n\text4\nnodev\toverlay\n\terofs\n").unwrap();
        root
    }

    #[test]
    fn a_kernel_that_has_all_of_it_passes() {
        assert_eq!(check(whole().path()), Ok(()));
    }

    #[test]
    fn all_that_is_missing_is_named_with_its_option() {
        for (name, option, place) in DRIVERS {
            let root = whole();
            fs::remove_dir(root.path().join(place)).unwrap();
            let said = check(root.path()).unwrap_err();
            assert!(said.contains(&format!("has no {name}: build")) && said.contains(&format!("({option})")), "{said}");
        }
        let root = whole();
        fs::write(root.path().join("proc/filesystems"), "nodev\tsysfs\n\text2\nnodev\tnot-overlay\n").unwrap();
        let said = check(root.path()).unwrap_err();
        assert!(
            said.contains("has no erofs, ext4, overlay: build") && said.contains("CONFIG_EROFS_FS, CONFIG_EXT4_FS"),
            "{said}"
        );
    }
}
