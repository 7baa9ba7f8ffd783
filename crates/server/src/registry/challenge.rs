//! What a registry asks for when it refuses: the header `WWW-Authenticate` (RFC 9110).

/// How to come again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// With the credentials.
    Basic,
    /// With a token of that server.
    Bearer {
        /// Where it is.
        realm: String,
        /// What to tell it.
        service: Option<String>,
        /// What the token is to be for.
        scope: Option<String>,
    },
}

/// A challenge is no longer.
const BYTES: usize = 4096;

/// The challenge in a header's value that can be met; a token goes before credentials.
pub(super) fn challenge(value: &str) -> Option<Challenge> {
    if value.len() > BYTES {
        return None;
    }
    let (mut rest, mut basic) = (value.trim_start_matches([' ', ',']), None);
    while !rest.is_empty() {
        let (scheme, behind) = token(rest)?;
        let (parameters, behind) = parameters(behind);
        let named = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        match scheme.to_ascii_lowercase().as_str() {
            "bearer" => {
                if let Some(realm) = named("realm") {
                    return Some(Challenge::Bearer { realm, service: named("service"), scope: named("scope") });
                }
            }
            "basic" => basic = Some(Challenge::Basic),
            _ => {}
        }
        rest = behind.trim_start_matches([' ', ',']);
    }
    basic
}

/// `name=value` pairs, and what is behind them.
fn parameters(mut text: &str) -> (Vec<(String, String)>, &str) {
    let mut found = Vec::new();
    loop {
        let here = text.trim_start_matches([' ', ',']);
        let Some((name, behind)) = token(here) else { return (found, here) };
        // A word without a value is the next scheme.
        let Some(value) = behind.trim_start().strip_prefix('=') else { return (found, here) };
        let Some((value, behind)) = value_of(value.trim_start()) else { return (found, "") };
        found.push((name.to_ascii_lowercase(), value));
        text = behind;
    }
}

fn value_of(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, behind) = token(text)?;
        return Some((value.to_owned(), behind));
    };
    let (mut value, mut escaped) = (String::new(), false);
    for (at, character) in quoted.char_indices() {
        match character {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return Some((value, &quoted[at + 1..])),
            other => {
                value.push(other);
                escaped = false;
            }
        }
    }
    None
}

fn token(text: &str) -> Option<(&str, &str)> {
    let sound = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let end = text.find(|c| !sound(c)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(Challenge::Bearer { realm: realm.to_owned(), service: owned(service), scope: owned(scope) })
    }

    #[test]
    fn the_challenges_of_registries_are_understood() {
        let docker = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        assert_eq!(
            challenge(docker),
            bearer("https://auth.docker.io/token", Some("registry.docker.io"), Some("repository:a/b:pull,push"))
        );
        assert_eq!(
            challenge(r#"Basic realm="https://1.dkr.ecr.eu.amazonaws.com/",service="ecr.amazonaws.com""#),
            Some(Challenge::Basic)
        );
        assert_eq!(challenge(r#"basic realm="x", BEARER realm = "y\"z""#), bearer("y\"z", None, None));
        assert_eq!(challenge("Negotiate, Basic realm=x"), Some(Challenge::Basic));
        for nothing in ["", "Digest realm=\"x\"", "Bearer service=\"x\"", "Bearer realm=\"x", "=", "\"", ",,,"] {
            assert_eq!(challenge(nothing), None, "{nothing}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_challenge_or_none(text in "([Bb]asic|[Bb]earer|realm|=|\"|\\\\|,| |x){0,20}") {
            let _ = challenge(&text);
        }
    }
}
