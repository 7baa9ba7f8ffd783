//! A request's bytes, judged: who asks, and for what. Pure; runs nothing.

use tiffin_protocol::{Failure, FailureCode, Kind, Op, Request};

/// The operation that a connection's first frame asks for, when it carries `token`.
///
/// # Errors
/// A [`Failure`] to answer with: `BadRequest`, or `Unauthorized` before anything is said about the operation.
pub fn parse(kind: Kind, payload: &[u8], token: &str) -> Result<Op, Failure> {
    if kind != Kind::Request {
        return Err(failure(FailureCode::BadRequest, "the first frame must be a request"));
    }
    let request: Request = serde_json::from_slice(payload)
        .map_err(|error| failure(FailureCode::BadRequest, &format!("the request can't be read: {error}")))?;
    if !equal(request.token.as_bytes(), token.as_bytes()) {
        return Err(failure(FailureCode::Unauthorized, "the token is wrong"));
    }
    Ok(request.op)
}

/// A failure in words.
pub fn failure(code: FailureCode, message: &str) -> Failure {
    Failure { code, message: message.to_owned() }
}

/// Compares without telling by its time where the difference is.
fn equal(given: &[u8], expected: &[u8]) -> bool {
    let difference = given.iter().zip(expected).fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
    given.len() == expected.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::split_first;
    use proptest::prelude::*;
    use tiffin_protocol::{MAX_FRAME, encode};

    fn ping(token: &str) -> Vec<u8> {
        serde_json::to_vec(&Request { token: token.to_owned(), op: Op::Ping }).unwrap()
    }

    #[test]
    fn the_right_token_opens() {
        assert_eq!(parse(Kind::Request, &ping("secret"), "secret"), Ok(Op::Ping));
    }

    #[test]
    fn a_wrong_longer_shorter_or_empty_token_is_unauthorized() {
        for token in ["secreT", "secret2", "secre", ""] {
            let refused = parse(Kind::Request, &ping(token), "secret").unwrap_err();
            assert_eq!(refused.code, FailureCode::Unauthorized, "{token:?}");
        }
    }

    #[test]
    fn no_other_kind_may_come_first() {
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Request) {
            assert_eq!(parse(kind, &ping("t"), "t").unwrap_err().code, FailureCode::BadRequest);
        }
    }

    #[test]
    fn deeply_nested_json_is_refused() {
        let nested = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        assert_eq!(parse(Kind::Request, &nested, "t").unwrap_err().code, FailureCode::BadRequest);
    }

    #[test]
    fn an_oversized_frame_is_refused_by_its_header_alone() {
        let length = u32::try_from(MAX_FRAME).unwrap() + 1;
        assert!(split_first(&mut length.to_be_bytes().to_vec()).is_err());
        assert!(split_first(&mut vec![0, 0, 0, 0]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_an_error_or_incomplete(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let given = bytes.len();
            let mut bytes = bytes;
            if let Ok(Some(first)) = split_first(&mut bytes) {
                prop_assert_eq!(first.payload.len() + first.rest.len() + 5, given);
                prop_assert!(parse(first.kind, &first.payload, "secret").is_err());
            }
        }

        #[test]
        fn a_truncated_frame_waits_and_a_whole_one_is_split(payload in proptest::collection::vec(any::<u8>(), 0..300), rest in proptest::collection::vec(any::<u8>(), 0..50), cut in any::<prop::sample::Index>()) {
            let frame = encode(Kind::Request, &payload);
            let mut truncated = frame[..cut.index(frame.len())].to_vec();
            prop_assert_eq!(split_first(&mut truncated), Ok(None));
            let mut whole = [frame, rest.clone()].concat();
            let first = split_first(&mut whole).unwrap().unwrap();
            prop_assert_eq!((first.kind, first.payload, first.rest), (Kind::Request, payload, rest));
        }

        #[test]
        fn a_request_with_any_byte_changed_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut payload = ping("secret");
            let at = at.index(payload.len());
            let same = payload[at] == byte;
            payload[at] = byte;
            let parsed = parse(Kind::Request, &payload, "secret");
            prop_assert!(!same || parsed == Ok(Op::Ping));
        }
    }
}
