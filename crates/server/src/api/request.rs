//! What handlers take from a request beside its body: the caller, ids in the path, the query.

use std::{collections::BTreeMap, net::IpAddr, str::FromStr, sync::Arc};

use axum::{
    extract::{FromRequestParts, Path, Query},
    http::request::Parts,
};
use tiffin_types::id::{AccountId, ApiKeyId, ImageId, SnapshotId, VmId};

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

/// Where a connection comes from: the other end of the socket, which behind a proxy is the proxy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

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
