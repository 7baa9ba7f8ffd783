#!/usr/bin/env bash
# Measures the server of `make up` against the bare engine. Arguments go to `tiffin bench`.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
source "$STATE/env"

# The bare engine is started beside the server's VMs, on the same image: both need root.
server_settings
as_root "$BIN/tiffin" bench "$@"
