//! MovieLens 100K, in either of the forms it comes in, to one set of tables.
//!
//! In: the bytes of one file. Out: an Arrow batch in the file's row order, and the digest of its content, by which
//! the two forms are known to be the same table.
//!
//! | table | columns |
//! | --- | --- |
//! | interactions | user_id int64, item_id int64, rating float32, timestamp int64 (seconds since 1970) |
//! | items | item_id int64, title string ("Toy Story (1995)"), year int32 or null, genres string ("Animation\|Comedy") |
//! | users | user_id int64, age int32, gender string, occupation string, zip string |
//!
//! Formats: the README of the data set; for the other, RecBole's atomic files (tab separated, `name:type` header).

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::digest::Hasher;
use super::spec::Layout;
use crate::columns::{ITEM_ID, RATING, TIMESTAMP, TITLE, USER_ID};
use crate::error::{Error, Result};

/// Genres in the order of the flags of `u.item` (its file `u.genre`).
const GENRES: [&str; 19] = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
];

/// A table and the digest of its content.
#[derive(Debug)]
pub(super) struct Converted {
    /// Rows in file order.
    pub(super) batch: RecordBatch,
    /// sha256 (hex) over one line per row, columns separated by a tab.
    pub(super) digest: String,
}

/// Reads one file; an error says what is wrong and in which line (1-based).
pub(super) fn convert(layout: Layout, table: &str, bytes: &[u8]) -> Result<Converted, String> {
    let text = match layout {
        Layout::AsIs => return Err("it has no tables".into()),
        // The original is in ISO 8859-1, whose bytes are the first 256 code points.
        Layout::MovieLens100k => bytes.iter().map(|&b| char::from(b)).collect::<String>(),
        Layout::RecboleMl100k => String::from_utf8(bytes.to_vec()).map_err(|e| e.to_string())?,
    };
    let recbole = layout == Layout::RecboleMl100k;
    let separator = if recbole || table == "interactions" { '\t' } else { '|' };
    let lines = text
        .lines()
        .enumerate()
        .skip(usize::from(recbole))
        .filter(|(_, line)| !line.is_empty())
        .map(|(n, line)| (n + 1, line.split(separator).collect::<Vec<&str>>()));
    match table {
        "interactions" => interactions(lines),
        "items" if recbole => items(lines, 4, recbole_item),
        "items" => items(lines, 5 + GENRES.len(), original_item),
        "users" => users(lines),
        other => Err(format!("the layout has no table `{other}`")),
    }
}

/// A field as a number.
fn number<T: std::str::FromStr>(line: usize, what: &str, field: &str) -> Result<T, String> {
    field.parse().map_err(|_| format!("line {line}: `{field}` is no {what}"))
}

/// The fields of a line, if there are as many as there should be.
fn fields<'a, 't>(line: usize, found: &'a [&'t str], wanted: usize) -> Result<&'a [&'t str], String> {
    match found.len() == wanted {
        true => Ok(found),
        false => Err(format!("line {line} has {} fields, {wanted} are wanted", found.len())),
    }
}

fn interactions<'t>(lines: impl Iterator<Item = (usize, Vec<&'t str>)>) -> Result<Converted, String> {
    let (mut users, mut items, mut ratings, mut times) = (vec![], vec![], vec![], vec![]);
    let mut hasher = Hasher::default();
    for (n, found) in lines {
        let f = fields(n, &found, 4)?;
        let (user, item): (i64, i64) = (number(n, "user", f[0])?, number(n, "item", f[1])?);
        let (rating, time): (f32, i64) = (number(n, "rating", f[2])?, number(n, "time in seconds", f[3])?);
        hasher.update(format!("{user}\t{item}\t{rating}\t{time}\n").as_bytes());
        users.push(user);
        items.push(item);
        ratings.push(rating);
        times.push(time);
    }
    table(
        hasher,
        vec![
            (USER_ID, Arc::new(Int64Array::from(users)), false),
            (ITEM_ID, Arc::new(Int64Array::from(items)), false),
            (RATING, Arc::new(Float32Array::from(ratings)), false),
            (TIMESTAMP, Arc::new(Int64Array::from(times)), false),
        ],
    )
}

/// Title with its year, and genres, of a line of `u.item`: flags from the sixth field on.
fn original_item(f: &[&str]) -> (String, String) {
    let genres: Vec<&str> = GENRES.iter().zip(&f[5..]).filter(|(_, flag)| **flag == "1").map(|(g, _)| *g).collect();
    (f[1].trim().to_owned(), genres.join("|"))
}

/// The same of a line of `.item`, where what stood in the last brackets of the title is a column of its own.
fn recbole_item(f: &[&str]) -> (String, String) {
    let title = match f[1] {
        // Film 267 has neither title nor year; the spelling is that file's.
        "unkonwn" => "unknown".to_owned(),
        title => format!("{title} ({})", f[2]),
    };
    (title, f[3].replace(' ', "|"))
}

fn items<'t>(
    lines: impl Iterator<Item = (usize, Vec<&'t str>)>,
    width: usize,
    read: fn(&[&str]) -> (String, String),
) -> Result<Converted, String> {
    let (mut ids, mut titles, mut years, mut genres) = (vec![], vec![], vec![], vec![]);
    let mut hasher = Hasher::default();
    for (n, found) in lines {
        let f = fields(n, &found, width)?;
        let id: i64 = number(n, "item", f[0])?;
        let (title, genre) = read(f);
        let year = year_of(&title);
        let year_text = year.map_or(String::new(), |y| y.to_string());
        hasher.update(format!("{id}\t{title}\t{year_text}\t{genre}\n").as_bytes());
        ids.push(id);
        titles.push(title);
        years.push(year);
        genres.push(genre);
    }
    table(
        hasher,
        vec![
            (ITEM_ID, Arc::new(Int64Array::from(ids)), false),
            (TITLE, Arc::new(StringArray::from(titles)), false),
            ("year", Arc::new(Int32Array::from(years)), true),
            ("genres", Arc::new(StringArray::from(genres)), false),
        ],
    )
}

/// The last four digits in brackets: "Land Before Time III (1995) (V)" is of 1995.
fn year_of(title: &str) -> Option<i32> {
    title.rsplit('(').find_map(|part| {
        let (inside, _) = part.split_once(')')?;
        (inside.len() == 4 && inside.bytes().all(|b| b.is_ascii_digit())).then(|| inside.parse().ok())?
    })
}

fn users<'t>(lines: impl Iterator<Item = (usize, Vec<&'t str>)>) -> Result<Converted, String> {
    let (mut ids, mut ages, mut genders, mut occupations, mut zips) = (vec![], vec![], vec![], vec![], vec![]);
    let mut hasher = Hasher::default();
    for (n, found) in lines {
        let f = fields(n, &found, 5)?;
        let (id, age): (i64, i32) = (number(n, "user", f[0])?, number(n, "age", f[1])?);
        hasher.update(format!("{id}\t{age}\t{}\t{}\t{}\n", f[2], f[3], f[4]).as_bytes());
        ids.push(id);
        ages.push(age);
        genders.push(f[2].to_owned());
        occupations.push(f[3].to_owned());
        zips.push(f[4].to_owned());
    }
    table(
        hasher,
        vec![
            (USER_ID, Arc::new(Int64Array::from(ids)), false),
            ("age", Arc::new(Int32Array::from(ages)), false),
            ("gender", Arc::new(StringArray::from(genders)), false),
            ("occupation", Arc::new(StringArray::from(occupations)), false),
            ("zip", Arc::new(StringArray::from(zips)), false),
        ],
    )
}

fn table(hasher: Hasher, columns: Vec<(&str, ArrayRef, bool)>) -> Result<Converted, String> {
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, array, null)| Field::new(*name, DataType::clone(array.data_type()), *null))
        .collect();
    let arrays = columns.into_iter().map(|(_, array, _)| array).collect();
    let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).map_err(|e| e.to_string())?;
    Ok(Converted { batch, digest: hasher.finish() })
}

/// Writes a batch as one Parquet file.
pub(super) fn write_parquet(batch: &RecordBatch, path: &Path) -> Result<()> {
    let fail = |e| Error::environment(format!("cannot write {}", path.display())).because(e);
    let file = fs_err::File::create(path).map_err(|e| Error::environment("cannot write to the cache").because(e))?;
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).map_err(fail)?;
    writer.write(batch).map_err(fail)?;
    let file = writer.into_inner().map_err(fail)?;
    file.sync_all().map_err(|e| Error::environment("cannot write to the cache").because(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::AsArray;
    use arrow::datatypes::{Float32Type, Int32Type, Int64Type};

    /// A line of `u.item` with the given genres set.
    fn line(id: u32, title: &str, genres: &[&str]) -> String {
        let flags: Vec<&str> = GENRES.iter().map(|g| if genres.contains(g) { "1" } else { "0" }).collect();
        format!("{id}|{title}|01-Jan-1995||http://x|{}\n", flags.join("|"))
    }

    #[test]
    fn both_forms_give_the_same_items() {
        let original: String = line(1, "First Film (1995)", &["Animation", "Children's"])
            + &line(2, "Caf\u{e9}, The (1996) ", &["Drama"])
            + &line(3, "unknown", &["unknown"])
            + &line(4, "Sequel III (1995) (V)", &["War"]);
        let latin1: Vec<u8> = original.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
        let recbole = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n\
                       1\tFirst Film\t1995\tAnimation Children's\n2\tCaf\u{e9}, The\t1996\tDrama\n\
                       3\tunkonwn\tunkonwn\tunknown\n4\tSequel III (1995)\tV\tWar\n";
        let a = convert(Layout::MovieLens100k, "items", &latin1).unwrap();
        let b = convert(Layout::RecboleMl100k, "items", recbole.as_bytes()).unwrap();
        assert_eq!(a.batch, b.batch);
        assert_eq!(a.digest, b.digest);
        let titles: Vec<&str> = a.batch.column(1).as_string::<i32>().iter().flatten().collect();
        assert_eq!(titles, ["First Film (1995)", "Caf\u{e9}, The (1996)", "unknown", "Sequel III (1995) (V)"]);
        let years: Vec<Option<i32>> = a.batch.column(2).as_primitive::<Int32Type>().iter().collect();
        assert_eq!(years, [Some(1995), Some(1996), None, Some(1995)]);
        assert_eq!(a.batch.column(3).as_string::<i32>().value(0), "Animation|Children's");
    }

    #[test]
    fn interactions_keep_file_order_and_their_digest_is_that_of_the_original_file() {
        let original = "9\t1\t3\t100\n2\t7\t5\t50\n";
        let recbole = format!("user_id:token\titem_id:token\trating:float\ttimestamp:float\n{original}");
        let a = convert(Layout::MovieLens100k, "interactions", original.as_bytes()).unwrap();
        let b = convert(Layout::RecboleMl100k, "interactions", recbole.as_bytes()).unwrap();
        assert_eq!(a.batch, b.batch);
        assert_eq!(a.batch.column(0).as_primitive::<Int64Type>().values().to_vec(), [9, 2]);
        assert_eq!(a.batch.column(2).as_primitive::<Float32Type>().values().to_vec(), [3.0, 5.0]);
        assert_eq!(a.digest, super::super::sha256_bytes(original.as_bytes()));
        assert_eq!(b.digest, a.digest);
    }

    #[test]
    fn users_are_read() {
        let a = convert(Layout::MovieLens100k, "users", b"1|24|M|technician|85711\n").unwrap();
        let b = convert(Layout::RecboleMl100k, "users", b"header\n1\t24\tM\ttechnician\t85711\n").unwrap();
        assert_eq!(a.batch, b.batch);
        assert_eq!(a.batch.column(4).as_string::<i32>().value(0), "85711");
    }

    #[test]
    fn damage_is_named_by_line() {
        for (text, expected) in [
            ("1\t2\t3\t4\n1\t2\t3\n", "line 2 has 3 fields, 4 are wanted"),
            ("1\tx\t3\t4\n", "line 1: `x` is no item"),
            ("1\t2\t3\t4.5\n", "line 1: `4.5` is no time in seconds"),
        ] {
            assert_eq!(convert(Layout::MovieLens100k, "interactions", text.as_bytes()).unwrap_err(), expected);
        }
        assert!(convert(Layout::MovieLens100k, "films", b"").is_err());
    }

    #[test]
    fn a_written_table_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let table = convert(Layout::MovieLens100k, "interactions", b"1\t2\t3\t4\n").unwrap();
        write_parquet(&table.batch, &path).unwrap();
        let reader =
            parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(&path).unwrap())
                .unwrap()
                .build()
                .unwrap();
        let back: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
        assert_eq!(back, [table.batch]);
    }
}
