//! Rows expected against rows that came, in words.
//!
//! In: two lists of rows with the same columns. Out: a text for each difference; none where they are equal. Numbers are
//! equal within 1e-6 of their size, so that a float32 is what was written.

use serde_json::{Map, Value};

/// A row with all compared columns.
type Row = Map<String, Value>;

/// Largest relative difference of equal numbers: a float32's.
const TOLERANCE: f64 = 1e-6;
/// So many differences are shown.
const SHOWN: usize = 20;

/// The differences; `ordered`: whether places count.
pub fn differences(expected: &[Row], actual: &[Row], ordered: bool) -> Vec<String> {
    let mut found = match ordered {
        true => by_place(expected, actual),
        false => as_a_bag(expected, actual),
    };
    if found.len() > SHOWN {
        let more = found.len() - SHOWN;
        found.truncate(SHOWN);
        found.push(format!("... and {more} more"));
    }
    if !found.is_empty() && expected.len() != actual.len() {
        found.insert(0, format!("{} rows expected, {} came", expected.len(), actual.len()));
    }
    found
}

fn by_place(expected: &[Row], actual: &[Row]) -> Vec<String> {
    let mut found = Vec::new();
    for i in 0..expected.len().max(actual.len()) {
        let place = format!("row {}", i + 1);
        match (expected.get(i), actual.get(i)) {
            (Some(e), Some(a)) if !same_row(e, a) => found.push(format!("~ {place}: {}", cells(e, a))),
            (Some(e), None) => found.push(format!("- {place} is missing: {}", show(e))),
            (None, Some(a)) => found.push(format!("+ {place} is too much: {}", show(a))),
            _ => {}
        }
    }
    found
}

fn as_a_bag(expected: &[Row], actual: &[Row]) -> Vec<String> {
    let mut left: Vec<&Row> = actual.iter().collect();
    let mut missing = Vec::new();
    for row in expected {
        match left.iter().position(|a| same_row(row, a)) {
            Some(i) => drop(left.remove(i)),
            None => missing.push(row),
        }
    }
    let mut found = Vec::new();
    for row in missing {
        // A row that is right in at least half of its columns is the same row with a mistake.
        let alike = |a: &Row| row.iter().filter(|(c, v)| a.get(*c).is_some_and(|w| same(v, w))).count();
        let near = (0..left.len()).max_by_key(|&i| (alike(left[i]), std::cmp::Reverse(i)));
        match near.filter(|&i| alike(left[i]) * 2 >= row.len() && alike(left[i]) > 0) {
            Some(i) => found.push(format!("~ {}", cells(row, left.remove(i)))),
            None => found.push(format!("- missing:    {}", show(row))),
        }
    }
    found.extend(left.iter().map(|row| format!("+ unexpected: {}", show(row))));
    found
}

fn same_row(expected: &Row, actual: &Row) -> bool {
    expected.iter().all(|(column, value)| actual.get(column).is_some_and(|a| same(value, a)))
        // Where no row is expected, every row is one too much.
        && !expected.is_empty()
}

fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(x), Some(y)) => x == y || (x - y).abs() <= TOLERANCE * x.abs().max(y.abs()),
        _ => a == b,
    }
}

/// The right cells once, the wrong ones twice.
fn cells(expected: &Row, actual: &Row) -> String {
    let differ = |(column, value): &(&String, &Value)| !actual.get(*column).is_some_and(|a| same(value, a));
    let wrong: Vec<String> = expected
        .iter()
        .filter(differ)
        .map(|(c, v)| format!("`{c}` is {}, expected {v}", actual.get(c).unwrap_or(&Value::Null)))
        .collect();
    format!("{}\n    in {}", wrong.join("; "), show(actual))
}

fn show(row: &Row) -> String {
    let cells: Vec<String> = row.iter().filter(|(_, v)| !v.is_null()).map(|(c, v)| format!("{c} = {v}")).collect();
    format!("{{ {} }}", cells.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rows(value: Value) -> Vec<Row> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn equal_rows_have_no_differences() {
        let a = rows(json!([{"u": 1, "x": 0.1}, {"u": 2, "x": null}]));
        let b = rows(json!([{"u": 2, "x": null}, {"u": 1.0, "x": 0.100_000_001_49}]));
        assert!(differences(&a, &b, false).is_empty());
        assert_eq!(differences(&a, &b, true).len(), 2);
        assert!(differences(&[], &[], true).is_empty());
    }

    #[test]
    fn differences_are_told_apart() {
        let expected = rows(json!([{"u": 1, "i": 5, "x": 3}, {"u": 2, "i": 6, "x": 4}]));
        let actual = rows(json!([{"u": 1, "i": 5, "x": 9}, {"u": 7, "i": 8, "x": 9}, {"u": 2, "i": 6, "x": 4}]));
        assert_eq!(
            differences(&expected, &actual, false),
            [
                "2 rows expected, 3 came",
                "~ `x` is 9, expected 3\n    in { u = 1, i = 5, x = 9 }",
                "+ unexpected: { u = 7, i = 8, x = 9 }"
            ]
        );
        assert_eq!(
            differences(&expected, &actual[..1], true),
            [
                "2 rows expected, 1 came",
                "~ row 1: `x` is 9, expected 3\n    in { u = 1, i = 5, x = 9 }",
                "- row 2 is missing: { u = 2, i = 6, x = 4 }"
            ]
        );
        assert_eq!(differences(&[], &actual[..1], false).len(), 2);
    }
}
