//! `/v1/images`

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use futures_util::stream;
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_engine::fake::Call;
use tiffin_store::{NewImage, Upload};
use tiffin_types::id::{Digest, ImageId};

use crate::{
    harness::{Server, send, small_vm, until},
    kernels::kernel,
};

/// A setting for machines whose disk is nearly full: what is tested is small.
const ANY_DISK: (&str, &str) = ("images.min_free_disk_mb", "1");

/// An ext4 filesystem with one file, of that content.
pub(crate) fn ext4(content: &str) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let (tree, image) = (folder.path().join("tree"), folder.path().join("image"));
    std::fs::create_dir(&tree)?;
    std::fs::write(tree.join("marker"), content)?;
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("2M");
    let made = make.output().context("mke2fs")?;
    ensure!(made.status.success(), "{made:?}");
    Ok(std::fs::read(image)?)
}

impl Server {
    /// A new image's path.
    pub(crate) async fn image(&self, name: &str) -> Result<String> {
        let made = self.post("/v1/images", &json!({ "name": name, "description": "" })).await?.ok(201);
        Ok(format!("/v1/images/{}", made["id"].as_str().context("an id")?))
    }

    /// One with a filesystem in it.
    pub(crate) async fn ready_image(&self, name: &str) -> Result<String> {
        let path = self.image(name).await?;
        self.put(&format!("{path}/rootfs"), ext4(name)?).await?.ok(204);
        Ok(path)
    }

    pub(crate) async fn vm_of(&self, image: &str) -> Result<String> {
        let mut body = small_vm();
        body["imageId"] = json!(image.rsplit('/').next());
        let made = self.post("/v1/vms", &body).await?.ok(201);
        Ok(format!("/v1/vms/{}", made["id"].as_str().context("an id")?))
    }

    pub(crate) async fn image_now(&self, path: &str) -> Result<Value> {
        Ok(self.get(path).await?.ok(200))
    }

    pub(crate) fn blobs(&self, kind: &str) -> Result<Vec<PathBuf>> {
        let folder = self.data_dir().join("images").join(kind);
        let names = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        Ok(names)
    }

    /// Starts an upload that has brought `first` and brings no more until the sender is dropped or told to.
    pub(crate) fn held_upload(
        &self,
        path: &str,
        first: Vec<u8>,
    ) -> (tokio::sync::oneshot::Sender<Vec<u8>>, HeldUpload) {
        let (rest, held) = tokio::sync::oneshot::channel::<Vec<u8>>();
        let pieces = stream::unfold((Some(first), Some(held)), |(first, held)| async move {
            if let Some(first) = first {
                return Some((Ok(first), (None, held)));
            }
            let rest = held?.await;
            Some((rest.map_err(|_| std::io::Error::other("hung up")), (None, None)))
        });
        let request = self.request(Method::PUT, path).header("Content-Type", "application/octet-stream");
        (rest, Box::pin(send(request.body(reqwest::Body::wrap_stream(pieces)))))
    }
}

pub(crate) type HeldUpload = std::pin::Pin<Box<dyn Future<Output = Result<crate::harness::Reply>> + Send>>;

#[tokio::test]
async fn images_are_listed_with_the_contracts_fields() -> Result<()> {
    let server = Server::start().await?;
    let list = server.get("/v1/images").await?.ok(200);
    let image = &list[0];
    assert_eq!((&image["name"], &image["isDefault"]), (&json!("default"), &json!(true)));
    assert_eq!((&image["hasKernel"], &image["hasRootfs"]), (&json!(false), &json!(true)));
    assert_eq!((&image["baseRootfsBytes"], &image["sizeBytes"]), (&json!(2000), &json!(1000)));
    assert_eq!((&image["status"], &image["isShared"]), (&json!("ready"), &json!(true)));
    assert!(image["id"].is_string() && image["createdAt"].is_string() && image["description"].is_string());
    Ok(())
}

#[tokio::test]
async fn an_image_of_another_account_or_without_a_filesystem_makes_no_vm() -> Result<()> {
    let server = Server::start().await?;
    let other = server.post("/v1/admin/accounts", &json!({ "name": "other" })).await?.ok(201);
    let new = |account_id: Option<&str>, digest: Option<Digest>| NewImage {
        account_id: account_id.map(|id| id.parse().unwrap()),
        name: format!("image {account_id:?} {digest:?}").chars().take(90).collect(),
        description: String::new(),
        digest,
        size_bytes: 1,
        rootfs_bytes: 1,
        config: json!({}),
    };
    let theirs = server.store.image_insert(new(other["id"].as_str(), Some(Digest::from_sha256([1; 32])))).await?;
    let empty = server.store.image_insert(new(None, None)).await?;
    for image in [theirs.id, empty.id] {
        let mut body = small_vm();
        body["imageId"] = json!(image);
        let reply = server.post("/v1/vms", &body).await?;
        assert!(reply.refused(400, "invalid_parameter").starts_with("imageId"));
    }
    assert_eq!(server.get("/v1/images").await?.ok(200).as_array().unwrap().len(), 2);
    Ok(())
}

#[tokio::test]
async fn an_uploaded_filesystem_makes_vms_and_its_image_goes_with_its_blob_once_nothing_needs_it() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let path = server.image("mine").await?;
    let empty = server.image_now(&path).await?;
    assert_eq!((&empty["status"], &empty["hasRootfs"]), (&json!("empty"), &json!(false)));
    server.put(&format!("{path}/rootfs"), ext4("marker")?).await?.ok(204);
    let ready = server.image_now(&path).await?;
    assert_eq!((&ready["status"], &ready["hasRootfs"]), (&json!("ready"), &json!(true)));
    assert_eq!(ready["baseRootfsBytes"], json!(6));
    assert!(ready["sizeBytes"].as_u64().unwrap() >= 4096 && ready["digest"].is_string(), "{ready}");
    assert_eq!(server.blobs("sha256")?.len(), 1);

    let vm = server.vm_of(&path).await?;
    let refused = server.delete(&path).await?;
    assert!(refused.refused(409, "in_use").contains("1 VM:"), "{}", refused.text);
    assert_eq!(refused.json()["details"], json!({ "vms": 1, "snapshots": 0 }));
    server.delete(&vm).await?.ok(204);
    server.delete(&path).await?.ok(204);
    assert_eq!(server.blobs("sha256")?.len(), 0);
    server.get(&path).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn a_new_filesystem_replaces_the_old_one_which_stays_as_long_as_a_vm_was_made_of_it() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK, ("vm.reconcile_ms", "50")]).await?;
    let path = server.ready_image("first").await?;
    let vm = server.vm_of(&path).await?;
    let first = server.image_now(&path).await?["digest"].clone();
    server.put(&format!("{path}/rootfs"), ext4("second")?).await?.ok(204);
    assert_ne!(server.image_now(&path).await?["digest"], first);
    assert_eq!(server.blobs("sha256")?.len(), 2);
    server.delete(&vm).await?.ok(204);
    server.put(&format!("{path}/rootfs"), ext4("third")?).await?.ok(204);
    // The second went with the third's coming; the first, which a VM had kept, goes with the VM.
    until("one blob is left", async || Ok(server.blobs("sha256")?.len() == 1)).await?;
    let third = server.image_now(&path).await?["digest"].as_str().context("a digest")?.to_owned();
    let blobs = server.blobs("sha256")?;
    assert!(blobs.len() == 1 && blobs[0].to_str().unwrap().contains(&third[7..]), "{blobs:?}");
    Ok(())
}

#[tokio::test]
async fn an_images_blob_goes_when_the_engine_has_let_go_of_it_and_is_tried_again_until_then() -> Result<()> {
    let server = Server::start_cold_with(&[ANY_DISK, ("vm.reconcile_ms", "50")]).await?;
    let path = server.ready_image("mine").await?;
    let digest: Digest = server.image_now(&path).await?["digest"].as_str().context("a digest")?.parse()?;
    let vm = server.vm_of(&path).await?;
    assert!(server.fake.images().contains(&digest));
    // The VM's end is not the engine's yet.
    server.fake.fail_next(Call::Destroy);
    assert_eq!(server.delete(&vm).await?.status, 500);
    server.fake.fail_next(Call::ImageRelease);
    server.delete(&path).await?.ok(204);
    until("the blob is gone", async || Ok(server.blobs("sha256")?.is_empty())).await?;
    assert!(!server.fake.images().contains(&digest), "unlinked while it was held, it would keep its room");
    Ok(())
}

#[tokio::test]
async fn an_upload_whose_blob_goes_with_another_image_just_before_it_is_named_makes_it_again() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let (one, other) = (server.ready_image("same").await?, server.image("other").await?);
    let blob = server.blobs("sha256")?.pop().context("a blob")?;
    let old = std::time::SystemTime::now() - Duration::from_secs(86_400);
    std::fs::File::open(&blob)?.set_modified(old)?;
    server.fake.hold(Call::ImageRelease);
    let deletion = send(server.request(Method::DELETE, &one));
    let rootfs = format!("{other}/rootfs");
    let meanwhile = async {
        until("the deletion waits for the engine", async || Ok(server.get(&one).await?.status == 404)).await?;
        let upload = server.put(&rootfs, ext4("same")?);
        let release = async {
            // An upload marks the blob that it found as new.
            until("the blob is made", async || Ok(blob.metadata()?.modified()? > old)).await?;
            assert_ne!(server.image_now(&other).await?["status"], "ready");
            server.fake.release(Call::ImageRelease);
            anyhow::Ok(())
        };
        let (uploaded, released) = tokio::join!(upload, release);
        released?;
        uploaded?.ok(204);
        anyhow::Ok(())
    };
    let (deleted, meanwhile) = tokio::join!(deletion, meanwhile);
    meanwhile?;
    deleted?.ok(204);
    assert!(blob.exists(), "the record names what is there");
    server.vm_of(&other).await?;
    Ok(())
}

#[tokio::test]
async fn a_bad_filesystem_is_refused_with_the_reason_and_the_good_one_stays() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let path = server.ready_image("mine").await?;
    let before = server.image_now(&path).await?;
    let whole = ext4("cut")?;
    for (body, told) in [
        (b"\x1f\x8b\x08 and so on".to_vec(), "gunzip"),
        (Vec::new(), "empty"),
        (whole[..1 << 20].to_vec(), "cut short"),
    ] {
        let refused = server.put(&format!("{path}/rootfs"), body).await?;
        assert!(refused.refused(422, "bad_filesystem").contains(told), "{}", refused.text);
        let now = server.image_now(&path).await?;
        assert_eq!((&now["status"], &now["hasRootfs"]), (&json!("failed"), &json!(true)));
        assert!(now["error"].as_str().unwrap().contains(told), "{now}");
        assert_eq!(now["digest"], before["digest"]);
    }
    server.vm_of(&path).await?;
    server.put(&format!("{path}/rootfs"), whole).await?.ok(204);
    let now = server.image_now(&path).await?;
    assert_eq!((&now["status"], &now["error"]), (&json!("ready"), &Value::Null));
    assert_eq!(
        (&now["partialUploads"], std::fs::read_dir(server.data_dir().join("images/uploads"))?.count()),
        (&json!([]), 0)
    );
    Ok(())
}

#[tokio::test]
async fn a_kernel_is_kept_if_it_is_one() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let path = server.ready_image("mine").await?;
    let refused = server.put(&format!("{path}/kernel"), vec![b'x'; 5000]).await?;
    assert!(refused.refused(422, "bad_kernel").contains("bzImage"), "{}", refused.text);
    server.put(&format!("{path}/kernel"), kernel(1)).await?.ok(204);
    let now = server.image_now(&path).await?;
    assert_eq!((&now["hasKernel"], &now["status"]), (&json!(true), &json!("ready")));
    assert_eq!(server.blobs("kernels")?.len(), 1);
    server.delete(&path).await?.ok(204);
    assert_eq!(server.blobs("kernels")?.len() + server.blobs("sha256")?.len(), 0);
    Ok(())
}

#[tokio::test]
async fn an_upload_over_the_limit_is_refused_by_what_it_announces_and_by_what_it_brings() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK, ("images.max_rootfs_bytes", "1048576")]).await?;
    let path = format!("{}/rootfs", server.image("mine").await?);
    let announced = server.put(&path, vec![0; (1 << 20) + 1]).await?;
    assert!(announced.refused(413, "too_large").contains("1048576"), "{}", announced.text);
    assert_eq!(announced.json()["details"]["limitBytes"], json!(1 << 20));
    let (rest, upload) = server.held_upload(&path, vec![0; 600_000]);
    rest.send(vec![0; 600_000]).unwrap();
    upload.await?.refused(413, "too_large");
    Ok(())
}

#[tokio::test]
async fn an_upload_shows_how_far_it_is_keeps_others_out_and_one_that_breaks_off_says_so() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let path = server.image("mine").await?;
    let whole = ext4("x")?;
    let (rest, upload) = server.held_upload(&format!("{path}/rootfs"), whole[..700_000].to_vec());
    let upload = tokio::task::JoinSet::from_iter([upload]);
    until("bytes are counted", async || {
        let now = server.image_now(&path).await?;
        Ok(now["status"] == "uploading" && now["receivedBytes"] == 700_000)
    })
    .await?;
    for part in ["rootfs", "kernel"] {
        let second = server.put(&format!("{path}/{part}"), b"x".to_vec()).await?;
        second.refused(409, "upload_in_progress");
    }
    server.delete(&path).await?.refused(409, "upload_in_progress");
    drop(rest);
    assert!(upload.join_all().await.pop().unwrap().is_err(), "the client hung up");
    until("the end is written down", async || Ok(server.image_now(&path).await?["status"] == "failed")).await?;
    let now = server.image_now(&path).await?;
    let error = now["error"].as_str().unwrap();
    assert!(error.contains("broke off") && error.contains("700000 bytes are kept"), "{now}");

    let (rest, upload) = server.held_upload(&format!("{path}/rootfs"), whole[..700_000].to_vec());
    rest.send(whole[700_000..].to_vec()).unwrap();
    upload.await?.ok(204);
    Ok(())
}

#[tokio::test]
async fn a_client_that_stalls_is_given_up() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK, ("http.body_timeout_ms", "200")]).await?;
    let path = server.image("mine").await?;
    let (_rest, upload) = server.held_upload(&format!("{path}/rootfs"), vec![0; 100]);
    upload.await?.refused(408, "body_timeout");
    assert_eq!(server.image_now(&path).await?["status"], "failed");
    Ok(())
}

#[tokio::test]
async fn uploads_are_bounded_in_number_and_leave_the_disk_its_floor() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK, ("images.uploads_in_flight", "1")]).await?;
    let (one, other) = (server.image("one").await?, server.image("other").await?);
    let (_rest, upload) = server.held_upload(&format!("{one}/rootfs"), vec![0; 100]);
    let _upload = tokio::task::JoinSet::from_iter([upload]);
    until("it began", async || Ok(server.image_now(&one).await?["status"] == "uploading")).await?;
    server.put(&format!("{other}/kernel"), kernel(1)).await?.refused(429, "too_many");
    let (theirs, body) = (server.other_key("other", &["write"]).await?, json!({ "name": "x", "description": "" }));
    let image = server.post_as(&theirs, "/v1/images", &body).await?.ok(201);
    let path = format!("{}/v1/images/{}/kernel", server.url, image["id"].as_str().context("an id")?);
    send(server.client.put(path).header("X-API-Key", &theirs).body(kernel(1))).await?.refused(503, "busy");

    let full = Server::start_with(&[("images.min_free_disk_mb", "1000000000")]).await?;
    let path = full.image("mine").await?;
    full.put(&format!("{path}/kernel"), kernel(1)).await?.refused(503, "no_capacity");
    assert_eq!(full.image_now(&path).await?["status"], "empty");
    Ok(())
}

#[tokio::test]
async fn a_body_of_another_type_is_refused() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let path = server.image("mine").await?;
    let form = server.request(Method::PUT, &format!("{path}/kernel")).header("Content-Type", "multipart/form-data");
    let refused = send(form.body("x")).await?;
    assert!(refused.refused(415, "unsupported_media_type").contains("octet-stream"), "{}", refused.text);
    Ok(())
}

#[tokio::test]
async fn every_account_has_a_default_of_its_own_and_the_administrator_sets_everybodys() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let key = server.other_key("other", &["write"]).await?;
    let default_of = async |key: &str| -> Result<Value> {
        let list = server.get_as(key, "/v1/images").await?.ok(200);
        let defaults: Vec<Value> =
            list.as_array().unwrap().iter().filter(|i| i["isDefault"] == true).cloned().collect();
        ensure!(defaults.len() == 1, "{list}");
        Ok(defaults[0]["name"].clone())
    };
    let empty = server.image("empty").await?;
    server.act(&format!("{empty}/set-default")).await?.refused(409, "no_rootfs");

    let mine = server.ready_image("mine").await?;
    server.act(&format!("{mine}/set-default")).await?.ok(204);
    assert_eq!(default_of(&server.key).await?, "mine");
    assert_eq!(default_of(&key).await?, "default");
    let made = server.post("/v1/vms", &small_vm()).await?.ok(201);
    assert!(mine.ends_with(made["imageId"].as_str().unwrap()));
    server.delete(&format!("/v1/vms/{}", made["id"].as_str().unwrap())).await?.ok(204);
    server.delete(&mine).await?.refused(409, "is_default");

    let body = json!({ "name": "ours", "description": "for all", "shared": true });
    let ours = server.post("/v1/images", &body).await?.ok(201);
    let ours = format!("/v1/images/{}", ours["id"].as_str().unwrap());
    server.put(&format!("{ours}/rootfs"), ext4("ours")?).await?.ok(204);
    server.act(&format!("{ours}/set-default")).await?.ok(204);
    assert_eq!(default_of(&server.key).await?, "ours");
    assert_eq!(default_of(&key).await?, "ours");
    server.delete(&mine).await?.ok(204);
    server.delete(&ours).await?.refused(409, "is_default");

    // Others may choose a shared image for themselves, not for all, nor change it.
    let list = server.get_as(&key, "/v1/images").await?.ok(200);
    let built = list.as_array().unwrap().iter().find(|image| image["name"] == "default").unwrap()["id"].clone();
    let built = format!("/v1/images/{}", built.as_str().unwrap());
    let theirs = |method: Method, path: String| server.client.request(method, path).header("X-API-Key", &key);
    send(theirs(Method::POST, format!("{}{built}/set-default", server.url))).await?.ok(204);
    assert_eq!((default_of(&key).await?, default_of(&server.key).await?), (json!("default"), json!("ours")));
    send(theirs(Method::DELETE, format!("{}{ours}", server.url))).await?.refused(403, "forbidden");
    send(theirs(Method::PUT, format!("{}{ours}/rootfs", server.url)).body("x")).await?.refused(403, "forbidden");
    let shared = json!({ "name": "x", "description": "", "shared": true });
    server.post_as(&key, "/v1/images", &shared).await?.refused(403, "forbidden");
    Ok(())
}

#[tokio::test]
async fn another_accounts_image_is_not_found_and_a_reader_changes_nothing() -> Result<()> {
    let server = Server::start_with(&[ANY_DISK]).await?;
    let path = server.ready_image("mine").await?;
    let other = server.other_key("other", &["write"]).await?;
    let account = server.get("/v1/admin/accounts").await?.ok(200)[0]["id"].clone();
    let reader = server.key_for(&account, &["read"]).await?;
    let parts = [
        (Method::PUT, format!("{path}/rootfs")),
        (Method::PUT, format!("{path}/kernel")),
        (Method::POST, format!("{path}/set-default")),
        (Method::DELETE, path.clone()),
    ];
    for (method, path) in &parts {
        let ask =
            |key: &str| server.client.request(method.clone(), format!("{}{path}", server.url)).header("X-API-Key", key);
        send(ask(&other)).await?.refused(404, "not_found");
        send(ask(&reader)).await?.refused(403, "forbidden");
    }
    server.get_as(&other, &path).await?.refused(404, "not_found");
    assert_eq!(server.get_as(&reader, &path).await?.ok(200)["status"], "ready");
    Ok(())
}

#[tokio::test]
async fn an_accounts_images_are_bounded_in_number_and_bytes() -> Result<()> {
    let server =
        Server::start_with(&[ANY_DISK, ("images.per_account", "2"), ("images.bytes_per_account", "9000")]).await?;
    let (one, two) = (server.ready_image("one").await?, server.image("two").await?);
    let refused = server.post("/v1/images", &json!({ "name": "three", "description": "" })).await?;
    refused.refused(429, "quota_exceeded");
    assert_eq!(refused.json()["details"]["what"], "images");
    let refused = server.put(&format!("{two}/kernel"), kernel(1)).await?;
    refused.refused(429, "quota_exceeded");
    assert_eq!(refused.json()["details"]["what"], "imageBytes");
    assert_eq!(server.blobs("kernels")?.len(), 0, "nothing is left of it");
    assert_eq!(server.image_now(&two).await?["status"], "failed");
    server.delete(&two).await?.ok(204);
    server.delete(&one).await?.ok(204);
    server.image("three").await?;
    Ok(())
}

#[tokio::test]
async fn a_wrong_field_is_named() -> Result<()> {
    let server = Server::start().await?;
    let body = json!({ "name": " x", "description": "a\u{7}", "shared": "yes", "size": 1 });
    let refused = server.post("/v1/images", &body).await?;
    refused.refused(400, "invalid_parameter");
    let fields = refused.json()["details"]["fields"].clone();
    let named: Vec<&str> = fields.as_array().unwrap().iter().map(|field| field["field"].as_str().unwrap()).collect();
    assert_eq!(named, ["name", "description", "shared", "size"]);
    Ok(())
}

#[tokio::test]
async fn what_an_earlier_server_left_half_done_is_settled_before_anything_is_answered() -> Result<()> {
    let mut server = Server::start_with(&[ANY_DISK]).await?;
    let (half, whole) = (server.image("half").await?, server.ready_image("whole").await?);
    server.stop().await;
    let id: ImageId = half.rsplit('/').next().unwrap().parse()?;
    assert!(server.store.image_upload_begin(&id, Upload::Rootfs).await?);
    let uploads = server.data_dir().join("images/uploads").join(id.as_str());
    std::fs::create_dir_all(uploads.join("work/root/etc"))?;
    std::fs::write(uploads.join("upload"), b"half")?;
    let stray = |age: Duration, digit: &str| -> Result<PathBuf> {
        let path = server.data_dir().join(format!("images/sha256/{}.erofs", digit.repeat(64)));
        let file = std::fs::File::create(&path)?;
        file.set_modified(std::time::SystemTime::now() - age)?;
        Ok(path)
    };
    let (old, young) = (stray(Duration::from_secs(86_400), "a")?, stray(Duration::ZERO, "b")?);
    server.restart().await?;
    let now = server.image_now(&half).await?;
    assert_eq!(now["status"], "failed");
    assert!(now["error"].as_str().unwrap().contains("interrupted"), "{now}");
    assert!(!uploads.exists() && !old.exists() && young.exists());
    assert_eq!(server.image_now(&whole).await?["status"], "ready");
    assert_eq!(server.blobs("sha256")?.len(), 2);
    server.put(&format!("{half}/rootfs"), ext4("again")?).await?.ok(204);
    assert_eq!(server.image_now(&half).await?["status"], "ready");
    Ok(())
}
