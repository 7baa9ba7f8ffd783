//! Finding a text in another process's memory, and writing over it.
//!
//! For a process of the guest that stands still in a system call. What it holds is the guest's: all that is read is
//! bounded, and nothing is concluded from it but where the text stands.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

/// Bytes of `/proc/PID/maps` that are looked at.
const MAX_MAPS: u64 = 64 * 1024;

/// Bytes of the heap that are looked at: a shell that has only read a profile has some hundred kilobytes.
const MAX_HEAP: usize = 1 << 20;

/// Bytes below the stack's top that are looked at: arguments and environment stand there.
const MAX_ARGUMENTS: usize = 64 * 1024;

/// Bytes that are compared first, to go through memory fast.
const HEAD: usize = 8;

/// Where a text was found, and what came behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Its address.
    pub address: usize,
    /// The two bytes behind it.
    pub behind: [u8; 2],
}

/// The places of a text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sites {
    /// In the heap.
    pub heap: Vec<Site>,
    /// Among the arguments.
    pub arguments: Vec<Site>,
}

/// Finds `text` in the heap and in the arguments of `pid`.
///
/// # Errors
/// When its memory can't be read.
pub fn find(pid: i32, text: &[u8]) -> io::Result<Sites> {
    let mut maps = String::new();
    File::open(format!("/proc/{pid}/maps"))?.take(MAX_MAPS).read_to_string(&mut maps)?;
    let mut sites = Sites::default();
    for line in maps.lines() {
        let Some((start, end)) = range(line) else { continue };
        if line.ends_with("[heap]") {
            sites.heap.extend(find_between(pid, start, end.min(start.saturating_add(MAX_HEAP)), text)?);
        } else if line.ends_with("[stack]") {
            sites.arguments.extend(find_between(pid, start.max(end.saturating_sub(MAX_ARGUMENTS)), end, text)?);
        }
    }
    Ok(sites)
}

/// The addresses at the beginning of a line of maps.
fn range(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

fn find_between(pid: i32, start: usize, end: usize, text: &[u8]) -> io::Result<Vec<Site>> {
    let mut memory = vec![0; end.saturating_sub(start)];
    read(pid, start, &mut memory)?;
    Ok(occurrences(&memory, text).map(|at| Site { address: start + at.0, behind: at.1 }).collect())
}

/// Where `text` stands in `memory` with at least two bytes behind it.
fn occurrences<'a>(memory: &'a [u8], text: &'a [u8]) -> impl Iterator<Item = (usize, [u8; 2])> + 'a {
    let head = &text[..HEAD.min(text.len())];
    memory.windows(head.len().max(1)).enumerate().filter(move |(_, window)| *window == head).filter_map(
        move |(at, _)| {
            let behind = memory[at..].strip_prefix(text)?.first_chunk::<2>()?;
            Some((at, *behind))
        },
    )
}

/// Fills `into` from `address`.
///
/// # Errors
/// When not all of it can be read.
pub fn read(pid: i32, address: usize, into: &mut [u8]) -> io::Result<()> {
    let wanted = into.len();
    let remote = [RemoteIoVec { base: address, len: wanted }];
    let count = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(into)], &remote)?;
    if count == wanted { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Writes `bytes` to `address`.
///
/// # Errors
/// When not all of it can be written; some may have been.
pub fn write(pid: i32, address: usize, bytes: &[u8]) -> io::Result<()> {
    let remote = [RemoteIoVec { base: address, len: bytes.len() }];
    let count = process_vm_writev(Pid::from_raw(pid), &[IoSlice::new(bytes)], &remote)?;
    if count == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_text_is_found_with_what_is_behind_it() {
        let memory = b"xxabcdefghijM\0abcdefghi.abcdefghij\0\0abcdefghij\0";
        let found: Vec<_> = occurrences(memory, b"abcdefghij").collect();
        assert_eq!(found, [(2, *b"M\0"), (24, *b"\0\0")], "the last one ends with the memory");
    }

    #[test]
    fn a_line_of_maps_tells_its_range_or_nothing() {
        assert_eq!(range("55aa-55ff rw-p 00000000 00:00 0 [heap]"), Some((0x55aa, 0x55ff)));
        assert_eq!(range("nonsense"), None);
        assert_eq!(range(""), None);
    }

    proptest! {
        #[test]
        fn what_is_found_is_there(memory in proptest::collection::vec(0u8..3, 0..200), text in proptest::collection::vec(0u8..3, 1..12)) {
            for (at, behind) in occurrences(&memory, &text) {
                prop_assert_eq!(&memory[at..at + text.len()], &text[..]);
                prop_assert_eq!(&memory[at + text.len()..at + text.len() + 2], &behind[..]);
            }
        }
    }
}
