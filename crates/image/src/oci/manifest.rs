//! Manifests, of one image and of one for several platforms (indexes), in OCI's form and in Docker's.

use serde::Deserialize;
use tiffin_types::id::Digest;

use super::{NoImage, architecture};

/// Layers of an image. Docker builds at most 127.
const MAX_LAYERS: usize = 500;
/// Images of an index.
const MAX_IMAGES: usize = 1000;
/// Other addresses of a layer.
const MAX_URLS: usize = 8;

/// Something in a registry, by its digest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its SHA-256.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// Where else it is, of layers that registries don't keep.
    #[serde(default)]
    pub urls: Vec<String>,
}

/// An image's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, the lowest first.
    pub layers: Vec<Descriptor>,
}

/// What a manifest turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// An image.
    Image(Manifest),
    /// An index; this is its image for the host's platform, or an index again.
    Index(Descriptor),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u64>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Offered>>,
}

#[derive(Deserialize)]
struct Offered {
    #[serde(flatten)]
    descriptor: Descriptor,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

/// Reads a manifest.
///
/// # Errors
/// [`NoImage`] with the reason.
pub fn document(bytes: &[u8]) -> Result<Document, NoImage> {
    let raw: Raw = serde_json::from_slice(bytes)
        .map_err(|error| NoImage::because(format!("the registry's manifest can't be read: {error}")))?;
    if raw.schema_version != Some(2) {
        let old = "the image has a manifest of the first schema, which no registry should give any more: push it again with a current tool";
        return Err(NoImage::because(if raw.schema_version == Some(1) {
            old
        } else {
            "the registry's manifest has no schemaVersion 2"
        }));
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(offered), None, None) => choose(offered).map(Document::Index),
        (None, Some(config), Some(layers)) => checked(config, layers).map(Document::Image),
        _ => Err(NoImage::because("the registry's manifest is neither an image's nor an index")),
    }
}

fn choose(offered: Vec<Offered>) -> Result<Descriptor, NoImage> {
    if offered.len() > MAX_IMAGES {
        return Err(NoImage::because(format!("the index has more than {MAX_IMAGES} images")));
    }
    let rank = |offered: &Offered| match &offered.platform {
        // One without a platform may be the only one there is.
        None => Some(9),
        Some(platform) if platform.os != "linux" || platform.architecture != architecture() => None,
        // A newer variant of the processor may be more than the host has.
        Some(platform) => Some(match platform.variant.as_str() {
            "" => 0,
            "v1" | "v8" => 1,
            _ => 5,
        }),
    };
    let has: Vec<String> = offered.iter().filter_map(|one| one.platform.as_ref()).take(20).map(shown).collect();
    let best = offered.into_iter().filter_map(|one| Some((rank(&one)?, one))).min_by_key(|(rank, _)| *rank);
    best.map(|(_, offered)| offered.descriptor).ok_or_else(|| {
        NoImage::because(format!("the image isn't there for linux/{}, but for: {}", architecture(), has.join(", ")))
    })
}

fn shown(platform: &Platform) -> String {
    let text: String = format!("{}/{}", platform.os, platform.architecture).chars().take(60).collect();
    text.escape_debug().to_string()
}

fn checked(config: Descriptor, layers: Vec<Descriptor>) -> Result<Manifest, NoImage> {
    let kind = config.media_type.as_str();
    if !matches!(kind, "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json") {
        let kind: String = kind.chars().take(100).collect();
        return Err(NoImage::because(format!("this is no container image, but something of the type {kind:?}")));
    }
    if layers.len() > MAX_LAYERS {
        return Err(NoImage::because(format!("the image has more than {MAX_LAYERS} layers")));
    }
    for layer in &layers {
        // What they are compressed with is seen by their bytes.
        let kind = layer.media_type.as_str();
        if kind.ends_with("+encrypted") {
            return Err(NoImage::because("the image is encrypted, which isn't supported"));
        }
        let known = ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."];
        if !known.iter().any(|known| kind.starts_with(known)) {
            let kind: String = kind.chars().take(100).collect();
            return Err(NoImage::because(format!("a layer is of the type {kind:?}, which no container image has")));
        }
        if layer.urls.len() > MAX_URLS {
            return Err(NoImage::because(format!("a layer has more than {MAX_URLS} addresses")));
        }
    }
    Ok(Manifest { config, layers })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn descriptor(kind: &str, fill: &str) -> Value {
        json!({ "mediaType": kind, "digest": format!("sha256:{}", fill.repeat(32)), "size": 5 })
    }

    fn image() -> Value {
        json!({
            "schemaVersion": 2,
            "config": descriptor("application/vnd.oci.image.config.v1+json", "aa"),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", "bb")],
        })
    }

    fn refused(value: &Value) -> String {
        document(value.to_string().as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn an_image_has_a_configuration_and_layers() {
        let Document::Image(manifest) = document(image().to_string().as_bytes()).unwrap() else { panic!("an image") };
        assert_eq!((manifest.config.digest.hex(), manifest.layers.len()), (&*"aa".repeat(32), 1));
    }

    #[test]
    fn an_index_gives_the_hosts_platform_and_its_plainest_variant() {
        let mut offered = Vec::new();
        for (fill, os, architecture, variant) in [
            ("01", "unknown", "unknown", ""),
            ("02", "windows", architecture(), ""),
            ("03", "linux", "s390x", ""),
            ("04", "linux", architecture(), "v4"),
            ("05", "linux", architecture(), ""),
        ] {
            let mut one = descriptor("application/vnd.oci.image.manifest.v1+json", fill);
            one["platform"] = json!({ "os": os, "architecture": architecture, "variant": variant });
            offered.push(one);
        }
        let Document::Index(chosen) =
            document(json!({ "schemaVersion": 2, "manifests": offered }).to_string().as_bytes()).unwrap()
        else {
            panic!("an index")
        };
        assert_eq!(chosen.digest.hex(), "05".repeat(32));
        let why = refused(&json!({ "schemaVersion": 2, "manifests": offered[..3] }));
        assert!(why.contains("isn't there for linux/") && why.contains("linux/s390x"), "{why}");
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(refused(&json!({ "schemaVersion": 1, "fsLayers": [] })).contains("first schema"));
        assert!(refused(&json!({ "schemaVersion": 2 })).contains("neither"));
        assert!(refused(&json!([])).contains("can't be read"));
        let mut chart = image();
        chart["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json");
        assert!(refused(&chart).contains("no container image"));
        let mut many = image();
        many["layers"] = json!(vec![image()["layers"][0].clone(); 501]);
        assert!(refused(&many).contains("more than 500 layers"));
        for (key, bad) in [
            ("digest", json!("sha512:00")),
            ("size", json!(-1)),
            ("size", json!("5")),
            ("digest", json!("sha256:../../x")),
        ] {
            let mut broken = image();
            broken["layers"][0][key] = bad;
            assert!(refused(&broken).contains("can't be read"));
        }
        let mut secret = image();
        secret["layers"][0]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
        assert!(refused(&secret).contains("encrypted"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_manifest_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = document(&bytes);
        }
    }
}
