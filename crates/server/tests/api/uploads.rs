//! Uploads that break off and are gone on with, and who may upload how much at once.

use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use tiffin_image::blob;

use crate::{
    harness::{Reply, Server, send, until},
    kernels::kernel,
};

/// Settings for machines whose disk is nearly full, and a reconciler that comes round at once.
const SOON: [(&str, &str); 2] = [("images.min_free_disk_mb", "1"), ("vm.reconcile_ms", "50")];

/// `Repr-Digest` of those bytes.
fn digest(bytes: &[u8]) -> Result<(&'static str, String)> {
    let mut file = tempfile::tempfile()?;
    std::io::Write::write_all(&mut file, bytes)?;
    std::io::Seek::rewind(&mut file)?;
    let hex = blob::hash(&mut file)?.digest.hex().to_owned();
    let bytes = (0..32).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16)).collect::<Result<Vec<_>, _>>()?;
    Ok(("Repr-Digest", format!("sha-256=:{}:", base64(&bytes))))
}

fn base64(bytes: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes)
}

impl Server {
    /// Uploads bytes with a header.
    async fn put_with(&self, path: &str, headers: &[(&str, &str)], body: impl Into<reqwest::Body>) -> Result<Reply> {
        let mut request = self.request(Method::PUT, path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        send(request.body(body)).await
    }

    /// Uploads those bytes of the file.
    async fn put_part(&self, path: &str, file: &[u8], part: std::ops::Range<usize>) -> Result<Reply> {
        let range = format!("bytes {}-{}/{}", part.start, part.end - 1, file.len());
        self.put_with(path, &[("Content-Range", &range)], file[part].to_vec()).await
    }

    async fn partials(&self, image: &str) -> Result<Value> {
        Ok(self.get(image).await?.ok(200)["partialUploads"].clone())
    }
}

#[tokio::test]
async fn a_file_may_come_in_pieces_and_what_has_come_outlives_the_server() -> Result<()> {
    let mut server = Server::start_with(&SOON).await?;
    let (image, file) = (server.image("mine").await?, kernel(1));
    let path = format!("{image}/kernel");
    server.put_part(&path, &file, 0..1000).await?.ok(202);
    let piece = server.put_part(&path, &file, 1000..5000).await?.ok(202);
    assert_eq!(piece, json!({ "receivedBytes": 5000 }));
    let now = server.get(&image).await?.ok(200);
    assert_eq!((&now["status"], &now["error"], &now["hasKernel"]), (&json!("incomplete"), &Value::Null, &json!(false)));
    let kept = &now["partialUploads"][0];
    assert_eq!((&kept["part"], &kept["receivedBytes"]), (&json!("kernel"), &json!(5000)));
    assert_eq!(kept["expectedBytes"], json!(file.len()));
    assert!(kept["expiresAt"].as_str().context("a time")? > now["createdAt"].as_str().context("a time")?);

    server.restart().await?;
    assert_eq!(server.partials(&image).await?[0]["receivedBytes"], 5000);
    server.put_part(&path, &file, 5000..file.len()).await?.ok(204);
    let now = server.get(&image).await?.ok(200);
    assert_eq!((&now["hasKernel"], &now["partialUploads"]), (&json!(true), &json!([])));
    let blob = std::fs::read_dir(server.data_dir().join("images/kernels"))?.next().context("a blob")??;
    assert!(std::fs::read(blob.path())? == file, "the pieces are the file");
    assert_eq!(std::fs::read_dir(server.data_dir().join("images/uploads"))?.count(), 0);
    Ok(())
}

#[tokio::test]
async fn what_goes_on_in_the_wrong_place_is_told_the_right_one_and_loses_nothing() -> Result<()> {
    let server = Server::start_with(&SOON).await?;
    let (image, file) = (server.image("mine").await?, kernel(1));
    let path = format!("{image}/kernel");
    let refused = server.put_part(&path, &file, 7..100).await?;
    assert!(refused.refused(409, "wrong_offset").starts_with("0 bytes"), "{}", refused.text);
    let (name, right) = digest(&file)?;
    let first = format!("bytes 0-999/{}", file.len());
    server.put_with(&path, &[("Content-Range", &first), (name, &right)], file[..1000].to_vec()).await?.ok(202);
    for part in [999..2000, 1001..2000] {
        let refused = server.put_part(&path, &file, part).await?;
        assert!(refused.refused(409, "wrong_offset").contains("bytes 1000-"), "{}", refused.text);
        assert_eq!(refused.json()["details"], json!({ "receivedBytes": 1000, "totalBytes": file.len() }));
    }
    let longer = [file.clone(), vec![0]].concat();
    server.put_part(&path, &longer, 1000..2000).await?.refused(409, "other_upload");
    let (_, other) = digest(&longer)?;
    let range = format!("bytes 1000-1999/{}", file.len());
    let refused =
        server.put_with(&path, &[("Content-Range", &range), (name, &other)], file[1000..2000].to_vec()).await?;
    refused.refused(409, "other_upload");
    for (header, value) in [
        ("Content-Range", "bytes 1000-1/2000"),
        ("Content-Range", "1000-1999/2000"),
        ("Content-Range", "bytes 1000-1998/4000"),
        ("Repr-Digest", "sha-256=nonsense"),
        ("Digest", "md5=abc"),
    ] {
        let refused = server.put_with(&path, &[(header, value)], file[1000..2000].to_vec()).await?;
        assert!(refused.refused(400, "invalid_parameter").starts_with(header), "{}", refused.text);
    }
    assert_eq!(server.partials(&image).await?[0]["receivedBytes"], 1000);
    // The other part has nothing to do with it, and one from the beginning begins anew.
    server.put(&format!("{image}/rootfs"), b"\x1f\x8b".to_vec()).await?.refused(422, "bad_filesystem");
    assert_eq!(server.partials(&image).await?[0]["receivedBytes"], 1000);
    server.put_part(&path, &file, 0..500).await?.ok(202);
    assert_eq!(server.partials(&image).await?[0]["receivedBytes"], 500);
    server.put(&path, file).await?.ok(204);
    assert_eq!(server.partials(&image).await?, json!([]));
    Ok(())
}

#[tokio::test]
async fn a_file_that_isnt_the_one_that_was_meant_is_refused_and_not_kept() -> Result<()> {
    let server = Server::start_with(&SOON).await?;
    let (image, file) = (server.image("mine").await?, kernel(1));
    let path = format!("{image}/kernel");
    let (name, right) = digest(&file)?;
    let mut damaged = file.clone();
    damaged[4000] ^= 1;
    let range = |first: usize, end: usize| format!("bytes {first}-{}/{}", end - 1, file.len());
    let first = [("Content-Range", range(0, 5000)), (name, right.clone())];
    let first: Vec<_> = first.iter().map(|(name, value)| (*name, value.as_str())).collect();
    server.put_with(&path, &first, damaged[..5000].to_vec()).await?.ok(202);
    // The digest that came with the first piece holds for all.
    let last = range(5000, file.len());
    let refused = server.put_with(&path, &[("Content-Range", &last)], file[5000..].to_vec()).await?;
    refused.refused(400, "digest_mismatch");
    let now = server.get(&image).await?.ok(200);
    assert_eq!(
        (&now["status"], &now["hasKernel"], &now["partialUploads"]),
        (&json!("failed"), &json!(false), &json!([]))
    );
    server.put_with(&path, &[(name, &right)], file.clone()).await?.ok(204);
    Ok(())
}

#[tokio::test]
async fn what_is_kept_counts_against_the_quota_and_goes_with_the_image_or_in_time() -> Result<()> {
    let server = Server::start_with(&[SOON.as_slice(), &[("images.bytes_per_account", "1500000")]].concat()).await?;
    let (one, other) = (server.image("one").await?, server.image("other").await?);
    let file = vec![7; 2_000_000];
    server.put_part(&format!("{one}/rootfs"), &file, 0..1_000_000).await?.ok(202);
    let refused = server.put_part(&format!("{other}/rootfs"), &file, 0..1_000_000).await?;
    assert!(refused.refused(413, "too_large").contains("quota of 1500000"), "{}", refused.text);
    assert_eq!(server.partials(&other).await?, json!([]));
    server.put_part(&format!("{other}/rootfs"), &file, 0..400_000).await?.ok(202);
    server.delete(&one).await?.ok(204);
    server.put_part(&format!("{other}/rootfs"), &file, 400_000..1_400_000).await?.ok(202);
    let uploads = || Ok::<_, std::io::Error>(std::fs::read_dir(server.data_dir().join("images/uploads"))?.count());
    assert_eq!(uploads()?, 1);

    let brief = Server::start_with(&[SOON.as_slice(), &[("images.partial_kept_s", "1")]].concat()).await?;
    let image = brief.image("mine").await?;
    brief.put_part(&format!("{image}/rootfs"), &file, 0..1_000_000).await?.ok(202);
    until("it is removed", async || Ok(brief.partials(&image).await? == json!([]))).await?;
    until("its file too", async || Ok(std::fs::read_dir(brief.data_dir().join("images/uploads"))?.count() == 0))
        .await?;
    let refused = brief.put_part(&format!("{image}/rootfs"), &file, 1_000_000..2_000_000).await?;
    assert!(refused.refused(409, "wrong_offset").starts_with("0 bytes"), "{}", refused.text);
    Ok(())
}

#[tokio::test]
async fn one_account_leaves_others_a_place() -> Result<()> {
    let server = Server::start_with(&[SOON.as_slice(), &[("images.uploads_in_flight", "3")]].concat()).await?;
    let key = server.other_key("other", &["write"]).await?;
    let mut held = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for name in ["one", "two"] {
        let image = server.image(name).await?;
        let (rest, upload) = server.held_upload(&format!("{image}/rootfs"), vec![0; 100]);
        held.push(rest);
        tasks.spawn(upload);
        until("it began", async || Ok(server.get(&image).await?.ok(200)["status"] == "uploading")).await?;
    }
    let third = server.image("three").await?;
    let refused = server.put(&format!("{third}/kernel"), kernel(1)).await?;
    assert!(refused.refused(429, "too_many").contains("2 uploads of this account"), "{}", refused.text);
    assert!(refused.headers.contains_key("retry-after"));
    let body = json!({ "name": "theirs", "description": "" });
    let theirs = server.post_as(&key, "/v1/images", &body).await?.ok(201);
    let path = format!("{}/v1/images/{}/kernel", server.url, theirs["id"].as_str().context("an id")?);
    send(server.client.put(path).header("X-API-Key", &key).body(kernel(1))).await?.ok(204);
    drop(held);
    tasks.join_all().await;
    until("there is a place again", async || Ok(server.put(&format!("{third}/kernel"), kernel(1)).await?.status == 204))
        .await
}

#[tokio::test]
async fn one_that_comes_too_slowly_breaks_off_and_can_be_gone_on_with() -> Result<()> {
    let pace = [("images.min_upload_bytes_per_s", "1000000"), ("images.upload_stretch_ms", "200")];
    let server = Server::start_with(&[SOON, pace].concat()).await?;
    let image = server.image("mine").await?;
    let drops = tokio_stream(Duration::from_millis(10)).map(|()| Ok::<_, std::io::Error>(vec![7; 100]));
    let slow = server.put(&format!("{image}/rootfs"), reqwest::Body::wrap_stream(drops)).await;
    // A client that is still sending may not see the answer.
    if let Ok(slow) = slow {
        assert!(slow.refused(408, "too_slow").contains("1000000 a second"), "{}", slow.text);
    }
    until("it broke off", async || Ok(server.get(&image).await?.ok(200)["status"] == "failed")).await?;
    let now = server.get(&image).await?.ok(200);
    assert!(now["error"].as_str().context("why")?.contains("less than 1000000 a second"), "{now}");
    assert!(now["partialUploads"][0]["receivedBytes"].as_u64().context("bytes")? >= 100, "{now}");
    Ok(())
}

/// Something again and again.
fn tokio_stream(every: Duration) -> impl futures_util::Stream<Item = ()> + Send {
    futures_util::stream::unfold(tokio::time::interval(every), |mut timer| async move {
        timer.tick().await;
        Some(((), timer))
    })
}

#[tokio::test]
async fn a_damaged_image_is_noticed_makes_no_vms_and_is_healed_by_the_same_file() -> Result<()> {
    let server = Server::start_with(&[SOON.as_slice(), &[("images.scrub_every_s", "1")]].concat()).await?;
    let image = server.ready_image("mine").await?;
    let body = json!({ "cpu": 1, "memMb": 128, "allowIps": [], "imageId": image.rsplit('/').next() });
    server.post("/v1/vms", &body).await?.ok(201);
    let blob = std::fs::read_dir(server.data_dir().join("images/sha256"))?.next().context("a blob")??.path();
    let mut bytes = std::fs::read(&blob)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::os::unix::fs::FileExt::write_at(
        &std::fs::File::options().write(true).open(&blob)?,
        &bytes[middle..=middle],
        middle as u64,
    )?;
    until("it is noticed", async || Ok(server.get(&image).await?.ok(200)["isDamaged"] == true)).await?;
    let refused = server.post("/v1/vms", &body).await?;
    assert!(refused.refused(422, "image_damaged").contains("upload it again"), "{}", refused.text);
    assert_eq!(server.get("/v1/admin/overview").await?.ok(200)["damagedImages"], 1);
    server.vm().await?;

    server.put(&format!("{image}/rootfs"), crate::images::ext4("mine")?).await?.ok(204);
    assert_eq!(server.get(&image).await?.ok(200)["isDamaged"], false);
    assert_eq!(server.get("/v1/admin/overview").await?.ok(200)["damagedImages"], 0);
    server.post("/v1/vms", &body).await?.ok(201);
    Ok(())
}
