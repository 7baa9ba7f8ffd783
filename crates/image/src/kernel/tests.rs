use std::io::Write;

use proptest::{prelude::*, sample::Index};

use super::*;

fn checked(bytes: &[u8]) -> Result<(), String> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    check(&file).map_err(|error| error.to_string())
}

#[track_caller]
fn refused_as(bytes: &[u8], word: &str) {
    let said = checked(bytes).unwrap_err();
    assert!(said.contains(word), "{word}: {said}");
}

fn with(bytes: &[u8], at: usize, put: &[u8]) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    changed[at..at + put.len()].copy_from_slice(put);
    changed
}

const NOTES_AT: usize = 64 + 2 * 56;

/// The smallest vmlinux: one segment, all of the file at 1 MiB, and the note within it.
fn vmlinux() -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for long in [0_u64, 64, 0] {
        bytes.extend(long.to_le_bytes());
    }
    bytes.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, address, size) in [(1_u32, 0_u64, 1 << 20, 0x400_u64), (4, NOTES_AT as u64, 0, 44)] {
        bytes.extend(kind.to_le_bytes());
        bytes.extend([7, 0, 0, 0]);
        for long in [offset, 0xffff_ffff_8000_0000, address, size, size, 4] {
            bytes.extend(long.to_le_bytes());
        }
    }
    for (kind, owner, value) in [(1_u32, *b"GNU\0", [0; 4]), (18, *b"Xen\0", (0x10_0200_u32).to_le_bytes())] {
        bytes.extend([4, 0, 0, 0, 4, 0, 0, 0]);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(owner);
        bytes.extend(value);
    }
    bytes.resize(0x400, 0xf4);
    bytes
}

fn bz() -> Vec<u8> {
    let bytes = vec![0; 2048];
    let bytes = with(&bytes, 0x1F1, &[1]);
    let bytes = with(&bytes, 0x1F4, &64_u32.to_le_bytes());
    let bytes = with(&bytes, 0x1FE, &[0x55, 0xAA]);
    let bytes = with(&bytes, 0x202, b"HdrS\x0f\x02");
    let bytes = with(&bytes, 0x211, &[1]);
    let bytes = with(&bytes, 0x236, &[1]);
    with(&bytes, 0x24C, &900_u32.to_le_bytes())
}

#[test]
fn a_vmlinux_is_taken_whole_and_for_this_machine_only() {
    let whole = vmlinux();
    assert_eq!(checked(&whole), Ok(()));
    refused_as(&whole[..0x3f0], "cut short");
    refused_as(&with(&whole, 4, &[1]), "32 bits");
    refused_as(&with(&whole, 5, &[2]), "another machine");
    refused_as(&with(&whole, 18, &[183]), "another machine");
    refused_as(&with(&whole, 16, &[1]), "a module");
    refused_as(&with(&whole, 16, &[3]), "a program");
    refused_as(&with(&whole, 54, &[32]), "no program headers");
    refused_as(&with(&whole, 56, &[0xff, 0xff]), "too many program headers");
    refused_as(&with(&whole, 32, &u64::MAX.to_le_bytes()), "cut short");
    refused_as(&with(&whole, 64, &[6]), "nothing to load");
    refused_as(&with(&whole, 64 + 8, &u64::MAX.to_le_bytes()), "cut short");
    refused_as(&with(&whole, 64 + 24, &(u64::MAX - 9).to_le_bytes()), "first 4 GiB");
    refused_as(&with(&whole, 64 + 40, &3_u64.to_le_bytes()), "first 4 GiB");
}

#[test]
fn a_vmlinux_that_cant_be_entered_by_pvh_is_refused_with_the_remedy() {
    let whole = vmlinux();
    let second = NOTES_AT + 20;
    refused_as(&with(&whole, second + 12, b"Yen"), "CONFIG_PVH");
    refused_as(&with(&whole, second + 8, &[17]), "CONFIG_PVH");
    refused_as(&with(&whole, second + 4, &[3]), "CONFIG_PVH");
    refused_as(&with(&whole, NOTES_AT, &u32::MAX.to_le_bytes()), "CONFIG_PVH");
    refused_as(&with(&whole, 64 + 56, &[6]), "CONFIG_PVH");
    refused_as(&with(&whole, second + 16, &u32::MAX.to_le_bytes()), "damaged");
    let own = std::fs::read("/proc/self/exe").unwrap();
    assert!(checked(&own).is_err(), "a program of userspace is no kernel");
}

#[test]
fn a_bz_image_is_taken_whole_and_for_this_machine_only() {
    let whole = bz();
    assert_eq!(checked(&whole), Ok(()));
    refused_as(&whole[..1600], "cut short");
    refused_as(&with(&whole, 0x206, &[0x0b, 2]), "too old: it has version 2.11");
    refused_as(&with(&whole, 0x206, &[0, 3]), "3.0");
    refused_as(&with(&whole, 0x211, &[0]), "zImage");
    refused_as(&with(&whole, 0x236, &[0]), "32 bits");
    refused_as(&with(&whole, 0x1FE, &[0]), "damaged");
    refused_as(&with(&whole, 0x248, &u32::MAX.to_le_bytes()), "damaged");
    refused_as(&with(&whole, 0x24C, &[0; 4]), "damaged");
    refused_as(&with(&whole, 0x1F4, &u32::MAX.to_le_bytes()), "cut short");
}

#[test]
fn what_is_no_kernel_is_refused_with_what_it_is() {
    refused_as(b"", "too short");
    refused_as(&[b'x'; 4096], "no Linux kernel");
    let packed = |magic: &[u8]| with(&[0; 4096], 0, magic);
    for (magic, tool) in [
        (&b"\x1f\x8b"[..], "gunzip"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
        (b"\xfd7zXZ", "unxz"),
        (b"BZh9", "bunzip2"),
        (b"\x02\x21\x4c\x18", "unlz4"),
    ] {
        refused_as(&packed(magic), tool);
    }
    refused_as(&with(&[0; 4096], 0x38, b"ARM\x64"), "arm64");
}

/// What was accepted must be loadable: every segment in the file, or the packed kernel.
fn is_sound(bytes: &[u8]) -> bool {
    let length = bytes.len() as u64;
    if !bytes.starts_with(b"\x7fELF") {
        return (1 + number::<1>(bytes, 0x1F1)) * 512 + number::<4>(bytes, 0x1F4) * 16 <= length;
    }
    let at = usize::try_from(number::<8>(bytes, 32)).unwrap();
    let count = usize::try_from(number::<2>(bytes, 56)).unwrap();
    (0..count).map(|index| &bytes[at + index * 56..]).filter(|header| number::<4>(header, 0) == 1).all(|header| {
        number::<8>(header, 8).checked_add(number::<8>(header, 32)).is_some_and(|end| end <= length)
            && number::<8>(header, 24).checked_add(number::<8>(header, 40)).is_some_and(|end| end <= 1 << 32)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_header_however_changed_or_cut_panics_or_leads_out_of_the_file(
        is_elf in any::<bool>(),
        changes in proptest::collection::vec((any::<Index>(), prop_oneof![Just(0), Just(0xff), any::<u8>()]), 0..12),
        cut in proptest::option::of(any::<Index>()),
    ) {
        let mut bytes = if is_elf { vmlinux() } else { bz() };
        let headers = 0x280;
        for (at, byte) in changes {
            bytes[at.index(headers)] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        match checked(&bytes) {
            Ok(()) => prop_assert!(is_sound(&bytes)),
            Err(why) => prop_assert!(!why.is_empty() && !why.contains("reading"), "{why}"),
        }
    }

    #[test]
    fn any_bytes_behind_a_magic_number_are_judged(
        magic in prop_oneof![Just(&b"\x7fELF\x02\x01"[..]), Just(&b""[..])],
        rest in proptest::collection::vec(any::<u8>(), 0..3000),
    ) {
        // Random bytes are never a whole kernel; what matters is that it returns.
        prop_assert!(checked(&[magic, &rest].concat()).is_err());
    }
}
