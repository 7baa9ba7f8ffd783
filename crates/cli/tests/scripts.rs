//! Scripts and files in real VMs: what Deno and Node make of the programs that they are given, and files of some size.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;

use std::collections::BTreeMap;

use harness::{Host, on_both_engines, sh};
use serde_json::{Value, json};
use tiffin_engine::{
    Engine, Target,
    agent::{self, AgentError, ExecItem, FilesItem},
};
use tiffin_protocol::{ExecDone, FailureCode, FileAction, Files, Outcome, Runtime, Script, Source, UnpackLimits};
use tiffin_types::{
    id::VmId,
    vm::{EngineName, VmSize, VmSpec},
};

const BOTH: [Runtime; 2] = [Runtime::Deno, Runtime::Node];

// What depends on the guest's kernel; what the runtimes make of a program they make on every kernel.
on_both_engines!(
    deno_may_do_what_it_was_given_and_nothing_else,
    what_can_not_be_run_is_refused_and_says_why,
    what_other_processes_do_to_a_result_harms_nobody,
);

/// A VM for scripts.
struct Vm {
    host: Host,
    id: VmId,
}

/// What a script did.
#[derive(Debug)]
struct Ran {
    done: ExecDone,
    stdout: String,
    stderr: String,
    outcome: Outcome,
}

fn script(runtime: Runtime, source: Source) -> Script {
    Script {
        runtime,
        source,
        args: vec![],
        env: BTreeMap::new(),
        image_env: BTreeMap::new(),
        flags: vec![],
        network: false,
        uid: 1000,
        gid: 1000,
        timeout_ms: 60_000,
        stdout_cap: 1 << 20,
        stderr_cap: 1 << 20,
        result_cap: 1 << 20,
    }
}

fn inline(runtime: Runtime) -> Script {
    script(runtime, Source::Inline)
}

fn path(runtime: Runtime, path: &str) -> Script {
    script(runtime, Source::Path(path.to_owned()))
}

impl Vm {
    async fn new(engine: EngineName) -> Self {
        let host = Host::with(engine).await;
        let size = VmSize { cpus: 2, mem_mb: 512, disk_mb: 256 };
        let id = host.running_as(VmSpec { size, ..host.spec() }).await;
        Self { host, id }
    }

    async fn try_run(&self, script: Script, code: &str) -> Result<Ran, AgentError> {
        let connection = self.host.engine.dial(&self.id, Target::Agent).await.unwrap();
        let token = self.host.engine.agent_token(&self.id).await.unwrap();
        let mut stream = agent::script(connection, &token, script, code.as_bytes().to_vec()).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let done = loop {
            match stream.next().await? {
                ExecItem::Stdout(bytes) => stdout.extend(bytes),
                ExecItem::Stderr(bytes) => stderr.extend(bytes),
                ExecItem::Done(done) => break done,
            }
        };
        let outcome = stream.take_result().map(|json| serde_json::from_slice(&json).unwrap()).unwrap_or_default();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Ran { done, stdout: text(stdout), stderr: text(stderr), outcome })
    }

    async fn run(&self, script: Script, code: &str) -> Ran {
        self.try_run(script, code).await.unwrap_or_else(|error| panic!("{code}: {error:?}"))
    }

    async fn refusal(&self, script: Script) -> (FailureCode, String) {
        match self.try_run(script, "").await {
            Err(AgentError::Refused(failure)) => (failure.code, failure.message),
            other => panic!("not refused: {other:?}"),
        }
    }

    /// Moves files, with `input` for those that take some; what came out.
    async fn files(&self, action: FileAction, input: &[u8]) -> Vec<u8> {
        self.try_files(action, input).await.unwrap()
    }

    async fn try_files(&self, action: FileAction, input: &[u8]) -> Result<Vec<u8>, AgentError> {
        let takes_input = matches!(action, FileAction::Unpack { .. } | FileAction::Write { .. });
        let files = Files { action, uid: 1000, gid: 1000, timeout_ms: 60_000 };
        let connection = self.host.engine.dial(&self.id, Target::Agent).await.unwrap();
        let token = self.host.engine.agent_token(&self.id).await.unwrap();
        let (mut to, mut from) = agent::files(connection, &token, files, u64::MAX).await.unwrap();
        if takes_input {
            // It may be refused before all of it is sent: the answer says why.
            if to.write(input).await.is_ok() {
                let _ = to.end().await;
            }
        }
        let mut out = Vec::new();
        loop {
            match from.next().await? {
                FilesItem::Bytes(bytes) => out.extend(bytes),
                FilesItem::Done(_) => return Ok(out),
            }
        }
    }

    async fn write(&self, path: &str, content: &str) {
        let action = FileAction::Write { path: path.to_owned(), max_bytes: 1 << 20 };
        self.files(action, content.as_bytes()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_json_value_survives_in_both_runtimes() {
    let vm = Vm::new(EngineName::Gvisor).await;
    let cases = [
        ("42", json!(42)),
        ("-0.1", json!(-0.1)),
        ("1e300", json!(1e300)),
        ("false", json!(false)),
        ("null", json!(null)),
        ("''", json!("")),
        ("'\u{1F600} \\u0000 \\\\ud800 \"'", json!("\u{1F600} \u{0} \\ud800 \"")),
        ("[1, [2, []], {}]", json!([1, [2, []], {}])),
        ("{ ok: true, answer: 42, deep: { a: [null] } }", json!({"ok": true, "answer": 42, "deep": {"a": [null]}})),
        // What JSON has no word for.
        ("undefined", json!(null)),
        ("() => 1", json!(null)),
        ("{ a: undefined, b: [undefined, () => 1, Symbol()] }", json!({"b": [null, null, null]})),
        ("[NaN, Infinity]", json!([null, null])),
        ("new Date(0)", json!("1970-01-01T00:00:00.000Z")),
        ("{ toJSON: () => 'own' }", json!("own")),
        ("'\\ud800x' + JSON.stringify('\\ud800')", json!("\u{fffd}x\"\\ud800\"")),
        ("{ '\\udc00': 1 }", json!({"\u{fffd}": 1})),
        // The same thing twice is no cycle.
        ("((x) => [x, { x }, x])({ a: 1 })", json!([{"a": 1}, {"x": {"a": 1}}, {"a": 1}])),
    ];
    let code: String = std::iter::once("const all = [];".to_owned())
        .chain(cases.iter().map(|(value, _)| format!("result.set({value}); all.push({value});\n")))
        .chain(["result.set(all)".to_owned()])
        .collect();
    let expected: Vec<&Value> = cases.iter().map(|(_, value)| value).collect();
    for runtime in BOTH {
        // Each alone where it could look different alone.
        for at in [0, 3, 4, 5, 9, 10] {
            let (value, expected) = &cases[at];
            let ran = vm.run(inline(runtime), &format!("result.set({value})")).await;
            assert_eq!(ran.outcome, Outcome { result: Some(expected.clone()), error: None }, "{runtime:?} {value}");
            assert_eq!((ran.done.exit_code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "", ""));
        }
        let ran = vm.run(inline(runtime), &code).await;
        assert_eq!(ran.outcome.result, Some(json!(expected)), "{runtime:?} {ran:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_json_can_not_say_is_refused_with_its_place_in_the_value() {
    let vm = Vm::new(EngineName::Gvisor).await;
    let cases = [
        ("{ a: [0, { 'b c': 10n }] }", "TypeError", "value.a[1][\"b c\"] is a BigInt"),
        ("5n", "TypeError", "value is a BigInt"),
        ("(() => { const x = { y: [] }; x.y.push(x); return x; })()", "TypeError", "value.y[0] is part of itself"),
        ("{ p: Promise.resolve(1) }", "TypeError", "value.p is a promise: await it"),
        ("new Map([[1, 2]])", "TypeError", "value is a Map"),
        ("[new Set()]", "TypeError", "value[0] is a Set"),
        ("new Uint8Array(3)", "TypeError", "value is binary data"),
        ("(() => { let x = 1; for (let i = 0; i < 200; i++) x = [x]; return x; })()", "RangeError", "nested deeper"),
        ("'x'.repeat(1 << 20)", "RangeError", "the limit is 1048576"),
        ("{ get x() { throw new RangeError('own'); } }", "RangeError", "own"),
    ];
    let attempts = cases.map(|(value, ..)| {
        format!("try {{ result.set({value}); all.push(null) }} catch (e) {{ all.push([e.name, e.message]) }}\n")
    });
    let code = format!("const all = []; result.set('kept');\n{}\nconsole.log(JSON.stringify(all))", attempts.concat());
    for runtime in BOTH {
        let ran = vm.run(inline(runtime), &code).await;
        assert_eq!(ran.outcome, Outcome { result: Some(json!("kept")), error: None }, "{runtime:?} {ran:?}");
        let said: Vec<(String, String)> = serde_json::from_str(&ran.stdout).unwrap();
        for ((value, name, message), (found_name, found)) in cases.iter().zip(said) {
            assert_eq!(*name, found_name, "{runtime:?} {value}: {found}");
            assert!(found.contains(message), "{runtime:?} {value}: {found}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_ends_with_what_it_said_last_however_it_ends() {
    let vm = Vm::new(EngineName::Gvisor).await;
    for runtime in BOTH {
        let exit = if runtime == Runtime::Deno { "Deno.exit" } else { "process.exit" };
        let at = format!("{runtime:?}");
        let last =
            vm.run(inline(runtime), "result.set(1); result.set([2]); console.log('out'); console.error('err')").await;
        assert_eq!(
            (last.outcome.result, last.stdout.as_str(), last.stderr.as_str()),
            (Some(json!([2])), "out\n", "err\n")
        );
        let exited = vm.run(inline(runtime), &format!("result.set(0); {exit}(3); result.set(1)")).await;
        assert_eq!((exited.done.exit_code, exited.outcome.result), (3, Some(json!(0))), "{at}");
        // As often as one likes: the slip stays small.
        let often =
            "const x = 'x'.repeat(100_000); for (let i = 0; i < 300; i++) result.set([i, x]); result.set('last')";
        assert_eq!(vm.run(inline(runtime), often).await.outcome.result, Some(json!("last")), "{at}");

        let failed = vm.run(inline(runtime), "result.set(1); result.error({ code: 5 }); console.log('goes on')").await;
        assert_eq!((failed.done.exit_code, failed.stdout.as_str()), (1, "goes on\n"), "{at}");
        assert_eq!(failed.outcome, Outcome { result: Some(json!(1)), error: Some(json!({"code": 5})) }, "{at}");
        let insists = vm.run(inline(runtime), &format!("result.error(null); {exit}(0)")).await;
        assert_eq!((insists.done.exit_code, insists.outcome.error), (1, Some(json!(null))), "{at}");
        let own_code = vm.run(inline(runtime), &format!("result.error('x'); {exit}(7)")).await;
        assert_eq!(own_code.done.exit_code, 7, "{at}");
        let carried =
            vm.run(inline(runtime), "result.error(Object.assign(new TypeError('no', { cause: 5 }), { at: 1 }))").await;
        let error = carried.outcome.error.unwrap();
        assert_eq!(
            (&error["name"], &error["message"], &error["cause"], &error["at"]),
            (&json!("TypeError"), &json!("no"), &json!(5), &json!(1))
        );

        let slow = Script { timeout_ms: 3000, ..inline(runtime) };
        let timed_out = vm.run(slow, "result.set('so far'); setTimeout(() => {}, 100_000)").await;
        assert!(timed_out.done.timed_out && timed_out.done.exit_code == -1, "{timed_out:?}");
        assert_eq!(timed_out.outcome.result, Some(json!("so far")), "{at}");
        let silent = vm.run(inline(runtime), "console.log(2 + 2)").await;
        assert_eq!((silent.stdout.as_str(), silent.outcome), ("4\n", Outcome::default()), "{at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_thrown_and_not_caught_is_the_error_and_still_printed() {
    let vm = Vm::new(EngineName::Gvisor).await;
    let cases = [
        ("throw new RangeError('top')", "RangeError", "top"),
        ("await Promise.reject(new Error('awaited'))", "Error", "awaited"),
        ("Promise.reject(new Error('rejected')); setTimeout(() => {}, 10_000)", "Error", "rejected"),
        ("setTimeout(() => { throw new TypeError('later') }, 5)", "TypeError", "later"),
        ("class Own extends Error { name = 'Own' }; throw new Own('named')", "Own", "named"),
        ("throw 'text'", "Error", "text"),
        ("throw { a: 1 }", "Error", "{\"a\":1}"),
        ("result.set(1n)", "TypeError", "value is a BigInt"),
    ];
    for runtime in BOTH {
        for (code, name, message) in cases {
            let ran = vm.run(inline(runtime), &format!("result.set('kept?');\n{code}")).await;
            assert_eq!(ran.done.exit_code, 1, "{runtime:?} {code}: {ran:?}");
            assert_eq!(ran.outcome.result, Some(json!("kept?")), "{runtime:?} {code}");
            let error = ran.outcome.error.unwrap_or_else(|| panic!("{runtime:?} {code}: {}", ran.stderr));
            assert_eq!(error["name"], name, "{runtime:?} {code}: {error}");
            assert!(error["message"].as_str().unwrap().contains(message), "{runtime:?} {code}: {error}");
            if code.contains("Error") {
                assert!(error["stack"].as_str().unwrap().contains(message), "{runtime:?} {code}: {error}");
            }
            assert!(!ran.stderr.is_empty(), "{runtime:?} {code}");
        }
        let said = vm.run(inline(runtime), "result.error('said'); throw new Error('thrown')").await;
        assert_eq!((said.done.exit_code, said.outcome.error), (1, Some(json!("said"))), "{runtime:?}");
        let caught = vm.run(inline(runtime), "try { throw 1 } catch {}; await Promise.reject(2).catch(() => {})").await;
        assert_eq!((caught.done.exit_code, caught.outcome), (0, Outcome::default()), "{runtime:?}");
        let broken = vm.run(inline(runtime), "this is no program").await;
        assert_eq!(broken.done.exit_code, 1, "{runtime:?}");
        assert!(broken.stderr.contains("SyntaxError"), "{runtime:?} {broken:?}");
        let endless =
            vm.run(Script { result_cap: 2000, ..inline(runtime) }, "throw new Error('x'.repeat(100_000))").await;
        assert_eq!(endless.outcome.error.unwrap()["message"], "x".repeat(300), "{runtime:?}");
    }
    let handled = [
        (
            Runtime::Deno,
            "addEventListener('error', (e) => { e.preventDefault(); console.log('handled') }); setTimeout(() => { throw 1 }, 1)",
        ),
        (
            Runtime::Deno,
            "addEventListener('unhandledrejection', (e) => { e.preventDefault(); console.log('handled'); Deno.exit() }); Promise.reject(1)",
        ),
        (
            Runtime::Node,
            "process.on('uncaughtException', () => console.log('handled')); setTimeout(() => { throw 1 }, 1)",
        ),
        (Runtime::Node, "process.on('unhandledRejection', () => console.log('handled')); Promise.reject(1)"),
    ];
    for (runtime, code) in handled {
        let ran = vm.run(inline(runtime), code).await;
        assert_eq!(
            (ran.done.exit_code, ran.stdout.as_str(), ran.outcome.error),
            (0, "handled\n", None),
            "{code} {}",
            ran.stderr
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_find_their_files_arguments_and_variables() {
    let vm = Vm::new(EngineName::Gvisor).await;
    vm.write("/workspace/lib/part.ts", "export const part: string = 'typed';").await;
    vm.write("/workspace/lib/part.mjs", "export const part = 'module';").await;
    vm.write("/workspace/lib/part.cjs", "module.exports = { part: 'common' };").await;
    vm.write("/workspace/data.json", "{\"n\": 5}").await;
    vm.write("/workspace/sub/main.ts", "import { part } from '../lib/part.ts'; interface A { n: number }; const a: A = { n: 1 }; result.set([part, a.n, Deno.args, import.meta.url])").await;
    vm.write(
        "/workspace/sub/main.mjs",
        "import { part } from '../lib/part.mjs'; result.set([part, process.argv.slice(2), import.meta.url])",
    )
    .await;
    vm.write(
        "/workspace/sub/main.cjs",
        "result.set([require('../lib/part.cjs').part, __filename, require.main === module])",
    )
    .await;
    let args: Vec<String> = ["--flag", "a b", "-", "", "'\"$x"].map(str::to_owned).into();
    let env = BTreeMap::from([("API_TOKEN".to_owned(), "secret=1".to_owned())]);
    let with = |script: Script| Script { args: args.clone(), env: env.clone(), ..script };

    let deno = "import { part } from './lib/part.ts'; import data from './data.json' with { type: 'json' }; const x: number = 1;\n\
                result.set([part, data.n, x, Deno.args, Deno.env.get('API_TOKEN'), Deno.cwd()])";
    let ran = vm.run(with(inline(Runtime::Deno)), deno).await;
    assert_eq!(ran.outcome.result, Some(json!(["typed", 5, 1, args, "secret=1", "/workspace"])), "{ran:?}");
    let node = "import { part } from './lib/part.mjs'; import fs from 'node:fs';\n\
                result.set([part, require('./lib/part.cjs').part, require('fs') === fs, process.argv.slice(2), process.env.API_TOKEN, process.env.TIFFIN_OUTCOME ?? null])";
    let ran = vm.run(with(inline(Runtime::Node)), node).await;
    assert_eq!(ran.outcome.result, Some(json!(["module", "common", true, args, "secret=1", null])), "{ran:?}");

    let ran = vm.run(with(path(Runtime::Deno, "/workspace/sub/main.ts")), "").await;
    assert_eq!(ran.outcome.result, Some(json!(["typed", 1, args, "file:///workspace/sub/main.ts"])), "{ran:?}");
    let ran = vm.run(with(path(Runtime::Node, "/workspace/sub/main.mjs")), "").await;
    assert_eq!(ran.outcome.result, Some(json!(["module", args, "file:///workspace/sub/main.mjs"])), "{ran:?}");
    let ran = vm.run(path(Runtime::Node, "/workspace/sub/main.cjs"), "").await;
    assert_eq!(ran.outcome.result, Some(json!(["common", "/workspace/sub/main.cjs", true])), "{ran:?}");
    let missing = vm.run(path(Runtime::Deno, "/workspace/none.ts"), "").await;
    assert!(missing.done.exit_code == 1 && missing.stderr.contains("none.ts"), "{missing:?}");
    let empty = vm.run(inline(Runtime::Node), "").await;
    assert_eq!(empty.done.exit_code, 0, "{empty:?}");
    // Workers and forked processes have no outcome of their own, and don't fail for it.
    let forks = "const { Worker } = require('worker_threads'); const w = new Worker('require(\"worker_threads\").parentPort.postMessage(typeof result)', { eval: true });\n\
                 w.on('message', (said) => result.set(said))";
    let ran = vm.run(inline(Runtime::Node), forks).await;
    assert_eq!(ran.outcome.result, Some(json!("undefined")), "{ran:?}");
    // Nothing of all that is left in the workspace.
    assert_eq!(sh(&*vm.host.engine, &vm.id, "ls -A").await.stdout, "data.json\nlib\nsub\n");
}

async fn deno_may_do_what_it_was_given_and_nothing_else(engine: EngineName) {
    let vm = Vm::new(engine).await;
    let attempt =
        "const tried = async (what) => { try { await what(); return 'done' } catch (e) { return e.name } };\n";
    let code = format!(
        "{attempt}result.set([\
         await tried(() => Deno.writeTextFile('/workspace/file', 'x')), await tried(() => Deno.readTextFile('/workspace/file')),\
         await tried(() => Deno.makeTempFile()), await tried(() => Deno.readTextFile('/etc/passwd')),\
         await tried(() => Deno.writeTextFile('/home/user/x', 'x')), await tried(() => Array.fromAsync(Deno.readDir('/run/tiffin-handover'))),\
         await tried(() => Deno.env.get('GIVEN')), await tried(() => Deno.env.get('HOME')), await tried(() => Deno.env.toObject()),\
         await tried(() => new Deno.Command('true').output()), await tried(() => Deno.dlopen('/lib/x.so', {{}})),\
         await tried(() => Deno.hostname()), await tried(() => Deno.listen({{ port: 0 }}).close()),\
         await tried(() => import('https://deno.land/std/version.ts'))])"
    );
    let env = BTreeMap::from([("GIVEN".to_owned(), "1".to_owned())]);
    let ran = vm.run(Script { env: env.clone(), ..inline(Runtime::Deno) }, &code).await;
    let no = "NotCapable";
    let expected = json!(["done", "done", "done", no, no, no, "done", no, no, no, no, no, no, "TypeError"]);
    assert_eq!(ran.outcome.result, Some(expected), "{ran:?}");
    let networked = format!("{attempt}result.set(await tried(() => Deno.listen({{ port: 0 }}).close()))");
    let ran = vm.run(Script { network: true, ..inline(Runtime::Deno) }, &networked).await;
    assert_eq!(ran.outcome.result, Some(json!("done")), "{ran:?}");
    for flags in [
        vec!["--allow-all"],
        vec!["-A"],
        vec!["--allow-read"],
        vec!["--allow-read=/etc", "--v8-flags=--max-old-space-size=100"],
    ] {
        let flags = flags.into_iter().map(str::to_owned).collect();
        let more = format!("{attempt}result.set(await tried(() => Deno.readTextFile('/etc/passwd')))");
        let ran = vm.run(Script { flags, ..inline(Runtime::Deno) }, &more).await;
        assert_eq!(ran.outcome.result, Some(json!("done")), "{ran:?}");
    }
    assert!(ran.stderr.is_empty(), "{ran:?}");
}

async fn what_can_not_be_run_is_refused_and_says_why(engine: EngineName) {
    let vm = Vm::new(engine).await;
    let flagged = |flag: &str| Script { flags: vec![flag.to_owned()], ..inline(Runtime::Deno) };
    for flag in ["main.ts", "-", "--", ""] {
        let (code, message) = vm.refusal(flagged(flag)).await;
        assert!(code == FailureCode::BadRequest && message.contains("must begin with -"), "{message}");
    }
    for name in ["A,B", "A B", "1A", "", "TIFFIN_OUTCOME"] {
        let env = BTreeMap::from([(name.to_owned(), "x".to_owned())]);
        let (code, message) = vm.refusal(Script { env, ..inline(Runtime::Deno) }).await;
        assert!(code == FailureCode::BadRequest && message.contains("environment variable"), "{name}: {message}");
    }
    for source in ["main.ts", "/etc/passwd", "/workspace", "/workspace/", "/workspace/../etc/passwd", "/workspaces/a"] {
        let (code, message) = vm.refusal(path(Runtime::Node, source)).await;
        assert!(code == FailureCode::Forbidden && message.contains("/workspace"), "{source}: {message}");
    }
    for (runtime, name) in [(Runtime::Deno, "deno"), (Runtime::Node, "node")] {
        let env = BTreeMap::from([("PATH".to_owned(), "/nowhere".to_owned())]);
        let (code, message) = vm.refusal(Script { env, ..inline(runtime) }).await;
        assert!(code == FailureCode::BadCommand && message.contains(name), "{message}");
    }
}

async fn what_other_processes_do_to_a_result_harms_nobody(engine: EngineName) {
    let vm = Vm::new(engine).await;
    let forge = |what: &str| {
        format!(
            "const fs = require('fs'); result.set('honest');\n\
             const slip = fs.readdirSync('/proc/self/fd').map((fd) => {{ try {{ return fs.readlinkSync('/proc/self/fd/' + fd) }} catch {{ return '' }} }}).find((name) => name.includes('slip'));\n{what}"
        )
    };
    let run = async |what: &str| vm.run(Script { result_cap: 1000, ..inline(Runtime::Node) }, &forge(what)).await;
    let large = run("fs.appendFileSync(slip, '{\"result\":\"' + 'x'.repeat(5000) + '\"}\\n')").await;
    assert!(large.outcome.error.unwrap()["message"].as_str().unwrap().contains("1000 bytes"), "{:?}", large.stderr);
    assert_eq!(large.done.exit_code, 1);
    let nonsense = run("fs.writeFileSync(slip, 'nonsense\\n')").await;
    assert!(nonsense.outcome.error.is_some() && nonsense.done.exit_code == 1);
    let emptied = run("fs.truncateSync(slip, 0)").await;
    assert_eq!((emptied.outcome, emptied.done.exit_code), (Outcome::default(), 0));
    let removed = run("try { fs.unlinkSync(slip) } catch (e) { result.set(e.code) }").await;
    assert_eq!(removed.outcome.result, Some(json!("EACCES")), "{}", removed.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_mebibytes_go_up_and_down_unchanged() {
    let vm = Vm::new(EngineName::Gvisor).await;
    let make = "mkdir data && cd data && for i in $(seq 40); do head -c 262144 /dev/urandom > f$i; done; sha256sum f* > ../sums";
    assert_eq!(sh(&*vm.host.engine, &vm.id, make).await.done.exit_code, 0);
    let packed = vm.files(FileAction::Pack { path: "/workspace/data".to_owned() }, b"").await;
    let limits = UnpackLimits { unpacked_bytes: 64 << 20, entries: 100, ratio: 100 };
    vm.files(FileAction::Unpack { dest: "/workspace/new/data".to_owned(), limits }, &packed).await;
    let checked =
        sh(&*vm.host.engine, &vm.id, "cd new/data && sha256sum -c --quiet ../../sums && ls | wc -l; ls -A /workspace")
            .await;
    assert_eq!(checked.stdout, "40\ndata\nnew\nsums\n", "{checked:?}");
    // What is refused at once is told, too, while the rest of it is still on its way.
    for _ in 0..10 {
        let limits = UnpackLimits { unpacked_bytes: 1, ..limits };
        let refused = vm.try_files(FileAction::Unpack { dest: "/workspace/x".to_owned(), limits }, &packed).await;
        assert!(
            matches!(&refused, Err(AgentError::Refused(failure)) if failure.code == FailureCode::TooLarge),
            "{refused:?}"
        );
    }
}
