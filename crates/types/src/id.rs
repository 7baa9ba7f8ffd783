//! Identifiers. Each noun has its own type, so that one can't be passed for another.
//!
//! The text form is the only form: it is what the API shows, the store keeps and host objects are named after.
//! Parsing is strict, so an id that parsed is safe in a path, a cgroup name or an interface name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// An id's text didn't have the form of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not {expected}")]
pub struct IdError {
    expected: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $expected:literal, $prefix:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id's text, as the API shows it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let valid: fn(&str) -> bool = $valid;
                match text.strip_prefix($prefix) {
                    Some(rest) if valid(rest) => Ok(Self(text.to_owned())),
                    _ => Err(IdError { expected: $expected }),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// A VM: `vm-` and 14 lower-case hexadecimal digits (56 random bits).
    VmId, "a VM id: vm- and 14 hexadecimal digits", "vm-", |rest| is_hex(rest, 14)
);
text_id!(
    /// An image: a 26-character upper-case ULID.
    ImageId, "an image id: a 26-character upper-case ULID", "", is_upper_ulid
);
text_id!(
    /// A snapshot: `snap-` and 14 lower-case hexadecimal digits.
    SnapshotId, "a snapshot id: snap- and 14 hexadecimal digits", "snap-", |rest| is_hex(rest, 14)
);
text_id!(
    /// An account: `acc-` and 14 lower-case hexadecimal digits.
    AccountId, "an account id: acc- and 14 hexadecimal digits", "acc-", |rest| is_hex(rest, 14)
);
text_id!(
    /// An API key's public name: `key-` and 14 lower-case hexadecimal digits. Not the secret.
    ApiKeyId, "an API key id: key- and 14 hexadecimal digits", "key-", |rest| is_hex(rest, 14)
);
text_id!(
    /// Somebody who logs in: `user-` and 14 lower-case hexadecimal digits.
    UserId, "a user id: user- and 14 hexadecimal digits", "user-", |rest| is_hex(rest, 14)
);
text_id!(
    /// A webhook: `whk-` and 14 lower-case hexadecimal digits.
    WebhookId, "a webhook id: whk- and 14 hexadecimal digits", "whk-", |rest| is_hex(rest, 14)
);
text_id!(
    /// One event for one webhook: `dlv-` and 14 lower-case hexadecimal digits.
    DeliveryId, "a delivery id: dlv- and 14 hexadecimal digits", "dlv-", |rest| is_hex(rest, 14)
);
text_id!(
    /// An event that webhooks are told of: `evt-` and 14 lower-case hexadecimal digits.
    EventId, "an event id: evt- and 14 hexadecimal digits", "evt-", |rest| is_hex(rest, 14)
);
text_id!(
    /// The SHA-256 of a blob's bytes: `sha256:` and 64 lower-case hexadecimal digits, as OCI writes digests.
    Digest, "a digest: sha256: and 64 hexadecimal digits", "sha256:", |rest| is_hex(rest, 64)
);

text_id!(
    /// What a VM's public host name begins with: a lower-case ULID.
    HostLabel, "a host label: a 26-character lower-case ULID", "", is_lower_ulid
);

macro_rules! random_id {
    ($($name:ident: $prefix:literal),*) => {$(
        impl $name {
            /// A new random id.
            pub fn random() -> Self {
                let bits: [u8; 7] = rand::random();
                Self(format!(concat!($prefix, "{}"), hex::encode(bits)))
            }
        }
    )*};
}
random_id!(VmId: "vm-", SnapshotId: "snap-", AccountId: "acc-", ApiKeyId: "key-", UserId: "user-", WebhookId: "whk-", DeliveryId: "dlv-",
    EventId: "evt-");

impl VmId {
    /// The 14 hexadecimal digits without the prefix: what host objects (cgroups, interfaces) are named after.
    pub fn hex(&self) -> &str {
        &self.0[3..]
    }
}

impl SnapshotId {
    /// The id of those bits: for names that follow from what they are of.
    pub fn from_bits(bits: [u8; 7]) -> Self {
        Self(format!("snap-{}", hex::encode(bits)))
    }
}

impl ImageId {
    /// A new id; ids made later sort later.
    pub fn random() -> Self {
        Self(ulid::Ulid::generate().to_string())
    }
}

impl HostLabel {
    /// A new label.
    pub fn random() -> Self {
        Self(ulid::Ulid::generate().to_string().to_ascii_lowercase())
    }
}

impl Digest {
    /// The digest of bytes whose SHA-256 is `hash`.
    pub fn from_sha256(hash: [u8; 32]) -> Self {
        Self(format!("sha256:{}", hex::encode(hash)))
    }

    /// The 64 hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.0[7..]
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_upper_ulid(text: &str) -> bool {
    text.len() == 26
        && text.as_bytes()[0] <= b'7'
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b.is_ascii_uppercase() && !matches!(b, b'I' | b'L' | b'O' | b'U')))
}

fn is_lower_ulid(text: &str) -> bool {
    !text.bytes().any(|b| b.is_ascii_uppercase()) && is_upper_ulid(&text.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn random_ids_parse_back() {
        assert!(VmId::random().as_str().parse::<VmId>().is_ok());
        assert!(ImageId::random().as_str().parse::<ImageId>().is_ok());
        assert!(AccountId::random().as_str().parse::<AccountId>().is_ok());
        assert!(HostLabel::random().as_str().parse::<HostLabel>().is_ok());
        assert_ne!(VmId::random(), VmId::random());
        assert!(SnapshotId::from_bits([0xa7; 7]).as_str().parse::<SnapshotId>().is_ok());
    }

    #[test]
    fn one_kind_of_id_is_no_other() {
        assert!(SnapshotId::random().as_str().parse::<VmId>().is_err());
        assert!("vm-0123456789ABCD".parse::<VmId>().is_err());
        assert!("vm-0123456789abc".parse::<VmId>().is_err());
        assert!(HostLabel::random().as_str().parse::<ImageId>().is_err());
        assert!(ImageId::random().as_str().parse::<HostLabel>().is_err());
    }

    proptest! {
        #[test]
        fn whatever_parses_is_safe_as_a_file_name(text in ".*") {
            if let Ok(id) = text.parse::<VmId>() {
                prop_assert!(id.as_str().bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'));
            }
            if let Ok(id) = text.parse::<ImageId>() {
                prop_assert!(id.as_str().bytes().all(|b| b.is_ascii_alphanumeric()));
            }
        }
    }
}
