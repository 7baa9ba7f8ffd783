//! The guest agent: there, executable, and static, since a guest may have no libraries.

use std::{env, fs, path::PathBuf};

use super::{Check, DoctorInput, engines::is_program};

const NAME: &str = "agent";
/// `PT_INTERP`, elf(5): the program asks for a dynamic loader.
const PT_INTERP: u32 = 3;

pub(super) fn check(input: &DoctorInput) -> Vec<Check> {
    vec![agent(input.agent.as_ref().map(|path| path.as_std_path().to_owned()))]
}

fn agent(named: Option<PathBuf>) -> Check {
    let remedy = "build it (`make build`), or name it with the setting agent";
    let beside = || Some(env::current_exe().ok()?.parent()?.join("tiffin-agent"));
    let Some(path) = named.or_else(beside) else {
        return Check::fail(NAME, "no path to look at", remedy);
    };
    let shown = path.display();
    if !is_program(&path) {
        return Check::fail(NAME, format!("{shown} is no program"), remedy);
    }
    match fs::read(&path).ok().as_deref().and_then(is_static) {
        Some(true) => Check::ok(NAME, format!("{shown}, static")),
        Some(false) => {
            Check::fail(NAME, format!("{shown} is dynamically linked, and a guest may have no libraries"), remedy)
        }
        None => Check::fail(NAME, format!("{shown} is no 64-bit ELF program"), remedy),
    }
}

/// Whether a little-endian 64-bit ELF program asks for no loader; `None` when it is no such program. See elf(5).
fn is_static(elf: &[u8]) -> Option<bool> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let u16_at = |at: usize| elf.get(at..at + 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let headers = elf.get(32..40).and_then(|b| usize::try_from(u64::from_le_bytes(b.try_into().ok()?)).ok())?;
    let (size, count) = (u16_at(54)?, u16_at(56)?);
    for index in 0..count {
        let at = headers.checked_add(index * size)?;
        let kind = elf.get(at..at.checked_add(4)?)?;
        if u32::from_le_bytes(kind.try_into().ok()?) == PT_INTERP {
            return Some(false);
        }
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_dynamic_program_is_refused_and_so_is_a_script() {
        assert_eq!(is_static(&fs::read("/bin/sh").unwrap()), Some(false));
        assert_eq!(is_static(b"#!/bin/sh\n"), None);
        assert_eq!(is_static(b"\x7fELF\x02\x01"), None);
        assert_eq!(agent(Some("/nonexistent/agent".into())).level, Level::Fail);
        assert_eq!(agent(Some("/bin/sh".into())).level, Level::Fail);
    }
}
