//! Kernels of images, in real VMs under QEMU: that they boot instead of the host's, what is said of those that don't, and
//! that they stay as long as something boots them.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/kernels.rs"]
mod kernels;
#[path = "vms/server.rs"]
mod server;

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use harness::{Host, sh};
use kernels::MARK;
use serde_json::{Value, json};
use server::Site;
use tiffin_engine::{Engine, EngineError, LogKind, monitored::MachinesConfig};
use tiffin_types::vm::{EndReason, EndReport, EngineName, VmSpec};

/// What a VM of that kernel is to be.
fn spec(host: &Host, kernel: &[u8]) -> VmSpec {
    VmSpec { kernel: Some(kernels::keep(&host.config.data_dir, kernel)), ..host.spec() }
}

/// How a VM of that kernel ends that doesn't come up, and the end of its console; nothing else is left of it.
async fn end_of(host: &Host, kernel: &[u8]) -> (EndReport, String) {
    let spec = spec(host, kernel);
    host.engine.create(&spec).await.unwrap();
    let report = match host.engine.start(&spec.id).await {
        Err(EngineError::Ended(report)) => report,
        other => panic!("{other:?}"),
    };
    let console = host.engine.log_tail(&spec.id, LogKind::Console, 50).await.unwrap().lines.join("\n");
    let ids = [spec.id];
    assert_eq!(harness::leftovers(host, &ids), Vec::<String>::new());
    host.engine.destroy(&ids[0]).await.unwrap();
    (report, console)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_boots_the_kernel_of_its_image_at_every_start_and_others_the_hosts() {
    let host = Host::with(EngineName::Qemu).await;
    let (own, other) = (host.running_as(spec(&host, &kernels::marked())).await, host.running().await);
    let [mine, hosts] =
        [sh(&*host.engine, &own, "uname -rv").await.stdout, sh(&*host.engine, &other, "uname -rv").await.stdout];
    assert!(mine.contains(MARK) && !hosts.contains(MARK), "{mine}{hosts}");
    assert_eq!(mine.replace(MARK, "Debian"), hosts, "they differ in nothing else");
    host.engine.stop(&own, Duration::from_secs(5)).await.unwrap();
    host.engine.start(&own).await.unwrap();
    assert_eq!(sh(&*host.engine, &own, "uname -rv").await.stdout, mine);
    // As long as the VM is there, so is its kernel.
    let kernel = kernels::keep(&host.config.data_dir, &kernels::marked());
    assert!(!host.engine.image_release(&kernel).await.unwrap());
    for id in [&own, &other] {
        host.engine.destroy(id).await.unwrap();
    }
    assert!(host.engine.image_release(&kernel).await.unwrap());
    assert_eq!(harness::leftovers(&host, &[own, other]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bz_image_boots_too() {
    let host = Host::with(EngineName::Qemu).await;
    let (own, other) = (host.running_as(spec(&host, &kernels::bz_image())).await, host.running().await);
    // Entered by PVH, a kernel takes its boot protocol for 2.12; a bzImage tells its own.
    let ask = "cat /sys/kernel/boot_params/version; uname -r";
    let (mine, hosts) = (sh(&*host.engine, &own, ask).await.stdout, sh(&*host.engine, &other, ask).await.stdout);
    assert!(hosts.starts_with("0x020c\n") && mine.starts_with("0x020"), "{mine}{hosts}");
    assert_ne!(mine, hosts);
    assert_eq!(mine.lines().last(), hosts.lines().last());
    for id in [own, other] {
        host.engine.destroy(&id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_lacks_what_a_guest_needs_is_told_all_of_it_at_once() {
    let host = Host::with(EngineName::Qemu).await;
    let begun = Instant::now();
    let (report, console) = end_of(&host, &kernels::of_another_release()).await;
    assert_eq!(report.reason, EndReason::BootFailed, "{}", report.message);
    let needed =
        "-other-amd64 has no virtio_mmio, virtio_blk, virtio_net, virtio_console, erofs, overlay: build that in";
    assert!(report.message.contains(needed) && report.message.contains("CONFIG_EROFS_FS"), "{}", report.message);
    assert!(console.contains(needed), "{console}");
    assert!(begun.elapsed() < host.config.boot_timeout, "it is told, not waited for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_panics_or_resets_is_no_longer_waited_for_and_its_words_are_kept() {
    let host = Host::with(EngineName::Qemu).await;
    let (report, console) = end_of(&host, &kernels::without_init()).await;
    assert_eq!(report.reason, EndReason::BootFailed, "{}", report.message);
    let panic = "Kernel panic - not syncing: VFS: Unable to mount root fs";
    assert!(report.message.contains(panic) && console.contains(panic), "{}\n{console}", report.message);
    // An undefined instruction, before anything was set up for that: the processor gives up.
    let (report, console) = end_of(&host, &kernels::tiny(&[0x0f, 0x0b])).await;
    assert_eq!((report.reason, &*console), (EndReason::BootFailed, ""), "{}", report.message);
    assert!(report.message.contains("said nothing"), "{}", report.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_hangs_is_given_up_in_time() {
    let mut host = Host::with(EngineName::Qemu).await;
    host.config.boot_timeout = Duration::from_secs(4);
    host.restart().await;
    for code in [&[0xf4, 0xeb, 0xfd][..], &[0xeb, 0xfe]] {
        let (report, _) = end_of(&host, &kernels::tiny(code)).await;
        assert_eq!(report.reason, EndReason::BootTimeout, "{}", report.message);
        assert!(report.message.contains("4000 ms") && report.message.contains("said nothing"), "{}", report.message);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emulator_that_refuses_a_kernel_is_told_from_a_kernel_that_fails() {
    let host = Host::with(EngineName::Qemu).await;
    let (report, _) = end_of(&host, b"no kernel at all").await;
    assert_eq!(report.reason, EndReason::BootFailed);
    assert!(report.message.contains("emulator could not boot"), "{}", report.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn gvisor_refuses_a_kernel_and_a_kernel_that_is_not_here_is_named() {
    let host = Host::with(EngineName::Qemu).await;
    let gvisor = VmSpec { engine: EngineName::Gvisor, ..spec(&host, b"anything") };
    let refused = host.engine.create(&gvisor).await;
    assert!(matches!(refused, Err(EngineError::Unsupported { engine: "gvisor", .. })), "{refused:?}");
    let kinds: Vec<_> = host.engine.kinds().iter().map(|kind| (kind.name, kind.capabilities.kernels)).collect();
    assert_eq!(kinds, [(EngineName::Gvisor, false), (EngineName::Qemu, true)]);
    let absent = VmSpec { kernel: Some(host.image.clone()), ..host.spec() };
    let refused = host.engine.create(&absent).await.unwrap_err().to_string();
    assert!(refused.contains("kernel") && refused.contains(host.image.as_str()), "{refused}");
    assert_eq!(fs::read_dir(host.config.data_dir.join("vms")).unwrap().count(), 0);
}

/// The prepared kernels of a data folder.
fn prepared(host: &Host) -> BTreeSet<String> {
    let folders = fs::read_dir(host.config.data_dir.join("kernels")).unwrap();
    folders.map(|folder| folder.unwrap().file_name().into_string().unwrap()).collect()
}

/// Another release of the platform: its agent differs, so its machines' first files do.
fn upgrade(host: &mut Host) {
    let mut agent = fs::read(&host.config.agent).unwrap();
    agent.push(0);
    let at = host.config.data_dir.with_file_name("agent");
    fs::write(&at, agent).unwrap();
    fs::set_permissions(&at, Permissions::from_mode(0o755)).unwrap();
    host.config.agent = at;
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_that_no_machine_boots_any_more_are_removed_at_the_servers_start() {
    let mut host = Host::with(EngineName::Qemu).await;
    let first = prepared(&host);
    let (id, own) = (host.running().await, host.running_as(spec(&host, &kernels::marked())).await);
    fs::create_dir(host.config.data_dir.join("kernels/killed.unfinished")).unwrap();
    upgrade(&mut host);
    host.restart().await;
    let both = prepared(&host);
    assert!(both.len() == 2 && both.is_superset(&first), "machines run on with the first: {both:?}");
    assert_eq!(sh(&*host.engine, &id, "echo on").await.stdout, "on\n");

    host.engine.stop(&id, Duration::from_secs(5)).await.unwrap();
    host.restart().await;
    assert_eq!(prepared(&host), both, "a kernel of the image's own needs the first files, too");
    host.engine.stop(&own, Duration::from_secs(5)).await.unwrap();
    host.restart().await;
    let last = prepared(&host);
    assert!(last.len() == 1 && last.is_disjoint(&first), "{last:?}");
    for id in [&id, &own] {
        host.engine.start(id).await.unwrap();
        assert_eq!(sh(&*host.engine, id, "echo up").await.stdout, "up\n");
        host.engine.destroy(id).await.unwrap();
    }
    host.config.machines = None::<MachinesConfig>;
    host.config.engine = EngineName::Gvisor;
    host.restart().await;
    assert!(prepared(&host).is_empty());
}

/// A server that has QEMU, on which the default image has that kernel; and the image's path.
async fn site_with(kernel: Vec<u8>) -> (Site, String) {
    let host = format!("qemu.kernel={}", harness::required("TIFFIN_KERNEL").display());
    let site = Site::start(&["images.min_free_disk_mb=64", "vm.reconcile_ms=200", &host]).await;
    let images = site.ask("GET", "/v1/images", None).await.body;
    let image = format!("/v1/images/{}", images[0]["id"].as_str().unwrap());
    put(&site, &image, kernel).await;
    (site, image)
}

async fn put(site: &Site, image: &str, kernel: Vec<u8>) {
    let uploaded = site.try_upload(&format!("{image}/kernel"), kernel).await.unwrap();
    assert_eq!(uploaded.status, 204, "{uploaded:?}");
}

fn small_of(engine: Option<&str>) -> Value {
    let mut body = json!({ "cpu": 1, "memMb": 256, "allowIps": [], "diskSizeMb": 64 });
    if let Some(engine) = engine {
        body["engine"] = json!(engine);
    }
    body
}

fn blobs(site: &Site) -> usize {
    fs::read_dir(site.data.join("images/kernels")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_keeps_the_kernel_it_was_made_with_over_an_upload_a_kill_of_the_server_and_a_stop() {
    let (mut site, image) = site_with(kernels::marked()).await;
    let made = site.ask("POST", "/v1/vms", Some(small_of(None))).await;
    assert_eq!((&made.body["engine"], &made.body["isolation"]), (&json!("qemu"), &json!("emulated-vm")), "{made:?}");
    let vm = made.id();
    let is_marked = async |site: &Site| site.sh(&vm, "uname -v").await.contains(MARK);
    assert!(is_marked(&site).await);
    let refused = site.ask("POST", "/v1/vms", Some(small_of(Some("gvisor")))).await;
    assert_eq!((refused.status, &refused.body["code"]), (400, &json!("invalid_parameter")), "{refused:?}");

    put(&site, &image, kernels::bz_image()).await;
    site.kill().await;
    site.serve(None).await;
    assert_eq!(site.get(&vm).await.body["state"], "RUNNING");
    assert!(is_marked(&site).await);
    assert_eq!(site.ask("POST", &format!("/v1/vms/{vm}/stop"), None).await.status, 204);
    site.kill().await;
    site.serve(None).await;
    assert_eq!(site.ask("POST", &format!("/v1/vms/{vm}/start"), None).await.status, 204);
    assert!(is_marked(&site).await);
    let refused = site.ask("DELETE", &image, None).await;
    assert_eq!((refused.status, &refused.body["code"]), (409, &json!("in_use")), "{refused:?}");
    assert_eq!(blobs(&site), 2);
    site.delete(&vm).await;
    harness::eventually("nobody boots the first one any more", async || blobs(&site) == 1).await;
    site.is_tidy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_fails_by_its_kernel_says_why_and_one_that_a_kill_cuts_off_is_gone_on_with() {
    let (mut site, image) = site_with(kernels::of_another_release()).await;
    let failed = site.ask("POST", "/v1/vms", Some(small_of(None))).await;
    assert_eq!((failed.status, &failed.body["code"]), (500, &json!("boot_failed")), "{failed:?}");
    let said = failed.body["message"].as_str().unwrap();
    assert!(said.contains("has no virtio_mmio") && said.contains("CONFIG_VIRTIO_MMIO"), "{said}");
    assert_eq!(site.list().await, []);
    site.is_tidy().await;

    put(&site, &image, kernels::marked()).await;
    site.kill().await;
    for point in ["after_engine_create", "after_engine_start"] {
        site.serve(Some(point)).await;
        let create = async |site: &Site| site.try_ask("POST", "/v1/vms", Some(point), Some(small_of(None))).await;
        assert!(create(&site).await.is_err());
        site.ended().await;
        site.serve(None).await;
        site.is_tidy().await;
        let vm = create(&site).await.unwrap().id();
        assert!(site.sh(&vm, "uname -v").await.contains(MARK), "{point}");
        site.delete(&vm).await;
        site.is_tidy().await;
        site.kill().await;
    }
}
