// What `result.set` and `result.error` make of a value, for every runtime. The part below this one is the runtime's own: it
// calls `outcome` with a way to write bytes to the slip.
//
// The slip gets lines of JSON, each the whole outcome so far; the last whole line counts. So what has been set is kept
// however the program ends, a kill in the middle of the next write included.
//
// * Whatever JSON can say arrives as it is. As with JSON.stringify: a value's own toJSON is asked (a Date becomes its ISO
//   string); undefined, functions and symbols are left out of objects and null elsewhere; NaN and infinities are null.
// * Errors, at any depth, become {name, message, stack, cause} and what else they carry.
// * What would silently become {} or nonsense is refused with a TypeError that says where in the value and what to do:
//   BigInt, cycles, promises, Map, Set, binary data. Too deep and too large are a RangeError.
// * Halves of surrogate pairs, which UTF-8 can't say, become U+FFFD.

// As deep as JSON is read on the way; one level is the outcome's own.
const MAX_DEPTH = 100;

function toJson(value) {
    const above = [];
    const text = JSON.stringify(value, function (key, value) {
        while (above.length > 0 && above[above.length - 1].holder !== this) above.pop();
        const refuse = (Kind, why) => {
            const names = [...above.map((each) => each.key), key].slice(1);
            const isIndex = (name) => /^(0|[1-9][0-9]*)$/.test(name);
            const isName = (name) => /^[A-Za-z_$][A-Za-z0-9_$]*$/.test(name);
            const step = (name) => isIndex(name) ? `[${name}]` : isName(name) ? `.${name}` : `[${JSON.stringify(name)}]`;
            throw new Kind(`result: value${names.map(step).join("").slice(0, 300)} ${why}`);
        };
        if (typeof value === "bigint") refuse(TypeError, "is a BigInt, which JSON doesn't have: use String(x) or Number(x)");
        if (typeof value !== "object" || value === null) return value;
        if (above.some((each) => each.original === value)) {
            refuse(TypeError, "is part of itself, which JSON can't say: leave it out");
        }
        if (value instanceof Promise) refuse(TypeError, "is a promise: await it first");
        if (value instanceof Map) refuse(TypeError, "is a Map, which JSON doesn't have: use Object.fromEntries(x) or [...x]");
        if (value instanceof Set) refuse(TypeError, "is a Set, which JSON doesn't have: use [...x]");
        if (value instanceof ArrayBuffer || ArrayBuffer.isView(value)) {
            refuse(TypeError, "is binary data, which JSON doesn't have: use Array.from(x), or encode it as text");
        }
        if (above.length > MAX_DEPTH) refuse(RangeError, `is nested deeper than ${MAX_DEPTH} levels`);
        const holder = value instanceof Error ? errorAsObject(value) : value;
        above.push({ holder, original: value, key });
        return holder;
    });
    if (text === undefined) return "null";
    if (!text.includes("\\ud")) return text;
    return text.replace(/\\(ud[89a-f][0-9a-f]{2}|.)/g, (escape) => escape.length > 2 ? "\ufffd" : escape);
}

function errorAsObject(error) {
    const object = { name: error.name, message: error.message, stack: error.stack };
    if (error.cause !== undefined) object.cause = error.cause;
    return Object.assign(object, error);
}

// What was thrown and not caught. Never throws, whatever it is given.
function thrownAsObject(value, longest) {
    const text = (get) => {
        try {
            const text = get();
            return text === undefined ? undefined : String(text).slice(0, longest);
        } catch {
            return undefined;
        }
    };
    let isError = false;
    try {
        isError = value instanceof Error || typeof value.message === "string";
    } catch {
        // A thrown null, or worse.
    }
    if (!isError) {
        const json = () => typeof value === "object" ? JSON.stringify(value) : value;
        return { name: "Error", message: text(json) ?? text(() => value) ?? "undefined" };
    }
    const name = text(() => value.name) ?? "Error";
    return { name, message: text(() => value.message) ?? "", stack: text(() => value.stack) };
}

// `write` appends bytes to the slip; `restart` empties it; `failed` makes the exit code 1.
function outcome(cap, { write, restart, failed }) {
    const encoder = new TextEncoder();
    const said = {};
    let written = 0;

    function save(next, what) {
        const parts = Object.keys(next).map((name) => `"${name}":${next[name]}`);
        const line = encoder.encode(`{${parts.join(",")}}\n`);
        if (line.length - 1 > cap) {
            throw new RangeError(`result: ${what} is too large: ${line.length - 1} bytes as JSON, and the limit is ${cap}; write it to a file`);
        }
        if (written > 2 * cap) {
            restart();
            written = 0;
        }
        write(line);
        written += line.length;
        for (const name of ["result", "error"]) said[name] = next[name];
        for (const name of ["result", "error"]) if (next[name] === undefined) delete said[name];
    }

    const result = Object.freeze({
        // Gives `value` to whoever started the program; the last one wins.
        set(value) {
            save({ ...said, result: toJson(value) }, "the value");
        },
        // Says that the program has failed, and with what. It goes on, and ends with exit code 1.
        error(value) {
            save({ ...said, error: toJson(value) }, "the error");
            failed();
        },
    });
    Object.defineProperty(globalThis, "result", { value: result, writable: true, configurable: true });

    return {
        // `value` was thrown, and nobody caught it. What result.error was given says more, and stays.
        thrown(value) {
            if (said.error !== undefined) return false;
            const attempts = [
                () => save({ ...said, error: JSON.stringify(thrownAsObject(value, 16384)) }),
                () => save({ ...said, error: JSON.stringify(thrownAsObject(value, 300)) }),
                () => save({ error: JSON.stringify(thrownAsObject(value, 300)) }),
            ];
            return attempts.some((attempt) => {
                try {
                    attempt();
                    return true;
                } catch {
                    return false;
                }
            });
        },
        // It was caught after all.
        forget() {
            const { result } = said;
            save(result === undefined ? {} : { result });
        },
    };
}
