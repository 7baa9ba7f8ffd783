//! From a URL to a connection: the one place that resolves names and opens sockets.

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    time::Duration,
};

use tokio::{net::TcpStream, time::Instant};
use url::{Host, Url};

use crate::{OutboundError, Policy, Refused, policy::own_addresses};

/// Addresses that are tried of one name.
const TRIED: usize = 8;

/// Finds a name's addresses.
pub trait Resolve: Send + Sync {
    /// The addresses of `name`, best first.
    fn resolve(&self, name: String) -> Resolving;
}

/// What a resolver gives.
pub type Resolving = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// The host's own resolver: `/etc/hosts`, DNS, whatever is configured.
#[derive(Debug, Clone, Copy)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, name: String) -> Resolving {
        Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.map(|address| address.ip()).collect()) })
    }
}

/// Connects to the URL's host within `limit`, to an address that the policy allows.
pub(crate) async fn connect(
    policy: &Policy,
    resolver: &dyn Resolve,
    url: &Url,
    limit: Duration,
) -> Result<TcpStream, OutboundError> {
    policy.check_url(url)?;
    let host = url.host().ok_or(Refused::NoHost)?.to_owned();
    let port = url.port_or_known_default().ok_or(Refused::NoHost)?;
    let deadline = Instant::now() + limit;
    let timed_out = |_| OutboundError::ConnectTimeout(limit);
    let found = match &host {
        Host::Ipv4(address) => vec![IpAddr::V4(*address)],
        Host::Ipv6(address) => vec![IpAddr::V6(*address)],
        Host::Domain(name) => {
            let resolving = resolver.resolve(name.clone());
            let answer = tokio::time::timeout_at(deadline, resolving).await.map_err(timed_out)?;
            answer.map_err(|error| OutboundError::Resolve { host: name.clone(), why: error.to_string() })?
        }
    };
    if found.is_empty() {
        return Err(OutboundError::Resolve { host: host.to_string(), why: "it has no address".into() });
    }
    let own = own_addresses();
    let allowed: Vec<IpAddr> = found.into_iter().filter(|address| policy.allows(*address, &own)).take(TRIED).collect();
    if allowed.is_empty() {
        return Err(Refused::Address(host).into());
    }
    let mut failure = OutboundError::ConnectTimeout(limit);
    for (index, address) in allowed.iter().enumerate() {
        // One address that swallows packets leaves time for those after it.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(allowed.len() - index).unwrap_or(u32::MAX);
        match tokio::time::timeout(share, TcpStream::connect(SocketAddr::new(*address, port))).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => failure = OutboundError::Connect(error),
            Err(_) => {}
        }
    }
    Err(failure)
}
