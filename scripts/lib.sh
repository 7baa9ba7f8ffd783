# Sourced by every script here: where things are, how steps are shown, how root is reached.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=$ROOT/.tiffin
BIN=$STATE/bin
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
# Tools of the system live in sbin, which isn't on everybody's PATH.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export ROOT STATE BIN TARGET

# gVisor's oldest release that is dependable here (the date in its version).
RUNSC_FLOOR=20240729
export RUNSC_FLOOR

say() { printf '%s\n' "$*"; }
die() {
    CURRENT_STEP=
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

# step DESCRIPTION COMMAND...: says what it does, does it, says how long it took. Its output is shown as it comes.
# (Not `COMMAND || ...`: that would let a function go on after a command in it failed.)
CURRENT_STEP=
trap '[[ $? == 0 || -z $CURRENT_STEP ]] || printf "\nerror: %s failed\n" "$CURRENT_STEP" >&2' EXIT
step() {
    local started=$EPOCHREALTIME
    CURRENT_STEP=$1
    say "==> $1"
    "${@:2}"
    CURRENT_STEP=
    local took=$((${EPOCHREALTIME/[.,]/} - ${started/[.,]/}))
    say "    done in $((took / 1000000)).$((took / 100000 % 10)) s"
}

# The settings of the server and of what works beside it on its data; each may be chosen in the environment.
server_settings() {
    export TIFFIN_LISTEN=${TIFFIN_LISTEN:-127.0.0.1:3000}
    export TIFFIN_INGRESS_LISTEN=${TIFFIN_INGRESS_LISTEN:-127.0.0.1:3443}
    export TIFFIN_INGRESS_DOMAIN=${TIFFIN_INGRESS_DOMAIN:-vm.localhost}
    export TIFFIN_DATA_DIR=${TIFFIN_DATA_DIR:-$STATE/data}
    # Sockets need short paths, and a checkout's may be long.
    local name
    name=$(printf %s "$ROOT" | sha256sum)
    export TIFFIN_RUN_DIR=${TIFFIN_RUN_DIR:-/run/tiffin-${name:0:8}}
    export TIFFIN_RUNSC=${TIFFIN_RUNSC:-$BIN/runsc}
    export TIFFIN_AGENT=${TIFFIN_AGENT:-$BIN/tiffin-agent}
    if [[ -e $STATE/kernel/package ]]; then
        export TIFFIN_QEMU__KERNEL=${TIFFIN_QEMU__KERNEL:-$STATE/kernel/vmlinux}
    fi
}

# Runs a command as root, with our settings: as it is for root, through sudo for others.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo --preserve-env="TERM,$(compgen -e TIFFIN_ | paste -sd, -)" "$@"
    else
        die "this needs root: run it as root, or install sudo"
    fi
}

# The date in runsc's version (20240729), or 0.
runsc_date() {
    local version
    version=$("$1" --version 2>/dev/null) || version=
    if [[ $version =~ (20[0-9]{6}) ]]; then say "${BASH_REMATCH[1]}"; else say 0; fi
}
