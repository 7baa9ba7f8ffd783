//! Extended headers of the POSIX format ("pax"): `LENGTH KEY=VALUE\n`, again and again.
//!
//! Few keys mean something here. `path` and `mtime` are what archivers can't say otherwise. `size` may only repeat what
//! the header itself says: two sizes are how archives are made to look different to different programs. Sparse files are
//! refused. The rest (times, owners, attributes, comments) is of no use for files that get an owner of their own.

/// What an extended header says of the entry behind it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extension {
    /// Its name.
    pub path: Option<Vec<u8>>,
    /// Its size.
    pub size: Option<u64>,
    /// When it was last changed, in whole seconds since the Unix epoch.
    pub mtime: Option<i64>,
}

/// What the records in `bytes` say. In a header for the whole archive (`global`), nothing may be said of entries.
///
/// # Errors
/// The rule that they break.
pub fn parse(mut bytes: &[u8], global: bool) -> Result<Extension, &'static str> {
    let mut said = Extension::default();
    while !bytes.is_empty() {
        let (key, value, rest) = record(bytes).ok_or("an extended header has a malformed record")?;
        bytes = rest;
        if key.starts_with(b"GNU.sparse.") || key == b"SCHILY.realsize" {
            return Err("sparse files are not accepted");
        }
        let speaks_of_entries = matches!(key, b"path" | b"linkpath" | b"size" | b"mtime");
        if global && speaks_of_entries {
            return Err("a header for the whole archive may not say what entries are");
        }
        let once = match key {
            b"path" => said.path.replace(value.to_vec()).is_none(),
            b"size" => said.size.replace(number(value).ok_or("an extended header has an unreadable size")?).is_none(),
            b"mtime" => {
                said.mtime.replace(seconds(value).ok_or("an extended header has an unreadable time")?).is_none()
            }
            b"linkpath" => return Err("links are not accepted"),
            _ => true,
        };
        if !once {
            return Err("an extended header says the same thing twice");
        }
    }
    Ok(said)
}

/// The first record's key and value, and the records behind it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    /// No header is as long as this number.
    const MAX_DIGITS: usize = 9;
    let space = bytes.iter().take(MAX_DIGITS + 1).position(|byte| *byte == b' ')?;
    let length = usize::try_from(number(&bytes[..space])?).ok()?;
    let record = bytes.get(space + 1..length)?;
    let (b'\n', text) = record.split_last()? else { return None };
    let equals = text.iter().position(|byte| *byte == b'=').filter(|at| *at > 0)?;
    Some((&text[..equals], &text[equals + 1..], &bytes[length..]))
}

fn number(digits: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Seconds, with a fraction that is left out.
fn seconds(value: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    fraction.bytes().all(|byte| byte.is_ascii_digit()).then(|| whole.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn records_are_read_whatever_their_values_hold() {
        let said = parse(b"12 path=a\nb\n22 mtime=1700000000.5\n15 comment=x=y\n", false).unwrap();
        assert_eq!(said, Extension { path: Some(b"a\nb".to_vec()), size: None, mtime: Some(1_700_000_000) });
        assert_eq!(parse(b"", false), Ok(Extension::default()));
        assert!(parse(b"15 comment=x=y\n", true).is_ok());
    }

    #[test]
    fn tricks_and_broken_records_are_refused() {
        let broken: [&[u8]; 12] = [
            b"x",
            b"5 a=b",
            b"99 path=a\n",
            b"10 path=a\n",
            b"-1 path=a\n",
            b"0 ",
            b"3 \n",
            b"5 =b\n",
            b"12 size=-12\n",
            b"10 path=a\n10 path=b\n",
            b"22 GNU.sparse.major=1\n",
            b"14 linkpath=a\n",
        ];
        for bytes in broken {
            let valid_alone = bytes == b"10 path=a\n";
            assert_eq!(parse(bytes, false).is_ok(), valid_alone, "{:?}", String::from_utf8_lossy(bytes));
        }
        for bytes in [&b"10 path=a\n"[..], b"9 size=1\n", b"11 mtime=1\n"] {
            assert!(parse(bytes, true).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_records_or_an_error(bytes in proptest::collection::vec(prop_oneof![Just(b' '), Just(b'\n'), Just(b'='), Just(b'1'), Just(b'9'), any::<u8>()], 0..80)) {
            let _ = parse(&bytes, false);
        }

        #[test]
        fn a_written_record_reads_back(value in proptest::collection::vec(any::<u8>(), 0..200)) {
            let rest = 1 + b"path=".len() + value.len() + 1;
            let length = (1..4).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length).unwrap();
            let record = [format!("{length} path=").as_bytes(), &value, b"\n"].concat();
            prop_assert_eq!(parse(&record, false).unwrap().path, Some(value));
        }
    }
}
