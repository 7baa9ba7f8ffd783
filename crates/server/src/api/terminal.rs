//! `/v1/vms/{id}/terminal`: a terminal over a WebSocket. That no other site's page opens one with a user's cookie is the gate's
//! business, as for all that upgrades.

mod session;

use std::sync::Arc;

use axum::{
    extract::{Extension, State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    response::Response,
};
use tiffin_protocol::TerminalSize;
use tiffin_types::{id::VmId, limits};

use super::request::{Id, Parameters, Place};
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
    Extension(place): Extension<Place>,
    Id(id): Id<VmId>,
    mut parameters: Parameters,
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
    let upgrade = upgrade.map_err(|error| AppError::NoUpgrade(format!("send a WebSocket upgrade: {error}")))?;
    let terminal = terminal::terminal_open(&app, &caller, &id, cmd, TerminalSize { columns: cols, rows }).await?;
    let upgrade =
        upgrade.max_message_size(limits::TERMINAL_MESSAGE_BYTES).max_frame_size(limits::TERMINAL_MESSAGE_BYTES);
    Ok(upgrade.on_upgrade(async move |socket| {
        let tasks = app.tasks.clone();
        tasks.track_future(session::run(app, caller, terminal, socket)).await;
        // As long as the terminal is open, its connection counts.
        drop(place);
    }))
}

fn side(parameters: &mut Parameters, name: &str, default: u16) -> Result<u16, AppError> {
    let range = limits::TERMINAL_SIDE;
    let expected = format!("must be a whole number from {} to {}", range.start(), range.end());
    parameters.optional(name, default, &expected, |text| text.parse().ok().filter(|side| range.contains(side)))
}
