//! Every setting: its name, default, range and meaning.

use std::fmt::{self, Write};

/// A setting.
#[derive(Debug)]
pub struct Key {
    /// Its name, with a dot between section and key.
    pub name: &'static str,
    /// Its value when nothing sets it; empty where `unset` says what happens instead.
    pub default: &'static str,
    /// What an unset value means, where the default is no value.
    pub unset: &'static str,
    /// What it may be.
    pub allowed: Allowed,
    /// What it does.
    pub doc: &'static str,
    /// Left out of the documentation.
    pub hidden: bool,
}

/// What a setting may be.
#[derive(Debug, Clone, Copy)]
pub enum Allowed {
    /// A whole number, both ends included.
    Integer(u64, u64),
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// What the words say.
    Words(&'static str),
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Allowed::Integer(least, most) => write!(f, "a whole number from {least} to {most}"),
            Allowed::OneOf(words) => write!(f, "one of {}", words.join(", ")),
            Allowed::Words(words) => f.write_str(words),
        }
    }
}

impl Key {
    const fn new(name: &'static str, default: &'static str, allowed: Allowed, doc: &'static str) -> Self {
        Self { name, default, unset: "", allowed, doc, hidden: false }
    }

    const fn unset(name: &'static str, unset: &'static str, allowed: Allowed, doc: &'static str) -> Self {
        Self { name, default: "", unset, allowed, doc, hidden: false }
    }

    /// The environment variable that sets it.
    pub fn variable(&self) -> String {
        format!("TIFFIN_{}", self.name.replace('.', "__").to_uppercase())
    }
}

const PATH: Allowed = Allowed::Words("an absolute path");
const MILLIS: Allowed = Allowed::Integer(100, 86_400_000);
const PER_MINUTE: Allowed = Allowed::Integer(0, 1_000_000);
const SWITCH: Allowed = Allowed::OneOf(&["true", "false"]);

/// Every setting, in the order of the documentation.
pub const KEYS: &[Key] = &[
    Key::new(
        "listen",
        "127.0.0.1:3000",
        Allowed::Words("an address and a port, such as 127.0.0.1:3000"),
        "Where the API listens. It speaks plain HTTP: beyond loopback, put a proxy that does TLS before it.",
    ),
    Key::new("data_dir", "/var/lib/tiffin", PATH, "Where VMs, images and the SQLite database live."),
    Key::new("run_dir", "/run/tiffin", PATH, "Where images are mounted for VMs; need not outlive a reboot."),
    Key::unset(
        "database_url",
        "sqlite in data_dir",
        Allowed::Words("sqlite:///absolute/path or postgres://user:password@host/database"),
        "Where the state is kept.",
    ),
    Key::new(
        "engine",
        "auto",
        Allowed::OneOf(&["auto", "gvisor", "qemu", "firecracker", "fake"]),
        "What runs VMs of which nobody says by what: gvisor or qemu, of which auto picks qemu where KVM works and qemu.kernel \
         is set. This version doesn't have firecracker; fake isolates nothing and is for tests.",
    ),
    Key::unset("runsc", "the first on PATH", PATH, "gVisor's program."),
    Key::unset("qemu.program", "qemu-system-x86_64, the first on PATH", PATH, "QEMU's program, 7.2 or newer."),
    Key::unset(
        "qemu.kernel",
        "no VMs with a kernel of their own",
        PATH,
        "The kernel of QEMU's VMs: an uncompressed x86-64 Linux (vmlinux) that can be entered by PVH.",
    ),
    Key::unset("qemu.modules", "modules, beside qemu.kernel", PATH, "The folder of that kernel's modules."),
    Key::new(
        "qemu.templates",
        "16",
        Allowed::Integer(0, 10_000),
        "How many guests of QEMU's are kept as they were when they had booted, one for each image and size: VMs of that image \
         and size begin there. The one unused for longest goes first. Each takes some 100 MiB of disk. With 0, every VM boots.",
    ),
    Key::unset("agent", "found beside the program", PATH, "The static program that is process 1 in each guest."),
    Key::new("log.format", "text", Allowed::OneOf(&["text", "json"]), "How log lines look."),
    Key::new(
        "log.level",
        "info",
        Allowed::OneOf(&["error", "warn", "info", "debug", "trace"]),
        "The least severe level that is logged.",
    ),
    Key::new(
        "http.header_timeout_ms",
        "15000",
        Allowed::Integer(100, 600_000),
        "How long a client has to send a request's head; an idle connection is closed after it too.",
    ),
    Key::new(
        "http.body_timeout_ms",
        "30000",
        Allowed::Integer(100, 3_600_000),
        "How long a client has to send a request's body; of files, each piece of it.",
    ),
    Key::new(
        "http.write_timeout_ms",
        "60000",
        Allowed::Integer(100, 3_600_000),
        "How long a client may take none of an answer that waits for it; its connection is cut then.",
    ),
    Key::new(
        "http.request_timeout_ms",
        "30000",
        Allowed::Integer(100, 3_600_000),
        "How long reading and administering may take until the answer begins. What brings VMs up or runs in them has limits of its own.",
    ),
    Key::new(
        "http.trust_proxy",
        "false",
        SWITCH,
        "Whether a proxy is believed: `X-Forwarded-Proto`, so that sessions' cookies are `Secure` under TLS, and the last address of `X-Forwarded-For`, from which wrong keys and attempts to log in are counted. Only where all come by a proxy that sets both.",
    ),
    Key::new(
        "http.max_connections",
        "2048",
        Allowed::Integer(1, 100_000),
        "Connections open at once; further ones wait to be accepted.",
    ),
    Key::new(
        "http.shutdown_grace_ms",
        "10000",
        Allowed::Integer(0, 600_000),
        "How long requests in flight may go on once the server is asked to shut down. VMs run on.",
    ),
    Key::new(
        "exec.max_timeout_ms",
        "3600000",
        Allowed::Integer(1000, 86_400_000),
        "The longest time limit that a command may ask for.",
    ),
    Key::new("exec.max_concurrent", "32", Allowed::Integer(1, 48), "Commands that may run at once in one VM."),
    Key::new(
        "files.upload_bytes",
        "10485760",
        Allowed::Integer(1024, 1 << 40),
        "The largest archive that may be uploaded, in bytes.",
    ),
    Key::new(
        "files.unpacked_bytes",
        "536870912",
        Allowed::Integer(1024, 1 << 40),
        "What the files of an uploaded archive may come to, in bytes.",
    ),
    Key::new("files.entries", "20000", Allowed::Integer(1, 10_000_000), "Files and folders in an uploaded archive."),
    Key::new(
        "files.ratio",
        "200",
        Allowed::Integer(1, 1_000_000),
        "How many bytes each byte of an uploaded archive may unpack to, once a mebibyte is unpacked.",
    ),
    Key::new(
        "files.file_bytes",
        "67108864",
        Allowed::Integer(1024, 1 << 40),
        "The largest single file that may be written, in bytes.",
    ),
    Key::new(
        "files.download_bytes",
        "8589934592",
        Allowed::Integer(1024, 1 << 50),
        "The largest archive or file that may be downloaded, in bytes; a larger one breaks off.",
    ),
    Key::new(
        "files.timeout_ms",
        "600000",
        Allowed::Integer(1000, 86_400_000),
        "How long moving files into or out of a VM may take.",
    ),
    Key::new(
        "terminal.max_session_ms",
        "14400000",
        Allowed::Integer(1000, 86_400_000),
        "How long a terminal may stay open; its program is ended then.",
    ),
    Key::new(
        "terminal.ping_ms",
        "30000",
        Allowed::Integer(50, 600_000),
        "How often a terminal's client is asked whether it is there; it is cut off when it has left two such questions unanswered.",
    ),
    Key::new(
        "exec.log_commands",
        "false",
        SWITCH,
        "Whether exec logs show commands' first 1024 bytes. They may hold secrets, and are in the database then.",
    ),
    Key::new(
        "exec.logs_kept",
        "1000",
        Allowed::Integer(1, 100_000),
        "Runs that are remembered of each VM; older ones are forgotten.",
    ),
    Key::new("vm.start_timeout_ms", "60000", Allowed::Integer(1000, 600_000), "How long a VM may take to come up."),
    Key::new(
        "vm.stop_grace_ms",
        "5000",
        Allowed::Integer(0, 300_000),
        "How long a VM's processes have between being asked to end and being killed.",
    ),
    Key::new(
        "vm.snapshot_timeout_ms",
        "300000",
        Allowed::Integer(1000, 86_400_000),
        "How long saving a VM may take, for a snapshot or a fork.",
    ),
    Key::new(
        "vm.reconcile_ms",
        "30000",
        Allowed::Integer(50, 3_600_000),
        "How often every VM's record is compared with what the engine sees. Ends are noticed at once; this is for what got lost.",
    ),
    Key::new("limits.body_bytes", "1048576", Allowed::Integer(1024, 67_108_864), "The largest JSON body, in bytes."),
    Key::new("limits.creates_in_flight", "16", Allowed::Integer(1, 1024), "VMs that come up at once."),
    Key::new(
        "limits.creates_queued",
        "256",
        Allowed::Integer(0, 100_000),
        "Requests that may wait for one of those places; further ones get 503.",
    ),
    Key::new(
        "limits.create_wait_ms",
        "60000",
        Allowed::Integer(0, 600_000),
        "How long such a request waits before it gets 503.",
    ),
    Key::new(
        "pool.max_vms",
        "4",
        Allowed::Integer(0, 1000),
        "VMs that are booted ahead, so that creates of sizes that were asked for lately need not wait for a boot; 0 boots none. Each takes about 35 MiB and a few percent of a core while it waits.",
    ),
    Key::new(
        "pool.recent_ms",
        "300000",
        Allowed::Integer(1000, 86_400_000),
        "For how long a create counts as recent: as many VMs of its image and size are kept ready.",
    ),
    Key::unset(
        "pool.keep",
        "none",
        Allowed::Words("CPUxMEMORY=COUNT, with commas between, such as 1x256=2,2x1024=1"),
        "VMs of the default image and disk that are kept ready whether they were asked for lately or not, within pool.max_vms.",
    ),
    Key::new(
        "services.prepared",
        "8",
        Allowed::Integer(0, 10_000),
        "Cached VMs that are booted and paused while they are down, so that they start at once; those that were used last. 0 prepares none: they boot when they are started. Each takes about 35 MiB.",
    ),
    Key::new(
        "services.outbound_internet",
        "true",
        SWITCH,
        "Whether VMs that run their image's program reach the public internet. Private networks and this host they never reach.",
    ),
    Key::new(
        "ingress.domain",
        "vm.localhost",
        Allowed::Words("a domain in lower case, such as vm.example.com"),
        "What the host names of VMs end in.",
    ),
    Key::new(
        "ingress.listen",
        "127.0.0.1:3443",
        Allowed::Words("an address and a port, such as 0.0.0.0:443, or off"),
        "Where VMs are reached from outside, by TLS.",
    ),
    Key::unset(
        "ingress.http_listen",
        "off",
        Allowed::Words("an address and a port, such as 0.0.0.0:80"),
        "Where plain HTTP is redirected to TLS.",
    ),
    Key::unset(
        "ingress.public_port",
        "that of ingress.listen",
        Allowed::Words("a port from 1 to 65535"),
        "The port in VMs' URLs, where clients reach the ingress at another one than it listens on.",
    ),
    Key::unset(
        "ingress.cert_file",
        "an authority of its own",
        PATH,
        "The certificate for `*.` and the domain, with its chain, in PEM; taken anew when the file changes.",
    ),
    Key::unset(
        "ingress.key_file",
        "an authority of its own",
        Allowed::Words("an absolute path where ingress.cert_file is set, and nothing where it isn't"),
        "The private key of `ingress.cert_file`, in PEM.",
    ),
    Key::new(
        "ingress.max_connections",
        "4096",
        Allowed::Integer(1, 1_000_000),
        "Connections of clients to the ingress at once. More wait to be accepted.",
    ),
    Key::new(
        "ingress.connections_per_address",
        "512",
        Allowed::Integer(1, 1_000_000),
        "Of those, connections of one address (IPv6: of one /64). More are closed at once.",
    ),
    Key::new(
        "ingress.connections_per_vm",
        "512",
        Allowed::Integer(1, 60_000),
        "Connections of the ingress into one port of a VM at once, WebSockets among them. Requests for which there is none get 503.",
    ),
    Key::new(
        "ingress.idle_timeout_ms",
        "60000",
        MILLIS,
        "How long a client's connection may be idle, and how long it has for a request's head.",
    ),
    Key::new(
        "ingress.body_timeout_ms",
        "60000",
        MILLIS,
        "How long a client may send nothing of a request's body that a program waits for.",
    ),
    Key::new(
        "ingress.answer_timeout_ms",
        "120000",
        MILLIS,
        "How long a program may take from a request's end until its answer begins.",
    ),
    Key::new(
        "ingress.stream_timeout_ms",
        "3600000",
        MILLIS,
        "How long an answer (server-sent events), a WebSocket or a gRPC stream may be silent.",
    ),
    Key::new(
        "ingress.trust_forwarded",
        "false",
        SWITCH,
        "Whether clients' `X-Forwarded-*` is believed and continued: set it only behind a proxy that writes these headers itself.",
    ),
    Key::new("ingress.access_log", "false", SWITCH, "Whether each request through the ingress is logged."),
    Key::new(
        "limits.snapshots_per_account",
        "100",
        Allowed::Integer(0, 1_000_000),
        "Snapshots that one account may have. Each counts for the disk of its quota too.",
    ),
    Key::new(
        "limits.event_streams",
        "16",
        Allowed::Integer(1, 1024),
        "Streams of events (`/v1/admin/events`) open at once.",
    ),
    Key::new(
        "limits.log_streams",
        "256",
        Allowed::Integer(1, 100_000),
        "Streams of what VMs' programs print (`/v1/vms/{id}/logs/stream`) open at once.",
    ),
    Key::new(
        "logs.bytes_per_vm",
        "67108864",
        Allowed::Integer(1 << 20, 1 << 40),
        "What the lines that a VM's program prints may take on the disk, in bytes; the oldest are forgotten.",
    ),
    Key::new(
        "logs.kept_days",
        "14",
        Allowed::Integer(1, 36_500),
        "How long these lines are kept, in days, whether their VM is there or not.",
    ),
    Key::new(
        "logs.line_bytes",
        "16384",
        Allowed::Integer(256, 1 << 20),
        "The longest line that is kept whole, in bytes; of a longer one the beginning is.",
    ),
    Key::new(
        "activity.kept_days",
        "90",
        Allowed::Integer(1, 36_500),
        "How long the activity and exec logs are remembered, in days.",
    ),
    Key::new(
        "activity.kept_entries",
        "100000",
        Allowed::Integer(100, 100_000_000),
        "Entries of the activity that are remembered; older ones are forgotten. Those of administration don't count, and are forgotten by age alone.",
    ),
    Key::new(
        "rate.vm_create_per_min",
        "30",
        PER_MINUTE,
        "Creates of VMs (`POST /v1/vms`), forks and snapshots together that one API key may make a minute; 0 is no limit. So it is for the other rates.",
    ),
    Key::new(
        "rate.exec_per_min",
        "60",
        PER_MINUTE,
        "Commands (`exec`) and terminals, together, that one API key may start a minute.",
    ),
    Key::new(
        "rate.run_per_min",
        "60",
        PER_MINUTE,
        "Scripts (`run-ts` and `run-js`, together) that one API key may start a minute.",
    ),
    Key::new(
        "rate.upload_per_min",
        "30",
        PER_MINUTE,
        "Uploads and writes of files, together, that one API key may make a minute.",
    ),
    Key::new(
        "rate.download_per_min",
        "60",
        PER_MINUTE,
        "Downloads and reads of files and lists of folders, together, that one API key may make a minute.",
    ),
    Key::new("rate.import_per_min", "20", PER_MINUTE, "Imports of images that one API key may begin a minute."),
    Key::new(
        "rate.auth_failures_per_min",
        "60",
        PER_MINUTE,
        "Wrong API keys that are answered as such to one address a minute; more get 429. A right key is never refused for it.",
    ),
    Key::new("rate.login_per_min", "10", PER_MINUTE, "Attempts to log in with one email from one address a minute."),
    Key::new(
        "rate.login_email_per_min",
        "200",
        PER_MINUTE,
        "Attempts to log in with one email from all addresses a minute.",
    ),
    Key::new(
        "rate.login_address_per_min",
        "60",
        PER_MINUTE,
        "Attempts to log in from one address a minute, and log-outs without a session. Behind a proxy all come from its address, unless `http.trust_proxy` is set.",
    ),
    Key::new(
        "session.idle_s",
        "43200",
        Allowed::Integer(1, 31_536_000),
        "How long a session lasts without being used, in seconds.",
    ),
    Key::new(
        "session.max_s",
        "604800",
        Allowed::Integer(1, 31_536_000),
        "How long a session lasts at most, in seconds.",
    ),
    Key::new(
        "admin.email",
        "admin@tiffin.local",
        Allowed::Words("an email address of at most 254 characters"),
        "What the administrator whom the first start makes logs in with.",
    ),
    Key::new("webhooks.per_account", "20", Allowed::Integer(0, 10_000), "Webhooks that one account may have."),
    Key::new(
        "webhooks.allow_http",
        "false",
        SWITCH,
        "Whether webhooks may have http URLs. What is delivered to those can be read and changed on the way.",
    ),
    Key::unset(
        "webhooks.allow_networks",
        "none",
        Allowed::Words("networks in CIDR notation, as a list or with commas between, such as 10.1.0.0/16,::1/128"),
        "Networks that webhooks may lead to although they are private, loopback or otherwise special, or the server's own addresses. Whoever may make webhooks can send requests there.",
    ),
    Key::unset(
        "webhooks.ca_file",
        "the system's authorities alone",
        PATH,
        "Certificates of authorities (PEM) that are believed beside the system's, for receivers of webhooks. Read once, at start.",
    ),
    Key::new(
        "webhooks.connect_timeout_ms",
        "5000",
        Allowed::Integer(50, 60_000),
        "How long resolving, connecting and agreeing on TLS may take at each attempt to deliver.",
    ),
    Key::new(
        "webhooks.timeout_ms",
        "15000",
        Allowed::Integer(50, 120_000),
        "How long an attempt to deliver may take altogether.",
    ),
    Key::new(
        "webhooks.retry_delays_s",
        "5,30,120,600,1800,3600,7200,14400,28800,28800",
        Allowed::Words("1 to 30 whole numbers from 0 to 604800, as a list or with commas between"),
        "The pauses between attempts to deliver, in seconds, each spread by a fifth; after the attempt that follows the last a delivery has failed.",
    ),
    Key::new(
        "webhooks.disable_after_s",
        "432000",
        Allowed::Integer(1, 31_536_000),
        "For how long every attempt must have failed until a webhook is disabled, in seconds.",
    ),
    Key::new("webhooks.in_flight", "32", Allowed::Integer(1, 1024), "Attempts to deliver that go on at once."),
    Key::new(
        "webhooks.in_flight_each",
        "4",
        Allowed::Integer(1, 256),
        "Attempts that go on at once for one webhook, so that a slow receiver doesn't hold up others.",
    ),
    Key::new(
        "webhooks.response_bytes",
        "16384",
        Allowed::Integer(0, 1 << 20),
        "How much of a receiver's answer is read before the connection is closed, in bytes. None of it is kept.",
    ),
    Key::new(
        "webhooks.kept_days",
        "7",
        Allowed::Integer(1, 365),
        "How long deliveries are remembered, in days; also those that wait for a webhook that is disabled.",
    ),
    Key::new(
        "webhooks.kept_deliveries",
        "1000",
        Allowed::Integer(10, 1_000_000),
        "Deliveries that are remembered of each webhook once they are done; older ones are forgotten.",
    ),
    Key::new("quota.vms", "100", Allowed::Integer(0, 1_000_000), "VMs of a new account."),
    Key::new("quota.cpus", "200", Allowed::Integer(0, 1_000_000), "vCPUs of a new account's running VMs together."),
    Key::new(
        "quota.mem_mb",
        "204800",
        Allowed::Integer(0, 1_000_000_000),
        "Memory of a new account's running VMs together, in MiB.",
    ),
    Key::new(
        "quota.disk_mb",
        "1024000",
        Allowed::Integer(0, 1_000_000_000),
        "Disk of a new account's VMs together, in MiB.",
    ),
    Key::new(
        "images.max_rootfs_bytes",
        "17179869184",
        Allowed::Integer(1 << 20, 1 << 44),
        "The largest filesystem that may be uploaded, in bytes; its files may have as many together.",
    ),
    Key::new(
        "images.max_kernel_bytes",
        "134217728",
        Allowed::Integer(1 << 20, 1 << 32),
        "The largest kernel that may be uploaded, in bytes.",
    ),
    Key::new(
        "images.max_entries",
        "1000000",
        Allowed::Integer(1000, 10_000_000),
        "Files, folders and links that an uploaded filesystem may have.",
    ),
    Key::new(
        "images.convert_timeout_ms",
        "1800000",
        Allowed::Integer(1000, 86_400_000),
        "How long reading an uploaded filesystem may take.",
    ),
    Key::new(
        "images.uploads_in_flight",
        "4",
        Allowed::Integer(1, 64),
        "Uploads to images that are received at once; further ones get 503. One account may have one fewer, where there is more than one; further ones of it get 429. They are made images of one after the other, each account in its turn.",
    ),
    Key::new(
        "images.min_upload_bytes_per_s",
        "125000",
        Allowed::Integer(0, 1 << 40),
        "What an upload to an image must bring a second, measured over each stretch of images.upload_stretch_ms; 0 is no limit. One that is slower breaks off, and can be gone on with.",
    ),
    Key::new(
        "images.upload_stretch_ms",
        "60000",
        Allowed::Integer(100, 3_600_000),
        "The stretch of time over which the pace of an upload to an image is measured.",
    ),
    Key::new(
        "images.partial_kept_s",
        "86400",
        Allowed::Integer(1, 31_536_000),
        "How long what came of an upload that broke off is kept, in seconds, for the client to go on with it.",
    ),
    Key::new(
        "images.scrub_mib_per_s",
        "32",
        Allowed::Integer(0, 100_000),
        "How fast images that are stored are read again to see whether they are damaged, in MiB a second; 0 is never.",
    ),
    Key::new(
        "images.scrub_every_s",
        "86400",
        Allowed::Integer(1, 31_536_000),
        "How long to wait, in seconds, between two such looks at all of them; the first is at the server's start.",
    ),
    Key::new(
        "images.min_free_disk_mb",
        "1024",
        Allowed::Integer(0, 1_000_000_000),
        "Disk that uploads to images leave free, in MiB.",
    ),
    Key::new("images.per_account", "50", Allowed::Integer(0, 1_000_000), "Images of an account."),
    Key::new(
        "images.bytes_per_account",
        "68719476736",
        Allowed::Integer(0, 1 << 50),
        "What an account's images may take on the host together, in bytes.",
    ),
    Key::new(
        "registry.loopback",
        "true",
        SWITCH,
        "Whether images may be imported from registries on the server's own loopback addresses, which are spoken to without TLS then. Where this is off, registry.allow_networks can let them in all the same, by TLS.",
    ),
    Key::unset(
        "registry.allow_networks",
        "public addresses alone",
        Allowed::Words("networks, comma-separated, such as 10.1.0.0/16,fd12::/48"),
        "Networks that registries, and what they point to, may be in although they are private.",
    ),
    Key::unset(
        "registry.plain_http",
        "only those on loopback",
        Allowed::Words("hosts, or hosts and ports, comma-separated, such as registry.internal:5000"),
        "Registries that are spoken to without TLS. One on a private address needs registry.allow_networks too.",
    ),
    Key::unset(
        "registry.ca_file",
        "the system's authorities alone",
        PATH,
        "Certificates of authorities (PEM) that are believed beside the system's, for registries and what they point to. Read once, at start.",
    ),
    Key::new(
        "registry.timeout_ms",
        "3600000",
        Allowed::Integer(1000, 86_400_000),
        "How long importing an image may take.",
    ),
    Key::new(
        "registry.imports_in_flight",
        "4",
        Allowed::Integer(1, 64),
        "Images that are imported at once; further ones wait. One account may have one fewer, those that wait among them, where there is more than one; further ones of it get 429.",
    ),
    Key::new(
        "registry.imports_queued",
        "16",
        Allowed::Integer(0, 10_000),
        "Imports that may wait for one of those places; further ones get 503.",
    ),
    Key::new(
        "registry.import_wait_ms",
        "60000",
        Allowed::Integer(0, 600_000),
        "How long such an import waits before it gets 503.",
    ),
    Key::new(
        "registry.cache_mb",
        "10240",
        Allowed::Integer(0, 1_000_000_000),
        "What layers of imported images may take on the disk between imports, in MiB; those not used for the longest time go.",
    ),
    Key::new(
        "network.uplink_cidr",
        "10.213.0.0/16",
        Allowed::Words("an IPv4 network with a prefix from /8 to /24 and no host bits, such as 10.213.0.0/16"),
        "Where the links between the host and VMs with outbound access get their addresses. Pick one that your network doesn't use.",
    ),
    Key::unset(
        "network.resolvers",
        "those of the host",
        Allowed::Words("IP addresses, as a list or with commas between"),
        "Name servers for VMs that may reach something outside.",
    ),
    Key::new("metrics.require_key", "false", SWITCH, "Whether /metrics asks for an API key with the admin scope."),
    Key {
        name: "fault",
        default: "",
        unset: "none",
        allowed: Allowed::Words("the name of a fault point"),
        doc: "Test-only: where the process kills itself.",
        hidden: true,
    },
];

/// Every documented setting as a table in Markdown.
pub fn document() -> String {
    let mut page = String::from("| key | environment | default | allowed | meaning |\n|---|---|---|---|---|\n");
    for key in KEYS.iter().filter(|key| !key.hidden) {
        let default = if key.default.is_empty() { key.unset.to_owned() } else { format!("`{}`", key.default) };
        let (name, variable, allowed, doc) = (key.name, key.variable(), key.allowed, key.doc);
        writeln!(page, "| `{name}` | `{variable}` | {default} | {allowed} | {doc} |")
            .expect("a String takes whatever is written");
    }
    page
}
