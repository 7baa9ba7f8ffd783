// Node's part: a CommonJS module that is required before the program. Node requires it again in worker threads and forked
// processes, which have no outcome of their own.

const variable = "TIFFIN_OUTCOME";
if (process.env[variable] !== undefined) {
    const { ftruncateSync, openSync, writeSync } = require("node:fs");
    const [cap, path] = process.env[variable].split(" ");
    delete process.env[variable];

    let file, end = 0;
    const { thrown } = outcome(Number(cap), {
        write(bytes) {
            file ??= openSync(path, "r+");
            for (let at = 0; at < bytes.length;) at += writeSync(file, bytes, at, bytes.length - at, end + at);
            end += bytes.length;
        },
        restart() {
            ftruncateSync(file, 0);
            end = 0;
        },
        failed() {
            process.exitCode = 1;
        },
    });

    process.on("uncaughtExceptionMonitor", (error) => {
        const handled = process.listenerCount("uncaughtException") > 0 || process.hasUncaughtExceptionCaptureCallback();
        if (!handled) thrown(error);
    });

    // Inline code is a module, and still finds what people expect.
    if (process.argv[1] === "-") {
        globalThis.require = require("node:module").createRequire(`${process.cwd()}/`);
    }
}
