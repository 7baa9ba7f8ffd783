#!/usr/bin/env bash
# Builds the server (release) and the guest agent (static), and puts them into .tiffin/bin.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

TRIPLE=$(uname -m)-unknown-linux-gnu

# Replaced by name, never in place: a running program keeps its own file.
place() {
    local from=$1 to=$BIN/$2
    if ! cmp -s "$from" "$to"; then
        cp "$from" "$to.new"
        mv "$to.new" "$to"
    fi
}

agent() {
    # A target named outright keeps these flags away from build scripts and macros.
    RUSTFLAGS="-C target-feature=+crt-static" "$ROOT/scripts/cargo" build --quiet --locked --profile agent -p tiffin-agent --target "$TRIPLE"
}

mkdir -p "$BIN"
cd "$ROOT"
case ${1-all} in
    all) step "building tiffin (the first time takes minutes)" scripts/cargo build --locked --release -p tiffin-cli ;;
    agent) ;;
    *) die "usage: build.sh [all|agent]" ;;
esac
step "building the guest agent" agent
place "$TARGET/$TRIPLE/agent/tiffin-agent" tiffin-agent
if [[ ${1-all} == all ]]; then
    place "$TARGET/release/tiffin" tiffin
fi
