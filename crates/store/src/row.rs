//! Reading rows into types without trusting them: whatever a column holds, the result is a value or
//! [`StoreError::Corrupt`] that names the column and the row.

use std::{fmt::Display, str::FromStr};

use serde::de::{DeserializeOwned, IntoDeserializer};
use sqlx::{
    Any, Row,
    any::{AnyArguments, AnyRow},
    query::Query,
};
use tiffin_types::time::Timestamp;

use crate::StoreError;

/// One row of `table`, whose `id` column names it in errors.
pub(crate) struct Fields<'r> {
    table: &'static str,
    row: &'r AnyRow,
}

impl<'r> Fields<'r> {
    pub(crate) fn new(table: &'static str, row: &'r AnyRow) -> Self {
        Self { table, row }
    }

    fn corrupt(&self, column: &str, why: impl Display) -> StoreError {
        let id = self.row.try_get::<String, _>("id").unwrap_or_else(|_| "unknown".to_owned());
        StoreError::Corrupt(format!("{}.{column} of {id}: {why}", self.table))
    }

    pub(crate) fn text(&self, column: &str) -> Result<String, StoreError> {
        self.row.try_get(column).map_err(|error| self.corrupt(column, error))
    }

    pub(crate) fn text_if_any(&self, column: &str) -> Result<Option<String>, StoreError> {
        self.row.try_get(column).map_err(|error| self.corrupt(column, error))
    }

    /// An integer of whichever type, where the column's value is in its range.
    pub(crate) fn number<T: TryFrom<i64>>(&self, column: &str) -> Result<T, StoreError> {
        let value: i64 = self.row.try_get(column).map_err(|error| self.corrupt(column, error))?;
        T::try_from(value).map_err(|_| self.corrupt(column, format_args!("{value} is out of range")))
    }

    /// The same, where there may be none.
    pub(crate) fn number_if_any<T: TryFrom<i64>>(&self, column: &str) -> Result<Option<T>, StoreError> {
        let value: Option<i64> = self.row.try_get(column).map_err(|error| self.corrupt(column, error))?;
        let read =
            |value| T::try_from(value).map_err(|_| self.corrupt(column, format_args!("{value} is out of range")));
        value.map(read).transpose()
    }

    pub(crate) fn time(&self, column: &str) -> Result<Timestamp, StoreError> {
        self.number(column).map(Timestamp::from_millis)
    }

    pub(crate) fn time_if_any(&self, column: &str) -> Result<Option<Timestamp>, StoreError> {
        let millis: Option<i64> = self.row.try_get(column).map_err(|error| self.corrupt(column, error))?;
        Ok(millis.map(Timestamp::from_millis))
    }

    pub(crate) fn parsed<T: FromStr<Err: Display>>(&self, column: &str) -> Result<T, StoreError> {
        self.text(column)?.parse().map_err(|error| self.corrupt(column, error))
    }

    pub(crate) fn parsed_if_any<T: FromStr<Err: Display>>(&self, column: &str) -> Result<Option<T>, StoreError> {
        self.text_if_any(column)?.map(|text| text.parse().map_err(|error| self.corrupt(column, error))).transpose()
    }

    /// Words with commas between them.
    pub(crate) fn parsed_list<T: FromStr<Err: Display>>(&self, column: &str) -> Result<Vec<T>, StoreError> {
        let text = self.text(column)?;
        text.split(',').map(|word| word.parse().map_err(|error| self.corrupt(column, error))).collect()
    }

    /// A plain enum by its serialized name.
    pub(crate) fn named<T: DeserializeOwned>(&self, column: &str) -> Result<T, StoreError> {
        let text = self.text(column)?;
        T::deserialize(IntoDeserializer::<serde::de::value::Error>::into_deserializer(text))
            .map_err(|error| self.corrupt(column, error))
    }

    pub(crate) fn json<T: DeserializeOwned>(&self, column: &str) -> Result<T, StoreError> {
        serde_json::from_str(&self.text(column)?).map_err(|error| self.corrupt(column, error))
    }

    pub(crate) fn json_if_any<T: DeserializeOwned>(&self, column: &str) -> Result<Option<T>, StoreError> {
        self.text_if_any(column)?
            .map(|text| serde_json::from_str(&text).map_err(|error| self.corrupt(column, error)))
            .transpose()
    }

    /// A SHA-256 as 64 hexadecimal digits.
    pub(crate) fn sha256(&self, column: &str) -> Result<[u8; 32], StoreError> {
        let mut hash = [0; 32];
        hex::decode_to_slice(self.text(column)?, &mut hash).map_err(|error| self.corrupt(column, error))?;
        Ok(hash)
    }
}

/// Runs a writing statement with a `RETURNING` clause that touches at most one row. Reads to the statement's end:
/// stopping at the first row, as `fetch_optional` does, could return before the write is committed.
pub(crate) async fn returned<'e>(
    statement: Query<'_, Any, AnyArguments>,
    executor: impl sqlx::Executor<'e, Database = Any>,
) -> Result<Option<AnyRow>, sqlx::Error> {
    Ok(statement.fetch_all(executor).await?.pop())
}

/// A count as a column holds it. What doesn't fit is more than any machine has, so the column's largest does as well.
pub(crate) fn column(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

pub(crate) fn millis(at: Option<Timestamp>) -> Option<i64> {
    at.map(Timestamp::as_millis)
}
