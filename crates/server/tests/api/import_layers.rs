//! Layers of imported images: how they are packed, where they are, how they come when something fails, and how they are kept.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    harness::{Reply, Server},
    middle::Middle,
    odd::Odd,
    registry::{Image, Layer, Registry, architecture, digest, tar},
};

/// A layer with a file of so many characters that hardly any two layers share.
fn noise(name: &str, characters: usize) -> Vec<u8> {
    let text: String =
        (0..characters / 64 + 1).map(|number| digest(format!("{name}{number}").as_bytes())[7..].to_owned()).collect();
    tar(&[(name, &text[..characters])])
}

fn image(layers: &[Layer]) -> Image {
    Image::of(architecture(), layers, &json!({}))
}

async fn import(server: &Server, uri: &str) -> Result<Reply> {
    server.post("/v1/image/import", &json!({ "imageUri": uri })).await
}

async fn imported(server: &Server, uri: &str) -> Result<Value> {
    let id = import(server, uri).await?.ok(200)["imageId"].as_str().context("an id")?.to_owned();
    Ok(server.get(&format!("/v1/images/{id}")).await?.ok(200))
}

/// The names of the layers that are kept; what broke off ends in `.partial`.
fn kept(data: &Path) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    for folder in std::fs::read_dir(data.join("images/layers"))? {
        for file in std::fs::read_dir(folder?.path())? {
            kept.push(file?.file_name().into_string().ok().context("a name of UTF-8")?);
        }
    }
    kept.sort();
    Ok(kept)
}

fn name(layer: &Layer) -> String {
    digest(&layer.blob)["sha256:".len()..].to_owned()
}

#[tokio::test]
async fn layers_of_zstandard_and_none_at_all_are_unpacked_beside_those_of_gzip() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    let [one, two, three] = ["one", "two", "three"].map(|name| noise(name, 5000));
    let zstd = ruzstd::encoding::compress_to_vec(&one[..], ruzstd::encoding::CompressionLevel::Fastest);
    assert!(zstd.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
    let layers = [
        Layer::packed(&one, zstd, "application/vnd.oci.image.layer.v1.tar+zstd"),
        Layer::packed(&two, two.clone(), "application/vnd.oci.image.layer.v1.tar"),
        Layer::new(&three),
    ];
    registry.push("app", "1", &image(&layers)).await?;
    assert_eq!(imported(&server, &registry.image("app:1")).await?["baseRootfsBytes"], 15_000);
    Ok(())
}

#[tokio::test]
async fn a_layer_that_the_registry_does_not_keep_comes_from_where_its_manifest_says() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::closed().await?);
    let (archive, elsewhere) = (noise("foreign", 5000), Odd::start(|_, _| None).await?);
    let layer = Layer::foreign(&archive, format!("http://{}/layers/base", elsewhere.host));
    let body = |tag: &str| json!({ "imageUri": registry.image(&format!("app:{tag}")), "password": "secret-token" });
    registry.push("app", "1", &image(&[layer.clone(), Layer::new(&noise("own", 1000))])).await?;
    let absent = server.post("/v1/image/import", &body("1")).await?;
    assert!(absent.refused(400, "invalid_parameter").contains("doesn't have a layer"), "{}", absent.text);
    elsewhere.says("/layers/base", "x", vec![7; layer.blob.len()]);
    let other = server.post("/v1/image/import", &body("1")).await?;
    assert!(other.refused(503, "registry_unavailable").contains("isn't that layer"), "{}", other.text);
    elsewhere.says("/layers/base", "x", layer.blob.clone());
    server.post("/v1/image/import", &body("1")).await?.ok(200);
    // Of another image it is in the cache, for whoever may still have it there.
    let asked = elsewhere.seen().len();
    registry.push("app", "2", &image(&[layer, Layer::new(&noise("more", 1000))])).await?;
    server.post("/v1/image/import", &body("2")).await?.ok(200);
    let seen = elsewhere.seen();
    assert_eq!(seen.len(), asked + 1, "asked once whether it may be had");
    assert!(seen.iter().all(|(_, authorization)| authorization.is_none()), "{seen:?}");
    // What a manifest points to is judged as everything else.
    let metadata = Layer::foreign(&archive, "http://169.254.169.254/latest".to_owned());
    registry.push("app", "3", &image(&[metadata])).await?;
    server.post("/v1/image/import", &body("3")).await?.refused(400, "invalid_parameter");
    Ok(())
}

#[tokio::test]
async fn who_points_a_manifest_elsewhere_is_not_given_what_the_cache_has_of_the_registry() -> Result<()> {
    let server = Server::start().await?;
    let (archive, elsewhere) = (noise("private", 5000), Odd::start(|_, _| None).await?);
    let private = Layer::new(&archive);
    let registry = Odd::start(|_, _| None).await?;
    registry.has(&image(std::slice::from_ref(&private)));
    imported(&server, &registry.image()).await?;
    // The same digest, which the registry doesn't give to this one; and an address that says yes to everything.
    let stolen = image(&[Layer::foreign(&archive, format!("http://{}/yes", elsewhere.host))]);
    registry.has(&stolen);
    registry.forgets(&format!("/v2/app/blobs/{}", digest(&private.blob)));
    elsewhere.says("/yes", "x", b"yes".to_vec());
    import(&server, &registry.image()).await?.refused(503, "registry_unavailable");
    Ok(())
}

#[tokio::test]
async fn a_layer_that_is_damaged_in_the_registry_makes_no_image_and_one_that_is_healed_does() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    let layer = Layer::new(&noise("damaged", 50_000));
    registry.push("app", "1", &image(std::slice::from_ref(&layer))).await?;
    registry.damage(&layer.blob)?;
    let middle = Middle::before(&registry.host, |_, _| None).await?;
    let refused = import(&server, &middle.image("app:1")).await?;
    let why = refused.refused(503, "registry_unavailable");
    assert!(why.contains(&format!("{} isn't that layer", digest(&layer.blob))), "{why}");
    assert_eq!(middle.asked("GET", &digest(&layer.blob)).len(), 2, "it isn't got again and again");
    assert_eq!(kept(server.data_dir())?, Vec::<String>::new());
    assert_eq!(server.get("/v1/images").await?.ok(200).as_array().map(Vec::len), Some(1), "the default image alone");
    registry.damage(&layer.blob)?;
    assert_eq!(imported(&server, &middle.image("app:1")).await?["baseRootfsBytes"], 50_000);
    Ok(())
}

#[tokio::test]
async fn a_download_that_is_cut_goes_on_where_it_was_within_an_import_and_in_the_next_one() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    let layer = Layer::new(&noise("long", 900_000));
    registry.push("app", "1", &image(std::slice::from_ref(&layer))).await?;
    // Four attempts of the first import and one of the second are cut, each after a tenth of the layer.
    let (step, path) = (layer.blob.len() as u64 / 10, digest(&layer.blob));
    let end = path.clone();
    let middle = Middle::before(&registry.host, move |asked, nth| {
        (asked.method == "GET" && asked.path.ends_with(&end) && nth <= 5).then_some(step)
    })
    .await?;
    let uri = middle.image("app:1");
    let cut = import(&server, &uri).await?;
    assert!(cut.refused(503, "registry_unavailable").contains("broke off"), "{}", cut.text);
    assert_eq!(kept(server.data_dir())?, [format!("{}.partial", name(&layer))]);
    assert_eq!(imported(&server, &uri).await?["baseRootfsBytes"], 900_000);
    let asked = middle.asked("GET", &path);
    let begins: Vec<u64> = asked
        .iter()
        .map(|one| match &one.range {
            None => Ok(0),
            Some(range) => Ok(range
                .strip_prefix("bytes=")
                .and_then(|range| range.strip_suffix('-'))
                .context("a range")?
                .parse()?),
        })
        .collect::<Result<_>>()?;
    assert_eq!(begins.len(), 6, "{asked:?}");
    assert_eq!(begins[0], 0);
    for pair in begins.windows(2) {
        // What comes is the answer's head, too.
        let got = pair[1] - pair[0];
        assert!(got <= step && got > step / 2, "each went on where the last one was: {begins:?}");
    }
    assert_eq!(kept(server.data_dir())?, [name(&layer)]);
    Ok(())
}

#[tokio::test]
async fn images_that_share_layers_share_their_download() -> Result<()> {
    let (server, registry) = (Server::start().await?, Registry::open().await?);
    let base = Layer::new(&noise("base", 50_000));
    for tag in ["1", "2"] {
        registry.push("app", tag, &image(&[base.clone(), Layer::new(&noise(tag, 1000))])).await?;
    }
    let middle = Middle::before(&registry.host, |_, _| None).await?;
    for tag in ["1", "2"] {
        assert_eq!(imported(&server, &middle.image(&format!("app:{tag}"))).await?["baseRootfsBytes"], 51_000);
    }
    let shared = digest(&base.blob);
    assert_eq!(middle.asked("GET", &shared).len(), 1, "it came once");
    assert_eq!(middle.asked("HEAD", &shared).len(), 1, "and the second time it was asked whether it may be had");
    assert_eq!(kept(server.data_dir())?.len(), 3);
    Ok(())
}

#[tokio::test]
async fn the_layers_that_were_used_longest_ago_go_when_there_are_too_many() -> Result<()> {
    let server = Server::start_with(&[("registry.cache_mb", "1")]).await?;
    let registry = Registry::open().await?;
    let [old, used, new] = ["old", "used", "new"].map(|name| Layer::new(&noise(name, 600_000)));
    for layer in [&old, &used, &new] {
        let bytes = layer.blob.len();
        assert!((350_000..524_000).contains(&bytes), "two of them fit into a MiB, and three don't: {bytes}");
    }
    for (repository, layers) in [("used", vec![&used]), ("old", vec![&old]), ("both", vec![&used, &new])] {
        let layers: Vec<Layer> = layers.into_iter().cloned().collect();
        registry.push(repository, "1", &image(&layers)).await?;
    }
    for uri in ["used:1", "old:1"] {
        imported(&server, &registry.image(uri)).await?;
    }
    let mut two = [name(&used), name(&old)];
    two.sort();
    assert_eq!(kept(server.data_dir())?, two);
    imported(&server, &registry.image("both:1")).await?;
    let mut two = [name(&used), name(&new)];
    two.sort();
    assert_eq!(kept(server.data_dir())?, two);
    Ok(())
}
