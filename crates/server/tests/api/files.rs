//! `/v1/vms/{id}/files`

use std::{io::Read, time::Duration};

use anyhow::{Context, Result};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use futures_util::{StreamExt, stream};
use reqwest::Method;
use serde_json::json;
use tiffin_engine::fake::FilesEnd;
use tiffin_protocol::FailureCode;
use tiffin_types::vm::{EndReason, EndReport};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{Reply, Server, id_of, send, until};

/// A tar.gz of those files.
fn archive(files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        // Not by the builder, which refuses names that a hostile client would send.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        tar.append(&header, *bytes)?;
    }
    Ok(tar.into_inner()?.finish()?)
}

fn unpacked(archive: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    let entries = tar.entries()?.map(|entry| {
        let mut entry = entry?;
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        Ok((String::from_utf8(entry.path_bytes().into_owned())?, bytes))
    });
    entries.collect()
}

fn upload_to(server: &Server, vm: &str, dest: &str) -> reqwest::RequestBuilder {
    let request = server.request(Method::POST, &format!("{vm}/files/upload")).query(&[("dest", dest)]);
    request.header("Content-Type", "application/gzip")
}

async fn upload(server: &Server, vm: &str, dest: &str, body: Vec<u8>) -> Result<Reply> {
    send(upload_to(server, vm, dest).body(body)).await
}

async fn write(server: &Server, vm: &str, path: &str, body: impl Into<reqwest::Body>) -> Result<Reply> {
    let request = server.request(Method::PUT, &format!("{vm}/files/content")).query(&[("path", path)]);
    send(request.header("Content-Type", "application/octet-stream").body(body)).await
}

async fn get(server: &Server, vm: &str, what: &str, path: &str) -> Result<Reply> {
    send(server.request(Method::GET, &format!("{vm}/{what}")).query(&[("path", path)])).await
}

#[tokio::test]
async fn an_archive_goes_in_and_comes_out() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let big: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let files: &[(&str, &[u8])] = &[("hello.txt", b"hello world\n"), ("sub/big", &big)];
    for kind in ["application/gzip", "application/x-gzip", "application/octet-stream"] {
        let request = server.request(Method::POST, &format!("{vm}/files/upload?dest=%2Fworkspace%2Fproject"));
        send(request.header("Content-Type", kind).body(archive(files)?)).await?.ok(204);
    }
    assert_eq!(server.fake.file(&id_of(&vm), "/workspace/project/hello.txt").as_deref(), Some(&b"hello world\n"[..]));

    let request = server.request(Method::GET, &format!("{vm}/files/download?path=/workspace/project/"));
    let answer = request.send().await?;
    assert_eq!((answer.status().as_u16(), &answer.headers()["content-type"]), (200, &"application/gzip".parse()?));
    assert_eq!(answer.headers()["content-disposition"], "attachment; filename=\"project.tar.gz\"");
    let packed = unpacked(&answer.bytes().await?)?;
    let named = |name: &str| packed.iter().find(|(other, _)| other == name).map(|(_, bytes)| bytes.as_slice());
    assert!(named("hello.txt") == Some(b"hello world\n") && named("sub/big") == Some(&big));
    Ok(())
}

#[tokio::test]
async fn a_file_is_written_read_and_listed() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    write(&server, &vm, "/workspace/a b/ü.txt", "text").await?.ok(204);
    write(&server, &vm, "/workspace/empty", "").await?.ok(204);
    write(&server, &vm, "/workspace/a b/ü.txt", "other text").await?.ok(204);
    let read = get(&server, &vm, "files/content", "/workspace/a b/ü.txt").await?;
    assert_eq!((read.status.as_u16(), read.text.as_str()), (200, "other text"));
    assert_eq!(read.headers["content-type"], "application/octet-stream");
    assert_eq!(read.headers["x-content-type-options"], "nosniff");
    assert_eq!(get(&server, &vm, "files/content", "/workspace/empty").await?.text, "");
    let at = "2025-01-21T10:30:00.000Z";
    let folder = json!([
        { "name": "a b", "type": "directory", "size": 0, "mode": "755", "modifiedAt": at },
        { "name": "empty", "type": "file", "size": 0, "mode": "644", "modifiedAt": at },
    ]);
    assert_eq!(get(&server, &vm, "files", "/workspace/").await?.ok(200), folder);
    assert_eq!(server.get(&format!("{vm}/files")).await?.ok(200), folder, "the default is /workspace");
    Ok(())
}

#[tokio::test]
async fn paths_that_are_none_are_400s_that_name_the_parameter() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let long = format!("/workspace/{}", "a".repeat(4096));
    for bad in ["", "a", "/", "/etc", "/workspace/../etc", "/workspace/a/..", "/workspacex", "/workspace/\0", &long] {
        for reply in [
            get(&server, &vm, "files", bad).await?,
            get(&server, &vm, "files/download", bad).await?,
            get(&server, &vm, "files/content", bad).await?,
            write(&server, &vm, bad, "x").await?,
            upload(&server, &vm, bad, archive(&[])?).await?,
        ] {
            let message = reply.refused(400, "invalid_parameter");
            assert!(message.contains("/workspace"), "{message}");
            let field = &reply.json()["details"]["fields"][0]["field"];
            assert!(field == "path" || field == "dest", "{field}");
        }
    }
    for path in ["files/download", "files/content"] {
        server.get(&format!("{vm}/{path}")).await?.refused(400, "invalid_parameter");
        server
            .get(&format!("{vm}/{path}?path=/workspace/a&path=/workspace/b"))
            .await?
            .refused(400, "invalid_parameter");
        server.get(&format!("{vm}/{path}?path=/workspace/a&x=1")).await?.refused(400, "invalid_parameter");
    }
    get(&server, &vm, "files/content", "/workspace").await?.refused(400, "invalid_parameter");
    write(&server, &vm, "/workspace/", "x").await?.refused(400, "invalid_parameter");
    assert!(server.fake.paths(&id_of(&vm)).is_empty());
    Ok(())
}

#[tokio::test]
async fn each_failure_in_the_guest_has_its_own_answer() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    for (code, status, kind) in [
        (FailureCode::NotFound, 404, "file_not_found"),
        (FailureCode::Forbidden, 400, "invalid_parameter"),
        (FailureCode::BadArchive, 400, "bad_archive"),
        (FailureCode::TooLarge, 413, "too_large"),
        (FailureCode::NoSpace, 422, "guest_disk_full"),
        (FailureCode::NoRoom, 422, "guest_full"),
        (FailureCode::TimedOut, 504, "files_timeout"),
        (FailureCode::Internal, 502, "agent_failed"),
    ] {
        server.fake.files_end("/workspace/x", FilesEnd::Fails(0, code));
        get(&server, &vm, "files/download", "/workspace/x").await?.refused(status, kind);
        let message = upload(&server, &vm, "/workspace/x", archive(&[])?).await?.refused(status, kind);
        if code == FailureCode::Forbidden {
            assert!(message.starts_with("dest "), "{message}");
        }
    }
    server.fake.files_end("/workspace/x", FilesEnd::HangsUp(0));
    get(&server, &vm, "files/content", "/workspace/x").await?.refused(502, "agent_failed");
    write(&server, &vm, "/workspace/x", vec![b'x'; 5 << 20]).await?.refused(502, "agent_failed");
    get(&server, &vm, "files/content", "/workspace/none").await?.refused(404, "file_not_found");
    get(&server, &vm, "files", "/workspace/none").await?.refused(404, "file_not_found");
    server.fake.files_end("/workspace/x", FilesEnd::Endless);
    get(&server, &vm, "files", "/workspace/x").await?.refused(413, "too_large");
    Ok(())
}

#[tokio::test]
async fn an_archive_that_breaks_a_rule_is_refused_and_leaves_nothing() -> Result<()> {
    let settings = [("files.unpacked_bytes", "4194304"), ("files.entries", "10"), ("files.ratio", "50")];
    let server = Server::start_with(&settings).await?;
    let vm = server.vm().await?;
    for (bad, status, code) in [
        (archive(&[("ok", b"x"), ("../evil", b"x")])?, 400, "bad_archive"),
        (archive(&[("ok", b"x"), ("/etc/passwd", b"x")])?, 400, "bad_archive"),
        (b"no archive at all".to_vec(), 400, "bad_archive"),
        (archive(&[("ok", &[b'x'; 100_000])])?[..200].to_vec(), 400, "bad_archive"),
        (archive(&[("bomb", &vec![0; 3 << 20])])?, 413, "too_large"),
        (archive(&[("big", &vec![0; 5 << 20])])?, 413, "too_large"),
        (archive(&[("f", b"x".as_slice()); 11])?, 413, "too_large"),
    ] {
        upload(&server, &vm, "/workspace/x", bad).await?.refused(status, code);
        assert!(server.fake.paths(&id_of(&vm)).is_empty());
    }
    Ok(())
}

#[tokio::test]
async fn bodies_over_the_cap_are_413_announced_or_not() -> Result<()> {
    let server = Server::start_with(&[("files.upload_bytes", "100000"), ("files.file_bytes", "100000")]).await?;
    let vm = server.vm().await?;
    let fits = vec![b'x'; 100_000];
    write(&server, &vm, "/workspace/fits", fits.clone()).await?.ok(204);
    let chunked = |bytes: usize| {
        reqwest::Body::wrap_stream(stream::iter((0..bytes / 1000).map(|_| anyhow::Ok(vec![b'x'; 1000]))))
    };
    write(&server, &vm, "/workspace/chunked", chunked(100_000)).await?.ok(204);
    let announced = write(&server, &vm, "/workspace/over", vec![b'x'; 100_001]).await?;
    assert!(announced.refused(413, "too_large").contains("100000"));
    assert_eq!(announced.json()["details"]["limitBytes"], 100_000);
    write(&server, &vm, "/workspace/over", chunked(101_000)).await?.refused(413, "too_large");
    send(upload_to(&server, &vm, "/workspace/over").body(chunked(101_000))).await?.refused(413, "too_large");
    upload(&server, &vm, "/workspace/over", vec![b'x'; 3 << 20]).await?.refused(413, "too_large");
    let mut paths = server.fake.paths(&id_of(&vm));
    paths.sort();
    assert_eq!(paths, ["/workspace/chunked", "/workspace/fits"]);
    Ok(())
}

#[tokio::test]
async fn a_body_of_another_type_is_415() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    for kind in ["application/json", "text/plain", "application/zip", "multipart/form-data; boundary=x", ""] {
        let request = server.request(Method::POST, &format!("{vm}/files/upload?dest=/workspace/x"));
        let reply = send(request.header("Content-Type", kind).body(archive(&[])?)).await?;
        assert!(reply.refused(415, "unsupported_media_type").contains("application/gzip"));
    }
    let request = server.request(Method::PUT, &format!("{vm}/files/content?path=/workspace/x"));
    send(request.body("x")).await?.refused(415, "unsupported_media_type");
    Ok(())
}

/// A connection on which the head of an upload was sent, and a part of its body.
async fn begun(server: &Server, vm: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await?;
    let head = format!(
        "PUT {vm}/files/content?path=/workspace/part HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\n\
         Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n",
        server.key
    );
    stream.write_all(&[head.as_bytes(), &[b'x'; 1000]].concat()).await?;
    until("the guest takes it", async || Ok(server.fake.commands() == 1)).await?;
    Ok(stream)
}

#[tokio::test]
async fn an_upload_that_is_cut_short_leaves_nothing_in_the_guest() -> Result<()> {
    let server = Server::start_with(&[("http.body_timeout_ms", "300")]).await?;
    let vm = server.vm().await?;
    drop(begun(&server, &vm).await?);
    until("the guest is told", async || Ok(server.fake.commands() == 0)).await?;

    let mut stalled = begun(&server, &vm).await?;
    let mut answer = vec![0; 12];
    tokio::time::timeout(Duration::from_secs(20), stalled.read_exact(&mut answer)).await??;
    assert_eq!(answer, b"HTTP/1.1 408");
    until("the guest is told", async || Ok(server.fake.commands() == 0)).await?;
    assert!(server.fake.paths(&id_of(&vm)).is_empty());
    Ok(())
}

#[tokio::test]
async fn a_download_that_fails_in_the_middle_is_no_whole_answer() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    for end in [FilesEnd::Fails(200_000, FailureCode::Internal), FilesEnd::HangsUp(200_000)] {
        server.fake.files_end("/workspace/x", end);
        for what in ["download", "content"] {
            let request = server.request(Method::GET, &format!("{vm}/files/{what}?path=/workspace/x"));
            let answer = request.send().await?;
            assert_eq!(answer.status(), 200, "its first bytes were fine");
            assert!(answer.bytes().await.is_err(), "it broke off");
        }
    }
    let settings = [("files.download_bytes", "100000")];
    let server = Server::start_with(&settings).await?;
    let vm = server.vm().await?;
    server.fake.files_end("/workspace/x", FilesEnd::Endless);
    let answer = server.request(Method::GET, &format!("{vm}/files/content?path=/workspace/x")).send().await?;
    assert!(answer.bytes().await.is_err(), "over the cap");
    Ok(())
}

#[tokio::test]
async fn a_download_that_nobody_takes_waits_in_the_guest_and_is_cut_in_the_end() -> Result<()> {
    let server = Server::start_with(&[("http.write_timeout_ms", "1000")]).await?;
    let vm = server.vm().await?;
    server.fake.files_end("/workspace/x", FilesEnd::Endless);
    let request = server.request(Method::GET, &format!("{vm}/files/download?path=/workspace/x"));
    let mut answer = request.send().await?.bytes_stream();
    answer.next().await.context("some bytes")??;
    assert_eq!(server.fake.commands(), 1);
    // The client holds the connection and reads nothing more.
    until("the guest is rid of it", async || Ok(server.fake.commands() == 0)).await?;

    let request = server.request(Method::GET, &format!("{vm}/files/download?path=/workspace/x"));
    let left = request.send().await?;
    until("it runs", async || Ok(server.fake.commands() == 1)).await?;
    drop(left);
    until("a client that leaves ends it", async || Ok(server.fake.commands() == 0)).await?;
    Ok(())
}

#[tokio::test]
async fn a_guest_that_says_nothing_is_given_up() -> Result<()> {
    let server = Server::start_with(&[("files.timeout_ms", "1000")]).await?;
    let vm = server.vm().await?;
    server.fake.files_end("/workspace/x", FilesEnd::Silent);
    let (read, written) =
        tokio::join!(get(&server, &vm, "files/content", "/workspace/x"), write(&server, &vm, "/workspace/x", "x"));
    read?.refused(504, "agent_timeout");
    written?.refused(504, "agent_timeout");
    assert_eq!(server.state(&vm).await?, "RUNNING");
    Ok(())
}

#[tokio::test]
async fn files_need_a_running_vm_of_ones_own_and_writing_the_scope() -> Result<()> {
    let server = Server::start_with(&[("exec.max_concurrent", "1")]).await?;
    let vm = server.vm().await?;
    write(&server, &vm, "/workspace/a", "x").await?.ok(204);
    let path = format!("{vm}/files/content?path=/workspace/a");
    let stranger = server.other_key("other", &["write"]).await?;
    server.get_as(&stranger, &path).await?.refused(404, "not_found");
    let own = server.get("/v1/admin/accounts").await?.ok(200)[0]["id"].clone();
    let reader = server.key_for(&own, &["read"]).await?;
    assert_eq!(server.get_as(&reader, &path).await?.text, "x");
    let put = server.client.put(format!("{}{path}", server.url)).header("X-API-Key", &reader);
    send(put.header("Content-Type", "application/octet-stream").body("y")).await?.refused(403, "forbidden");

    server.fake.files_end("/workspace/x", FilesEnd::Endless);
    let busy = server.request(Method::GET, &format!("{vm}/files/download?path=/workspace/x")).send().await?;
    server.get(&path).await?.refused(429, "too_many");
    server.fake.kill(&id_of(&vm), EndReport { reason: EndReason::Oom, message: "gone".into(), exit_code: None });
    assert!(busy.bytes().await.is_err(), "the VM's end ends the download");
    server.until_state(&vm, "ERROR").await?;
    server.get(&path).await?.refused(409, "wrong_state");
    Ok(())
}
