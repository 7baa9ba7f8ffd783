//! Headers that say which bytes of a file a body has (`Content-Range`, RFC 9110) and what the whole file is (`Repr-Digest`, RFC 9530,
//! and `Digest`, its forerunner).
//!
//! Invariant: what isn't understood is refused, never ignored: the client would take its bytes for checked, or for written where they
//! aren't.

use axum::http::HeaderMap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tiffin_types::id::Digest;

use crate::{app::uploads::Span, error::AppError};

const RANGE: &str = "must be `bytes FIRST-LAST/TOTAL` with FIRST at most LAST and LAST below TOTAL, or `bytes */TOTAL` with an empty body; TOTAL is at least 1";
const DIGEST: &str = "must name the file's SHA-256: `sha-256=:BASE64:`";

/// What `Content-Range` says.
pub(super) fn content_range(headers: &HeaderMap) -> Result<Option<Span>, AppError> {
    let Some(value) = one(headers, "Content-Range", RANGE)? else { return Ok(None) };
    span(value).map(Some).ok_or_else(|| AppError::field("Content-Range", RANGE))
}

fn span(value: &str) -> Option<Span> {
    let (unit, range) = value.trim().split_once(' ')?;
    let (range, total) = range.trim().split_once('/')?;
    let total = number(total).filter(|total| unit.eq_ignore_ascii_case("bytes") && *total > 0)?;
    if range == "*" {
        return Some(Span::Nothing { total });
    }
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    (first <= last && last < total).then(|| Span::Part { first, end: last + 1, total })
}

/// Digits alone: `parse` takes a plus sign.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// The whole file's SHA-256, if the client says it.
pub(super) fn repr_digest(headers: &HeaderMap) -> Result<Option<Digest>, AppError> {
    let mut found = None;
    for name in ["Repr-Digest", "Digest"] {
        let Some(value) = one(headers, name, DIGEST)? else { continue };
        let digest = sha256(value).ok_or_else(|| AppError::field(name, DIGEST))?;
        if found.as_ref().is_some_and(|other| *other != digest) {
            return Err(AppError::field(name, "names another SHA-256 than Repr-Digest"));
        }
        found = Some(digest);
    }
    Ok(found)
}

/// Of several digests the one that we can check.
fn sha256(value: &str) -> Option<Digest> {
    let text = value.split(',').find_map(|entry| {
        let (name, text) = entry.trim().split_once('=')?;
        name.eq_ignore_ascii_case("sha-256").then_some(text)
    })?;
    let text = text.strip_prefix(':').map_or(Some(text), |text| text.strip_suffix(':'))?;
    let bytes: [u8; 32] = STANDARD.decode(text).ok()?.try_into().ok()?;
    Some(Digest::from_sha256(bytes))
}

fn one<'h>(headers: &'h HeaderMap, name: &str, expected: &str) -> Result<Option<&'h str>, AppError> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| AppError::field(name, expected)),
        (Some(_), Some(_)) => Err(AppError::field(name, "is given more than once: send it once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_field_writes_them() {
        assert_eq!(span("bytes 0-99/100"), Some(Span::Part { first: 0, end: 100, total: 100 }));
        assert_eq!(span("Bytes 7-7/9"), Some(Span::Part { first: 7, end: 8, total: 9 }));
        assert_eq!(span("bytes */100"), Some(Span::Nothing { total: 100 }));
        let last = u64::MAX - 1;
        let end = Some(Span::Part { first: last, end: u64::MAX, total: u64::MAX });
        assert_eq!(span(&format!("bytes {last}-{last}/{}", u64::MAX)), end);
    }

    #[test]
    fn what_makes_no_sense_is_no_range() {
        for value in [
            "",
            "bytes",
            "0-9/10",
            "bytes 0-9",
            "bytes 0-9/*",
            "bytes */*",
            "bytes 9-0/10",
            "bytes 0-10/10",
            "bytes -9/10",
            "bytes 0-/10",
            "items 0-9/10",
            "bytes +0-9/10",
            "bytes 0-9/99999999999999999999",
            "bytes */0",
            "bytes 0-9,20-29/30",
        ] {
            assert_eq!(span(value), None, "{value:?}");
        }
    }

    #[test]
    fn a_digest_is_found_among_others_in_both_forms() {
        let base64 = STANDARD.encode([7; 32]);
        let known = Some(Digest::from_sha256([7; 32]));
        for value in
            [format!("sha-256=:{base64}:"), format!("SHA-256={base64}"), format!("md5=:AA==:, sha-256=:{base64}:")]
        {
            assert_eq!(sha256(&value), known, "{value}");
        }
        for value in
            ["", "sha-512=:AAAA:", "sha-256=:AAAA:", "sha-256=", &format!("sha-256=:{base64}"), base64.as_str()]
        {
            assert_eq!(sha256(value), None, "{value}");
        }
    }
}
