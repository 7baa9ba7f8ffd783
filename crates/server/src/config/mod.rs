//! The configuration: parsed once, from a file, the environment and overrides, later ones first.
//!
//! Invariant: nothing else in the server reads a file of settings or an environment variable, and a [`Config`] that
//! exists is within every range. [`KEYS`] is the one list of settings: defaults, ranges, error texts and the
//! documentation come from it.

mod ingress;
mod keys;
mod sources;

use std::{net::IpAddr, net::SocketAddr, path::Path, time::Duration};

use camino::Utf8PathBuf;
use ipnet::{IpNet, Ipv4Net};
use tiffin_store::ImageQuota;
use tiffin_types::{account::Quota, limits, network::parse_allow_entry, vm::EngineName};

pub use ingress::IngressConfig;
pub use keys::{Allowed, KEYS, Key, document};
pub use sources::{ConfigError, Origin};
use sources::{Values, collect};

/// The file that is read when none is named and it exists.
pub const DEFAULT_FILE: &str = "/etc/tiffin/tiffin.toml";

/// All settings, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the API listens.
    pub listen: SocketAddr,
    /// Where VMs, images and the SQLite database live.
    pub data_dir: Utf8PathBuf,
    /// Where images are mounted; a reboot may empty it.
    pub run_dir: Utf8PathBuf,
    /// `sqlite://` or `postgres://`. May hold a password: never logged.
    pub database_url: Secret,
    /// Which engine runs VMs.
    pub engine: EngineChoice,
    /// The `runsc` to use; the first on `PATH` when not set.
    pub runsc: Option<Utf8PathBuf>,
    /// What VMs with a kernel of their own are made of.
    pub qemu: QemuConfig,
    /// The guest agent to use; found beside the program when not set.
    pub agent: Option<Utf8PathBuf>,
    /// Logging.
    pub log: LogConfig,
    /// HTTP.
    pub http: HttpConfig,
    /// Commands in VMs.
    pub exec: ExecConfig,
    /// Files of VMs.
    pub files: FilesConfig,
    /// Terminals in VMs.
    pub terminal: TerminalConfig,
    /// VMs.
    pub vm: VmConfig,
    /// Bounds on what the server takes on at once.
    pub limits: LimitsConfig,
    /// VMs that are booted ahead.
    pub pool: PoolConfig,
    /// VMs that run their image's program.
    pub services: ServicesConfig,
    /// How VMs are reached from outside.
    pub ingress: IngressConfig,
    /// What a new account may use when its creator doesn't say.
    pub quota: Quota,
    /// How often one caller may do what is costly.
    pub rate: RateConfig,
    /// How much of what VMs' programs print is kept.
    pub logs: tiffin_logs::Limits,
    /// The audit trail.
    pub activity: ActivityConfig,
    /// Sessions.
    pub session: SessionConfig,
    /// Webhooks and deliveries to them.
    pub webhooks: WebhooksConfig,
    /// What the first administrator logs in with.
    pub admin_email: String,
    /// Images and uploads to them.
    pub images: ImagesConfig,
    /// Registries that images are imported from.
    pub registry: RegistryConfig,
    /// Networks of VMs.
    pub network: NetworkConfig,
    /// Whether `/metrics` asks for an API key.
    pub metrics_require_key: bool,
    /// Test-only: the named point at which the process kills itself.
    pub fault: Option<String>,
}

/// Which engine runs VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// The best that works here.
    Auto,
    /// That one.
    Named(EngineName),
}

/// What VMs with a kernel of their own are made of.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// The QEMU program; the first on `PATH` when not set.
    pub program: Option<Utf8PathBuf>,
    /// The guests' kernel; without one there are no such VMs.
    pub kernel: Option<Utf8PathBuf>,
    /// That kernel's modules; beside it when not set.
    pub modules: Option<Utf8PathBuf>,
    /// How many guests are kept as they had booted, for others to begin with.
    pub templates: usize,
}

/// Logging.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// Lines as JSON rather than text.
    pub json: bool,
    /// The least severe level that is written: `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
}

/// HTTP.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// How long a client has for a request's head, and how long an idle connection is kept.
    pub header_timeout: Duration,
    /// How long a client has for a request's body.
    pub body_timeout: Duration,
    /// How long a client may take nothing of an answer.
    pub write_timeout: Duration,
    /// How long an operation that has no limit of its own may take until its answer begins.
    pub request_timeout: Duration,
    /// Whether a proxy's `X-Forwarded-Proto` is believed.
    pub trust_proxy: bool,
    /// Connections open at once; more wait to be accepted.
    pub max_connections: usize,
    /// How long requests in flight may go on after a request to shut down.
    pub shutdown_grace: Duration,
}

/// VMs that run their image's program.
#[derive(Debug, Clone)]
pub struct ServicesConfig {
    /// Cached VMs that are kept booted while they are down.
    pub prepared: usize,
    /// Whether they reach the public internet.
    pub outbound_internet: bool,
}

/// Commands in VMs.
#[derive(Debug, Clone)]
pub struct ExecConfig {
    /// The largest `timeoutMs`.
    pub max_timeout_ms: u64,
    /// Commands at once in one VM.
    pub max_concurrent: usize,
    /// Whether logs of runs show the beginning of the command.
    pub log_commands: bool,
    /// Runs remembered of each VM.
    pub logs_kept: u32,
}

/// Files of VMs.
#[derive(Debug, Clone)]
pub struct FilesConfig {
    /// Bytes of an uploaded archive.
    pub upload_bytes: u64,
    /// Bytes of its files.
    pub unpacked_bytes: u64,
    /// Its files and folders.
    pub entries: u64,
    /// Unpacked bytes for each byte of it.
    pub ratio: u64,
    /// Bytes of a file that is written alone.
    pub file_bytes: u64,
    /// Bytes of a download.
    pub download_bytes: u64,
    /// How long one operation may take.
    pub timeout: Duration,
}

/// Terminals in VMs.
#[derive(Debug, Clone)]
pub struct TerminalConfig {
    /// How long one may stay open.
    pub max_session_ms: u64,
    /// Between two questions whether its client is there.
    pub ping: Duration,
}

/// VMs.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// How long a VM may take to come up.
    pub start_timeout: Duration,
    /// How long a VM's processes have to end at a stop.
    pub stop_grace: Duration,
    /// How long saving a VM may take.
    pub snapshot_timeout: Duration,
    /// Between two comparisons of all VMs with what the engine sees.
    pub reconcile_every: Duration,
}

/// Bounds on what the server takes on at once.
#[derive(Debug, Clone)]
pub struct LimitsConfig {
    /// Bytes of a JSON body.
    pub body_bytes: usize,
    /// VMs that come up at once.
    pub creates_in_flight: usize,
    /// Requests that wait for one of those places.
    pub creates_queued: usize,
    /// How long they wait.
    pub create_wait: Duration,
    /// Streams of events at once.
    pub event_streams: usize,
    /// Streams of logs at once.
    pub log_streams: usize,
    /// Snapshots of one account.
    pub snapshots_per_account: u32,
}

/// How often one caller, or for wrong keys one address, may do something in a minute; 0 is no limit.
#[derive(Debug, Clone)]
pub struct RateConfig {
    /// Creates of VMs.
    pub vm_create: u32,
    /// Commands.
    pub exec: u32,
    /// Scripts.
    pub run: u32,
    /// Uploads.
    pub upload: u32,
    /// Downloads.
    pub download: u32,
    /// Imports of images.
    pub import: u32,
    /// Wrong API keys.
    pub auth_failures: u32,
    /// Attempts to log in with one email from one address.
    pub login: u32,
    /// Attempts to log in with one email from everywhere.
    pub login_email: u32,
    /// Attempts to log in from one address.
    pub login_address: u32,
}

/// The audit trail.
#[derive(Debug, Clone)]
pub struct ActivityConfig {
    /// How long entries are remembered.
    pub kept: Duration,
    /// How many are.
    pub entries: u64,
}

/// Sessions.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// How long one lasts without being used.
    pub idle: Duration,
    /// How long one lasts.
    pub max: Duration,
}

/// VMs that are booted ahead.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// All of them together; 0 is none.
    pub max_vms: usize,
    /// For how long a create counts as recent.
    pub recent: Duration,
    /// What is kept whether it was asked for or not.
    pub keep: Vec<Keep>,
}

/// VMs of one size that are kept ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// vCPUs.
    pub cpus: u32,
    /// Memory, in MiB.
    pub mem_mb: u32,
    /// How many.
    pub count: usize,
}

/// Images and uploads to them.
#[derive(Debug, Clone)]
pub struct ImagesConfig {
    /// Bytes of an uploaded filesystem, and of the files in it.
    pub max_rootfs_bytes: u64,
    /// Bytes of an uploaded kernel.
    pub max_kernel_bytes: u64,
    /// Files, folders and links of an uploaded filesystem.
    pub max_entries: u64,
    /// How long reading an uploaded filesystem may take.
    pub convert_timeout: Duration,
    /// Uploads that are received at once.
    pub uploads_in_flight: usize,
    /// Bytes that an upload must bring a second; 0 is no limit.
    pub min_upload_bytes_per_s: u64,
    /// The stretch of time over which that is measured.
    pub upload_stretch: Duration,
    /// How long what came of an upload that broke off is kept.
    pub partial_kept: Duration,
    /// Bytes a second that are read of stored images to see whether they are damaged; 0 is never.
    pub scrub_bytes_per_s: u64,
    /// Between two looks at all of them.
    pub scrub_every: Duration,
    /// Bytes of disk that uploads leave free.
    pub min_free_disk_bytes: u64,
    /// What an account's images may be and take.
    pub quota: ImageQuota,
}

/// Webhooks and deliveries to them.
#[derive(Debug, Clone)]
pub struct WebhooksConfig {
    /// Webhooks of one account.
    pub per_account: u32,
    /// Whether plain HTTP is fine.
    pub allow_http: bool,
    /// Networks that aren't public and may be delivered to.
    pub allow_networks: Vec<IpNet>,
    /// Certificates of further authorities.
    pub ca_file: Option<Utf8PathBuf>,
    /// For the connection of an attempt.
    pub connect_timeout: Duration,
    /// For an attempt.
    pub timeout: Duration,
    /// Between attempts.
    pub retry_delays: Vec<Duration>,
    /// How long everything must have failed until a webhook is disabled.
    pub disable_after: Duration,
    /// Attempts at once.
    pub in_flight: usize,
    /// Attempts at once for one webhook.
    pub in_flight_each: u32,
    /// Bytes of an answer that are read.
    pub response_bytes: usize,
    /// How long deliveries are remembered.
    pub kept: Duration,
    /// Deliveries remembered of each webhook.
    pub kept_deliveries: u64,
}

/// Registries that images are imported from.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Whether those on loopback are let in.
    pub loopback: bool,
    /// Networks that are let in although they are private.
    pub allow_networks: Vec<IpNet>,
    /// Hosts, some with ports, that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// Certificates of further authorities.
    pub ca_file: Option<Utf8PathBuf>,
    /// How long an import may take.
    pub timeout: Duration,
    /// Imports at once.
    pub imports_in_flight: usize,
    /// Imports that wait for one of those places.
    pub imports_queued: usize,
    /// How long they wait.
    pub import_wait: Duration,
    /// Bytes that layers may take between imports.
    pub cache_bytes: u64,
}

/// Networks of VMs.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Where the host's ends of VMs' uplinks get their addresses.
    pub uplink: Ipv4Net,
    /// Name servers for guests; the host's own when not set.
    pub resolvers: Option<Vec<IpAddr>>,
}

/// A text that isn't shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl Secret {
    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

impl Config {
    /// Reads the file, then the environment's `TIFFIN_*`, then the overrides (flags, as `key=value`); the last to name
    /// a key wins.
    ///
    /// # Errors
    /// The first unknown key or bad value, with the key, its source, what is allowed and what to do.
    pub fn load(
        file: Option<&Path>,
        env: impl Iterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        Self::from_values(&collect(file, env, overrides)?)
    }

    fn from_values(values: &Values) -> Result<Self, ConfigError> {
        let data_dir = values.path("data_dir")?;
        Ok(Self {
            listen: values.parse("listen")?,
            database_url: database_url(values, &data_dir)?,
            data_dir,
            run_dir: values.path("run_dir")?,
            engine: engine(values)?,
            runsc: values.optional_path("runsc")?,
            qemu: QemuConfig {
                program: values.optional_path("qemu.program")?,
                kernel: values.optional_path("qemu.kernel")?,
                modules: values.optional_path("qemu.modules")?,
                templates: values.count("qemu.templates")?,
            },
            agent: values.optional_path("agent")?,
            log: LogConfig {
                json: values.one_of("log.format")? == "json",
                level: values.one_of("log.level")?.to_owned(),
            },
            http: HttpConfig {
                header_timeout: values.millis("http.header_timeout_ms")?,
                body_timeout: values.millis("http.body_timeout_ms")?,
                write_timeout: values.millis("http.write_timeout_ms")?,
                request_timeout: values.millis("http.request_timeout_ms")?,
                trust_proxy: values.one_of("http.trust_proxy")? == "true",
                max_connections: values.count("http.max_connections")?,
                shutdown_grace: values.millis("http.shutdown_grace_ms")?,
            },
            exec: ExecConfig {
                max_timeout_ms: values.integer("exec.max_timeout_ms")?,
                max_concurrent: values.count("exec.max_concurrent")?,
                log_commands: values.one_of("exec.log_commands")? == "true",
                logs_kept: values.small("exec.logs_kept")?,
            },
            files: FilesConfig {
                upload_bytes: values.integer("files.upload_bytes")?,
                unpacked_bytes: values.integer("files.unpacked_bytes")?,
                entries: values.integer("files.entries")?,
                ratio: values.integer("files.ratio")?,
                file_bytes: values.integer("files.file_bytes")?,
                download_bytes: values.integer("files.download_bytes")?,
                timeout: values.millis("files.timeout_ms")?,
            },
            terminal: TerminalConfig {
                max_session_ms: values.integer("terminal.max_session_ms")?,
                ping: values.millis("terminal.ping_ms")?,
            },
            vm: VmConfig {
                start_timeout: values.millis("vm.start_timeout_ms")?,
                stop_grace: values.millis("vm.stop_grace_ms")?,
                snapshot_timeout: values.millis("vm.snapshot_timeout_ms")?,
                reconcile_every: values.millis("vm.reconcile_ms")?,
            },
            limits: LimitsConfig {
                body_bytes: values.count("limits.body_bytes")?,
                creates_in_flight: values.count("limits.creates_in_flight")?,
                creates_queued: values.count("limits.creates_queued")?,
                create_wait: values.millis("limits.create_wait_ms")?,
                event_streams: values.count("limits.event_streams")?,
                log_streams: values.count("limits.log_streams")?,
                snapshots_per_account: values.small("limits.snapshots_per_account")?,
            },
            pool: PoolConfig {
                max_vms: values.count("pool.max_vms")?,
                recent: values.millis("pool.recent_ms")?,
                keep: values
                    .optional("pool.keep", |text| text.split(',').map(|entry| keep(entry.trim())).collect())?
                    .unwrap_or_default(),
            },
            services: ServicesConfig {
                prepared: values.count("services.prepared")?,
                outbound_internet: values.one_of("services.outbound_internet")? == "true",
            },
            ingress: IngressConfig::from_values(values, values.millis("http.shutdown_grace_ms")?)?,
            quota: Quota {
                vms: values.small("quota.vms")?,
                cpus: values.small("quota.cpus")?,
                mem_mb: values.integer("quota.mem_mb")?,
                disk_mb: values.integer("quota.disk_mb")?,
            },
            rate: RateConfig {
                vm_create: values.small("rate.vm_create_per_min")?,
                exec: values.small("rate.exec_per_min")?,
                run: values.small("rate.run_per_min")?,
                upload: values.small("rate.upload_per_min")?,
                download: values.small("rate.download_per_min")?,
                import: values.small("rate.import_per_min")?,
                auth_failures: values.small("rate.auth_failures_per_min")?,
                login: values.small("rate.login_per_min")?,
                login_email: values.small("rate.login_email_per_min")?,
                login_address: values.small("rate.login_address_per_min")?,
            },
            logs: tiffin_logs::Limits::new(
                values.integer("logs.bytes_per_vm")?,
                Duration::from_secs(values.integer("logs.kept_days")? * 24 * 3600),
                values.count("logs.line_bytes")?,
            ),
            activity: ActivityConfig {
                kept: Duration::from_secs(values.integer("activity.kept_days")? * 24 * 3600),
                entries: values.integer("activity.kept_entries")?,
            },
            session: SessionConfig {
                idle: Duration::from_secs(values.integer("session.idle_s")?),
                max: Duration::from_secs(values.integer("session.max_s")?),
            },
            webhooks: WebhooksConfig {
                per_account: values.small("webhooks.per_account")?,
                allow_http: values.one_of("webhooks.allow_http")? == "true",
                allow_networks: values
                    .optional("webhooks.allow_networks", |text| {
                        text.split(',').map(|net| parse_allow_entry(net.trim()).ok()).collect()
                    })?
                    .unwrap_or_default(),
                ca_file: values.optional_path("webhooks.ca_file")?,
                connect_timeout: values.millis("webhooks.connect_timeout_ms")?,
                timeout: values.millis("webhooks.timeout_ms")?,
                retry_delays: values.with("webhooks.retry_delays_s", retry_delays)?,
                disable_after: Duration::from_secs(values.integer("webhooks.disable_after_s")?),
                in_flight: values.count("webhooks.in_flight")?,
                in_flight_each: values.small("webhooks.in_flight_each")?,
                response_bytes: values.count("webhooks.response_bytes")?,
                kept: Duration::from_secs(values.integer("webhooks.kept_days")? * 24 * 3600),
                kept_deliveries: values.integer("webhooks.kept_deliveries")?,
            },
            admin_email: values.with("admin.email", crate::app::sessions::email_form)?,
            images: ImagesConfig {
                max_rootfs_bytes: values.integer("images.max_rootfs_bytes")?,
                max_kernel_bytes: values.integer("images.max_kernel_bytes")?,
                max_entries: values.integer("images.max_entries")?,
                convert_timeout: values.millis("images.convert_timeout_ms")?,
                uploads_in_flight: values.count("images.uploads_in_flight")?,
                min_upload_bytes_per_s: values.integer("images.min_upload_bytes_per_s")?,
                upload_stretch: values.millis("images.upload_stretch_ms")?,
                partial_kept: Duration::from_secs(values.integer("images.partial_kept_s")?),
                scrub_bytes_per_s: values.integer("images.scrub_mib_per_s")? << 20,
                scrub_every: Duration::from_secs(values.integer("images.scrub_every_s")?),
                min_free_disk_bytes: values.integer("images.min_free_disk_mb")? << 20,
                quota: ImageQuota {
                    images: values.integer("images.per_account")?,
                    bytes: values.integer("images.bytes_per_account")?,
                },
            },
            registry: RegistryConfig {
                loopback: values.one_of("registry.loopback")? == "true",
                allow_networks: values
                    .optional("registry.allow_networks", |text| {
                        text.split(',').map(|net| net.trim().parse().ok()).collect()
                    })?
                    .unwrap_or_default(),
                plain_http: values
                    .optional("registry.plain_http", |text| {
                        text.split(',').map(|host| registry_host(host.trim())).collect()
                    })?
                    .unwrap_or_default(),
                ca_file: values.optional_path("registry.ca_file")?,
                timeout: values.millis("registry.timeout_ms")?,
                imports_in_flight: values.count("registry.imports_in_flight")?,
                imports_queued: values.count("registry.imports_queued")?,
                import_wait: values.millis("registry.import_wait_ms")?,
                cache_bytes: values.integer("registry.cache_mb")? << 20,
            },
            network: NetworkConfig {
                uplink: uplink(values)?,
                resolvers: values.optional("network.resolvers", |text| {
                    text.split(',').map(|address| address.trim().parse().ok()).collect()
                })?,
            },
            metrics_require_key: values.one_of("metrics.require_key")? == "true",
            fault: values.optional("fault", |text| Some(text.to_owned()))?,
        })
    }
}

fn database_url(values: &Values, data_dir: &Utf8PathBuf) -> Result<Secret, ConfigError> {
    let schemes = ["sqlite://", "postgres://", "postgresql://"];
    let url = values.optional("database_url", |text| {
        schemes.iter().any(|scheme| text.starts_with(scheme)).then(|| text.to_owned())
    })?;
    Ok(Secret(url.unwrap_or_else(|| format!("sqlite://{data_dir}/tiffin.db"))))
}

fn engine(values: &Values) -> Result<EngineChoice, ConfigError> {
    match values.one_of("engine")? {
        "auto" => Ok(EngineChoice::Auto),
        _ => values.parse("engine").map(EngineChoice::Named),
    }
}

fn keep(entry: &str) -> Option<Keep> {
    let (size, count) = entry.split_once('=')?;
    let (cpus, mem_mb) = size.split_once('x')?;
    let keep = Keep { cpus: cpus.parse().ok()?, mem_mb: mem_mb.parse().ok()?, count: count.parse().ok()? };
    let fits = limits::CPU.contains(&keep.cpus) && limits::MEM_MB.contains(&keep.mem_mb) && keep.count <= 1000;
    fits.then_some(keep)
}

fn retry_delays(text: &str) -> Option<Vec<Duration>> {
    let seconds = |word: &str| word.trim().parse().ok().filter(|seconds| *seconds <= 604_800);
    let delays: Vec<u64> = text.split(',').map(seconds).collect::<Option<_>>()?;
    (delays.len() <= 30).then(|| delays.into_iter().map(Duration::from_secs).collect())
}

/// A registry's host as references have it.
fn registry_host(text: &str) -> Option<String> {
    let reference: tiffin_image::oci::Reference = format!("{text}/x").parse().ok()?;
    (reference.host() == text.to_ascii_lowercase()).then(|| reference.host().to_owned())
}

fn uplink(values: &Values) -> Result<Ipv4Net, ConfigError> {
    values.with("network.uplink_cidr", |text| {
        text.parse::<Ipv4Net>().ok().filter(|net| (8..=24).contains(&net.prefix_len()) && net.trunc() == *net)
    })
}

#[cfg(test)]
mod tests;
