//! Where settings come from, and what is wrong with them when something is.

use std::{collections::BTreeMap, fmt, path::Path, path::PathBuf, str::FromStr, time::Duration};

use camino::Utf8PathBuf;
use toml::de::{DeTable, DeValue};

use super::keys::{Allowed, KEYS, Key};

/// Variables that begin with `TIFFIN_` and are no settings of the server.
const NOT_SETTINGS: &[&str] = &[
    "TIFFIN_URL",
    "TIFFIN_API_KEY",
    "TIFFIN_CONFIG",
    "TIFFIN_ADMIN_PASSWORD",
    "TIFFIN_INGRESS_URL",
    "TIFFIN_INGRESS_CA",
];
/// So are all that begin so.
const NOT_SETTINGS_PREFIX: &str = "TIFFIN_TEST_";

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of the file.
    File(PathBuf, usize),
    /// An environment variable.
    Environment(String),
    /// A flag.
    Flag,
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path, line) => write!(f, "{}, line {line}", path.display()),
            Origin::Environment(name) => write!(f, "environment variable {name}"),
            Origin::Flag => f.write_str("command line"),
            Origin::Default => f.write_str("default"),
        }
    }
}

/// The configuration is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration {}: make it readable or name another with --config", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{origin}: not valid TOML: {message}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What.
        message: String,
    },
    /// There is no such setting.
    #[error("{origin}: unknown setting {key}: {}", hint(.key))]
    Unknown {
        /// The name that was given.
        key: String,
        /// Where.
        origin: Origin,
    },
    /// The value is not allowed.
    #[error("{origin}: {key} must be {allowed}{got}: correct it, or remove it to use the default ({default})")]
    Value {
        /// The setting.
        key: &'static str,
        /// Where.
        origin: Origin,
        /// What it may be.
        allowed: Allowed,
        /// What it is, where that is no secret.
        got: String,
        /// Its default.
        default: &'static str,
    },
}

fn hint(key: &str) -> String {
    let last = key.rsplit('.').next().unwrap_or(key);
    match KEYS.iter().find(|known| !known.hidden && known.name.rsplit('.').next() == Some(last)) {
        Some(known) => format!("did you mean {}?", known.name),
        None => "remove it; the documentation's configuration page lists every setting".into(),
    }
}

struct Value {
    text: String,
    origin: Origin,
}

/// Every setting's text, and where it came from.
pub(super) struct Values(BTreeMap<&'static str, Value>);

pub(super) fn collect(
    file: Option<&Path>,
    env: impl Iterator<Item = (String, String)>,
    overrides: &[(String, String)],
) -> Result<Values, ConfigError> {
    let default = |key: &Key| (key.name, Value { text: key.default.into(), origin: Origin::Default });
    let mut values = Values(KEYS.iter().map(default).collect());
    if let Some(path) = file {
        let unreadable = |source| ConfigError::Unreadable { path: path.into(), source };
        values.take_file(path, &std::fs::read_to_string(path).map_err(unreadable)?)?;
    }
    for (name, text) in env {
        let Some(rest) = name.strip_prefix("TIFFIN_") else { continue };
        if NOT_SETTINGS.contains(&name.as_str()) || name.starts_with(NOT_SETTINGS_PREFIX) {
            continue;
        }
        let wanted = rest.to_lowercase();
        let known =
            KEYS.iter().find(|key| key.name.replace('.', "__") == wanted || key.name.replace('.', "_") == wanted);
        let origin = Origin::Environment(name.clone());
        values.set(known.ok_or_else(|| ConfigError::Unknown { key: name, origin: origin.clone() })?, text, origin);
    }
    for (name, text) in overrides {
        values.set_named(name, text.clone(), Origin::Flag)?;
    }
    Ok(values)
}

impl Values {
    fn set(&mut self, key: &Key, text: String, origin: Origin) {
        self.0.insert(key.name, Value { text, origin });
    }

    fn set_named(&mut self, name: &str, text: String, origin: Origin) -> Result<(), ConfigError> {
        match KEYS.iter().find(|key| key.name == name) {
            Some(key) => {
                self.set(key, text, origin);
                Ok(())
            }
            None => Err(ConfigError::Unknown { key: name.into(), origin }),
        }
    }

    fn take_file(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let line = |at: usize| text.as_bytes()[..at.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1;
        let origin = |at: usize| Origin::File(path.into(), line(at));
        let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            origin: origin(error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        for (name, value) in table.get_ref() {
            let at = origin(name.span().start);
            let DeValue::Table(section) = value.get_ref() else {
                self.set_named(name.get_ref(), scalar(value.get_ref()), at)?;
                continue;
            };
            for (inner, value) in section {
                let full = format!("{}.{}", name.get_ref(), inner.get_ref());
                self.set_named(&full, scalar(value.get_ref()), origin(inner.span().start))?;
            }
        }
        Ok(())
    }

    /// The value that `read` makes of the text.
    pub(super) fn with<T>(&self, name: &'static str, read: impl FnOnce(&str) -> Option<T>) -> Result<T, ConfigError> {
        let (key, value) = (key(name), &self.0[name]);
        read(value.text.trim()).ok_or_else(|| ConfigError::Value {
            key: name,
            origin: value.origin.clone(),
            allowed: key.allowed,
            got: if name == "database_url" { String::new() } else { format!(", not {:?}", value.text) },
            default: if key.default.is_empty() { key.unset } else { key.default },
        })
    }

    /// The same, where an empty text is no value.
    pub(super) fn optional<T>(
        &self,
        name: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.with(name, |text| if text.is_empty() { Some(None) } else { read(text).map(Some) })
    }

    pub(super) fn parse<T: FromStr>(&self, name: &'static str) -> Result<T, ConfigError> {
        self.with(name, |text| text.parse().ok())
    }

    pub(super) fn integer(&self, name: &'static str) -> Result<u64, ConfigError> {
        let Allowed::Integer(least, most) = key(name).allowed else { unreachable!("{name} is a number in KEYS") };
        self.with(name, |text| text.parse().ok().filter(|number| (least..=most).contains(number)))
    }

    pub(super) fn count(&self, name: &'static str) -> Result<usize, ConfigError> {
        self.integer(name).map(|number| usize::try_from(number).unwrap_or(usize::MAX))
    }

    pub(super) fn small(&self, name: &'static str) -> Result<u32, ConfigError> {
        self.integer(name).map(|number| u32::try_from(number).unwrap_or(u32::MAX))
    }

    pub(super) fn millis(&self, name: &'static str) -> Result<Duration, ConfigError> {
        self.integer(name).map(Duration::from_millis)
    }

    pub(super) fn one_of(&self, name: &'static str) -> Result<&'static str, ConfigError> {
        let Allowed::OneOf(words) = key(name).allowed else { unreachable!("{name} is a choice in KEYS") };
        self.with(name, |text| words.iter().copied().find(|word| *word == text))
    }

    pub(super) fn path(&self, name: &'static str) -> Result<Utf8PathBuf, ConfigError> {
        self.with(name, absolute)
    }

    pub(super) fn optional_path(&self, name: &'static str) -> Result<Option<Utf8PathBuf>, ConfigError> {
        self.optional(name, absolute)
    }
}

fn absolute(text: &str) -> Option<Utf8PathBuf> {
    Some(Utf8PathBuf::from(text)).filter(|path| path.is_absolute())
}

fn key(name: &'static str) -> &'static Key {
    KEYS.iter().find(|key| key.name == name).expect("the configuration asks only for names in KEYS")
}

/// The text of a value; lists with commas between. What can't be a setting's value becomes a text that none allows.
fn scalar(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => number.as_str().to_owned(),
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(at) => at.to_string(),
        DeValue::Array(items) => items.iter().map(|item| scalar(item.get_ref())).collect::<Vec<_>>().join(","),
        DeValue::Table(_) => "a table".into(),
    }
}
