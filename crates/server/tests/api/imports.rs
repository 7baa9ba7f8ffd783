//! Importing images, from a real registry and from ones that cheat.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use axum::{
    body::Body,
    extract::Request,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    harness::{Reply, Server, send, small_vm, until},
    odd::Odd,
    registry::{INDEX, Image, Registry, architecture, digest, tar},
};

/// An image of two layers.
fn app() -> Image {
    let layers = [
        tar(&[("etc/passwd", "www:x:33:33::/srv:/bin/sh\n"), ("old", "old")]),
        tar(&[(".wh.old", ""), ("srv/app", "new")]),
    ];
    Image::new(
        &layers,
        &json!({ "Entrypoint": ["/srv/app"], "Cmd": ["-v"], "Env": ["A=1"], "User": "www", "WorkingDir": "/srv",
        "ExposedPorts": { "80/tcp": {} }, "StopSignal": "SIGQUIT", "Labels": { "x": "y" } }),
    )
}

async fn import(server: &Server, uri: &str, more: Value) -> Result<Reply> {
    let mut body = json!({ "imageUri": uri });
    body.as_object_mut().context("an object")?.extend(more.as_object().context("an object")?.clone());
    server.post("/v1/image/import", &body).await
}

async fn imported(server: &Server, uri: &str) -> Result<Value> {
    let id = import(server, uri, json!({})).await?.ok(200)["imageId"].as_str().context("an id")?.to_owned();
    Ok(server.get(&format!("/v1/images/{id}")).await?.ok(200))
}

#[tokio::test]
async fn an_image_is_imported_with_its_configuration_and_vms_are_made_of_it() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    let manifest = registry.push("team/app", "1.0", &app()).await?;
    let image = imported(&server, &registry.image("team/app:1.0")).await?;
    assert_eq!(image["id"].as_str().map(str::len), Some(26));
    assert_eq!((&image["status"], &image["isShared"]), (&json!("ready"), &json!(false)));
    assert_eq!(image["name"], registry.image("team/app:1.0"));
    // Of the files that are left, without what the upper layer took away.
    assert_eq!(image["baseRootfsBytes"], "www:x:33:33::/srv:/bin/sh\nnew".len());
    let id: tiffin_types::id::ImageId = image["id"].as_str().context("an id")?.parse()?;
    let account = server.account().await?;
    let config = server.store.image_get(&account, &id).await?.context("it is there")?.config;
    let expected = json!({ "Entrypoint": ["/srv/app"], "Cmd": ["-v"], "Env": ["A=1"], "User": "www", "WorkingDir": "/srv",
        "ExposedPorts": { "80/tcp": {} }, "StopSignal": "SIGQUIT" });
    assert_eq!(config, expected);
    let mut vm = small_vm();
    vm["imageId"] = image["id"].clone();
    let made = server.post("/v1/vms", &vm).await?.ok(201);
    // Commands find the image's environment beneath their own.
    let exec = format!("/v1/vms/{}/exec", made["id"].as_str().context("an id")?);
    for (env, found) in [(json!({}), "1\n"), (json!({ "A": "2" }), "2\n")] {
        let answer = server.post(&exec, &json!({ "cmd": "printenv A", "env": env })).await?.ok(200);
        assert_eq!(answer["stdout"], found);
    }
    // By its digest, by the other method, in the other place.
    let by_digest = registry.image(&format!("team/app@{manifest}"));
    for path in ["/v1/image/import", "/cakework/v1/image/import"] {
        let request = server.request(Method::GET, path).query(&[("imageUri", by_digest.as_str()), ("password", "")]);
        let again = send(request).await?.ok(200);
        let again = server.get(&format!("/v1/images/{}", again["imageId"].as_str().context("an id")?)).await?.ok(200);
        assert_ne!(again["id"], image["id"]);
        assert_eq!(again["digest"], image["digest"], "the blob is shared");
    }
    Ok(())
}

#[tokio::test]
async fn an_index_leads_to_the_image_of_the_hosts_platform() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    let (ours, other) = (app(), Image::on("s390x", &[tar(&[("other", "")])], &json!({})));
    let mut offered = Vec::new();
    for (architecture, image) in [("s390x", &other), (architecture(), &ours)] {
        let digest = registry.push("multi", architecture, image).await?;
        offered.push(json!({ "mediaType": image.manifest["mediaType"], "digest": digest, "size": image.bytes().len(),
            "platform": { "os": "linux", "architecture": architecture } }));
    }
    let index = |offered: &[Value]| json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": offered }).to_string();
    registry.push_manifest("multi", "all", INDEX, index(&offered).into_bytes()).await?;
    registry.push_manifest("multi", "foreign", INDEX, index(&offered[..1]).into_bytes()).await?;
    assert_eq!(imported(&server, &registry.image("multi:all")).await?["baseRootfsBytes"], 29);
    let why = import(&server, &registry.image("multi:foreign"), json!({})).await?.refused(400, "invalid_parameter");
    assert!(why.contains("linux/s390x"), "{why}");
    let why = import(&server, &registry.image("multi:s390x"), json!({})).await?.refused(400, "invalid_parameter");
    assert!(why.contains("the image is for"), "{why}");
    Ok(())
}

#[tokio::test]
async fn a_registry_with_credentials_wants_the_right_ones() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::closed().await?);
    registry.push("app", "1", &app()).await?;
    let uri = registry.image("app:1");
    // As ECR has it: the user is AWS unless another is named. Unknown fields are nobody's business.
    import(&server, &uri, json!({ "password": "secret-token", "region": "eu" })).await?.ok(200);
    import(&server, &uri, json!({ "username": "reader", "password": "pass-word" })).await?.ok(200);
    for wrong in [json!({ "password": "pass-word" }), json!({ "username": "nobody", "password": "secret-token" })] {
        let reply = import(&server, &uri, wrong).await?;
        let why = reply.refused(400, "invalid_parameter");
        assert!(why.contains("password is refused by the registry"), "{why}");
        assert!(!reply.text.contains("pass-word") && !reply.text.contains("secret-token"), "{}", reply.text);
    }
    let why = import(&server, &uri, json!({})).await?.refused(400, "invalid_parameter");
    assert!(why.contains("password is missing"), "{why}");
    let unknown = import(&server, &registry.image("nothing:1"), json!({ "password": "secret-token" })).await?;
    assert!(unknown.refused(400, "invalid_parameter").contains("imageUri names no image"));
    let activity = server.get("/v1/activity").await?.text;
    assert!(!activity.contains("secret-token") && !activity.contains("pass-word"), "{activity}");
    Ok(())
}

#[tokio::test]
async fn bad_requests_name_the_field() -> Result<()> {
    let server = Server::start().await?;
    for (body, field) in [
        (json!({}), "imageUri"),
        (json!({ "imageUri": 5 }), "imageUri"),
        (json!({ "imageUri": "https://ghcr.io/a" }), "imageUri"),
        (json!({ "imageUri": "ghcr.io/A" }), "imageUri"),
        (json!({ "imageUri": "a", "password": 5 }), "password"),
        (json!({ "imageUri": "a", "password": "x\ny" }), "password"),
        (json!({ "imageUri": "a", "username": "" , "password": "x" }), "username"),
        (json!({ "imageUri": "a", "username": "x:y", "password": "x" }), "username"),
    ] {
        let why = server.post("/v1/image/import", &body).await?.refused(400, "invalid_parameter");
        assert!(why.contains(field), "{body}: {why}");
    }
    server.get("/v1/image/import").await?.refused(400, "invalid_parameter");
    Ok(())
}

#[tokio::test]
async fn addresses_that_are_not_public_are_refused_wherever_they_come_from() -> Result<()> {
    let server = Server::start().await?;
    for uri in ["10.0.0.1/a", "169.254.169.254/a", "[fd00::1]/a", "192.168.1.1:5000/a"] {
        let why = import(&server, uri, json!({})).await?.refused(400, "invalid_parameter");
        assert!(why.contains("imageUri") && why.contains("isn't public"), "{uri}: {why}");
    }
    // A registry that is let in may not lead anywhere else that isn't.
    for (status, name, value) in [
        (307, "location", "https://169.254.169.254/latest/meta-data"),
        (302, "location", "http://10.0.0.1/"),
        (302, "location", "http://example.com/"),
        (302, "location", "file:///etc/passwd"),
        (401, "www-authenticate", r#"Bearer realm="https://169.254.169.254/token""#),
        (401, "www-authenticate", r#"Bearer realm="http://10.0.0.1/token""#),
    ] {
        let odd = Odd::start(move |_, _| {
            Some(Response::builder().status(status).header(name, value).body(Body::empty()).unwrap())
        });
        let odd = odd.await?;
        let why = import(&server, &odd.image(), json!({ "password": "x" })).await?.refused(400, "invalid_parameter");
        assert!(
            why.contains("isn't public") || why.contains("without TLS") || why.contains("https URL"),
            "{value}: {why}"
        );
    }
    let closed = Server::start_with(&[("registry.loopback", "false")]).await?;
    let why = import(&closed, "localhost:5000/a", json!({})).await?.refused(400, "invalid_parameter");
    assert!(why.contains("registry.loopback"), "{why}");
    Ok(())
}

#[tokio::test]
async fn a_token_is_got_for_the_credentials_and_goes_to_its_registry_alone() -> Result<()> {
    let server = Server::start().await?;
    let elsewhere = Odd::start(|_, _| None).await?;
    let image = app();
    elsewhere.has(&image);
    let other = elsewhere.host.clone();
    let odd = Odd::start(move |request: &Request, _| {
        let path = request.uri().path();
        let asked = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if path == "/token" {
            let query = request.uri().query().unwrap_or_default();
            let good = asked == Some("Basic QVdTOnNlY3JldA==")
                && query.contains("service=odd")
                && query.contains("repository%3Aapp%3Apull");
            return Some(if good {
                json!({ "token": "T" }).to_string().into_response()
            } else {
                StatusCode::UNAUTHORIZED.into_response()
            });
        }
        if asked != Some("Bearer T") {
            let host = request.headers()[header::HOST].to_str().unwrap();
            let wanted = format!(r#"Bearer realm="http://{host}/token",service="odd""#);
            return Some((StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, wanted)]).into_response());
        }
        let to = format!("http://{other}{path}");
        path.contains("/blobs/").then(|| (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response())
    })
    .await?;
    odd.has(&image);
    import(&server, &odd.image(), json!({ "password": "secret" })).await?.ok(200);
    assert!(odd.seen().iter().any(|(_, authorization)| authorization.as_deref() == Some("Bearer T")));
    assert!(elsewhere.seen().len() >= 3);
    assert!(elsewhere.seen().iter().all(|(_, authorization)| authorization.is_none()), "{:?}", elsewhere.seen());
    let why = import(&server, &odd.image(), json!({ "password": "wrong" })).await?.refused(400, "invalid_parameter");
    assert!(why.contains("password is refused"), "{why}");
    Ok(())
}

#[tokio::test]
async fn a_layer_that_breaks_off_is_gone_on_with() -> Result<()> {
    let server = Server::start().await?;
    let noise: String = (0..200_000_u64).map(|number| format!("{:x}", number * 7919)).collect();
    let image = Image::new(&[tar(&[("noise", &noise)])], &json!({}));
    let layer = image.blobs[1].clone();
    let half = layer.len() / 2;
    let path = format!("/v2/app/blobs/{}", digest(&layer));
    let odd = Odd::start(move |request: &Request, _| {
        // Without a range, half of it comes.
        let broken = request.uri().path() == path && !request.headers().contains_key(header::RANGE);
        let pieces = futures_util::stream::iter([Ok(layer[..half].to_vec()), Err(std::io::Error::other("gone"))]);
        broken.then(|| Response::new(Body::from_stream(pieces)))
    })
    .await?;
    odd.has(&image);
    assert_eq!(imported(&server, &odd.image()).await?["baseRootfsBytes"], noise.len());
    Ok(())
}

#[tokio::test]
async fn registries_that_lie_are_caught() -> Result<()> {
    let server = Server::start().await?;
    let good = app();
    let [config, layer] = [0, 1].map(|at| format!("/v2/app/blobs/{}", digest(&good.blobs[at])));
    let (manifest, real) = ("/v2/app/manifests/1".to_owned(), &good.blobs[1]);
    let lies = [
        ("other bytes", &layer, vec![7; real.len()], "isn't that layer"),
        ("too many bytes", &layer, [real, &b"more"[..]].concat(), "longer than"),
        ("too few bytes", &layer, real[..9].to_vec(), "registry doesn't give"),
        ("another configuration", &config, vec![b' '; good.blobs[0].len()], "not the one with its digest"),
        ("a huge manifest", &manifest, vec![b' '; 5 << 20], "larger than"),
        ("no image at all", &manifest, b"{}".to_vec(), "schemaVersion"),
    ];
    for (lie, path, bytes, says) in lies {
        let odd = Odd::start(|_, _| None).await?;
        odd.has(&good);
        odd.says(path, "x", bytes);
        let reply = import(&server, &odd.image(), json!({})).await?;
        assert!(matches!(reply.status.as_u16(), 400 | 503), "{lie}: {}", reply.text);
        assert!(reply.text.contains(says), "{lie}: {}", reply.text);
    }
    // An index that leads to itself, by way of another.
    let odd = Odd::start(|_, _| None).await?;
    let index = |digest: &str| {
        json!({ "schemaVersion": 2, "manifests": [{ "mediaType": INDEX, "digest": digest, "size": 5 }] })
            .to_string()
            .into_bytes()
    };
    let mut inner = index(&digest(b"nothing"));
    for _ in 0..5 {
        odd.says(&format!("/v2/app/manifests/{}", digest(&inner)), INDEX, inner.clone());
        inner = index(&digest(&inner));
    }
    odd.says("/v2/app/manifests/1", INDEX, inner);
    let why = import(&server, &odd.image(), json!({})).await?.refused(503, "registry_unavailable");
    assert!(why.contains("again and again"), "{why}");
    // What the layers hold is looked at, too.
    for (layer, says) in [(tar(&[("a", "")]), None), (b"no archive".repeat(100), Some("no tar archive"))] {
        let image = Image::new(&[layer], &json!({}));
        let odd = Odd::start(|_, _| None).await?;
        odd.has(&image);
        let reply = import(&server, &odd.image(), json!({})).await?;
        match says {
            Some(says) => assert!(reply.refused(400, "invalid_parameter").contains(says), "{}", reply.text),
            None => drop(reply.ok(200)),
        }
    }
    let list = server.get("/v1/images").await?.ok(200);
    assert_eq!(list.as_array().map(Vec::len), Some(2), "what failed left no image: {list}");
    Ok(())
}

#[tokio::test]
async fn imports_at_once_share_the_work_and_show_how_far_they_are() -> Result<()> {
    let server = Server::start().await?;
    let image = app();
    let (open, gate) = (Arc::new(AtomicBool::new(false)), image.blobs[1].clone());
    let (held, path) = (open.clone(), format!("/v2/app/blobs/{}", digest(&gate)));
    let odd = Odd::start(move |request: &Request, _| {
        let (held, gate) = (held.clone(), gate.clone());
        (request.uri().path() == path && request.method() == Method::GET).then(|| {
            let pieces = async move {
                while !held.load(Ordering::Relaxed) {
                    tokio::task::yield_now().await;
                }
                Ok::<_, std::io::Error>(gate)
            };
            Response::new(Body::from_stream(futures_util::stream::once(pieces)))
        })
    })
    .await?;
    odd.has(&image);
    let uri = odd.image();
    let both = async { tokio::try_join!(imported(&server, &uri), imported(&server, &uri)) };
    let watch = async {
        until("both are told of", async || {
            let list = server.get("/v1/images/imports").await?.ok(200);
            let list = list.as_array().context("a list")?;
            let receiving = list.iter().any(|one| one["status"] == "receiving" && one["expectedBytes"].is_u64());
            Ok(list.len() == 2 && receiving && list.iter().all(|one| one["imageUri"] == uri.as_str()))
        })
        .await?;
        open.store(true, Ordering::Relaxed);
        Ok::<_, anyhow::Error>(())
    };
    let ((one, two), ()) = tokio::try_join!(both, watch)?;
    assert_ne!(one["id"], two["id"]);
    assert_eq!(one["digest"], two["digest"]);
    let got = odd.seen().iter().filter(|(path, _)| path.ends_with(&digest(&image.blobs[2]))).count();
    assert_eq!(got, 1, "each layer came once");
    assert_eq!(server.get("/v1/images/imports").await?.ok(200), json!([]));
    Ok(())
}

/// A registry whose image nobody gets as long as that is false.
async fn held() -> Result<(Odd, Arc<AtomicBool>)> {
    let open = Arc::new(AtomicBool::new(false));
    let (held, image) = (Arc::clone(&open), app());
    let manifest = image.bytes();
    let odd = Odd::start(move |request: &Request, _| {
        let (held, manifest) = (Arc::clone(&held), manifest.clone());
        let text = async move {
            while !held.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok::<_, std::io::Error>(manifest)
        };
        let is_held = request.uri().path().contains("/manifests/");
        is_held.then(|| Response::new(Body::from_stream(futures_util::stream::once(text))))
    })
    .await?;
    odd.has(&image);
    Ok((odd, open))
}

#[tokio::test]
async fn one_account_leaves_others_a_place_and_who_finds_none_waits_for_one() -> Result<()> {
    let places = [("registry.imports_in_flight", "2"), ("registry.imports_queued", "1")];
    let server = Server::start_with(&places).await?;
    let (odd, open) = held().await?;
    let body = json!({ "imageUri": odd.image() });
    let mut keys = vec![server.key.clone()];
    for name in ["second", "third", "fourth"] {
        keys.push(server.other_key(name, &["read", "write"]).await?);
    }
    let under_way = async |key: &str| Ok(server.get_as(key, "/v1/images/imports").await?.ok(200) != json!([]));
    let import = |key: &str| {
        let request = server.client.post(format!("{}/v1/image/import", server.url)).header("X-API-Key", key);
        send(request.json(&body))
    };
    let mut tasks = tokio::task::JoinSet::new();
    // The third one waits for a place.
    for key in &keys[..3] {
        tasks.spawn(import(key));
        until("it is under way", async || under_way(key).await).await?;
    }
    for (key, status, code) in [(&keys[0], 429, "too_many"), (&keys[2], 429, "too_many"), (&keys[3], 503, "busy")] {
        let refused = import(key).await?;
        refused.refused(status, code);
        assert!(refused.headers.contains_key("retry-after"), "{}", refused.text);
    }
    assert!(import(&keys[0]).await?.refused(429, "too_many").contains("1 imports of this account"));
    open.store(true, Ordering::Relaxed);
    for reply in tasks.join_all().await {
        reply?.ok(200);
    }
    import(&keys[0]).await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn who_waits_too_long_for_a_place_is_told_so() -> Result<()> {
    let places = [("registry.imports_in_flight", "1"), ("registry.import_wait_ms", "100")];
    let server = Server::start_with(&places).await?;
    let other = server.other_key("other", &["write"]).await?;
    let (odd, _shut) = held().await?;
    let (mine, theirs) = (json!({ "imageUri": odd.image() }), json!({ "imageUri": odd.image(), "password": "x" }));
    let held = server.request(Method::POST, "/v1/image/import").json(&mine);
    let _held = tokio::task::JoinSet::from_iter([send(held)]);
    until("it is under way", async || Ok(server.get("/v1/images/imports").await?.ok(200) != json!([]))).await?;
    server.post_as(&other, "/v1/image/import", &theirs).await?.refused(503, "busy");
    Ok(())
}

#[tokio::test]
async fn a_client_that_hangs_up_undoes_nothing() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    registry.push("app", "1", &app()).await?;
    let body = json!({ "imageUri": registry.image("app:1") });
    let gone =
        server.request(Method::POST, "/v1/image/import").json(&body).timeout(Duration::from_millis(1)).send().await;
    drop(gone);
    // It may have been too quick for the server to begin; then nothing begins.
    import(&server, &registry.image("app:1"), json!({})).await?.ok(200);
    until("nothing is under way", async || Ok(server.get("/v1/images/imports").await?.ok(200) == json!([]))).await
}

#[tokio::test]
async fn quotas_and_limits_hold_for_imports() -> Result<()> {
    let registry = Registry::open().await?;
    registry.push("app", "1", &app()).await?;
    let uri = registry.image("app:1");
    let one = Server::start_with(&[("images.per_account", "1")]).await?;
    import(&one, &uri, json!({})).await?.ok(200);
    import(&one, &uri, json!({})).await?.refused(429, "quota_exceeded");
    let small = Server::start_with(&[("images.bytes_per_account", "100")]).await?;
    import(&small, &uri, json!({})).await?.refused(429, "quota_exceeded");
    let noise: String = (0..400_000_u64).map(|number| format!("{:x}", number * 7919)).collect();
    registry.push("big", "1", &Image::new(&[tar(&[("noise", &noise)])], &json!({}))).await?;
    let tight = Server::start_with(&[("images.max_rootfs_bytes", "1048576")]).await?;
    let why = import(&tight, &registry.image("big:1"), json!({})).await?.refused(400, "invalid_parameter");
    assert!(why.contains("1048576"), "{why}");
    Ok(())
}

#[tokio::test]
async fn a_layer_of_another_registry_or_that_may_not_be_read_is_not_given_from_the_cache() -> Result<()> {
    let server = Server::start().await?;
    let image = app();
    let first = Odd::start(|_, _| None).await?;
    first.has(&image);
    imported(&server, &first.image()).await?;
    // It knows the digests, and has nothing behind them.
    let second = Odd::start(|_, _| None).await?;
    second.says("/v2/app/manifests/1", "x", image.bytes());
    second.says(&format!("/v2/app/blobs/{}", digest(&image.blobs[0])), "x", image.blobs[0].clone());
    let why = import(&server, &second.image(), json!({})).await?.refused(400, "invalid_parameter");
    assert!(why.contains("doesn't have a layer"), "{why}");
    Ok(())
}

#[tokio::test]
async fn a_deleted_image_is_imported_again_of_the_layers_that_were_kept() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    registry.push("app", "1", &app()).await?;
    let uri = registry.image("app:1");
    let first = imported(&server, &uri).await?;
    let path = format!("/v1/images/{}", first["id"].as_str().context("an id")?);
    server.delete(&path).await?.ok(204);
    let again = imported(&server, &uri).await?;
    assert_eq!(again["digest"], first["digest"], "made again, of the layers that were kept");
    Ok(())
}
