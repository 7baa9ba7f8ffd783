# Sourced by the scripts that ask a server as a user would: each call wants its status, and leaves its answer in $work/body.
# shellcheck shell=bash

# call STATUS METHOD PATH [CURL-ARGUMENT...]: asks, wants that status; the answer's body is in $work/body.
call() {
    local wanted=$1 method=$2 path=$3 status
    shift 3
    status=$(curl -sS --max-time 120 -o "$work/body" -D "$work/head" -w '%{http_code}' -X "$method" \
        -H "X-API-Key: $TIFFIN_API_KEY" "$@" "$TIFFIN_URL$path")
    if [[ $status != "$wanted" ]]; then
        die "$method $path: status $status, not $wanted
$(head -c 2000 "$work/body")"
    fi
    say "    $status $method $path"
}

# json STATUS METHOD PATH BODY: the same with a JSON body.
json() { call "$1" "$2" "$3" -H 'Content-Type: application/json' -d "$4"; }

# holds FILTER: the last answer's body makes this jq filter true.
holds() {
    jq -e "$1" "$work/body" >/dev/null || die "the answer is not as documented: $1
$(head -c 2000 "$work/body")"
}

# field FILTER: what the filter finds in the last answer.
field() { jq -r "$1" "$work/body"; }

# until_ok SECONDS COMMAND...: tries again until it succeeds.
until_ok() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}
