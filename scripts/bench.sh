#!/usr/bin/env bash
# Measures the server of `make up` against the bare engine. Arguments go to `tiffin bench`.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

# A bench asks more often than the rate limits let anybody: the server runs without them meanwhile. VMs live on. What is
# measured cold wants no pool of ready VMs; the scenario pool wants one.
limits=(TIFFIN_RATE__VM_CREATE_PER_MIN TIFFIN_RATE__EXEC_PER_MIN TIFFIN_RATE__RUN_PER_MIN TIFFIN_RATE__UPLOAD_PER_MIN
    TIFFIN_RATE__DOWNLOAD_PER_MIN TIFFIN_POOL__MAX_VMS)
server=$(dirname "$0")/server.sh
trap 'unset "${limits[@]}"; "$server" start' EXIT
for limit in "${limits[@]}"; do export "$limit=0"; done
# The bare engine is started beside the server's VMs, on the same image: both need root.
server_settings

# measure POOLED ARGUMENT...: with so many VMs ready.
measure() {
    export TIFFIN_POOL__MAX_VMS=$1
    "$server" start
    # The key and the address only: the other settings are the server's.
    (source "$STATE/env" && as_root "$BIN/tiffin" bench "${@:2}")
}

case " $* " in
    *" pool "*) measure 4 "$@" ;;
    *" --scenario"* | *" --json"* | *" --help "*) measure 0 "$@" ;;
    *)
        measure 0 "$@"
        measure 4 --scenario pool "$@"
        ;;
esac
