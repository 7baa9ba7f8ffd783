#!/usr/bin/env bash
# Shows that it works: a VM, a command in it, and how long both took.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
source "$STATE/env"

ms() { say $((($2 - $1) / 1000)); }
now() { say "${EPOCHREALTIME/[.,]/}"; }

say "==> creating a VM and running a command in it"
t0=$(now)
vm=$("$BIN/tiffin" vm create --quiet) || die "no VM; see $STATE/server.log"
trap '"$BIN/tiffin" vm rm "$vm" >/dev/null' EXIT
t1=$(now)
# shellcheck disable=SC2016 # It is for the guest's shell to expand.
command='echo "Hello from $(uname -sr), user $(id -un), in $PWD"; python3 -c "print(sum(range(10**6)))"'
output=$("$BIN/tiffin" vm exec "$vm" -- "$command") || die "the command failed in $vm; see tiffin vm logs $vm"
t2=$(now)
"$BIN/tiffin" vm exec "$vm" -- true
t3=$(now)

printf '    | %s\n' "${output//$'\n'/$'\n    | '}"
cat <<END
    created in $(ms "$t0" "$t1") ms, that command $(ms "$t1" "$t2") ms, \`true\` $(ms "$t2" "$t3") ms (each with the start of the command line tool)

Tiffin is up.
    URL       $TIFFIN_URL   (API: $TIFFIN_URL/swagger, documentation: $TIFFIN_URL/docs)
    API key   $TIFFIN_API_KEY
    VMs       $TIFFIN_INGRESS_URL   (ports that are exposed, each by a name below it; trust $TIFFIN_INGRESS_CA)
    login     $TIFFIN_ADMIN_EMAIL, password $TIFFIN_ADMIN_PASSWORD
    settings  source .tiffin/env

Try:
    source .tiffin/env
    tiffin vm create
    tiffin vm exec VM -- 'node -e "console.log(process.version)"'
    curl -s -H "X-API-Key: \$TIFFIN_API_KEY" \$TIFFIN_URL/v1/vms

\`make down\` ends it all.
END
