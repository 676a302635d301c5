//! Memory that SQL may use, and where it spills what exceeds it.
//!
//! In: a limit in bytes and a folder. Out: a DataFusion session that keeps within them; the
//! settings that make our tables read the same everywhere are set here and nowhere else.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::{FairSpillPool, TrackConsumersPool};
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::prelude::{SessionConfig, SessionContext};

use crate::error::Result;
use crate::tables::sql_errors::from_datafusion;

/// How many of the largest consumers an error about memory lists.
const LISTED_CONSUMERS: NonZeroUsize = NonZeroUsize::new(3).expect("3 is not 0");

/// A memory limit and a spill folder.
#[derive(Clone, Debug)]
pub struct SqlMemory {
    /// Bytes that all operators of a query share; sorts, joins and aggregates spill beyond it.
    pub limit: usize,
    /// Where they spill; the system's temporary folder when `None`.
    pub spill_dir: Option<PathBuf>,
}

impl Default for SqlMemory {
    /// 1 GiB, and the system's temporary folder.
    fn default() -> Self {
        SqlMemory { limit: 1 << 30, spill_dir: None }
    }
}

impl SqlMemory {
    /// A session within this memory, one partition for each core, without any table.
    /// Error (exit 75): the spill folder cannot be used.
    pub fn session(&self) -> Result<SessionContext> {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let mode = match &self.spill_dir {
            Some(dir) => DiskManagerMode::Directories(vec![dir.clone()]),
            None => DiskManagerMode::OsTmpDirectory,
        };
        let pool = TrackConsumersPool::new(FairSpillPool::new(self.limit), LISTED_CONSUMERS);
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(pool))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(mode))
            .build_arc()
            .map_err(from_datafusion)?;
        let mut config = SessionConfig::new().with_target_partitions(cores).with_information_schema(true);
        let options = config.options_mut();
        // One type of string in and out: utf8, as in all stored tables.
        options.execution.parquet.schema_force_view_types = false;
        options.sql_parser.map_string_types_to_utf8view = false;
        // The default (10 MiB a partition) alone would exceed a small limit.
        let share = self.limit / (8 * cores);
        options.execution.sort_spill_reservation_bytes = options.execution.sort_spill_reservation_bytes.min(share);
        Ok(SessionContext::new_with_config_rt(config, runtime))
    }
}
