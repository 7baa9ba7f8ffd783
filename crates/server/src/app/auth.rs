//! Who calls: by an API key, or by a session ([`super::sessions`]).
//!
//! Invariant: a secret is compared in constant time and by its hash only, also where no key has that prefix; whether a
//! key is expired or revoked is told only to who holds its secret.

use std::{net::IpAddr, sync::Arc};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tiffin_store::{ApiKey, Store};
use tiffin_types::{
    account::Scope,
    id::{AccountId, ApiKeyId, UserId},
    time::Timestamp,
};

use super::{
    App,
    sessions::{self, by_session},
};
use crate::error::AppError;

/// What every key begins with.
const MARK: &str = "tfn";
/// A key's last use is written at most so often, in milliseconds.
const USE_EVERY_MS: i64 = 60_000;
/// No key is longer.
const MAX_KEY_BYTES: usize = 128;

/// Who makes a request.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// Whose resources it sees.
    pub(crate) account_id: AccountId,
    /// By what it is known.
    pub(crate) actor: Actor,
    /// The request's id, for what is written down of it.
    pub(crate) request_id: Option<Arc<str>>,
    scopes: Vec<Scope>,
}

/// By what a caller is known.
#[derive(Debug, Clone)]
pub(crate) enum Actor {
    /// An API key that is valid.
    Key {
        /// Its id.
        id: ApiKeyId,
        /// Its name.
        name: String,
    },
    /// Somebody who is logged in.
    User {
        /// Their id.
        id: UserId,
        /// Their email.
        email: String,
        /// The hash of their session's token.
        session_sha256: [u8; 32],
    },
}

impl Actor {
    /// The id, for logs and limits.
    pub(crate) fn id(&self) -> &str {
        match self {
            Actor::Key { id, .. } => id.as_str(),
            Actor::User { id, .. } => id.as_str(),
        }
    }
}

impl Caller {
    pub(super) fn new(account_id: AccountId, actor: Actor, scopes: Vec<Scope>) -> Self {
        Self { account_id, actor, request_id: None, scopes }
    }

    /// What it may do.
    pub(crate) fn scopes(&self) -> &[Scope] {
        &self.scopes
    }

    /// Refuses unless one of the caller's scopes covers `needed`.
    pub(crate) fn require(&self, needed: Scope) -> Result<(), AppError> {
        if self.scopes.iter().any(|scope| scope.covers(needed)) { Ok(()) } else { Err(AppError::Forbidden(needed)) }
    }
}

/// A key that was just made: the only time that its text exists here.
pub(crate) struct FreshKey {
    /// What the client sends.
    pub(crate) text: String,
    /// Its visible part, by which it is found.
    pub(crate) prefix: String,
    /// What is kept of it.
    pub(crate) sha256: [u8; 32],
}

impl FreshKey {
    /// A random key: `tfn_`, ten characters that may be shown, `_`, 256 random bits.
    pub(crate) fn random() -> Self {
        let (prefix, secret): ([u8; 5], [u8; 32]) = (rand::random(), rand::random());
        let prefix = hex::encode(prefix);
        let text = format!("{MARK}_{prefix}_{}", hex::encode(secret));
        let sha256 = hash(&text);
        Self { text, prefix, sha256 }
    }
}

/// What a request has to say who makes it. A key wins over a session.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Credentials<'a> {
    /// An API key.
    Key(&'a str),
    /// A session's token.
    Session(&'a str),
    /// Nothing.
    None,
}

/// Who makes a request. Wrong keys are counted by the address that they come from, and told to be wrong so often only; a
/// right key is let in however many wrong ones came from there, as many callers may share an address.
pub(crate) async fn authenticate(
    app: &App,
    credentials: Credentials<'_>,
    peer: Option<IpAddr>,
) -> Result<Caller, AppError> {
    let outcome = match credentials {
        Credentials::Key(text) => by_key(&app.store, text).await,
        Credentials::Session(token) => by_session(app, token).await,
        Credentials::None => {
            return Err(AppError::Unauthorized("an API key is needed: send it in the X-API-Key header"));
        }
    };
    match outcome {
        Err(wrong @ AppError::Unauthorized(_)) => Err(app.rates.wrong_key(peer).err().unwrap_or(wrong)),
        outcome => outcome,
    }
}

/// Whether a caller that was let in once would be so still; for what lasts.
pub(crate) async fn is_still_good(app: &App, caller: &Caller) -> Result<bool, AppError> {
    match &caller.actor {
        Actor::Key { id, .. } => Ok(app.store.api_key_get(id).await?.is_some_and(|key| usable(&key).is_ok())),
        Actor::User { session_sha256, .. } => sessions::is_still_good(app, *session_sha256).await,
    }
}

async fn by_key(store: &Store, text: &str) -> Result<Caller, AppError> {
    const WRONG: AppError = AppError::Unauthorized("the API key is not valid: check the X-API-Key header");
    if text.len() > MAX_KEY_BYTES {
        return Err(WRONG);
    }
    let found = match prefix_of(text) {
        Some(prefix) => store.api_key_by_prefix(prefix).await?,
        None => None,
    };
    let expected = found.as_ref().map_or([0; 32], |(_, sha256)| *sha256);
    let same = bool::from(hash(text).ct_eq(&expected));
    let Some((key, _)) = found.filter(|_| same) else { return Err(WRONG) };
    usable(&key)?;
    note_use(store, &key).await;
    Ok(Caller::new(key.account_id, Actor::Key { id: key.id, name: key.name }, key.scopes))
}

fn usable(key: &ApiKey) -> Result<(), AppError> {
    if key.revoked_at.is_some() {
        return Err(AppError::Unauthorized("the API key has been revoked: use another"));
    }
    if key.expires_at.is_some_and(|at| at <= Timestamp::now()) {
        return Err(AppError::Unauthorized("the API key has expired: use another"));
    }
    Ok(())
}

/// A use that can't be written down doesn't fail the request.
async fn note_use(store: &Store, key: &ApiKey) {
    let now = Timestamp::now();
    if key.last_used_at.is_some_and(|at| now < at.plus_millis(USE_EVERY_MS)) {
        return;
    }
    if let Err(error) = store.api_key_used(&key.id, now).await {
        tracing::warn!(key_id = %key.id, error = crate::error::chain(&error), "can't write down the use of key {}", key.id);
    }
}

fn prefix_of(text: &str) -> Option<&str> {
    let mut parts = text.split('_');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(MARK), Some(prefix), Some(_), None) => {
            (prefix.len() == 10 && prefix.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(prefix)
        }
        _ => None,
    }
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_key_shows_its_prefix_and_is_long_enough() {
        let key = FreshKey::random();
        assert_eq!(prefix_of(&key.text), Some(key.prefix.as_str()));
        assert_eq!(hash(&key.text), key.sha256);
        assert!(key.text.len() <= MAX_KEY_BYTES);
        assert_ne!(FreshKey::random().text, key.text);
    }

    #[test]
    fn what_is_no_key_has_no_prefix() {
        for text in
            ["", "tfn", "tfn__x", "tfn_0123456789", "tfn_0123456789_x_y", "abc_0123456789_x", "tfn_01234%6789_x"]
        {
            assert_eq!(prefix_of(text), None, "{text}");
        }
    }
}
