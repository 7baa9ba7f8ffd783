//! How a process in an image starts: the part of the OCI image configuration that the platform uses.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use tiffin_types::program::{Program, ProgramError};

/// The `config` object of an OCI image configuration, under its own names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// Environment, as `NAME=value`.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Absolute folder that commands start in.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// `uid:gid`, both numbers, in images that the platform makes; in others whatever
    /// [`Program::user`] may be.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
    /// The program, and its first arguments.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Arguments, or the program where there is no entrypoint.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Ports that the program listens on, such as `80/tcp`; the values say nothing.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// The signal that asks the program to end; empty for SIGTERM.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// Tools write `null` for what is empty.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl ImageConfig {
    /// The image's environment: the last of a name counts, and an entry without `=` says that there is none of that name.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let mut env = BTreeMap::new();
        for entry in &self.env {
            match entry.split_once('=') {
                Some((name, value)) => env.insert(name.to_owned(), value.to_owned()),
                None => env.remove(entry),
            };
        }
        env
    }

    /// The image's program, with the environment of whoever runs it over the image's own.
    ///
    /// # Errors
    /// [`ProgramError`]: there is none, or it breaks a limit.
    pub fn program(&self, own_env: &BTreeMap<String, String>) -> Result<Program, ProgramError> {
        let mut env = self.environment();
        env.extend(own_env.iter().map(|(name, value)| (name.clone(), value.clone())));
        let program = Program {
            argv: self.entrypoint.iter().chain(&self.cmd).cloned().collect(),
            env,
            cwd: self.working_dir.clone(),
            user: self.user.clone(),
            stop_signal: self.stop_signal.parse()?,
        };
        program.check()?;
        Ok(program)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> ImageConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn entrypoint_and_command_are_put_together_and_own_variables_win() {
        let config = config(
            r#"{"Entrypoint": ["/entry", "-x"], "Cmd": ["serve"], "Env": ["PATH=/bin", "A=1", "A=2=3", "B=1"],
                "WorkingDir": "/srv", "User": "www", "StopSignal": "SIGQUIT", "ExposedPorts": {"80/tcp": {}}}"#,
        );
        let own = BTreeMap::from([("B".to_owned(), "own".to_owned()), ("C".to_owned(), String::new())]);
        let program = config.program(&own).unwrap();
        assert_eq!(program.argv, ["/entry", "-x", "serve"]);
        let env: Vec<_> = program.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(env, ["A=2=3", "B=own", "C=", "PATH=/bin"]);
        assert_eq!((program.cwd.as_str(), program.user.as_str(), program.stop_signal.number()), ("/srv", "www", 3));
        assert_eq!(config.exposed_ports.keys().collect::<Vec<_>>(), ["80/tcp"]);
    }

    #[test]
    fn what_is_empty_and_new_is_not_written() {
        // The default image's recipe is known by its configuration's text.
        let text = serde_json::to_string(&ImageConfig::default()).unwrap();
        assert_eq!(text, r#"{"Env":[],"WorkingDir":"","User":""}"#);
    }

    #[test]
    fn nulls_and_what_is_not_there_are_empty() {
        let config = config(r#"{"Entrypoint": null, "Cmd": ["sh"], "Env": null, "ExposedPorts": null, "Labels": {}}"#);
        assert_eq!(config.program(&BTreeMap::new()).unwrap().argv, ["sh"]);
    }

    #[test]
    fn an_image_without_a_program_or_with_an_unknown_signal_is_refused_in_words() {
        let none = ImageConfig::default().program(&BTreeMap::new()).unwrap_err();
        assert!(none.to_string().contains("neither an entrypoint nor a command"), "{none}");
        let signal = config(r#"{"Cmd": ["sh"], "StopSignal": "SIGNOPE"}"#).program(&BTreeMap::new()).unwrap_err();
        assert!(signal.to_string().contains("SIGNOPE"), "{signal}");
    }
}
