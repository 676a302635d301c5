//! GGUF files: header, metadata and tensor table, read from a memory map.
//!
//! In: a path, or bytes. Out: [`Gguf`], whose metadata and tensor extents are all checked against the
//! length of the file; nothing is allocated from a number in the file before that number was
//! compared with the bytes that are left, and arrays stay where they are until they are asked for.
//! Values are made by [`super::quant`].
//!
//! Format: the GGUF specification, version 2 and 3, little-endian
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::bytes::FileBytes;
use super::quant::BlockType;
use crate::error::{Error, Result};

/// First four bytes of every GGUF file.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// Dimensions that a tensor may have at most (`GGML_MAX_DIMS`).
const MAX_DIMS: u32 = 4;

/// Arrays may hold arrays, this deep; real files use one level.
const MAX_ARRAY_DEPTH: u32 = 4;

/// GGUF's id of text.
const TEXT: u32 = 8;

/// Entries for which room is made before they are read; more come with their bytes.
const ROOM: usize = 1024;

/// One metadata value. Integers of all widths become `U64` or `I64`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// u8, u16, u32 or u64.
    U64(u64),
    /// i8, i16, i32 or i64.
    I64(i64),
    /// f32.
    F32(f32),
    /// f64.
    F64(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// Values of one type, still in the file.
    Array(Array),
}

/// An array of the metadata: what it holds and where.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array {
    /// GGUF's id of the elements' type.
    kind: u32,
    /// Elements.
    len: usize,
    /// First byte of the first element in the file.
    at: usize,
}

/// One entry of the tensor table.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Sizes, fastest dimension first: `[columns, rows]` for a matrix.
    pub dims: Vec<usize>,
    /// How its values are stored.
    pub block_type: BlockType,
    /// Absolute offset of its first byte in the file.
    pub offset: usize,
    /// Its length in bytes.
    pub bytes: usize,
}

/// An opened file.
pub struct Gguf {
    path: PathBuf,
    bytes: FileBytes,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf").field("path", &self.path).field("tensors", &self.tensors.len()).finish()
    }
}

impl Gguf {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// Exit 65 for a file that is no GGUF, is cut off, or contradicts itself; the message has
    /// the file and the offset in bytes. Exit 65 too where the file is missing.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(FileBytes::map(path)?, path)
    }

    /// Reads and checks bytes; `path` is for messages.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(bytes: FileBytes, path: &Path) -> Result<Self> {
        let (metadata, tensors) = parse(&bytes, path)?;
        Ok(Gguf { path: path.to_owned(), bytes, metadata, tensors })
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error about this file, with its path in front.
    pub fn fault(&self, what: impl std::fmt::Display) -> Error {
        Error::data(format!("{}: {what}", self.path.display()))
    }

    /// The metadata value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A metadata value that must be text.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.get(key) {
            Some(Value::Text(s)) => Ok(s),
            Some(_) => Err(self.fault(format!("the metadata key `{key}` is not text"))),
            None => Err(self.missing(key)),
        }
    }

    /// A metadata value that must be a whole number of at least 0; `None` where it is absent.
    pub fn count_opt(&self, key: &str) -> Result<Option<usize>> {
        let n = match self.get(key) {
            None => return Ok(None),
            Some(Value::U64(n)) => usize::try_from(*n).ok(),
            Some(Value::I64(n)) => usize::try_from(*n).ok(),
            Some(_) => None,
        };
        n.map(Some).ok_or_else(|| self.fault(format!("the metadata key `{key}` is not a count")))
    }

    /// A metadata value that must be a whole number of at least 0.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.count_opt(key)?.ok_or_else(|| self.missing(key))
    }

    /// A metadata value that must be a number; `None` where it is absent.
    pub fn number_opt(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(x)) => Ok(Some(f64::from(*x))),
            Some(Value::F64(x)) => Ok(Some(*x)),
            Some(Value::U64(n)) => Ok(Some(*n as f64)),
            Some(Value::I64(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.fault(format!("the metadata key `{key}` is not a number"))),
        }
    }

    /// A metadata value that must be an array; `None` where it is absent.
    fn array_opt(&self, key: &str) -> Result<Option<Array>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(*array)),
            Some(_) => Err(self.fault(format!("the metadata key `{key}` is not an array"))),
        }
    }

    /// A metadata value that must be an array of text.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let array = self.array_opt(key)?.ok_or_else(|| self.missing(key))?;
        if array.kind != TEXT {
            return Err(self.fault(format!("the metadata key `{key}` is not an array of text")));
        }
        let mut r = Reader { bytes: &self.bytes, at: array.at, file: &self.path };
        (0..array.len).map(|_| r.text()).collect()
    }

    /// A metadata value that must be an array of numbers, as f64; `None` where it is absent.
    pub fn numbers_opt(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(array) = self.array_opt(key)? else { return Ok(None) };
        let mut r = Reader { bytes: &self.bytes, at: array.at, file: &self.path };
        let mut out = Vec::with_capacity(array.len);
        for _ in 0..array.len {
            out.push(match r.value(array.kind, MAX_ARRAY_DEPTH)? {
                Value::U64(n) => n as f64,
                Value::I64(n) => n as f64,
                Value::F32(x) => f64::from(x),
                Value::F64(x) => x,
                _ => return Err(self.fault(format!("the metadata key `{key}` is not an array of numbers"))),
            });
        }
        Ok(Some(out))
    }

    /// A metadata value that must be 0 or 1 as a truth value; `None` where it is absent.
    pub fn truth_opt(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.fault(format!("the metadata key `{key}` is not a truth value"))),
        }
    }

    /// The error for an absent key.
    fn missing(&self, key: &str) -> Error {
        self.fault(format!("the metadata key `{key}` is missing"))
    }

    /// The table entry of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensor names, sorted.
    pub fn tensor_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// The table entry of a tensor and its bytes in the file.
    ///
    /// # Errors
    /// Exit 65 where there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<(&TensorInfo, &[u8])> {
        let info = self.tensor(name).ok_or_else(|| self.fault(format!("there is no tensor `{name}`")))?;
        Ok((info, &self.bytes[info.offset..info.offset + info.bytes]))
    }

    /// The values of a tensor as f32, rows one after the other in the file's order.
    ///
    /// # Errors
    /// Exit 65 where there is no such tensor, or a value is not finite.
    pub fn dequantize(&self, name: &str) -> Result<Vec<f32>> {
        let (info, bytes) = self.bytes(name)?;
        let mut out = vec![0f32; info.dims.iter().product()];
        info.block_type.dequantize(bytes, &mut out);
        if let Some(i) = super::quant::first_not_finite(&out) {
            let message = format!("value {i} of the tensor `{name}` (data at byte {}) is {}", info.offset, out[i]);
            return Err(self.fault(message).with_help("the file is damaged; fetch it again"));
        }
        Ok(out)
    }
}

/// Metadata and tensor table of a file's bytes.
type Parsed = (HashMap<String, Value>, HashMap<String, TensorInfo>);

/// Reads everything but the tensor data.
fn parse(bytes: &[u8], file: &Path) -> Result<Parsed> {
    let mut r = Reader { bytes, at: 0, file };
    if bytes.get(..4) != Some(MAGIC) {
        return Err(r.fault(0, "the file does not start with `GGUF`").with_help("give a GGUF file or a model folder"));
    }
    r.at = 4;
    let version = r.u32()?;
    if version.swap_bytes() <= 3 {
        return Err(r.fault(4, "the file is big-endian, which is not supported"));
    }
    if !(2..=3).contains(&version) {
        return Err(r.fault(4, format!("GGUF version {version} is not supported (2 and 3 are)")));
    }
    let tensor_count = r.count(8 + 4 + 8 + 4 + 8, "tensors")?;
    // The keys come after both counts, so each count is checked with what is left at its place.
    let key_count = r.count(8 + 4 + 1, "metadata keys")?;

    let mut metadata = HashMap::with_capacity(key_count.min(ROOM));
    for _ in 0..key_count {
        let at = r.at;
        let key = r.text()?.to_owned();
        let kind = r.u32()?;
        let value = r.value(kind, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(r.fault(at, format!("the metadata key `{key}` appears twice")));
        }
    }

    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::U64(n)) if n.is_power_of_two() && (8..=1 << 20).contains(n) => *n as usize,
        Some(other) => return Err(r.fault(r.at, format!("`general.alignment` is {other:?}, not a power of two"))),
    };

    let mut raw = Vec::with_capacity(tensor_count.min(ROOM));
    for _ in 0..tensor_count {
        raw.push(r.tensor()?);
    }
    let data = r.at.div_ceil(alignment) * alignment;
    let mut tensors = HashMap::with_capacity(tensor_count.min(ROOM));
    for (at, name, dims, block_type, offset) in raw {
        let bytes_needed = block_type
            .bytes_of(&dims)
            .ok_or_else(|| r.fault(at, format!("the tensor `{name}` has sizes {dims:?}, which do not fit its type")))?;
        let start = usize::try_from(offset).ok().filter(|o| o % alignment == 0).and_then(|o| o.checked_add(data));
        let start = start
            .ok_or_else(|| r.fault(at, format!("the tensor `{name}` has the offset {offset}, which is not aligned")))?;
        let end = start.checked_add(bytes_needed).filter(|end| *end <= bytes.len());
        if end.is_none() {
            let what = format!(
                "the tensor `{name}` needs {bytes_needed} bytes at {start}, but the file ends at {}",
                bytes.len()
            );
            return Err(r.fault(at, what).with_help("the file is cut off or damaged; fetch it again"));
        }
        let info = TensorInfo { dims, block_type, offset: start, bytes: bytes_needed };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(r.fault(at, format!("the tensor `{name}` appears twice")));
        }
    }
    Ok((metadata, tensors))
}

/// A cursor over the file's bytes.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a Path,
}

/// Where its entry starts, name, sizes, type, offset into the data.
type RawTensor = (usize, String, Vec<usize>, BlockType, u64);

impl<'a> Reader<'a> {
    fn fault(&self, at: usize, what: impl std::fmt::Display) -> Error {
        Error::data(format!("{}: at byte {at}: {what}", self.file.display()))
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            let what = format!("{n} bytes are needed, but the file ends at {}", self.bytes.len());
            return Err(self.fault(self.at, what).with_help("the file is cut off or damaged; fetch it again"));
        };
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `least` bytes each: more than are left is an error.
    fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let at = self.at;
        let n = self.u64()?;
        let left = (self.bytes.len() - self.at) / least;
        match usize::try_from(n) {
            Ok(n) if n <= left => Ok(n),
            _ => Err(self
                .fault(at, format!("{n} {what} are announced, but the file ends at {}", self.bytes.len()))
                .with_help("the file is cut off or damaged; fetch it again")),
        }
    }

    fn text(&mut self) -> Result<&'a str> {
        let n = self.count(1, "bytes of text")?;
        let at = self.at;
        let bytes = self.take(n)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s),
            Err(e) => Err(self.fault(at + e.valid_up_to(), "text is not UTF-8")),
        }
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value> {
        let at = self.at;
        Ok(match kind {
            0 => Value::U64(u64::from(self.array::<1>()?[0])),
            1 => Value::I64(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::U64(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::I64(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::U64(u64::from(self.u32()?)),
            5 => Value::I64(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array::<1>()?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.fault(at, format!("{other} is not a truth value"))),
            },
            TEXT => Value::Text(self.text()?.to_owned()),
            9 if depth < MAX_ARRAY_DEPTH => {
                let inner = self.u32()?;
                let n = self.count(least_bytes(inner), "array elements")?;
                let array = Array { kind: inner, len: n, at: self.at };
                self.skip(inner, n, depth + 1)?;
                Value::Array(array)
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(self.fault(at, format!("metadata type {other} is unknown"))),
        })
    }

    /// Passes over array elements, which are checked and not kept.
    fn skip(&mut self, kind: u32, n: usize, depth: u32) -> Result<()> {
        match kind {
            TEXT => (0..n).try_for_each(|_| self.text().map(|_| ())),
            9 => (0..n).try_for_each(|_| self.value(kind, depth).map(|_| ())),
            0..=12 => self.take(n * least_bytes(kind)).map(|_| ()),
            other => Err(self.fault(self.at, format!("metadata type {other} is unknown"))),
        }
    }

    fn tensor(&mut self) -> Result<RawTensor> {
        let at = self.at;
        let name = self.text()?.to_owned();
        let n_dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return Err(
                self.fault(at, format!("the tensor `{name}` has {n_dims} dimensions (1 to {MAX_DIMS} are allowed)"))
            );
        }
        let mut dims = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            let d = self.u64()?;
            dims.push(usize::try_from(d).map_err(|_| self.fault(at, format!("the tensor `{name}` has the size {d}")))?);
        }
        let type_at = self.at;
        let id = self.u32()?;
        let block_type = BlockType::from_id(id).map_err(|what| {
            self.fault(type_at, format!("the tensor `{name}` has the {what}")).with_help(format!(
                "tailfuse reads {}; convert the model, or use a Hugging Face folder",
                BlockType::names()
            ))
        })?;
        let offset = self.u64()?;
        Ok((at, name, dims, block_type, offset))
    }
}

/// The fewest bytes that a metadata value of this type takes.
fn least_bytes(kind: u32) -> usize {
    match kind {
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => 12,
        _ => 1,
    }
}
