//! The settings of the ingress.

use std::{net::SocketAddr, time::Duration};

use camino::Utf8PathBuf;
use tiffin_proxy::ProxyConfig;

use super::sources::{ConfigError, Values};

/// How VMs are reached from outside.
#[derive(Debug, Clone)]
pub struct IngressConfig {
    /// What the host names of VMs end in.
    pub domain: String,
    /// Where TLS is served; nowhere when not set.
    pub listen: Option<SocketAddr>,
    /// Where plain HTTP is redirected to TLS.
    pub http_listen: Option<SocketAddr>,
    /// The port in URLs; that of `listen` when not set.
    pub public_port: Option<u16>,
    /// A chain of certificates and its key; an authority of one's own when not set.
    pub certificate: Option<(Utf8PathBuf, Utf8PathBuf)>,
    /// The bounds. `public_port` is set once it listens.
    pub proxy: ProxyConfig,
}

impl IngressConfig {
    pub(super) fn from_values(values: &Values, shutdown_grace: Duration) -> Result<Self, ConfigError> {
        Ok(Self {
            domain: values.with("ingress.domain", domain)?,
            listen: values.with("ingress.listen", |text| match text {
                "off" => Some(None),
                address => address.parse().ok().map(Some),
            })?,
            http_listen: values.optional("ingress.http_listen", |text| text.parse().ok())?,
            public_port: values.optional("ingress.public_port", |text| text.parse().ok().filter(|port| *port != 0))?,
            certificate: certificate(values)?,
            proxy: ProxyConfig {
                max_connections: values.count("ingress.max_connections")?,
                max_connections_per_address: values.count("ingress.connections_per_address")?,
                max_connections_per_backend: values.count("ingress.connections_per_vm")?,
                idle_timeout: values.millis("ingress.idle_timeout_ms")?,
                body_timeout: values.millis("ingress.body_timeout_ms")?,
                answer_timeout: values.millis("ingress.answer_timeout_ms")?,
                stream_timeout: values.millis("ingress.stream_timeout_ms")?,
                trust_forwarded: values.one_of("ingress.trust_forwarded")? == "true",
                access_log: values.one_of("ingress.access_log")? == "true",
                shutdown_grace,
                ..ProxyConfig::default()
            },
        })
    }
}

/// Both or neither.
fn certificate(values: &Values) -> Result<Option<(Utf8PathBuf, Utf8PathBuf)>, ConfigError> {
    let chain = values.optional_path("ingress.cert_file")?;
    let key = values.with("ingress.key_file", |text| match (chain.is_some(), text) {
        (false, "") => Some(None),
        (true, path) if path.starts_with('/') => Some(Some(Utf8PathBuf::from(path))),
        (true | false, _) => None,
    })?;
    Ok(chain.zip(key))
}

/// A domain name's labels (RFC 1123), with room for one more before them.
fn domain(text: &str) -> Option<String> {
    let is_label = |label: &str| {
        let inner = label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        (1..=63).contains(&label.len()) && inner && !label.starts_with('-') && !label.ends_with('-')
    };
    (text.len() <= 220 && text.split('.').all(is_label)).then(|| text.to_owned())
}
