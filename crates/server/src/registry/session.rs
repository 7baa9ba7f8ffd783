//! A conversation with a registry about one repository.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use sha2::{Digest as _, Sha256};
use tiffin_image::oci::{Descriptor, Document, Manifest, OciImage, Version, document, oci_image};
use tiffin_outbound::{Answer, Body, Request};
use tiffin_types::id::Digest;
use tokio::sync::Mutex;
use url::Url;

use super::{
    RegistryError,
    auth::{self, Credentials},
    challenge::challenge,
    places::{Reach, Registries},
    shown,
};

/// A manifest, and a configuration, are no longer.
const TEXT_BYTES: u64 = 4 << 20;
/// Indexes in indexes.
const MAX_DEPTH: usize = 4;
const MAX_REDIRECTS: usize = 5;
/// How long nothing may come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A conversation.
#[derive(Debug)]
pub(crate) struct Session {
    registries: Registries,
    /// Ends with the repository and a slash.
    base: Url,
    reach: Reach,
    repository: String,
    credentials: Option<Credentials>,
    /// What the registry was last satisfied with.
    authorization: Mutex<Option<HeaderValue>>,
}

/// An image that was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// The digest of its manifest.
    pub(crate) digest: Digest,
    /// What it consists of.
    pub(crate) manifest: Manifest,
    /// What it says of itself.
    pub(crate) image: OciImage,
}

impl Session {
    pub(super) fn new(
        registries: Registries,
        base: Url,
        reach: Reach,
        repository: &str,
        credentials: Option<Credentials>,
    ) -> Self {
        let authorization = Mutex::new(None);
        Self { registries, base, reach, repository: repository.to_owned(), credentials, authorization }
    }

    /// Finds the image for this host.
    pub(crate) async fn find(&self, version: Version<'_>) -> Result<Found, RegistryError> {
        let mut wanted = version.to_string();
        let mut expected = match version {
            Version::Digest(digest) => Some(digest.clone()),
            Version::Tag(_) => None,
        };
        for _ in 0..MAX_DEPTH {
            let bytes = self.text(&format!("manifests/{wanted}"), TEXT_BYTES, Some(MANIFESTS)).await?;
            let digest = Digest::from_sha256(Sha256::digest(&bytes).into());
            if expected.is_some_and(|expected| expected != digest) {
                return Err(RegistryError::Failed(format!(
                    "the registry's manifest is not the one with the digest {wanted}"
                )));
            }
            match document(&bytes)? {
                Document::Image(manifest) => return self.configured(digest, manifest).await,
                Document::Index(next) => (wanted, expected) = (next.digest.to_string(), Some(next.digest)),
            }
        }
        Err(RegistryError::Failed("the registry's indexes lead to indexes again and again".into()))
    }

    async fn configured(&self, digest: Digest, manifest: Manifest) -> Result<Found, RegistryError> {
        let config = &manifest.config;
        if config.size > TEXT_BYTES {
            return Err(RegistryError::Failed(format!("the image's configuration is larger than {TEXT_BYTES} bytes")));
        }
        let bytes = self.text(&format!("blobs/{}", config.digest), config.size, None).await?;
        if Digest::from_sha256(Sha256::digest(&bytes).into()) != config.digest {
            return Err(RegistryError::Failed("the image's configuration is not the one with its digest".into()));
        }
        let image = oci_image(&bytes, manifest.layers.len())?;
        Ok(Found { digest, manifest, image })
    }

    /// Whether whoever talks here may have that blob.
    pub(crate) async fn has(&self, blob: &Descriptor) -> Result<bool, RegistryError> {
        let answer = self.somewhere(Method::HEAD, blob, HeaderMap::new()).await?;
        match answer.status {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            status => Err(refusal(status, "a layer")),
        }
    }

    /// A blob from its `from`th byte on, or from its first where the registry can't do that: where it begins, and it.
    pub(crate) async fn blob(&self, blob: &Descriptor, from: u64) -> Result<(u64, Body), RegistryError> {
        let mut headers = HeaderMap::new();
        if from > 0 {
            let range = HeaderValue::from_str(&format!("bytes={from}-")).expect("digits are a header's text");
            headers.insert(header::RANGE, range);
        }
        let answer = self.somewhere(Method::GET, blob, headers).await?;
        match answer.status {
            StatusCode::OK => Ok((0, answer.body)),
            StatusCode::PARTIAL_CONTENT if begins(&answer.headers) == Some(from) => Ok((from, answer.body)),
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                Err(RegistryError::Failed("the registry answers with another part of a layer than asked for".into()))
            }
            status => Err(refusal(status, "a layer")),
        }
    }

    /// Asks for a blob: the registry, and where it has none the blob's other addresses, as registries may not hand out every layer.
    async fn somewhere(&self, method: Method, blob: &Descriptor, headers: HeaderMap) -> Result<Answer, RegistryError> {
        let own = self.url(&format!("blobs/{}", blob.digest))?;
        let mut answer = self.ask(method.clone(), own, headers.clone()).await?;
        for url in &blob.urls {
            if answer.status != StatusCode::NOT_FOUND {
                break;
            }
            let url = Url::parse(url).map_err(|_| RegistryError::Failed("a layer's other address is no URL".into()))?;
            answer = self.follow(method.clone(), url, headers.clone(), None).await?;
        }
        Ok(answer)
    }

    /// A text, whole.
    async fn text(&self, path: &str, limit: u64, accept: Option<&'static str>) -> Result<Vec<u8>, RegistryError> {
        let mut headers = HeaderMap::new();
        if let Some(accept) = accept {
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        }
        let answer = self.ask(Method::GET, self.url(path)?, headers).await?;
        if answer.status != StatusCode::OK {
            return Err(refusal(answer.status, &format!("{path} in {}", self.repository)));
        }
        whole(answer.body, usize::try_from(limit).unwrap_or(usize::MAX)).await
    }

    fn url(&self, path: &str) -> Result<Url, RegistryError> {
        self.base.join(path).map_err(|error| RegistryError::Failed(error.to_string()))
    }

    /// Asks the registry, with what it wants to see.
    async fn ask(&self, method: Method, url: Url, headers: HeaderMap) -> Result<Answer, RegistryError> {
        let known = self.authorization.lock().await.clone();
        let answer = self.follow(method.clone(), url.clone(), headers.clone(), known.clone()).await?;
        if answer.status != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let wanted = answer.headers.get_all(header::WWW_AUTHENTICATE).iter();
        let wanted: Vec<&str> = wanted.filter_map(|value| value.to_str().ok()).collect();
        let Some(challenge) = challenge(&wanted.join(", ")) else {
            return Err(RegistryError::Failed("the registry refuses, and asks for nothing that can be given".into()));
        };
        let new = {
            let mut authorization = self.authorization.lock().await;
            // Somebody may have got a newer token meanwhile.
            if *authorization == known {
                let credentials = self.credentials.as_ref();
                let met = auth::meet(challenge, &self.registries, self.reach, &self.repository, credentials).await?;
                *authorization = Some(met);
            }
            authorization.clone()
        };
        let answer = self.follow(method, url, headers, new).await?;
        if answer.status == StatusCode::UNAUTHORIZED {
            let why = if self.credentials.is_some() { auth::REFUSED } else { auth::WANTED };
            return Err(RegistryError::Credentials(why));
        }
        Ok(answer)
    }

    /// Sends a request, and goes on where it is sent on to. What it is authorized by stays with the first host.
    async fn follow(
        &self,
        method: Method,
        mut url: Url,
        headers: HeaderMap,
        authorization: Option<HeaderValue>,
    ) -> Result<Answer, RegistryError> {
        let own = url.origin();
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = headers.clone();
            if let Some(authorization) = authorization.clone().filter(|_| url.origin() == own) {
                headers.insert(header::AUTHORIZATION, authorization);
            }
            let request = Request { method: method.clone(), url: url.clone(), headers, body: Default::default() };
            let answer = self.registries.send(self.reach, request).await?;
            if !matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let to = answer.headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
            let to = to.and_then(|to| url.join(to).ok());
            url = to.ok_or_else(|| RegistryError::Failed("the registry sends on to nowhere".into()))?;
        }
        Err(RegistryError::Failed(format!("the registry sends on more than {MAX_REDIRECTS} times")))
    }
}

/// All of a body, if it comes in time and isn't longer than that.
pub(super) async fn whole(body: Body, limit: usize) -> Result<Vec<u8>, RegistryError> {
    match tokio::time::timeout(PATIENCE, body.read(limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(RegistryError::Failed(format!("the registry's answer: {error}"))),
        Err(_) => {
            Err(RegistryError::Failed(format!("the registry's answer took longer than {} s", PATIENCE.as_secs())))
        }
    }
}

/// Where a part begins.
fn begins(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

fn refusal(status: StatusCode, what: &str) -> RegistryError {
    let what = shown(what);
    match status {
        StatusCode::NOT_FOUND => RegistryError::Absent(format!("the registry doesn't have {what}")),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => RegistryError::Credentials(auth::REFUSED),
        StatusCode::TOO_MANY_REQUESTS => RegistryError::Failed(
            "the registry takes no more requests for now (429): try again later, or with credentials".into(),
        ),
        status => RegistryError::Failed(format!("the registry answers {status} when asked for {what}")),
    }
}
