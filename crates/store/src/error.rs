//! What can go wrong in the store, split by what the caller does about it.
//!
//! Texts of [`StoreError::Conflict`] and [`StoreError::Corrupt`] name tables, columns and ids, never secrets.

use sqlx::error::ErrorKind;

/// Why a store operation did nothing. No operation is left half done: each is one statement or one transaction.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database's contents don't allow it: a name that is taken, an account that doesn't exist, an impossible
    /// transition. Trying again gives the same answer.
    #[error("{0}")]
    Conflict(String),
    /// The database can't be reached, is busy for too long, is full or refuses the connection. Trying again may work.
    #[error("the database is unavailable")]
    Unavailable {
        /// What the driver says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A row holds what this program can't have written; names the table, the column and the row's id.
    #[error("corrupt row: {0}")]
    Corrupt(String),
}

impl StoreError {
    pub(crate) fn unavailable(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Unavailable { source: source.into() }
    }

    /// Replaces the driver's text of a conflict by one that says what it means here.
    pub(crate) fn or_conflict(error: sqlx::Error, meaning: impl Into<String>) -> Self {
        match Self::from(error) {
            Self::Conflict(_) => Self::Conflict(meaning.into()),
            other => other,
        }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error.as_database_error() {
            Some(refused) if refused.kind() != ErrorKind::Other || is_bad_value(refused) => {
                Self::Conflict(refused.message().to_owned())
            }
            _ => Self::unavailable(error),
        }
    }
}

/// SQLSTATE class 22: a value that the column can't hold, such as a text with a NUL byte on Postgres.
fn is_bad_value(error: &dyn sqlx::error::DatabaseError) -> bool {
    error.code().is_some_and(|code| code.len() == 5 && code.starts_with("22"))
}
