#!/usr/bin/env bash
# Measures the server of `make up` against the bare engine. Arguments go to `tiffin bench`.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

# A bench asks more often than the rate limits let anybody: the server runs without them meanwhile. VMs live on.
limits=(TIFFIN_RATE__VM_CREATE_PER_MIN TIFFIN_RATE__EXEC_PER_MIN TIFFIN_RATE__RUN_PER_MIN TIFFIN_RATE__UPLOAD_PER_MIN
    TIFFIN_RATE__DOWNLOAD_PER_MIN)
server=$(dirname "$0")/server.sh
trap 'unset "${limits[@]}"; "$server" start' EXIT
for limit in "${limits[@]}"; do export "$limit=0"; done
"$server" start
source "$STATE/env"

# The bare engine is started beside the server's VMs, on the same image: both need root.
server_settings
as_root "$BIN/tiffin" bench "$@"
