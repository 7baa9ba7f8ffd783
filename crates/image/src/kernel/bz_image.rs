//! The kernel as its build packs it: real-mode code with a header, and the packed kernel behind it
//! (`Documentation/arch/x86/boot.rst` of Linux).

use super::{CUT_SHORT, KernelError, START, number, refused};

/// The packed kernel's size, in 16 bytes.
const SYSTEM_SIZE: usize = 0x1F4;
const SECTORS: usize = 0x1F1;
const BOOT_FLAG: usize = 0x1FE;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const LOAD_FLAGS: usize = 0x211;
const MORE_FLAGS: usize = 0x236;
const PAYLOAD: usize = 0x248;
const PAYLOAD_SIZE: usize = 0x24C;

/// The version from which on it says whether it is of 64 bits.
const OLDEST: u64 = 0x20C;
const LOADED_HIGH: u64 = 1;
const HAS_64_BITS: u64 = 1;

pub(super) fn is_one(start: &[u8; START]) -> bool {
    start[MAGIC..].starts_with(b"HdrS")
}

pub(super) fn check(start: &[u8; START], length: u64) -> Result<(), KernelError> {
    if number::<2>(start, BOOT_FLAG) != 0xAA55 {
        return refused("this bzImage is damaged: its boot sector has no mark");
    }
    let protocol = number::<2>(start, PROTOCOL);
    let (major, minor) = (protocol >> 8, protocol & 0xFF);
    if protocol < OLDEST {
        return refused(format!(
            "this kernel is too old: it has version {major}.{minor} of the boot protocol, and 2.12 is needed (Linux 3.8 or newer)"
        ));
    }
    if major != 2 {
        return refused(format!(
            "this kernel has version {major}.{minor} of the boot protocol, which isn't known here"
        ));
    }
    if number::<1>(start, LOAD_FLAGS) & LOADED_HIGH == 0 {
        return refused("this is a zImage, which is loaded low: upload a bzImage");
    }
    if number::<2>(start, MORE_FLAGS) & HAS_64_BITS == 0 {
        return refused("this kernel is of 32 bits: one for x86-64 is needed");
    }
    let sectors = match number::<1>(start, SECTORS) {
        0 => 4,
        sectors => sectors,
    };
    let packed = number::<4>(start, SYSTEM_SIZE) * 16;
    if (sectors + 1) * 512 + packed > length {
        return refused(CUT_SHORT);
    }
    let payload = number::<4>(start, PAYLOAD_SIZE);
    if payload == 0 || number::<4>(start, PAYLOAD) + payload > packed {
        return refused("this bzImage is damaged: what it says of the packed kernel can't be");
    }
    Ok(())
}
