#!/usr/bin/env bash
# Every call of the API as a new user would make it with curl, in one go, against the server of `make up`: each answer
# is compared with what the documentation says. What it makes it removes again.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
source "$STATE/env"
source "$ROOT/scripts/api.sh"

work=$(mktemp -d)
vms=() snapshots=() images=()
clean_up() {
    local id
    for id in "${vms[@]}"; do curl -s -o /dev/null -X DELETE -H "X-API-Key: $TIFFIN_API_KEY" "$TIFFIN_URL/v1/vms/$id"; done
    for id in "${snapshots[@]}"; do curl -s -o /dev/null -X DELETE -H "X-API-Key: $TIFFIN_API_KEY" "$TIFFIN_URL/v1/snapshots/$id"; done
    for id in "${images[@]}"; do curl -s -o /dev/null -X DELETE -H "X-API-Key: $TIFFIN_API_KEY" "$TIFFIN_URL/v1/images/$id"; done
    rm -rf "$work"
}
trap clean_up EXIT

# header TEXT: the last answer has a header that begins so.
header() { grep -qi "^$1" "$work/head" || die "the answer has no header $1"; }

# refused STATUS METHOD PATH WORD [CURL-ARGUMENT...]: refused with a message that has that word.
refused() {
    local word=$4
    call "$1" "$2" "$3" "${@:5}"
    holds '(.message | type) == "string" and (.code | type) == "string" and (.requestId | type) == "string"'
    jq -e --arg word "$word" '.message | contains($word)' "$work/body" >/dev/null || die "the message doesn't say $word: $(<"$work/body")"
}

create() {
    json 201 POST /v1/vms "$1"
    vm=$(field .id)
    vms+=("$vm")
}

octets=(-H 'Content-Type: application/octet-stream')
is_date='test("^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\\.[0-9]{3}Z$")'

say "==> open to everybody"
call 200 GET /health
call 200 GET /docs/
call 200 GET /swagger/
call 200 GET /openapi.json
holds '.openapi | startswith("3.")'

say "==> VMs"
create '{"cpu": 1, "memMb": 256, "allowIps": ["172.16.0.1/32"], "outboundInternet": true, "diskSizeMb": 512}'
holds '(.id | startswith("vm-")) and .state == "RUNNING" and .cpu == 1 and .memMb == 256 and .guestIp == "172.16.0.2"'
# A VM of QEMU's boots the first time, and begins with its template from then on.
holds "(.provisionMode == \"boot\" or (.engine == \"qemu\" and .provisionMode == \"snapshot\")) and (.createdAt | $is_date)"
header RateLimit-
call 200 GET /v1/vms
holds "any(.[]; .id == \"$vm\")"
call 200 GET "/v1/vms/$vm"
holds ".id == \"$vm\" and .state == \"RUNNING\""
call 204 POST "/v1/vms/$vm/stop"
refused 409 POST "/v1/vms/$vm/stop" STOPPED
call 204 POST "/v1/vms/$vm/start"
for log in firecracker.log firecracker.stdout.log firecracker.stderr.log; do
    call 200 GET "/v1/vms/$vm/logs?type=$log&tail=100"
    holds ".type == \"$log\" and (.lines | type) == \"array\" and (.truncated | type) == \"boolean\""
done
refused 400 GET "/v1/vms/$vm/logs?tail=1001" tail
call 204 POST "/v1/vms/$vm/pause"
refused 409 POST "/v1/vms/$vm/exec" PAUSED -H 'Content-Type: application/json' -d '{"cmd": "true"}'
call 204 POST "/v1/vms/$vm/resume"

say "==> commands"
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "echo hello && id -u", "timeoutMs": 30000}'
holds '. == {"exitCode": 0, "stdout": "hello\n1000\n", "stderr": ""}'
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "echo $WHO in $PWD >&2; exit 3", "cwd": "/tmp", "env": {"WHO": "me"}}'
holds '.exitCode == 3 and .stderr == "me in /tmp\n"'
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "sleep 30", "timeoutMs": 200}'
holds '.exitCode == -1 and .timedOut == true'
refused 400 POST "/v1/vms/$vm/exec" cmd -H 'Content-Type: application/json' -d '{}'
refused 400 POST "/v1/vms/$vm/exec" cwd -H 'Content-Type: application/json' -d '{"cmd": "true", "cwd": "/no/such/folder"}'
call 200 POST "/v1/vms/$vm/exec" -H 'Content-Type: application/json' -H 'Accept: text/event-stream' -d '{"cmd": "echo streamed"}'
grep -q '^event: exit' "$work/body" || die "the stream has no end: $(<"$work/body")"

say "==> TypeScript and JavaScript"
json 200 POST "/v1/vms/$vm/run-ts" '{"code": "console.log(2 + 2)"}'
holds '.exitCode == 0 and .stdout == "4\n"'
json 200 POST "/v1/vms/$vm/run-ts" '{"env": ["API_TOKEN=secret123", "BASE_URL=https://api.example.com"],
    "code": "console.log(Deno.env.get(\"BASE_URL\"))"}'
holds '.stdout == "https://api.example.com\n"'
json 200 POST "/v1/vms/$vm/run-ts" '{"code": "result.set({ ok: true, answer: 42 })"}'
holds '. == {"exitCode": 0, "stdout": "", "stderr": "", "result": {"ok": true, "answer": 42}}'
for value in 7 '[1, [2, null]]' null '"text"' false '{"deep": {"er": [{}]}}'; do
    json 200 POST "/v1/vms/$vm/run-ts" "$(jq -n --arg code "result.set($value)" '{code: $code}')"
    holds ".exitCode == 0 and .result == $value"
done
json 200 POST "/v1/vms/$vm/run-ts" '{"code": "result.set(1); Deno.exit(0)"}'
holds '.exitCode == 0 and .result == 1'
json 200 POST "/v1/vms/$vm/run-ts" '{"code": "throw new Error(\"broken\")"}'
holds '.exitCode == 1 and (.error | tostring | contains("broken"))'
json 200 POST "/v1/vms/$vm/run-ts" '{"code": "result.error(\"no luck\")"}'
holds '.exitCode == 1 and (.error | tostring | contains("no luck"))'
json 200 POST "/v1/vms/$vm/run-ts" '{"code": "console.log(Deno.args.join())", "args": ["a", "b"]}'
holds '.stdout == "a,b\n"'
json 200 POST "/v1/vms/$vm/run-ts" '{"code": "await Deno.readTextFile(\"/etc/passwd\")"}'
holds '.exitCode == 1'
json 200 POST "/v1/vms/$vm/run-js" '{"code": "console.log(process.version.slice(0, 1)); result.set([1, 2, 3])"}'
holds '.exitCode == 0 and .stdout == "v\n" and .result == [1, 2, 3]'
refused 400 POST "/v1/vms/$vm/run-ts" code -H 'Content-Type: application/json' -d '{}'

say "==> files"
mkdir -p "$work/upload/lib"
echo "hello world" >"$work/upload/hello.txt"
echo 'export const answer: number = 42;' >"$work/upload/lib/answer.ts"
echo 'import { answer } from "./lib/answer.ts"; result.set(answer);' >"$work/upload/main.ts"
tar -czf "$work/upload.tar.gz" -C "$work/upload" .
gzip_body=(-H 'Content-Type: application/gzip' --data-binary "@$work/upload.tar.gz")
call 204 POST "/v1/vms/$vm/files/upload?dest=%2Fworkspace%2Fproject" "${gzip_body[@]}"
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "cat project/hello.txt; stat -c %u project/hello.txt"}'
holds '.stdout == "hello world\n1000\n"'
json 200 POST "/v1/vms/$vm/run-ts" '{"path": "/workspace/project/main.ts"}'
holds '.exitCode == 0 and .result == 42'
call 200 GET "/v1/vms/$vm/files/download?path=%2Fworkspace%2Fproject"
mkdir "$work/out"
tar -xzf "$work/body" -C "$work/out"
diff -r "$work/upload" "$work/out" || die "the download is not what was uploaded"
refused 400 POST "/v1/vms/$vm/files/upload?dest=%2Fetc" dest "${gzip_body[@]}"
ln -s /etc/passwd "$work/upload/link"
tar -czf "$work/upload.tar.gz" -C "$work/upload" .
refused 400 POST "/v1/vms/$vm/files/upload?dest=%2Fworkspace%2Fbad" link "${gzip_body[@]}"
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "ls -A /workspace"}'
holds '.stdout == "project\n"'
head -c 11000000 /dev/urandom >"$work/upload.tar.gz"
refused 413 POST "/v1/vms/$vm/files/upload?dest=%2Fworkspace%2Fbig" 10485760 "${gzip_body[@]}"
printf 'a note' >"$work/note.txt"
call 204 PUT "/v1/vms/$vm/files/content?path=%2Fworkspace%2Fnote.txt" "${octets[@]}" -T "$work/note.txt"
call 200 GET "/v1/vms/$vm/files/content?path=%2Fworkspace%2Fnote.txt"
[[ $(<"$work/body") == "a note" ]] || die "the file is not what was written"
call 200 GET "/v1/vms/$vm/files?path=%2Fworkspace"
holds 'map(.name) == ["note.txt", "project"]'

say "==> snapshots"
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "cd /tmp && nohup python3 -m http.server 8000 >/dev/null 2>&1 & echo started"}'
call 201 POST "/v1/vms/$vm/snapshots"
snapshot=$(field .id)
snapshots+=("$snapshot")
holds "(.id | startswith(\"snap-\")) and .vmId == \"$vm\" and .cpu == 1 and .memMb == 256 and .sizeBytes > 0"
holds "(.createdAt | $is_date) and (.imageId | type) == \"string\""
call 200 GET /v1/snapshots
holds "any(.[]; .id == \"$snapshot\")"
original=$vm
create "{\"cpu\": 1, \"memMb\": 256, \"allowIps\": [\"172.16.0.1/32\"], \"snapshotId\": \"$snapshot\"}"
holds '.state == "RUNNING" and .provisionMode == "snapshot"'
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "cat note.txt && pgrep -f http.server >/dev/null && hostname"}'
holds ".stdout == \"a note$vm\\n\""
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "echo clone > note.txt"}'
json 200 POST "/v1/vms/$original/exec" '{"cmd": "cat note.txt"}'
holds '.stdout == "a note"'
refused 400 POST /v1/vms memMb -H 'Content-Type: application/json' -d "{\"cpu\": 1, \"memMb\": 512, \"allowIps\": [], \"snapshotId\": \"$snapshot\"}"
refused 404 POST /v1/vms snapshot -H 'Content-Type: application/json' -d '{"cpu": 1, "memMb": 256, "allowIps": [], "snapshotId": "snap-00000000000000"}'
json 201 POST "/v1/vms/$original/fork" '{"count": 2}'
for clone in $(field '.[].id'); do vms+=("$clone"); done
holds 'length == 2 and all(.[]; .state == "RUNNING")'
call 204 DELETE "/v1/snapshots/$snapshot"
refused 404 GET "/v1/snapshots/$snapshot" snapshot

say "==> ports"
# Python's server is still there in the first VM.
call 200 GET /v1/ingress
holds '(.domain | type) == "string" and (.caCertificate | startswith("-----BEGIN CERTIFICATE-----"))'
call 200 PUT "/v1/vms/$original/ports/8000"
hostname=$(field .hostname) port=${TIFFIN_INGRESS_URL##*:}
holds ".port == 8000 and .url == \"https://$hostname:$port/\" and (.createdAt | $is_date)"
call 200 PUT "/v1/vms/$original/ports/8000"
holds ".hostname == \"$hostname\""
call 200 GET "/v1/vms/$original/ports"
holds 'map(.port) == [8000]'
# outside: what the port's URL answers; its status is printed.
outside() {
    curl -sS --max-time 20 -o "$work/page" -D "$work/head" -w '%{http_code}' --cacert "$TIFFIN_INGRESS_CA" \
        --resolve "$hostname:$port:127.0.0.1" "https://$hostname:$port/"
}
[[ $(outside) == 200 ]] || die "the port is not reached: $(<"$work/page")"
grep -q 'Directory listing' "$work/page" || die "this is not what listens there: $(<"$work/page")"
call 204 DELETE "/v1/vms/$original/ports/8000"
[[ $(outside) == 404 ]] || die "the port is still reached: $(<"$work/page")"
header 'X-Tiffin-Error: unknown_host'
refused 400 PUT "/v1/vms/$original/ports/0" port

say "==> logs of programs"
# What commands print isn't kept: the sandbox has no program.
call 200 GET "/v1/vms/$original/logs/search?query=hello&order=newest_first&batch=50"
holds '.lines == []'
refused 400 GET "/v1/vms/$original/logs/search?batch=7" batch
refused 404 GET /v1/vms/vm-00000000000000/logs/stream VM

say "==> imports"
call 200 GET /v1/images/imports
holds 'type == "array"'
refused 400 POST /v1/image/import imageUri -H 'Content-Type: application/json' -d '{"imageUri": "no reference"}'
header RateLimit-
refused 400 GET '/v1/image/import?imageUri=10.0.0.1%2Fapp' "isn't public"
refused 400 POST /cakework/v1/image/import "isn't public" -H 'Content-Type: application/json' -d '{"imageUri": "169.254.169.254/latest/meta-data"}'

say "==> images"
call 200 GET /v1/images
holds 'any(.[]; .isDefault and .hasRootfs)'
json 201 POST /v1/images '{"name": "my-custom-image", "description": "Bash, and nothing else"}'
image=$(field .id)
images+=("$image")
mkdir -p "$work"/tree/{bin,etc,proc,dev,sys,run,tmp}
for program in /bin/bash /bin/cat; do
    cp "$program" "$work/tree/bin/"
    ldd "$program" | grep -oE '/[^ ]+' | while read -r library; do cp --parents -L "$library" "$work/tree/"; done
done
ln -s bash "$work/tree/bin/sh"
echo "made by hand" >"$work/tree/etc/marker"
mke2fs -q -t ext4 -d "$work/tree" "$work/rootfs.ext4" 32M >/dev/null
call 204 PUT "/v1/images/$image/rootfs" "${octets[@]}" -T "$work/rootfs.ext4"
call 200 GET /v1/images
holds "any(.[]; .id == \"$image\" and (.hasKernel | not) and .hasRootfs and .baseRootfsBytes > 0)"
call 200 GET "/v1/images/$image"
holds ".id == \"$image\" and .name == \"my-custom-image\""
create "{\"cpu\": 1, \"memMb\": 128, \"allowIps\": [], \"imageId\": \"$image\"}"
json 200 POST "/v1/vms/$vm/exec" '{"cmd": "cat /etc/marker"}'
holds '.stdout == "made by hand\n"'
refused 409 DELETE "/v1/images/$image" VM
call 204 DELETE "/v1/vms/$vm"
refused 422 PUT "/v1/images/$image/kernel" bzImage "${octets[@]}" -T "$work/rootfs.ext4"
if [[ -e $STATE/kernel/vmlinux ]]; then
    call 204 PUT "/v1/images/$image/kernel" "${octets[@]}" -T "$STATE/kernel/vmlinux"
    call 200 GET "/v1/images/$image"
    holds .hasKernel
    own="{\"cpu\": 1, \"memMb\": 256, \"allowIps\": [], \"imageId\": \"$image\""
    create "$own}"
    holds '.engine == "qemu"'
    json 200 POST "/v1/vms/$vm/exec" '{"cmd": "cat /etc/marker /proc/sys/kernel/osrelease"}'
    holds ".stdout == \"made by hand\\n$(sed s/^linux-image-// "$STATE/kernel/package")\\n\""
    refused 400 POST /v1/vms "boots kernels: qemu" -H 'Content-Type: application/json' -d "$own, \"engine\": \"gvisor\"}"
    call 204 DELETE "/v1/vms/$vm"
fi
former=$(curl -sS -H "X-API-Key: $TIFFIN_API_KEY" "$TIFFIN_URL/v1/images" | jq -r '.[] | select(.isDefault) | .id')
call 204 POST "/v1/images/$image/set-default"
call 204 POST "/v1/images/$former/set-default"
echo "no filesystem" >"$work/bad.ext4"
refused 422 PUT "/v1/images/$image/rootfs" ext4 "${octets[@]}" -T "$work/bad.ext4"
call 204 DELETE "/v1/images/$image"

say "==> sessions and administration"
call 401 POST /auth/login -H 'Content-Type: application/json' -d "{\"email\": \"$TIFFIN_ADMIN_EMAIL\", \"password\": \"wrong wrong wrong\"}"
call 200 POST /auth/login -c "$work/cookies" -H 'Content-Type: application/json' \
    -d "{\"email\": \"$TIFFIN_ADMIN_EMAIL\", \"password\": \"$TIFFIN_ADMIN_PASSWORD\"}"
holds ".email == \"$TIFFIN_ADMIN_EMAIL\""
header 'Set-Cookie: rds_session=.*HttpOnly'
with_cookie() { curl -sS -o "$work/body" -w '%{http_code}' -b "$work/cookies" -c "$work/cookies" "$@"; }
[[ $(with_cookie "$TIFFIN_URL/auth/me") == 200 ]] || die "the session is not taken: $(<"$work/body")"
[[ $(with_cookie "$TIFFIN_URL/v1/vms") == 200 ]] || die "the session opens nothing: $(<"$work/body")"
[[ $(with_cookie -X POST -H "Origin: https://elsewhere.example" "$TIFFIN_URL/auth/logout") == 403 ]] || die "another site may act for the session"
[[ $(with_cookie -X POST -H "Origin: $TIFFIN_URL" "$TIFFIN_URL/auth/logout") == 204 ]] || die "no logout: $(<"$work/body")"
[[ $(with_cookie "$TIFFIN_URL/auth/me") == 401 ]] || die "the session outlives its end"
call 200 GET /v1/admin/overview
call 200 GET '/v1/admin/activity?limit=5'
holds 'length == 5'
call 200 GET "/v1/vms/$original/exec-logs?limit=10"
holds 'length > 0'
json 201 POST /v1/admin/api-keys '{"name": "example", "scopes": ["read"]}'
key=$(field .id)
holds '.key | startswith("tfn_")'
call 200 GET /v1/admin/api-keys
call 204 DELETE "/v1/admin/api-keys/$key"

say "==> the end"
for vm in "${vms[@]}"; do
    [[ $vm == "$original" ]] && call 204 DELETE "/v1/vms/$vm"
done
refused 404 GET "/v1/vms/$original" "VM not found"
status=$(curl -sS -o "$work/body" -w '%{http_code}' "$TIFFIN_URL/v1/vms")
[[ $status == 401 ]] || die "without a key: $status"
say "every example answered as documented"
