//! Where a paged query goes on, as a short text that clients hand back.
//!
//! What comes back is judged: it must be whole, of this version, and made for the same log and the same text. It is no
//! secret and grants nothing: whoever makes one up reads from another place of a log that they may read.

use data_encoding::BASE64URL_NOPAD;
use tiffin_types::time::Timestamp;

use crate::{Cursor, Order};

/// Characters of a token, at most.
const CHARS: usize = 128;
const VERSION: u8 = 1;

/// Where a paged query goes on, and which query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) order: Order,
    /// Only lines from that time on, if the query said so.
    pub(crate) from: Option<Timestamp>,
    /// Only lines up to that time.
    pub(crate) to: Timestamp,
    /// What the answer showed as `from`.
    pub(crate) shown_from: Timestamp,
    /// Where; `None` at its beginning.
    pub(crate) place: Option<Cursor>,
}

impl Token {
    /// As text; `bound_to` is what it holds for alone.
    pub(crate) fn encode(&self, bound_to: &str) -> String {
        let order = u8::from(self.order == Order::NewestFirst);
        let mut bytes = vec![VERSION << 2 | order << 1 | u8::from(self.from.is_some())];
        let to = self.to.as_millis();
        number(&mut bytes, signed(to));
        number(&mut bytes, signed(to.wrapping_sub(self.shown_from.as_millis())));
        if let Some(from) = self.from {
            number(&mut bytes, signed(to.wrapping_sub(from.as_millis())));
        }
        if let Some(place) = self.place {
            number(&mut bytes, place.0);
        }
        let check = check(&bytes, bound_to);
        bytes.extend_from_slice(&check.to_le_bytes());
        BASE64URL_NOPAD.encode(&bytes)
    }

    /// `None` when that is no token for `bound_to`.
    pub(crate) fn decode(text: &str, bound_to: &str) -> Option<Self> {
        if text.len() > CHARS {
            return None;
        }
        let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).ok()?;
        let (body, found) = bytes.split_last_chunk::<4>()?;
        let mut rest = body;
        let head = take(&mut rest, 1)?[0];
        if head >> 2 != VERSION {
            return None;
        }
        let to = unsigned(take_number(&mut rest)?);
        let moment = |before: i64| to.checked_sub(before).map(Timestamp::from_millis);
        let shown_from = moment(unsigned(take_number(&mut rest)?))?;
        let from = if head & 1 == 1 { Some(moment(unsigned(take_number(&mut rest)?))?) } else { None };
        let place = if rest.is_empty() { None } else { Some(Cursor(take_number(&mut rest)?)) };
        let order = if head & 2 == 2 { Order::NewestFirst } else { Order::OldestFirst };
        let is_whole = rest.is_empty() && check(body, bound_to) == u32::from_le_bytes(*found);
        is_whole.then_some(Self { order, from, to: Timestamp::from_millis(to), shown_from, place })
    }
}

fn check(body: &[u8], bound_to: &str) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(body);
    hasher.update(bound_to.as_bytes());
    hasher.finalize()
}

/// Small numbers of either sign as small numbers.
fn signed(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unsigned(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

fn number(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(taken)
}

fn take_number(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for nth in 0..10 {
        let byte = take(rest, 1)?[0];
        let bits = u64::from(byte & 0x7F);
        // The tenth has room for one bit.
        if nth == 9 && bits > 1 {
            return None;
        }
        value |= bits << (7 * nth);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token(order: Order, from: Option<i64>, to: i64, place: Option<u64>) -> Token {
        let place = place.map(Cursor);
        let [to, shown_from] = [to, to - 7].map(Timestamp::from_millis);
        Token { order, from: from.map(Timestamp::from_millis), to, shown_from, place }
    }

    #[test]
    fn a_token_is_short_and_holds_for_its_query_and_log_alone() {
        let token = token(Order::OldestFirst, None, 1_700_000_000_000, Some(1_000_000));
        let text = token.encode("vm error");
        assert!(text.len() <= 24, "{text}");
        assert_eq!(Token::decode(&text, "vm error"), Some(token));
        assert_eq!(Token::decode(&text, "vm other"), None);
        for broken in ["", "x", "äöü", "====", &text[1..], &text[..text.len() - 2], &"A".repeat(10_000)] {
            assert_eq!(Token::decode(broken, "vm error"), None);
        }
    }

    proptest! {
        #[test]
        fn tokens_come_back(
            newest in any::<bool>(), from in prop::option::of(-1_000_000_000_000i64..2_000_000_000_000),
            to in -1_000_000_000_000i64..2_000_000_000_000, place in any::<Option<u64>>(),
        ) {
            let order = if newest { Order::NewestFirst } else { Order::OldestFirst };
            let token = token(order, from, to, place);
            prop_assert_eq!(Token::decode(&token.encode("x"), "x"), Some(token));
        }

        #[test]
        fn no_text_makes_it_panic(text in "[A-Za-z0-9_-]{0,60}") {
            let _ = Token::decode(&text, "x");
        }
    }
}
