//! Ext4 filesystems become images with the same files in them; what is no such filesystem is refused with the reason, and
//! no bytes whatever do harm.
#![allow(clippy::unwrap_used)] // A failure of the set-up is a failure of the test.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File, Permissions},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use proptest::prelude::*;
use tiffin_image::{
    blob::BlobStore,
    convert::{ConvertError, Converted, Converter, Limits},
};

const LIMITS: Limits =
    Limits { entries: 20_000, bytes: 1 << 30, leave_free_bytes: 1 << 20, time: Duration::from_secs(120) };

struct Place {
    _folder: tempfile::TempDir,
    dir: Utf8PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = Utf8PathBuf::from_path_buf(folder.path().to_owned()).unwrap();
        Self { _folder: folder, dir }
    }

    /// Makes a filesystem of the folder `tree`, by `mke2fs` with those arguments.
    fn filesystem(&self, arguments: &[&str], size: &str) -> Utf8PathBuf {
        let image = self.dir.join("upload");
        run(Command::new("mke2fs")
            .args(["-q", "-F", "-d", self.dir.join("tree").as_str()])
            .args(arguments)
            .args([image.as_str(), size]));
        image
    }

    fn convert(&self, upload: &Utf8Path, limits: &Limits) -> Result<Converted, ConvertError> {
        let store = BlobStore::open(&self.dir.join("images")).unwrap();
        let converted = Converter::in_process().convert(upload, &self.dir.join("work"), &store, limits, &mut |_| {});
        assert!(!self.dir.join("work").exists(), "the work folder is removed");
        if converted.is_err() {
            assert_eq!(store.list().unwrap(), [], "nothing is left of what failed");
        }
        converted
    }

    /// The files of an image, as the kernel shows them: the tools that unpack one forget set-user-id bits and links.
    fn mounted(&self, converted: &Converted) -> BTreeMap<String, Seen> {
        let (at, store) = (self.dir.join("out"), BlobStore::open(&self.dir.join("images")).unwrap());
        fs::create_dir_all(&at).unwrap();
        let image = store.path(&converted.blob.digest);
        run(Command::new("mount").args(["-t", "erofs", "-o", "ro,loop,nodev", image.as_str(), at.as_str()]));
        let found = std::panic::catch_unwind(|| seen(at.as_std_path()));
        run(Command::new("umount").arg(at.as_str()));
        found.unwrap()
    }

    fn refusal(&self, upload: &[u8]) -> String {
        let path = self.dir.join("upload");
        fs::write(&path, upload).unwrap();
        refusal(self.convert(&path, &LIMITS))
    }
}

fn refusal(converted: Result<Converted, ConvertError>) -> String {
    match converted.unwrap_err() {
        ConvertError::Refused(why) => why,
        other => panic!("{other:?}"),
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What is compared of a file.
#[derive(Debug, PartialEq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    content: Vec<u8>,
}

fn seen(root: &Path) -> BTreeMap<String, Seen> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let content = if metadata.is_symlink() {
                fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
            } else if metadata.is_file() {
                fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            let links = if metadata.is_dir() { 0 } else { metadata.nlink() };
            let owner = (metadata.uid(), metadata.gid());
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            found.insert(name, Seen { mode: metadata.mode(), owner, links, content });
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

/// A tree with something of everything.
fn tree(root: &Utf8Path) {
    fs::create_dir_all(root.join("etc/deep/er/still")).unwrap();
    fs::create_dir_all(root.join("many")).unwrap();
    fs::write(root.join("etc/tiny"), b"tiny\n").unwrap();
    fs::write(root.join("etc/inline"), vec![b'i'; 100]).unwrap();
    fs::write(root.join("etc/empty"), b"").unwrap();
    let large: Vec<u8> = (0..300_000_u32).flat_map(|n| n.to_le_bytes()).collect();
    fs::write(root.join("etc/large"), large).unwrap();
    fs::write(root.join("etc/set-uid"), b"s").unwrap();
    chown(root.join("etc/set-uid"), Some(1000), Some(70_000)).unwrap();
    fs::set_permissions(root.join("etc/set-uid"), Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(root.join("etc/deep"), Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(root.join("etc/large"), root.join("etc/deep/same")).unwrap();
    symlink("tiny", root.join("etc/short")).unwrap();
    symlink(format!("/{}", "long/".repeat(40)), root.join("etc/long")).unwrap();
    nix::unistd::mkfifo(root.join("etc/pipe").as_std_path(), nix::sys::stat::Mode::from_bits_truncate(0o640)).unwrap();
    for number in 0..400 {
        fs::write(root.join(format!("many/a-rather-long-name-so-that-there-are-many-blocks-{number}")), b"").unwrap();
    }
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 3 << 20).unwrap();
    sparse.write_all_at(b"end", (6 << 20) - 3).unwrap();
}

#[test]
fn every_kind_of_file_comes_through_every_kind_of_filesystem() {
    for arguments in [
        ["-t", "ext4", "-O", "metadata_csum"].as_slice(),
        &["-t", "ext4", "-O", "^metadata_csum,^64bit", "-b", "1024"],
        &["-t", "ext4", "-O", "inline_data", "-I", "512"],
        &["-t", "ext3", "-b", "4096"],
        &["-t", "ext2", "-b", "1024"],
        &["-t", "ext2", "-I", "128", "-r", "0"],
        &["-t", "ext4", "-O", "bigalloc"],
    ] {
        let place = Place::new();
        let root = place.dir.join("tree");
        tree(&root);
        let upload = place.filesystem(arguments, "48M");
        // Hashed folders, as kernels write them.
        let indexed = Command::new("e2fsck").args(["-fyD", upload.as_str()]).output().unwrap();
        assert!(matches!(indexed.status.code(), Some(0 | 1)), "{indexed:?}");
        let converted = place.convert(&upload, &LIMITS).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
        assert!(upload.exists(), "the upload is its caller's");
        let (expected, found) = (seen(root.as_std_path()), place.mounted(&converted));
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{arguments:?}");
        for (name, seen) in expected {
            assert!(found[&name] == seen, "{arguments:?}: {name}: {:?} {:?}", found[&name].mode, seen.mode);
        }
        assert_eq!(converted.unpacked.bytes, 300_000 * 4 + (6 << 20) + 106, "{arguments:?}: holes count, links don't");
    }
}

#[test]
fn capabilities_and_user_attributes_are_kept_and_marks_of_overlays_are_not() {
    let place = Place::new();
    let root = place.dir.join("tree");
    fs::create_dir_all(root.join("folder")).unwrap();
    fs::write(root.join("program"), b"x").unwrap();
    // cap_net_raw, effective: `struct vfs_cap_data` of linux/capability.h.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set(&root.join("program"), "security.capability", &capability);
    set(&root.join("program"), "user.note", &[b'n'; 300]);
    set(&root.join("folder"), "trusted.overlay.opaque", b"y");
    let upload = place.filesystem(&["-t", "ext4"], "16M");
    let converted = place.convert(&upload, &LIMITS).unwrap();
    let image = fs::read(BlobStore::open(&place.dir.join("images")).unwrap().path(&converted.blob.digest)).unwrap();
    let holds = |needle: &[u8]| image.windows(needle.len()).any(|window| window == needle);
    assert!(holds(&capability) && holds(&[b'n'; 300]), "kept");
    assert!(!holds(b"overlay.opaque"), "left out");
}

fn set(path: &Utf8Path, name: &str, value: &[u8]) {
    let (path, name) = (CString::new(path.as_str()).unwrap(), CString::new(name).unwrap());
    // SAFETY: both texts end with NUL, the value has the length that is given, and all live through the call.
    let set = unsafe { nix::libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn what_is_no_ext4_is_refused_with_what_it_is_and_what_to_do() {
    let place = Place::new();
    let at = |offset: usize, mark: &[u8]| {
        let mut bytes = vec![0; 1 << 17];
        bytes[offset..offset + mark.len()].copy_from_slice(mark);
        bytes
    };
    for (bytes, told) in [
        (vec![], "it is empty"),
        (vec![0; 1 << 17], "nothing but zeros"),
        (b"short".to_vec(), "too short"),
        (at(0, b"\x1f\x8b\x08"), "gunzip"),
        (at(0, b"QFI\xfb"), "qemu-img convert"),
        (at(0, b"hsqs"), "unsquashfs"),
        (at(0, b"LUKS\xba\xbe"), "LUKS"),
        (at(257, b"ustar"), "tar archive"),
        (at(512, b"EFI PART"), "GPT"),
        (at(510, b"\x55\xaa"), "MBR"),
        (at(1024, b"\xe2\xe1\xf5\xe0"), "EROFS"),
        (at(0, b"\x7fELF"), "/kernel"),
        (at(5, b"anything"), "no ext4"),
    ] {
        let refused = place.refusal(&bytes);
        assert!(refused.contains(told), "{told}: {refused}");
    }
}

#[test]
fn a_filesystem_that_is_cut_dirty_or_beyond_the_reader_is_refused_with_the_reason() {
    let place = Place::new();
    fs::create_dir_all(place.dir.join("tree")).unwrap();
    let upload = place.filesystem(&["-t", "ext4", "-O", "^metadata_csum"], "8M");
    let whole = fs::read(&upload).unwrap();
    assert!(place.refusal(&whole[..5 << 20]).contains("cut short"));
    let with = |feature: u32| {
        let mut bytes = whole.clone();
        let at = 1024 + 0x60;
        let features = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) | feature;
        bytes[at..at + 4].copy_from_slice(&features.to_le_bytes());
        bytes
    };
    assert!(place.refusal(&with(0x4)).contains("not unmounted cleanly"));
    assert!(place.refusal(&with(0x8)).contains("journal"));
    assert!(place.refusal(&with(0x1)).contains("compression"));
    assert!(place.refusal(&with(0x4000_0000)).contains("0x40000000"));
}

#[test]
fn a_tree_beyond_the_limits_is_refused_before_it_fills_the_disk() {
    let place = Place::new();
    let root = place.dir.join("tree");
    fs::create_dir_all(&root).unwrap();
    File::create(root.join("huge")).unwrap().set_len(15 << 40).unwrap();
    let upload = place.filesystem(&["-t", "ext4"], "16M");
    assert!(refusal(place.convert(&upload, &LIMITS)).contains("more than 1073741824 bytes together"));

    fs::remove_file(root.join("huge")).unwrap();
    for number in 0..40 {
        fs::write(root.join(format!("{number}")), b"").unwrap();
    }
    let upload = place.filesystem(&["-t", "ext4"], "16M");
    let few = Limits { entries: 30, ..LIMITS };
    assert!(refusal(place.convert(&upload, &few)).contains("more than 30 files"));
    let upload = place.filesystem(&["-t", "ext4"], "16M");
    let full = Limits { leave_free_bytes: u64::MAX, ..LIMITS };
    assert!(matches!(place.convert(&upload, &full), Err(ConvertError::DiskFull)));

    let mut deep = root.clone();
    let name = "d".repeat(200);
    nix::unistd::chdir(root.as_std_path()).unwrap();
    for _ in 0..25 {
        fs::create_dir(&name).unwrap();
        nix::unistd::chdir(name.as_str()).unwrap();
        deep.push(&name);
    }
    nix::unistd::chdir("/").unwrap();
    let upload = place.dir.join("upload");
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d", root.as_str(), upload.as_str(), "16M"]));
    assert!(refusal(place.convert(&upload, &LIMITS)).contains("a path has more than "));
}

#[test]
fn a_folder_larger_than_its_filesystem_is_refused_before_it_is_read() {
    let place = Place::new();
    fs::create_dir_all(place.dir.join("tree/folder")).unwrap();
    let upload = place.filesystem(&["-t", "ext2", "-b", "1024"], "8M");
    tamper(&upload, "set_inode_field folder size 1073741824");
    // Beyond three levels of pointers, each block of which may be the same.
    tamper(&upload, "set_inode_field folder block[TIND] 100");
    let refused = refusal(place.convert(&upload, &LIMITS));
    assert!(refused.contains("folders are larger than the filesystem"), "{refused}");
}

/// Lets `debugfs` change a filesystem.
fn tamper(upload: &Utf8Path, request: &str) {
    run(Command::new("debugfs").args(["-w", "-R", request, upload.as_str()]));
}

/// Replaces a name in a folder's block by one of the same length.
fn rename(upload: &Utf8Path, from: &[u8], to: &[u8]) {
    let mut bytes = fs::read(upload).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    fs::write(upload, bytes).unwrap();
}

#[test]
fn folders_in_a_loop_names_that_lead_out_and_names_given_twice_are_refused() {
    let place = Place::new();
    let root = place.dir.join("tree");
    fs::create_dir_all(root.join("one/two")).unwrap();
    let plain = ["-t", "ext4", "-O", "^metadata_csum,^dir_index"];
    let upload = place.filesystem(&plain, "8M");
    tamper(&upload, "link one one/two/loop");
    assert!(refusal(place.convert(&upload, &LIMITS)).contains("a folder is in two places"));

    let witness = place.dir.join("witness");
    fs::create_dir(&witness).unwrap();
    symlink(&witness, root.join("link-name")).unwrap();
    fs::create_dir(root.join("real-name")).unwrap();
    fs::write(root.join("real-name/planted"), b"x").unwrap();
    for (to, told) in [
        (&b"link-name"[..], "the same name twice"),
        (b"../escape", "a name that no file can have"),
        (b"real\0name", "a name that no file can have"),
    ] {
        let upload = place.filesystem(&plain, "8M");
        rename(&upload, b"real-name", to);
        let refused = refusal(place.convert(&upload, &LIMITS));
        assert!(refused.contains(told), "{told}: {refused}");
        assert_eq!(fs::read_dir(&witness).unwrap().count(), 0, "nothing is written through a link");
    }
}

#[test]
fn checksums_catch_a_file_whose_owner_was_changed() {
    let place = Place::new();
    let root = place.dir.join("tree");
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("file"), b"x").unwrap();
    let upload = place.filesystem(&["-t", "ext4", "-O", "metadata_csum"], "8M");
    let stat = Command::new("debugfs").args(["-R", "imap file", upload.as_str()]).output().unwrap();
    let told = String::from_utf8(stat.stdout).unwrap();
    let number = |after: &str| {
        let digits = told.split(after).nth(1).unwrap().trim_start_matches("0x");
        let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
        digits[..end].to_owned()
    };
    let block: u64 = number("located at block ").parse().unwrap();
    let offset = u64::from_str_radix(&number("offset "), 16).unwrap();
    let superblock = fs::read(&upload).unwrap();
    let block_size = 1024_u64 << u32::from_le_bytes(superblock[1024 + 0x18..1024 + 0x1C].try_into().unwrap());
    let file = File::options().write(true).open(&upload).unwrap();
    file.write_all_at(&[7], block * block_size + offset + 2).unwrap();
    let refused = refusal(place.convert(&upload, &LIMITS));
    assert!(refused.contains("checksum") && refused.contains("e2fsck"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn no_bytes_make_the_reader_panic_hang_or_write_elsewhere(
        cut in 0_usize..512 * 1024,
        is_cut in any::<bool>(),
        kind in 0_usize..3,
        flips in proptest::collection::vec((0_usize..64 * 1024, any::<u8>()), 1..40),
    ) {
        let place = Place::new();
        let root = place.dir.join("tree");
        fs::create_dir_all(root.join("folder/inner")).unwrap();
        fs::write(root.join("folder/file"), vec![1; 30_000]).unwrap();
        fs::write(root.join("folder/inner/small"), b"small").unwrap();
        symlink("../file", root.join("folder/inner/link")).unwrap();
        let arguments: &[&str] = [
            ["-t", "ext4", "-O", "^metadata_csum", "-b", "1024", "-N", "32", "-m", "0"].as_slice(),
            &["-t", "ext2", "-b", "1024", "-N", "32", "-m", "0"],
            &["-t", "ext4", "-O", "^metadata_csum,inline_data,^has_journal", "-b", "1024", "-N", "32", "-m", "0"],
        ][kind];
        let upload = place.filesystem(arguments, "2M");
        let mut bytes = fs::read(&upload).unwrap();
        // The metadata of so small a filesystem is at its beginning.
        for (at, value) in flips {
            bytes[1024 + at] = value;
        }
        if is_cut {
            bytes.truncate(cut);
        }
        fs::write(&upload, bytes).unwrap();
        let small = Limits { entries: 1000, bytes: 8 << 20, ..LIMITS };
        match place.convert(&upload, &small) {
            Ok(converted) => prop_assert!(converted.unpacked.bytes <= 8 << 20),
            Err(ConvertError::Refused(why)) => prop_assert!(!why.is_empty()),
            Err(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
    }
}
