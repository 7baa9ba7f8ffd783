//! A folder comes back out of its EROFS file as it went in.
#![allow(clippy::unwrap_used)] // A failure of the set-up is a failure of the test.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    process::Command,
};

use camino::{Utf8Path, Utf8PathBuf};
use tiffin_image::{ToolError, blob::BlobStore, erofs};

fn tree(parent: &Utf8Path) -> Utf8PathBuf {
    let root = parent.join("tree");
    fs::create_dir_all(root.join("etc/empty")).unwrap();
    fs::write(root.join("etc/plain"), b"plain\n").unwrap();
    fs::write(root.join("etc/tail"), vec![7; 5000]).unwrap();
    fs::write(root.join("etc/secret"), b"secret").unwrap();
    fs::set_permissions(root.join("etc/secret"), Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(root.join("etc/plain"), Permissions::from_mode(0o755)).unwrap();
    fs::hard_link(root.join("etc/plain"), root.join("etc/linked")).unwrap();
    symlink("plain", root.join("etc/pointing")).unwrap();
    symlink("/nowhere/at/all", root.join("etc/dangling")).unwrap();
    root
}

fn extracted(image: &Utf8Path, to: &Utf8Path) {
    let output = Command::new("fsck.erofs").arg(format!("--extract={to}")).arg(image.as_str()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn modes_links_and_bytes_survive() {
    let folder = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(folder.path()).unwrap();
    let (root, image, out) = (tree(dir), dir.join("image"), dir.join("out"));
    fs::write(&image, b"").unwrap();
    erofs::make(&root, 1 << 20, &image).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().len() % 4096, 0);

    extracted(&image, &out);
    assert_eq!(fs::read(out.join("etc/plain")).unwrap(), b"plain\n");
    assert_eq!(fs::read(out.join("etc/tail")).unwrap(), vec![7; 5000]);
    assert_eq!(fs::read(out.join("etc/linked")).unwrap(), b"plain\n");
    assert_eq!(fs::read_link(out.join("etc/pointing")).unwrap().to_str(), Some("plain"));
    assert_eq!(fs::read_link(out.join("etc/dangling")).unwrap().to_str(), Some("/nowhere/at/all"));
    assert!(out.join("etc/empty").is_dir());
    let plain = fs::metadata(out.join("etc/plain")).unwrap();
    assert_eq!(plain.mode() & 0o7777, 0o755);
    assert_eq!(plain.mtime(), 0);
    assert_eq!(fs::metadata(out.join("etc/secret")).unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn the_same_tree_made_twice_is_one_blob() {
    let folder = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(folder.path()).unwrap();
    let store = BlobStore::open(&dir.join("images")).unwrap();
    let digests = ["first", "second"].map(|name| {
        let parent = dir.join(name);
        let incoming = store.incoming().unwrap();
        erofs::make(&tree(&parent), 1 << 20, incoming.path()).unwrap();
        incoming.commit().unwrap().digest
    });
    assert_eq!(digests[0], digests[1]);
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn the_reason_of_a_failure_is_the_tools_own() {
    let folder = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(folder.path()).unwrap();
    fs::write(dir.join("image"), b"").unwrap();
    let error = erofs::make(&dir.join("absent"), 0, &dir.join("image")).unwrap_err();
    let erofs::ErofsError::Tool(ToolError::Failed { stderr, .. }) = error else { panic!("{error}") };
    assert!(stderr.contains("No such file"), "{stderr}");
}
