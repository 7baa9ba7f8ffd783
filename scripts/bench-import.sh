#!/usr/bin/env bash
# Measures the import of an image of 200 MB (20,000 small files, some large ones, 5 layers) against `skopeo copy` and
# `umoci unpack` of the same image, from the same registry on this host. Needs root, and Debian's docker-registry, skopeo and
# umoci. The server is one of its own, on the fake engine: nothing is booted.
#   bench-import.sh [ROUNDS]
set -euo pipefail
source "$(dirname "$0")/lib.sh"

rounds=${1:-5}
tiffin=${TIFFIN:-$TARGET/release/tiffin}
for tool in docker-registry skopeo umoci python3; do command -v "$tool" >/dev/null || die "$tool is missing: apt-get install $tool"; done
[[ -x $tiffin ]] || die "$tiffin is missing: scripts/build.sh makes it"
((EUID == 0)) || die "this needs root"

work=$(mktemp -d)
registry_pid='' server_pid=''
finish() {
    for pid in $server_pid $registry_pid; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; done
    rm -rf "$work"
}
trap finish EXIT

# An image as the OCI layout has it: always the same bytes, which compress as text does.
make_image() {
    python3 - "$work/oci" <<'PYTHON'
import gzip, hashlib, io, json, os, random, sys, tarfile

out, rng = sys.argv[1], random.Random(7)
os.makedirs(f"{out}/blobs/sha256")
words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(4000)]

def blob(data, kind):
    name = hashlib.sha256(data).hexdigest()
    with open(f"{out}/blobs/sha256/{name}", "wb") as file:
        file.write(data)
    return {"mediaType": kind, "digest": f"sha256:{name}", "size": len(data)}

def text(size):
    return " ".join(rng.choices(words, k=size // 6 + 1)).encode()[:size]

layers, diff_ids = [], []
for layer in range(5):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1600000000
            tar.addfile(info, io.BytesIO(data))
        for number in range(4000):
            add(f"srv/{layer}/{number % 97}/{number}.txt", text(rng.randint(500, 13000)))
        add(f"srv/{layer}/large", text(13 << 20))
    data = archive.getvalue()
    diff_ids.append("sha256:" + hashlib.sha256(data).hexdigest())
    layers.append(blob(gzip.compress(data, 6, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip"))
config = {"os": "linux", "architecture": "amd64", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
config = blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers}
manifest = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
manifest["annotations"] = {"org.opencontainers.image.ref.name": "1"}
json.dump({"schemaVersion": 2, "manifests": [manifest]}, open(f"{out}/index.json", "w"))
json.dump({"imageLayoutVersion": "1.0.0"}, open(f"{out}/oci-layout", "w"))
PYTHON
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start_registry() {
    registry=127.0.0.1:$(free_port)
    printf 'version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/registry}}\nhttp: {addr: "%s"}\n' \
        "$work" "$registry" >"$work/registry.yml"
    docker-registry serve "$work/registry.yml" >"$work/registry.log" 2>&1 &
    registry_pid=$!
    until curl -sf "http://$registry/v2/" >/dev/null; do kill -0 $registry_pid || die "no registry: $(cat "$work/registry.log")"; done
    skopeo copy --quiet --dest-tls-verify=false "oci:$work/oci:1" "docker://$registry/app:1"
}

start_server() {
    local listen
    listen=127.0.0.1:$(free_port)
    # Nothing is kept between rounds.
    "$tiffin" serve --set engine=fake --listen "$listen" --data-dir "$work/data" --set registry.cache_mb=0 --set rate.import_per_min=0 \
        --write-key "$work/key" >"$work/server.log" 2>&1 &
    server_pid=$!
    export TIFFIN_URL=http://$listen
    until curl -sf "$TIFFIN_URL/health" >/dev/null; do kill -0 $server_pid || die "no server: $(tail -3 "$work/server.log")"; done
    TIFFIN_API_KEY=$(cat "$work/key")
    export TIFFIN_API_KEY
}

# timed VARIABLE COMMAND...: appends milliseconds to the list VARIABLE.
timed() {
    local -n list=$1
    local started=$EPOCHREALTIME
    "${@:2}"
    list+=($(((${EPOCHREALTIME/[.,]/} - ${started/[.,]/}) / 1000)))
}

with_tools() {
    skopeo copy --quiet --src-tls-verify=false "docker://$registry/app:1" "oci:$work/copy:1"
    umoci --log=error unpack --image "$work/copy:1" "$work/bundle"
}
with_tiffin() { image=$("$tiffin" image import "$registry/app:1"); }
median() { printf '%s\n' "$@" | sort -n | sed -n "$((($# + 1) / 2))p"; }

step "making the image" make_image
step "starting a registry and a server" eval 'start_registry; start_server'
tools=() own=()
for ((round = 0; round <= rounds; round++)); do
    # The first round warms the caches of files and is not counted.
    ((round != 1)) || tools=() own=()
    timed own with_tiffin
    "$tiffin" image rm "$image" >/dev/null
    timed tools with_tools
    rm -rf "$work/copy" "$work/bundle"
done
say "tiffin image import:          $(median "${own[@]}") ms (${own[*]})"
say "skopeo copy and umoci unpack: $(median "${tools[@]}") ms (${tools[*]})"
python3 -c "import sys; own, tools = map(int, sys.argv[1:]); print(f'ratio: {own / tools:.2f} (goal: at most 0.70)')" \
    "$(median "${own[@]}")" "$(median "${tools[@]}")"
