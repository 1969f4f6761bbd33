//! Settings of a role or a client: one TOML file, below the environment, below the flags.
//!
//! All layers become one table before they are checked, so that a key is judged by the same rules wherever it came
//! from, and an error still names its place: file and line, flag, or variable. Keys that nothing reads are errors.
//! Environment: `VOLLEY_<ROLE>_<KEY>`, with a TOML value or bare text. Flags that have no name of their own are set
//! with `--set key=value`. Left out: reloading; a role reads its settings once.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};
use wire::Code;

use crate::failure::Failure;

/// Largest settings file in bytes: they are written by people.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// One layer over the file: what it says and who said it.
#[derive(Debug)]
struct Layer {
    /// `--listen`, `--set listen`, `VOLLEY_HOSTD_LISTEN`.
    origin: String,
    /// A TOML document of one key.
    text: String,
}

/// Layers of one configuration, lowest first.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    file: Option<PathBuf>,
    over: Vec<Layer>,
}

impl Layers {
    /// Starts with a file, or with nothing but defaults.
    pub(crate) fn over_file(file: Option<PathBuf>) -> Self {
        Self { file, over: Vec::new() }
    }

    /// Adds the variables that start with `prefix` (`VOLLEY_HOSTD_`), except those in `not`.
    pub(crate) fn environment(mut self, prefix: &str, not: &[&str]) -> Self {
        let mut found: Vec<_> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with(prefix) && !not.contains(&name.as_str()))
            .collect();
        found.sort();
        for (name, value) in found {
            let key = name[prefix.len()..].to_ascii_lowercase();
            self.over
                .push(Layer { text: format!("{key} = {}\n", toml_value(&value)), origin: name });
        }
        self
    }

    /// Adds the flags that were given: `flags` serialises to a table without those that were not.
    pub(crate) fn flags<T: Serialize>(mut self, flags: &T) -> Result<Self, Failure> {
        let table = toml::Table::try_from(flags)
            .map_err(|error| Failure::new(Code::Internal, format!("flags: {error}")))?;
        for (key, value) in table {
            let origin = format!("--{}", key.replace('_', "-"));
            self.over.push(Layer { origin, text: format!("{key} = {value}\n") });
        }
        Ok(self)
    }

    /// Adds `--set key=value` settings.
    pub(crate) fn set(mut self, settings: &[String]) -> Result<Self, Failure> {
        for setting in settings {
            let Some((key, value)) = setting.split_once('=') else {
                return Err(Failure::new(Code::Config, format!("--set {setting}: no `=` in it"))
                    .hint("write --set key=value"));
            };
            let (key, value) = (key.trim(), toml_value(value.trim()));
            self.over
                .push(Layer { origin: format!("--set {key}"), text: format!("{key} = {value}\n") });
        }
        Ok(self)
    }

    /// The checked settings.
    pub(crate) fn load<T: DeserializeOwned>(self) -> Result<T, Failure> {
        let text = match &self.file {
            Some(path) => read(path)?,
            None => String::new(),
        };
        let places = Places { file: self.file.as_deref(), text: &text, over: &self.over };
        let mut root = DeTable::parse(&text).map_err(|error| places.failure(&error, 0))?;
        let mut base = text.len() + 1;
        for layer in &self.over {
            let parsed =
                DeTable::parse(&layer.text).map_err(|error| places.failure(&error, base))?;
            merge(root.get_mut(), parsed.into_inner(), base);
            base += layer.text.len() + 1;
        }
        let root = toml::de::Deserializer::from(root);
        T::deserialize(root).map_err(|error| places.failure(&error, 0))
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    let fail = |error| Failure::io(format!("{}: cannot read settings", path.display()), &error);
    let bytes = fs::metadata(path).map_err(fail)?.len();
    if bytes > FILE_BYTES_MAX {
        let what = format!("{}: {bytes} bytes, more than 1 MiB of settings", path.display());
        return Err(Failure::new(Code::Config, what));
    }
    fs::read_to_string(path).map_err(fail)
}

/// Text from outside a file as a TOML value: what it says where it is TOML, else a string.
fn toml_value(text: &str) -> String {
    let typed = format!("v = {text}").parse::<toml::Table>().is_ok_and(|table| table.len() == 1);
    if typed { text.to_owned() } else { toml::Value::String(text.to_owned()).to_string() }
}

/// Puts `over` on `under`; tables are merged, anything else is replaced. Spans move up by `base`, so that each layer
/// has its own range of positions.
fn merge<'i>(under: &mut DeTable<'i>, over: DeTable<'i>, base: usize) {
    for (key, value) in over {
        let key_name = key.get_ref().clone();
        let span = shifted(value.span(), base);
        match (under.get_mut(key_name.as_ref()), value.into_inner()) {
            (Some(old), DeValue::Table(new)) if matches!(old.get_ref(), DeValue::Table(_)) => {
                if let DeValue::Table(old) = old.get_mut() {
                    merge(old, new, base);
                }
            }
            (_, new) => {
                under.remove(key_name.as_ref());
                let key = Spanned::new(shifted(key.span(), base), key_name);
                under.insert(key, Spanned::new(span, shift_value(new, base)));
            }
        }
    }
}

fn shift_value(value: DeValue<'_>, base: usize) -> DeValue<'_> {
    match value {
        DeValue::Table(table) => {
            let mut moved = DeTable::new();
            merge(&mut moved, table, base);
            DeValue::Table(moved)
        }
        other => other,
    }
}

fn shifted(span: Range<usize>, base: usize) -> Range<usize> {
    span.start + base..span.end + base
}

/// Where each position of the merged table came from.
struct Places<'a> {
    file: Option<&'a Path>,
    text: &'a str,
    over: &'a [Layer],
}

impl Places<'_> {
    /// The failure with its place; `base` is where the parsed text starts.
    fn failure(&self, error: &toml::de::Error, base: usize) -> Failure {
        let said = error.message();
        let at = error.span().map(|span| span.start + base);
        let place = match at {
            // The whole document: something is missing, in no line.
            Some(0) | None if said.starts_with("missing") => self.whole(),
            Some(at) => self.place(at),
            None => self.whole(),
        };
        Failure::new(Code::Config, format!("{place}: {said}"))
    }

    fn whole(&self) -> String {
        self.file.map_or_else(|| "settings".to_owned(), |file| file.display().to_string())
    }

    fn place(&self, at: usize) -> String {
        if at <= self.text.len() && self.file.is_some() {
            let before = &self.text.as_bytes()[..at];
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
            return format!("{}:{line}:{column}", self.whole());
        }
        let mut base = self.text.len() + 1;
        for layer in self.over {
            if at >= base && at < base + layer.text.len() + 1 {
                return layer.origin.clone();
            }
            base += layer.text.len() + 1;
        }
        self.whole()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        name: String,
        #[serde(default)]
        count: u32,
        #[serde(default)]
        hosts: Vec<String>,
        #[serde(default)]
        pool: Pool,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Pool {
        size: u32,
        fill: bool,
    }

    #[derive(Serialize)]
    struct Flags {
        #[serde(skip_serializing_if = "Option::is_none")]
        count: Option<u32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a scratch file");
        file.write_all(text.as_bytes()).expect("written");
        file
    }

    fn layers(text: &str) -> (tempfile::NamedTempFile, Layers) {
        let file = file(text);
        let layers = Layers::over_file(Some(file.path().to_owned()));
        (file, layers)
    }

    #[test]
    fn flags_win_over_the_file_and_tables_are_merged() {
        let (_file, layers) = layers("name = 'a'\ncount = 1\n[pool]\nsize = 4\nfill = true\n");
        let flags = Flags { count: Some(2), name: None };
        let settings = ["hosts=['x','y']".to_owned(), "pool.size=9".to_owned()];
        let sample: Sample = layers
            .flags(&flags)
            .and_then(|layers| layers.set(&settings))
            .and_then(Layers::load)
            .expect("good settings");
        let pool = Pool { size: 9, fill: true };
        let hosts = vec!["x".to_owned(), "y".to_owned()];
        assert_eq!(sample, Sample { name: "a".into(), count: 2, hosts, pool });
    }

    #[test]
    fn an_error_names_file_and_line_or_the_flag() {
        let (held, layered) = layers("name = 'a'\n\ncuont = 1\n");
        let failure = layered.load::<Sample>().expect_err("unknown key");
        let place = format!("{}:3:1: unknown field `cuont`", held.path().display());
        assert!(failure.to_string().contains(&place), "{failure}");
        assert_eq!(failure.exit(), 2);

        let (held, layered) = layers("name = 'a'\n[pool]\nsize = 'many'\n");
        let failure = layered.load::<Sample>().expect_err("wrong type");
        let place = format!("{}:3:8: ", held.path().display());
        assert!(failure.to_string().contains(&place), "{failure}");

        let (_held, layered) = layers("name = 'a'\n");
        let layered = layered.set(&["pool.siez=3".to_owned()]).expect("well formed");
        let failure = layered.load::<Sample>().expect_err("unknown key");
        assert!(failure.to_string().contains("--set pool.siez: unknown field"), "{failure}");

        let (held, layered) = layers("count = 1\n");
        let failure = layered.load::<Sample>().expect_err("a key is missing");
        let place = format!("{}: missing field `name`", held.path().display());
        assert!(failure.to_string().contains(&place), "{failure}");

        let (held, layered) = layers("name = \n");
        let failure = layered.load::<Sample>().expect_err("not TOML");
        assert!(failure.to_string().contains(&format!("{}:1:", held.path().display())));
    }

    #[test]
    fn text_becomes_the_value_that_it_looks_like() {
        assert_eq!(toml_value("12"), "12");
        assert_eq!(toml_value("true"), "true");
        assert_eq!(toml_value("[1, 2]"), "[1, 2]");
        assert_eq!(toml_value("dir:///x"), "\"dir:///x\"");
        assert_eq!(toml_value("127.0.0.1:80"), "\"127.0.0.1:80\"");
        assert_eq!(toml_value("'12'"), "'12'");
        assert_eq!(toml_value(""), "\"\"");
    }
}
