//! The DataFusion session that every SQL of the house runs in.
//!
//! In: memory and spill folder. Out: a session with our functions (`cosine_similarity`,
//! `top_similar`) and settings, and tables registered by name.

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::common::TableReference;
use datafusion::dataframe::DataFrame;
use datafusion::datasource::empty::EmptyTable;
use datafusion::prelude::SessionContext;

use crate::error::{Error, Result};
use crate::query::cosine_similarity::cosine_similarity;
use crate::query::read_only::plan_query;
use crate::query::top_similar::{TOP_SIMILAR, TopSimilar};
use crate::tables::sql_errors::from_datafusion;
use crate::tables::{SqlMemory, StoredTable};

/// A session with our functions and without tables. Error (exit 75): the spill folder.
pub fn open_session(memory: &SqlMemory) -> Result<SessionContext> {
    let ctx = memory.session()?;
    ctx.register_udf(cosine_similarity());
    ctx.register_udtf(TOP_SIMILAR, Arc::new(TopSimilar));
    Ok(ctx)
}

/// Registers a stored table under `name` in the default schema; the name keeps its case.
pub fn register(ctx: &SessionContext, name: &str, table: &StoredTable) -> Result<()> {
    ctx.register_table(TableReference::bare(name), table.provider()?).map(|_| ()).map_err(from_datafusion)
}

/// Plans `sql` against tables that need not exist yet: name and schema. What comes back is not
/// run; its schema, brought to plain types, is that of the result.
pub async fn plan_against(tables: &[(&str, SchemaRef)], sql: &str) -> Result<DataFrame> {
    let ctx = open_session(&SqlMemory::default())?;
    for (name, schema) in tables {
        let table = Arc::new(EmptyTable::new(schema.clone()));
        ctx.register_table(TableReference::bare(*name), table).map_err(from_datafusion)?;
    }
    plan_query(&ctx, sql).await
}

/// Bytes from `512MB`, `2 GiB`, `1.5g` or a plain number. Powers of 1024, whatever the spelling.
/// Error (exit 78): not a size.
pub fn parse_bytes(text: &str) -> Result<usize> {
    let wrong = || {
        Error::spec(format!("`{text}` is not a size in bytes"))
            .with_help("write for example \"512MB\", \"2GB\" or 1073741824")
    };
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let power = match unit.trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(wrong()),
    };
    let bytes = number * 1024f64.powi(power);
    match bytes >= 1.0 && bytes < usize::MAX as f64 {
        true => Ok(bytes as usize),
        false => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("1024", 1024), ("1k", 1024), ("512MB", 512 << 20), ("2 GiB", 2 << 30), ("1.5g", 3 << 29)]
        {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "much", "3 apples", "-1", "0", "1.2.3MB"] {
            assert_eq!(parse_bytes(text).unwrap_err().fault, crate::error::Fault::Spec, "{text}");
        }
    }
}
