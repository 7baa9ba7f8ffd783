//! Passwords: hashed by Argon2id, compared at the same cost whether or not there is such a user.
//!
//! Invariant: a password is in no log, error or store. Hashing costs 19 MiB and tens of milliseconds, so few run at once, off
//! the threads that answer requests, and what waits too long is refused.

use std::{sync::Arc, time::Duration};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use tiffin_types::limits::PASSWORD_BYTES;
use tokio::sync::Semaphore;

use crate::error::AppError;

/// Passwords that are compared at once.
const AT_ONCE: usize = 2;
/// How long one waits for its turn.
const WAIT: Duration = Duration::from_secs(5);
/// A hash that no password has, of the same cost as those that [`hash`] makes.
const DECOY: &str = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// A password that isn't taken.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    /// Too short or too long.
    #[error("a password must have {} to {} bytes", PASSWORD_BYTES.start(), PASSWORD_BYTES.end())]
    Length,
    /// The hash can't be made.
    #[error("the password can't be hashed: {0}")]
    Hash(String),
}

/// A random password: 96 bits.
pub fn random_password() -> String {
    hex::encode(rand::random::<[u8; 12]>())
}

/// The hash of a password, with a salt of its own. Takes tens of milliseconds.
pub(crate) fn hash(password: &str) -> Result<String, PasswordError> {
    if !PASSWORD_BYTES.contains(&password.len()) {
        return Err(PasswordError::Length);
    }
    let hash: Result<PasswordHash, _> = Argon2::default().hash_password(password.as_bytes());
    hash.map(|hash| hash.to_string()).map_err(|error| PasswordError::Hash(error.to_string()))
}

/// Whether it is the password of that hash; of no hash it never is.
fn is_right(password: &str, hash: Option<&str>) -> bool {
    let parsed = PasswordHash::new(hash.unwrap_or(DECOY));
    let same = parsed.is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok());
    same && hash.is_some()
}

/// Compares passwords.
pub(crate) struct Passwords(Arc<Semaphore>);

impl Default for Passwords {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }
}

impl Passwords {
    /// Whether it is the password of that hash; `None` costs the same and is never right.
    pub(crate) async fn check(&self, password: String, hash: Option<String>) -> Result<bool, AppError> {
        let place = tokio::time::timeout(WAIT, Arc::clone(&self.0).acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(AppError::Unavailable {
                code: "busy",
                message: "too many people log in at once: try again shortly".into(),
            });
        };
        let work = tokio::task::spawn_blocking(move || {
            let right = is_right(&password, hash.as_deref());
            drop(place);
            right
        });
        work.await.map_err(|error| AppError::internal("comparing a password", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_right_for_its_own_hash_alone() {
        let password = random_password();
        let made = hash(&password).unwrap();
        assert!(is_right(&password, Some(&made)));
        assert!(!is_right(&random_password(), Some(&made)));
        assert!(!is_right(&password, None) && !is_right("", None));
        assert!(!is_right(&password, Some("no hash")));
        assert_ne!(hash(&password).unwrap(), made, "each has a salt of its own");
    }

    #[test]
    fn an_unknown_user_costs_as_much_as_a_known_one() {
        let cost = |hash: &str| hash.rsplitn(3, '$').last().unwrap().to_owned();
        let made = hash(&random_password()).unwrap();
        assert_eq!(cost(&made), cost(DECOY));
        assert_eq!(made.len(), DECOY.len());
        assert!(PasswordHash::new(DECOY).is_ok());
    }

    #[test]
    fn only_the_length_of_a_password_is_judged() {
        for bad in ["", "elevenbytes", &"x".repeat(257)] {
            assert!(matches!(hash(bad), Err(PasswordError::Length)), "{bad}");
        }
        assert!(hash("            ").is_ok());
    }
}
