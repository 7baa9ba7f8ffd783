//! What an upload is when it is no ext4: by its first bytes, so that the refusal can say what to do.

use std::{fs::File, io, os::unix::fs::FileExt};

/// How much of the beginning is looked at: up to the marks of ISO 9660 and Btrfs.
const LOOKED_AT: usize = 0x1_0048;

/// A mark of a format: where, which bytes, what it is and what to do.
const MARKS: [(usize, &[u8], &str); 20] = [
    (0, b"\x1f\x8b", "it is compressed with gzip: unpack it first (gunzip)"),
    (0, b"\x28\xb5\x2f\xfd", "it is compressed with zstd: unpack it first (unzstd)"),
    (0, b"\xfd7zXZ\0", "it is compressed with xz: unpack it first (unxz)"),
    (0, b"BZh", "it is compressed with bzip2: unpack it first (bunzip2)"),
    (0, b"\x04\x22\x4d\x18", "it is compressed with lz4: unpack it first (unlz4)"),
    (0, b"PK\x03\x04", "it is a zip archive: make an ext4 filesystem of what is in it (mke2fs -d)"),
    (0, b"QFI\xfb", "it is a qcow2 disk: convert it to raw (qemu-img convert -O raw) and take the partition out of it"),
    (0, b"KDMV", "it is a VMDK disk: convert it to raw (qemu-img convert -O raw) and take the partition out of it"),
    (0, b"vhdxfile", "it is a VHDX disk: convert it to raw (qemu-img convert -O raw) and take the partition out of it"),
    (0, b"hsqs", "it is a squashfs filesystem: unpack it (unsquashfs) and make an ext4 of the folder (mke2fs -d)"),
    (0, b"LUKS\xba\xbe", "it is encrypted with LUKS: open it first (cryptsetup open)"),
    (0, b"XFSB", "it is an XFS filesystem: copy its files into an ext4 (mke2fs -d)"),
    (0, b"\x7fELF", "it is a program or a kernel: kernels go to /kernel"),
    (0x202, b"HdrS", "it is a Linux kernel: kernels go to /kernel"),
    (257, b"ustar", "it is a tar archive: unpack it and make an ext4 of the folder (mke2fs -d)"),
    (
        0x200,
        b"EFI PART",
        "it is a whole disk with a GPT partition table: upload the partition with the filesystem alone",
    ),
    (
        1024,
        b"\xe2\xe1\xf5\xe0",
        "it is an EROFS filesystem: unpack it (fsck.erofs --extract) and make an ext4 of the folder (mke2fs -d)",
    ),
    (0x218, b"LVM2 001", "it is a volume of LVM: upload the logical volume with the filesystem alone"),
    (0x8001, b"CD001", "it is an ISO image of a disc: copy its files into an ext4 (mke2fs -d)"),
    (0x1_0040, b"_BHRfS_M", "it is a Btrfs filesystem: copy its files into an ext4 (mke2fs -d)"),
];

/// What else a file is that has no ext4 superblock; `None` when that can't be told.
pub(super) fn something_else(file: &File) -> io::Result<Option<&'static str>> {
    let start = beginning(file)?;
    if start.is_empty() {
        return Ok(Some("it is empty"));
    }
    let marked = |(at, mark, what): &(usize, &[u8], &'static str)| start.get(*at..)?.starts_with(mark).then_some(*what);
    if let Some(what) = MARKS.iter().find_map(marked) {
        return Ok(Some(what));
    }
    if start.get(510..512) == Some(b"\x55\xaa") {
        return Ok(Some(
            "it is a whole disk with a partition table (MBR), or a FAT filesystem: upload an ext4 filesystem alone",
        ));
    }
    Ok(start.iter().all(|byte| *byte == 0).then_some("it begins with nothing but zeros"))
}

fn beginning(file: &File) -> io::Result<Vec<u8>> {
    let mut start = vec![0; LOOKED_AT];
    let mut read = 0;
    while read < start.len() {
        match file.read_at(&mut start[read..], read as u64)? {
            0 => break,
            count => read += count,
        }
    }
    start.truncate(read);
    Ok(start)
}
