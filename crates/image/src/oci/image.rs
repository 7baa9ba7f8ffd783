//! An image's configuration: what its layers unpack to, and how its program starts.

use serde::Deserialize;
use tiffin_types::id::Digest;

use super::{NoImage, architecture};
use crate::config::ImageConfig;

/// Bytes of the part that is kept.
const CONFIG_BYTES: usize = 256 << 10;

/// What of an image's configuration is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OciImage {
    /// The digests of what the layers unpack to, the lowest first.
    pub diff_ids: Vec<Digest>,
    /// How its program starts.
    pub config: ImageConfig,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    config: Option<ImageConfig>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Option<Vec<Digest>>,
}

/// Reads the configuration of an image of so many layers.
///
/// # Errors
/// [`NoImage`] with the reason.
pub fn oci_image(bytes: &[u8], layers: usize) -> Result<OciImage, NoImage> {
    let raw: Raw = serde_json::from_slice(bytes)
        .map_err(|error| NoImage::because(format!("the image's configuration can't be read: {error}")))?;
    // Old builders left them empty.
    let differs = |said: &str, host: &str| !said.is_empty() && said != host;
    if differs(&raw.os, "linux") || differs(&raw.architecture, architecture()) {
        let platform: String = format!("{}/{}", raw.os, raw.architecture).chars().take(60).collect();
        return Err(NoImage::because(format!(
            "the image is for {platform:?}, and this host is linux/{}",
            architecture()
        )));
    }
    let (diff_ids, config) = (raw.rootfs.diff_ids.unwrap_or_default(), raw.config.unwrap_or_default());
    if diff_ids.len() != layers {
        return Err(NoImage::because(format!(
            "the image's configuration knows {} layers and its manifest {layers}",
            diff_ids.len()
        )));
    }
    if serde_json::to_string(&config).map_or(usize::MAX, |text| text.len()) > CONFIG_BYTES {
        return Err(NoImage::because(format!("the image's configuration is larger than {CONFIG_BYTES} bytes")));
    }
    Ok(OciImage { diff_ids, config })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value, layers: usize) -> Result<OciImage, NoImage> {
        oci_image(value.to_string().as_bytes(), layers)
    }

    fn good() -> Value {
        json!({
            "os": "linux", "architecture": architecture(),
            "config": { "Env": ["A=1"], "WorkingDir": "/srv", "User": "www" },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", "ab".repeat(32))] },
            "history": [{ "created_by": "x" }],
        })
    }

    #[test]
    fn what_says_how_the_program_starts_is_kept() {
        let image = read(&good(), 1).unwrap();
        assert_eq!((image.config.user.as_str(), image.config.working_dir.as_str()), ("www", "/srv"));
        assert_eq!(image.config.env, ["A=1"]);
        assert_eq!(image.diff_ids.len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(read(&good(), 2).unwrap_err().to_string().contains("knows 1 layers and its manifest 2"));
        let mut other = good();
        other["architecture"] = json!("s390x");
        assert!(read(&other, 1).unwrap_err().to_string().contains("linux/s390x"));
        let mut large = good();
        large["config"]["Env"] = json!(["x".repeat(300_000)]);
        assert!(read(&large, 1).unwrap_err().to_string().contains("larger than"));
        assert!(read(&json!({}), 0).unwrap_err().to_string().contains("can't be read"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_configuration_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = oci_image(&bytes, 1);
        }
    }
}
