//! The leave-one-out split of MovieLens-100K, against the sha256 of the reference split: the
//! sorted lines "user<TAB>item<TAB>rating<TAB>timestamp<LF>" of each part.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array};
use arrow::compute::concat_batches;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sha2::{Digest, Sha256};
use tailfuse::columns::{ITEM_ID, RATING, ROW_ID, TIMESTAMP, USER_ID};
use tailfuse::interactions::clean::{CleanReport, clean};
use tailfuse::interactions::split::{HistoryAtTest, Method, Part, SplitRule, split};
use tailfuse::tables::Table;

/// The cached data set in file order, or `None` where it was not fetched.
fn ml100k() -> Option<Table> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = std::env::var_os("TAILFUSE_CACHE").map_or_else(|| root.join("data/cache"), PathBuf::from);
    let path = cache.join("datasets/ml-100k/interactions.parquet");
    let file = match fs_err::File::open(&path) {
        Ok(file) => file.into_parts().0,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: {} is not there; `tailfuse fetch ml-100k` gets it", path.display());
            return None;
        }
        Err(e) => panic!("{e}"),
    };
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
    let batches: Vec<_> = reader.map(Result::unwrap).collect();
    let all = concat_batches(&batches[0].schema(), &batches).unwrap();
    let rows: ArrayRef = Arc::new((0..all.num_rows() as i64).collect::<Int64Array>());
    let column = |name: &str| all.column_by_name(name).unwrap().clone();
    let kept = [USER_ID, ITEM_ID, RATING, TIMESTAMP].map(|name| (name, column(name), false));
    Some(Table::from_columns(kept.into_iter().chain([(ROW_ID, rows, false)]).collect()).unwrap())
}

#[test]
fn parts_are_those_of_the_reference_split() {
    let Some(table) = ml100k() else { return };
    let (users, items) = (table.i64s(USER_ID).unwrap(), table.i64s(ITEM_ID).unwrap());
    let (ratings, times) = (table.f32s(RATING).unwrap(), table.i64s(TIMESTAMP).unwrap());
    let ordered = clean(&table, 1).unwrap();
    assert_eq!(ordered.report, CleanReport { rows: 100_000, duplicates: 0, re_ratings: 0 });
    let rule =
        SplitRule { method: Method::LeaveOneOut, min_interactions: 3, history_at_test: HistoryAtTest::TrainAndValid };
    let split = split(&ordered, &rule).unwrap();
    assert_eq!(split.evaluated.iter().filter(|&&e| e).count(), 943);
    assert_eq!(split.users_tied, 415);
    for (part, rows, sha256) in [
        (Part::Train, 98_114, "bd065e8255e131a64697490ae7434fc889a05978a11165aa04716b5e0f956b40"),
        (Part::Valid, 943, "b91091a2e10dc9aeee919c0a9fdfd537220173caf6ff042081339e7c4712ed7b"),
        (Part::Test, 943, "45105fbefa0a51c38a41ba868532f135e52f4c9e85f911e196523664e96dd16f"),
    ] {
        let mut lines: Vec<String> = (0..ordered.rows.len())
            .filter(|&r| split.parts[r] == part)
            .map(|r| ordered.rows[r] as usize)
            .map(|r| format!("{}\t{}\t{}\t{}\n", users[r], items[r], ratings[r], times[r]))
            .collect();
        assert_eq!(lines.len(), rows, "{part:?}");
        lines.sort_unstable();
        let digest = Sha256::digest(lines.concat().as_bytes());
        let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, sha256, "{part:?}");
    }
}

#[test]
fn global_time_holds_out_the_latest_interactions() {
    let Some(table) = ml100k() else { return };
    let times = table.i64s(TIMESTAMP).unwrap();
    let ordered = clean(&table, 1).unwrap();
    let rule = SplitRule {
        method: Method::TimeShares { valid: 0.1, test: 0.1 },
        min_interactions: 3,
        history_at_test: HistoryAtTest::TrainAndValid,
    };
    let split = split(&ordered, &rule).unwrap();
    let of = |part: Part| -> Vec<i64> {
        let rows = (0..ordered.rows.len()).filter(|&r| split.parts[r] == part);
        rows.map(|r| times[ordered.rows[r] as usize]).collect()
    };
    let (valid_from, test_from) = split.cuts.unwrap();
    assert!(of(Part::Train).iter().all(|&t| t < valid_from));
    assert!(of(Part::Valid).iter().all(|t| (valid_from..test_from).contains(t)));
    assert!(of(Part::Test).iter().all(|&t| t >= test_from));
    let held = (split.count(Part::Valid) + split.count(Part::Test) + split.count(Part::SetAside)) as f64;
    assert!((held / 100_000.0 - 0.2).abs() < 0.001, "{held}");
    // In this data set most users appear on one day, so few of the late ones were known before.
    assert!(split.evaluated.iter().filter(|&&e| e).count() < 943 / 2);
}
