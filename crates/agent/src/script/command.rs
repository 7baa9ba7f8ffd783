//! The command line that runs a script.

use std::path::Path;

use tiffin_protocol::{Failure, FailureCode, Runtime, Script, Source};

use crate::handover::Handover;
use crate::request::failure;

/// Where scripts run, and where their files are.
pub(super) const WORKSPACE: &str = "/workspace";

/// Where programs put temporary files.
const TEMPORARY: &str = "/tmp";

/// The variable that tells the prelude where the slip is, and how much it may hold. The prelude takes it away.
pub(super) const VARIABLE: &str = "TIFFIN_OUTCOME";

/// The preludes' names in the handover.
pub(super) const DENO_PRELUDE: &str = "deno.mjs";
pub(super) const NODE_PRELUDE: &str = "node.cjs";

/// Program and arguments for `script`, whose slip is at `slip`.
///
/// # Errors
/// `BadRequest` or `Forbidden`, saying which field is wrong.
pub(super) fn of(script: &Script, handover: &Handover, slip: &Path) -> Result<Vec<String>, Failure> {
    check(script)?;
    let mut command = match script.runtime {
        Runtime::Deno => deno(script, &handover.path(DENO_PRELUDE), slip),
        Runtime::Node => node(script, &handover.path(NODE_PRELUDE)),
    };
    command.push(match &script.source {
        Source::Inline => "-".to_owned(),
        Source::Path(path) => path.clone(),
    });
    command.extend(script.args.iter().cloned());
    Ok(command)
}

/// The runtime's name.
pub(super) fn program(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Deno => "deno",
        Runtime::Node => "node",
    }
}

fn deno(script: &Script, prelude: &Path, slip: &Path) -> Vec<String> {
    let mut command = vec!["deno".to_owned(), "run".to_owned()];
    command.extend(script.flags.iter().cloned());
    let mut add = |option: String| command.push(option);
    add("--quiet".to_owned());
    add("--no-prompt".to_owned());
    add(format!("--preload={}", prelude.display()));
    if !script.network {
        // What an earlier script has fetched can still be used; everything else fails at once, and says why.
        add("--cached-only".to_owned());
    }
    // What the caller allows altogether can't be said again in part: Deno would refuse it, or take the part alone.
    if allows_all(&script.flags, "--allow-all", 'A') {
        return command;
    }
    let mut allow = |option: &str, letter: char, what: String| {
        if !allows_all(&script.flags, option, letter) {
            command.push(format!("{option}={what}"));
        }
    };
    allow("--allow-read", 'R', format!("{WORKSPACE},{TEMPORARY}"));
    allow("--allow-write", 'W', format!("{WORKSPACE},{TEMPORARY},{}", slip.display()));
    let names = script.env.keys().map(String::as_str).chain([VARIABLE]).collect::<Vec<_>>();
    allow("--allow-env", 'E', names.join(","));
    for (option, letter) in [("--allow-net", "-N"), ("--allow-import", "-I")] {
        // All of it, unless the caller has named a part.
        if script.network && !script.flags.iter().any(|flag| flag.starts_with(option) || flag.starts_with(letter)) {
            command.push(option.to_owned());
        }
    }
    command
}

/// Whether `flags` have `option`, or its `letter`, without saying what for.
fn allows_all(flags: &[String], option: &str, letter: char) -> bool {
    let in_letters = |flag: &str| !flag.starts_with("--") && !flag.contains('=') && flag.contains(letter);
    flags.iter().any(|flag| flag == option || in_letters(flag))
}

fn node(script: &Script, prelude: &Path) -> Vec<String> {
    let mut command = vec!["node".to_owned()];
    command.extend(script.flags.iter().cloned());
    command.push("--require".to_owned());
    command.push(prelude.display().to_string());
    if script.source == Source::Inline {
        command.push("--input-type=module".to_owned());
    }
    command
}

fn check(script: &Script) -> Result<(), Failure> {
    if let Some(flag) = script.flags.iter().find(|flag| !flag.starts_with('-') || matches!(flag.as_str(), "-" | "--")) {
        let message =
            format!("the flag {flag:?} must begin with - and have its value behind a =, such as --name=value");
        return Err(failure(FailureCode::BadRequest, &message));
    }
    let is_plain = |name: &str| {
        !name.is_empty()
            && !name.starts_with(|first: char| first.is_ascii_digit())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    if let Some(name) = script.env.keys().find(|name| !is_plain(name) || *name == VARIABLE) {
        let message =
            format!("the environment variable's name {name:?} must be of letters, digits and _, and not {VARIABLE}");
        return Err(failure(FailureCode::BadRequest, &message));
    }
    if let Source::Path(path) = &script.source {
        let below = path.strip_prefix(WORKSPACE).and_then(|rest| rest.strip_prefix('/'));
        if below.is_none_or(|rest| rest.split('/').any(|name| matches!(name, "" | "." | ".."))) {
            let message =
                format!("the program {path:?} must be a path below {WORKSPACE}, without empty names, . and ..");
            return Err(failure(FailureCode::Forbidden, &message));
        }
    }
    Ok(())
}
