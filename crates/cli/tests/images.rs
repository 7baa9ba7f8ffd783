//! Images that clients upload: real VMs of them, the server killed during uploads, the reader's own process.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/server.rs"]
mod server;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use camino::Utf8Path;
use serde_json::{Value, json};
use server::{Site, stdout};
use tiffin_image::{
    blob::BlobStore,
    convert::{ConvertError, Converter, Limits},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A setting for machines whose disk is nearly full: what is tested is small.
const ANY_DISK: &str = "images.min_free_disk_mb=64";

/// An ext4 filesystem of a folder.
fn ext4(tree: &Path, size: &str) -> Vec<u8> {
    let image = tree.with_extension("ext4");
    let mut make = Command::new("mke2fs");
    let made = make.args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree).arg(&image).arg(size).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    fs::read(image).unwrap()
}

/// Nothing but busybox: no bash, no user 1000, no /workspace, no /etc.
fn busybox(folder: &Path) -> Vec<u8> {
    let tree = folder.join("busybox");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "id", "ls", "touch", "pwd"] {
        symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    fs::write(tree.join("marker"), "of busybox\n").unwrap();
    ext4(&tree, "16M")
}

/// This host's bash and some of its programs, with the libraries that they need.
fn with_bash(folder: &Path) -> Vec<u8> {
    let tree = folder.join("bash");
    for name in ["bin", "etc", "lib64", "tmp"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    let mut libraries = BTreeSet::new();
    for program in ["/bin/bash", "/bin/cat", "/bin/stat"] {
        fs::copy(program, tree.join(&program[1..])).unwrap();
        let told = Command::new("ldd").arg(program).output().unwrap();
        let told = String::from_utf8(told.stdout).unwrap();
        libraries.extend(told.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    for library in libraries {
        let inside = tree.join(library.strip_prefix("/").unwrap());
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::copy(library, inside).unwrap();
    }
    fs::write(tree.join("marker"), "of bash\n").unwrap();
    fs::set_permissions(tree.join("bin/cat"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(tree.join("marker"), tree.join("etc/same")).unwrap();
    ext4(&tree, "64M")
}

async fn image(site: &Site, name: &str) -> String {
    let made = site.ask("POST", "/v1/images", Some(json!({ "name": name, "description": "" }))).await;
    assert_eq!(made.status, 201, "{made:?}");
    format!("/v1/images/{}", made.body["id"].as_str().unwrap())
}

async fn now(site: &Site, image: &str) -> Value {
    site.ask("GET", image, None).await.body
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_of_uploaded_filesystems_have_their_files_whatever_else_is_missing_in_them() {
    let site = Site::start(&[ANY_DISK]).await;
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("busybox", busybox(folder.path())), ("bash", with_bash(folder.path()))] {
        let image = image(&site, name).await;
        let uploaded = site.try_upload(&format!("{image}/rootfs"), bytes).await.unwrap();
        assert_eq!(uploaded.status, 204, "{uploaded:?}");
        let body =
            json!({ "cpu": 1, "memMb": 128, "allowIps": [], "diskSizeMb": 64, "imageId": image.rsplit('/').next() });
        let vm = site.ask("POST", "/v1/vms", Some(body)).await.id();
        assert_eq!(site.sh(&vm, "cat /marker; pwd").await, format!("of {name}\n/workspace\n"));
        if name == "bash" {
            let seen = site.sh(&vm, "stat -c '%a %U %h' /bin/cat /etc/same; echo $BASH_VERSION").await;
            assert!(seen.starts_with("4755 UNKNOWN 1\n644 UNKNOWN 2\n5"), "{seen}");
        } else {
            assert_eq!(site.sh(&vm, "touch mine; ls; id -u").await, "mine\n1000\n");
            let refused = site.exec(&vm, "touch /bin/mine").await;
            assert_ne!(refused.body["exitCode"], 0, "{} {refused:?}", stdout(&refused));
        }
        let refused = site.ask("DELETE", &image, None).await;
        assert_eq!((refused.status, &refused.body["code"]), (409, &json!("in_use")), "{refused:?}");
        site.delete(&vm).await;
        assert_eq!(site.ask("DELETE", &image, None).await.status, 204);
    }
    site.is_tidy().await;
}

/// What this site has mounted, as the namespace of a process has it.
fn mounts(site: &Site, process: &str) -> String {
    let (all, folder) =
        (fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap(), site.data.parent().unwrap());
    all.lines().filter(|line| line.contains(folder.to_str().unwrap())).map(|line| format!("{line}\n")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_images_room_is_free_at_once_whatever_else_runs_and_so_are_vms_that_were_booted_ahead() {
    let site = Site::start(&[ANY_DISK, "pool.max_vms=2"]).await;
    let folder = tempfile::tempdir().unwrap();
    let image = image(&site, "busybox").await;
    assert_eq!(site.try_upload(&format!("{image}/rootfs"), busybox(folder.path())).await.unwrap().status, 204);
    let digest = now(&site, &image).await["digest"].as_str().unwrap().replace("sha256:", "");
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "imageId": image.rsplit('/').next() });
    let vm = site.ask("POST", "/v1/vms", Some(body)).await.id();
    let pooled = || fs::read_dir(site.data.join("vms")).unwrap().count();
    harness::eventually("one is booted ahead", async || pooled() == 2).await;
    assert!(mounts(&site, "self").contains(&digest));
    // One of another image, whose namespace began as a copy of the host's.
    let other = site.create().await;
    let monitor = harness::monitor_pid(&site.folder(&other)).unwrap().to_string();
    assert!(!mounts(&site, &monitor).contains(&digest), "{}", mounts(&site, &monitor));

    site.delete(&vm).await;
    assert_eq!(site.ask("DELETE", &image, None).await.status, 204);
    assert!(!mounts(&site, "self").contains(&digest), "the mount went with the image");
    assert!(!site.data.join(format!("images/sha256/{digest}.erofs")).exists());
    for device in fs::read_dir("/sys/block").unwrap().flatten() {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        let ours = backing.starts_with(site.data.to_str().unwrap());
        assert!(!(ours && backing.contains(&digest)), "{backing}");
    }
    let of_it = fs::read_dir(site.data.join("vms"))
        .unwrap()
        .flatten()
        .filter(|vm| fs::read_to_string(vm.path().join("spec.json")).is_ok_and(|spec| spec.contains(&digest)));
    assert_eq!(of_it.count(), 0, "the one that was booted ahead");
    assert_eq!(site.sh(&other, "echo on").await, "on\n");
    site.delete(&other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_the_servers_end_cut_short_is_none_and_can_be_gone_on_with() {
    let mut site = Site::start(&[ANY_DISK]).await;
    let folder = tempfile::tempdir().unwrap();
    let bytes = busybox(folder.path());
    let image = image(&site, "busybox").await;
    let blobs = site.data.join("images/sha256");
    let before = fs::read_dir(&blobs).unwrap().count();
    for (point, kept) in
        [("after_upload_begin", 0), ("after_upload_received", bytes.len()), ("after_upload_converted", bytes.len())]
    {
        site.kill().await;
        site.serve(Some(point)).await;
        let cut = site.try_upload(&format!("{image}/rootfs"), bytes.clone()).await;
        assert!(cut.is_err(), "{point}: {cut:?}");
        site.ended().await;
        site.serve(None).await;
        let image = now(&site, &image).await;
        assert_eq!((&image["status"], &image["hasRootfs"]), (&json!("failed"), &json!(false)), "{point}: {image}");
        assert!(image["error"].as_str().unwrap().contains("upload it again"), "{point}: {image}");
        let received = image["partialUploads"][0]["receivedBytes"].as_u64().unwrap_or(0);
        assert_eq!(received, u64::try_from(kept).unwrap(), "{point}: {image}");
        let folder = site.data.join("images/uploads").join(image["id"].as_str().unwrap());
        let files = fs::read_dir(folder).into_iter().flatten().count();
        assert_eq!(files, usize::from(kept > 0), "{point}: nothing else of it");
    }
    // All has come already.
    let range = format!("bytes */{}", bytes.len());
    let uploaded =
        site.try_upload_with(&format!("{image}/rootfs"), &[("content-range", &range)], Vec::new()).await.unwrap();
    assert_eq!(uploaded.status, 204, "{uploaded:?}");
    assert_eq!(now(&site, &image).await["status"], "ready");
    // The one that was made before the last end is the same, as it has the same bytes.
    assert_eq!(fs::read_dir(&blobs).unwrap().count(), before + 1);

    // A deletion that is cut short between the record and the blob is done; the sweep takes the blob once it is old.
    site.kill().await;
    site.serve(Some("after_image_delete")).await;
    assert!(site.try_ask("DELETE", &image, None, None).await.is_err());
    site.ended().await;
    for blob in fs::read_dir(&blobs).unwrap().flatten().filter(|entry| !entry.path().is_symlink()) {
        let old = std::time::SystemTime::now() - Duration::from_secs(86_400);
        fs::File::open(blob.path()).unwrap().set_modified(old).unwrap();
    }
    site.serve(None).await;
    assert_eq!(site.ask("GET", &image, None).await.status, 404);
    assert_eq!(fs::read_dir(&blobs).unwrap().count(), before);
}

/// Passes connections on to wherever the server is now. The first one that has brought so many bytes brings no more, until the server
/// ends.
async fn stalling_proxy(target: Arc<Mutex<String>>, after: usize) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stalled = Arc::new(AtomicBool::new(false));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (target, stalled) = (target.lock().unwrap().clone(), Arc::clone(&stalled));
            tokio::spawn(async move {
                let Ok(server) = tokio::net::TcpStream::connect(target).await else { return };
                let ((mut from, mut back), (mut answers, mut to)) = (client.into_split(), server.into_split());
                let upward = async {
                    let (mut buffer, mut passed) = (vec![0; 64 << 10], 0);
                    while let Ok(read @ 1..) = from.read(&mut buffer).await {
                        to.write_all(&buffer[..read]).await?;
                        passed += read;
                        if passed >= after && !stalled.swap(true, Ordering::SeqCst) {
                            std::future::pending::<()>().await;
                        }
                    }
                    std::io::Result::Ok(())
                };
                tokio::select! {
                    _ = upward => {}
                    _ = tokio::io::copy(&mut answers, &mut back) => {}
                }
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_goes_on_with_an_upload_after_the_server_was_killed_and_a_vm_boots_of_it() {
    let mut site = Site::start(&[ANY_DISK]).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rootfs");
    let bytes = busybox(folder.path());
    fs::write(&file, &bytes).unwrap();
    let image = image(&site, "busybox").await;
    let target = Arc::new(Mutex::new(site.url().replace("http://", "")));
    let url = stalling_proxy(Arc::clone(&target), 5 << 20).await;
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_tiffin"));
    command.args(["image", "upload", image.rsplit('/').next().unwrap(), "--rootfs"]).arg(&file);
    command.env("TIFFIN_URL", url).env("TIFFIN_API_KEY", site.key()).kill_on_drop(true);
    let upload = tokio::spawn(async move { command.output().await.unwrap() });
    harness::eventually("some of it came", async || now(&site, &image).await["receivedBytes"].as_u64() > Some(4 << 20))
        .await;
    site.kill().await;
    site.serve(None).await;
    let kept = now(&site, &image).await;
    let (received, total) = (&kept["partialUploads"][0]["receivedBytes"], &kept["partialUploads"][0]["expectedBytes"]);
    assert!((4 << 20..6 << 20).contains(&received.as_u64().unwrap()) && total == bytes.len(), "{kept}");
    let wrong = [("content-range", format!("bytes 10-19/{}", bytes.len()))];
    let wrong = wrong.each_ref().map(|(name, value)| (*name, value.as_str()));
    let refused = site.try_upload_with(&format!("{image}/rootfs"), &wrong, vec![0; 10]).await.unwrap();
    assert_eq!((refused.status, &refused.body["details"]["receivedBytes"]), (409, received), "{refused:?}");

    *target.lock().unwrap() = site.url().replace("http://", "");
    let done = tokio::time::timeout(Duration::from_secs(90), upload).await.expect("it goes on").unwrap();
    assert!(done.status.success(), "{done:?}");
    let ready = now(&site, &image).await;
    assert_eq!((&ready["status"], &ready["partialUploads"]), (&json!("ready"), &json!([])), "{ready}");
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "diskSizeMb": 64, "imageId": image.rsplit('/').next() });
    let vm = site.ask("POST", "/v1/vms", Some(body)).await.id();
    assert_eq!(site.sh(&vm, "cat /marker").await, "of busybox\n");
    site.delete(&vm).await;
    assert!(site.log().contains("bytes are kept of an upload"), "it went on, and didn't begin anew");
}

#[test]
fn the_readers_process_reads_refuses_and_when_it_ends_badly_ends_alone() {
    let folder = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(folder.path()).unwrap();
    let store = BlobStore::open(&dir.join("images")).unwrap();
    let limits = Limits { entries: 1000, bytes: 1 << 30, leave_free_bytes: 1 << 20, time: Duration::from_secs(120) };
    let confined = Converter::confined(env!("CARGO_BIN_EXE_tiffin"));
    let upload = dir.join("upload");
    let convert = |converter: &Converter, bytes: &[u8], limits: &Limits| {
        fs::write(&upload, bytes).unwrap();
        let done = converter.convert(&upload, &dir.join("work"), &store, limits, &mut |_| {});
        assert!(!dir.join("work").exists());
        done
    };
    let bytes = busybox(folder.path());
    let converted = convert(&confined, &bytes, &limits).unwrap();
    assert_eq!(converted.unpacked.entries, 10);
    let again = convert(&Converter::in_process(), &bytes, &limits).unwrap();
    assert_eq!(again.blob, converted.blob, "the process makes no difference");

    let refused = convert(&confined, b"\x1f\x8b", &limits).unwrap_err();
    assert!(matches!(&refused, ConvertError::Refused(why) if why.contains("gunzip")), "{refused:?}");
    let refused = convert(&confined, &bytes, &Limits { entries: 5, ..limits.clone() }).unwrap_err();
    assert!(matches!(&refused, ConvertError::Refused(why) if why.contains("more than 5 files")), "{refused:?}");
    let ended = convert(&Converter::confined("/bin/false"), &bytes, &limits).unwrap_err();
    assert!(matches!(&ended, ConvertError::Refused(why) if why.contains("its reader ended")), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_damaged_on_the_disk_is_mounted_anew_once_it_is_whole() {
    let mut site = Site::start(&[ANY_DISK]).await;
    let folder = tempfile::tempdir().unwrap();
    let (image, bytes) = (image(&site, "busybox").await, busybox(folder.path()));
    assert_eq!(site.try_upload(&format!("{image}/rootfs"), bytes.clone()).await.unwrap().status, 204);
    let digest = now(&site, &image).await["digest"].as_str().unwrap().replace("sha256:", "");
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "diskSizeMb": 64, "imageId": image.rsplit('/').next() });
    let old = site.ask("POST", "/v1/vms", Some(body.clone())).await.id();
    let blob = site.data.join(format!("images/sha256/{digest}.erofs"));
    let whole = fs::read(&blob).unwrap();
    // The marker's own text, so that whoever reads it through an old mount sees the damage.
    let at =
        whole.windows(11).position(|bytes| bytes == b"of busybox\n").expect("short files lie in the blob as they are");
    let writable = fs::File::options().write(true).open(&blob).unwrap();
    std::os::unix::fs::FileExt::write_at(&writable, b"OF", at as u64).unwrap();
    writable.sync_all().unwrap();
    // The first look is at the server's start.
    site.kill().await;
    site.serve(None).await;
    harness::eventually("it is noticed", async || now(&site, &image).await["isDamaged"] == true).await;
    let refused = site.ask("POST", "/v1/vms", Some(body.clone())).await;
    assert_eq!((refused.status, &refused.body["code"]), (422, &json!("image_damaged")), "{refused:?}");

    assert_eq!(site.try_upload(&format!("{image}/rootfs"), bytes).await.unwrap().status, 204);
    assert!(fs::read(&blob).unwrap() == whole);
    let new = site.ask("POST", "/v1/vms", Some(body)).await.id();
    assert_eq!(site.sh(&new, "cat /marker").await, "of busybox\n");
    assert_eq!(site.sh(&old, "echo on").await, "on\n");
    for vm in [&old, &new] {
        site.delete(vm).await;
    }
    assert_eq!(site.ask("DELETE", &image, None).await.status, 204);
    assert!(!mounts(&site, "self").contains(&digest));
}
