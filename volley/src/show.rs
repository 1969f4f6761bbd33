//! What a person sees: tables, ages, sizes; and the same as JSON for programs.
//!
//! A list is one type that knows both forms, so that no command can have a table without a program's view.
//! Left out: colours. Tables have no borders, so that they can be cut with `awk` as well.

use std::{io::Write as _, time::Duration};

use clap::{Args, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets::NOTHING};
use serde::Serialize;

use crate::failure::Failure;

/// Form of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// For people.
    #[default]
    Table,
    /// For programs: one JSON document.
    Json,
}

/// The flag that every list has.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Output {
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    pub(crate) output: Form,
}

/// Prints rows in the form that was asked for.
pub(crate) fn list<T: Serialize, const N: usize>(
    output: Output,
    rows: &[T],
    heads: [&str; N],
    cells: impl Fn(&T) -> [String; N],
) -> Result<(), Failure> {
    match output.output {
        Form::Json => json(&rows),
        Form::Table => {
            let mut table = Table::new();
            table.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(heads);
            table.add_rows(rows.iter().map(cells));
            print(&trimmed(&table.to_string()))
        }
    }
}

/// Prints one thing in full: names and values, or JSON.
pub(crate) fn one<T: Serialize>(
    output: Output,
    thing: &T,
    pairs: &[(&str, String)],
) -> Result<(), Failure> {
    match output.output {
        Form::Json => json(thing),
        Form::Table => {
            let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
            let lines: Vec<_> =
                pairs.iter().map(|(name, value)| format!("{name:width$}  {value}")).collect();
            print(&lines.join("\n"))
        }
    }
}

/// Prints JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(wire::Code::Internal, format!("output: {error}")))?;
    print(&text)
}

/// Prints a line or more. A reader that went away (`| head`) is no error.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::io("standard output", &error)),
        Ok(()) => Ok(()),
    }
}

fn trimmed(table: &str) -> String {
    table.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().join("\n")
}

/// A time as people say it, in two units at most: `850ms`, `12s`, `3m 5s`, `2d 4h`.
pub(crate) fn age(ms: u64) -> String {
    if ms < 1_000 {
        return format!("{ms}ms");
    }
    let text = humantime::format_duration(Duration::from_secs(ms / 1_000)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// A number of bytes as people say it.
pub(crate) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// A number with its thousands parted.
pub(crate) fn count(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}

/// `-` for nothing.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_two_units_at_most() {
        assert_eq!(age(850), "850ms");
        assert_eq!(age(12_400), "12s");
        assert_eq!(age(185_000), "3m 5s");
        assert_eq!(age(2 * 86_400_000 + 4 * 3_600_000 + 61_000), "2days 4h");
    }
}
