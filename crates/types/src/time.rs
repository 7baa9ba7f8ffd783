//! Moments in time, as milliseconds since the Unix epoch: what the store keeps and the API shows as ISO 8601.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A moment, to the millisecond. Its text form is ISO 8601 in UTC with milliseconds: `2025-01-21T10:30:00.000Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The moment `millis` after the Unix epoch, held within the years 0 to 9998, which the text form can show.
    pub fn from_millis(millis: i64) -> Self {
        Self(millis.clamp(-62_167_219_200_000, 253_370_764_799_999))
    }

    /// Milliseconds since the Unix epoch.
    pub fn as_millis(self) -> i64 {
        self.0
    }

    /// The present moment by the system's clock.
    pub fn now() -> Self {
        Self::from_millis(jiff::Timestamp::now().as_millisecond())
    }

    /// The moment `millis` later (earlier when negative).
    pub fn plus_millis(self, millis: i64) -> Self {
        Self::from_millis(self.0.saturating_add(millis))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(at) => write!(f, "{at:.3}"),
            Err(_) => f.write_str("unknown"),
        }
    }
}

impl std::str::FromStr for Timestamp {
    type Err = jiff::Error;
    fn from_str(text: &str) -> Result<Self, jiff::Error> {
        Ok(Self::from_millis(text.parse::<jiff::Timestamp>()?.as_millisecond()))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_milliseconds_and_zone() {
        assert_eq!(Timestamp::from_millis(1_737_455_400_000).to_string(), "2025-01-21T10:30:00.000Z");
        assert_eq!(Timestamp::from_millis(1_677_874_842_096).to_string(), "2023-03-03T20:20:42.096Z");
    }

    #[test]
    fn text_parses_back_and_extremes_are_held() {
        let at = Timestamp::from_millis(1_737_455_400_123);
        assert_eq!(at.to_string().parse::<Timestamp>().unwrap(), at);
        assert!(Timestamp::from_millis(i64::MAX).to_string().starts_with("9998"));
    }
}
