use std::io::Write;

use super::*;

fn load(file: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let mut path = tempfile::NamedTempFile::new().unwrap();
    path.write_all(file.as_bytes()).unwrap();
    let own = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    };
    Config::load(Some(path.path()), own(env).into_iter(), &own(flags))
}

#[test]
fn nothing_set_is_a_working_configuration() {
    let config = Config::load(None, std::iter::empty(), &[]).unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:3000");
    assert_eq!(config.database_url.reveal(), "sqlite:///var/lib/tiffin/tiffin.db");
    assert_eq!(config.engine, EngineChoice::Auto);
    assert_eq!(config.network.resolvers, None);
    assert_eq!(config.fault, None);
}

#[test]
fn flags_win_over_the_environment_which_wins_over_the_file() {
    let file = "data_dir = '/file'\nlisten = '127.0.0.1:1'\n[exec]\nmax_timeout_ms = 1_000\n";
    let env = [("TIFFIN_LISTEN", "127.0.0.1:2"), ("TIFFIN_EXEC__MAX_CONCURRENT", "3"), ("HOME", "/root")];
    let config = load(file, &env, &[("listen", "127.0.0.1:3")]).unwrap();
    assert_eq!(config.listen.port(), 3);
    assert_eq!(config.data_dir, "/file");
    assert_eq!((config.exec.max_timeout_ms, config.exec.max_concurrent), (1000, 3));
    assert_eq!(config.database_url.reveal(), "sqlite:///file/tiffin.db");
}

#[test]
fn nested_settings_have_a_flat_variable_too_and_a_list_may_be_a_list() {
    let file = "network.resolvers = ['192.0.2.1', '2001:db8::1']";
    let config = load(file, &[("TIFFIN_LOG_FORMAT", "json"), ("TIFFIN_API_KEY", "x")], &[]).unwrap();
    assert!(config.log.json);
    assert_eq!(config.network.resolvers.unwrap().len(), 2);
    let mut flat: Vec<String> = KEYS.iter().map(|key| key.name.replace('.', "_")).collect();
    flat.sort();
    flat.dedup();
    assert_eq!(flat.len(), KEYS.len(), "two settings share a flat variable");
}

#[test]
fn errors_name_the_key_the_source_what_is_allowed_and_the_remedy() {
    let message = |error: Result<Config, ConfigError>| error.unwrap_err().to_string();
    let said = message(load("\n[exec]\nmax_timeout_ms = 0\n", &[], &[]));
    assert!(said.contains("line 3") && said.contains("exec.max_timeout_ms"), "{said}");
    assert!(said.contains("1000 to 86400000") && said.contains("remove it"), "{said}");

    let said = message(load("", &[("TIFFIN_LOG__FORMAT", "xml")], &[]));
    assert!(said.contains("TIFFIN_LOG__FORMAT") && said.contains("text, json") && said.contains("xml"), "{said}");

    let said = message(load("", &[], &[("listen", "somewhere")]));
    assert!(said.contains("command line") && said.contains("listen"), "{said}");
}

#[test]
fn unknown_settings_are_errors_from_every_source() {
    for error in [
        load("max_timeout_ms = 1", &[], &[]),
        load("[exec]\nmax_timout_ms = 1", &[], &[]),
        load("", &[("TIFFIN_LISTENN", "x")], &[]),
        load("", &[], &[("nope", "x")]),
    ] {
        assert!(matches!(error, Err(ConfigError::Unknown { .. })), "{error:?}");
    }
    let said = load("max_timeout_ms = 1", &[], &[]).unwrap_err().to_string();
    assert!(said.contains("did you mean exec.max_timeout_ms?"), "{said}");
}

#[test]
fn every_setting_refuses_nonsense() {
    for key in KEYS.iter().filter(|key| key.name != "fault") {
        let error = load("", &[], &[(key.name, "\u{1}nonsense")]).expect_err(key.name);
        assert!(matches!(error, ConfigError::Value { key: named, .. } if named == key.name), "{error}");
    }
}

#[test]
fn a_database_password_is_in_no_error_and_no_debug_text() {
    let error = load("", &[("TIFFIN_DATABASE_URL", "mysql://user:hunter2@host/db")], &[]).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"));
    let config = load("", &[("TIFFIN_DATABASE_URL", "postgres://user:hunter2@host/db")], &[]).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
}

#[test]
fn a_broken_file_is_told_with_its_line() {
    let error = load("listen = '127.0.0.1:1'\n= 3\n", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("line 2"), "{error}");
}

#[test]
fn what_the_pool_keeps_is_sizes_within_their_ranges() {
    let config = load("pool.keep = '1x256=2, 2x1024=1'", &[], &[]).unwrap();
    let keep = |cpus, mem_mb, count| Keep { cpus, mem_mb, count };
    assert_eq!(config.pool.keep, [keep(1, 256, 2), keep(2, 1024, 1)]);
    for bad in ["1x256", "256=1", "9x256=1", "1x64=1", "1x256=-1", "1x256=1,", "1x256=1001"] {
        assert!(load("", &[], &[("pool.keep", bad)]).is_err(), "{bad}");
    }
}
