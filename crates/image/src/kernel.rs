//! Kernels that clients upload: is it one, and can the machines here boot it.
//!
//! It looks at headers only and runs nothing: what stands in the headers is believed by whoever loads the kernel, so all of
//! it must lie in the file. A kernel that passes may still not boot; that is told when a VM tries. gVisor boots none; an
//! engine that does gets the file as it came.

mod bz_image;
mod elf;

use std::{borrow::Cow, fs::File, io, os::unix::fs::FileExt};

/// The file is no kernel that is taken.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Says why, and what to do, for whoever uploaded it.
    #[error("{0}")]
    Refused(Cow<'static, str>),
    /// The file can't be read.
    #[error("reading the kernel")]
    Io(#[from] io::Error),
}

/// What is looked at first: every header that both forms of kernels begin with.
const START: usize = 0x280;

const CUT_SHORT: &str = "the file is cut short: upload it whole";

/// Accepts an ELF executable for x86-64 that can be entered by PVH (vmlinux), and a bzImage for x86-64; whole ones.
///
/// # Errors
/// [`KernelError::Refused`] with the reason, or a failure of the disk.
pub fn check(file: &File) -> Result<(), KernelError> {
    let length = file.metadata()?.len();
    let mut start = [0; START];
    if length < START as u64 {
        return refused("the file is too short for a kernel");
    }
    file.read_exact_at(&mut start, 0)?;
    if start.starts_with(b"\x7fELF") {
        return elf::check(file, &start, length);
    }
    if bz_image::is_one(&start) {
        return bz_image::check(&start, length);
    }
    refused(match start {
        [0x1f, 0x8b, ..] => "this is compressed with gzip: unpack it first (gunzip)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "this is compressed with zstd: unpack it first (unzstd)",
        [0xfd, b'7', b'z', ..] => "this is compressed with xz: unpack it first (unxz)",
        [b'B', b'Z', b'h', ..] => "this is compressed with bzip2: unpack it first (bunzip2)",
        [0x02, 0x21, 0x4c, 0x18, ..] | [0x04, 0x22, 0x4d, 0x18, ..] => {
            "this is compressed with LZ4: unpack it first (unlz4)"
        }
        _ if start[0x38..].starts_with(b"ARM\x64") => "this kernel is for arm64: one for x86-64 is needed",
        _ => "this is no Linux kernel: upload a vmlinux (ELF) or a bzImage",
    })
}

fn refused(why: impl Into<Cow<'static, str>>) -> Result<(), KernelError> {
    Err(KernelError::Refused(why.into()))
}

/// The little-endian number of `N` bytes (at most 8) there; 0 beyond the end.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    if let Some(found) = bytes.get(at..at.saturating_add(N)) {
        value[..N].copy_from_slice(found);
    }
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests;
