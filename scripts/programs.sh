#!/usr/bin/env bash
# The whole path of a program, as a new user would go it with curl and then with the client library of the dialect
# (npm package @cakework/client, unmodified), against the server of `make up`: a web program is packed into an image, pushed to a
# real registry on loopback, imported, started, reached by HTTPS, its logs searched, and stopped.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
source "$STATE/env"
source "$ROOT/scripts/api.sh"
source "$ROOT/scripts/registry.sh"

CLIENT=@cakework/client@0.0.57

work=$(mktemp -d)
registry_pid=
clean_up() {
    local id
    for id in $(cat "$work"/vms 2>/dev/null); do
        curl -s -o /dev/null -X DELETE -H "X-API-Key: $TIFFIN_API_KEY" "$TIFFIN_URL/v1/vms/vm-$id"
    done
    for id in $(cat "$work"/images 2>/dev/null); do
        curl -s -o /dev/null -X DELETE -H "X-API-Key: $TIFFIN_API_KEY" "$TIFFIN_URL/v1/images/$id"
    done
    [[ -z $registry_pid ]] || kill "$registry_pid" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT

say "==> an image in a registry"
start_registry
push_web

say "==> import"
json 200 POST /v1/image/import "{\"imageUri\": \"$registry/web:v1\", \"password\": \"\"}"
image=$(field .imageId)
echo "$image" >>"$work/images"
call 200 GET "/v1/images/$image"
holds '.status == "ready" and .baseRootfsBytes > 0'
# The same again, by the other method and in the other place: an image of its own, of the same content.
call 200 GET "/v1/image/import?imageUri=$registry%2Fweb:v1&password="
field .imageId >>"$work/images"
json 200 POST /cakework/v1/image/import "{\"imageUri\": \"$registry/web:v1\", \"password\": \"\"}"
field .imageId >>"$work/images"
holds ".imageId != \"$image\""
call 200 GET /v1/images/imports
holds ". == []"
json 400 POST /v1/image/import "{\"imageUri\": \"$registry/web:v2\", \"password\": \"\"}"
json 400 POST /v1/image/import '{"imageUri": "no reference", "password": ""}'

# reached HOSTNAME: the program's page, by HTTPS, with the server's own certificate authority.
ingress_port=${TIFFIN_INGRESS_URL##*:}
reached() {
    curl -sSf --max-time 5 --cacert "$TIFFIN_INGRESS_CA" --resolve "$1:$ingress_port:127.0.0.1" \
        "https://$1:$ingress_port/" 2>/dev/null | grep -q 'served from a VM'
}
logged() {
    call 200 GET "/v1/vm/$1/logs?query=$2"
    jq -e --arg text "$3" '.lines | map(.message) | index($text)' "$work/body" >/dev/null
}

say "==> a VM for one run"
json 200 POST /v1/vm/start "{\"imageId\": \"$image\", \"port\": 8080, \"envVars\": {\"GREETING\": \"a secret\"}}"
holds '.state == "started" and .memory == 256 and .port == 8080 and (.hostname | endswith(".vm.localhost"))'
jq -e 'tostring | contains("a secret") | not' "$work/body" >/dev/null || die "the environment is shown"
vm=$(field .id) hostname=$(field .hostname)
echo "$vm" >>"$work/vms"
until_ok 20 reached "$hostname" || die "https://$hostname/ is not reached"
until_ok 20 logged "$vm" SERVING "serving a secret" || die "the program's line isn't in its log"
holds '.lines[0].level == "info" and (.lines[0].timestamp | type) == "number"'
until_ok 20 logged "$vm" standard "to standard error" || die "the program's line isn't in its log"
holds '.lines[0].level == "error"'
call 200 GET "/vms?status=started&imageId=$image"
holds ".vms | map(.id) | index(\"$vm\")"
call 200 GET "/v1/vms/vm-$vm"
# Commands find the image's environment, and nothing of what the program was given.
json 200 POST "/v1/vms/vm-$vm/exec" '{"cmd": "echo $GREETING by $PATH"}'
holds '.stdout == "nobody by /bin\n"'
call 200 GET "/v1/vms/vm-$vm/logs/search?query=SERVING&order=newest_first&batch=50"
holds '.lines | length == 1 and .[0].message == "serving a secret" and .[0].level == "info"'
call 200 POST "/v1/vm/$vm/stop"
holds '. == {}'
call 200 GET "/v1/vm/$vm"
holds '.state == "destroyed"'
logged "$vm" SERVING "serving a secret" || die "the log went with the VM"
call 200 GET "/v1/vms/vm-$vm/logs/stream?tail=50"
grep -q 'serving a secret' "$work/body" && grep -q '^event: end' "$work/body" || die "the stream isn't told to its end: $(<"$work/body")"
call 409 POST "/v1/vm/$vm/stop"

say "==> a cached VM"
json 200 POST /v1/vm/cache "{\"imageId\": \"$image\", \"port\": 8080, \"diskSize\": 1}"
holds '.state == "stopped" and .volumeGB == 1'
vm=$(field .id) hostname=$(field .hostname)
echo "$vm" >>"$work/vms"
for _ in 1 2; do
    call 200 POST "/v1/vm/cached/$vm/start"
    until_ok 20 reached "$hostname" || die "https://$hostname/ is not reached"
    call 200 POST "/v1/vm/cached/$vm/stop"
    call 200 GET "/v1/vm/$vm"
    holds '.state == "stopped"'
done
call 200 GET "/v1/vm/cached/$vm/logs?order=newest_first&batch=50"
holds '.lines | map(.message) | index("serving nobody")'
call 200 POST "/v1/vm/cached/$vm/destroy"
call 200 GET "/v1/vm/$vm"
holds '.state == "destroyed"'

say "==> the same by the client library"
npm install --silent --no-audit --no-fund --prefix "$work/npm" "$CLIENT" >/dev/null
export NODE_PATH=$work/npm/node_modules NODE_EXTRA_CA_CERTS=$TIFFIN_INGRESS_CA
TIFFIN_IMAGE_URI=$registry/web:v1 TIFFIN_MADE=$work node "$ROOT/crates/cli/tests/programs-client.cjs"

say "every step of a program's path went as documented"
