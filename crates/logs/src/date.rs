//! The dates that bound a query of logs, as clients write them and answers carry them.

use jiff::{Timestamp as Moment, civil::DateTime, fmt::strtime};
use tiffin_types::time::Timestamp;

/// The forms that are taken, for error texts.
pub(crate) const FORMS: &str =
    "2022-07-19T13:32:56+0000 (its + may have become a space), 2022-07-19T13:32:56Z or 2022-07-19 13:32:56 UTC";

/// Characters of a date, at most.
const CHARS: usize = 64;

/// Reads a date in one of the forms that queries of logs take. Fractions of a second may be given; what is finer than milliseconds is dropped.
pub fn read(text: &str) -> Option<Timestamp> {
    if text.len() > CHARS || !text.is_ascii() || !text.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    if let Some(utc) = text.strip_suffix(" UTC") {
        return civil(utc, ' ')
            .map(|at| at.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|at| at.timestamp()))?
            .map(stamp);
    }
    // In a query, `+` stands for a space unless it is encoded.
    let offset = text.len().checked_sub(5).and_then(|at| text.split_at_checked(at));
    let with_colon = text.len().checked_sub(6).and_then(|at| text.split_at_checked(at));
    let text = match (offset, with_colon) {
        (Some((date, zone)), _) | (_, Some((date, zone))) if is_unsigned_offset(zone) => {
            format!("{date}+{}", &zone[1..])
        }
        _ => text.to_owned(),
    };
    ["%Y-%m-%dT%H:%M:%S%.f%:z", "%Y-%m-%dT%H:%M:%S%.f%z"]
        .iter()
        .find_map(|form| Moment::strptime(form, &text).ok())
        .or_else(|| {
            civil(text.strip_suffix('Z')?, 'T')?.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|at| at.timestamp())
        })
        .map(stamp)
}

/// ` 0000` or ` 00:00`.
fn is_unsigned_offset(zone: &str) -> bool {
    let digits = zone.strip_prefix(' ').unwrap_or_default().replacen(':', "", 1);
    digits.len() == 4 && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn civil(text: &str, between: char) -> Option<DateTime> {
    let form = format!("%Y-%m-%d{between}%H:%M:%S%.f");
    strtime::parse(form, text).ok()?.to_datetime().ok()
}

fn stamp(at: Moment) -> Timestamp {
    Timestamp::from_millis(at.as_millisecond())
}

/// The second that a moment is in.
pub(crate) fn second_before(at: Timestamp) -> Timestamp {
    Timestamp::from_millis(at.as_millis().div_euclid(1000) * 1000)
}

/// The second at or after a moment.
pub(crate) fn second_after(at: Timestamp) -> Timestamp {
    second_before(at.plus_millis(999))
}

/// A moment as answers carry it: `2023-03-07 06:12:56 UTC`.
pub(crate) fn write(at: Timestamp) -> String {
    let text = at.to_string();
    let seconds = text.split(['.', 'Z']).next().unwrap_or_default();
    format!("{} UTC", seconds.replacen('T', " ", 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_three_forms_and_their_likes_are_read() {
        for (text, millis) in [
            ("2022-07-19T13:32:56+0000", 1_658_237_576_000),
            ("2022-07-19T13:32:56 0000", 1_658_237_576_000),
            ("2022-07-19T13:32:56 00:00", 1_658_237_576_000),
            ("2022-07-19T15:32:56+02:00", 1_658_237_576_000),
            ("2022-07-19T15:32:56 0200", 1_658_237_576_000),
            ("2022-07-19T05:32:56-0800", 1_658_237_576_000),
            ("2022-07-19T13:32:56Z", 1_658_237_576_000),
            ("2022-07-19T13:32:56.789Z", 1_658_237_576_789),
            ("2022-07-19T13:32:56.789123+0000", 1_658_237_576_789),
            ("2022-07-19 13:32:56 UTC", 1_658_237_576_000),
            ("2022-07-19 13:32:56.5 UTC", 1_658_237_576_500),
            ("2023-03-07 06:12:56 UTC", 1_678_169_576_000),
        ] {
            assert_eq!(read(text), Some(Timestamp::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "yesterday",
            "1658237576",
            "2022-07-19",
            "2022-07-19T13:32:56",
            "2022-07-19 13:32:56",
            "2022-13-19T13:32:56Z",
            "2022-02-30T13:32:56Z",
            "2022-07-19T13:32:56+99:00",
            "2022-07-19T13:32:56Z or so",
            " 2022-07-19T13:32:56Z",
            "2022-07-19T13:32:56 CET",
            "2022-07-19T13:32:56 é",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn seconds_are_rounded_outwards_also_before_1970() {
        let at = Timestamp::from_millis(-1500);
        assert_eq!((second_before(at).as_millis(), second_after(at).as_millis()), (-2000, -1000));
        assert_eq!(second_after(Timestamp::from_millis(5000)).as_millis(), 5000);
    }

    proptest! {
        #[test]
        fn what_answers_carry_is_read_back(seconds in -62_000_000_000i64..253_000_000_000) {
            let at = Timestamp::from_millis(seconds * 1000);
            prop_assert_eq!(read(&write(at)), Some(at));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            let _ = read(&text);
        }
    }
}
