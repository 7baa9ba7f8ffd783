//! Extended headers of tar's POSIX format ("pax"): `LENGTH KEY=VALUE\n`, again and again.
//!
//! Read as the archivers of images write them: a key that is given twice has its last value, an empty value takes the
//! header's own. Keys that mean nothing for an image (comments, other times, names of owners) are passed over.

use crate::erofs::tree::{Part, Xattr};

/// Parts of a sparse file.
pub(super) const MAX_PARTS: usize = 65_536;

/// What an extended header says of the entry behind it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Extension {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<i64>,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) sparse: Option<Sparse>,
}

/// What GNU tar says of a sparse file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sparse {
    /// Whether the parts are listed at the beginning of the content (version 1.0).
    pub(super) listed_in_content: bool,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) parts: Vec<Part>,
    /// An offset whose length is still to come.
    offset: Option<u64>,
}

/// What the records say.
pub(super) fn parse(mut bytes: &[u8]) -> Result<Extension, &'static str> {
    let mut said = Extension::default();
    while !bytes.is_empty() {
        let (key, value, rest) = record(bytes).ok_or("an extended header has a malformed record")?;
        bytes = rest;
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let whole = || match value {
            b"" => Ok(None),
            digits => number(digits).map(Some).ok_or("an extended header has an unreadable number"),
        };
        match key {
            b"path" => said.path = text(),
            b"linkpath" => said.link = text(),
            b"size" => said.size = whole()?,
            b"uid" => said.uid = whole()?,
            b"gid" => said.gid = whole()?,
            b"mtime" => said.mtime = seconds(value),
            _ => match key.strip_prefix(b"SCHILY.xattr.") {
                Some(name) => {
                    said.xattrs.retain(|xattr| xattr.name != name);
                    said.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
                }
                None => sparse(key, value, &mut said.sparse)?,
            },
        }
    }
    Ok(said)
}

fn sparse(key: &[u8], value: &[u8], said: &mut Option<Sparse>) -> Result<(), &'static str> {
    const UNREADABLE: &str = "an extended header describes a sparse file in a way that can't be read";
    let Some(key) = key.strip_prefix(b"GNU.sparse.") else { return Ok(()) };
    let said = said.get_or_insert_default();
    let whole = || number(value).ok_or(UNREADABLE);
    match key {
        b"major" => said.listed_in_content = whole()? == 1,
        b"minor" | b"numblocks" => drop(whole()?),
        b"name" => said.name = Some(value.to_vec()),
        b"size" | b"realsize" => said.size = Some(whole()?),
        b"offset" => said.offset = Some(whole()?),
        b"numbytes" => {
            let at = said.offset.take().ok_or(UNREADABLE)?;
            said.parts.push(Part { at, length: whole()? });
        }
        b"map" => {
            let numbers =
                value.split(|byte| *byte == b',').map(number).collect::<Option<Vec<u64>>>().ok_or(UNREADABLE)?;
            let (pairs, []) = numbers.as_chunks::<2>() else { return Err(UNREADABLE) };
            said.parts = pairs.iter().map(|[at, length]| Part { at: *at, length: *length }).collect();
        }
        _ => return Err(UNREADABLE),
    }
    if said.parts.len() > MAX_PARTS { Err("a sparse file has too many parts") } else { Ok(()) }
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

/// A decimal number, nothing beside it.
pub(super) fn number(digits: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Seconds, with a fraction that is left out; one that makes no sense is none.
fn seconds(value: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(value).ok()?;
    text.split_once('.').map_or(text, |(whole, _)| whole).parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = 1 + key.len() + 1 + value.len() + 1;
        let length = (1..6).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length);
        [format!("{} {key}=", length.unwrap()).as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn the_last_value_counts_and_an_empty_one_takes_it_back() {
        let said = parse(&[one("path", b"a"), one("path", b"b\nc"), one("uid", b"70000")].concat()).unwrap();
        assert_eq!((said.path.as_deref(), said.uid), (Some(&b"b\nc"[..]), Some(70_000)));
        let said = parse(&[one("path", b"a"), one("path", b""), one("mtime", b"12.5")].concat()).unwrap();
        assert_eq!((said.path, said.mtime), (None, Some(12)));
    }

    #[test]
    fn each_way_to_tell_of_a_sparse_file_is_read() {
        let part = |at, length| Part { at, length };
        let said = parse(&one("GNU.sparse.map", b"0,5,100,2")).unwrap().sparse.unwrap();
        assert_eq!(said.parts, [part(0, 5), part(100, 2)]);
        let pairs = [("offset", "7"), ("numbytes", "1"), ("offset", "9"), ("numbytes", "2")];
        let records: Vec<u8> =
            pairs.iter().flat_map(|(key, value)| one(&format!("GNU.sparse.{key}"), value.as_bytes())).collect();
        assert_eq!(parse(&records).unwrap().sparse.unwrap().parts, [part(7, 1), part(9, 2)]);
        for broken in [("map", "1,2,3"), ("map", "a"), ("numbytes", "1"), ("surprise", "1"), ("realsize", "-1")] {
            assert!(parse(&one(&format!("GNU.sparse.{}", broken.0), broken.1.as_bytes())).is_err(), "{broken:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_records_or_an_error(bytes in proptest::collection::vec(prop_oneof![Just(b' '), Just(b'\n'), Just(b'='), Just(b'1'), Just(b'9'), any::<u8>()], 0..80)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_written_attribute_reads_back(value in proptest::collection::vec(any::<u8>(), 0..200)) {
            let said = parse(&one("SCHILY.xattr.user.x", &value)).unwrap();
            prop_assert_eq!(said.xattrs, vec![Xattr { name: b"user.x".to_vec(), value }]);
        }
    }
}
