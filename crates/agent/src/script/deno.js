// Deno's part: a module that is preloaded.

const variable = "TIFFIN_OUTCOME";
const [cap, path] = Deno.env.get(variable).split(" ");
Deno.env.delete(variable);

const { openSync } = Deno;
let file;
const { thrown, forget } = outcome(Number(cap), {
    write(bytes) {
        file ??= openSync(path, { write: true });
        for (let at = 0; at < bytes.length;) at += file.writeSync(bytes.subarray(at));
    },
    restart() {
        file.truncateSync(0);
        file.seekSync(0, 0);
    },
    failed() {
        Deno.exitCode = 1;
    },
});

// A listener of the program's own may still say that it is handled, and this one comes first: so what was written is taken
// back should the program go on, or end by itself, after that.
let pending;
function settle() {
    if (pending?.defaultPrevented) forget();
    pending = undefined;
}
function note(event, value) {
    if (!event.defaultPrevented && thrown(value)) {
        pending = event;
        // Not to be looked up before: Deno loads its timers, for some ten milliseconds, when first asked for them.
        setTimeout(settle, 0);
    }
}
globalThis.addEventListener("error", (event) => note(event, event.error));
globalThis.addEventListener("unhandledrejection", (event) => note(event, event.reason));
globalThis.addEventListener("unload", settle);
