//! `/auth`: logging in, what a session may do, and how it ends.

use std::time::Instant;

use anyhow::{Context, Result};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Reply, Server, send, small_vm, until};

const EMAIL: &str = "admin@tiffin.local";

/// The first user's password.
async fn password(server: &Server) -> Result<String> {
    let login = tiffin_server::first_login(&server.store, EMAIL).await?.context("the first user is made")?;
    assert_eq!(login.email, EMAIL);
    Ok(login.password)
}

async fn log_in(server: &Server, email: &str, password: &str) -> Result<Reply> {
    let body = json!({ "email": email, "password": password });
    send(server.client.post(format!("{}/auth/login", server.url)).json(&body)).await
}

/// What a browser sends back of the answer's cookie.
fn cookie(reply: &Reply) -> String {
    let set = reply.headers["set-cookie"].to_str().expect("ASCII");
    set.split(';').next().expect("a cookie").to_owned()
}

/// A session's cookie.
async fn session(server: &Server) -> Result<String> {
    let reply = log_in(server, EMAIL, &password(server).await?).await?;
    assert_eq!(reply.ok(200), json!({ "email": EMAIL }));
    Ok(cookie(&reply))
}

async fn with(server: &Server, cookie: &str, method: Method, path: &str, more: &[(&str, &str)]) -> Result<Reply> {
    let mut request = server.client.request(method, format!("{}{path}", server.url)).header("Cookie", cookie);
    for (name, value) in more {
        request = request.header(*name, *value);
    }
    send(request).await
}

#[tokio::test]
async fn a_session_stands_for_a_key_until_its_user_logs_out() -> Result<()> {
    let server = Server::start().await?;
    let cookie = session(&server).await?;
    let me = with(&server, &cookie, Method::GET, "/auth/me", &[]).await?.ok(200);
    assert_eq!((&me["email"], &me["scopes"]), (&json!(EMAIL), &json!(["admin"])));
    let accounts = with(&server, &cookie, Method::GET, "/v1/admin/accounts", &[]).await?.ok(200);
    assert_eq!(accounts[0]["id"], me["accountId"], "the user is of the first account");

    let reply = with(&server, &cookie, Method::POST, "/auth/logout", &[]).await?;
    reply.ok(204);
    assert!(
        reply.headers["set-cookie"].to_str()?.contains("rds_session=; ")
            && reply.headers["set-cookie"].to_str()?.contains("Max-Age=0")
    );
    for path in ["/auth/me", "/v1/vms"] {
        assert!(with(&server, &cookie, Method::GET, path, &[]).await?.refused(401, "unauthorized").contains("log in"));
    }
    with(&server, &cookie, Method::POST, "/auth/logout", &[]).await?.ok(204);
    server.get("/auth/me").await?.refused(401, "unauthorized");
    Ok(())
}

#[tokio::test]
async fn the_cookie_is_for_this_server_alone_and_secure_where_a_trusted_proxy_does_tls() -> Result<()> {
    for (trusted, secure) in [("false", false), ("true", true)] {
        let server = Server::start_with(&[("http.trust_proxy", trusted), ("session.max_s", "100")]).await?;
        let body = json!({ "email": EMAIL, "password": password(&server).await? });
        let request = server.client.post(format!("{}/auth/login", server.url)).json(&body);
        let reply = send(request.header("X-Forwarded-Proto", "https")).await?;
        let set = reply.headers["set-cookie"].to_str()?;
        let parts: Vec<&str> = set.split("; ").collect();
        assert_eq!(&parts[1..5], ["HttpOnly", "SameSite=Lax", "Path=/", "Max-Age=100"]);
        assert_eq!(parts.contains(&"Secure"), secure, "{set}");
        let token = parts[0].strip_prefix("rds_session=").context("the cookie's name")?;
        assert!(token.len() == 64 && token.bytes().all(|b| b.is_ascii_hexdigit()), "256 bits");
    }
    Ok(())
}

#[tokio::test]
async fn wrong_emails_and_passwords_get_the_same_answer_and_no_cookie() -> Result<()> {
    let server = Server::start().await?;
    let right = password(&server).await?;
    let mut messages = Vec::new();
    for (email, password) in
        [(EMAIL, "wrong"), (EMAIL, ""), ("nobody@tiffin.local", right.as_str()), ("", right.as_str()), ("x", "y")]
    {
        let reply = log_in(&server, email, password).await?;
        messages.push(reply.refused(401, "unauthorized"));
        assert!(!reply.headers.contains_key("set-cookie"));
    }
    messages.dedup();
    assert_eq!(messages.len(), 1, "{messages:?}");
    log_in(&server, &EMAIL.to_uppercase(), &right).await?.ok(200);
    assert!(tiffin_server::first_login(&server.store, EMAIL).await?.is_none(), "there is one first user");
    Ok(())
}

#[tokio::test]
async fn attempts_are_limited_by_email_and_by_address_and_a_key_still_works() -> Result<()> {
    let server = Server::start_with(&[("rate.login_per_min", "3"), ("rate.login_address_per_min", "20")]).await?;
    let began = Instant::now();
    let tries = join_all((0..12).map(|_| log_in(&server, EMAIL, "wrong"))).await;
    let tries = tries.into_iter().collect::<Result<Vec<_>>>()?;
    let told = tries.iter().filter(|reply| reply.status == 401).count();
    // One comes back every twenty seconds.
    let back = usize::try_from(began.elapsed().as_secs() / 20)?;
    assert!((3..=3 + back).contains(&told), "{told}");
    for refused in tries.iter().filter(|reply| reply.status != 401) {
        refused.refused(429, "rate_limited");
        assert!(refused.headers["retry-after"].to_str()?.parse::<u32>()? <= 20, "it passes");
    }
    log_in(&server, "other@tiffin.local", "x").await?.refused(401, "unauthorized");
    // What can be no email is refused at once and counts all the same.
    let mut number = 0;
    until("an address has a limit of its own", async || {
        number += 1;
        Ok(log_in(&server, &format!("nobody {number}"), "x").await?.status == 429)
    })
    .await?;
    server.get("/v1/vms").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn somebody_elses_attempts_do_not_lock_an_email_out() -> Result<()> {
    for (trusted, is_let_in) in [("true", true), ("false", false)] {
        let server = Server::start_with(&[("http.trust_proxy", trusted), ("rate.login_per_min", "1")]).await?;
        let right = password(&server).await?;
        let log_in = async |hops: &str, password: &str| {
            let request = server.client.post(format!("{}/auth/login", server.url)).header("X-Forwarded-For", hops);
            send(request.json(&json!({ "email": EMAIL, "password": password }))).await
        };
        until("the attacker is refused", async || Ok(log_in("192.0.2.1", "x").await?.status == 429)).await?;
        // What a client writes itself comes before what the proxy adds.
        until("also with a lie", async || Ok(log_in("198.51.100.7, 192.0.2.1", "x").await?.status == 429)).await?;
        let reply = log_in("192.0.2.1, 203.0.113.9", &right).await?;
        if is_let_in {
            reply.ok(200);
            let entry = &server.get("/v1/admin/activity").await?.ok(200)[0];
            assert_eq!((&entry["status"], &entry["peer"]), (&json!(200), &json!("203.0.113.9")));
        } else {
            reply.refused(429, "rate_limited");
        }
    }
    Ok(())
}

#[tokio::test]
async fn what_another_sites_page_makes_a_browser_send_changes_nothing() -> Result<()> {
    let server = Server::start().await?;
    let cookie = session(&server).await?;
    let own = server.url.clone();
    let post = async |more: &[(&str, &str)]| with(&server, &cookie, Method::POST, "/v1/admin/accounts", more).await;
    for foreign in [
        &[][..],
        &[("Origin", "http://evil.example")],
        &[("Origin", "null")],
        &[("Sec-Fetch-Site", "cross-site")],
        &[("Sec-Fetch-Site", "same-site"), ("Origin", own.as_str())],
    ] {
        post(foreign).await?.refused(403, "csrf");
    }
    // Let through, they fail at the body.
    post(&[("Origin", &own)]).await?.refused(400, "bad_request");
    post(&[("Sec-Fetch-Site", "same-origin")]).await?.refused(400, "bad_request");
    with(&server, &cookie, Method::GET, "/v1/vms", &[("Sec-Fetch-Site", "cross-site")]).await?.ok(200);
    let upgrade = [("Upgrade", "websocket"), ("Connection", "upgrade"), ("Sec-Fetch-Site", "cross-site")];
    with(&server, &cookie, Method::GET, "/v1/vms", &upgrade).await?.refused(403, "csrf");
    for path in ["/auth/login", "/auth/logout"] {
        with(&server, &cookie, Method::POST, path, &[("Sec-Fetch-Site", "cross-site")]).await?.refused(403, "csrf");
    }
    with(&server, &cookie, Method::GET, "/auth/me", &[]).await?.ok(200);

    let vm = server.request(Method::POST, "/v1/vms").header("Origin", "http://evil.example").json(&small_vm());
    send(vm.header("Cookie", &cookie)).await?.ok(201);
    Ok(())
}

#[tokio::test]
async fn of_a_key_and_a_session_the_key_counts() -> Result<()> {
    let server = Server::start().await?;
    let cookie = session(&server).await?;
    let reader = server.other_key("reader", &["read"]).await?;
    let both = [("X-API-Key", reader.as_str())];
    with(&server, &cookie, Method::GET, "/v1/admin/accounts", &both).await?.refused(403, "forbidden");
    with(&server, &cookie, Method::GET, "/v1/vms", &[("X-API-Key", "wrong")]).await?.refused(401, "unauthorized");
    Ok(())
}

#[tokio::test]
async fn a_session_outlives_the_server_and_ends_with_its_users_password() -> Result<()> {
    let mut server = Server::start().await?;
    let cookie = session(&server).await?;
    server.restart().await?;
    with(&server, &cookie, Method::GET, "/auth/me", &[]).await?.ok(200);
    let too_short = tiffin_server::set_password(&server.store, EMAIL, "short".into()).await.unwrap_err();
    assert!(too_short.to_string().contains("12 to 256"), "{too_short}");
    assert!(tiffin_server::set_password(&server.store, "x@y", "long enough for it".into()).await.is_err());
    with(&server, &cookie, Method::GET, "/auth/me", &[]).await?.ok(200);
    tiffin_server::set_password(&server.store, EMAIL, "long enough for it".into()).await?;
    with(&server, &cookie, Method::GET, "/auth/me", &[]).await?.refused(401, "unauthorized");
    log_in(&server, EMAIL, "long enough for it").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn a_session_ends_at_its_age_however_much_it_is_used() -> Result<()> {
    let server = Server::start_with(&[("session.max_s", "1"), ("session.idle_s", "1000")]).await?;
    let cookie = session(&server).await?;
    until("the session has ended", async || {
        Ok(with(&server, &cookie, Method::GET, "/auth/me", &[]).await?.status == 401)
    })
    .await
}

#[tokio::test]
async fn a_token_is_kept_as_its_hash_alone() -> Result<()> {
    let server = Server::start().await?;
    let cookie = session(&server).await?;
    let token = cookie.strip_prefix("rds_session=").context("a token")?;
    let mut raw = [0; 32];
    hex::decode_to_slice(token, &mut raw)?;
    assert!(server.store.session_get(raw).await?.is_none());
    let sha256: [u8; 32] = <sha2::Sha256 as sha2::Digest>::digest(token.as_bytes()).into();
    assert!(server.store.session_get(sha256).await?.is_some());
    Ok(())
}

#[tokio::test]
async fn a_login_that_is_no_login_names_what_is_missing() -> Result<()> {
    let server = Server::start().await?;
    let post = async |body: Value| send(server.client.post(format!("{}/auth/login", server.url)).json(&body)).await;
    assert!(post(json!({ "email": EMAIL })).await?.refused(400, "invalid_parameter").contains("password"));
    post(json!({ "email": 1, "password": [] })).await?.refused(400, "invalid_parameter");
    post(json!({ "email": EMAIL, "password": "x".repeat(100_000) })).await?.refused(401, "unauthorized");
    Ok(())
}
