//! KVM, by what it does: a virtual CPU counts down from ten million.
//!
//! A device that opens proves nothing. There are hosts where a virtual machine can be made and its code is then
//! emulated a hundred times too slowly for any guest to boot. So a child process makes one, which takes milliseconds on
//! real hardware, and is killed when it doesn't end in time.

use std::{
    ffi::{c_int, c_ulong},
    fs::File,
    io,
    os::fd::AsRawFd,
    ptr,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

use super::{Check, DoctorInput};

const LIMIT: Duration = Duration::from_millis(200);
const DEVICE: &str = "/dev/kvm";

// From linux/kvm.h.
const KVM_CREATE_VM: c_ulong = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xAE04;
const KVM_CREATE_VCPU: c_ulong = 0xAE41;
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_AE46;
const KVM_SET_TSS_ADDR: c_ulong = 0xAE47;
const KVM_RUN: c_ulong = 0xAE80;
const KVM_SET_REGS: c_ulong = 0x4090_AE82;
const KVM_GET_SREGS: c_ulong = 0x8138_AE83;
const KVM_SET_SREGS: c_ulong = 0x4138_AE84;
const KVM_EXIT_HLT: u32 = 5;

/// Where in `struct kvm_run` the exit reason stands.
const EXIT_REASON_AT: usize = 8;
const PAGE: usize = 4096;

/// In real mode: `mov ecx, 10_000_000; again: dec ecx; jnz again; hlt`.
const COUNTDOWN: [u8; 11] = [0x66, 0xb9, 0x80, 0x96, 0x98, 0x00, 0x66, 0x49, 0x75, 0xfc, 0xf4];

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    host_address: u64,
}

/// `struct kvm_regs`: sixteen registers, `rip`, `rflags`.
#[repr(C)]
struct Registers([u64; 18]);

/// `struct kvm_sregs`, which begins with `cs`: base (8 bytes), limit (4), selector (2), then bytes that stay.
#[repr(C, align(8))]
struct SpecialRegisters([u8; 312]);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Works(Duration),
    Refused,
    TooSlow,
}

pub(super) fn check(_: &DoctorInput) -> Vec<Check> {
    let name = "kvm";
    let no_matter =
        "nothing: gVisor needs no KVM. Engines with hardware isolation need a host with (nested) virtualization";
    let device = match File::options().read(true).write(true).open(DEVICE) {
        Ok(device) => device,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return vec![Check::ok(name, "absent (gVisor doesn't need it)")];
        }
        Err(error) => return vec![Check::warn(name, format!("{DEVICE} doesn't open: {error}"), no_matter)],
    };
    vec![match probe(&device) {
        Ok(Verdict::Works(took)) => Check::ok(name, format!("works: guest code ran in {} ms", took.as_millis())),
        Ok(Verdict::Refused) => {
            Check::warn(name, format!("{DEVICE} opens and refuses to run a virtual CPU"), no_matter)
        }
        Ok(Verdict::TooSlow) => Check::warn(
            name,
            format!(
                "{DEVICE} opens, but a short loop of guest code doesn't end within {} ms: no guest would boot",
                LIMIT.as_millis()
            ),
            no_matter,
        ),
        Err(error) => Check::warn(name, format!("could not be tried: {error}"), no_matter),
    }]
}

/// Whether virtual CPUs run guest code here, as fast as hardware does.
pub fn works() -> bool {
    let device = File::options().read(true).write(true).open(DEVICE);
    device.is_ok_and(|device| matches!(probe(&device), Ok(Verdict::Works(_))))
}

fn probe(device: &File) -> io::Result<Verdict> {
    let started = Instant::now();
    let device = device.as_raw_fd();
    // SAFETY: the child calls `count_down` and `_exit` only; both make bare system calls on descriptors, memory that
    // they map and values on their stack, allocate nothing and take no lock, so whatever state other threads were in
    // doesn't matter.
    let child = match unsafe { fork() }? {
        ForkResult::Parent { child } => child,
        // SAFETY: _exit(2) ends the child at once, running nothing that the parent registered.
        ForkResult::Child => unsafe { libc::_exit(c_int::from(!count_down(device))) },
    };
    wait(child, started)
}

fn wait(child: Pid, started: Instant) -> io::Result<Verdict> {
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive if started.elapsed() > LIMIT => {
                kill(child, Signal::SIGKILL)?;
                waitpid(child, None)?;
                return Ok(Verdict::TooSlow);
            }
            WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(1)),
            WaitStatus::Exited(_, 0) => return Ok(Verdict::Works(started.elapsed())),
            _ => return Ok(Verdict::Refused),
        }
    }
}

/// Makes a virtual machine of one page and runs the loop in it. Whether it came to its end.
fn count_down(device: c_int) -> bool {
    let mut registers = Registers([0; 18]);
    // Bit 1 of the flags is always set (Intel's manual, volume 1, 3.4.3); everything else begins at 0.
    registers.0[17] = 2;
    let mut special = SpecialRegisters([0; 312]);
    // SAFETY: ioctls on descriptors that KVM just gave, with pointers to values of the layouts that linux/kvm.h
    // defines, which outlive the calls. The page and the run area are mapped by the kernel, checked, and as large as
    // what is read from and written to them.
    unsafe {
        let machine = libc::ioctl(device, KVM_CREATE_VM, 0);
        let run_size = libc::ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0);
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let page = libc::mmap(ptr::null_mut(), PAGE, read_write, shared | libc::MAP_ANONYMOUS, -1, 0);
        if machine < 0 || page == libc::MAP_FAILED {
            return false;
        }
        let Ok(run_size) = usize::try_from(run_size) else { return false };
        ptr::copy_nonoverlapping(COUNTDOWN.as_ptr(), page.cast(), COUNTDOWN.len());
        // Older Intel processors need a place for it; a refusal shows in what follows.
        libc::ioctl(machine, KVM_SET_TSS_ADDR, 0xfffb_d000 as c_ulong);
        let region = MemoryRegion { slot: 0, flags: 0, guest_address: 0, size: PAGE as u64, host_address: page as u64 };
        let cpu = libc::ioctl(machine, KVM_CREATE_VCPU, 0);
        if libc::ioctl(machine, KVM_SET_USER_MEMORY_REGION, &raw const region) < 0
            || cpu < 0
            || libc::ioctl(cpu, KVM_GET_SREGS, &raw mut special) < 0
        {
            return false;
        }
        // The code segment begins at address 0.
        special.0[..8].fill(0);
        special.0[12..14].fill(0);
        let run = libc::mmap(ptr::null_mut(), run_size, read_write, shared, cpu, 0);
        run != libc::MAP_FAILED
            && libc::ioctl(cpu, KVM_SET_SREGS, &raw const special) >= 0
            && libc::ioctl(cpu, KVM_SET_REGS, &raw const registers) >= 0
            && libc::ioctl(cpu, KVM_RUN, 0) >= 0
            && ptr::read_volatile(run.cast::<u8>().add(EXIT_REASON_AT).cast::<u32>()) == KVM_EXIT_HLT
    }
}
