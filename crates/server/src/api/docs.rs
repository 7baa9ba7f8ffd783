//! `/docs`: the user documentation, from Markdown that is part of the program.

use std::sync::LazyLock;

use axum::{
    extract::Path,
    http::header,
    response::{Html, IntoResponse, Redirect, Response},
};
use pulldown_cmark::{Options, Parser, html};

use crate::{config, error::AppError};

/// The pages, in the order of the navigation.
const PAGES: &[(&str, &str, &str)] = &[
    ("index", "Tiffin", include_str!("../../../../docs/user/index.md")),
    ("quickstart", "Quick start", include_str!("../../../../docs/user/quickstart.md")),
    ("api", "API", include_str!("../../../../docs/user/api.md")),
    ("programs", "Programs", include_str!("../../../../docs/user/programs.md")),
    ("logs", "What programs print", include_str!("../../../../docs/user/logs.md")),
    ("scripts", "Scripts", include_str!("../../../../docs/user/scripts.md")),
    ("images", "Images", include_str!("../../../../docs/user/images.md")),
    ("importing-images", "Importing images", include_str!("../../../../docs/user/importing-images.md")),
    ("errors", "Errors", include_str!("../../../../docs/user/errors.md")),
    ("admin", "Administration", include_str!("../../../../docs/user/admin.md")),
    ("webhooks", "Webhooks", include_str!("../../../../docs/user/webhooks.md")),
    ("snapshots", "Snapshots", include_str!("../../../../docs/user/snapshots.md")),
    ("ingress", "Reaching programs in VMs", include_str!("../../../../docs/user/ingress.md")),
    ("engines", "Engines", include_str!("../../../../docs/user/engines.md")),
    ("networking", "Networking", include_str!("../../../../docs/user/networking.md")),
    ("cli", "Command line", include_str!("../../../../docs/user/cli.md")),
    ("configuration", "Configuration", include_str!("../../../../docs/user/configuration.md")),
];

/// Stands in the configuration page for the table of settings.
const SETTINGS: &str = "<!-- settings -->";

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222;\
background:#fff}nav a{margin-right:1rem}pre,code{background:#f3f3f3;border-radius:4px}pre{padding:.8rem;overflow:auto}\
code{padding:.1rem .25rem}pre code{padding:0}table{border-collapse:collapse;display:block;overflow:auto}\
td,th{border:1px solid #ccc;padding:.3rem .5rem;text-align:left;vertical-align:top}";

static RENDERED: LazyLock<Vec<(&str, String)>> =
    LazyLock::new(|| PAGES.iter().map(|(name, title, text)| (*name, render(title, text))).collect());

/// The first page.
pub(super) async fn docs_index() -> Response {
    page("index").unwrap_or_else(IntoResponse::into_response)
}

/// Relative links work from `/docs/` only.
pub(super) async fn docs_redirect() -> Redirect {
    Redirect::permanent("/docs/")
}

/// One page, by its name.
pub(super) async fn docs_page(name: Result<Path<String>, axum::extract::rejection::PathRejection>) -> Response {
    let name = name.map_or_else(|_| String::new(), |Path(name)| name);
    page(name.trim_end_matches(".md")).unwrap_or_else(IntoResponse::into_response)
}

fn page(name: &str) -> Result<Response, AppError> {
    let found = RENDERED.iter().find(|(known, _)| *known == name);
    let (_, body) = found.ok_or(AppError::NotFound("page"))?;
    let policy = (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'");
    Ok(([policy], Html(body.as_str())).into_response())
}

fn render(title: &str, text: &str) -> String {
    let text = text.replace(SETTINGS, &config::document());
    let mut body = String::new();
    html::push_html(&mut body, Parser::new_ext(&text, Options::ENABLE_TABLES));
    let link = |(name, title, _): &(&str, &str, &str)| format!("<a href=\"/docs/{name}\">{title}</a>");
    let links: String = PAGES.iter().map(link).collect();
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body><nav>{links}\
         <a href=\"/swagger/\">Swagger</a></nav>{body}</body></html>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_page_lists_every_setting() {
        let (_, page) = RENDERED.iter().find(|(name, _)| *name == "configuration").unwrap();
        for key in config::KEYS.iter().filter(|key| !key.hidden) {
            assert!(page.contains(&format!("<code>{}</code>", key.name)), "{}", key.name);
        }
    }

    #[test]
    fn every_page_is_linked_from_every_other_and_no_link_is_dead() {
        for (name, page) in RENDERED.iter() {
            for (other, _, _) in PAGES {
                assert!(page.contains(&format!("/docs/{other}")), "{name} lacks {other}");
            }
            for link in page.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
                let local = link.strip_prefix("/docs/").or_else(|| link.strip_suffix(".md"));
                if let Some(target) = local {
                    let target = target.split('#').next().unwrap_or("");
                    assert!(target.is_empty() || PAGES.iter().any(|(known, _, _)| *known == target), "{name}: {link}");
                }
            }
        }
    }
}
