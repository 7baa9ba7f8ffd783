//! `/auth`: sessions in a cookie.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Extension, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tiffin_types::account::Scope;
use utoipa::ToSchema;

use super::{
    audit::{LoggedInAs, NothingDone},
    body::{JsonObject, text},
    request::Peer,
};
use crate::{
    app::{
        App,
        auth::{Actor, Caller},
        sessions,
    },
    error::AppError,
};

/// The cookie with a session's token.
pub(super) const COOKIE: &str = "rds_session";

/// Who logs in.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `session_create` reads")]
pub(crate) struct Login {
    #[schema(example = "admin@tiffin.local")]
    email: String,
    #[schema(format = Password)]
    password: String,
}

/// Who is logged in.
#[derive(Serialize, ToSchema)]
pub(crate) struct LoggedIn {
    #[schema(example = "admin@tiffin.local")]
    email: String,
}

/// Who is logged in, and what they may do.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Me {
    #[schema(example = "admin@tiffin.local")]
    email: String,
    #[schema(example = "acc-0123456789abcd")]
    account_id: String,
    #[schema(value_type = Vec<String>)]
    scopes: Vec<Scope>,
}

/// Log in
///
/// Sets the cookie `rds_session`, which then stands for an API key. Attempts are limited for each email and each address.
#[utoipa::path(post, path = "/auth/login", operation_id = "session_create", tag = "Sessions", request_body = Login,
    security(()), responses((status = 200, description = "Logged in", body = LoggedIn),
        (status = 401), (status = 403), (status = 429), (status = 503)))]
pub(crate) async fn session_create(
    State(app): State<Arc<App>>,
    Extension(Peer(peer)): Extension<Peer>,
    headers: HeaderMap,
    body: JsonObject,
) -> Result<Response, AppError> {
    let mut fields = body.fields();
    let email = fields.required("email", "must be a text", text);
    let password = fields.required("password", "must be a text", text);
    let (email, password) = fields.finish_with(email.zip(password), "email and password are")?;
    let session = sessions::session_create(&app, &email, password, Some(peer)).await?;
    let cookie = cookie(&session.token, session.lasts.as_secs(), is_secure(&app, &headers));
    let who = Extension(LoggedInAs(session.caller));
    Ok((who, [(header::SET_COOKIE, cookie)], Json(LoggedIn { email: session.email })).into_response())
}

/// Log out
///
/// Ends the session, if there is one, and takes the cookie back.
#[utoipa::path(post, path = "/auth/logout", operation_id = "session_delete", tag = "Sessions", security(()),
    responses((status = 204, description = "Logged out"), (status = 403), (status = 429)))]
pub(crate) async fn session_delete(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, AppError> {
    let is_ended = sessions::session_delete(&app, token(&headers)).await?;
    let cookie = cookie("", 0, is_secure(&app, &headers));
    let done = (!is_ended).then_some(Extension(NothingDone));
    Ok((done, (StatusCode::NO_CONTENT, [(header::SET_COOKIE, cookie)])).into_response())
}

/// Ask who is logged in
#[utoipa::path(get, path = "/auth/me", operation_id = "session_get", tag = "Sessions",
    responses((status = 200, description = "The session's user", body = Me), (status = 401)))]
pub(crate) async fn session_get(caller: Caller) -> Result<Json<Me>, AppError> {
    match &caller.actor {
        Actor::User { email, .. } => Ok(Json(Me {
            email: email.clone(),
            account_id: caller.account_id.to_string(),
            scopes: caller.scopes().to_vec(),
        })),
        Actor::Key { .. } => Err(AppError::Unauthorized("this is a request with an API key, nobody's session: log in")),
    }
}

/// The token in the request's cookie.
pub(super) fn token(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| *name == COOKIE).map(|(_, token)| token)
}

/// Whether the client came by TLS: only a proxy knows, and it is believed if the configuration says so.
fn is_secure(app: &App, headers: &HeaderMap) -> bool {
    let proto = headers.get("x-forwarded-proto").and_then(|value| value.to_str().ok()).unwrap_or("");
    app.config.http.trust_proxy
        && proto.split(',').next().is_some_and(|first| first.trim().eq_ignore_ascii_case("https"))
}

fn cookie(token: &str, seconds: u64, secure: bool) -> HeaderValue {
    let secure = if secure { "; Secure" } else { "" };
    let text = format!("{COOKIE}={token}; HttpOnly; SameSite=Lax; Path=/; Max-Age={seconds}{secure}");
    HeaderValue::from_str(&text).expect("a token is hexadecimal digits")
}

/// Where a request comes from, by what a browser says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A page of this server, or the person at the browser.
    Own,
    /// Another site's page.
    Foreign,
    /// No browser, or one that doesn't say.
    Untold,
}

/// Judges a request by `Sec-Fetch-Site`, which no page can set, else by `Origin` against `Host`.
pub(super) fn origin(headers: &HeaderMap) -> Origin {
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    match (header("sec-fetch-site"), header("origin")) {
        (Some("same-origin" | "none"), _) => Origin::Own,
        (Some(_), _) => Origin::Foreign,
        (None, Some(origin)) => {
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            let own = authority
                .is_some_and(|authority| header("host").is_some_and(|host| host.eq_ignore_ascii_case(authority)));
            if own { Origin::Own } else { Origin::Foreign }
        }
        (None, None) => Origin::Untold,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn a_foreign_page_is_known_by_what_the_browser_says() {
        for (given, is) in [
            (&[][..], Origin::Untold),
            (&[("sec-fetch-site", "same-origin")], Origin::Own),
            (&[("sec-fetch-site", "none")], Origin::Own),
            (&[("sec-fetch-site", "same-site")], Origin::Foreign),
            (&[("sec-fetch-site", "cross-site"), ("origin", "http://h:1"), ("host", "h:1")], Origin::Foreign),
            (&[("origin", "http://h:1"), ("host", "h:1")], Origin::Own),
            (&[("origin", "https://H"), ("host", "h")], Origin::Own),
            (&[("origin", "http://h:2"), ("host", "h:1")], Origin::Foreign),
            (&[("origin", "http://h.evil"), ("host", "h")], Origin::Foreign),
            (&[("origin", "null"), ("host", "null")], Origin::Foreign),
            (&[("origin", "http://h")], Origin::Foreign),
        ] {
            assert_eq!(origin(&headers(given)), is, "{given:?}");
        }
    }

    #[test]
    fn the_token_is_found_among_other_cookies() {
        assert_eq!(token(&headers(&[("cookie", "a=b; rds_session=0f;c=d")])), Some("0f"));
        assert_eq!(token(&headers(&[("cookie", "xrds_session=0f; rds_session")])), None);
    }
}
