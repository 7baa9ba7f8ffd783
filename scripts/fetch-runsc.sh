#!/usr/bin/env bash
# Puts gVisor's runsc into .tiffin/bin: a link to an installed one that is new enough, else the one of Debian's
# backports, unpacked there. The machine's package sources and its installed packages are not touched.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

APT=$STATE/apt
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
SUITE=bookworm

# The mirror that this machine takes Debian from, as apt reads its sources, whatever form they have.
mirror() {
    local uri suite component format
    # shellcheck disable=SC2016 # The fields are for apt to fill in.
    format='$(REPO_URI) $(RELEASE) $(COMPONENT)'
    while read -r uri suite component; do
        if [[ $suite == "$SUITE" && $component == main ]]; then
            say "$uri"
            return
        fi
    done < <(apt-get indextargets --format "$format" 'Created-By: Packages')
    die "apt has no sources of Debian $SUITE here: install runsc of release $RUNSC_FLOOR or newer, then run make again"
}

# apt-get with lists, cache and sources of its own; the machine's proxy settings stay.
own_apt() {
    apt-get -q -o Dir::Etc::sourcelist="$APT/sources.list" -o Dir::Etc::sourceparts=- -o Dir::Etc::preferences=- \
        -o Dir::Etc::preferencesparts=- -o Dir::State::lists="$APT/lists" -o Dir::Cache="$APT/cache" \
        -o APT::Sandbox::User="$(id -un)" -o APT::Update::Post-Invoke-Success= -o Acquire::Retries=3 "$@"
}

fetch() {
    rm -rf "$APT"
    mkdir -p "$APT/lists/partial" "$APT/cache/archives/partial" "$BIN"
    local from
    from=$(mirror)
    say "deb [signed-by=$KEYRING] $from $SUITE-backports main" >"$APT/sources.list"
    own_apt update >"$APT/log" 2>&1 || { cat "$APT/log" >&2; return 1; }
    (cd "$APT" && own_apt download runsc >>log 2>&1) || { cat "$APT/log" >&2; return 1; }
    dpkg-deb -x "$APT"/runsc_*.deb "$APT/root"
    mv -f "$APT/root/usr/bin/runsc" "$BIN/runsc"
    rm -rf "$APT"
}

installed=$(command -v runsc || true)
# With .tiffin/env sourced, our own comes first.
[[ ! $installed -ef $BIN/runsc ]] || installed=
if [[ -n $installed && $(runsc_date "$installed") -ge $RUNSC_FLOOR ]]; then
    mkdir -p "$BIN"
    ln -sfn "$installed" "$BIN/runsc"
elif [[ ! -x $BIN/runsc || $(runsc_date "$BIN/runsc") -lt $RUNSC_FLOOR ]]; then
    step "fetching gVisor from Debian's backports" fetch
    [[ $(runsc_date "$BIN/runsc") -ge $RUNSC_FLOOR ]] || die "the runsc that was fetched is older than $RUNSC_FLOOR"
fi
