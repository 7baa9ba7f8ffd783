//! VMs with a kernel of their own: what this host makes them of, prepared once at start.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest, Sha256};
use tiffin_types::vm::{EngineName, Isolation};

use super::{HostConfig, config::MachinesConfig};
use crate::{
    Capabilities, EngineError, Kind,
    host::process,
    monitor::launch::MachineFiles,
    qemu::{self, MIN_RELEASE, initramfs},
};

/// In the data folder: a folder for each kernel, with the first files, that machines were ever made of and may still have.
pub(super) const KERNELS: &str = "kernels";
/// How long QEMU has to tell its release.
const ASKED: Duration = Duration::from_secs(20);

pub(super) struct Machines {
    /// What a machine is started with.
    pub(super) files: MachineFiles,
    /// QEMU's release, and what runs the guest's code: what was saved by one can't be taken up by another.
    pub(super) release: String,
    /// What boots, by its content: the kernel and the first files.
    pub(super) kernel: String,
}

impl Machines {
    /// What a VM's machine is started with: the kernel of its image, if it came with one.
    pub(super) fn files_with(&self, kernel: Option<PathBuf>) -> MachineFiles {
        let own = self.files.clone();
        MachineFiles { kernel: kernel.unwrap_or(own.kernel), ..own }
    }

    /// Asks QEMU its release, and puts the kernel and the guests' first files into the data folder, where a VM that runs
    /// doesn't miss them when the host's are replaced.
    pub(super) fn set_up(config: &MachinesConfig, host: &HostConfig) -> Result<Self, EngineError> {
        let version = version(&config.qemu)?;
        let failed = |e: io::Error| EngineError::host("preparing the guests' kernel", e);
        let (files, name) = install(config, &host.agent, &host.data_dir.join(KERNELS)).map_err(failed)?;
        let release = format!("{version}, {}", if config.kvm { "KVM" } else { "TCG" });
        Ok(Self { files, release, kernel: name })
    }
}

/// What can be had.
pub(super) fn kinds(runsc: Option<&Path>, machines: Option<&Machines>) -> Vec<Kind> {
    let gvisor = runsc.map(|_| Kind {
        name: EngineName::Gvisor,
        isolation: Isolation::UserspaceKernel,
        capabilities: Capabilities { pause: true, snapshot: true, kernels: false },
    });
    let qemu = machines.map(|machines| Kind {
        name: EngineName::Qemu,
        isolation: if machines.files.kvm { Isolation::HardwareVm } else { Isolation::EmulatedVm },
        capabilities: Capabilities { pause: true, snapshot: true, kernels: true },
    });
    [gvisor, qemu].into_iter().flatten().collect()
}

fn version(program: &Path) -> Result<String, EngineError> {
    let mut command = std::process::Command::new(program);
    command.arg("--version");
    let said = process::run_within(command, "", ASKED)
        .map_err(|e| EngineError::host(format!("asking {} its release", program.display()), e))?;
    match qemu::read_release(&said) {
        Some(release) if release >= MIN_RELEASE => Ok(said.lines().next().unwrap_or_default().to_owned()),
        _ => Err(EngineError::Invalid(format!(
            "{} is no QEMU of {}.{} or newer: {}",
            program.display(),
            MIN_RELEASE.0,
            MIN_RELEASE.1,
            said.lines().next().unwrap_or_default()
        ))),
    }
}

/// Copies the kernel and writes the initramfs, unless they are there; named by what they are made of.
fn install(config: &MachinesConfig, agent: &Path, kernels: &Path) -> io::Result<(MachineFiles, String)> {
    let mut first_files = Vec::new();
    initramfs::write(agent, &config.modules, &mut first_files)?;
    let mut hash = Sha256::new();
    hash.update(&first_files);
    hash_file(&config.kernel, &mut hash)?;
    let name = hex::encode(&hash.finalize()[..16]);
    let folder = kernels.join(&name);
    let files = MachineFiles {
        qemu: config.qemu.clone(),
        kernel: folder.join("kernel"),
        initramfs: folder.join("initramfs"),
        kvm: config.kvm,
    };
    if folder.exists() {
        return Ok((files, name));
    }
    // Whole or not there: a folder that a killed server left unfinished is made anew.
    let unfinished = kernels.join(format!("{name}.unfinished"));
    match fs::remove_dir_all(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::create_dir_all(&unfinished)?;
    write_readable(&unfinished.join("initramfs"), &mut first_files.as_slice())?;
    write_readable(&unfinished.join("kernel"), &mut File::open(&config.kernel)?)?;
    fs::rename(&unfinished, &folder)?;
    Ok((files, name))
}

fn hash_file(path: &Path, hash: &mut Sha256) -> io::Result<()> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let mut file = File::open(path).map_err(named)?;
    let mut piece = vec![0; 1 << 16];
    loop {
        match file.read(&mut piece).map_err(named)? {
            0 => return Ok(()),
            count => hash.update(&piece[..count]),
        }
    }
}

/// Removes what was prepared of other kernels, or not to its end, but for the folders that are `needed`, by their names.
pub(super) fn remove_others(kernels: &Path, needed: &BTreeSet<OsString>) -> io::Result<()> {
    let entries = match fs::read_dir(kernels) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if !needed.contains(&entry.file_name()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Readable to QEMU, which is nobody's user.
fn write_readable(path: &PathBuf, from: &mut impl Read) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let file = File::create(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    let mut to = BufWriter::new(file);
    io::copy(from, &mut to)?;
    to.flush()?;
    to.get_ref().sync_all()
}
