//! Parquet bytes to and from an object store, with the guards that damaged files call for.
//!
//! In: a store, a path, the object's size. Out: a reader that refuses byte ranges outside the
//! object before anything is allocated, and a writer whose object appears whole or not at all.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::arrow::async_writer::AsyncFileWriter;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use sha2::{Digest, Sha256};

/// The end of the file that is read at first; most footers fit, so one request is enough.
const FOOTER_GUESS: usize = 64 * 1024;
/// Parts of this size go to the store while a table is still being written.
const PART_BYTES: usize = 8 * 1024 * 1024;
/// Parts under way at a time.
const PARTS_UNDER_WAY: usize = 4;

/// Reads ranges of one object.
#[derive(Clone, Debug)]
pub struct ObjectReader {
    object: Arc<dyn ObjectStore>,
    path: ObjectPath,
    size: u64,
}

impl ObjectReader {
    /// A reader of the object at `path`, `size` bytes long.
    pub fn new(object: Arc<dyn ObjectStore>, path: ObjectPath, size: u64) -> Self {
        ObjectReader { object, path, size }
    }

    /// A damaged footer can name any offset; a store would allocate for it first and fail later.
    fn check(&self, range: &Range<u64>) -> Result<()> {
        match range.start <= range.end && range.end <= self.size {
            true => Ok(()),
            false => Err(ParquetError::EOF(format!(
                "bytes {} to {} are asked for, the file has {}",
                range.start, range.end, self.size
            ))),
        }
    }
}

fn store_error(e: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(e))
}

impl AsyncFileReader for ObjectReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        async move {
            self.check(&range)?;
            self.object.get_range(&self.path, range).await.map_err(store_error)
        }
        .boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        async move {
            for range in &ranges {
                self.check(range)?;
            }
            self.object.get_ranges(&self.path, &ranges).await.map_err(store_error)
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>>> {
        async move {
            let size = self.size;
            let metadata = ParquetMetaDataReader::new()
                .with_arrow_reader_options(options)
                .with_prefetch_hint(Some(FOOTER_GUESS))
                .load_and_finish(self, size)
                .await?;
            Ok(Arc::new(metadata))
        }
        .boxed()
    }
}

/// Writes one object: small ones with a single put, large ones in parts that become visible
/// together. Dropped or aborted before [`AsyncFileWriter::complete`], nothing is visible.
pub struct ObjectWriter {
    object: Arc<dyn ObjectStore>,
    path: ObjectPath,
    waiting: Vec<Bytes>,
    waiting_bytes: usize,
    parts: Option<WriteMultipart>,
    bytes: u64,
    digest: Sha256,
}

impl ObjectWriter {
    /// A writer of the object at `path`.
    pub fn new(object: Arc<dyn ObjectStore>, path: ObjectPath) -> Self {
        ObjectWriter {
            object,
            path,
            waiting: Vec::new(),
            waiting_bytes: 0,
            parts: None,
            bytes: 0,
            digest: Sha256::new(),
        }
    }

    /// Bytes that were written and their sha256 (hex).
    pub fn digest(self) -> (u64, String) {
        (self.bytes, self.digest.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Takes back what has gone to the store so far.
    pub async fn abort(mut self) {
        if let Some(parts) = self.parts.take() {
            // The error that led here is the one to report; a part left behind is invisible.
            let _ = parts.abort().await;
        }
    }

    async fn push(&mut self, bytes: Bytes) -> object_store::Result<()> {
        self.bytes += bytes.len() as u64;
        self.digest.update(&bytes);
        match &mut self.parts {
            Some(parts) => {
                parts.wait_for_capacity(PARTS_UNDER_WAY).await?;
                parts.put(bytes);
            }
            None => {
                self.waiting_bytes += bytes.len();
                self.waiting.push(bytes);
                if self.waiting_bytes >= PART_BYTES {
                    let upload = self.object.put_multipart(&self.path).await?;
                    let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
                    self.waiting.drain(..).for_each(|b| parts.put(b));
                    self.parts = Some(parts);
                }
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> object_store::Result<()> {
        match self.parts.take() {
            Some(parts) => parts.finish().await?,
            None => self.object.put(&self.path, PutPayload::from_iter(self.waiting.drain(..))).await?,
        };
        Ok(())
    }
}

impl AsyncFileWriter for ObjectWriter {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<()>> {
        self.push(bytes).map(|r| r.map_err(store_error)).boxed()
    }

    fn complete(&mut self) -> BoxFuture<'_, Result<()>> {
        self.finish().map(|r| r.map_err(store_error)).boxed()
    }
}
