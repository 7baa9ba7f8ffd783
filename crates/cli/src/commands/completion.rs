//! `tiffin completion`: a script that makes a shell complete the command line.

use std::process::ExitCode;

use clap::{Args, CommandFactory, ValueEnum};

use crate::{args::Cli, failure::Failure, output};

#[derive(Debug, Args)]
#[command(after_help = "\
bash:  tiffin completion bash > /etc/bash_completion.d/tiffin
zsh:   tiffin completion zsh > \"${fpath[1]}/_tiffin\"
fish:  tiffin completion fish > ~/.config/fish/completions/tiffin.fish")]
pub(crate) struct CompletionArgs {
    /// The shell
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Prints the script.
pub(crate) fn run(args: &CompletionArgs) -> Result<ExitCode, Failure> {
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tiffin", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
