//! Where registries may be, and how they are spoken to.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use tiffin_image::oci::Reference;
use tiffin_outbound::{Answer, Client, Policy, Request};
use url::{Host, Url};

use super::{RegistryError, auth::Credentials, session::Session};
use crate::{
    authorities::{self, BadAuthorities},
    config::RegistryConfig,
};

/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// How long the head of an answer may take.
const HEAD_LIMIT: Duration = Duration::from_secs(60);

/// The registries that may be asked, which is everywhere on the internet by TLS, and what the configuration lets in.
#[derive(Debug, Clone)]
pub(crate) struct Registries(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: RegistryConfig,
    /// For registries on the internet and whatever they point to.
    far: Client,
    /// For registries that are spoken to without TLS, and whatever they point to.
    near: Client,
}

/// How far somebody is believed who names an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Anywhere public.
    Far,
    /// Loopback and what the configuration lets in, too.
    Near,
}

impl Registries {
    /// As the configuration says.
    pub(crate) fn open(config: &RegistryConfig) -> Result<Self, BadAuthorities> {
        let far = Policy { allow_http: false, allow: config.allow_networks.clone() };
        let loopback: [IpNet; 2] = ["127.0.0.0/8", "::1/128"].map(|net| net.parse().expect("they are networks"));
        let mut near = Policy { allow_http: true, allow: config.allow_networks.clone() };
        if config.loopback {
            near.allow.extend(loopback);
        }
        let client = |policy| {
            let roots = authorities::roots("registry.ca_file", config.ca_file.as_deref())?;
            Ok(Client::new(policy, roots, CONNECT_LIMIT))
        };
        Ok(Self(Arc::new(Inner { config: config.clone(), far: client(far)?, near: client(near)? })))
    }

    /// A conversation about that image.
    pub(crate) fn session(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Session, RegistryError> {
        let parse = |scheme: &str| {
            let url = Url::parse(&format!("{scheme}://{}/v2/{}/", reference.host(), reference.repository()));
            url.map_err(|error| RegistryError::Forbidden(format!("names no registry: {error}")))
        };
        let (mut base, mut reach) = (parse("https")?, Reach::Far);
        if self.is_plain(&base) {
            (base, reach) = (parse("http")?, Reach::Near);
        } else if is_loopback(&base) && !self.has_allowed(&base) {
            // Only where it is switched off.
            return Err(RegistryError::Forbidden("names a registry on the server's own loopback addresses, which the configuration doesn't let in (registry.loopback)".into()));
        }
        Ok(Session::new(self.clone(), base, reach, reference.repository(), credentials))
    }

    /// Sends a request to where somebody of that reach points.
    pub(super) async fn send(&self, reach: Reach, request: Request) -> Result<Answer, RegistryError> {
        if request.url.scheme() == "http" && !self.is_plain(&request.url) {
            return Err(RegistryError::Forbidden(format!(
                "the registry leads to {}, without TLS: that is for loopback and what the configuration names (registry.plain_http)",
                super::shown(request.url.host_str().unwrap_or_default())
            )));
        }
        let client = match reach {
            Reach::Far => &self.0.far,
            Reach::Near => &self.0.near,
        };
        match tokio::time::timeout(HEAD_LIMIT, client.send(request)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(RegistryError::Failed(format!("no answer within {} s", HEAD_LIMIT.as_secs()))),
        }
    }

    /// Whether that loopback host is in a network that is let in.
    fn has_allowed(&self, url: &Url) -> bool {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address).to_canonical(),
            // What it resolves to is judged when it is connected to.
            Some(Host::Domain(_)) => return !self.0.config.allow_networks.is_empty(),
            None => return false,
        };
        self.0.config.allow_networks.iter().any(|net| net.contains(&address))
    }

    /// Whether that host is spoken to without TLS.
    fn is_plain(&self, url: &Url) -> bool {
        let named = |listed: &String| {
            let host = url.host_str().unwrap_or_default();
            let port = url.port_or_known_default().filter(|port| *port != 443).unwrap_or(80);
            listed == host || *listed == format!("{host}:{port}")
        };
        (self.0.config.loopback && is_loopback(url)) || self.0.config.plain_http.iter().any(named)
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).to_canonical().is_loopback(),
        None => false,
    }
}
