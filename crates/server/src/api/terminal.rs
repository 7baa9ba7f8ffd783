//! `/v1/vms/{id}/terminal`: a terminal over a WebSocket.

mod session;

use std::sync::Arc;

use axum::{
    extract::{State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    http::{HeaderMap, header},
    response::Response,
};
use tiffin_protocol::TerminalSize;
use tiffin_types::{id::VmId, limits};

use super::request::{Id, KEY_HEADER, Parameters};
use crate::{
    app::{App, auth::Caller, terminal},
    error::AppError,
};

/// Open a terminal in a VM
///
/// Becomes a WebSocket. Binary messages are the terminal's bytes, both ways. Text messages are JSON: the client sends
/// `{"resize": {"cols": 120, "rows": 40}}`; the server sends, last, `{"exit": {"exitCode": 0}}` (with `timedOut` where that is
/// so) and closes with 1000. Other ends have other codes, see the documentation.
#[utoipa::path(get, path = "/v1/vms/{id}/terminal", operation_id = "terminal_open", tag = "Commands",
    params(("id" = String, Path),
        ("cols" = Option<u16>, Query, minimum = 1, maximum = 1000, description = "Columns; 80 when missing"),
        ("rows" = Option<u16>, Query, minimum = 1, maximum = 1000, description = "Rows; 24 when missing"),
        ("cmd" = Option<String>, Query, description = "What to run, as exec does; a login shell when missing", example = "htop")),
    responses((status = 101, description = "The connection is a WebSocket", body = String, content_type = "application/octet-stream"),
        (status = 409), (status = 422), (status = 426), (status = 429), (status = 502), (status = 504)))]
pub(crate) async fn terminal_open(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<VmId>,
    mut parameters: Parameters,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, AppError> {
    let cols = side(&mut parameters, "cols", limits::TERMINAL_DEFAULT.0)?;
    let rows = side(&mut parameters, "rows", limits::TERMINAL_DEFAULT.1)?;
    let bytes = limits::EXEC_CMD_BYTES;
    let expected = format!("must be a text of {} to {} bytes without NUL", bytes.start(), bytes.end());
    let cmd = parameters.optional("cmd", None, &expected, |cmd| {
        (bytes.contains(&cmd.len()) && !cmd.contains('\0') && !cmd.trim().is_empty()).then(|| Some(cmd.to_owned()))
    })?;
    parameters.finish("cols, rows and cmd are")?;
    if !headers.contains_key(KEY_HEADER) && !is_same_origin(&headers) {
        return Err(AppError::ForeignOrigin);
    }
    let upgrade = upgrade.map_err(|error| AppError::NoUpgrade(format!("send a WebSocket upgrade: {error}")))?;
    let terminal = terminal::terminal_open(&app, &caller, &id, cmd, TerminalSize { columns: cols, rows }).await?;
    let upgrade =
        upgrade.max_message_size(limits::TERMINAL_MESSAGE_BYTES).max_frame_size(limits::TERMINAL_MESSAGE_BYTES);
    Ok(upgrade.on_upgrade(async move |socket| {
        let tasks = app.tasks.clone();
        tasks.track_future(session::run(app, terminal, socket)).await;
    }))
}

fn side(parameters: &mut Parameters, name: &str, default: u16) -> Result<u16, AppError> {
    let range = limits::TERMINAL_SIDE;
    let expected = format!("must be a whole number from {} to {}", range.start(), range.end());
    parameters.optional(name, default, &expected, |text| text.parse().ok().filter(|side| range.contains(side)))
}

/// Whether the page that makes the request, if any, is of this server. A browser sends its cookies with any site's
/// WebSocket, and other sites' scripts could read what comes back: what isn't vouched for by a key, which no other site
/// has, must come from here.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    match (text(header::ORIGIN), text(header::HOST)) {
        (None, _) => true,
        (Some(origin), Some(host)) => {
            origin.split_once("://").is_some_and(|(_, authority)| authority.eq_ignore_ascii_case(host))
        }
        (Some(_), None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_this_server_are_of_the_same_origin() {
        let same = |pairs: &[(header::HeaderName, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(name, header::HeaderValue::from_static(value));
            }
            is_same_origin(&headers)
        };
        let host = (header::HOST, "tiffin.example:3000");
        assert!(same(std::slice::from_ref(&host)), "no page made it");
        assert!(same(&[host.clone(), (header::ORIGIN, "https://Tiffin.example:3000")]));
        for other in ["https://tiffin.example", "https://evil.example", "null", "", "https://tiffin.example:3000.evil"]
        {
            assert!(!same(&[host.clone(), (header::ORIGIN, other)]), "{other}");
        }
        assert!(!same(&[(header::ORIGIN, "https://tiffin.example:3000")]));
    }
}
