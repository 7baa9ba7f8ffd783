//! Kernels of images: which engine a VM gets for one, and for how long one is kept.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tiffin_engine::{
    Capabilities, Kind,
    fake::{Call, Fake},
};
use tiffin_types::{
    id::{Digest, VmId},
    vm::{EngineName, Isolation},
};

use crate::{
    harness::{Server, small_vm, until},
    images::ext4,
};

/// For machines whose disk is nearly full, and a reconciler that comes round at once.
const SOON: [(&str, &str); 2] = [("images.min_free_disk_mb", "1"), ("vm.reconcile_ms", "50")];

/// A vmlinux as far as its headers tell; what is in it differs by `content`.
pub(crate) fn kernel(content: u8) -> Vec<u8> {
    const LENGTH: u64 = 30_000;
    const ENTRY: u32 = 0x10_1000;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for long in [ENTRY.into(), 64, 0_u64] {
        bytes.extend(long.to_le_bytes());
    }
    bytes.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, size) in [(1_u32, 0_u64, LENGTH), (4, 176, 20)] {
        bytes.extend(kind.to_le_bytes());
        bytes.extend([7, 0, 0, 0]);
        for long in [offset, offset, (1 << 20) + offset, size, size, 4] {
            bytes.extend(long.to_le_bytes());
        }
    }
    bytes.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    bytes.extend(b"Xen\0");
    bytes.extend(ENTRY.to_le_bytes());
    bytes.resize(usize::try_from(LENGTH).expect("it is small"), content);
    bytes
}

fn kind(name: EngineName, kernels: bool) -> Kind {
    let capabilities = Capabilities { pause: true, snapshot: true, kernels };
    Kind { name, isolation: Isolation::None, capabilities }
}

/// A server of which the first engine boots no kernels, and that may have another.
async fn server(with_qemu: bool, settings: &[(&str, &str)]) -> Result<Server> {
    let mut kinds = vec![kind(EngineName::Gvisor, false)];
    kinds.extend(with_qemu.then(|| kind(EngineName::Qemu, true)));
    Server::start_over(Fake::of_kinds(kinds), &[&SOON, settings].concat()).await
}

impl Server {
    async fn image_with(&self, content: u8) -> Result<String> {
        let path = self.ready_image("mine").await?;
        self.put(&format!("{path}/kernel"), kernel(content)).await?.ok(204);
        Ok(path)
    }

    /// The kernel that the engine was told to boot.
    fn kernel_of(&self, vm: &str) -> Result<Option<Digest>> {
        let id: VmId = vm.rsplit('/').next().context("an id")?.parse()?;
        Ok(self.fake.spec(&id).context("it is on the host")?.kernel)
    }
}

fn of(image: &str, engine: Option<&str>) -> Value {
    let mut body = small_vm();
    body["imageId"] = json!(image.rsplit('/').next());
    if let Some(engine) = engine {
        body["engine"] = json!(engine);
    }
    body
}

fn path_of(vm: &Value) -> Result<String> {
    Ok(format!("/v1/vms/{}", vm["id"].as_str().context("an id")?))
}

#[tokio::test]
async fn an_image_with_a_kernel_gets_an_engine_that_boots_it_and_others_the_hosts_default() -> Result<()> {
    let server = server(true, &[]).await?;
    let (plain, own) = (server.ready_image("plain").await?, server.image_with(1).await?);
    for (image, engine, expected) in
        [(&plain, None, "gvisor"), (&plain, Some("qemu"), "qemu"), (&own, None, "qemu"), (&own, Some("qemu"), "qemu")]
    {
        let vm = server.post("/v1/vms", &of(image, engine)).await?.ok(201);
        assert_eq!(vm["engine"], expected, "{engine:?}");
        let path = path_of(&vm)?;
        assert_eq!(server.kernel_of(&path)?.is_some(), *image == own);
        server.act(&format!("{path}/stop")).await?.ok(204);
        server.act(&format!("{path}/start")).await?.ok(204);
        server.delete(&path).await?.ok(204);
    }
    let refused = server.post("/v1/vms", &of(&own, Some("gvisor"))).await?.refused(400, "invalid_parameter");
    assert!(refused.starts_with("engine is gvisor") && refused.ends_with(": qemu"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_host_that_boots_no_kernels_says_what_an_image_with_one_needs() -> Result<()> {
    let server = server(false, &[]).await?;
    let own = server.image_with(1).await?;
    for (engine, field) in [(None, "imageId names"), (Some("gvisor"), "engine is gvisor")] {
        let refused = server.post("/v1/vms", &of(&own, engine)).await?.refused(400, "invalid_parameter");
        for word in [field, "a kernel of its own", "qemu.kernel"] {
            assert!(refused.contains(word), "{word}: {refused}");
        }
    }
    let refused = server.post("/v1/vms", &of(&own, Some("qemu"))).await?.refused(400, "invalid_parameter");
    assert!(refused.contains("must be one of this host's: gvisor"), "{refused}");
    assert_eq!(server.present().await?, []);
    Ok(())
}

#[tokio::test]
async fn a_vm_and_its_snapshots_keep_the_kernel_that_it_was_made_with() -> Result<()> {
    let server = server(true, &[]).await?;
    let image = server.image_with(1).await?;
    let vm = server.vm_of(&image).await?;
    let first = server.kernel_of(&vm)?;
    let snapshot = server.act(&format!("{vm}/snapshots")).await?.ok(201);
    server.put(&format!("{image}/kernel"), kernel(2)).await?.ok(204);
    let next = server.vm_of(&image).await?;
    assert_ne!(server.kernel_of(&next)?, first);
    let forked = server.post(&format!("{vm}/fork"), &json!({ "count": 1 })).await?.ok(201);
    let fork = path_of(&forked[0])?;
    assert_eq!(server.kernel_of(&fork)?, first);
    for path in [&vm, &fork] {
        server.delete(path).await?.ok(204);
    }
    let mut body = small_vm();
    body["snapshotId"] = snapshot["id"].clone();
    let restored = server.post("/v1/vms", &body).await?.ok(201);
    assert_eq!(restored["engine"], "qemu");
    let restored = path_of(&restored)?;
    assert_eq!(server.kernel_of(&restored)?, first);
    assert_eq!(server.blobs("kernels")?.len(), 2);
    server.delete(&format!("/v1/snapshots/{}", snapshot["id"].as_str().context("an id")?)).await?.ok(204);
    server.act(&format!("{restored}/stop")).await?.ok(204);
    assert_eq!(server.blobs("kernels")?.len(), 2, "it is to boot again");
    server.act(&format!("{restored}/start")).await?.ok(204);
    server.delete(&restored).await?.ok(204);
    until("the first kernel is gone", async || Ok(server.blobs("kernels")?.len() == 1)).await?;
    server.delete(&image).await?.refused(409, "in_use");
    server.delete(&next).await?.ok(204);
    server.delete(&image).await?.ok(204);
    until("the other one is, too", async || Ok(server.blobs("kernels")?.is_empty())).await
}

#[tokio::test]
async fn a_kernel_that_the_engine_has_not_let_go_of_stays() -> Result<()> {
    let server = Server::start_cold_with(&SOON).await?;
    let image = server.image_with(1).await?;
    let vm = server.vm_of(&image).await?;
    // The VM's end is not the engine's yet.
    server.fake.fail_next(Call::Destroy);
    assert_eq!(server.delete(&vm).await?.status, 500);
    server.fake.hold(Call::ImageRelease);
    let deletion = server.delete(&image);
    let meanwhile = async {
        until("the record is gone", async || Ok(server.get(&image).await?.status == 404)).await?;
        assert_eq!(server.blobs("kernels")?.len(), 1);
        server.fake.release(Call::ImageRelease);
        anyhow::Ok(())
    };
    let (deleted, waited) = tokio::join!(deletion, meanwhile);
    waited?;
    deleted?.ok(204);
    until("the kernel is gone", async || Ok(server.blobs("kernels")?.is_empty())).await
}

#[tokio::test]
async fn a_vm_that_was_booted_ahead_of_another_kernel_is_nobodys() -> Result<()> {
    let server = server(true, &[("pool.max_vms", "2"), ("pool.keep", "")]).await?;
    let image = server.image_with(1).await?;
    let vm = server.vm_of(&image).await?;
    let first = server.kernel_of(&vm)?;
    until("one is ready", async || Ok(server.pooled().await?.len() == 1)).await?;
    let ready = server.pooled().await?;
    assert_eq!(server.fake.spec(&ready[0]).context("a spec")?.kernel, first);
    server.put(&format!("{image}/kernel"), kernel(2)).await?.ok(204);
    assert!(server.fake.spec(&ready[0]).is_none(), "it goes with its kernel");
    let next = server.vm_of(&image).await?;
    assert_ne!(server.kernel_of(&next)?, first);
    Ok(())
}

#[tokio::test]
async fn vms_are_kept_ready_of_a_default_image_with_a_kernel() -> Result<()> {
    let server = server(true, &[("pool.max_vms", "1"), ("pool.keep", "1x128=1")]).await?;
    let shared = json!({ "name": "ours", "description": "", "shared": true });
    let image = server.post("/v1/images", &shared).await?.ok(201);
    let image = format!("/v1/images/{}", image["id"].as_str().context("an id")?);
    server.put(&format!("{image}/rootfs"), ext4("ours")?).await?.ok(204);
    server.put(&format!("{image}/kernel"), kernel(1)).await?.ok(204);
    server.act(&format!("{image}/set-default")).await?.ok(204);
    until("one with the kernel is ready", async || {
        let specs = server.pooled().await?.into_iter().filter_map(|id| server.fake.spec(&id));
        Ok(specs.into_iter().any(|spec| spec.kernel.is_some() && spec.engine == EngineName::Qemu))
    })
    .await?;
    let ready = server.pooled().await?;
    let vm = server.post("/v1/vms", &small_vm()).await?.ok(201);
    assert_eq!((vm["id"].as_str(), &vm["engine"]), (Some(ready[0].as_str()), &json!("qemu")));
    Ok(())
}

#[tokio::test]
async fn what_is_no_kernel_is_refused_with_the_remedy_and_not_kept() -> Result<()> {
    let server = Server::start_with(&SOON).await?;
    let path = format!("{}/kernel", server.ready_image("mine").await?);
    let changed = |at: usize, byte: u8| {
        let mut bytes = kernel(1);
        bytes[at] = byte;
        bytes
    };
    let packed = [b"\x1f\x8b".to_vec(), vec![0; 5000]].concat();
    for (bytes, word) in [
        (kernel(1)[..20_000].to_vec(), "cut short"),
        (changed(18, 183), "another machine"),
        (changed(4, 1), "32 bits"),
        (changed(176 + 8, 7), "CONFIG_PVH"),
        (std::fs::read("/bin/true")?, "no kernel"),
        (packed, "gunzip"),
    ] {
        let refused = server.put(&path, bytes).await?.refused(422, "bad_kernel");
        assert!(refused.contains(word), "{word}: {refused}");
    }
    assert_eq!(server.blobs("kernels")?.len(), 0);
    Ok(())
}

#[tokio::test]
async fn a_damaged_kernel_boots_no_more_vms_until_it_is_uploaded_again() -> Result<()> {
    let server = Server::start_with(&[SOON.as_slice(), &[("images.scrub_every_s", "1")]].concat()).await?;
    let image = server.image_with(1).await?;
    let vm = server.vm_of(&image).await?;
    let blob = server.blobs("kernels")?.pop().context("a blob")?;
    std::os::unix::fs::FileExt::write_at(&std::fs::File::options().write(true).open(&blob)?, &[2], 20_000)?;
    until("it is noticed", async || Ok(server.image_now(&image).await?["isDamaged"] == true)).await?;
    server.post("/v1/vms", &of(&image, None)).await?.refused(422, "image_damaged");
    server.act(&format!("{vm}/stop")).await?.ok(204);
    server.act(&format!("{vm}/start")).await?.ok(204);
    server.put(&format!("{image}/kernel"), kernel(1)).await?.ok(204);
    assert_eq!(server.image_now(&image).await?["isDamaged"], false);
    server.post("/v1/vms", &of(&image, None)).await?.ok(201);
    Ok(())
}
