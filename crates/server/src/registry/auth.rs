//! Credentials, and tokens that are given for them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderValue, Method, header};
use serde::Deserialize;
use tiffin_outbound::Request;
use url::Url;

use super::{
    RegistryError,
    challenge::Challenge,
    places::{Reach, Registries},
};
use crate::config::Secret;

/// A token server's answer is no longer.
const ANSWER_BYTES: usize = 256 << 10;
/// What a refusal says.
pub(super) const REFUSED: &str = "is refused by the registry: check the user name, and that the password or token may read this repository and hasn't expired";
pub(super) const WANTED: &str =
    "is missing: the registry gives this image, if it has it, to those alone who may read it";

/// A user's name, and the password or token.
#[derive(Debug, Clone)]
pub(crate) struct Credentials {
    pub(crate) username: String,
    pub(crate) password: Secret,
}

impl Credentials {
    /// The header that carries them.
    pub(super) fn basic(&self) -> Result<HeaderValue, RegistryError> {
        let text = STANDARD.encode(format!("{}:{}", self.username, self.password.reveal()));
        secret(format!("Basic {text}"))
    }
}

/// The header that meets a challenge.
pub(super) async fn meet(
    challenge: Challenge,
    registries: &Registries,
    reach: Reach,
    repository: &str,
    credentials: Option<&Credentials>,
) -> Result<HeaderValue, RegistryError> {
    let (realm, service, scope) = match challenge {
        Challenge::Basic => return credentials.ok_or(RegistryError::Credentials(WANTED))?.basic(),
        Challenge::Bearer { realm, service, scope } => (realm, service, scope),
    };
    let mut url = Url::parse(&realm).map_err(|_| {
        RegistryError::Failed(format!("the registry's token server is no URL: {}", super::shown(&realm)))
    })?;
    let scope = scope.unwrap_or_else(|| format!("repository:{repository}:pull"));
    url.query_pairs_mut().append_pair("scope", &scope);
    if let Some(service) = service {
        url.query_pairs_mut().append_pair("service", &service);
    }
    let mut headers = HeaderMap::new();
    if let Some(credentials) = credentials {
        headers.insert(header::AUTHORIZATION, credentials.basic()?);
    }
    let request = Request { method: Method::GET, url, headers, body: Default::default() };
    let answer = registries.send(reach, request).await?;
    match answer.status.as_u16() {
        200 => {}
        400 | 401 | 403 => {
            return Err(RegistryError::Credentials(if credentials.is_some() { REFUSED } else { WANTED }));
        }
        status => return Err(RegistryError::Failed(format!("the registry's token server answers {status}"))),
    }
    let bytes = super::session::whole(answer.body, ANSWER_BYTES).await?;
    #[derive(Deserialize)]
    struct Given {
        token: Option<String>,
        access_token: Option<String>,
    }
    let given: Given = serde_json::from_slice(&bytes)
        .map_err(|_| RegistryError::Failed("the registry's token server gives no token".into()))?;
    let token = given.token.or(given.access_token).filter(|token| !token.is_empty());
    secret(format!(
        "Bearer {}",
        token.ok_or_else(|| RegistryError::Failed("the registry's token server gives no token".into()))?
    ))
}

fn secret(text: String) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| RegistryError::Credentials("has characters that no registry's password or token has"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_written_as_the_standard_has_it() {
        let credentials = Credentials { username: "AWS".into(), password: Secret::from("tököken".to_owned()) };
        assert_eq!(credentials.basic().unwrap().to_str().unwrap(), "Basic QVdTOnTDtmvDtmtlbg==");
        assert!(!format!("{credentials:?}").contains("ken"));
    }
}
