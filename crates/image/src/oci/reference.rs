//! References to images in registries: `HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`, short ones as Docker understands them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use tiffin_types::id::Digest;

/// Where references without a host lead, by what they are called and by where that is.
const DOCKER: (&str, &str) = ("docker.io", "registry-1.docker.io");
const REPOSITORY_BYTES: usize = 255;
const TAG_BYTES: usize = 128;

/// A reference that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadReference(&'static str);

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    host: String,
    repository: String,
    version: Chosen,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Chosen {
    Tag(String),
    Digest(Digest),
}

/// Which of a repository's images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version<'a> {
    /// The one that the registry calls so now.
    Tag(&'a str),
    /// The one with that manifest.
    Digest(&'a Digest),
}

impl Reference {
    /// The registry's host, and its port if it isn't the usual one, as in a URL.
    pub fn host(&self) -> &str {
        if self.host == DOCKER.0 { DOCKER.1 } else { &self.host }
    }

    /// The repository in it.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Which image: a digest goes before a tag.
    pub fn version(&self) -> Version<'_> {
        match &self.version {
            Chosen::Digest(digest) => Version::Digest(digest),
            Chosen::Tag(tag) => Version::Tag(tag),
        }
    }
}

impl fmt::Display for Version<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Version::Tag(tag) => f.write_str(tag),
            Version::Digest(digest) => digest.fmt(f),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        match &self.version {
            Chosen::Digest(digest) => write!(f, "@{digest}"),
            Chosen::Tag(tag) => write!(f, ":{tag}"),
        }
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

impl TryFrom<String> for Reference {
    type Error = BadReference;
    fn try_from(text: String) -> Result<Self, BadReference> {
        text.parse()
    }
}

impl FromStr for Reference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Self, BadReference> {
        let text = text.strip_prefix("docker://").unwrap_or(text);
        if text.contains("://") {
            return Err(BadReference(
                "must be a reference without a scheme, such as registry.example.com/team/app:1.0",
            ));
        }
        let (text, digest) = match text.split_once('@') {
            Some((text, digest)) => {
                let digest = digest.parse().map_err(|_| {
                    BadReference("must have a digest of the form sha256: and 64 hexadecimal digits after the @")
                })?;
                (text, Some(digest))
            }
            None => (text, None),
        };
        let is_host = |first: &str| first.contains(['.', ':']) || first == "localhost";
        let (host, path) = match text.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest),
            Some(_) | None => (DOCKER.0, text),
        };
        let (repository, tag) = match path.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path, None),
        };
        let host = match host.to_ascii_lowercase().as_str() {
            "index.docker.io" => DOCKER.0.to_owned(),
            host => host.to_owned(),
        };
        check_host(&host)?;
        let of_docker = host == DOCKER.0 && !repository.contains('/');
        let repository = if of_docker { format!("library/{repository}") } else { repository.to_owned() };
        check_repository(&repository)?;
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        // A digest says more than a tag beside it.
        let version = match digest {
            Some(digest) => Chosen::Digest(digest),
            None => Chosen::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self { host, repository, version })
    }
}

fn check_host(host: &str) -> Result<(), BadReference> {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            let is_address = address.parse::<std::net::Ipv6Addr>().is_ok();
            return match is_address && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port)) {
                true => Ok(()),
                false => Err(BadReference(
                    "must begin with a registry's host that is an IPv6 address in brackets, or a name",
                )),
            };
        }
        None => match host.split_once(':') {
            Some((name, port)) if is_port(port) => name,
            Some(_) => return Err(BadReference("must have a port from 1 to 65535 after the host's colon")),
            None => host,
        },
    };
    let is_label = |label: &str| {
        let inner = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        inner && (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
    };
    match name.len() <= 253 && name.split('.').all(is_label) {
        true => Ok(()),
        false => Err(BadReference("must begin with the name or the address of a registry's host")),
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port > 0)
}

fn check_repository(repository: &str) -> Result<(), BadReference> {
    if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(BadReference("must have a repository in lower case"));
    }
    // Letters and digits, between them one dot, one or two underscores, or dashes.
    let is_part = |part: &str| {
        let sound = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let between = part.split(sound).filter(|separator| !separator.is_empty());
        let ends = part.starts_with(sound) && part.ends_with(sound);
        let known =
            |separator: &str| matches!(separator, "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-');
        ends && between.into_iter().all(known)
    };
    match repository.len() <= REPOSITORY_BYTES && repository.split('/').all(is_part) {
        true => Ok(()),
        false => Err(BadReference(
            "must have a repository of at most 255 lower-case letters and digits, with . _ - between them and / between parts, such as team/app",
        )),
    }
}

fn check_tag(tag: &str) -> Result<(), BadReference> {
    let first = tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let rest = tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
    match first && rest && tag.len() <= TAG_BYTES {
        true => Ok(()),
        false => {
            Err(BadReference("must have a tag of at most 128 letters, digits, _ . and -, not beginning with . or -"))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> (String, String, String) {
        let reference: Reference = text.parse().unwrap();
        (reference.host().to_owned(), reference.repository().to_owned(), reference.version().to_string())
    }

    #[test]
    fn references_are_read_as_docker_does() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        for (text, host, repository, version) in [
            ("nginx", "registry-1.docker.io", "library/nginx", "latest"),
            ("team/app:1.0", "registry-1.docker.io", "team/app", "1.0"),
            ("docker.io/nginx", "registry-1.docker.io", "library/nginx", "latest"),
            ("docker://index.docker.io/nginx", "registry-1.docker.io", "library/nginx", "latest"),
            ("localhost/a", "localhost", "a", "latest"),
            ("127.0.0.1:5000/a/b/c:T-1", "127.0.0.1:5000", "a/b/c", "T-1"),
            ("[::1]:5000/a", "[::1]:5000", "a", "latest"),
            ("123.dkr.ecr.eu-west-1.amazonaws.com/a-b__c.d:v", "123.dkr.ecr.eu-west-1.amazonaws.com", "a-b__c.d", "v"),
            (&format!("ghcr.io/a/b:tag@{digest}"), "ghcr.io", "a/b", &digest),
        ] {
            assert_eq!(parsed(text), (host.to_owned(), repository.to_owned(), version.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused_with_what_it_must_be() {
        for (text, says) in [
            ("", "repository"),
            ("https://ghcr.io/a/b", "without a scheme"),
            ("ghcr.io/A/b", "lower case"),
            ("ghcr.io/a//b", "repository"),
            ("ghcr.io/a/../b", "repository"),
            ("ghcr.io/a/b:", "tag"),
            ("ghcr.io/a:.b", "tag"),
            ("ghcr.io/a@sha256:12", "digest"),
            ("ghcr.io/a@md5:12", "digest"),
            ("ghcr.io:0/a", "port"),
            ("ghcr.io:99999/a", "port"),
            ("-x.io/a", "host"),
            ("user@ghcr.io/a", "digest"),
            ("ghcr.io\\a.b/c", "host"),
            ("[::1/a", "port"),
            ("ghcr.io/a?b=c", "repository"),
            ("ghcr.io/a b", "repository"),
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_is_safe_in_a_url_and_reads_back(text in "[a-zA-Z0-9:/@._\\[\\]#?%-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let safe = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b":/._-[]".contains(&b));
                prop_assert!(safe(reference.host()) && safe(reference.repository()) && safe(&reference.version().to_string()));
                prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
            }
        }
    }
}
