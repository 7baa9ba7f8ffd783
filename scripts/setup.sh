#!/usr/bin/env bash
# Installs what is missing of what Tiffin is built from and runs on (Debian 12). Quick when nothing is missing.
#   setup.sh         to build and run
#   setup.sh test    to test as well
set -euo pipefail
source "$(dirname "$0")/lib.sh"

missing=()

# need PACKAGE COMMAND-OR-FILE: the package is asked for when the command or the file isn't there.
need() {
    case $2 in
        /*) [[ -e $2 ]] || missing+=("$1") ;;
        *) command -v "$2" >/dev/null || missing+=("$1") ;;
    esac
}

need gcc gcc
need libc6-dev /usr/include/stdio.h
need make make
need pkg-config pkg-config
need curl curl
need ca-certificates /etc/ssl/certs/ca-certificates.crt
need git git
need iproute2 ip
need nftables nft
need erofs-utils mkfs.erofs
need e2fsprogs mke2fs
need mmdebstrap mmdebstrap
need debian-archive-keyring /usr/share/keyrings/debian-archive-keyring.gpg
need npm npm
if [[ $(uname -m) == x86_64 ]]; then
    need qemu-system-x86 qemu-system-x86_64
    need lz4 lz4
fi
if [[ ${1-} == test ]]; then
    need python3 python3
    need dnsmasq-base dnsmasq
    need busybox-static /bin/busybox
    need jq jq
    need docker-registry docker-registry
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
fi
if ! "$ROOT/scripts/cargo" --version >/dev/null 2>&1; then
    # Debian's own Rust is too old; these come with its security updates, for the browsers, and are current.
    missing+=(cargo-web rustc-web)
fi

install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends "${missing[@]}" >/dev/null
}

if ((${#missing[@]})); then
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (this isn't Debian: install their counterparts, then run make again)"
    step "installing ${missing[*]}" install
    "$ROOT/scripts/cargo" --version >/dev/null
fi
