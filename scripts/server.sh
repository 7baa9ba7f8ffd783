#!/usr/bin/env bash
# The development server: one process in the background, its state in .tiffin.
#   server.sh start   keeps one that runs this very program with these settings, else replaces it; VMs live on
#   server.sh stop    ends it; VMs live on
#   server.sh clean   ends it and every VM, and removes what they left on the host
# Settings: TIFFIN_LISTEN (127.0.0.1:3000), TIFFIN_INGRESS_LISTEN (127.0.0.1:3443) and every other TIFFIN_* that `tiffin serve` knows.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

if ((EUID != 0)); then
    as_root env ENV_OWNER="$(id -u):$(id -g)" "$0" "$@"
    exit
fi
owner=${ENV_OWNER:-0:0}

LOG=$STATE/server.log
PID_FILE=$STATE/server.pid
ENV_FILE=$STATE/env
CA_FILE=$STATE/ingress-ca.pem
# The client's; the server's settings, which a restart compares, don't depend on them.
unset TIFFIN_URL TIFFIN_API_KEY TIFFIN_ADMIN_PASSWORD TIFFIN_INGRESS_URL TIFFIN_INGRESS_CA
server_settings
URL=http://$TIFFIN_LISTEN

# When a process that has not ended started, in clock ticks since boot: with the id it names one process for good.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) }
    local fields
    read -ra fields <<<"$stat"
    [[ ${fields[0]} != Z ]] || return 1
    say "${fields[19]}"
}

# Sets `pid` when our server runs.
running() {
    local started
    read -r pid started 2>/dev/null <"$PID_FILE" && [[ -n $pid && $(start_time "$pid") == "$started" ]]
}

settings() {
    env | grep '^TIFFIN_' | sort | sha256sum
    sha256sum "$BIN/tiffin" "$BIN/tiffin-agent" "$BIN/runsc"
}

# port_is_free VARIABLE: whether nobody listens where that setting says.
port_is_free() {
    local address=${!1} port taken
    [[ $address != off ]] || return 0
    port=${address##*:}
    taken=$(ss -Hltnp "sport = :$port")
    [[ -z $taken ]] && return
    die "port $port is taken by something else:
    $taken
stop that, or choose another: $1=127.0.0.1:$((port + 1)) make up"
}

healthy() { curl -fsS --max-time 2 -o /dev/null "$URL/health" 2>/dev/null; }

launch() {
    port_is_free TIFFIN_LISTEN
    port_is_free TIFFIN_INGRESS_LISTEN
    [[ ! -e $LOG || $(stat -c %s "$LOG") -lt 50000000 ]] || mv "$LOG" "$LOG.1"
    (umask 077 && touch "$LOG")
    local before
    before=$(stat -c %s "$LOG")
    setsid "$BIN/tiffin" serve </dev/null >>"$LOG" 2>&1 &
    pid=$!
    say "$pid $(start_time "$pid" || true)" >"$PID_FILE"
    settings >"$STATE/server.settings"
    local deadline=$((SECONDS + 60))
    until healthy; do
        if ! running || ((SECONDS > deadline)); then
            tail -c "+$((before + 1))" "$LOG" | tail -n 40 >&2
            die "the server did not come up; above is the end of $LOG"
        fi
        sleep 0.1
    done
    say "    $URL (process $pid, log $LOG)"
}

stop() {
    running || return 0
    kill -TERM "$pid"
    local deadline=$((SECONDS + 30))
    while running; do
        if ((SECONDS > deadline)); then
            say "    it doesn't end; killing it (VMs live on)"
            kill -KILL "$pid"
        fi
        sleep 0.1
    done
    rm -f "$PID_FILE"
}

key_works() { [[ -n $1 && $(curl -s --max-time 5 -o /dev/null -w '%{http_code}' -H "X-API-Key: $1" "$URL/v1/vms") == 200 ]]; }

# Whether somebody can log in so; the session ends at once.
login_works() {
    [[ -n $1 && -n $2 ]] || return 1
    local status jar
    jar=$(mktemp)
    status=$(printf '{"email":"%s","password":"%s"}' "$1" "$2" | curl -s --max-time 10 -o /dev/null -w '%{http_code}' -c "$jar" \
        -H 'Content-Type: application/json' --data-binary @- "$URL/auth/login") || true
    [[ $status != 200 ]] || curl -s --max-time 5 -o /dev/null -b "$jar" -X POST "$URL/auth/logout" || true
    rm -f "$jar"
    [[ $status == 200 ]]
}

# The last line of a file that begins with a word, without that word; the third part is what the rest may be made of.
last_word() { [[ ! -e $1 ]] || sed -nE "s/^$2($3+)\$/\1/p" "$1" | tail -n 1; }

# The server prints the first account's key and login once, at its first start; from then on they are in our file.
write_env() {
    local key= email= password=
    [[ ! -e $ENV_FILE ]] || key=$(sed -n 's/^export TIFFIN_API_KEY=//p' "$ENV_FILE")
    key_works "$key" || key=$(grep -oE 'tfn_[A-Za-z0-9]+_[A-Za-z0-9_-]{20,}' "$LOG" | tail -n 1) || true
    key_works "$key" || die "no API key that works: neither in $ENV_FILE nor in $LOG.
Put a valid one into $ENV_FILE (export TIFFIN_API_KEY=...), or begin anew: make down, then remove $TIFFIN_DATA_DIR"
    email=$(last_word "$ENV_FILE" 'export TIFFIN_ADMIN_EMAIL=' '[^ ]') password=$(last_word "$ENV_FILE" 'export TIFFIN_ADMIN_PASSWORD=' '[^ ]')
    if ! login_works "$email" "$password"; then
        email=$(last_word "$LOG" 'email ' '[^ ]') password=$(last_word "$LOG" 'password ' '[0-9a-f]')
        login_works "$email" "$password" || { email='' password=''; say "    no password that works is known; set one: tiffin admin password --data-dir $TIFFIN_DATA_DIR"; }
    fi
    # Where clients reach VMs, and what they trust.
    local ingress=https://$TIFFIN_INGRESS_DOMAIN:${TIFFIN_INGRESS_LISTEN##*:}
    [[ $TIFFIN_INGRESS_LISTEN != off ]] || ingress=
    TIFFIN_URL=$URL TIFFIN_API_KEY=$key "$BIN/tiffin" ingress ca >"$CA_FILE.new" 2>/dev/null || : >"$CA_FILE.new"
    mv "$CA_FILE.new" "$CA_FILE"
    chown "$owner" "$CA_FILE"
    rm -f "$ENV_FILE.new"
    (umask 077 && touch "$ENV_FILE.new")
    cat >"$ENV_FILE.new" <<END
export TIFFIN_URL=$URL
export TIFFIN_API_KEY=$key
export TIFFIN_INGRESS_URL=$ingress
export TIFFIN_INGRESS_CA=$CA_FILE
export TIFFIN_ADMIN_EMAIL=$email
export TIFFIN_ADMIN_PASSWORD=$password
case ":\$PATH:" in *":$BIN:"*) ;; *) export PATH="$BIN:\$PATH" ;; esac
END
    mv "$ENV_FILE.new" "$ENV_FILE"
    chown "$owner" "$ENV_FILE"
}

start() {
    (umask 077 && mkdir -p "$TIFFIN_DATA_DIR")
    if running && healthy && [[ $(settings) == "$(cat "$STATE/server.settings" 2>/dev/null)" ]]; then
        say "==> the server runs already (process $pid)"
    else
        if running; then step "stopping the server that runs other code or settings; VMs live on" stop; fi
        step "starting the server" launch
    fi
    write_env
}

remove_vms() {
    # Needs a server; when there is none, `host clean` ends what is left.
    if running && healthy && [[ -e $ENV_FILE ]]; then
        # shellcheck source=/dev/null
        (source "$ENV_FILE" && "$BIN/tiffin" vm rm --all) || say "    the server would not remove them; the host is cleaned without it"
    fi
}

clean() {
    [[ -x $BIN/tiffin ]] || { say "nothing is built, so nothing runs"; return; }
    step "removing every VM" remove_vms
    step "stopping the server" stop
    step "cleaning the host" "$BIN/tiffin" host clean --data-dir "$TIFFIN_DATA_DIR"
}

case ${1-} in
    start | stop | clean) "$1" ;;
    *) die "usage: server.sh start|stop|clean" ;;
esac
