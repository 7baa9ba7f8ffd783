#!/usr/bin/env bash
# What has to be clean besides the tests: format, lints, documentation, scripts, dependencies.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

for tool in fmt clippy; do
    scripts/cargo "$tool" --version >/dev/null 2>&1 ||
        die "cargo $tool is missing (Debian's Rust comes without it; rustup's has it: rustup component add rustfmt clippy)"
done
step "format" scripts/cargo fmt --all --check
step "lints" scripts/cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
step "documentation" env RUSTDOCFLAGS="-D warnings" scripts/cargo doc --quiet --locked --workspace --no-deps
for script in scripts/* .ci/run; do
    bash -n "$script" || die "$script is no bash"
done
if command -v shellcheck >/dev/null; then
    step "scripts" shellcheck -x -e SC1091 scripts/* .ci/run
fi
if [[ -e deny.toml ]] && scripts/cargo deny --version >/dev/null 2>&1; then
    step "dependencies" scripts/cargo deny --locked check
fi
