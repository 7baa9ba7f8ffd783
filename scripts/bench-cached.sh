#!/usr/bin/env bash
# Measures cached VMs: from asking for a start to the first HTTP answer of the VM's program (busybox httpd) through the ingress,
# by HTTPS. Each round begins with the VM prepared, as it is some time after its last stop. Needs the server of `make up` and
# root, which sees when it is prepared.
#   bench-cached.sh [--json] [ROUNDS]
set -euo pipefail
source "$(dirname "$0")/lib.sh"

json=
[[ ${1-} != --json ]] || { json=yes; shift; }
rounds=${1:-30}
[[ -r $STATE/env ]] || die "no server: make up"
((EUID == 0)) || die "this needs root"
source "$STATE/env"
source "$ROOT/scripts/api.sh"
source "$ROOT/scripts/registry.sh"
server_settings
[[ -n $TIFFIN_INGRESS_URL ]] || die "the ingress is off: make up without TIFFIN_INGRESS_LISTEN=off"

work=$(mktemp -d)
registry_pid='' vm='' image=''
finish() {
    [[ -z $vm ]] || tiffin vm rm "vm-$vm" >/dev/null || true
    [[ -z $image ]] || tiffin image rm "$image" >/dev/null || true
    [[ -z $registry_pid ]] || kill "$registry_pid" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

cache() {
    start_registry
    push_web
    json 200 POST /v1/image/import "{\"imageUri\": \"$registry/web:v1\", \"password\": \"\"}"
    image=$(field .imageId)
    json 200 POST /v1/vm/cache "{\"imageId\": \"$image\", \"port\": 8080}"
    vm=$(field .id) hostname=$(field .hostname)
}

measure() {
    python3 - "$vm" "$hostname" "$TIFFIN_DATA_DIR/vms/vm-$vm" "$rounds" "$json" <<'PYTHON'
import http.client, json, os, socket, ssl, statistics, sys, time, urllib.parse

vm, hostname, folder, rounds, as_json = sys.argv[1:]
api, port = urllib.parse.urlparse(os.environ["TIFFIN_URL"]), int(os.environ["TIFFIN_INGRESS_URL"].rsplit(":", 1)[1])
trust = ssl.create_default_context(cafile=os.environ["TIFFIN_INGRESS_CA"])
server = http.client.HTTPConnection(api.hostname, api.port)

def ask(verb):
    server.request("POST", f"/v1/vm/cached/{vm}/{verb}", headers={"X-Api-Key": os.environ["TIFFIN_API_KEY"]})
    answer = server.getresponse()
    body = answer.read()
    if answer.status != 200:
        sys.exit(f"{verb}: {answer.status} {body.decode()}")

class Program(http.client.HTTPSConnection):
    """To the ingress, whatever resolves the name."""
    def connect(self):
        self.sock = trust.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname=self.host)

def first_answer():
    program = Program(hostname, port)
    refused = 0
    while True:
        program.request("GET", "/")
        answer = program.getresponse()
        body = answer.read()
        if answer.status == 200:
            assert b"served from a VM" in body, body
            return refused
        if answer.getheader("X-Tiffin-Error") != "not_listening":
            sys.exit(f"{answer.status} {body.decode()}")
        refused += 1
        time.sleep(0.001)

def until_prepared():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            # What stands still is stopped by its monitor, with all its threads.
            state = next(line for line in open(f"/proc/{sandbox()}/status") if line.startswith("State:"))
            if state.split()[1] == "T":
                time.sleep(0.3)
                return
        except (OSError, StopIteration, LookupError, ValueError):
            pass
        time.sleep(0.02)
    sys.exit("it was not prepared within a minute: is services.prepared 0?")

def sandbox():
    monitor = json.load(open(f"{folder}/run.json"))["process"]["pid"]
    for child in open(f"/proc/{monitor}/task/{monitor}/children").read().split():
        if "sandbox" in open(f"/proc/{child}/comm").read() or "boot" in open(f"/proc/{child}/cmdline").read().split("\0"):
            return child
    raise LookupError

starts, whole, refusals = [], [], 0
for number in range(int(rounds) + 2):
    until_prepared()
    began = time.monotonic()
    ask("start")
    started = time.monotonic()
    refused = first_answer()
    answered = time.monotonic()
    # The first rounds warm up and are not counted.
    if number >= 2:
        starts.append((started - began) * 1000)
        whole.append((answered - began) * 1000)
        refusals += refused
    ask("stop")

def told(samples):
    ordered = sorted(samples)
    rank = lambda percent: round(ordered[max(1, -(-len(ordered) * percent // 100)) - 1], 1)
    return {"p50Ms": rank(50), "p95Ms": rank(95), "slowestMs": round(ordered[-1], 1)}

report = {"rounds": len(whole), "firstAnswer": told(whole), "ofThatStart": told(starts), "notListening": refusals}
if as_json:
    print(json.dumps(report, indent=2))
else:
    for name, what in (("firstAnswer", "start to the first answer"), ("ofThatStart", "of that, start")):
        one = report[name]
        print(f"{what:26} p50 {one['p50Ms']} ms   p95 {one['p95Ms']} ms   slowest {one['slowestMs']} ms")
    print(f"{report['rounds']} rounds; {refusals} times nothing listened yet (goal: p50 at most 150 ms)")
PYTHON
}

step "a cached VM of an imported image" cache >&2
step "measuring" eval 'measure >"$work/report"' >&2
cat "$work/report"
