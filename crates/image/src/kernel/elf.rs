//! The kernel as its build links it. Machines without a BIOS enter it by PVH: at the address in a note of the kernel's, in
//! 32-bit mode (`Documentation/arch/x86/` and Xen's `pvh.markdown`).

use std::{fs::File, os::unix::fs::FileExt};

use super::{CUT_SHORT, KernelError, START, number, refused};

const HEADER: u64 = 64;
const PROGRAM_HEADER: usize = 56;
/// More program headers than these has no kernel.
const HEADERS: usize = 64;
/// A kernel's notes are some hundred bytes.
const NOTES: u64 = 64 * 1024;

const CLASS: usize = 4;
const ENCODING: usize = 5;
const BITS_32: u8 = 1;
const BITS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const EXECUTABLE: u64 = 2;
const X86_64: u64 = 62;
const LOAD: u64 = 1;
const NOTE: u64 = 4;

/// XEN_ELFNOTE_PHYS32_ENTRY, of the owner "Xen".
const ENTRY_NOTE: u64 = 18;
const OWNER: &[u8] = b"Xen\0";
/// In 32-bit mode there is no more.
const MEMORY_END: u64 = 1 << 32;

/// A program header, as far as it matters.
struct Segment {
    kind: u64,
    offset: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
}

impl Segment {
    fn read(header: &[u8]) -> Self {
        Self {
            kind: number::<4>(header, 0),
            offset: number::<8>(header, 8),
            address: number::<8>(header, 24),
            in_file: number::<8>(header, 32),
            in_memory: number::<8>(header, 40),
        }
    }

    fn is_within(&self, length: u64) -> bool {
        self.offset.checked_add(self.in_file).is_some_and(|end| end <= length)
    }

    fn fits_memory(&self) -> bool {
        self.in_file <= self.in_memory && self.address.checked_add(self.in_memory).is_some_and(|end| end <= MEMORY_END)
    }

    fn holds(&self, address: u64) -> bool {
        self.kind == LOAD && address.checked_sub(self.address).is_some_and(|offset| offset < self.in_file)
    }
}

pub(super) fn check(file: &File, start: &[u8; START], length: u64) -> Result<(), KernelError> {
    let machine = number::<2>(start, 18);
    match (start[CLASS], start[ENCODING], machine) {
        (BITS_64, LITTLE_ENDIAN, X86_64) => {}
        (BITS_32, ..) => return refused("this ELF file is of 32 bits: one for x86-64 is needed"),
        _ => return refused("this ELF file is for another machine: one for x86-64 is needed"),
    }
    if number::<2>(start, 16) != EXECUTABLE {
        return refused(
            "this ELF file is no kernel, but a module, a library or a program: upload the vmlinux that the kernel's build links",
        );
    }
    let segments = segments(file, start, length)?;
    if !segments.iter().any(|segment| segment.kind == LOAD) {
        return refused("this ELF file has nothing to load");
    }
    for segment in segments.iter().filter(|segment| matches!(segment.kind, LOAD | NOTE)) {
        if !segment.is_within(length) {
            return refused(CUT_SHORT);
        }
        if segment.kind == LOAD && !segment.fits_memory() {
            return refused("this ELF file is no kernel: it isn't loaded to the first 4 GiB of memory");
        }
    }
    match entry(file, &segments)? {
        None => refused(
            "this kernel can't be entered by PVH, as it has no note that says where: build it with CONFIG_PVH=y, or upload its bzImage",
        ),
        Some(entry) if segments.iter().any(|segment| segment.holds(entry)) => Ok(()),
        Some(_) => refused("this kernel is damaged: its PVH note leads to where nothing is loaded"),
    }
}

fn segments(file: &File, start: &[u8; START], length: u64) -> Result<Vec<Segment>, KernelError> {
    let refuse = |why: &'static str| Err(KernelError::Refused(why.into()));
    let (at, count) = (number::<8>(start, 32), number::<2>(start, 56));
    if number::<2>(start, 54) != PROGRAM_HEADER as u64 || count == 0 || at < HEADER {
        return refuse("this ELF file has no program headers");
    }
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > HEADERS {
        return refuse("this ELF file is no kernel: it has too many program headers");
    }
    let mut headers = vec![0; PROGRAM_HEADER * count];
    if at.checked_add(headers.len() as u64).is_none_or(|end| end > length) {
        return refuse(CUT_SHORT);
    }
    file.read_exact_at(&mut headers, at)?;
    Ok(headers.chunks_exact(PROGRAM_HEADER).map(Segment::read).collect())
}

/// Where the kernel is entered by PVH, if it can be.
fn entry(file: &File, segments: &[Segment]) -> Result<Option<u64>, KernelError> {
    for segment in segments.iter().filter(|segment| segment.kind == NOTE) {
        let mut notes = vec![0; usize::try_from(segment.in_file.min(NOTES)).unwrap_or_default()];
        file.read_exact_at(&mut notes, segment.offset)?;
        if let Some(entry) = entry_in(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

fn entry_in(mut notes: &[u8]) -> Option<u64> {
    while notes.len() >= 12 {
        let size = |at| usize::try_from(number::<4>(notes, at)).ok();
        let (owner, content, kind) = (size(0)?, size(4)?, number::<4>(notes, 8));
        let begin = 12_usize.checked_add(owner.checked_next_multiple_of(4)?)?;
        let value = notes.get(begin..begin.checked_add(content)?)?;
        if kind == ENTRY_NOTE && notes.get(12..12_usize.checked_add(owner)?)? == OWNER {
            return match content {
                4 => Some(number::<4>(value, 0)),
                8 => Some(number::<8>(value, 0)),
                _ => None,
            };
        }
        notes = notes.get(begin.checked_add(content.checked_next_multiple_of(4)?)?..)?;
    }
    None
}
