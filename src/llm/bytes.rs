//! The bytes of a model file: a memory map, or memory.
//!
//! In: a path, or bytes (tests and fuzzing). Out: [`FileBytes`], which reads as a slice.

use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Bytes of a file.
#[derive(Debug)]
pub enum FileBytes {
    /// A file on disk; pages come in when they are read.
    Map(Mmap),
    /// Bytes in memory.
    Memory(Vec<u8>),
}

impl FileBytes {
    /// Maps a file.
    ///
    /// # Errors
    /// Exit 65 where it is missing or cannot be mapped.
    pub fn map(path: &Path) -> Result<Self> {
        let file = fs_err::File::open(path).map_err(|e| Error::data("cannot open the model file").because(e))?;
        // SAFETY: the map is read only. Another process that shortens the file while we read it
        // would end this one (SIGBUS), as with every memory-mapped model file.
        let map = unsafe { Mmap::map(file.file()) }
            .map_err(|e| Error::data(format!("cannot map the model file {}", path.display())).because(e))?;
        Ok(FileBytes::Map(map))
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            FileBytes::Map(map) => map,
            FileBytes::Memory(bytes) => bytes,
        }
    }
}
