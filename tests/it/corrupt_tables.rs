//! Damaged Parquet files: an error that names the file, never a panic, whatever byte is wrong.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Int64Array, ListArray, StringArray};
use arrow::datatypes::Float32Type;
use futures::FutureExt;
use rand::{Rng, SeedableRng};
use tailfuse::error::{Fault, Result};
use tailfuse::query::{open_session, plan_query, register};
use tailfuse::tables::sql_errors::from_datafusion;
use tailfuse::tables::{SqlMemory, Store, StoredTable, Table};

use crate::table_support::{memory, read};

/// A file with every kind of page that we write: integers, dictionary strings, floats, lists.
async fn sound() -> Vec<u8> {
    let n = 300;
    let users: ArrayRef = Arc::new(Int64Array::from_iter_values(0..n));
    let items: ArrayRef = Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("item {}", i % 7))));
    let ratings: ArrayRef = Arc::new(Float32Array::from_iter((0..n).map(|i| (i % 5 != 0).then_some(i as f32))));
    let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(
        (0..n).map(|i| Some((0..i % 4).map(|v| Some(v as f32)).collect::<Vec<_>>())),
    ));
    let columns =
        vec![("user_id", users, false), ("item_id", items, true), ("rating", ratings, true), ("lists", lists, true)];
    let store = memory();
    StoredTable::write(&store, "sound.parquet", &Table::from_columns(columns).unwrap()).await.unwrap();
    store.get("sound.parquet").await.unwrap().to_vec()
}

/// Opens, reads in order, and scans by SQL.
async fn use_it(store: &Store) -> Result<()> {
    let table = StoredTable::open(store, "bad.parquet").await?;
    table.collect().await?;
    let ctx = open_session(&SqlMemory::default())?;
    register(&ctx, "t", &table)?;
    let frame = plan_query(&ctx, "select * from t where user_id >= 0").await?;
    frame.collect().await.map_err(from_datafusion)?;
    Ok(())
}

/// The outcome for these bytes; a panic fails the test. An error must be the data's fault.
async fn outcome(bytes: Vec<u8>, what: &str) -> Result<()> {
    let store = memory();
    store.put("bad.parquet", bytes.into()).await.unwrap();
    let outcome = AssertUnwindSafe(use_it(&store)).catch_unwind().await;
    let outcome = outcome.unwrap_or_else(|_| panic!("{what}: a panic got through"));
    if let Err(e) = &outcome {
        assert_eq!(e.fault, Fault::Data, "{what}: {e}");
    }
    outcome
}

#[tokio::test]
async fn truncated_files_are_refused_at_any_length() {
    let bytes = sound().await;
    assert!(outcome(bytes.clone(), "sound").await.is_ok());
    for length in (0..bytes.len()).step_by(13).chain(bytes.len() - 20..bytes.len()) {
        let e = outcome(bytes[..length].to_vec(), &format!("{length} bytes")).await.expect_err("it is truncated");
        assert!(e.message.contains("bad.parquet"), "{e}");
    }
}

#[tokio::test]
async fn no_flipped_bit_causes_a_panic() {
    let bytes = sound().await;
    let footer =
        bytes.len() - 8 - u32::from_le_bytes(bytes[bytes.len() - 8..bytes.len() - 4].try_into().unwrap()) as usize;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(59);
    let mut refused = 0;
    // Every byte of the footer, one bit each; and bits of the pages at random.
    let in_footer: Vec<usize> = (footer..bytes.len()).collect();
    let in_pages: Vec<usize> = (0..600).map(|_| rng.random_range(0..footer)).collect();
    for at in in_footer.into_iter().chain(in_pages) {
        let bit = rng.random_range(0..8);
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << bit;
        refused += usize::from(outcome(flipped, &format!("byte {at}, bit {bit}")).await.is_err());
    }
    assert!(refused > 100, "only {refused} flips were noticed");
}

#[tokio::test]
async fn the_length_of_the_footer_is_checked() {
    let mut bytes = sound().await;
    let at = bytes.len() - 8;
    bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let e = outcome(bytes, "footer length").await.unwrap_err();
    assert!(e.message.contains("bad.parquet"), "{e}");
}

#[tokio::test]
async fn files_of_other_formats_are_refused() {
    for text in ["", "PAR1", "PAR1PAR1", "user_id,item_id\n1,2\n"] {
        let e = outcome(text.as_bytes().to_vec(), text).await.unwrap_err();
        assert!(e.to_string().contains("not a readable Parquet file"), "{text}: {e}");
    }
    let e = StoredTable::open(&memory(), "absent.parquet").await.unwrap_err();
    assert!(e.fault == Fault::Data && e.message.contains("absent.parquet"), "{e}");
}

/// A source names the damaged one among its files.
#[tokio::test]
async fn a_damaged_file_of_a_source_is_named() {
    let store = memory();
    let mut bytes = sound().await;
    store.put("1.parquet", bytes.clone().into()).await.unwrap();
    bytes.truncate(bytes.len() / 2);
    store.put("2.parquet", bytes.into()).await.unwrap();
    let e = read(&store, &Default::default()).await.unwrap_err();
    assert!(e.fault == Fault::Data && e.message.contains("2.parquet"), "{e}");
}
