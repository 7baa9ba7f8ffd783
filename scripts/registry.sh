# Sourced after api.sh by the scripts that import an image: a real registry on loopback, and an image of a web program in it.
# shellcheck shell=bash

# Starts a registry over $work: its address is $registry, its process $registry_pid.
start_registry() {
    registry=127.0.0.1:$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    cat >"$work/registry.yml" <<YML
version: 0.1
storage: {filesystem: {rootdirectory: $work/registry}}
http: {addr: $registry}
YML
    OTEL_TRACES_EXPORTER=none docker-registry serve "$work/registry.yml" >"$work/registry.log" 2>&1 &
    registry_pid=$!
    until_ok 20 curl -sf -o /dev/null "http://$registry/v2/" || die "the registry doesn't come up: $(tail -5 "$work/registry.log")"
}

digest_of() { echo "sha256:$(sha256sum "$1" | cut -d' ' -f1)"; }
push_blob() {
    local location
    location=$(curl -sSf -o /dev/null -D - -X POST "http://$registry/v2/web/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
    curl -sSf -o /dev/null -X PUT -H 'Content-Type: application/octet-stream' --data-binary @"$1" "$location&digest=$(digest_of "$1")"
}

# Puts an image into it as web:v1. Its program says some lines and serves a page on port 8080, as a user of its own.
push_web() {
    mkdir -p "$work/root"/{bin,etc,tmp,www}
    cp /bin/busybox "$work/root/bin/busybox"
    for applet in sh httpd echo sleep cat; do ln -s busybox "$work/root/bin/$applet"; done
    printf 'root:x:0:0:root:/:/bin/sh\nweb:x:1001:1001:web:/www:/bin/sh\n' >"$work/root/etc/passwd"
    printf 'root:x:0:\nweb:x:1001:\n' >"$work/root/etc/group"
    echo '<p>served from a VM</p>' >"$work/root/www/index.html"
    cat >"$work/root/bin/serve" <<'SH'
#!/bin/sh
echo "serving $GREETING"
echo '{"level":"warn","msg":"a line with a level of its own"}'
echo "to standard error" >&2
exec httpd -f -p 8080 -h /www
SH
    chmod 755 "$work/root/bin/serve"
    tar -C "$work/root" --owner=0 --group=0 --numeric-owner -cf "$work/layer.tar" .
    local diff_id
    diff_id=$(digest_of "$work/layer.tar")
    gzip -n "$work/layer.tar"
    jq -nc --arg diff "$diff_id" '{architecture: "amd64", os: "linux", rootfs: {type: "layers", diff_ids: [$diff]},
        config: {Entrypoint: ["/bin/serve"], Env: ["PATH=/bin", "GREETING=nobody"], User: "web", WorkingDir: "/www",
            ExposedPorts: {"8080/tcp": {}}}}' >"$work/config.json"
    push_blob "$work/layer.tar.gz"
    push_blob "$work/config.json"
    jq -nc --arg layer "$(digest_of "$work/layer.tar.gz")" --argjson layer_size "$(stat -c %s "$work/layer.tar.gz")" \
        --arg config "$(digest_of "$work/config.json")" --argjson config_size "$(stat -c %s "$work/config.json")" \
        '{schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
          config: {mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, size: $config_size},
          layers: [{mediaType: "application/vnd.oci.image.layer.v1.tar+gzip", digest: $layer, size: $layer_size}]}' >"$work/manifest.json"
    curl -sSf -o /dev/null -X PUT -H 'Content-Type: application/vnd.oci.image.manifest.v1+json' \
        --data-binary @"$work/manifest.json" "http://$registry/v2/web/manifests/v1"
}
