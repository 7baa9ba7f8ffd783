//! The OpenAPI document: collected from the handlers, completed by what all operations share.

use utoipa::{
    OpenApi,
    openapi::{
        ContentBuilder, HttpMethod, Ref, RefOr, Required, ResponseBuilder, Server,
        path::{Operation, ParameterIn},
        security::{ApiKey, ApiKeyValue, SecurityRequirement, SecurityScheme},
    },
};

use crate::error::{ErrorBody, FieldError};

/// What the document says beside its operations.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Tiffin",
        description = "Runs other people's code in isolated VMs. Every error has the same body; see /docs/errors.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "VMs", description = "Isolated machines: made, started, stopped, deleted"),
        (name = "Programs", description = "VMs that run their image's program, for one run or cached: the second dialect"),
        (name = "Commands", description = "Commands in VMs"),
        (name = "Snapshots", description = "Saved VMs, of which others are made"),
        (name = "Files", description = "Files of VMs, below /workspace"),
        (name = "Images", description = "What VMs are made of"),
        (name = "Administration", description = "Accounts and API keys; needs the scope admin"),
        (name = "Webhooks", description = "Telling other programs of what happens; needs the scope admin"),
        (name = "Sessions", description = "Logging in with a password, for people at a browser"),
        (name = "Server", description = "The server itself; needs no key")
    ),
    components(schemas(ErrorBody, FieldError))
)]
pub(super) struct Base;

const SCHEME: &str = "apiKey";
/// Operations that do with no body: none of its fields must be there.
const OPTIONAL_BODIES: [&str; 2] = ["snapshot_create", "webhook_rotate"];
const SESSION: &str = "session";

/// The whole document, as `/openapi.json` serves it.
pub fn document() -> utoipa::openapi::OpenApi {
    super::router::operations().into_openapi()
}

/// Adds what all operations share: the key, the errors and their body.
pub(super) fn complete(document: &mut utoipa::openapi::OpenApi) {
    document.servers = Some(vec![Server::new("/")]);
    if let Some(components) = &mut document.components {
        let key = ApiKey::Header(ApiKeyValue::with_description("X-API-Key", "tfn_<prefix>_<secret>"));
        components.add_security_scheme(SCHEME, SecurityScheme::ApiKey(key));
        let cookie = ApiKey::Cookie(ApiKeyValue::with_description("rds_session", "Set by POST /auth/login"));
        components.add_security_scheme(SESSION, SecurityScheme::ApiKey(cookie));
    }
    for (path, item) in &mut document.paths.paths {
        let operations = [
            (HttpMethod::Get, &mut item.get),
            (HttpMethod::Post, &mut item.post),
            (HttpMethod::Put, &mut item.put),
            (HttpMethod::Patch, &mut item.patch),
            (HttpMethod::Delete, &mut item.delete),
        ];
        for (_, operation) in operations {
            if let Some(operation) = operation {
                complete_operation(path, operation);
            }
        }
    }
}

fn complete_operation(path: &str, operation: &mut Operation) {
    let needs_key = super::gate::is_guarded(path);
    let mut errors: Vec<u16> = vec![500];
    if needs_key {
        let either = [SCHEME, SESSION].map(|scheme| SecurityRequirement::new(scheme, Vec::<String>::new()));
        operation.security = Some(either.to_vec());
        errors.extend([401, 403]);
    }
    if path.contains('{') {
        errors.push(404);
    }
    let has_query = operation.parameters.iter().flatten().any(|parameter| match parameter {
        RefOr::T(parameter) => parameter.parameter_in == ParameterIn::Query,
        RefOr::Ref(_) => false,
    });
    if let Some(RefOr::T(body)) = &mut operation.request_body {
        let may_be_missing = operation.operation_id.as_deref().is_some_and(|id| OPTIONAL_BODIES.contains(&id));
        body.required = Some(if may_be_missing { Required::False } else { Required::True });
        errors.extend([400, 408, 413, 415]);
    } else if has_query {
        errors.push(400);
    }
    let listed = operation.responses.responses.keys().filter_map(|status| status.parse::<u16>().ok());
    let is_api = needs_key || path.starts_with("/auth/");
    errors.extend(listed.filter(|status| *status >= 400 && is_api));
    for status in errors {
        operation.responses.responses.insert(status.to_string(), RefOr::T(error_response(status)));
    }
}

fn error_response(status: u16) -> utoipa::openapi::Response {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name("ErrorBody"))).build();
    ResponseBuilder::new().description(meaning(status)).content("application/json", body).build()
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "A parameter is wrong; details.fields lists every one",
        401 => "No API key and no session, or one that isn't valid",
        403 => "The caller lacks the scope, or a page of another site made the request",
        404 => "Not found, or somebody else's",
        408 => "The body didn't arrive in time",
        409 => "In the wrong state, which the message names",
        413 => "The body, or what it stands for, is too large; the message names the limit",
        415 => "The body is of another type than the operation takes",
        426 => "The connection must become a WebSocket, and can't",
        422 => "Understood, but it can't be done",
        429 => "Over a quota or a limit; see Retry-After",
        502 => "The VM's agent failed",
        503 => "No room or too busy now; see Retry-After",
        504 => "The VM's agent didn't answer in time",
        _ => "Something inside failed; the log has it under the request's id",
    }
}
