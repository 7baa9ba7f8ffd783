//! The blob store's promises: whole or absent, checked, swept.
#![allow(clippy::unwrap_used)] // A failure of the set-up is a failure of the test.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
};

use camino::{Utf8Path, Utf8PathBuf};
use tiffin_image::blob::{BlobStore, Seen};

fn store() -> (tempfile::TempDir, Utf8PathBuf, BlobStore) {
    let folder = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(folder.path()).unwrap().to_owned();
    let store = BlobStore::open(&dir).unwrap();
    (folder, dir, store)
}

fn file(dir: &Utf8Path, bytes: &[u8]) -> Utf8PathBuf {
    let path = dir.join("source");
    fs::write(&path, bytes).unwrap();
    path
}

fn names(dir: &Utf8Path) -> Vec<String> {
    dir.join("sha256").read_dir_utf8().unwrap().map(|entry| entry.unwrap().file_name().to_owned()).collect()
}

#[test]
fn a_blob_is_named_after_its_bytes_and_read_only() {
    let (_folder, dir, store) = store();
    let blob = store.put_file(&file(&dir, b"abc")).unwrap();
    assert_eq!(blob.digest.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(blob.size_bytes, 3);
    let path = store.path(&blob.digest);
    assert_eq!(path, dir.join(format!("sha256/{}.erofs", blob.digest.hex())));
    assert_eq!(fs::read(&path).unwrap(), b"abc");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o444);
    assert!(store.contains(&blob.digest));
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&blob));
    assert_eq!(store.look(&blob.digest, |_| true).unwrap(), Seen::Whole);
}

#[test]
fn the_same_bytes_twice_are_one_blob() {
    let (_folder, dir, store) = store();
    let source = file(&dir, b"twice");
    let blob = store.put_file(&source).unwrap();
    let path = store.path(&blob.digest);
    let first = fs::metadata(&path).unwrap();
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    fs::File::open(&path).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(store.put_file(&source).unwrap(), blob);
    assert_eq!(names(&dir).len(), 1);
    let second = fs::metadata(&path).unwrap();
    assert_eq!(second.ino(), first.ino(), "who has mounted it has what is there");
    assert!(second.modified().unwrap() >= first.modified().unwrap(), "it is young again");
}

#[test]
fn one_that_was_cut_short_is_replaced_by_its_bytes() {
    let (_folder, dir, store) = store();
    let source = file(&dir, b"whole");
    let blob = store.put_file(&source).unwrap();
    let path = store.path(&blob.digest);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, b"who").unwrap();
    assert_eq!(store.put_file(&source).unwrap(), blob);
    assert_eq!(store.look(&blob.digest, |_| true).unwrap(), Seen::Whole);
}

#[test]
fn a_removed_blob_is_absent_and_removing_it_again_is_no_error() {
    let (_folder, dir, store) = store();
    let digest = store.put_file(&file(&dir, b"gone")).unwrap().digest;
    store.remove(&digest).unwrap();
    store.remove(&digest).unwrap();
    assert!(!store.contains(&digest));
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn what_a_killed_writer_left_is_swept_at_the_next_open() {
    let (_folder, dir, store) = store();
    let blob = store.put_file(&file(&dir, b"kept")).unwrap();
    // As after kill -9: the file is there, and nobody holds its lock.
    fs::write(dir.join("sha256/.incoming-1-0"), b"half an ima").unwrap();
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&blob), "a half-written blob is not listed");
    BlobStore::open(&dir).unwrap();
    assert_eq!(names(&dir), [format!("{}.erofs", blob.digest.hex())]);
}

#[test]
fn a_blob_being_written_survives_another_open() {
    let (_folder, dir, store) = store();
    let incoming = store.incoming().unwrap();
    BlobStore::open(&dir).unwrap();
    fs::write(incoming.path(), b"still being written").unwrap();
    let blob = incoming.commit().unwrap();
    assert_eq!((store.look(&blob.digest, |_| true).unwrap(), blob.size_bytes), (Seen::Whole, 19));
}

#[test]
fn a_writer_that_gives_up_leaves_nothing() {
    let (_folder, dir, store) = store();
    drop(store.incoming().unwrap());
    assert_eq!(names(&dir), Vec::<String>::new());
    assert!(store.put_file(&dir.join("absent")).is_err());
    assert_eq!(names(&dir), Vec::<String>::new());
}
