//! What happens during a run, as calls. The command line draws them; a test collects them.

use std::sync::Arc;

use super::cache::Record;
use crate::stages::Observer;

/// Place of a node in the run: `index` of `total`, 1-based.
#[derive(Clone, Debug)]
pub struct NodePlace {
    /// 1-based.
    pub index: usize,
    /// Number of nodes.
    pub total: usize,
    /// Name in the pipeline file.
    pub name: String,
    /// Stage kind, or `source`.
    pub kind: String,
}

/// Hears what a run does.
pub trait Events: Send + Sync {
    /// A node begins; the observer that it reports to.
    fn started(&self, place: &NodePlace) -> Arc<dyn Observer>;
    /// A node was found complete in the cache.
    fn cached(&self, place: &NodePlace, record: &Record);
    /// A node has ended well.
    fn finished(&self, place: &NodePlace, record: &Record);
    /// One line for the person who watches.
    fn line(&self, text: &str);
}

/// Hears everything and says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn begin(&self, _unit: &str, _total: u64) {}
    fn advance(&self, _n: u64) {}
    fn note(&self, _text: &str) {}
}

impl Events for Silent {
    fn started(&self, _place: &NodePlace) -> Arc<dyn Observer> {
        Arc::new(Silent)
    }
    fn cached(&self, _place: &NodePlace, _record: &Record) {}
    fn finished(&self, _place: &NodePlace, _record: &Record) {}
    fn line(&self, _text: &str) {}
}
