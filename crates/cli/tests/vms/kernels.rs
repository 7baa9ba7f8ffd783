//! Kernels for tests: those that `make kernel` has fetched, and what is made of them.

use std::{fs, path::Path};

use sha2::{Digest as _, Sha256};
use tiffin_types::id::Digest;

use crate::harness::required;

/// The host's kernel, as its build links it.
pub(crate) fn vmlinux() -> Vec<u8> {
    fs::read(required("TIFFIN_KERNEL")).unwrap()
}

/// The same as its build packs it.
pub(crate) fn bz_image() -> Vec<u8> {
    fs::read(required("TIFFIN_KERNEL").with_file_name("vmlinuz")).unwrap()
}

/// The host's kernel, whose `uname -v` has [`MARK`] in it: another kernel that the same modules fit.
pub(crate) fn marked() -> Vec<u8> {
    replaced(vmlinux(), b"#1 SMP PREEMPT_DYNAMIC Debian", format!("#1 SMP PREEMPT_DYNAMIC {MARK}").as_bytes())
}

/// See [`marked`].
pub(crate) const MARK: &str = "Upload";

/// The host's kernel under another release, which no modules fit.
pub(crate) fn of_another_release() -> Vec<u8> {
    replaced(vmlinux(), b"-cloud-amd64", b"-other-amd64")
}

/// The host's kernel, which looks for the first program under names that there aren't.
pub(crate) fn without_init() -> Vec<u8> {
    replaced(vmlinux(), b"/init\0", b"/none\0")
}

/// Replaces each place where `what` stands.
fn replaced(mut kernel: Vec<u8>, what: &[u8], by: &[u8]) -> Vec<u8> {
    assert_eq!(what.len(), by.len());
    let places: Vec<usize> = memchr::memmem::find_iter(&kernel, what).collect();
    assert!(!places.is_empty(), "no {}", String::from_utf8_lossy(what));
    for at in places {
        kernel[at..at + by.len()].copy_from_slice(by);
    }
    kernel
}

/// The smallest vmlinux that passes for one: `code` is all of it, entered at its beginning in 32-bit mode.
pub(crate) fn tiny(code: &[u8]) -> Vec<u8> {
    const NOTE_AT: u64 = 64 + 2 * 56;
    const BASE: u64 = 1 << 20;
    let begin = NOTE_AT + 20;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for long in [BASE + begin, 64, 0] {
        bytes.extend(long.to_le_bytes());
    }
    bytes.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, size) in [(1_u32, 0, 4096_u64), (4, NOTE_AT, 20)] {
        bytes.extend(kind.to_le_bytes());
        bytes.extend([7, 0, 0, 0]);
        for long in [offset, BASE + offset, BASE + offset, size, size, 4] {
            bytes.extend(long.to_le_bytes());
        }
    }
    bytes.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    bytes.extend(b"Xen\0");
    bytes.extend(u32::try_from(BASE + begin).unwrap().to_le_bytes());
    bytes.extend(code);
    bytes.resize(4096, 0x90);
    bytes
}

/// Puts a kernel into a data folder, as an upload does.
pub(crate) fn keep(data_dir: &Path, kernel: &[u8]) -> Digest {
    let digest = Digest::from_sha256(Sha256::digest(kernel).into());
    let folder = data_dir.join("images/kernels");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(format!("{}.kernel", digest.hex())), kernel).unwrap();
    digest
}
