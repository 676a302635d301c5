//! A look at a source whose columns nobody has named yet.
//!
//! In: a file or folder and a config without a mapping. Out: the columns that are there with their types, and the first
//! rows of a few files, as they lie there. `tailfuse init` guesses from them.

use std::collections::BTreeSet;

use futures::TryStreamExt;

use crate::error::Result;
use crate::tables::source::source_objects;
use crate::tables::source_config::SourceConfig;
use crate::tables::source_files::{Content, SourceFile, Unified};
use crate::tables::{Store, Table};

/// What was seen of a source.
#[derive(Clone, Debug)]
pub struct Peek {
    /// Rows of the first, the middle and the last file, in that order, with the columns of all files.
    pub rows: Table,
    /// Number of data files.
    pub files: usize,
    /// Rows of all files, where their footers say it (not for CSV).
    pub total_rows: Option<u64>,
    /// Whether `rows` are all that there are.
    pub whole: bool,
    /// Whether the files are text.
    pub csv: bool,
}

/// Looks at `most` rows of the source at `store`, more or less: CSV files are read once to their end, since the type of
/// a column follows from all its values. Errors as in [`read_source`](crate::tables::read_source).
pub async fn peek(name: &str, config: &SourceConfig, store: &Store, most: usize) -> Result<Peek> {
    let objects = source_objects(name, config, store).await?;
    let files = SourceFile::open_all(config, store, objects).await?;
    let columns = Unified::of(name, config, &files)?.with_guessed_types(config, store, &files).await?;
    let last = files.len().saturating_sub(1);
    let picked: BTreeSet<usize> = [0, last / 2, last].into();
    let share = most.div_ceil(picked.len());
    let mut whole = picked.len() == files.len();
    let mut batches = Vec::new();
    for file in picked.iter().filter_map(|&i| files.get(i)) {
        let mut left = share;
        'file: for (_, mut rows) in file.spans(config, store, &columns, None).await? {
            while let Some(batch) = rows.try_next().await? {
                let batch = columns.adapt(file, &batch, &mut |_, _| {})?;
                let n = batch.num_rows().min(left);
                whole &= n == batch.num_rows();
                batches.push(batch.slice(0, n));
                left -= n;
                if left == 0 {
                    whole &= file.known_rows() == Some(share as u64);
                    break 'file;
                }
            }
        }
    }
    Ok(Peek {
        rows: Table::new(columns.schema.clone(), batches),
        files: files.len(),
        total_rows: files.iter().map(SourceFile::known_rows).sum(),
        whole,
        csv: files.iter().any(|f| matches!(f.content, Content::Csv)),
    })
}
