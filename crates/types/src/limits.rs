//! The ranges that requests must keep to, in one place: validation, documentation and error texts read them from here.

use std::ops::RangeInclusive;

/// vCPUs of a VM.
pub const CPU: RangeInclusive<u32> = 1..=8;
/// Memory of a VM, in MiB.
pub const MEM_MB: RangeInclusive<u32> = 128..=8192;
/// Memory of a VM that runs its image's program, in MiB.
pub const SERVICE_MEM_MB: RangeInclusive<u32> = 256..=16_384;
/// The same when its creator named none.
pub const SERVICE_MEM_MB_DEFAULT: u32 = 256;
/// Disk of a VM that runs its image's program, in GB of 1024 MiB.
pub const VOLUME_GB: RangeInclusive<u32> = 1..=500;
/// Disk (writable layer) of a VM, in MiB.
pub const DISK_MB: RangeInclusive<u32> = 64..=512_000;
/// Disk of a VM whose creator named none, in MiB.
pub const DISK_MB_DEFAULT: u32 = 1024;
/// Entries of `allowIps`.
pub const ALLOW_IPS_MAX: usize = 256;
/// Length of an exec's command, in bytes.
pub const EXEC_CMD_BYTES: RangeInclusive<usize> = 1..=131_072;
/// An exec's time limit when it names none, in milliseconds.
pub const EXEC_TIMEOUT_MS_DEFAULT: u64 = 30_000;
/// Each of stdout and stderr of an exec is cut at this many bytes.
pub const EXEC_OUTPUT_BYTES: usize = 1_048_576;
/// Environment variables of one exec.
pub const ENV_VARS_MAX: usize = 256;
/// Bytes of one environment variable, name and value.
pub const ENV_VAR_BYTES: usize = 32_768;
/// Bytes of all environment variables of one exec together.
pub const ENV_BYTES: usize = 262_144;
/// Length of a path, in bytes (Linux's `PATH_MAX`).
pub const PATH_BYTES: usize = 4096;
/// Length of a script's text, in bytes.
pub const SCRIPT_CODE_BYTES: RangeInclusive<usize> = 1..=1_048_576;
/// Arguments of a script.
pub const SCRIPT_ARGS_MAX: usize = 256;
/// Bytes of a script's arguments together.
pub const SCRIPT_ARGS_BYTES: usize = 131_072;
/// Options of the runtime that a script names.
pub const SCRIPT_FLAGS_MAX: usize = 64;
/// Bytes of what a script says of itself; more is an error of the script's.
pub const SCRIPT_RESULT_BYTES: usize = 1_048_576;
/// Entries of a folder that is listed.
pub const FILE_LIST_ENTRIES: u64 = 5000;
/// Columns, and rows, of a terminal.
pub const TERMINAL_SIDE: RangeInclusive<u16> = 1..=1000;
/// A terminal's columns and rows when the request names none.
pub const TERMINAL_DEFAULT: (u16, u16) = (80, 24);
/// Bytes of one message from a terminal's client.
pub const TERMINAL_MESSAGE_BYTES: usize = 262_144;
/// Lines of a log tail.
pub const LOG_TAIL: RangeInclusive<u32> = 1..=1000;
/// Lines of a log tail when the request names none.
pub const LOG_TAIL_DEFAULT: u32 = 200;
/// Length of an `Idempotency-Key`, in visible ASCII characters.
pub const IDEMPOTENCY_KEY_CHARS: RangeInclusive<usize> = 1..=255;
/// Length of a name (account, API key, image), in characters.
pub const NAME_CHARS: RangeInclusive<usize> = 1..=100;
/// VMs that one fork may make.
pub const FORK_COUNT: RangeInclusive<u32> = 1..=16;
/// Length of a password, in bytes.
pub const PASSWORD_BYTES: RangeInclusive<usize> = 12..=256;
/// Length of an email address, in bytes (RFC 5321 with its erratum).
pub const EMAIL_BYTES: RangeInclusive<usize> = 3..=254;
/// Length of an image's description, in characters.
pub const DESCRIPTION_CHARS: usize = 1000;
/// Words of a VM's program: its name and its arguments.
pub const PROGRAM_ARGS_MAX: usize = 1024;
/// Bytes of all words of a VM's program together, an end for each included.
pub const PROGRAM_ARGS_BYTES: usize = 131_072;
/// Variables of a VM's program's environment, the image's and the request's together.
pub const PROGRAM_ENV_VARS_MAX: usize = 1024;
/// Length of the user that a VM's program runs as, in bytes.
pub const PROGRAM_USER_BYTES: usize = 256;
/// What a VM's program may take as JSON: it has to fit into one request to the guest's agent.
pub const PROGRAM_JSON_BYTES: usize = 1_000_000;
/// Length of a webhook's URL, in bytes.
pub const WEBHOOK_URL_BYTES: RangeInclusive<usize> = 1..=2048;
/// Event types that a webhook may name.
pub const WEBHOOK_EVENT_TYPES: RangeInclusive<usize> = 1..=100;
/// How long what is delivered is signed with the secret before, too, in seconds.
pub const WEBHOOK_OVERLAP_S: RangeInclusive<u64> = 0..=604_800;
/// The same, when the request doesn't say.
pub const WEBHOOK_OVERLAP_S_DEFAULT: u64 = 86_400;
/// Deliveries of one answer.
pub const WEBHOOK_DELIVERIES: RangeInclusive<u32> = 1..=200;
/// The same, when the request doesn't say.
pub const WEBHOOK_DELIVERIES_DEFAULT: u32 = 50;
/// Ports of a VM that are reached from outside.
pub const PORTS_MAX: u32 = 16;
/// Processes and threads that a guest may have at once.
pub const GUEST_PIDS: u32 = 1024;

/// Whether `name` is an environment variable's name: `[A-Za-z_][A-Za-z0-9_]*`.
pub fn is_env_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
