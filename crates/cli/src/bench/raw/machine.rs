//! QEMU itself, without the platform: the same program, kernel, processor, memory and devices as a VM of the platform's, with
//! an init that says a word on the console and ends the machine; or going on from what the platform saved.
//!
//! It is in no jail, and nobody talks to its control socket; all else is the platform's own command line.

pub(in crate::bench) mod restore;

use std::{
    cell::OnceCell,
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tempfile::TempDir;
use tiffin_engine::{
    host::network::GUEST_MAC,
    qemu::{self, INITRAMFS, KERNEL, clock::Look, initramfs},
};
use tiffin_types::vm::VmSize;
use tokio::{io::AsyncReadExt, process::Command, time::timeout};

use super::{CALL_LIMIT, default_image};
use crate::bench::BenchArgs;

const WORD: &[u8] = b"up\n";

/// Gives QEMU the descriptors that its command line names: image, disk and saved state of the arguments, the console on the pipe
/// that is its standard error. `$0` is the image, `$1` the disk, `$2` the state.
const WITH_DESCRIPTORS: &str = "image=$0 disk=$1 state=$2; shift 2; exec \"$@\" 5<\"$image\" 6<>\"$disk\" 7>&2 8>/dev/null 9<\"$state\" 2>/dev/null";

/// A file system's worth of zeros.
const DISK_BYTES: u64 = 1 << 30;

/// What a machine is booted with.
pub(in crate::bench) struct RawMachine {
    qemu: PathBuf,
    kernel: PathBuf,
    image: PathBuf,
    folder: TempDir,
    tsc_khz: OnceCell<Option<u64>>,
}

impl RawMachine {
    /// Finds kernel and image.
    pub(in crate::bench) fn new(args: &BenchArgs) -> anyhow::Result<Self> {
        let kernel = args.kernel.clone().context("no kernel was named (--kernel)")?;
        ensure!(kernel.is_file(), "there is no kernel {}", kernel.display());
        let image = match &args.rootfs {
            Some(path) => path.clone(),
            None => default_image(&args.data_dir)?,
        };
        let folder = tempfile::Builder::new().prefix("tiffin-bench-").tempdir()?;
        File::create(folder.path().join("disk"))?.set_len(DISK_BYTES)?;
        initramfs::write_least(&init(), &mut File::create(folder.path().join("initramfs"))?)?;
        Ok(Self { qemu: args.qemu.clone(), kernel, image, folder, tsc_khz: OnceCell::new() })
    }

    /// Boots a machine: the time until its init's word. It is gone when this returns.
    pub(in crate::bench) async fn boot(&self, size: VmSize, kvm: bool) -> anyhow::Result<Duration> {
        let mut command = self.command(WITH_DESCRIPTORS, "disk".as_ref(), "/dev/null".as_ref());
        let memory = format!("memory-backend-memfd,id=memory,size={}M", size.mem_mb);
        command.args(self.arguments(size, kvm, false, "hubport,id=net,hubid=0", &memory));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let start = Instant::now();
        let mut child = command.spawn()?;
        let mut console = child.stderr.take().context("a pipe was asked for")?;
        let (mut said, mut chunk) = (Vec::new(), [0; 1024]);
        let word = async {
            while !said.windows(WORD.len()).any(|part| part == WORD) {
                let count = console.read(&mut chunk).await?;
                ensure!(count > 0, "QEMU ended; the console said {:?}", String::from_utf8_lossy(&said));
                said.extend(chunk[..count].iter().filter(|byte| **byte != b'\r'));
            }
            Ok(start.elapsed())
        };
        let time = timeout(CALL_LIMIT, word).await.context("QEMU took too long")??;
        child.kill().await?;
        Ok(time)
    }

    /// QEMU with a disk, in the folder, and a saved state, both put into its descriptors by a script.
    fn command(&self, script: &str, disk: &Path, state: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&self.image).arg(self.folder.path().join(disk)).arg(state);
        command.arg(&self.qemu);
        command
    }

    fn arguments(&self, size: VmSize, kvm: bool, saved: bool, network: &str, memory: &str) -> Vec<OsString> {
        let tsc_khz = *self.tsc_khz.get_or_init(|| Look::now().and_then(Look::khz));
        let machine = qemu::Machine { size, kvm, mac: GUEST_MAC, tsc_khz, saved };
        let first_files = self.folder.path().join("initramfs");
        alone(qemu::arguments(&machine), [(KERNEL, &self.kernel), (INITRAMFS, &first_files)], network, memory)
    }
}

/// The platform's arguments, but with other files, another network and memory, and without its control socket.
fn alone(arguments: Vec<OsString>, files: [(&str, &PathBuf); 2], network: &str, memory: &str) -> Vec<OsString> {
    let mut arguments = arguments.into_iter();
    let mut kept = Vec::new();
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        if let Some((_, own)) = files.iter().find(|(name, _)| *name == text) {
            kept.push(own.into());
        } else if text.starts_with("tap,") {
            kept.push(network.into());
        } else if text.starts_with("memory-backend-file,") {
            kept.push(memory.into());
        } else if text == "-mon" {
            arguments.next();
        } else if text.starts_with("socket,id=qmp") {
            kept.pop();
        } else {
            kept.push(argument);
        }
    }
    kept
}

/// A program for x86-64 Linux that writes [`WORD`] to its standard output and resets the machine: an ELF header, one segment
/// of everything, and what it does.
fn init() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let code: &[u8] = &[
        0xB8, 1, 0, 0, 0, // mov eax, 1 (write)
        0xBF, 1, 0, 0, 0, // mov edi, 1
        0x48, 0x8D, 0x35, 31, 0, 0, 0, // lea rsi, [rip + 31] (what stands behind the code)
        0xBA, 3, 0, 0, 0, // mov edx, 3
        0x0F, 0x05, // syscall
        0xB8, 169, 0, 0, 0, // mov eax, 169 (reboot)
        0xBF, 0xAD, 0xDE, 0xE1, 0xFE, // mov edi, LINUX_REBOOT_MAGIC1
        0xBE, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
        0xBA, 0x67, 0x45, 0x23, 0x01, // mov edx, LINUX_REBOOT_CMD_RESTART
        0x0F, 0x05, // syscall
        0xEB, 0xFE, // jmp to itself
    ];
    let length = HEADERS + code.len() as u64 + WORD.len() as u64;
    let mut program = Vec::new();
    let mut add = |bytes: &[u8]| program.extend_from_slice(bytes);
    // An executable (2) for x86-64 (62) of 64 bits (2), little-endian (1).
    add(&[0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0, 1, 0, 0, 0]);
    [BASE + HEADERS, 64, 0].iter().for_each(|word| add(&word.to_le_bytes()));
    // Flags; sizes of this header and of the one segment's; how many; no sections.
    add(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // To be loaded (1), to be read and executed (5): the whole file.
    add(&[1, 0, 0, 0, 5, 0, 0, 0]);
    [0, BASE, BASE, length, length, 0x1000].iter().for_each(|word: &u64| add(&word.to_le_bytes()));
    add(code);
    add(WORD);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_the_platforms_but_for_what_leads_out() {
        let size = VmSize { cpus: 2, mem_mb: 256, disk_mb: 1024 };
        let machine = qemu::Machine { size, kvm: false, mac: GUEST_MAC, tsc_khz: None, saved: false };
        let all = qemu::arguments(&machine);
        let count = all.len();
        let (kernel, first_files) = ("/a".into(), "/b".into());
        let kept = alone(all, [(KERNEL, &kernel), (INITRAMFS, &first_files)], "hubport,id=net", "memory");
        assert_eq!(kept.len(), count - 4);
        let texts: Vec<_> = kept.iter().map(|argument| argument.to_string_lossy()).collect();
        let pairs = [("-kernel", "/a"), ("-initrd", "/b"), ("-netdev", "hubport,id=net"), ("-object", "memory")];
        for (option, value) in pairs {
            assert!(texts.windows(2).any(|pair| pair == [option, value]), "{texts:?}");
        }
        assert!(!texts.iter().any(|text| text.contains("qmp")), "{texts:?}");
    }

    #[test]
    fn the_init_points_at_its_word() {
        let init = init();
        assert!(init.ends_with(WORD));
        let place = |at: usize| usize::try_from(u64::from_le_bytes(init[at..at + 8].try_into().unwrap())).unwrap();
        let entry = place(24) - place(80);
        // The address is told from behind its instruction, the third.
        let after = entry + 5 + 5 + 7;
        let offset = u32::from_le_bytes(init[after - 4..after].try_into().unwrap()) as usize;
        assert_eq!(after + offset, init.len() - WORD.len());
        assert_eq!(place(96), init.len());
    }
}
