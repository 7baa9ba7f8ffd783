//! The lowest layer of images of tests: busybox and a user of its own.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

/// Busybox under those names, the user `www` (1234), a file `/srv/old`, and `/srv/out` where everybody may write.
pub(crate) fn layer(names: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path();
    for name in ["bin", "etc", "srv"] {
        fs::create_dir(tree.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    for name in names {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nwww:x:1234:1234::/srv:/bin/sh\n").unwrap();
    fs::write(tree.join("etc/group"), "www:x:1234:\n").unwrap();
    fs::write(tree.join("srv/old"), "old").unwrap();
    fs::create_dir(tree.join("srv/out")).unwrap();
    fs::set_permissions(tree.join("srv/out"), fs::Permissions::from_mode(0o777)).unwrap();
    let packed = Command::new("tar").args(["-c", "--owner=0", "--group=0", "-C"]).arg(tree).arg(".").output().unwrap();
    assert!(packed.status.success());
    packed.stdout
}
