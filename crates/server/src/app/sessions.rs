//! Sessions: people who log in with a password.
//!
//! Invariants: the token is 256 random bits and is kept as its hash only; a session ends when it is idle, at its age, at a
//! log out and with its user's password. Attempts are counted before anything is compared: by the address at the gate, by
//! the email here. What is over comes back within a minute, so nobody is locked out for good.

use std::{net::IpAddr, time::Duration};

use sha2::{Digest, Sha256};
use tiffin_store::{Session, Store, StoreError, User};
use tiffin_types::{account::Scope, limits::EMAIL_BYTES, time::Timestamp};

use super::{
    App,
    auth::{Actor, Caller},
    passwords::{self, PasswordError},
};
use crate::{
    config::SessionConfig,
    error::{AppError, chain},
};

/// A session's use is written at most so often, in milliseconds; more often where it may be idle only briefly.
const USE_EVERY_MS: i64 = 60_000;

/// A session that has begun: the only time that its token exists here.
pub(crate) struct FreshSession {
    /// What the browser sends from now on.
    pub(crate) token: String,
    /// Whose it is.
    pub(crate) caller: Caller,
    /// Their email.
    pub(crate) email: String,
    /// How long it may last.
    pub(crate) lasts: Duration,
}

/// Begins a session.
pub(crate) async fn session_create(
    app: &App,
    email: &str,
    password: String,
    peer: Option<IpAddr>,
) -> Result<FreshSession, AppError> {
    const WRONG: AppError = AppError::Unauthorized("the email or the password is wrong");
    let email = email_form(email).ok_or(WRONG)?;
    app.rates.login(&email, peer)?;
    let found = app.store.user_by_email(&email).await?;
    let hash = found.as_ref().map(|(_, hash)| hash.clone());
    let is_right = app.passwords.check(password, hash).await?;
    let Some((user, _)) = found.filter(|_| is_right) else { return Err(WRONG) };
    let token = hex::encode(rand::random::<[u8; 32]>());
    let (now, lasts) = (Timestamp::now(), app.config.session.max);
    if !app.store.session_create(hash_of(&token), &user, now, now.plus_millis(millis(lasts))).await? {
        // The password was changed in between.
        return Err(WRONG);
    }
    tracing::info!(user_id = %user.id, "user {} logged in", user.id);
    let email = user.email.clone();
    Ok(FreshSession { caller: caller_of(user, hash_of(&token)), token, email, lasts })
}

/// Ends a session, if there is one: whether there was.
pub(crate) async fn session_delete(app: &App, token: Option<&str>) -> Result<bool, AppError> {
    match token {
        Some(token) => Ok(app.store.session_delete(hash_of(token)).await?),
        None => Ok(false),
    }
}

/// Who is logged in with that token.
pub(crate) async fn by_session(app: &App, token: &str) -> Result<Caller, AppError> {
    const ENDED: AppError = AppError::Unauthorized("the session has ended: log in again");
    let sha256 = hash_of(token);
    let now = Timestamp::now();
    let session = app.store.session_get(sha256).await?.filter(|session| is_alive(session, now, &app.config.session));
    let Some(session) = session else { return Err(ENDED) };
    note_use(app, sha256, &session, now).await;
    Ok(caller_of(session.user, sha256))
}

fn caller_of(user: User, session_sha256: [u8; 32]) -> Caller {
    let actor = Actor::User { id: user.id, email: user.email, session_sha256 };
    Caller::new(user.account_id, actor, user.scopes)
}

/// Whether a session that was good is so still.
pub(super) async fn is_still_good(app: &App, sha256: [u8; 32]) -> Result<bool, AppError> {
    let session = app.store.session_get(sha256).await?;
    Ok(session.is_some_and(|session| is_alive(&session, Timestamp::now(), &app.config.session)))
}

/// Forgets sessions that have ended.
pub(crate) async fn prune(app: &App) -> Result<u64, StoreError> {
    let now = Timestamp::now();
    app.store.session_prune(now, now.plus_millis(-millis(app.config.session.idle))).await
}

fn is_alive(session: &Session, now: Timestamp, config: &SessionConfig) -> bool {
    now < session.expires_at && now < session.last_used_at.plus_millis(millis(config.idle))
}

/// A use that can't be written down doesn't fail the request.
async fn note_use(app: &App, sha256: [u8; 32], session: &Session, now: Timestamp) {
    let every = USE_EVERY_MS.min(millis(app.config.session.idle) / 10);
    if now < session.last_used_at.plus_millis(every) {
        return;
    }
    if let Err(error) = app.store.session_used(sha256, now).await {
        tracing::warn!(user_id = %session.user.id, error = chain(&error), "can't write down the use of a session");
    }
}

fn hash_of(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

/// The one form of an email; `None` where it can't be one.
pub(crate) fn email_form(text: &str) -> Option<String> {
    let email = text.trim().to_lowercase();
    let (local, domain) = email.rsplit_once('@')?;
    let fits = EMAIL_BYTES.contains(&email.len()) && !local.is_empty() && !domain.is_empty();
    (fits && !email.chars().any(|c| c.is_control() || c.is_whitespace())).then_some(email)
}

/// The user whom the first start makes.
pub struct FirstLogin {
    /// What they log in with.
    pub email: String,
    /// Their password, shown this once.
    pub password: String,
}

/// Makes the first user, an administrator of the first account, when there is no user.
///
/// # Errors
/// Whatever the store says.
pub async fn first_login(store: &Store, email: &str) -> Result<Option<FirstLogin>, StoreError> {
    if store.user_exists().await? {
        return Ok(None);
    }
    let password = passwords::random_password();
    let hash = hashed(password.clone()).await.expect("a random password has a length that is taken");
    let made = store.setup_user(email, &hash, &[Scope::Admin]).await?;
    Ok(made.map(|user| FirstLogin { email: user.email, password }))
}

/// A password could not be set.
#[derive(Debug, thiserror::Error)]
pub enum SetPasswordError {
    /// The password isn't taken.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// There is no such user.
    #[error("nobody logs in with {0}")]
    NoUser(String),
    /// The store failed.
    #[error("the database can't be changed")]
    Store(#[from] StoreError),
}

/// Sets a user's password and ends their sessions.
///
/// # Errors
/// When it isn't taken, or there is no such user.
pub async fn set_password(store: &Store, email: &str, password: String) -> Result<(), SetPasswordError> {
    let hash = hashed(password).await?;
    let email = email_form(email).ok_or_else(|| SetPasswordError::NoUser(email.to_owned()))?;
    match store.user_set_password(&email, &hash).await? {
        true => Ok(()),
        false => Err(SetPasswordError::NoUser(email)),
    }
}

async fn hashed(password: String) -> Result<String, PasswordError> {
    let work = tokio::task::spawn_blocking(move || passwords::hash(&password));
    work.await.unwrap_or_else(|error| Err(PasswordError::Hash(error.to_string())))
}

#[cfg(test)]
mod tests {
    use tiffin_types::id::{AccountId, UserId};

    use super::*;

    #[test]
    fn a_session_ends_when_it_is_idle_and_at_its_age() {
        let at = Timestamp::from_millis;
        let user = User {
            id: UserId::random(),
            account_id: AccountId::random(),
            email: "a@b".into(),
            scopes: vec![Scope::Admin],
            created_at: at(0),
            password_set_at: at(0),
        };
        let session = Session { user, last_used_at: at(5_000), expires_at: at(20_000) };
        let config = SessionConfig { idle: Duration::from_secs(10), max: Duration::from_secs(20) };
        assert!(is_alive(&session, at(14_999), &config));
        assert!(!is_alive(&session, at(15_000), &config));
        let used = Session { last_used_at: at(19_000), ..session };
        assert!(is_alive(&used, at(19_999), &config) && !is_alive(&used, at(20_000), &config));
    }

    #[test]
    fn an_email_has_one_form() {
        assert_eq!(email_form(" Ada@Example.ORG ").as_deref(), Some("ada@example.org"));
        for bad in ["", "@", "a@", "@b", "a b@c", "a\n@b", "ab", &format!("{}@b", "x".repeat(253))] {
            assert_eq!(email_form(bad), None, "{bad}");
        }
    }
}
