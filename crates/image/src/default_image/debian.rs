//! Debian packages into a folder, from the machine's own mirror.

use std::{fs, process::Command, time::Duration};

use camino::Utf8Path;

use super::{BuildError, Package, recipe};
use crate::tool;

/// On a slow line, a hundred megabytes.
const LIMIT: Duration = Duration::from_secs(900);
const QUERY_LIMIT: Duration = Duration::from_secs(30);
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Unpacks and configures the recipe's packages under `root`; `work` takes the lists of sources and options.
///
/// It runs in process and mount namespaces of its own: when it is killed, its mounts and its children go with it.
pub(super) fn unpack(
    work: &Utf8Path,
    root: &Utf8Path,
    mirror: Option<&str>,
    on_line: &mut dyn FnMut(String),
) -> Result<(), BuildError> {
    let (sources, options) = (work.join("sources.list"), work.join("apt.conf"));
    fs::write(&sources, source_list(mirror)?).map_err(BuildError::io(&sources))?;
    fs::write(&options, apt_options()?).map_err(BuildError::io(&options))?;

    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "mmdebstrap"]);
    command.args(["--variant=minbase", "--mode=root", "--format=directory"]);
    command.arg(format!("--include={}", recipe::packages().collect::<Vec<_>>().join(",")));
    command.arg(format!("--aptopt={options}"));
    command.arg("--aptopt=Apt::Install-Recommends \"false\"");
    // The folder is thrown away when the machine dies in the middle, so it need not be on the disk at each step.
    command.arg("--dpkgopt=force-unsafe-io");
    for path in recipe::EXCLUDED {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.args([recipe::SUITE, root.as_str(), sources.as_str()]);
    command.env("LC_ALL", "C.UTF-8").env("TMPDIR", work);
    tool::run(command, LIMIT, &mut |line| {
        if let Some(step) = line.strip_prefix("I: ") {
            on_line(step.to_owned());
        }
    })?;
    Ok(())
}

/// What dpkg says is installed under `root`.
pub(super) fn installed(root: &Utf8Path) -> Result<Vec<Package>, BuildError> {
    let mut command = Command::new("dpkg-query");
    command.arg(format!("--admindir={root}/var/lib/dpkg"));
    command.args(["-W", "-f", "${Package} ${Version}\\n"]);
    let listed = tool::run(command, QUERY_LIMIT, &mut |_| {})?;
    let package = |line: &str| {
        line.split_once(' ').map(|(name, version)| Package { name: name.to_owned(), version: version.to_owned() })
    };
    Ok(String::from_utf8_lossy(&listed).lines().filter_map(package).collect())
}

fn source_list(mirror: Option<&str>) -> Result<String, BuildError> {
    let mut entries = machine_sources(&machine_targets()?);
    if let Some(mirror) = mirror {
        entries.retain(|(_, suite)| suite.ends_with("-security"));
        entries.push((mirror.to_owned(), recipe::SUITE.to_owned()));
    } else if !entries.iter().any(|(_, suite)| suite == recipe::SUITE) {
        // A machine with another release, or with none of Debian's sources.
        return Err(BuildError::NoMirror(recipe::SUITE));
    }
    Ok(entries.iter().map(|(uri, suite)| format!("deb [signed-by={KEYRING}] {uri} {suite} main\n")).collect())
}

/// The machine's package sources as apt itself reads them, whatever form they are written in: `URI suite component
/// origin` a line.
fn machine_targets() -> Result<String, BuildError> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)", "Created-By: Packages"]);
    let targets = tool::run(command, QUERY_LIMIT, &mut |_| {})?;
    Ok(String::from_utf8_lossy(&targets).into_owned())
}

/// Debian's own among them. The origin is known only where the lists were fetched before; the keyring is what decides
/// in the end.
fn machine_sources(targets: &str) -> Vec<(String, String)> {
    let suites =
        [recipe::SUITE.to_owned(), format!("{}-updates", recipe::SUITE), format!("{}-security", recipe::SUITE)];
    let mut found = Vec::new();
    for line in targets.lines() {
        let mut words = line.split_whitespace();
        let (Some(uri), Some(suite), Some("main")) = (words.next(), words.next(), words.next()) else { continue };
        let debian = words.next().is_none_or(|origin| origin == "Debian" || origin.starts_with("$("));
        let entry = (uri.to_owned(), suite.to_owned());
        if debian && suites.contains(&entry.1) && !found.contains(&entry) {
            found.push(entry);
        }
    }
    found
}

/// How this machine reaches a mirror: proxies and the like.
fn apt_options() -> Result<String, BuildError> {
    let mut command = Command::new("apt-config");
    command.arg("dump");
    let dump = tool::run(command, QUERY_LIMIT, &mut |_| {})?;
    Ok(String::from_utf8_lossy(&dump)
        .lines()
        .filter(|line| is_transport(line))
        .map(|line| format!("{line}\n"))
        .collect())
}

fn is_transport(line: &str) -> bool {
    ["Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries"]
        .iter()
        .any(|prefix| line.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debians_own_sources_of_the_release_are_taken() {
        let targets = "\
http://mirror.example/debian/ bookworm main Debian
http://mirror.example/debian/ bookworm main Debian
http://mirror.example/debian/ bookworm contrib Debian
mirror+file:/etc/apt/mirrors/debian-security.list bookworm-security main $(ORIGIN)
http://tools.example/apt/ bookworm main SomeVendor
http://mirror.example/debian/ bookworm-backports main Debian
http://mirror.example/debian/ trixie main Debian
";
        let expected = [
            ("http://mirror.example/debian/", "bookworm"),
            ("mirror+file:/etc/apt/mirrors/debian-security.list", "bookworm-security"),
        ];
        assert_eq!(machine_sources(targets), expected.map(|(uri, suite)| (uri.to_owned(), suite.to_owned())));
    }

    #[test]
    fn proxies_are_handed_on_and_hooks_are_not() {
        assert!(is_transport("Acquire::http::Proxy \"http://proxy.example:3128\";"));
        assert!(!is_transport("APT::Update::Post-Invoke:: \"rm -f x\";"));
    }
}
