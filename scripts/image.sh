#!/usr/bin/env bash
# Builds the default image, or finds it built: a second call takes no time.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

server_settings
# Its progress goes to stderr; the image's id, on stdout, is for programs.
build() { as_root "$BIN/tiffin" image build-default >/dev/null; }
step "the default image (about a minute the first time)" build
