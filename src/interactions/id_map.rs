//! Ids to dense indices and back. The index of an id is its place among the sorted
//! distinct ids, so it depends on the set only: it is the last tie rule everywhere.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::tables::{Id, IdColumn};

/// Sorted distinct ids; index = place in that order.
#[derive(Clone, Debug)]
pub struct IdMap {
    ids: IdColumn,
    index: HashMap<Id, u32>,
}

impl IdMap {
    /// From ids in any order, with repeats, of one type.
    pub fn new(columns: &[&IdColumn]) -> Result<Self> {
        let ids = match columns.first() {
            None => IdColumn::Int(Vec::new()),
            Some(IdColumn::Int(_)) => {
                let mut all = Vec::new();
                for c in columns {
                    match c {
                        IdColumn::Int(v) => all.extend_from_slice(v),
                        IdColumn::Str(_) => return Err(mixed()),
                    }
                }
                all.sort_unstable();
                all.dedup();
                IdColumn::Int(all)
            }
            Some(IdColumn::Str(_)) => {
                let mut all = Vec::new();
                for c in columns {
                    match c {
                        IdColumn::Str(v) => all.extend_from_slice(v),
                        IdColumn::Int(_) => return Err(mixed()),
                    }
                }
                all.sort_unstable();
                all.dedup();
                IdColumn::Str(all)
            }
        };
        let index = (0..ids.len()).map(|i| (ids.get(i), i as u32)).collect();
        Ok(IdMap { ids, index })
    }

    /// The distinct ids, sorted; position = dense index.
    pub fn ids(&self) -> &IdColumn {
        &self.ids
    }

    /// Number of distinct ids.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The dense index of one id.
    pub fn get(&self, id: &Id) -> Option<u32> {
        self.index.get(id).copied()
    }

    /// The dense indices of a column; `None` where the id is unknown.
    pub fn encode(&self, column: &IdColumn) -> Vec<Option<u32>> {
        (0..column.len()).map(|r| self.get(&column.get(r))).collect()
    }
}

fn mixed() -> Error {
    Error::data("ids are integers in one table and strings in another").with_help("cast one of them in a `sql` stage")
}
