//! What a script said of itself, read from its slip.

use serde_json::json;
use tiffin_protocol::{ExecDone, Kind, Outcome};

use crate::exec::Frame;
use crate::handover::Slip;

/// Bytes of one frame of a result.
const CHUNK: usize = 256 * 1024;

/// The frames of the outcome in `slip`, of at most `cap` bytes; none where nothing was said. A program that says that it
/// failed has failed: its exit code is no 0.
pub(super) fn frames(slip: &Slip, cap: u64, done: &mut ExecDone) -> Vec<Frame> {
    // Two lines of the most that is allowed, so that the last whole one is there even behind a broken one.
    let limit = cap.saturating_add(1).saturating_mul(2);
    let said = match slip.tail(limit) {
        Ok((bytes, cut)) => last_line(&bytes, cut, cap),
        Err(error) => Err(format!("it can't be read: {error}")),
    };
    let (json, failed) = match said {
        Ok(None) => return Vec::new(),
        Ok(Some(said)) => said,
        Err(why) => (refused(&why), true),
    };
    if failed && done.exit_code == 0 {
        done.exit_code = 1;
    }
    if json.len() as u64 > cap {
        return Vec::new();
    }
    json.chunks(CHUNK).map(|chunk| (Kind::Result, chunk.to_vec())).collect()
}

/// The outcome that the last whole line of `bytes` is, and whether there is an error in it. `cut`: there was more before.
fn last_line(bytes: &[u8], cut: bool, cap: u64) -> Result<Option<(Vec<u8>, bool)>, String> {
    let mut lines = bytes.rsplit(|byte| *byte == b'\n');
    // What is behind the last line's end was never finished.
    let (unfinished, line) = (lines.next(), lines.next());
    let Some(line) = line else {
        let nothing = unfinished.is_none_or(<[u8]>::is_empty) || !cut;
        return if nothing { Ok(None) } else { Err(too_large(cap)) };
    };
    let begins_before = cut && lines.next().is_none();
    if begins_before || line.len() as u64 > cap {
        return Err(too_large(cap));
    }
    if line.first() != Some(&b'{') {
        return Err("it is no outcome".to_owned());
    }
    // Read whole: the host does, too, and must be able to.
    let outcome: Outcome = serde_json::from_slice(line).map_err(|error| format!("it is no outcome: {error}"))?;
    Ok(Some((line.to_vec(), outcome.error.is_some())))
}

fn too_large(cap: u64) -> String {
    format!("it is larger than {cap} bytes: write large data to a file")
}

fn refused(why: &str) -> Vec<u8> {
    json!({"error": {"name": "RangeError", "message": format!("the program's result is refused: {why}")}})
        .to_string()
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(bytes: &[u8], cut: bool) -> Result<Option<(Vec<u8>, bool)>, String> {
        last_line(bytes, cut, 30)
    }

    #[test]
    fn the_last_whole_line_counts() {
        let said = |text: &str, failed| Ok(Some((text.as_bytes().to_vec(), failed)));
        assert_eq!(line(b"", false), Ok(None));
        assert_eq!(line(b"{\"resu", false), Ok(None));
        assert_eq!(line(b"{\"result\":1}\n", false), said("{\"result\":1}", false));
        assert_eq!(line(b"{\"result\":1}\n{\"result\":2}\n", false), said("{\"result\":2}", false));
        assert_eq!(line(b"{\"result\":1}\n{\"result\":2}\n{\"re", true), said("{\"result\":2}", false));
        assert_eq!(line(b"{\"error\":null}\n", false), said("{\"error\":null}", true));
    }

    #[test]
    fn what_is_too_large_or_no_outcome_is_told() {
        assert!(line(b"7}\n", true).unwrap_err().contains("30 bytes"));
        assert!(line(b"7777777777777", true).unwrap_err().contains("30 bytes"));
        assert!(line(format!("{{\"result\":\"{}\"}}\n", "a".repeat(30)).as_bytes(), false).is_err());
        for nonsense in ["{\n", "[]\n", "\n", "{\"result\":\n", "\u{1}\n"] {
            assert!(line(nonsense.as_bytes(), false).is_err(), "{nonsense:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_outcome_nothing_or_refused(bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'{'), Just(b'}'), any::<u8>()], 0..80), cut in any::<bool>()) {
            if let Ok(Some((said, _))) = line(&bytes, cut) {
                prop_assert!(said.len() <= 30 && serde_json::from_slice::<Outcome>(&said).is_ok());
            }
        }
    }
}
