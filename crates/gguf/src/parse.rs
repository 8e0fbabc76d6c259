//! From bytes to header: magic, version, metadata, tensor list. Checks every count, length
//! and offset before it believes it.

use std::collections::HashMap;

use crate::{
    Error, GgmlType,
    metadata::{Array, Metadata, Value, ValueType},
};

/// Alignment of tensor data where `general.alignment` says nothing.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;

/// Where the alignment of tensor data is kept.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";

/// Largest alignment that is believed; it bounds padding.
const MAX_ALIGNMENT: u32 = 16 << 20;

/// No header comes near this: large vocabularies take some 10 MiB. It bounds what a hostile
/// (for example sparse) file can make us allocate.
const MAX_HEADER: u64 = 128 << 20;

/// Longest key or tensor name; the format's own limit for keys.
pub(crate) const MAX_NAME: u64 = 65_535;

/// ggml tensors have at most four dimensions.
const MAX_DIMS: u32 = 4;

/// Arrays may hold arrays, so deep.
pub(crate) const MAX_NESTING: u32 = 4;

/// A tensor's name, type, shape and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, unique in the model.
    pub name: String,
    /// The type of its elements.
    pub ty: GgmlType,
    /// The shape in ggml's order: row length first. At most four dimensions, none zero.
    pub shape: Vec<u64>,
    /// Bytes of data.
    pub bytes: u64,
    /// Which of [`Gguf::files`](crate::Gguf::files) holds it.
    pub file: usize,
    /// Where its data starts in that file, in bytes from the file's beginning.
    pub offset: u64,
}

impl TensorInfo {
    /// Elements per row: the first dimension.
    pub fn row_len(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Number of rows: the product of all other dimensions.
    pub fn rows(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes of one row; of a sparse tensor, where rows differ, of one on average.
    pub fn row_bytes(&self) -> u64 {
        self.bytes / self.rows()
    }
}

/// Everything before the tensor data.
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Vec<TensorInfo>,
    pub(crate) data_offset: u64,
}

/// Why parsing ended early.
pub(crate) enum Stop {
    /// The buffer is only the beginning of the file and the header goes on.
    NeedMore,
    /// The file is bad.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(e: Error) -> Stop {
        Stop::Error(e)
    }
}

type Parsed<T> = Result<T, Stop>;

/// Bytes of `shape` in type `ty`, or what is wrong with them.
pub(crate) fn tensor_bytes(ty: GgmlType, shape: &[u64]) -> Result<u64, String> {
    if shape.len() > MAX_DIMS as usize {
        return Err(format!(
            "{} dimensions, at most {MAX_DIMS} are possible",
            shape.len()
        ));
    }
    if let Some(i) = shape.iter().position(|&d| d == 0) {
        return Err(format!("dimension {i} is zero"));
    }
    let elements = shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= i64::MAX as u64)
        .ok_or_else(|| format!("shape {shape:?} has too many elements"))?;
    let row = shape.first().copied().unwrap_or(1);
    if !row.is_multiple_of(ty.block_len() as u64) {
        return Err(format!(
            "row length {row} is no multiple of {ty}'s block length {}",
            ty.block_len()
        ));
    }
    ty.bytes_for(elements)
        .filter(|&n| n <= i64::MAX as u64)
        .ok_or_else(|| format!("shape {shape:?} has too many bytes"))
}

/// Parses the header of the file called `file`, `file_len` bytes long, whose beginning is
/// `buf`. `index` is the file's number for [`TensorInfo::file`].
pub(crate) fn header(buf: &[u8], file_len: u64, file: &str, index: usize) -> Parsed<Header> {
    let mut c = Cursor {
        buf,
        pos: 0,
        file_len,
        file,
    };
    let version = c.magic_and_version()?;

    let tensor_count = c.u64("tensor count")?;
    let kv_count = c.u64("metadata count")?;
    // A tensor takes at least 24 bytes (empty name, no dimensions) and a metadata entry 13.
    c.check_count(kv_count, 13, "metadata entries")?;
    c.check_count(tensor_count, 24, "tensor entries")?;

    let mut metadata = Metadata::new(file);
    for i in 0..kv_count {
        let at = c.pos as u64;
        let key = c.name(|| format!("key of metadata entry {i}"))?;
        let ty = c.value_type(&key)?;
        let value = c.value(ty, &key, 0)?;
        if metadata.set(&key, value).is_some() {
            return Err(
                Error::malformed(file, at, format!("duplicate metadata key `{key}`")).into(),
            );
        }
    }

    let alignment = alignment(&metadata)?;

    // No reservation by the count: it is only known to be possible for the file's size.
    let mut tensors = Vec::new();
    let mut names = HashMap::new();
    for i in 0..tensor_count {
        let at = c.pos as u64;
        let tensor = c.tensor(i, index, alignment)?;
        if names.insert(tensor.name.clone(), i).is_some() {
            let what = format!("duplicate tensor name `{}`", tensor.name);
            return Err(Error::malformed(file, at, what).into());
        }
        tensors.push(tensor);
    }

    // Cannot overflow: the position is at most MAX_HEADER, the alignment at most 2^24.
    let data_offset = (c.pos as u64).next_multiple_of(alignment);
    place(&mut tensors, data_offset, file_len, file)?;
    Ok(Header {
        version,
        metadata,
        tensors,
        data_offset,
    })
}

/// The alignment that the metadata ask for: a power of two, at most 16 MiB.
pub(crate) fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    let Some(a) = metadata.u32(ALIGNMENT_KEY)? else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    if !a.is_power_of_two() || a > MAX_ALIGNMENT {
        return Err(Error::WrongType {
            file: metadata.origin().to_owned(),
            key: ALIGNMENT_KEY.to_owned(),
            expected: "a power of two of at most 16 MiB",
            found: a.to_string(),
        });
    }
    Ok(a.into())
}

/// Makes the tensors' offsets absolute; holds that each lies in the file and none overlap.
fn place(
    tensors: &mut [TensorInfo],
    data_offset: u64,
    file_len: u64,
    file: &str,
) -> Result<(), Error> {
    for t in tensors.iter_mut() {
        let relative = t.offset;
        let end = data_offset
            .checked_add(relative)
            .and_then(|start| start.checked_add(t.bytes))
            .ok_or_else(|| Error::tensor(file, &t.name, format!("offset {relative} overflows")))?;
        t.offset = end - t.bytes;
        if end > file_len {
            return Err(Error::Truncated {
                file: file.to_owned(),
                what: format!("tensor `{}`", t.name),
                offset: t.offset,
                needed: t.bytes,
                available: file_len.saturating_sub(t.offset),
            });
        }
    }
    // Overlapping tensors would let a small file claim any amount of data.
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    for pair in order.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        if a.offset + a.bytes > b.offset {
            let what = format!(
                "its data at offset {} overlaps tensor `{}`",
                b.offset, a.name
            );
            return Err(Error::tensor(file, &b.name, what));
        }
    }
    Ok(())
}

struct Cursor<'a> {
    buf: &'a [u8],
    pos: usize,
    file_len: u64,
    file: &'a str,
}

impl<'a> Cursor<'a> {
    fn bad<T>(&self, at: usize, what: impl Into<String>) -> Parsed<T> {
        Err(Error::malformed(self.file, at as u64, what).into())
    }

    fn left(&self) -> u64 {
        self.file_len - self.pos as u64
    }

    fn take(&mut self, n: u64, what: impl FnOnce() -> String) -> Parsed<&'a [u8]> {
        let at = self.pos as u64;
        if n > self.left() {
            return Err(Error::Truncated {
                file: self.file.to_owned(),
                what: what(),
                offset: at,
                needed: n,
                available: self.left(),
            }
            .into());
        }
        if at + n > MAX_HEADER {
            let what = format!("header is larger than {} MiB", MAX_HEADER >> 20);
            return self.bad(self.pos, what);
        }
        // Both are at most MAX_HEADER now, so the sum fits a usize.
        let end = self.pos + n as usize;
        let Some(bytes) = self.buf.get(self.pos..end) else {
            return Err(Stop::NeedMore);
        };
        self.pos = end;
        Ok(bytes)
    }

    fn fixed<const N: usize>(&mut self, what: impl FnOnce() -> String) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.fixed(|| what.to_owned())?))
    }

    fn u64(&mut self, what: &str) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.fixed(|| what.to_owned())?))
    }

    /// Refuses a count whose items can't fit into what is left of the file.
    fn check_count(&self, count: u64, min_bytes: u64, what: &str) -> Parsed<()> {
        let needed = count.saturating_mul(min_bytes);
        if needed > self.left() {
            return Err(Error::Truncated {
                file: self.file.to_owned(),
                what: format!("{count} {what}"),
                offset: self.pos as u64,
                needed,
                available: self.left(),
            }
            .into());
        }
        Ok(())
    }

    fn magic_and_version(&mut self) -> Parsed<u32> {
        let file = || self.file.to_owned();
        let start = &self.buf[..self.buf.len().min(16)];
        if start.get(..4) == Some(b"FUGG") {
            return Err(Error::BigEndian { file: file() }.into());
        }
        let magic = &start[..start.len().min(4)];
        // A file cut off within the magic is truncated, not foreign.
        if !b"GGUF".starts_with(magic) || (magic.is_empty() && self.file_len > 0) {
            let found = format!("\"{}\"", magic.escape_ascii());
            return Err(Error::NotGguf {
                file: file(),
                found,
                hint: hint(start),
            }
            .into());
        }
        self.take(4, || "magic".to_owned())?;
        let version = self.u32("version")?;
        match version {
            2 | 3 => Ok(version),
            // A small number, byte-swapped.
            v if v & 0xffff == 0 && v != 0 => Err(Error::BigEndian {
                file: self.file.to_owned(),
            }
            .into()),
            _ => Err(Error::Version {
                file: self.file.to_owned(),
                version,
            }
            .into()),
        }
    }

    /// A key or a tensor name: UTF-8, of bounded length.
    fn name(&mut self, what: impl Fn() -> String) -> Parsed<String> {
        let at = self.pos;
        let len = u64::from_le_bytes(self.fixed(|| format!("length of the {}", what()))?);
        if len > MAX_NAME && len <= self.left() {
            return self.bad(
                at,
                format!("{}: {len} bytes, at most {MAX_NAME} are possible", what()),
            );
        }
        let bytes = self.take(len, &what)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => self.bad(
                at,
                format!("{}: not UTF-8: \"{}\"", what(), bytes.escape_ascii()),
            ),
        }
    }

    fn string(&mut self, key: &str) -> Parsed<String> {
        let len = u64::from_le_bytes(self.fixed(|| format!("string length in `{key}`"))?);
        let bytes = self.take(len, || format!("string in `{key}`"))?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn value_type(&mut self, key: &str) -> Parsed<ValueType> {
        let at = self.pos;
        let id = u32::from_le_bytes(self.fixed(|| format!("type of `{key}`"))?);
        match ValueType::from_id(id) {
            Some(ty) => Ok(ty),
            None => self.bad(at, format!("metadata key `{key}`: unknown value type {id}")),
        }
    }

    fn value(&mut self, ty: ValueType, key: &str, depth: u32) -> Parsed<Value> {
        macro_rules! scalar {
            ($ty:ty) => {
                <$ty>::from_le_bytes(self.fixed(|| format!("value of `{key}`"))?).into()
            };
        }
        Ok(match ty {
            ValueType::U8 => scalar!(u8),
            ValueType::I8 => scalar!(i8),
            ValueType::U16 => scalar!(u16),
            ValueType::I16 => scalar!(i16),
            ValueType::U32 => scalar!(u32),
            ValueType::I32 => scalar!(i32),
            ValueType::U64 => scalar!(u64),
            ValueType::I64 => scalar!(i64),
            ValueType::F32 => scalar!(f32),
            ValueType::F64 => scalar!(f64),
            ValueType::Bool => Value::Bool(self.fixed::<1>(|| format!("value of `{key}`"))? != [0]),
            ValueType::String => Value::String(self.string(key)?),
            ValueType::Array => Value::Array(self.array(key, depth)?),
        })
    }

    fn array(&mut self, key: &str, depth: u32) -> Parsed<Array> {
        let at = self.pos;
        if depth >= MAX_NESTING {
            let what = format!("metadata key `{key}`: arrays nested deeper than {MAX_NESTING}");
            return self.bad(at, what);
        }
        let ty = self.value_type(key)?;
        let count = u64::from_le_bytes(self.fixed(|| format!("array length of `{key}`"))?);
        self.check_count(count, ty.min_bytes(), "array elements")?;
        macro_rules! numbers {
            ($variant:ident, $ty:ty) => {{
                const N: usize = size_of::<$ty>();
                let bytes = self.take(count * N as u64, || format!("array `{key}`"))?;
                let mut out = Vec::with_capacity(bytes.len() / N);
                out.extend(
                    bytes
                        .as_chunks::<N>()
                        .0
                        .iter()
                        .map(|b| <$ty>::from_le_bytes(*b)),
                );
                Array::$variant(out)
            }};
        }
        Ok(match ty {
            ValueType::U8 => numbers!(U8, u8),
            ValueType::I8 => numbers!(I8, i8),
            ValueType::U16 => numbers!(U16, u16),
            ValueType::I16 => numbers!(I16, i16),
            ValueType::U32 => numbers!(U32, u32),
            ValueType::I32 => numbers!(I32, i32),
            ValueType::U64 => numbers!(U64, u64),
            ValueType::I64 => numbers!(I64, i64),
            ValueType::F32 => numbers!(F32, f32),
            ValueType::F64 => numbers!(F64, f64),
            ValueType::Bool => {
                let bytes = self.take(count, || format!("array `{key}`"))?;
                Array::Bool(bytes.iter().map(|&b| b != 0).collect())
            }
            // These grow as they are read: what is read bounds what is allocated.
            ValueType::String => {
                let mut out = Vec::new();
                for _ in 0..count {
                    out.push(self.string(key)?);
                }
                Array::String(out)
            }
            ValueType::Array => {
                let mut out = Vec::new();
                for _ in 0..count {
                    out.push(self.array(key, depth + 1)?);
                }
                Array::Array(out)
            }
        })
    }

    fn tensor(&mut self, i: u64, file: usize, alignment: u64) -> Parsed<TensorInfo> {
        let name = self.name(|| format!("name of tensor {i}"))?;
        let at = self.pos;
        let dims = u32::from_le_bytes(self.fixed(|| format!("dimensions of `{name}`"))?);
        if dims > MAX_DIMS {
            let what =
                format!("tensor `{name}`: {dims} dimensions, at most {MAX_DIMS} are possible");
            return self.bad(at, what);
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            shape.push(u64::from_le_bytes(
                self.fixed(|| format!("shape of `{name}`"))?,
            ));
        }
        let id = u32::from_le_bytes(self.fixed(|| format!("type of `{name}`"))?);
        let Some(ty) = GgmlType::from_id(id) else {
            let file = self.file.to_owned();
            return Err(Error::UnknownTensorType {
                file,
                tensor: name,
                id,
            }
            .into());
        };
        let offset = u64::from_le_bytes(self.fixed(|| format!("offset of `{name}`"))?);
        if !offset.is_multiple_of(alignment) {
            let what = format!("offset {offset} is not aligned to {alignment} bytes");
            return Err(Error::tensor(self.file, &name, what).into());
        }
        let bytes = tensor_bytes(ty, &shape).map_err(|e| Error::tensor(self.file, &name, e))?;
        Ok(TensorInfo {
            name,
            ty,
            shape,
            bytes,
            file,
            offset,
        })
    }
}

/// What a file with another beginning probably is.
fn hint(start: &[u8]) -> &'static str {
    match start {
        [b'l' | b't' | b'j' | b'g', _, b'g', b'g', ..]
            if matches!(&start[..4], b"lmgg" | b"tjgg" | b"algg" | b"fmgg") =>
        {
            " (a GGML file from before GGUF: convert the original model again)"
        }
        [b'P', b'K', 3, 4, ..] => {
            " (a zip archive, perhaps a PyTorch checkpoint: convert it to GGUF first)"
        }
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' ', ..] => {
            " (perhaps a Git LFS pointer: fetch the file itself with `git lfs pull`)"
        }
        [_, _, _, _, _, _, _, 0, b'{', ..] => {
            " (perhaps a safetensors file: convert it to GGUF first)"
        }
        [b'<', ..] => " (perhaps a web page: the download went wrong)",
        _ => "",
    }
}
