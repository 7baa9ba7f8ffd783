// What scripts/programs.sh does by curl, by the dialect's client library. Its ids are written to $TIFFIN_MADE, to be removed.
'use strict';
const assert = require('node:assert/strict');
const fs = require('node:fs');
const https = require('node:https');
const { CakeworkApiClient } = require('@cakework/client/dist/index.js');

const { TIFFIN_URL, TIFFIN_API_KEY, TIFFIN_INGRESS_URL, TIFFIN_IMAGE_URI, TIFFIN_MADE } = process.env;
const client = new CakeworkApiClient({ environment: `${TIFFIN_URL}/cakework`, xApiKey: TIFFIN_API_KEY });
const ingressPort = new URL(TIFFIN_INGRESS_URL).port;

const made = (kind, id) => fs.appendFileSync(`${TIFFIN_MADE}/${kind}`, `${id}\n`);

/** Tries again until it succeeds, for 20 seconds. */
async function until(what, attempt) {
    const end = Date.now() + 20_000;
    for (;;) {
        try {
            return await attempt();
        } catch (error) {
            if (Date.now() > end) throw new Error(`waited in vain until ${what}`, { cause: error });
            await new Promise((wake) => setTimeout(wake, 100));
        }
    }
}

/** The page at a VM's name, by HTTPS; names below the domain are this host's. */
function page(hostname) {
    return new Promise((resolve, reject) => {
        const lookup = (_, options, found) =>
            options.all ? found(null, [{ address: '127.0.0.1', family: 4 }]) : found(null, '127.0.0.1', 4);
        https
            .get({ hostname, port: ingressPort, path: '/', lookup, agent: false, timeout: 5000 }, (answer) => {
                let text = '';
                answer.on('data', (piece) => (text += piece));
                answer.on('end', () => (answer.statusCode === 200 ? resolve(text) : reject(new Error(`${answer.statusCode} ${text}`))));
            })
            .on('error', reject);
    });
}

async function logLine(read, text) {
    const { lines } = await read();
    const line = lines.find(({ message }) => message === text);
    assert(line, `no line ${text}`);
    return line;
}

async function main() {
    const { imageId } = await client.importImage({ imageUri: TIFFIN_IMAGE_URI, password: '' });
    made('images', imageId);

    const vm = await client.startVm({ imageId, port: 8080, envVars: { GREETING: 'the client' } });
    made('vms', vm.id);
    assert.equal(vm.state, 'started');
    assert.match(await until('the page is there', () => page(vm.hostname)), /served from a VM/);
    const line = await until('the line is logged', () => logLine(() => client.getVmLogs(vm.id, { query: 'SERVING' }), 'serving the client'));
    assert.equal(line.level, 'info');
    assert((await client.listVMs({ imageId })).vms.some(({ id }) => id === vm.id));
    await client.stopVm(vm.id);
    assert.equal((await client.getVm(vm.id)).state, 'destroyed');
    await assert.rejects(client.stopVm(vm.id));

    const cached = await client.cacheVm({ imageId, port: 8080 });
    made('vms', cached.id);
    await client.startCachedVm(cached.id);
    assert.match(await until('the page is there', () => page(cached.hostname)), /served from a VM/);
    await until('the line is logged', () => logLine(() => client.getCachedVmLogs(cached.id), 'serving nobody'));
    await client.stopCachedVm(cached.id);
    await client.destroyCachedVm(cached.id);
    assert.equal((await client.getVm(cached.id)).state, 'destroyed');

    await assert.rejects(client.getVm('00000000000000'));
    console.log('    the client went the whole path');
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
