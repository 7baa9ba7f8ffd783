#!/usr/bin/env bash
# Puts the kernel of QEMU's VMs into .tiffin/kernel: Debian's cloud kernel, unpacked, with its modules, and beside it as it
# came (vmlinuz), which tests upload. The machine's own kernel and its installed packages are not touched.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

KERNEL=$STATE/kernel
WORK=$STATE/kernel.unfinished

# field FILE OFFSET BYTES: a little-endian number of the kernel's boot header (Documentation/arch/x86/boot.rst of Linux).
field() { od -An -v -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# unpack BZIMAGE VMLINUX: the payload behind the real-mode code, by whichever program its first bytes ask for.
unpack() {
    local sectors offset length start tool
    sectors=$(field "$1" $((0x1f1)) 1)
    offset=$(field "$1" $((0x248)) 4)
    length=$(field "$1" $((0x24c)) 4)
    start=$(((sectors + 1) * 512 + offset))
    case $(od -An -t x1 -j "$start" -N 4 "$1" | tr -d ' ') in
        02214c18) tool=(lz4 -dc) ;;
        fd377a58) tool=(xz -dc --single-stream) ;;
        28b52ffd) tool=(zstd -dc) ;;
        1f8b*) tool=(gzip -dc) ;;
        *) die "the kernel of ${1##*/} is packed in a way that isn't known here" ;;
    esac
    # The last four bytes are the unpacked size.
    dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$start" count=$((length - 4)) status=none | "${tool[@]}" >"$2"
    [[ $(od -An -t x1 -N 4 "$2" | tr -d ' ') == 7f454c46 ]] || die "what was unpacked of ${1##*/} is no program"
}

# The newest, of which linux-image-cloud-amd64 is only the sign.
newest() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p'; }

download() { (cd "$WORK" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "$1" >log 2>&1); }

update() { as_root apt-get -qq -o DPkg::Lock::Timeout=120 update; }

fetch() {
    local package
    rm -rf "$WORK"
    mkdir -p "$WORK/root"
    package=$(newest)
    if [[ -z $package ]]; then
        update
        package=$(newest)
    fi
    [[ -n $package ]] || die "apt knows no linux-image-cloud-amd64 here"
    # Lists that are old name packages that are gone.
    if ! download "$package"; then
        update
        package=$(newest)
        download "$package" || { cat "$WORK/log" >&2; return 1; }
    fi
    dpkg-deb -x "$WORK"/linux-image-*.deb "$WORK/root"
    mkdir "$WORK/kernel"
    unpack "$WORK"/root/boot/vmlinuz-* "$WORK/kernel/vmlinux"
    mv "$WORK"/root/boot/vmlinuz-* "$WORK/kernel/vmlinuz"
    mv "$WORK"/root/lib/modules/*/kernel "$WORK/kernel/modules"
    say "$package" >"$WORK/kernel/package"
    rm -rf "$KERNEL"
    mv "$WORK/kernel" "$KERNEL"
    rm -rf "$WORK"
}

if [[ $(uname -m) != x86_64 ]]; then
    say "    no QEMU VMs on $(uname -m): their kernel is x86-64"
elif [[ ! -e $KERNEL/package || ! -e $KERNEL/vmlinuz ]]; then
    step "fetching the kernel of QEMU's VMs" fetch
fi
