//! `tiffin-agent`: PID 1 of a guest. See the library for what it does; this only starts it.

fn main() -> std::process::ExitCode {
    tiffin_agent::run()
}
