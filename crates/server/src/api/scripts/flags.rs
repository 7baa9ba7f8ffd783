//! Which options of `deno run` a request may name: those of a list, as a later Deno may have others that open something.
//!
//! Invariant: what is taken widens no permission, changes nothing of what runs, and is one word: an option whose value
//! stood apart would take the program's name for it.

/// Options without a value, or with one that may be left out.
const SWITCHES: [&str; 22] = [
    "--cached-only",
    "--check",
    "--deny-env",
    "--deny-ffi",
    "--deny-import",
    "--deny-net",
    "--deny-read",
    "--deny-run",
    "--deny-sys",
    "--deny-write",
    "--frozen",
    "--no-check",
    "--no-code-cache",
    "--no-config",
    "--no-lock",
    "--no-npm",
    "--no-remote",
    "--node-modules-dir",
    "--quiet",
    "--reload",
    "--unsafely-ignore-certificate-errors",
    "--vendor",
];
/// Options that need one.
const WITH_VALUE: [&str; 9] = [
    "--cert",
    "--conditions",
    "--config",
    "--import-map",
    "--location",
    "--lock",
    "--log-level",
    "--seed",
    "--v8-flags",
];
/// Features that are not stable yet; what they may do is bounded by the permissions.
const UNSTABLE: &str = "--unstable";

/// Whether the request may name this option.
pub(super) fn check(flag: &str) -> Result<(), String> {
    let (name, value) = match flag.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (flag, None),
    };
    if !name.starts_with("--") {
        return Err("must begin with --, with its value behind a =".into());
    }
    if WITH_VALUE.contains(&name) {
        let given = value.is_some_and(|value| !value.is_empty());
        return if given { Ok(()) } else { Err(format!("needs its value in the same text: {name}=...")) };
    }
    if SWITCHES.contains(&name) || name == UNSTABLE || name.starts_with("--unstable-") {
        return Ok(());
    }
    let shown: String = name.chars().take(64).collect();
    Err(format!(
        "must be an option of deno run that widens no permission and changes nothing of what runs, which {shown} is not; \
         these are: {}, {}=..., {UNSTABLE}-...",
        SWITCHES.join(", "),
        WITH_VALUE.join("=..., ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_opens_or_changes_something_is_refused() {
        for flag in [
            "-A",
            "-q",
            "--",
            "run",
            "",
            "eval",
            "--allow-all",
            "--allow-net",
            "--allow-read=/",
            "--allow-scripts",
            "--permission-set=all",
            "-P",
            "--inspect",
            "--inspect-brk=0.0.0.0:1",
            "--inspect-wait",
            "--watch",
            "--watch=x",
            "--watch-hmr",
            "--preload=x.ts",
            "--import=x.ts",
            "--require=x",
            "--env-file",
            "--env-file=/etc/x",
            "--coverage=/",
            "--ext=ts",
            "--help",
            "--version",
            "--no-prompt-at-all",
            "--Check",
            "---check",
            " --check",
            "--check --allow-all=",
            "--tunnel",
            "--connected",
        ] {
            assert!(check(flag).is_err(), "{flag}");
        }
    }

    #[test]
    fn an_option_that_needs_a_value_has_it_in_the_same_text() {
        for flag in ["--seed", "--seed=", "--import-map", "--v8-flags", "--config"] {
            assert!(check(flag).unwrap_err().contains("same text"), "{flag}");
        }
        assert_eq!(check("--seed=5"), Ok(()));
        assert_eq!(check("--v8-flags=--max-old-space-size=64"), Ok(()));
    }

    #[test]
    fn what_only_narrows_or_tunes_is_taken() {
        for flag in ["--deny-net", "--deny-net=example.com", "--no-check", "--check=all", "--unstable-kv", "--unstable"]
        {
            assert_eq!(check(flag), Ok(()), "{flag}");
        }
    }
}
