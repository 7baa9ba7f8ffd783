//! What handlers take from a request beside its body: the caller, ids in the path, the query.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use axum::{
    extract::{FromRequestParts, Path, Query},
    http::{HeaderMap, request::Parts},
};
use tiffin_types::id::{AccountId, ApiKeyId, ImageId, SnapshotId, VmId, WebhookId};
use tokio::sync::OwnedSemaphorePermit;

use super::sessions;
use crate::{
    app::{
        App,
        auth::{Caller, Credentials, authenticate},
    },
    error::{AppError, FieldError},
};

/// The header with the API key.
pub(crate) const KEY_HEADER: &str = "x-api-key";

/// Where a request comes from: the other end of the socket, or, once the gate has looked, what a proxy says that is
/// believed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// The place of a request's connection among those open at once; what goes on over it after an upgrade keeps it.
#[derive(Clone)]
pub(crate) struct Place(
    #[expect(dead_code, reason = "it is held, and given back when it is dropped")] pub(crate) Arc<OwnedSemaphorePermit>,
);

/// Where a request comes from. A proxy that is believed has written the last hop of `X-Forwarded-For`; those before it
/// may be anybody's word.
pub(super) fn client_address(app: &App, parts: &Parts) -> Option<IpAddr> {
    let socket = parts.extensions.get::<Peer>().map(|Peer(address)| *address);
    if app.config.http.trust_proxy { last_hop(&parts.headers).or(socket) } else { socket }
}

fn last_hop(headers: &HeaderMap) -> Option<IpAddr> {
    let line = headers.get_all("x-forwarded-for").iter().next_back()?.to_str().ok()?;
    let hop = line.rsplit(',').next()?.trim();
    let bare = hop.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse().or_else(|_| hop.parse().map(|with_port: SocketAddr| with_port.ip()));
    address.ok().map(|address| address.to_canonical())
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = AppError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, AppError> {
        if let Some(caller) = parts.extensions.get::<Caller>() {
            // The gate has looked already.
            return Ok(caller.clone());
        }
        let key = parts.headers.get(KEY_HEADER).map(|value| value.to_str().unwrap_or(""));
        let credentials = match (key, sessions::token(&parts.headers)) {
            (Some(key), _) => Credentials::Key(key),
            (None, Some(token)) => Credentials::Session(token),
            (None, None) => Credentials::None,
        };
        let peer = parts.extensions.get::<Peer>().map(|Peer(address)| *address);
        authenticate(app, credentials, peer).await
    }
}

/// What an id in a path names.
pub(crate) trait Noun: FromStr {
    /// As it is called in an error.
    const NOUN: &'static str;
}

impl Noun for VmId {
    const NOUN: &'static str = "VM";
}
impl Noun for SnapshotId {
    const NOUN: &'static str = "snapshot";
}
impl Noun for ApiKeyId {
    const NOUN: &'static str = "API key";
}
impl Noun for ImageId {
    const NOUN: &'static str = "image";
}
impl Noun for WebhookId {
    const NOUN: &'static str = "webhook";
}
impl Noun for AccountId {
    const NOUN: &'static str = "account";
}

/// The id in the path. One that is malformed names nothing: not found.
pub(crate) struct Id<T>(pub(crate) T);

impl<T: Noun, S: Send + Sync> FromRequestParts<S> for Id<T> {
    type Rejection = AppError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AppError> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        match text.map(|Path(text)| text.parse()) {
            Ok(Ok(id)) => Ok(Self(id)),
            Ok(Err(_)) | Err(_) => Err(AppError::NotFound(T::NOUN)),
        }
    }
}

/// The VM and the port in the path.
pub(crate) struct IdAndPort(pub(crate) VmId, pub(crate) u16);

impl<S: Send + Sync> FromRequestParts<S> for IdAndPort {
    type Rejection = AppError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AppError> {
        let texts = Path::<(String, String)>::from_request_parts(parts, state).await;
        let Path((id, port)) = texts.map_err(|_| AppError::NotFound(VmId::NOUN))?;
        let id = id.parse().map_err(|_| AppError::NotFound(VmId::NOUN))?;
        let port = port.parse().ok().filter(|port| *port != 0);
        Ok(Self(id, port.ok_or_else(|| AppError::field("port", "must be a whole number from 1 to 65535"))?))
    }
}

/// The query's parameters, each at most once.
pub(crate) struct Parameters(BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Parameters {
    type Rejection = AppError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AppError> {
        let unreadable = |_| AppError::BadRequest("the query can't be read: send name=value pairs".into());
        let Query(pairs) =
            Query::<Vec<(String, String)>>::from_request_parts(parts, state).await.map_err(unreadable)?;
        let mut parameters = BTreeMap::new();
        for (name, value) in pairs {
            if parameters.insert(name.clone(), value).is_some() {
                return Err(AppError::field(name, "is given more than once"));
            }
        }
        Ok(Self(parameters))
    }
}

impl Parameters {
    /// The parameter as a value, `default` when it isn't given.
    pub(crate) fn optional<T>(
        &mut self,
        name: &str,
        default: T,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, AppError> {
        match self.0.remove(name) {
            Some(text) => read(&text).ok_or_else(|| AppError::field(name, expected)),
            None => Ok(default),
        }
    }

    /// The parameter's text, if it is given.
    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// A parameter that must be given.
    pub(crate) fn required<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, AppError> {
        match self.0.remove(name) {
            Some(text) => read(&text).ok_or_else(|| AppError::field(name, expected)),
            None => Err(AppError::field(name, format!("is missing; it {expected}"))),
        }
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self, known: &str) -> Result<(), AppError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let unknown =
            |field: String| FieldError { field, message: format!("is no parameter of this request: {known}") };
        Err(AppError::Fields(self.0.into_keys().map(unknown).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_hop_is_the_last_of_the_last_line() {
        let hop = |lines: &[&'static str]| {
            let lines = lines.iter().map(|line| ("x-forwarded-for".parse().unwrap(), line.parse().unwrap()));
            last_hop(&lines.collect()).map(|address| address.to_string())
        };
        for (lines, expected) in [
            (&[][..], None),
            (&[""], None),
            (&["192.0.2.1"], Some("192.0.2.1")),
            (&["203.0.113.9, 192.0.2.1"], Some("192.0.2.1")),
            (&["203.0.113.9", "198.51.100.7,192.0.2.1 "], Some("192.0.2.1")),
            (&["192.0.2.1:4711"], Some("192.0.2.1")),
            (&["2001:db8::1"], Some("2001:db8::1")),
            (&["[2001:db8::1]"], Some("2001:db8::1")),
            (&["[2001:db8::1]:80"], Some("2001:db8::1")),
            (&["::ffff:192.0.2.1"], Some("192.0.2.1")),
            (&["192.0.2.1, unknown"], None),
        ] {
            assert_eq!(hop(lines).as_deref(), expected, "{lines:?}");
        }
    }
}
