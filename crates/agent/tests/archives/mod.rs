//! Archives made byte by byte: good ones, and whatever an attacker may send.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};

const BLOCK: usize = 512;

/// A tar archive under construction.
pub(crate) struct Tar {
    bytes: Vec<u8>,
}

/// What a header says, to be bent.
pub(crate) struct Header {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) mode: u32,
    pub(crate) size: u64,
    pub(crate) link: &'static str,
}

impl Header {
    pub(crate) fn new(name: &str, kind: u8) -> Self {
        Header { name: name.into(), kind, mode: 0o644, size: 0, link: "" }
    }

    /// The header's block, in the POSIX format.
    pub(crate) fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}", self.size).as_bytes());
        put(136, format!("{:011o}", 1_500_000_000).as_bytes());
        put(148, b"        ");
        put(156, &[self.kind]);
        put(157, self.link.as_bytes());
        put(257, b"ustar\x0000");
        sign(&mut block);
        block
    }
}

/// Puts the right checksum in.
pub(crate) fn sign(block: &mut [u8; BLOCK]) {
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

impl Tar {
    pub(crate) fn new() -> Self {
        Tar { bytes: Vec::new() }
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A header and its content, padded; the size is the content's.
    pub(crate) fn entry(self, mut header: Header, content: &[u8]) -> Self {
        header.size = content.len() as u64;
        self.sized(&header, content)
    }

    /// The same with the size that the header says.
    pub(crate) fn sized(self, header: &Header, content: &[u8]) -> Self {
        let padding = vec![0; content.len().next_multiple_of(BLOCK) - content.len()];
        self.raw(&header.block()).raw(content).raw(&padding)
    }

    pub(crate) fn file(self, name: &str, content: &[u8], mode: u32) -> Self {
        self.long_name(name).entry(Header { mode, ..Header::new(name, b'0') }, content)
    }

    pub(crate) fn folder(self, name: &str) -> Self {
        self.entry(Header { mode: 0o755, ..Header::new(name, b'5') }, b"")
    }

    /// GNU's way of saying a name that doesn't fit.
    fn long_name(self, name: &str) -> Self {
        if name.len() <= 100 {
            self
        } else {
            self.entry(Header::new("././@LongLink", b'L'), format!("{name}\0").as_bytes())
        }
    }

    /// An extended header of `kind` with the records given.
    pub(crate) fn pax(self, kind: u8, records: &[(&str, &str)]) -> Self {
        let text: String = records
            .iter()
            .map(|(key, value)| {
                let rest = key.len() + value.len() + 3;
                let length =
                    (1..5).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length);
                format!("{} {key}={value}\n", length.unwrap())
            })
            .collect();
        self.entry(Header::new("pax", kind), text.as_bytes())
    }

    /// Without its end.
    pub(crate) fn bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// With its end, gzipped.
    pub(crate) fn gzip(self) -> Vec<u8> {
        gzip(&self.raw(&[0; 2 * BLOCK]).bytes)
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The names in an archive that the guest sent; links with nothing else.
pub(crate) fn listed(archive: &[u8]) -> BTreeSet<String> {
    unpacked(archive).into_keys().collect()
}

/// Names and contents of an archive that the guest sent.
pub(crate) fn unpacked(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut bytes = Vec::new();
    MultiGzDecoder::new(archive).read_to_end(&mut bytes).unwrap();
    let mut archive = tar::Archive::new(&bytes[..]);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        (name, content)
    });
    entries.collect()
}

/// Archives that must be refused: what they are, themselves, and a part of what must be said.
pub(crate) fn hostile() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = || Tar::new().file("first", b"good", 0o644);
    let link = |kind, name: &str, link| good().entry(Header { link, ..Header::new(name, kind) }, b"");
    let file = |name: &str| good().file(name, b"bad", 0o644).gzip();
    let of_kind = |kind| good().entry(Header::new("special", kind), b"").gzip();
    let whole = good().gzip();
    let noise: Vec<u8> = (0..3000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let larger = Tar::new().file("noise", &noise, 0o644).gzip();
    let mut damaged_header = Header::new("damaged", b'0').block();
    damaged_header[0] ^= 1;
    let mut unreadable_size = Header::new("size", b'0').block();
    unreadable_size[124..136].copy_from_slice(b"99999999999\0");
    sign(&mut unreadable_size);
    let mut damaged_gzip = larger.clone();
    let at = damaged_gzip.len() - 5;
    damaged_gzip[at] ^= 1;
    let long = "n".repeat(256);
    let deep = "d/".repeat(1001);
    vec![
        ("a symbolic link", link(b'2', "escaped", "/tmp").gzip(), "symbolic"),
        ("a file through a link", link(b'2', "l", "/tmp").file("l/escaped", b"x", 0o644).gzip(), "\"l\": symbolic"),
        ("a hard link", link(b'1', "escaped", "/etc/passwd").gzip(), "hard links"),
        ("a GNU long link", good().entry(Header::new("././@LongLink", b'K'), b"/tmp\0").gzip(), "symbolic"),
        ("a character device", of_kind(b'3'), "devices"),
        ("a block device", of_kind(b'4'), "devices"),
        ("a FIFO", of_kind(b'6'), "FIFO"),
        ("a contiguous file", of_kind(b'7'), "neither"),
        ("a GNU sparse file", of_kind(b'S'), "sparse"),
        ("a volume header", of_kind(b'V'), "neither"),
        ("a GNU dump folder", of_kind(b'D'), "neither"),
        ("a multi-volume part", of_kind(b'M'), "neither"),
        ("a kind nobody knows", of_kind(b'Z'), "neither"),
        ("a pax sparse file", good().pax(b'x', &[("GNU.sparse.major", "1")]).file("s", b"", 0o644).gzip(), "sparse"),
        ("an absolute name", file("/tmp/escaped"), "absolute"),
        ("a way up", file("../tmp/escaped"), ".."),
        ("a way up in the middle", file("a/../../tmp/escaped"), ".."),
        ("a way up at the end", file("a/.."), ".."),
        ("an empty name", file(""), "empty"),
        ("a file with a slash at its end", file("a/"), "name of a folder"),
        ("a file that is the folder itself", file("."), "name of a folder"),
        ("a name that is too long", file(&long), "255"),
        ("a path that is too long", file(&format!("{deep}x")), "2000"),
        ("a reserved name", file("a/.tiffin-part-0123456789abcdef"), "reserved"),
        ("a folder with content", good().entry(Header::new("f", b'5'), b"content").gzip(), "content"),
        ("a file below a file", good().file("first/x", b"x", 0o644).gzip(), "can't be a folder"),
        ("a file deep below a file", good().file("first/x/y/z", b"x", 0o644).gzip(), "can't be a folder"),
        ("a file that becomes a folder", good().folder("first/").gzip(), "can't be a folder"),
        ("a folder that becomes a file", good().folder("d/").file("d", b"", 0o644).gzip(), "can't be a file"),
        ("a file where a folder is", file("there/folder"), "is a folder: remove"),
        ("a folder where a file is", good().folder("there/file/").gzip(), "is a file: remove"),
        ("a file below what is a file", file("there/file/x"), "is a file: remove"),
        ("a file below what is a link", file("there/out/escaped"), "is a link: remove"),
        ("a pax name that leads up", good().pax(b'x', &[("path", "../escaped")]).file("ok", b"", 0o644).gzip(), ".."),
        (
            "an absolute pax name",
            good().pax(b'x', &[("path", "/tmp/escaped")]).file("ok", b"", 0o644).gzip(),
            "absolute",
        ),
        ("a pax name with a NUL", good().pax(b'x', &[("path", "a\0b")]).file("ok", b"", 0o644).gzip(), "NUL"),
        ("a pax link", good().pax(b'x', &[("linkpath", "/tmp")]).file("ok", b"", 0o644).gzip(), "links"),
        (
            "a pax size that disagrees",
            good().pax(b'x', &[("size", "0")]).file("ok", b"12345", 0o644).gzip(),
            "disagree",
        ),
        ("a pax size that is no number", good().pax(b'x', &[("size", "-1")]).file("ok", b"", 0o644).gzip(), "size"),
        ("a pax key twice", good().pax(b'x', &[("path", "a"), ("path", "b")]).file("ok", b"", 0o644).gzip(), "twice"),
        ("two pax headers", good().pax(b'x', &[]).pax(b'x', &[]).file("ok", b"", 0o644).gzip(), "two"),
        ("a pax header for nothing", good().pax(b'x', &[("path", "a")]).gzip(), "no entry behind"),
        ("a malformed pax record", good().entry(Header::new("pax", b'x'), b"99 path=a\n").gzip(), "malformed"),
        ("a pax header that is too long", good().entry(Header::new("pax", b'x'), &[b'x'; 70_000]).gzip(), "64 KiB"),
        ("a global name", good().pax(b'g', &[("path", "a")]).file("ok", b"", 0o644).gzip(), "whole archive"),
        ("a global size", good().pax(b'g', &[("size", "1")]).file("ok", b"", 0o644).gzip(), "whole archive"),
        (
            "a global header between",
            good().pax(b'x', &[]).pax(b'g', &[]).file("ok", b"", 0o644).gzip(),
            "whole archive",
        ),
        ("global headers without end", (0..17).fold(good(), |tar, _| tar.pax(b'g', &[])).gzip(), "whole archive"),
        ("two long names", file_with_two_long_names(), "two long names"),
        ("a long name for nothing", good().entry(Header::new("././@LongLink", b'L'), b"a\0").gzip(), "no entry behind"),
        (
            "a size beyond the end",
            good().sized(&Header { size: 5000, ..Header::new("f", b'0') }, b"x").gzip(),
            "cut short",
        ),
        ("a damaged header", good().raw(&damaged_header).gzip(), "checksum"),
        ("an unreadable size", good().raw(&unreadable_size).gzip(), "size"),
        ("no end", gzip(&good().bytes()), "cut short"),
        ("half a header", gzip(&[good().bytes(), vec![b'x'; 100]].concat()), "cut short"),
        ("an entry behind the end", good().raw(&[0; 1024]).file("behind", b"", 0o644).gzip(), "behind its end"),
        ("nothing", Vec::new(), "cut short"),
        ("an empty archive", gzip(b""), "cut short"),
        ("no gzip", good().raw(&[0; 1024]).bytes(), "gzip"),
        ("a zip", b"PK\x03\x04 and so on".to_vec(), "gzip"),
        ("text in gzip", gzip(&[b'x'; 600]), "checksum"),
        ("a gzip that is cut", larger[..larger.len() / 2].to_vec(), "cut short"),
        ("a gzip without its checksum", larger[..larger.len() - 8].to_vec(), "cut short"),
        ("a gzip with a wrong checksum", damaged_gzip, "gzip"),
        ("garbage behind the gzip", [&whole[..], b"garbage that is no gzip member"].concat(), "gzip"),
        ("zeros behind the gzip", [&whole[..], &[0; 100]].concat(), "gzip"),
    ]
}

fn file_with_two_long_names() -> Vec<u8> {
    let name = || Header::new("././@LongLink", b'L');
    Tar::new().entry(name(), b"a\0").entry(name(), b"b\0").file("c", b"", 0o644).gzip()
}
