//! Layers of container images become one filesystem, as the kernel shows it; what is no image is refused with the reason,
//! and no bytes whatever do harm.
#![allow(clippy::unwrap_used)] // A failure of the set-up is a failure of the test.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
    process::Command,
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use flate2::{Compression, write::GzEncoder};
use proptest::prelude::*;
use sha2::Digest as _;
use tar::{EntryType, Header};
use tiffin_image::{
    blob::BlobStore,
    convert::{ConvertError, Converter, Limits},
    layers::{Assembled, Layer},
};
use tiffin_types::id::Digest;

const LIMITS: Limits =
    Limits { entries: 20_000, bytes: 1 << 30, leave_free_bytes: 1 << 20, time: Duration::from_secs(120) };

/// A layer that is being made.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// An entry whose name is written as it is, unlike the builder does.
    fn entry(mut self, kind: EntryType, name: &str, link: &str, content: &[u8], mode: u32, owner: (u64, u64)) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(1_600_000_000);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, name, "", content.as_bytes(), 0o644, (0, 0))
    }

    fn folder(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"", 0o755, (0, 0))
    }

    fn link(self, name: &str, to: &str) -> Self {
        self.entry(EntryType::Symlink, name, to, b"", 0o777, (0, 0))
    }

    fn same(self, name: &str, to: &str) -> Self {
        self.entry(EntryType::Link, name, to, b"", 0o644, (0, 0))
    }

    /// The next entry has these extended attributes and other things said of it.
    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(sha2::Sha256::digest(bytes).into())
}

/// A way to compress a layer.
type Pack = fn(&[u8]) -> Vec<u8>;

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

    /// Assembles archives that are packed in that way.
    fn packed(&self, layers: &[Vec<u8>], pack: Pack, limits: &Limits) -> Result<Assembled, ConvertError> {
        let layers: Vec<Layer> = layers
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                let file = self.dir.join(format!("layer-{index}"));
                fs::write(&file, pack(bytes)).unwrap();
                Layer { file, diff_id: digest(bytes) }
            })
            .collect();
        self.assemble(&layers, limits)
    }

    fn assemble(&self, layers: &[Layer], limits: &Limits) -> Result<Assembled, ConvertError> {
        let store = self.store();
        let work = self.dir.join("work");
        let assembled = Converter::in_process().assemble(layers, &work, &store, limits, &mut |_| {});
        assert!(!work.exists(), "the work folder is removed");
        if assembled.is_err() {
            assert_eq!(store.list().unwrap(), [], "nothing is left of what failed");
        }
        assembled
    }

    fn store(&self) -> BlobStore {
        BlobStore::open(&self.dir.join("images")).unwrap()
    }

    /// What the image has, as the kernel shows it.
    fn seen(&self, layers: Vec<Tar>) -> BTreeMap<String, Seen> {
        let layers: Vec<Vec<u8>> = layers.into_iter().map(Tar::bytes).collect();
        let assembled = self.packed(&layers, gzip, &LIMITS).unwrap();
        mounted(&self.store().path(&assembled.blob.digest), &self.dir.join("out"), seen)
    }
}

fn mounted<T>(image: &Utf8Path, at: &Utf8Path, look: impl FnOnce(&Path) -> T) -> T {
    fs::create_dir_all(at).unwrap();
    run(Command::new("fsck.erofs").arg(image.as_str()));
    run(Command::new("mount").args(["-t", "erofs", "-o", "ro,loop,nodev", image.as_str(), at.as_str()]));
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(at.as_std_path())));
    run(Command::new("umount").arg(at.as_str()));
    found.unwrap()
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
    mtime: i64,
    content: String,
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
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            let one = Seen {
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                links: metadata.nlink(),
                mtime: metadata.mtime(),
                content: String::from_utf8_lossy(&content).into_owned(),
            };
            found.insert(name, one);
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

fn names(seen: &BTreeMap<String, Seen>) -> Vec<&str> {
    seen.keys().map(String::as_str).collect()
}

fn refusal(layers: &[Vec<u8>]) -> String {
    match Place::new().packed(layers, gzip, &LIMITS).unwrap_err() {
        ConvertError::Refused(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn owners_modes_times_links_and_attributes_are_kept() {
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = Tar::new()
        .entry(EntryType::Directory, "./bin/", "", b"", 0o1777, (3, 4))
        .pax(&[
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.note", b"x"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ])
        .entry(EntryType::Regular, "bin/su", "", b"program", 0o4755, (0, 70_000))
        .same("bin/doas", "bin/su")
        .link("bin/up", "../../../etc/passwd")
        .entry(EntryType::Fifo, "pipe", "", b"", 0o600, (0, 0))
        .entry(EntryType::Char, "null", "", b"", 0o666, (0, 0))
        .pax(&[("path", "x".repeat(200).as_bytes())])
        .file("short", "long");
    let place = Place::new();
    let assembled = place.packed(&[layer.bytes()], gzip, &LIMITS).unwrap();
    let (found, xattrs) = mounted(&place.store().path(&assembled.blob.digest), &place.dir.join("out"), |root| {
        let list = Command::new("python3")
            .args([
                "-c",
                "import os,sys; p=sys.argv[1]; print(sorted((n, os.getxattr(p, n).hex()) for n in os.listxattr(p)))",
            ])
            .arg(root.join("bin/su"))
            .output()
            .unwrap();
        (seen(root), String::from_utf8(list.stdout).unwrap())
    });
    assert_eq!(names(&found), ["bin", "bin/doas", "bin/su", "bin/up", "pipe", &"x".repeat(200)]);
    let su = Seen { mode: 0o104_755, owner: (0, 70_000), links: 2, mtime: 1_600_000_000, content: "program".into() };
    assert_eq!((&found["bin/su"], &found["bin/doas"]), (&su, &su));
    assert_eq!((found["bin"].mode, found["bin"].owner, found["bin"].links), (0o041_777, (3, 4), 2));
    assert_eq!(found["bin/up"].content, "../../../etc/passwd");
    assert_eq!(xattrs.trim(), format!("[('security.capability', '{}'), ('user.note', '78')]", hex::encode(capability)));
}

#[test]
fn later_layers_replace_join_and_remove() {
    let low = Tar::new()
        .folder("a")
        .file("a/kept", "low")
        .file("a/replaced", "low")
        .file("a/removed", "low")
        .file("b/old", "low")
        .file("c/old", "low")
        .file("file", "low")
        .file("d/inside", "low")
        .same("a/linked", "a/replaced");
    let high = Tar::new()
        .file("a/replaced", "high")
        // Marks count first, wherever they stand.
        .file("b/new", "high")
        .file("b/.wh..wh..opq", "")
        .file("a/.wh.removed", "")
        .file("a/.wh.never-there", "")
        .file(".wh.c", "")
        .file("c/new", "high")
        .file("file/now-a-folder", "high");
    assert!(
        refusal(&[low.bytes(), high.bytes()])
            .contains("layer 2: entry `file/now-a-folder`: a part of its path is a file")
    );

    let low = Tar::new().file("a/kept", "low").file("a/replaced", "low").file("a/removed", "low").file("b/old", "low");
    let low = low.file("c/old", "low").file("file", "low").file("d/inside", "low").same("a/linked", "a/replaced");
    let high = Tar::new().file("a/replaced", "high").file("b/new", "high").file("b/.wh..wh..opq", "");
    let high = high.file("a/.wh.removed", "").file("a/.wh.never-there", "").file(".wh.c", "").file("c/new", "high");
    let high = high.folder("file").file("file/inside", "high").file("d", "high").same("e", "a/kept");
    let found = Place::new().seen(vec![low, high]);
    let all = ["a", "a/kept", "a/linked", "a/replaced", "b", "b/new", "c", "c/new", "d", "e", "file", "file/inside"];
    assert_eq!(names(&found), all);
    assert_eq!((&*found["a/replaced"].content, &*found["a/linked"].content), ("high", "low"));
    assert_eq!((found["a/kept"].links, found["e"].links, found["a/linked"].links), (2, 2, 1));
}

#[test]
fn links_on_the_way_lead_inside_the_image_only() {
    let low =
        Tar::new().folder("usr/lib").link("lib", "usr/lib").link("out", "../../../../elsewhere").link("abs", "/usr");
    let high = Tar::new().file("lib/so", "1").file("out/x", "2").file("abs/y", "3");
    let found = Place::new().seen(vec![low, high]);
    assert_eq!(
        names(&found),
        ["abs", "elsewhere", "elsewhere/x", "lib", "out", "usr", "usr/lib", "usr/lib/so", "usr/y"]
    );
    assert!(!Path::new("/elsewhere").exists());
}

#[test]
fn many_names_long_names_and_large_files_survive() {
    let mut layer = Tar::new();
    for number in 0..3000 {
        layer = layer.file(&format!("many/{number:04}-{}", "n".repeat(number % 60)), &number.to_string());
    }
    let large: String = (0..300_000).map(|number| format!("{number:07}\n")).collect();
    let layer =
        layer.file("large", &large).link("long-link", &"l/".repeat(49)).file("!before-dots", "").file("empty", "");
    let found = Place::new().seen(vec![layer]);
    assert_eq!(found.len(), 3005);
    for number in [0, 1, 1499, 2999] {
        assert_eq!(found[&format!("many/{number:04}-{}", "n".repeat(number % 60))].content, number.to_string());
    }
    assert_eq!(found["large"].content, large);
    assert_eq!(found["long-link"].content, "l/".repeat(49));
}

#[test]
fn what_the_tools_write_is_read_sparse_files_too() {
    let place = Place::new();
    let tree = place.dir.join("tree");
    fs::create_dir_all(tree.join("deep").join("d".repeat(120))).unwrap();
    fs::write(tree.join("deep").join("d".repeat(120)).join("e".repeat(120)), "deep").unwrap();
    let sparse = fs::File::create(tree.join("sparse")).unwrap();
    for at in [0_u64, 300_000, 5_000_000] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"island", at).unwrap();
    }
    sparse.set_len(9_000_001).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=posix"],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
    ] {
        let archive = place.dir.join("archive");
        run(Command::new("tar").args(["--sparse", "-cf", archive.as_str(), "-C", tree.as_str()]).args(format).arg("."));
        let bytes = fs::read(&archive).unwrap();
        assert!(bytes.len() < 1_000_000, "{format:?} is sparse");
        let assembled = place.packed(&[bytes], |bytes| bytes.to_vec(), &LIMITS).unwrap();
        mounted(&place.store().path(&assembled.blob.digest), &place.dir.join("out"), |root| {
            assert!(fs::read(root.join("sparse")).unwrap() == fs::read(tree.join("sparse")).unwrap(), "{format:?}");
            assert_eq!(fs::read(root.join("deep").join("d".repeat(120)).join("e".repeat(120))).unwrap(), b"deep");
        });
        assert_eq!(assembled.unpacked.bytes, 9_000_005);
    }
}

#[test]
fn each_compression_gives_the_same_image() {
    let layers = [
        Tar::new().file("a", &"content ".repeat(100_000)).bytes(),
        Tar::new().file("etc/passwd", "node:x:7:8::/:\n").bytes(),
    ];
    let members = |bytes: &[u8]| [gzip(&bytes[..700]), gzip(&bytes[700..])].concat();
    let frames = |bytes: &[u8]| {
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        [skipped.clone(), zstd(&bytes[..600]), skipped.clone(), zstd(&bytes[600..]), skipped].concat()
    };
    let ways: [Pack; 5] = [<[u8]>::to_vec, gzip, zstd, members, frames];
    let images = ways.map(|way| Place::new().packed(&layers, way, &LIMITS).unwrap());
    assert!(images.iter().all(|image| *image == images[0]), "{images:?}");
    assert_eq!(images[0].unpacked.bytes, 800_000 + 15);
}

#[test]
fn an_image_without_layers_is_empty() {
    let place = Place::new();
    let assembled = place.packed(&[], gzip, &LIMITS).unwrap();
    assert_eq!(assembled.unpacked.entries, 1);
    assert!(mounted(&place.store().path(&assembled.blob.digest), &place.dir.join("out"), seen).is_empty());
}

#[test]
fn tricks_are_refused_by_name() {
    let one = |layer: Tar| refusal(&[layer.bytes()]);
    assert!(one(Tar::new().file("a/../../etc/passwd", "")).contains("`a/../../etc/passwd`: its path has `..`"));
    assert!(one(Tar::new().same("a", "../outside")).contains("`..`"));
    assert!(one(Tar::new().same("a", "/etc/passwd")).contains("isn't in the image"));
    assert!(one(Tar::new().folder("d").same("a", "d")).contains("hard link to a folder"));
    assert!(one(Tar::new().link("a", "b").link("b", "a").file("a/x", "")).contains("circle"));
    assert!(one(Tar::new().file("a", "").file("a/b", "")).contains("is a file"));
    assert!(one(Tar::new().file(".wh...", "")).contains("removes nothing"));
    assert!(one(Tar::new().file(".wh.a/b", "")).contains("inside a mark"));
    assert!(one(Tar::new().link("a", "")).contains("link to nothing"));
    assert!(one(Tar::new().link(".", "a")).contains("the root must be a folder"));
    assert!(
        one(Tar::new().pax(&[("SCHILY.xattr.user.big", &[7; 5000])]).file("a", "")).contains("extended attributes")
    );
    assert!(one(Tar::new().pax(&[("path", &[b'a'; 300])]).file("a", "")).contains("255"));
    assert!(one(Tar::new().pax(&[("path", "a/".repeat(2100).as_bytes())]).file("a", "")).contains("4095"));
    assert!(one(Tar::new().entry(EntryType::new(b'Q'), "odd", "", b"", 0o644, (0, 0))).contains("`odd`: its type"));
    // A link to a folder of the host of that name is one to itself, in the image.
    let layers = [Tar::new().link("etc", "/etc").bytes(), Tar::new().file("etc/passwd", "x").bytes()];
    assert!(refusal(&layers).contains("circle"));
}

#[test]
fn damaged_and_cut_layers_are_refused() {
    let bytes = Tar::new().file("a", &"x".repeat(5000)).bytes();
    let place = Place::new();
    let file = place.dir.join("layer");
    let refused = |content: &[u8], diff_id: &[u8]| {
        fs::write(&file, content).unwrap();
        let layer = Layer { file: file.clone(), diff_id: digest(diff_id) };
        place.assemble(&[layer], &LIMITS).unwrap_err().to_string()
    };
    assert!(refused(&gzip(&bytes), b"other").contains("the image's configuration says"));
    assert!(refused(&gzip(&bytes)[..60], &bytes).contains("damaged or cut short"));
    assert!(refused(&bytes[..3000], &bytes).contains("cut short"));
    assert!(refused(&zstd(&bytes)[..20], &bytes).contains("layer 1"));
    assert!(refused(b"BZh91AY&SY", &bytes).contains("bzip2"));
    assert!(refused(&[7; 2048], &bytes).contains("no tar archive"));
    let mut broken = bytes.clone();
    broken[3] ^= 1;
    assert!(refused(&broken, &broken).contains("checksum"));
}

#[test]
fn bombs_meet_limits_before_the_disk_does() {
    let refused =
        |layers: &[Vec<u8>], limits: &Limits| Place::new().packed(layers, gzip, limits).unwrap_err().to_string();
    let entries = Limits { entries: 10, ..LIMITS };
    let eleven: Tar = (0..11).fold(Tar::new(), |tar, number| tar.file(&number.to_string(), ""));
    assert!(refused(&[eleven.bytes()], &entries).contains("more than 10 entries"));
    let bytes = Limits { bytes: 1 << 20, ..LIMITS };
    assert!(refused(&[Tar::new().file("a", &"x".repeat(2 << 20)).bytes()], &bytes).contains("1048576 bytes"));
    let halves = ["a", "b"].map(|name| Tar::new().file(name, &"x".repeat(600 << 10)).bytes());
    assert!(refused(&halves, &bytes).contains("together"));
    // A hole counts as what it is where the image is read.
    let hole = Tar::new().pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"99999999999")]).file("a", "x");
    assert!(refused(&[hole.bytes()], &LIMITS).contains("more than 1073741824 bytes"));
    let room = Limits { leave_free_bytes: u64::MAX, ..LIMITS };
    let full = Place::new().packed(&[Tar::new().file("a", "").bytes()], gzip, &room);
    assert!(matches!(full, Err(ConvertError::DiskFull)), "{full:?}");
}

#[derive(Debug, Clone)]
enum Piece {
    File(String, String),
    Folder(String),
    Link(String, String),
    Same(String, String),
    Raw(Vec<u8>),
}

fn piece() -> impl Strategy<Value = Piece> {
    let name = || "(a|b|c|\\.wh\\.a|\\.wh\\.\\.wh\\.\\.opq|\\.\\.|\\.)(/(a|b|\\.wh\\.b|\\.\\.|)){0,3}";
    prop_oneof![
        (name(), "[a-z]{0,9}").prop_map(|(name, content)| Piece::File(name, content)),
        name().prop_map(Piece::Folder),
        (name(), name()).prop_map(|(name, to)| Piece::Link(name, to)),
        (name(), name()).prop_map(|(name, to)| Piece::Same(name, to)),
        proptest::collection::vec(any::<u8>(), 1..600).prop_map(Piece::Raw),
    ]
}

fn built(pieces: &[Piece]) -> Vec<u8> {
    let (mut tar, mut raw) = (Tar::new(), Vec::new());
    for piece in pieces {
        tar = match piece {
            Piece::File(name, content) => tar.file(name, content),
            Piece::Folder(name) => tar.folder(name),
            Piece::Link(name, to) => tar.link(name, to),
            Piece::Same(name, to) => tar.same(name, to),
            Piece::Raw(bytes) => {
                raw.extend(bytes);
                tar
            }
        };
    }
    let mut bytes = tar.bytes();
    let at = raw.first().map_or(0, |byte| usize::from(*byte) * 7 % bytes.len());
    let end = (at + raw.len()).min(bytes.len());
    bytes[at..end].copy_from_slice(&raw[..end - at]);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_layers_are_a_sound_image_or_refused(layers in proptest::collection::vec(proptest::collection::vec(piece(), 0..8), 1..4)) {
        let place = Place::new();
        let layers: Vec<Vec<u8>> = layers.iter().map(|pieces| built(pieces)).collect();
        match place.packed(&layers, <[u8]>::to_vec, &LIMITS) {
            Ok(assembled) => {
                let path = place.store().path(&assembled.blob.digest);
                let checked = Command::new("fsck.erofs").arg("--extract").arg(path.as_str()).output().unwrap();
                prop_assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
            }
            Err(ConvertError::Refused(_)) => {}
            Err(other) => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn any_bytes_are_a_layer_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000), packed in 0..3) {
        let head: &[u8] = match packed { 0 => &[0x1f, 0x8b, 8, 0], 1 => &[0x28, 0xb5, 0x2f, 0xfd], _ => &[] };
        let bytes = [head, &bytes].concat();
        let result = Place::new().packed(&[bytes], <[u8]>::to_vec, &LIMITS);
        prop_assert!(matches!(result, Ok(_) | Err(ConvertError::Refused(_))), "{:?}", result);
    }
}
