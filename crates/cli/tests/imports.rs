//! Images from a registry: real VMs of them, and the server killed during imports.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "../../server/tests/api/registry.rs"]
mod registry;
#[path = "vms/server.rs"]
mod server;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
};

use registry::{Image, Registry, tar};
use serde_json::{Value, json};
use server::Site;

/// A setting for machines whose disk is nearly full: what is tested is small.
const ANY_DISK: &str = "images.min_free_disk_mb=64";

/// Busybox with a user of its own, and a layer above that changes it.
fn busybox() -> Image {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path();
    for name in ["bin", "etc", "srv"] {
        fs::create_dir(tree.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "id", "ls", "sleep", "pwd"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nwww:x:1234:1234::/srv:/bin/sh\n").unwrap();
    fs::write(tree.join("etc/group"), "www:x:1234:\n").unwrap();
    fs::write(tree.join("srv/old"), "old").unwrap();
    fs::create_dir(tree.join("srv/out")).unwrap();
    fs::set_permissions(tree.join("srv/out"), fs::Permissions::from_mode(0o777)).unwrap();
    let packed = Command::new("tar").args(["-c", "--owner=0", "--group=0", "-C"]).arg(tree).arg(".").output().unwrap();
    assert!(packed.status.success());
    let above = tar(&[("srv/.wh.old", ""), ("srv/marker", "imported\n")]);
    let config = json!({ "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id -u > out/who; pwd >> out/who; sleep 600"], "Env": ["PATH=/bin"], "User": "www",
        "WorkingDir": "/srv" });
    Image::new(&[packed.stdout, above], &config)
}

async fn import(site: &Site, uri: &str) -> String {
    let answer = site.ask("POST", "/v1/image/import", Some(json!({ "imageUri": uri }))).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body["imageId"].as_str().unwrap().to_owned()
}

/// The layers in the cache, by their names and inodes.
fn layers(data: &Path) -> Vec<(String, u64)> {
    let folders = fs::read_dir(data.join("images/layers")).into_iter().flatten().flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.path()).unwrap().flatten());
    let mut layers: Vec<_> =
        files.map(|file| (file.file_name().into_string().unwrap(), file.metadata().unwrap().ino())).collect();
    layers.sort();
    layers
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_of_imported_images_have_their_files_and_run_their_programs() {
    let (site, registry) = (Site::start(&[ANY_DISK]).await, Registry::closed().await.unwrap());
    registry.push("team/app", "1", &busybox()).await.unwrap();
    let body = json!({ "imageUri": registry.image("team/app:1"), "password": "secret-token" });
    let answer = site.ask("POST", "/cakework/v1/image/import", Some(body)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let image = &answer.body["imageId"];
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "diskSizeMb": 64, "imageId": image });
    let vm = site.ask("POST", "/v1/vms", Some(body)).await.id();
    assert_eq!(site.sh(&vm, "ls /srv; cat /srv/marker").await, "marker\nout\nimported\n");
    site.delete(&vm).await;
    let started = site.ask("POST", "/v1/vm/start", Some(json!({ "imageId": image }))).await;
    assert_eq!((started.status, &started.body["state"]), (200, &json!("started")), "{started:?}");
    let vm = format!("vm-{}", started.body["id"].as_str().unwrap()).parse().unwrap();
    let who = "the program runs as the image's user, in its folder";
    harness::eventually(who, async || site.sh(&vm, "cat /srv/out/who").await == "1234\n/srv\n").await;
    let stopped = site.ask("POST", &format!("/v1/vm/{}/stop", started.body["id"].as_str().unwrap()), None).await;
    assert_eq!(stopped.status, 200, "{stopped:?}");
    assert!(!site.log().contains("secret-token"));
    site.is_tidy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_the_servers_end_cut_short_leaves_no_image_and_goes_on_with_its_layers() {
    let (mut site, registry) = (Site::start(&[ANY_DISK]).await, Registry::open().await.unwrap());
    registry.push("app", "1", &busybox()).await.unwrap();
    let uri = registry.image("app:1");
    let images = async |site: &Site| site.ask("GET", "/v1/images", None).await.body.as_array().map(Vec::len);
    let before = images(&site).await;
    let mut first: Option<Vec<(String, u64)>> = None;
    for point in ["after_import_received", "after_import_made"] {
        site.kill().await;
        site.serve(Some(point)).await;
        let body: Option<Value> = Some(json!({ "imageUri": uri }));
        let cut = site.try_ask("POST", "/v1/image/import", None, body).await;
        assert!(cut.is_err(), "{point}: {cut:?}");
        site.ended().await;
        site.serve(None).await;
        assert_eq!(images(&site).await, before, "{point}");
        assert!(!site.data.join("images/imports").exists(), "{point}: what was being put together is swept");
        let kept = layers(&site.data);
        assert_eq!(kept.len(), 2, "{point}: {kept:?}");
        assert_eq!(first.get_or_insert_with(|| kept.clone()), &kept, "{point}: the layers that were here were used");
    }
    import(&site, &uri).await;
    assert_eq!(first.unwrap(), layers(&site.data));
    assert_eq!(images(&site).await, before.map(|count| count + 1));
}
