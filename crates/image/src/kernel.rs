//! Kernels that clients upload: is it one, and for these machines.
//!
//! It looks at headers only and runs nothing. gVisor boots no kernel; an engine that does gets the file as it came.

use std::{fs::File, io, os::unix::fs::FileExt};

/// The file is no kernel that is taken.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Says why, for whoever uploaded it.
    #[error("{0}")]
    Refused(&'static str),
    /// The file can't be read.
    #[error("reading the kernel")]
    Io(#[from] io::Error),
}

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const LOAD: u32 = 1;
const X86_64: u16 = 62;
/// Where a bzImage says that it is one; `Documentation/arch/x86/boot.rst` of Linux.
const BOOT_MAGIC: usize = 0x202;
const BOOT_HEADER: usize = 0x250;
/// The boot protocol from which on a bzImage says how long it is.
const BOOT_PROTOCOL: u16 = 0x20A;
const LOADED_HIGH: u8 = 1;
const RELOCATABLE_64: u16 = 1;

/// Accepts an ELF executable for x86-64 (vmlinux) and a bzImage for it, whole ones.
///
/// # Errors
/// [`KernelError::Refused`] with the reason, or a failure of the disk.
pub fn check(file: &File) -> Result<(), KernelError> {
    let length = file.metadata()?.len();
    let mut start = [0; BOOT_HEADER];
    if length < start.len() as u64 {
        return Err(KernelError::Refused("the file is too short for a kernel"));
    }
    file.read_exact_at(&mut start, 0)?;
    if start.starts_with(b"\x7fELF") {
        return elf(file, &start, length);
    }
    if start[BOOT_MAGIC..].starts_with(b"HdrS") {
        return bz_image(&start, length);
    }
    Err(KernelError::Refused(match start {
        [0x1f, 0x8b, ..] => "this is compressed with gzip: unpack it first (gunzip)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "this is compressed with zstd: unpack it first (unzstd)",
        [0xfd, b'7', b'z', ..] => "this is compressed with xz: unpack it first (unxz)",
        _ => "this is no Linux kernel: upload a vmlinux (ELF) or a bzImage",
    }))
}

fn elf(file: &File, start: &[u8], length: u64) -> Result<(), KernelError> {
    let refuse = |why| Err(KernelError::Refused(why));
    let half = |at: usize| u16::from_le_bytes([start[at], start[at + 1]]);
    if start[4] != 2 || start[5] != 1 || half(18) != X86_64 {
        return refuse("this ELF file is not for x86-64");
    }
    if !matches!(half(16), 2 | 3) {
        return refuse("this ELF file is no executable: upload the vmlinux that the kernel's build links");
    }
    let (at, size, count) = (long(start, 32), usize::from(half(54)), usize::from(half(56)));
    if size != PROGRAM_HEADER || count == 0 || at < ELF_HEADER as u64 {
        return refuse("this ELF file has no program headers");
    }
    let mut headers = vec![0; size * count];
    if at.checked_add(headers.len() as u64).is_none_or(|end| end > length) {
        return refuse("the file is cut short: upload it whole");
    }
    file.read_exact_at(&mut headers, at)?;
    let mut loads = headers.chunks_exact(size).filter(|header| header[..4] == LOAD.to_le_bytes()).peekable();
    if loads.peek().is_none() {
        return refuse("this ELF file has nothing to load");
    }
    if loads.any(|header| long(header, 8).checked_add(long(header, 32)).is_none_or(|end| end > length)) {
        return refuse("the file is cut short: upload it whole");
    }
    Ok(())
}

fn bz_image(start: &[u8], length: u64) -> Result<(), KernelError> {
    let refuse = |why| Err(KernelError::Refused(why));
    let half = |at: usize| u16::from_le_bytes([start[at], start[at + 1]]);
    if half(0x206) < BOOT_PROTOCOL || start[0x211] & LOADED_HIGH == 0 {
        return refuse("this kernel is too old: Linux 2.6.31 or newer is needed");
    }
    if half(0x236) & RELOCATABLE_64 == 0 {
        return refuse("this kernel is not for x86-64");
    }
    let sectors = u64::from(if start[0x1F1] == 0 { 4 } else { start[0x1F1] });
    let system = u64::from(u32::from_le_bytes([start[0x1F4], start[0x1F5], start[0x1F6], start[0x1F7]])) * 16;
    if (sectors + 1) * 512 + system > length {
        return refuse("the file is cut short: upload it whole");
    }
    Ok(())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn checked(bytes: &[u8]) -> Result<(), String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file).map_err(|error| error.to_string())
    }

    fn bz() -> Vec<u8> {
        let mut bytes = vec![0; 2048];
        bytes[BOOT_MAGIC..BOOT_MAGIC + 4].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20F_u16.to_le_bytes());
        (bytes[0x211], bytes[0x236], bytes[0x1F1]) = (LOADED_HIGH, 1, 1);
        bytes[0x1F4] = 64;
        bytes
    }

    #[test]
    fn an_executable_of_this_machine_passes_for_a_vmlinux_unless_it_is_cut_or_of_another() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(checked(&own), Ok(()));
        let cut = checked(&own[..8192]).unwrap_err();
        assert!(cut.contains("cut short"), "{cut}");
        let mut other = own;
        other[18] = 183;
        assert!(checked(&other).unwrap_err().contains("x86-64"));
    }

    #[test]
    fn a_bz_image_is_taken_whole_only() {
        let whole = bz();
        assert_eq!(checked(&whole), Ok(()));
        assert!(checked(&whole[..1600]).unwrap_err().contains("cut short"));
        let mut old = whole.clone();
        old[0x207] = 1;
        assert!(checked(&old).unwrap_err().contains("too old"));
        let mut narrow = whole;
        narrow[0x236] = 0;
        assert!(checked(&narrow).unwrap_err().contains("x86-64"));
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_what_it_is() {
        assert!(checked(b"").unwrap_err().contains("too short"));
        assert!(checked(&[b'x'; 4096]).unwrap_err().contains("no Linux kernel"));
        let mut packed = vec![0; 4096];
        packed[..2].copy_from_slice(b"\x1f\x8b");
        assert!(checked(&packed).unwrap_err().contains("gunzip"));
    }
}
