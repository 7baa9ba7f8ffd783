//! `tiffin vm exec`: runs a command in a VM, passes its output on as it comes, and its exit code.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use reqwest::{
    Method, Response,
    header::{ACCEPT, HeaderMap, HeaderValue},
};
use serde_json::{Value, json};
use tiffin_types::{id::VmId, limits};

use crate::{
    client::{
        Call, Client,
        sse::{Event, Parser},
    },
    failure::{ApiError, Failure},
    output,
};

/// Exit code of an error that is not the command's.
pub(crate) const OWN_ERROR: u8 = 125;
/// Exit code of a command that ran into its time limit, as `timeout` has it.
const TIMED_OUT: u8 = 124;
/// How much longer than the command's own limit the server has to answer.
pub(super) const GRACE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
#[command(after_help = "\
One word after -- is a shell command line, run by bash -lc in the VM (sh -lc where it has no bash):
    tiffin vm exec ID -- 'ls -l | wc -l'
Several words are one program and its arguments; each arrives exactly as it was given:
    tiffin vm exec ID -- python3 -c 'print(1 + 1)'

Exit codes: the command's own; 124 when it ran into its time limit; 125 when Tiffin itself failed
(no server, no such VM, a VM that isn't running, wrong arguments).")]
pub(crate) struct ExecArgs {
    id: VmId,
    /// The folder to run in; /workspace when not given
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Set an environment variable (may be repeated)
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = env_pair)]
    env: Vec<(String, String)>,
    /// Time limit in seconds, fractions allowed; the command and all it started are killed then [default: 30]
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Print the API's JSON at the end, instead of the output as it comes
    #[arg(long)]
    pub(crate) json: bool,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// Runs the command; the exit code is the command's.
pub(crate) async fn run(client: &Client, args: &ExecArgs) -> Result<ExitCode, Failure> {
    let body = body(args);
    let path = format!("/v1/vms/{}/exec", args.id);
    let limit = args.timeout.unwrap_or(Duration::from_millis(limits::EXEC_TIMEOUT_MS_DEFAULT)) + GRACE;
    let call = Call { body: Some(&body), limit, ..Call::new(Method::POST, &path) };
    carry_out(client, call, args.json).await
}

/// Makes a call that runs something. Its output is passed on as it comes and its result printed last, or the API's JSON is
/// printed alone; the exit code is what it ended with.
pub(super) async fn carry_out(client: &Client, call: Call<'_>, json: bool) -> Result<ExitCode, Failure> {
    if json {
        let end = client.json(call).await?;
        output::json(&end)?;
        return exit_code(&end);
    }
    let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("text/event-stream"))]);
    let answer = client.send(Call { headers, ..call }).await?;
    let end = pass_on(client, answer).await?;
    // A program's; a command has none.
    if let Some(result) = end.get("result") {
        output::print(&format!("{result}\n"))?;
    }
    tell_flags(&end)?;
    exit_code(&end)
}

/// Says what an exit code doesn't.
fn tell_flags(result: &Value) -> Result<(), Failure> {
    for (flag, note) in [("truncated", "the output was cut at the server's limit"), ("timedOut", "time limit reached")]
    {
        if result.get(flag) == Some(&Value::Bool(true)) {
            output::print_error(&format!("tiffin: {note}\n"))?;
        }
    }
    Ok(())
}

fn body(args: &ExecArgs) -> Value {
    let mut body = json!({ "cmd": command_line(&args.command) });
    if let Some(cwd) = &args.cwd {
        body["cwd"] = cwd.as_str().into();
    }
    if !args.env.is_empty() {
        body["env"] = args.env.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
    }
    if let Some(timeout) = args.timeout {
        body["timeoutMs"] = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).into();
    }
    body
}

/// Writes the stream's output where it belongs until its last event, which it returns.
async fn pass_on(client: &Client, mut answer: Response) -> Result<Value, Failure> {
    let mut parser = Parser::default();
    while let Some(chunk) = client.chunk(&mut answer).await? {
        for event in parser.push(&chunk).map_err(|error| Failure::Exchange(error.to_string()))? {
            if let Some(end) = take(&event)? {
                return Ok(end);
            }
        }
    }
    Err(Failure::Exchange("the server's stream ended before the command did".to_owned()))
}

/// Handles one event; the last one's data is returned.
fn take(event: &Event) -> Result<Option<Value>, Failure> {
    let data: Value = serde_json::from_str(&event.data)
        .map_err(|error| Failure::Exchange(format!("an event of the stream is no JSON: {error}")))?;
    let text = || data.get("data").and_then(Value::as_str).unwrap_or_default().as_bytes();
    match event.name.as_str() {
        "stdout" => write_now(&mut io::stdout().lock(), text())?,
        "stderr" => write_now(&mut io::stderr().lock(), text())?,
        "exit" => return Ok(Some(data)),
        "error" => return Err(ApiError::read(0, event.data.as_bytes(), None).into()),
        // A later server may send more kinds.
        _ => {}
    }
    Ok(None)
}

fn write_now(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// The exit code that a command's end means here.
pub(super) fn exit_code(result: &Value) -> Result<ExitCode, Failure> {
    if result.get("timedOut") == Some(&Value::Bool(true)) {
        return Ok(ExitCode::from(TIMED_OUT));
    }
    let code = result.get("exitCode").and_then(Value::as_i64);
    match code.and_then(|code| u8::try_from(code).ok()) {
        Some(code) => Ok(ExitCode::from(code)),
        None => Err(Failure::Exchange(format!("the command ended without an exit code ({code:?})"))),
    }
}

/// What the guest's shell is given: one word as it is, several words each quoted.
pub(super) fn command_line(words: &[String]) -> String {
    match words {
        [line] => line.clone(),
        words => words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
    }
}

/// The word as the shell reads it back unchanged.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:@%+,".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// `NAME=value`.
pub(super) fn env_pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    if !limits::is_env_name(name) {
        return Err(format!("{name:?} is no environment variable's name (letters, digits and _)"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// A time limit.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let limit = text.parse().ok().and_then(|secs| Duration::try_from_secs_f64(secs).ok());
    limit
        .filter(|limit| (1..=86_400_000).contains(&limit.as_millis()))
        .ok_or_else(|| "must be a number of seconds from 0.001 to 86400".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(words: &[&str]) -> String {
        command_line(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn one_word_is_a_shell_line_and_several_are_a_program() {
        assert_eq!(line(&["ls | wc -l"]), "ls | wc -l");
        assert_eq!(line(&["echo", "a b", "$HOME", "it's", ""]), r"echo 'a b' '$HOME' 'it'\''s' ''");
    }

    #[test]
    fn a_command_that_ran_into_its_limit_is_124_whatever_its_code() {
        let code = |result: Value| format!("{:?}", exit_code(&result).unwrap());
        assert_eq!(code(json!({"exitCode": -1, "timedOut": true})), format!("{:?}", ExitCode::from(124)));
        assert_eq!(code(json!({"exitCode": 3})), format!("{:?}", ExitCode::from(3)));
        assert!(exit_code(&json!({"exitCode": -1})).is_err());
        assert!(exit_code(&json!({})).is_err());
    }

    #[test]
    fn pairs_and_seconds_are_checked() {
        assert_eq!(env_pair("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert!(env_pair("1A=b").is_err() && env_pair("A").is_err() && env_pair("=b").is_err());
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for bad in ["0", "-1", "nan", "inf", "x", "1e9"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_real_shell_reads_quoted_words_back_unchanged(words in prop::collection::vec("[^\0]{0,12}", 1..5)) {
            let words: Vec<String> = ["printf".to_owned(), "%s\\n".to_owned()].into_iter().chain(words).collect();
            let script = command_line(&words);
            let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            let want: String = words[2..].iter().map(|word| format!("{word}\n")).collect();
            prop_assert_eq!(String::from_utf8(out.stdout).unwrap(), want);
        }
    }
}
