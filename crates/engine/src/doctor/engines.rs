//! The engines that are installed. This version runs VMs with gVisor and with QEMU; another is shown and not used.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use tiffin_types::vm::EngineName;

use super::{Check, DoctorInput, kvm, tools};
use crate::{
    gvisor::MIN_RELEASE,
    qemu::{self, QEMU, read_release},
};

pub(super) fn check(input: &DoctorInput) -> Vec<Check> {
    let mut checks = vec![gvisor(input)];
    checks.extend(qemu(input));
    checks.extend(unused("firecracker", "firecracker"));
    checks
}

fn gvisor(input: &DoctorInput) -> Check {
    let remedy = format!(
        "install runsc {MIN_RELEASE} or newer (Debian 12: from bookworm-backports, as `make runsc` does) and name it \
         with the setting runsc"
    );
    let named = input.runsc.as_ref().map(|path| path.as_std_path().to_owned());
    let found = match &named {
        Some(path) => format!("no {}", path.display()),
        None => "no runsc on PATH".to_owned(),
    };
    let Some(path) = named.or_else(|| on_path("runsc")).filter(|path| path.is_file()) else {
        return match is_gvisor_needed(input) {
            true => Check::fail("gvisor", found, remedy),
            false => Check::warn("gvisor", format!("{found}: VMs run with QEMU alone"), remedy),
        };
    };
    let shown = path.display();
    match tools::first_line(Command::new(&path).arg("--version")) {
        Err(error) => Check::fail("gvisor", format!("{shown}: {error}"), remedy),
        Ok(line) => match release(&line) {
            Some(release) if release >= MIN_RELEASE => Check::ok("gvisor", format!("{shown}, release {release}")),
            Some(release) => Check::fail(
                "gvisor",
                format!(
                    "{shown} is release {release}; those before {MIN_RELEASE} (Debian 12's own is one) are not dependable"
                ),
                remedy,
            ),
            None => Check::fail("gvisor", format!("{shown} tells no release: {line:?}"), remedy),
        },
    }
}

/// Whether it runs the VMs of which nobody says by what. The server picks in the same way.
fn is_gvisor_needed(input: &DoctorInput) -> bool {
    match input.engine {
        Some(EngineName::Qemu) => false,
        Some(EngineName::Gvisor | EngineName::Firecracker | EngineName::Fake) => true,
        None => input.kernel.is_none() || !kvm::works(),
    }
}

/// Says nothing where no kernel is named: then no VM of QEMU's is wanted.
fn qemu(input: &DoctorInput) -> Option<Check> {
    let kernel = input.kernel.as_ref()?;
    let remedy = "install qemu-system-x86 and name a kernel that is there with the setting qemu.kernel (`make kernel` \
                  fetches Debian's), or unset it: then VMs run with gVisor alone";
    if !kernel.is_file() {
        return Some(Check::fail("qemu", format!("no kernel {kernel}"), remedy));
    }
    let named = input.qemu.as_ref().map(|path| path.as_std_path().to_owned());
    let Some(path) = named.or_else(|| on_path(QEMU)) else {
        return Some(Check::fail("qemu", format!("no {QEMU} on PATH"), remedy));
    };
    let shown = path.display();
    Some(match tools::first_line(Command::new(&path).arg("--version")) {
        Err(error) => Check::fail("qemu", format!("{shown}: {error}"), remedy),
        Ok(line) => match read_release(&line) {
            Some(release) if release >= qemu::MIN_RELEASE => Check::ok("qemu", format!("{shown}, {line}")),
            _ => Check::fail("qemu", format!("{shown} is too old: {line}"), remedy),
        },
    })
}

/// The date in `runsc version release-20240729.0` or, as Debian has it, `runsc version 0.0~20240729.0`.
pub(super) fn release(line: &str) -> Option<u32> {
    line.split(|c: char| !c.is_ascii_digit())
        .filter(|digits| digits.len() == 8 && digits.starts_with("20"))
        .find_map(|digits| digits.parse().ok())
}

/// Says nothing about an engine that isn't there.
fn unused(name: &'static str, program: &str) -> Option<Check> {
    let path = on_path(program)?;
    let version = tools::first_line(Command::new(&path).arg("--version")).unwrap_or_else(|error| error.to_string());
    Some(Check::ok(name, format!("{}, {version}; not used by this version", path.display())))
}

fn on_path(program: &str) -> Option<PathBuf> {
    let candidates = env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).collect::<Vec<_>>();
    candidates.into_iter().find(|path| is_program(path))
}

/// Whether it is a file that somebody may execute.
pub(super) fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
