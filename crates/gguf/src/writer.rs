//! Writing GGUF files (version 3): the header from metadata and declared tensors, then the
//! data streamed in that order into a temporary file that takes its name at the end.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    Error, GgmlType, Gguf,
    error::Result,
    metadata::{Array, Metadata, Value},
    parse::{self, MAX_NAME, MAX_NESTING, TensorInfo},
    sparse,
};

/// The version that is written.
const VERSION: u32 = 3;

/// A file to be: metadata and tensor list.
///
/// ```no_run
/// # use tegula_gguf::{GgmlType, Metadata, writer::GgufWriter};
/// let mut metadata = Metadata::default();
/// metadata.set("general.architecture", "llama");
/// let mut writer = GgufWriter::new(metadata);
/// writer.add_tensor("token_embd.weight", GgmlType::F32, &[2, 2])?;
/// let mut stream = writer.create("model.gguf")?;
/// stream.write(&[0; 16])?;
/// stream.finish()?;
/// # Ok::<(), tegula_gguf::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    names: HashSet<String>,
}

impl GgufWriter {
    /// Starts a file with `metadata`. `general.alignment` there sets the alignment of the
    /// tensor data (32 bytes otherwise).
    pub fn new(metadata: Metadata) -> GgufWriter {
        GgufWriter {
            metadata,
            ..GgufWriter::default()
        }
    }

    /// A file like `model`: its metadata, without the keys that describe a split, and its
    /// tensors with their types.
    ///
    /// # Errors
    /// None for a model that was read from a file.
    pub fn like(model: &Gguf) -> Result<GgufWriter> {
        let mut metadata = model.metadata().clone();
        metadata.retain(|key| !key.starts_with("split."));
        let mut writer = GgufWriter::new(metadata);
        for t in model.tensors() {
            match t.ty.is_sparse() {
                true => writer.add_sparse(&t.name, t.ty, &t.shape, t.bytes)?,
                false => writer.add_tensor(&t.name, t.ty, &t.shape)?,
            }
        }
        Ok(writer)
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The metadata, to be changed.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }

    /// The tensors declared so far. Their offsets count from the beginning of the data until
    /// the file is created.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Declares the next tensor; `shape` is in ggml's order, row length first.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a name declared before or too long, and for a shape that the type
    /// can't have.
    pub fn add_tensor(&mut self, name: &str, ty: GgmlType, shape: &[u64]) -> Result<()> {
        let bytes = parse::tensor_bytes(ty, shape)
            .map_err(|what| Error::tensor(self.metadata.origin(), name, what))?;
        self.declare(name, ty, shape, bytes)
    }

    /// Declares the next tensor, a sparse one of `bytes` bytes: see [`crate::sparse`].
    ///
    /// # Errors
    /// As [`GgufWriter::add_tensor`].
    pub fn add_sparse(
        &mut self,
        name: &str,
        ty: GgmlType,
        shape: &[u64],
        bytes: u64,
    ) -> Result<()> {
        sparse::Header::new(ty, shape, None)
            .map_err(|e| Error::tensor(self.metadata.origin(), name, e.to_string()))?;
        self.declare(name, ty, shape, bytes)
    }

    fn declare(&mut self, name: &str, ty: GgmlType, shape: &[u64], bytes: u64) -> Result<()> {
        let fail = |what: String| Error::tensor(self.metadata.origin(), name, what);
        if name.len() as u64 > MAX_NAME {
            return Err(fail(format!("name of {} bytes", name.len())));
        }
        if !self.names.insert(name.to_owned()) {
            return Err(fail("declared twice".to_owned()));
        }
        self.tensors.push(TensorInfo {
            name: name.to_owned(),
            ty,
            shape: shape.to_vec(),
            bytes,
            file: 0,
            offset: 0,
        });
        Ok(())
    }

    /// The metadata with the list of sparse tensors, or without, if there are none.
    fn with_sparse(&self) -> Result<Metadata> {
        let mut metadata = self.metadata.clone();
        metadata.retain(|key| key != sparse::VERSION_KEY && key != sparse::TENSORS_KEY);
        let names: Vec<String> = self
            .tensors
            .iter()
            .filter(|t| t.ty.is_sparse())
            .map(|t| t.name.clone())
            .collect();
        if !names.is_empty() {
            // Strips then begin where cache lines do.
            if parse::alignment(&metadata)? < sparse::ALIGN as u64 {
                metadata.set(parse::ALIGNMENT_KEY, sparse::ALIGN as u32);
            }
            metadata.set(sparse::VERSION_KEY, sparse::VERSION);
            metadata.set(sparse::TENSORS_KEY, names);
        }
        Ok(metadata)
    }

    /// Gives every tensor its place and encodes the header with its padding. Returns the
    /// header, the tensors with offsets counted from the file's beginning, and the size of
    /// the file.
    fn layout(&self) -> Result<(Vec<u8>, Vec<TensorInfo>, u64)> {
        let metadata = self.with_sparse()?;
        let alignment = parse::alignment(&metadata)?;
        let mut tensors = self.tensors.clone();
        let mut end = 0u64;
        for t in &mut tensors {
            let start = end.checked_next_multiple_of(alignment);
            let placed = start.and_then(|s| Some((s, s.checked_add(t.bytes)?)));
            let Some((start, after)) = placed.filter(|&(_, e)| e <= i64::MAX as u64) else {
                let what = "the file would be too large";
                return Err(Error::tensor(self.metadata.origin(), &t.name, what));
            };
            (t.offset, end) = (start, after);
        }

        let mut out = Vec::new();
        out.extend(b"GGUF");
        out.extend(VERSION.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata.iter() {
            if key.len() as u64 > MAX_NAME || !nesting_allowed(value) {
                return Err(Error::Unsupported(format!(
                    "metadata key `{}…` can't be written: too long or nested too deeply",
                    key.chars().take(64).collect::<String>()
                )));
            }
            put_str(&mut out, key);
            out.extend(value.ty().id().to_le_bytes());
            put_value(&mut out, value);
        }
        for t in &tensors {
            put_str(&mut out, &t.name);
            // A sparse tensor's type and shape are its own affair: see `crate::sparse`.
            let (ty, shape) = match t.ty.is_sparse() {
                true => (GgmlType::I8, &[t.bytes][..]),
                false => (t.ty, &t.shape[..]),
            };
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(ty.id().to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        let data = (out.len() as u64).next_multiple_of(alignment);
        out.resize(data as usize, 0);
        tensors.iter_mut().for_each(|t| t.offset += data);
        Ok((out, tensors, data + end))
    }

    /// The size that the file will have.
    ///
    /// # Errors
    /// When the header can't be encoded, as [`GgufWriter::create`].
    pub fn file_bytes(&self) -> Result<u64> {
        Ok(self.layout()?.2)
    }

    /// Creates the file under a temporary name in `path`'s directory and writes the header.
    /// A `path` that exists and is no regular file (such as a device) is written directly.
    ///
    /// # Errors
    /// [`Error::Io`] with the path when the directory can't be written or is full;
    /// [`Error::WrongType`] for a `general.alignment` that is no power of two.
    pub fn create(self, path: impl AsRef<Path>) -> Result<GgufStream> {
        let (header, tensors, _) = self.layout()?;
        let mut stream = GgufStream {
            output: Output::create(path.as_ref())?,
            tensors,
            at: 0,
            next: 0,
        };
        stream.put(&header)?;
        Ok(stream)
    }

    /// The whole file in memory, with `data` of the tensors in order of declaration.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `data` doesn't fit the declared tensors.
    pub fn to_bytes(&self, data: &[&[u8]]) -> Result<Vec<u8>> {
        let (mut out, tensors, _) = self.layout()?;
        if data.len() != tensors.len() {
            let what = format!("data of {} tensors given for {}", data.len(), tensors.len());
            return Err(Error::Unsupported(what));
        }
        for (t, &d) in tensors.iter().zip(data) {
            if d.len() as u64 != t.bytes {
                let what = format!("{} bytes of data given, {} needed", d.len(), t.bytes);
                return Err(Error::tensor(self.metadata.origin(), &t.name, what));
            }
            out.resize(t.offset as usize, 0);
            out.extend(d);
        }
        Ok(out)
    }
}

/// An open file whose tensor data is being written. Dropped before [`GgufStream::finish`], it
/// leaves nothing behind.
#[derive(Debug)]
pub struct GgufStream {
    output: Output,
    /// With offsets from the file's beginning.
    tensors: Vec<TensorInfo>,
    /// Bytes written.
    at: u64,
    /// The tensor that comes next or is being written.
    next: usize,
}

impl GgufStream {
    /// The tensors with their final places.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Bytes written so far, of the whole file.
    pub fn position(&self) -> u64 {
        self.at
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.output.write(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Appends tensor data: any part of the current tensor, or of several in a row; padding
    /// between tensors is added here.
    ///
    /// # Errors
    /// [`Error::Io`] with the path, for example when the disk is full; [`Error::Tensor`] for
    /// more data than was declared.
    pub fn write(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let Some(t) = self.tensors.get(self.next) else {
                let what = format!("{} bytes more than its declared tensors take", data.len());
                return Err(Error::tensor(&self.output.name(), "(after the last)", what));
            };
            let (start, end) = (t.offset, t.offset + t.bytes);
            while self.at < start {
                const ZEROS: [u8; 4096] = [0; 4096];
                let n = (start - self.at).min(ZEROS.len() as u64);
                self.put(&ZEROS[..n as usize])?;
            }
            // At most data.len(), so it fits a usize.
            let n = (end - self.at).min(data.len() as u64) as usize;
            self.put(&data[..n])?;
            data = &data[n..];
            if self.at == end {
                self.next += 1;
            }
        }
        Ok(())
    }

    /// Writes everything to the disk and gives the file its name.
    ///
    /// # Errors
    /// [`Error::Tensor`] when data of a declared tensor is missing, else [`Error::Io`].
    /// Nothing is left behind then.
    pub fn finish(self) -> Result<()> {
        if let Some(t) = self.tensors.get(self.next) {
            let missing = t.offset + t.bytes - self.at.clamp(t.offset, t.offset + t.bytes);
            let what = format!("{missing} bytes of its data were not written");
            return Err(Error::tensor(&self.output.name(), &t.name, what));
        }
        self.output.commit()
    }
}

/// A file being written under a temporary name.
#[derive(Debug)]
struct Output {
    /// Where it goes in the end.
    path: PathBuf,
    /// Where it is meanwhile; `None` once it is renamed, and for devices.
    temporary: Option<PathBuf>,
    /// `None` only while being committed.
    file: Option<BufWriter<File>>,
}

impl Output {
    fn create(path: &Path) -> Result<Output> {
        // A link keeps pointing to the file: what it points to is replaced.
        let path = match fs::canonicalize(path) {
            Ok(real) => real,
            Err(e) if e.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(e) => return Err(Error::io(path, "create", e)),
        };
        let fail = |e| Error::io(&path, "create", e);
        if let Ok(meta) = fs::metadata(&path) {
            if meta.is_dir() {
                return Err(fail(io::ErrorKind::IsADirectory.into()));
            }
            if !meta.is_file() {
                let file = File::options().write(true).open(&path).map_err(fail)?;
                return Ok(Output {
                    file: Some(BufWriter::new(file)),
                    temporary: None,
                    path,
                });
            }
        }
        let Some(name) = path.file_name() else {
            return Err(fail(io::ErrorKind::InvalidFilename.into()));
        };
        // The process id and a counter make the name unique; `create_new` holds it.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{n}.tmp", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(fail)?;
        let file = Some(BufWriter::with_capacity(1 << 20, file));
        Ok(Output {
            file,
            temporary: Some(temporary),
            path,
        })
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let result = match &mut self.file {
            Some(file) => file.write_all(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        result.map_err(|e| Error::io(&self.path, "write", e))
    }

    fn commit(mut self) -> Result<()> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let fail = |e| Error::io(&self.path, "write", e);
        let file = file.into_inner().map_err(|e| fail(e.into_error()))?;
        let Some(temporary) = &self.temporary else {
            return Ok(());
        };
        file.sync_all().map_err(fail)?;
        drop(file);
        fs::rename(temporary, &self.path).map_err(|e| Error::io(&self.path, "rename to", e))?;
        self.temporary = None;
        // Makes the rename durable. Some file systems can't sync a directory; the data is safe.
        #[cfg(unix)]
        if let Some(dir) = self.path.parent() {
            let dir = if dir.as_os_str().is_empty() {
                Path::new(".")
            } else {
                dir
            };
            let _ = File::open(dir).and_then(|d| d.sync_all());
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // What is still buffered is not wanted any more.
        if let Some(file) = self.file.take() {
            drop(file.into_parts());
        }
        if let Some(temporary) = self.temporary.take() {
            let _ = fs::remove_file(temporary);
        }
    }
}

/// True unless arrays are nested deeper than readers accept.
fn nesting_allowed(value: &Value) -> bool {
    fn depth(array: &Array) -> u32 {
        match array {
            Array::Array(inner) => 1 + inner.iter().map(depth).max().unwrap_or(0),
            _ => 1,
        }
    }
    value.as_array().is_none_or(|a| depth(a) <= MAX_NESTING)
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_str(out, v),
        Value::Array(v) => put_array(out, v),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    macro_rules! numbers {
        ($v:expr) => {
            $v.iter().for_each(|x| out.extend(x.to_le_bytes()))
        };
    }
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => numbers!(v),
        Array::U16(v) => numbers!(v),
        Array::I16(v) => numbers!(v),
        Array::U32(v) => numbers!(v),
        Array::I32(v) => numbers!(v),
        Array::U64(v) => numbers!(v),
        Array::I64(v) => numbers!(v),
        Array::F32(v) => numbers!(v),
        Array::F64(v) => numbers!(v),
        Array::Bool(v) => out.extend(v.iter().map(|&b| u8::from(b))),
        Array::String(v) => v.iter().for_each(|s| put_str(out, s)),
        Array::Array(v) => v.iter().for_each(|a| put_array(out, a)),
    }
}
