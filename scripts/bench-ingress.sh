#!/usr/bin/env bash
# Measures the ingress against haproxy: requests a second over 32 connections, and p50 latency over one, by wrk with TLS
# and keep-alive, in turns in one run on the same cores. Needs the server of `make up` and root; installs Debian's wrk and haproxy.
#   bench-ingress.sh [--json] [ROUNDS [SECONDS]]
#
# Both listen on the host's loopback with the same certificate and connect to the same address from inside the VM's network
# namespace: haproxy opens its sockets there, as the VM's monitor does for the server. Both pass on X-Forwarded-* and a
# request id, and use connections again. Behind that address is
#   guest  a program of Node's in the VM, which is slower than either proxy;
#   plain  a program in the namespace itself (a redirect by nftables), which isn't: what the proxies cost is seen there.
# All of it runs before other work on the machine (priority -10), so that less of that is measured.
# `direct` is wrk in the namespace, without proxy and without TLS. The processor time is the proxy's whole process's, over 32 connections.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

json=
[[ ${1-} != --json ]] || { json=yes; shift; }
rounds=${1:-7} seconds=${2:-3}
CONNECTIONS=32 GUEST_PORT=8080 PLAIN_PORT=8081 GUEST=172.16.0.2
[[ -r $STATE/env ]] || die "no server: make up"
((EUID == 0)) || die "this needs root"
source "$STATE/env"
server_settings
[[ -n $TIFFIN_INGRESS_URL ]] || die "the ingress is off: make up without TIFFIN_INGRESS_LISTEN=off"

work=$(mktemp -d)
vm='' pids=() hosts=() haproxy_ports=()
read -r server_pid _ <"$STATE/server.pid"
space=tiffin-bench-$$
finish() {
    set_priority 0
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; done
    [[ ! -e /run/netns/$space ]] || ip netns del "$space"
    [[ -z $vm ]] || tiffin vm rm "$vm" >/dev/null
    rm -rf "$work"
}
trap finish EXIT

install() {
    local missing=()
    for tool in wrk haproxy; do command -v "$tool" >/dev/null || missing+=("$tool"); done
    ((${#missing[@]})) || return 0
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends "${missing[@]}" >/dev/null
}

# set_priority NICE: of the server, the VM, haproxy and this script, with all their threads and sessions (which Linux may give
# shares of their own).
set_priority() {
    local pid monitor processes=("$server_pid" "${pids[@]}" "$$")
    if monitor=$(jq .process.pid "$TIFFIN_DATA_DIR/vms/$vm/run.json" 2>/dev/null); then
        mapfile -t -O "${#processes[@]}" processes < <(pgrep --ns "$monitor" --nslist pid)
    fi
    for pid in "${processes[@]}"; do
        # shellcheck disable=SC2046 # one word each
        renice -n "$1" -p $(ls "/proc/$pid/task" 2>/dev/null) >/dev/null 2>&1 || true
        { echo "$1" >"/proc/$pid/autogroup"; } 2>/dev/null || true
    done
}

start_guest() {
    vm=$(tiffin vm create --quiet --cpu "$(nproc)" --mem 512)
    cat >"$work/server.js" <<JS
const page = Buffer.from('hello, world\n');
const head = { 'content-type': 'text/plain', 'content-length': page.length };
const server = require('http').createServer((q, a) => { a.writeHead(200, head); a.end(page); });
server.keepAliveTimeout = 60000;
server.listen($GUEST_PORT);
JS
    tiffin vm cp "$work/server.js" "$vm:server.js"
    tiffin vm exec "$vm" -- 'nohup node server.js >server.log 2>&1 &'
    for port in $GUEST_PORT $PLAIN_PORT; do
        url=$(tiffin vm expose "$vm" $port)
        url=${url#https://}
        hosts[port]=${url%%[:/]*}
    done
}

# haproxy_with FILE: starts haproxy on a configuration.
haproxy_with() {
    # A session of its own, as the server has.
    setsid haproxy -f "$1" >"$1.log" 2>&1 &
    pids+=($!)
    sleep 0.3
    kill -0 $! 2>/dev/null || die "haproxy: $(<"$1.log")"
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start_haproxy() {
    ip netns attach "$space" "$(jq .process.pid "$TIFFIN_DATA_DIR/vms/$vm/run.json")"
    ip netns exec "$space" nft "add table ip bench
        add chain ip bench output { type nat hook output priority -100; }
        add rule ip bench output ip daddr $GUEST tcp dport $PLAIN_PORT redirect"
    local common="defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s"
    cat >"$work/plain.cfg" <<CFG
global
    nbthread 1
$common
frontend plain
    bind 0.0.0.0:$PLAIN_PORT namespace $space
    http-request return status 200 content-type text/plain string "hello, world"
CFG
    {
        printf 'global\n    nbthread %s\n%s\n    http-reuse always\n    option forwardfor\n' "$(nproc)" "$common"
        for port in $GUEST_PORT $PLAIN_PORT; do
            haproxy_ports[port]=$(free_port)
            cat <<CFG
listen to_$port
    bind 127.0.0.1:${haproxy_ports[port]} ssl crt $TIFFIN_DATA_DIR/ingress/$TIFFIN_INGRESS_DOMAIN/wildcard.pem alpn h2,http/1.1
    unique-id-format req-%[uuid]
    unique-id-header X-Request-Id
    http-request set-header X-Forwarded-Proto https
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Forwarded-Port %[dst_port]
    server program $GUEST:$port namespace $space
CFG
        done
    } >"$work/proxy.cfg"
    haproxy_with "$work/plain.cfg"
    haproxy_with "$work/proxy.cfg"
}

# The processor time that a process has had, in clock ticks.
ticks() { awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$1/stat"; }

# load WAY PORT CONNECTIONS: loads that way to that port; a line of requests, their time in microseconds, p50 in microseconds,
# failures, and the proxy's processor time in microseconds.
load() {
    local way=$1 port=$2 connections=$3 before=() url proxy=self began
    case $way in
        tiffin) url=https://127.0.0.1:${TIFFIN_INGRESS_LISTEN##*:}/ proxy=$server_pid ;;
        haproxy) url=https://127.0.0.1:${haproxy_ports[port]}/ proxy=${pids[1]} ;;
        direct) before=(ip netns exec "$space") url=http://$GUEST:$port/ ;;
    esac
    began=$(ticks "$proxy")
    "${before[@]}" wrk -t1 -c"$connections" -d"${seconds}s" -s "$work/report.lua" -H "Host: ${hosts[port]}:${TIFFIN_INGRESS_LISTEN##*:}" "$url" |
        tail -1 | tr '\n' ' '
    say $((($(ticks "$proxy") - began) * 1000000 / $(getconf CLK_TCK)))
}

measure() {
    local ways=(tiffin haproxy direct) round port connections turn way
    set_priority -10
    for ((round = 0; round <= rounds; round++)); do
        for port in $GUEST_PORT $PLAIN_PORT; do
            for connections in $CONNECTIONS 1; do
                # Nobody is always first.
                for turn in 0 1 2; do
                    way=${ways[(round + turn) % 3]}
                    say "$round $way $port $connections $(load "$way" "$port" "$connections")" >>"$work/samples"
                done
            done
        done
    done
}

# The first round warms up and is not counted.
summary() {
    python3 - "$work/samples" "$GUEST_PORT" "$CONNECTIONS" "$(nproc)" "$json" <<'PYTHON'
import json, statistics, sys
path, guest, many, cores, as_json = sys.argv[1:]
found, failures = {}, 0
for line in open(path):
    number, way, port, connections, requests, micros, p50, failed, processor = line.split()
    failures += int(failed)
    if number != "0":
        sample = (int(requests) * 1e6 / int(micros), int(p50) / 1000, int(processor) / int(requests))
        found.setdefault(("guest" if port == guest else "plain", connections, way), []).append(sample)
median = lambda behind, connections, way, which: statistics.median(one[which] for one in found[behind, connections, way])
report = {"cores": int(cores), "connections": int(many), "rounds": len(found["plain", many, "tiffin"]), "failures": failures, "behind": {}}
for behind in ("guest", "plain"):
    entry = report["behind"][behind] = {}
    for way in ("tiffin", "haproxy", "direct"):
        entry[way] = {"requestsPerSecond": round(median(behind, many, way, 0)), "p50Ms": round(median(behind, "1", way, 1), 3)}
        if way != "direct":
            entry[way]["processorMicros"] = round(median(behind, many, way, 2), 1)
    own, other = entry["tiffin"], entry["haproxy"]
    entry["requestsOverHaproxy"] = round(own["requestsPerSecond"] / other["requestsPerSecond"], 2)
    entry["p50MsBeyondHaproxy"] = round(own["p50Ms"] - other["p50Ms"], 3)
    entry["p50MsBeyondDirect"] = round(own["p50Ms"] - entry["direct"]["p50Ms"], 3)
if as_json:
    print(json.dumps(report, indent=2))
else:
    for behind, entry in report["behind"].items():
        for way in ("tiffin", "haproxy", "direct"):
            one = entry[way]
            spent = f"   processor {one['processorMicros']:5.1f} us a request" if "processorMicros" in one else ""
            print(f"{behind:6} {way:8} {one['requestsPerSecond']:7} requests/s   p50 {one['p50Ms']:.3f} ms{spent}")
        print(f"{behind:6} requests/s over haproxy's: {entry['requestsOverHaproxy']:.2f} (goal: at least 0.80); "
              f"p50 beyond haproxy's: {entry['p50MsBeyondHaproxy']:.3f} ms (goal: at most 0.30), beyond direct: {entry['p50MsBeyondDirect']:.3f} ms")
if failures:
    sys.exit(f"{failures} requests failed")
PYTHON
}

cat >"$work/report.lua" <<'LUA'
function done(summary, latency)
    local e = summary.errors
    print(string.format("%d %d %d %d", summary.requests, summary.duration, latency:percentile(50),
        e.connect + e.read + e.write + e.status + e.timeout))
end
LUA
step "wrk and haproxy" install >&2
step "a program in a VM" start_guest >&2
step "haproxy beside the ingress" start_haproxy >&2
step "measuring ($((rounds + 1)) rounds of 12 times $seconds s)" measure >&2
summary
