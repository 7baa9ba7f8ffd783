//! QEMU: a machine with as few devices as a guest needs (`microvm`), and the command line that makes it.
//!
//! ```text
//!   virtio-serial <-> standard input and output: the agent's channel      virtio-net <-> a tap in the gateway's namespace
//!   virtio-blk: the image, read-only; the VM's disk                       serial port -> the VM's console log
//! ```
//!
//! QEMU opens nothing by a host's name but its own firmware and the kernel: what it works with it is given as open
//! descriptors. With working KVM its guests are hardware-isolated; without, the processor is emulated (TCG), which QEMU's
//! own security policy doesn't count as a boundary: it is confined as if it were the guest's (`monitor/jail.rs`).

pub mod clock;
pub mod initramfs;
pub mod qmp;

use std::{ffi::OsString, path::Path};

use tiffin_types::vm::VmSize;

/// The program's name.
pub const QEMU: &str = "qemu-system-x86_64";

/// The oldest release that is known to work.
pub const MIN_RELEASE: (u32, u32) = (7, 2);

/// Standard input's and output's neighbours: the descriptors that QEMU is started with.
pub const TAP: i32 = 3;
/// Its control socket.
pub const QMP: i32 = 4;
/// The image's filesystem.
pub const IMAGE: i32 = 5;
/// The VM's disk.
pub const DISK: i32 = 6;

/// Where the guest's console is written.
pub const CONSOLE: i32 = 7;

/// Where the state of processor and devices is written to, when it is asked for.
pub const STATE: i32 = 8;
/// Where a machine that goes on from a saved one reads that.
pub const SAVED_STATE: i32 = 9;

/// By what name QEMU opens the guest's memory. There is no such file: the monitor lends it one.
pub const MEMORY: &str = "/memory";
/// Where QEMU, in its own root, finds the guest's kernel.
pub const KERNEL: &str = "/kernel";
/// Where it finds the guest's first files.
pub const INITRAMFS: &str = "/initramfs";

/// Room for QEMU itself beside the guest's memory, in MiB: its heap, its stacks and the code that it translates.
pub const OVERHEAD_MB: u64 = 256;
/// How much translated code is kept, in MiB: a boot and some commands make 70. When it is full, all is thrown away and made anew.
const TRANSLATED_MB: u32 = 128;

/// The emulated processor: all that QEMU can do, but
/// * of Intel's, whose counters Linux takes for steady: of QEMU's own AMD it believes that they differ, measures each
///   processor by waiting, and lives by the tick, without a clock finer than 4 ms;
/// * without `rep movsb` said to be fast, which copies byte by byte here;
/// * without `monitor`, for which an idle processor would spin;
/// * with page tables of four levels: a fifth is one more to walk.
const PROCESSOR: &str = "max,vendor=GenuineIntel,family=6,model=60,stepping=4,-erms,-fsrm,-monitor,-la57";

/// What a machine is made of, beside what stands in its descriptors.
#[derive(Debug, Clone, Copy)]
pub struct Machine<'a> {
    /// CPUs and memory.
    pub size: VmSize,
    /// Whether KVM runs the guest's code.
    pub kvm: bool,
    /// The network device's address.
    pub mac: &'a str,
    /// The host's time stamp counter's rate in kHz, where it is steady.
    pub tsc_khz: Option<u64>,
    /// Whether it goes on from a saved state, instead of booting. Its memory is a saved one then, which stays as it is.
    pub saved: bool,
}

/// QEMU's arguments. Every option is spelled out, nothing comes from files of the host.
pub fn arguments(machine: &Machine) -> Vec<OsString> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-name", "tiffin"]);
    // ACPI tells the guest of the virtio devices; PIT and PIC are what its clock is first measured by.
    let machine_type = "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,usb=off,graphics=off,\
                        memory-backend=memory,suppress-vmdesc=on";
    add(&["-machine", machine_type]);
    match machine.kvm {
        true => add(&["-accel", "kvm", "-cpu", "host"]),
        false => add(&["-accel", &format!("tcg,thread=multi,tb-size={TRANSLATED_MB}"), "-cpu", PROCESSOR]),
    }
    add(&["-smp", &machine.size.cpus.to_string(), "-m", &format!("{}M", machine.size.mem_mb)]);
    add(&["-rtc", "base=utc,clock=host"]);
    let share = if machine.saved { "off" } else { "on" };
    let size = machine.size.mem_mb;
    add(&["-object", &format!("memory-backend-file,id=memory,size={size}M,mem-path={MEMORY},share={share}")]);
    // A state is saved by itself, without what a migration says first of the machine.
    add(&["-global", "migration.send-configuration=off"]);
    add(&["-add-fd", &format!("fd={STATE},set={STATE}")]);
    match machine.saved {
        // Its kernel is in its memory: one that is given is put there once more.
        true => add(&["-incoming", &format!("fd:{SAVED_STATE}")]),
        false => add(&["-kernel", KERNEL, "-initrd", INITRAMFS, "-append", &kernel_words(machine)]),
    }
    add(&["-chardev", "stdio,id=channel,signal=off", "-device", "virtio-serial-device"]);
    add(&["-device", "virtserialport,chardev=channel,name=tiffin"]);
    add(&["-add-fd", &format!("fd={CONSOLE},set={CONSOLE}"), "-serial", "chardev:console"]);
    add(&["-chardev", &format!("file,id=console,path=/dev/fdset/{CONSOLE},append=on")]);
    add(&["-chardev", &format!("socket,id=qmp,fd={QMP}"), "-mon", "chardev=qmp,mode=control"]);
    add(&["-netdev", &format!("tap,id=net,fd={TAP}")]);
    add(&["-device", &format!("virtio-net-device,netdev=net,mac={}", machine.mac)]);
    for (name, descriptor, options) in [("image", IMAGE, "read-only=on"), ("disk", DISK, "discard=unmap")] {
        add(&["-add-fd", &format!("fd={descriptor},set={descriptor}")]);
        let file =
            format!("driver=file,node-name={name},filename=/dev/fdset/{descriptor},aio=threads,locking=off,{options}");
        add(&["-blockdev", &file]);
        let raw = format!("driver=raw,node-name={name}-raw,file={name},{options}");
        add(&["-blockdev", &raw, "-device", &format!("virtio-blk-device,drive={name}-raw")]);
    }
    add(&["-device", "virtio-rng-device"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    arguments.into_iter().map(OsString::from).collect()
}

/// The kernel's command line. A panic ends the machine; there are no PCI devices to look for.
fn kernel_words(machine: &Machine) -> String {
    let mut words = "console=ttyS0 quiet loglevel=3 panic=-1 reboot=t mitigations=off pci=off audit=0 \
                     random.trust_cpu=on net.ifnames=0"
        .to_owned();
    if !machine.kvm {
        // What it would check are its own algorithms, and whether timers work.
        words += " cryptomgr.notests no_timer_check";
    }
    if let Some(khz) = machine.tsc_khz.filter(|_| !machine.kvm) {
        words += &format!(" tsc_early_khz={khz} tsc=reliable");
    }
    words
}

/// The release that `qemu --version` tells.
pub fn read_release(said: &str) -> Option<(u32, u32)> {
    let version = said.strip_prefix("QEMU emulator version ")?;
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The folder of the host that a program of this path and its files are below, `/usr` of `/usr/bin/qemu-system-x86_64`.
pub fn prefix(program: &Path) -> Option<&Path> {
    program.parent()?.parent().filter(|prefix| *prefix != Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_told_of_a_steady_counter_that_it_is_one() {
        let size = VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 };
        let machine = Machine { size, kvm: false, mac: "", tsc_khz: Some(2_596_130), saved: false };
        assert!(kernel_words(&machine).ends_with(" tsc_early_khz=2596130 tsc=reliable"));
        assert!(!kernel_words(&Machine { tsc_khz: None, ..machine }).contains("tsc"));
        // KVM's guests have a clock of KVM's.
        assert!(!kernel_words(&Machine { kvm: true, ..machine }).contains("tsc"));
    }

    #[test]
    fn a_release_is_read() {
        assert_eq!(read_release("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright"), Some((7, 2)));
        assert_eq!(read_release("something else"), None);
    }

    #[test]
    fn a_program_in_the_root_has_no_folder_to_show() {
        assert_eq!(prefix(Path::new("/usr/bin/qemu")), Some(Path::new("/usr")));
        assert_eq!(prefix(Path::new("/bin/qemu")), None);
    }
}
