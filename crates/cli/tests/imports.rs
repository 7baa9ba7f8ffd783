//! Images from a registry: real VMs of them, and the server killed during imports.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/busybox.rs"]
mod busybox;
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
    let above = tar(&[("srv/.wh.old", ""), ("srv/marker", "imported\n")]);
    let config = json!({ "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id -u > out/who; pwd >> out/who; sleep 600"], "Env": ["PATH=/bin"], "User": "www",
        "WorkingDir": "/srv" });
    Image::new(&[busybox::layer(&["sh", "cat", "dd", "id", "ls", "rm", "sleep", "pwd"]), above], &config)
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

/// Bash, a profile that sets `PATH` as Debian's does, and tools where the image's own `PATH` leads.
fn with_a_path_of_its_own() -> Image {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path();
    let copy = |file: &Path| {
        let to = tree.join(file.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    };
    copy(Path::new("/bin/bash"));
    let libraries = Command::new("ldd").arg("/bin/bash").output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    libraries.split_whitespace().filter(|word| word.starts_with('/')).for_each(|library| copy(Path::new(library)));
    copy(Path::new("/bin/busybox"));
    for name in ["sh", "sleep", "env"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    fs::write(tree.join("etc/profile"), "PATH=/usr/local/bin:/usr/bin:/bin\nexport PATH\n").unwrap();
    fs::create_dir_all(tree.join("opt/own/bin")).unwrap();
    for (name, script) in
        [("tool", "#!/bin/sh\necho tool of $GREETING\n"), ("node", "#!/bin/sh\necho run by $GREETING $WHO\n")]
    {
        let file = tree.join("opt/own/bin").join(name);
        fs::write(&file, script).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let packed = Command::new("tar").args(["-c", "--owner=0", "--group=0", "-C"]).arg(tree).arg(".").output().unwrap();
    assert!(packed.status.success());
    let config = json!({ "Cmd": ["sleep", "600"], "Env": ["PATH=/opt/own/bin:/bin", "GREETING=the image"] });
    Image::new(&[packed.stdout], &config)
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_find_the_images_environment_and_its_path_and_nothing_of_a_programs_own() {
    let (site, registry) = (Site::start(&[ANY_DISK]).await, Registry::open().await.unwrap());
    registry.push("own", "1", &with_a_path_of_its_own()).await.unwrap();
    let image = import(&site, &registry.image("own:1")).await;
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "diskSizeMb": 64, "imageId": image });
    let vm = site.ask("POST", "/v1/vms", Some(body)).await.id();
    let line = "tool; echo $PATH";
    let all = "tool of the image\n/opt/own/bin:/bin\n";
    // One shell after the other, one that may have waited among them.
    for _ in 0..3 {
        assert_eq!(site.sh(&vm, line).await, all);
    }
    let exec = format!("/v1/vms/{vm}/exec");
    let own = json!({ "cmd": "tool; echo $PATH", "env": { "GREETING": "the request", "PATH": "/bin:/opt/own/bin" } });
    let answer = site.ask("POST", &exec, Some(own)).await;
    assert_eq!(answer.body["stdout"], "tool of the request\n/bin:/opt/own/bin\n", "{answer:?}");
    let script = json!({ "code": "1", "env": ["WHO=me"] });
    let answer = site.ask("POST", &format!("/v1/vms/{vm}/run-js"), Some(script)).await;
    assert_eq!(answer.body["stdout"], "run by the image me\n", "{answer:?}");
    // It is the VM's after a stop, and of whatever is made of a snapshot of it.
    for verb in ["stop", "start"] {
        assert_eq!(site.ask("POST", &format!("/v1/vms/{vm}/{verb}"), None).await.status, 204, "{verb}");
    }
    assert_eq!(site.sh(&vm, line).await, all);
    let snapshot = site.ask("POST", &format!("/v1/vms/{vm}/snapshots"), None).await;
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "snapshotId": snapshot.body["id"] });
    let copy = site.ask("POST", "/v1/vms", Some(body)).await.id();
    assert_eq!(site.sh(&copy, line).await, all);
    // A program's own environment is a secret of its own.
    let env = json!({ "SECRET": "s3cret", "GREETING": "the program" });
    let started = site.ask("POST", "/v1/vm/start", Some(json!({ "imageId": image, "envVars": env }))).await;
    assert_eq!(started.status, 200, "{started:?}");
    let program = format!("vm-{}", started.body["id"].as_str().unwrap()).parse().unwrap();
    let found = site.sh(&program, "env; tool").await;
    assert!(!found.contains("s3cret") && !found.contains("the program"), "{found}");
    assert!(found.ends_with("tool of the image\n"), "{found}");
    for vm in [vm, copy, program] {
        site.delete(&vm).await;
    }
    let snapshot = snapshot.body["id"].as_str().unwrap();
    assert_eq!(site.ask("DELETE", &format!("/v1/snapshots/{snapshot}"), None).await.status, 204);
    site.is_tidy().await;
}

/// What the program does: tells what an earlier run left, and fills its disk the first time.
const FILLS_ITS_DISK: &str = "cd /srv/out; cat runs; echo again >> runs; \
    [ -e filled ] || { dd if=/dev/zero of=big bs=1M count=1100; echo ended by $?; rm big; echo filled > filled; }; sleep 600";

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_has_room_for_what_was_asked_for_and_outlives_stops() {
    let (site, registry) = (Site::start(&[ANY_DISK]).await, Registry::open().await.unwrap());
    let mut image = busybox();
    let mut config: Value = serde_json::from_slice(&image.blobs[0]).unwrap();
    config["config"]["Cmd"] = json!([FILLS_ITS_DISK]);
    image.configure(&config);
    registry.push("full", "1", &image).await.unwrap();
    let image = import(&site, &registry.image("full:1")).await;
    let cached = site.ask("POST", "/v1/vm/cache", Some(json!({ "imageId": image, "volumeGB": 1 }))).await;
    assert_eq!((cached.status, &cached.body["volumeGB"]), (200, &json!(1)), "{cached:?}");
    let id = cached.body["id"].as_str().unwrap();
    let has_said = async |text: &str, times: usize| {
        let logs = site.ask("GET", &format!("/v1/vm/cached/{id}/logs?batch=1000"), None).await;
        let lines = logs.body["lines"].as_array().cloned().unwrap_or_default();
        lines.iter().filter(|line| line["message"].as_str().unwrap_or_default().contains(text)).count() == times
    };
    for run in 0..3 {
        let started = site.ask("POST", &format!("/v1/vm/cached/{id}/start"), None).await;
        assert_eq!(started.status, 200, "{started:?}");
        // Each run finds a line of every one before it.
        harness::eventually("it has told what it found", async || has_said("again", (0..=run).sum()).await).await;
        harness::eventually("its disk was filled once", async || has_said("ended by 1", 1).await).await;
        harness::eventually("it is told why", async || has_said("No space left on device", 1).await).await;
        if run == 0 {
            let vm = format!("vm-{id}").parse().unwrap();
            harness::eventually("what is removed makes room", async || {
                site.sh(&vm, "ls /srv/out").await.contains("filled")
            })
            .await;
        }
        let stopped = site.ask("POST", &format!("/v1/vm/cached/{id}/stop"), None).await;
        assert_eq!(stopped.status, 200, "{stopped:?}");
    }
    let destroyed = site.ask("POST", &format!("/v1/vm/cached/{id}/destroy"), None).await;
    assert_eq!(destroyed.status, 200, "{destroyed:?}");
    site.is_tidy().await;
}
