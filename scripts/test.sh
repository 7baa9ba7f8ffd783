#!/usr/bin/env bash
# Runs every test, those on real VMs included. Arguments go to the runner.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

export TIFFIN_RUNSC=$BIN/runsc
export TIFFIN_AGENT=$BIN/tiffin-agent
export TIFFIN_KERNEL=$STATE/kernel/vmlinux
export TIFFIN_TEST_DATA=$STATE/data
# Real VMs need root. What is built stays the user's own; only the tests themselves run as root.
if ((EUID != 0)); then
    export "CARGO_TARGET_$(uname -m | tr '[:lower:]' '[:upper:]')_UNKNOWN_LINUX_GNU_RUNNER=sudo -E"
fi
cd "$ROOT"
if scripts/cargo nextest --version >/dev/null 2>&1; then
    scripts/cargo nextest run --locked --workspace "$@"
else
    scripts/cargo test --locked --workspace "$@"
fi
