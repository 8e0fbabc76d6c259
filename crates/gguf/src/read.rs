//! Opening models: one file or several parts, mapped or read.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    Error, GgmlType,
    bytes::Bytes,
    error::Result,
    metadata::Metadata,
    mmap::{Advice, Mapping},
    parse::{self, Header, Stop, TensorInfo},
    sparse,
};

/// How [`Gguf::open_with`] brings a file into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Map the file instead of reading it. Nobody may change the file while it is mapped:
    /// overwriting it changes the weights, cutting it off ends the process with SIGBUS.
    /// Default true.
    pub mmap: bool,
    /// With `mmap`: bring in all pages before `open_with` returns. Default false.
    pub populate: bool,
    /// Lock the pages in memory. Where the system refuses, [`Gguf::warnings`] says so.
    /// Default false.
    pub mlock: bool,
    /// Ask for huge pages; a hint. Default false.
    pub huge_pages: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            mmap: true,
            populate: false,
            mlock: false,
            huge_pages: false,
        }
    }
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Its path, or the name of an embedded one.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Where its tensor data starts.
    pub data_offset: u64,
}

/// A model: metadata and tensors of a GGUF file, or of all parts of a split one.
#[derive(Debug)]
pub struct Gguf {
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    data: Vec<Bytes>,
    index: HashMap<String, usize>,
    files: Vec<FileInfo>,
    warnings: Vec<String>,
}

/// A file whose header was read.
struct Part {
    info: FileInfo,
    header: Header,
    /// The whole file, unless it is to be read tensor by tensor.
    mapped: Option<Bytes>,
    path: PathBuf,
}

impl Gguf {
    /// Opens the model at `path` by mapping it; of a split model, any part's path will do.
    ///
    /// # Errors
    /// Whatever [`enum@Error`] lists: a file that can't be read, is no GGUF file, is truncated,
    /// or contradicts itself.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf> {
        Gguf::open_with(path, &OpenOptions::default())
    }

    /// Opens the model at `path` as `options` say.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Gguf> {
        let path = path.as_ref();
        let parts = open_parts(path, options)?;
        let mut warnings = Vec::new();
        let mut data = Vec::new();
        for part in &parts {
            match &part.mapped {
                Some(file) => {
                    for t in &part.header.tensors {
                        data.push(slice(file, t));
                    }
                    if options.huge_pages {
                        file.advise(Advice::HugePages);
                    }
                }
                None => data.extend(read_tensors(part, options)?),
            }
        }
        if options.mlock {
            let whole: Vec<&Bytes> = match parts[0].mapped {
                Some(_) => parts.iter().filter_map(|p| p.mapped.as_ref()).collect(),
                None => data.iter().collect(),
            };
            if let Some(e) = whole.iter().find_map(|b| b.lock().err()) {
                warnings.push(format!(
                    "{}: cannot lock the model in memory: {e} (raise RLIMIT_MEMLOCK)",
                    path.display()
                ));
            }
        }
        Gguf::assemble(parts, data, warnings)
    }

    /// Reads a model that is part of the program; `name` is what errors call it.
    ///
    /// # Errors
    /// As [`Gguf::open`]; also when it is one part of a split model.
    pub fn from_static(bytes: &'static [u8], name: &str) -> Result<Gguf> {
        Gguf::from_bytes(Bytes::from_static(bytes), name)
    }

    /// Reads a model that lies in memory; `name` is what errors call it.
    ///
    /// # Errors
    /// As [`Gguf::from_static`].
    pub fn from_bytes(bytes: Bytes, name: &str) -> Result<Gguf> {
        let header = complete(parse::header(&bytes, bytes.len() as u64, name, 0), name)?;
        if let Some(split) = split_of(&header.metadata)? {
            let what = format!(
                "is part {} of {}; open the files instead",
                split.no + 1,
                split.count
            );
            return Err(Error::Split {
                file: name.to_owned(),
                what,
            });
        }
        let data = header.tensors.iter().map(|t| slice(&bytes, t)).collect();
        let part = Part {
            info: FileInfo {
                name: name.to_owned(),
                bytes: bytes.len() as u64,
                data_offset: header.data_offset,
            },
            header,
            mapped: Some(bytes),
            path: PathBuf::from(name),
        };
        Gguf::assemble(vec![part], data, Vec::new())
    }

    fn assemble(parts: Vec<Part>, data: Vec<Bytes>, warnings: Vec<String>) -> Result<Gguf> {
        let mut files = Vec::with_capacity(parts.len());
        let mut tensors = Vec::new();
        let mut index = HashMap::new();
        let mut first = None;
        for part in parts {
            for t in part.header.tensors {
                if index.insert(t.name.clone(), tensors.len()).is_some() {
                    let what = format!("tensor `{}` is in an earlier part, too", t.name);
                    return Err(Error::Split {
                        file: part.info.name,
                        what,
                    });
                }
                tensors.push(t);
            }
            first.get_or_insert((part.header.version, part.header.metadata));
            files.push(part.info);
        }
        let (version, metadata) = first.unwrap_or_default();
        show_sparse(&metadata, &mut tensors, &index, &data)?;
        Ok(Gguf {
            version,
            metadata,
            tensors,
            data,
            index,
            files,
            warnings,
        })
    }

    /// The (first) file's GGUF version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The (first) file's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        Some(&self.tensors[*self.index.get(name)?])
    }

    /// The tensor called `name`, or an error that says that it is missing.
    ///
    /// # Errors
    /// [`Error::Tensor`] when there is none.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name)
            .ok_or_else(|| Error::tensor(self.metadata.origin(), name, "is missing from the model"))
    }

    /// The data of one of this model's tensors; nothing for a tensor of another model.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        self.index.get(&tensor.name).map_or(&[], |&i| &self.data[i])
    }

    /// A handle on the data of one of this model's tensors, which outlives this `Gguf`.
    pub fn bytes(&self, tensor: &TensorInfo) -> Bytes {
        match self.index.get(&tensor.name) {
            Some(&i) => self.data[i].clone(),
            None => Bytes::from_static(&[]),
        }
    }

    /// Tells the kernel that no tensor will be needed soon: [`Bytes::release`] for all of them, and
    /// for what lies between them, which that keeps.
    pub fn release(&self) {
        for (i, bytes) in self.data.iter().enumerate() {
            if i == 0 || !bytes.is_of_file(&self.data[i - 1]) {
                bytes.release_file();
            }
        }
    }

    /// The sizes of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// The files, in order of part.
    pub fn files(&self) -> &[FileInfo] {
        &self.files
    }

    /// What was asked for and could not be had, such as locked memory.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Gives the kernel a hint about how the tensor data will be read.
    pub fn advise(&self, advice: Advice) {
        for data in &self.data {
            data.advise(advice);
        }
    }
}

/// Gives the tensors that the metadata list as sparse their real types and shapes.
fn show_sparse(
    metadata: &Metadata,
    tensors: &mut [TensorInfo],
    index: &HashMap<String, usize>,
    data: &[Bytes],
) -> Result<()> {
    let Some(version) = metadata.u32(sparse::VERSION_KEY)? else {
        return Ok(());
    };
    let file = metadata.origin();
    if version > sparse::VERSION {
        return Err(Error::SparseVersion {
            file: file.to_owned(),
            version,
        });
    }
    for name in metadata.strings(sparse::TENSORS_KEY)?.unwrap_or_default() {
        let bad = |what: String| Err(Error::tensor(file, name, what));
        let Some(&i) = index.get(name) else {
            return bad("is listed as sparse and missing".to_owned());
        };
        let t = &mut tensors[i];
        if t.ty.is_sparse() {
            return bad("is listed as sparse twice".to_owned());
        }
        if t.ty != GgmlType::I8 || t.shape.len() != 1 {
            return bad(format!(
                "is listed as sparse and is {} of shape {:?}, not I8 of one dimension",
                t.ty, t.shape
            ));
        }
        match sparse::Sparse::parse(&data[i]) {
            Ok(sparse) => {
                t.ty = sparse.header().ty;
                t.shape = sparse.header().shape();
            }
            Err(e) => return bad(e.to_string()),
        }
    }
    Ok(())
}

/// The data of `t` within its file, whose header was checked against the file's size.
fn slice(file: &Bytes, t: &TensorInfo) -> Bytes {
    // Offsets and sizes lie within the file and the file within memory: they fit a usize.
    file.slice(t.offset as usize..(t.offset + t.bytes) as usize)
}

/// The header parsed from a buffer that holds the whole file.
fn complete(parsed: Result<Header, Stop>, file: &str) -> Result<Header> {
    parsed.map_err(|stop| match stop {
        Stop::Error(e) => e,
        // Cannot be: the buffer is as long as the file.
        Stop::NeedMore => Error::malformed(file, 0, "header goes on after the end of the file"),
    })
}

fn open_part(path: &Path, index: usize, options: &OpenOptions) -> Result<Part> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let meta = file.metadata().map_err(|e| Error::io(path, "inspect", e))?;
    if meta.is_dir() {
        return Err(Error::io(
            path,
            "read",
            std::io::ErrorKind::IsADirectory.into(),
        ));
    }
    let len = meta.len();
    let too_large = || Error::io(path, "map", std::io::ErrorKind::FileTooLarge.into());
    usize::try_from(len)
        .ok()
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or_else(too_large)?;

    let (header, mapped) = if options.mmap && len > 0 {
        let map = Mapping::file(&file, options.populate).map_err(|e| Error::io(path, "map", e))?;
        // The file can have grown since: what was mapped is what counts.
        let bytes = Bytes::from_mapping(map);
        (
            complete(
                parse::header(&bytes, bytes.len() as u64, &name, index),
                &name,
            )?,
            Some(bytes),
        )
    } else {
        (read_header(&mut file, path, len, &name, index)?, None)
    };
    let info = FileInfo {
        name,
        bytes: len,
        data_offset: header.data_offset,
    };
    Ok(Part {
        info,
        header,
        mapped,
        path: path.to_owned(),
    })
}

/// Reads as much from the beginning of `file` as the header takes.
fn read_header(file: &mut File, path: &Path, len: u64, name: &str, index: usize) -> Result<Header> {
    let mut buf = Vec::new();
    let mut want = 4 << 20;
    loop {
        let more = (want - buf.len() as u64).min(len - (buf.len() as u64).min(len));
        let got = file
            .take(more)
            .read_to_end(&mut buf)
            .map_err(|e| Error::io(path, "read", e))?;
        match parse::header(&buf, len, name, index) {
            Ok(h) => return Ok(h),
            Err(Stop::Error(e)) => return Err(e),
            Err(Stop::NeedMore) if got == 0 => {
                let source = std::io::ErrorKind::UnexpectedEof.into();
                return Err(Error::io(path, "read", source));
            }
            Err(Stop::NeedMore) => want *= 4,
        }
    }
}

/// Reads the tensors of `part` into memory of their own, several at a time.
fn read_tensors(part: &Part, options: &OpenOptions) -> Result<Vec<Bytes>> {
    let tensors = &part.header.tensors;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Bytes)>> = Mutex::new(Vec::with_capacity(tensors.len()));
    let work = || -> Result<()> {
        let fail = |e| Error::io(&part.path, "read", e);
        let mut file = File::open(&part.path).map_err(|e| Error::io(&part.path, "open", e))?;
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(t) = tensors.get(i) else {
                return Ok(());
            };
            file.seek(SeekFrom::Start(t.offset)).map_err(fail)?;
            let map = Mapping::anonymous(t.bytes as usize, options.huge_pages, |buf| {
                file.read_exact(buf)
            })
            .map_err(fail)?;
            let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
            done.push((i, Bytes::from_mapping(map)));
        }
    };
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..threads.min(tensors.len()))
            .map(|_| s.spawn(work))
            .collect();
        workers.into_iter().try_for_each(|w| match w.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.sort_by_key(|&(i, _)| i);
    Ok(done.into_iter().map(|(_, b)| b).collect())
}

/// Which part of how many a file says it is.
struct Split {
    no: u32,
    count: u32,
}

/// The `split.*` keys; `None` for a model in one file.
fn split_of(metadata: &Metadata) -> Result<Option<Split>> {
    let count = metadata.u32("split.count")?.unwrap_or(0);
    if count <= 1 {
        return Ok(None);
    }
    let no = metadata.require_u32("split.no")?;
    Ok(Some(Split { no, count }))
}

/// Opens `path` and, when it is one of several, its siblings; in order of part.
fn open_parts(path: &Path, options: &OpenOptions) -> Result<Vec<Part>> {
    let opened = open_part(path, 0, options)?;
    let Some(split) = split_of(&opened.header.metadata)? else {
        return Ok(vec![opened]);
    };
    let bad = |file: &Path, what: String| Error::Split {
        file: file.display().to_string(),
        what,
    };
    let base = SplitName::parse(path).ok_or_else(|| {
        let what = format!(
            "is part {} of {} by its metadata, but is not called NAME-00001-of-{:05}.gguf",
            split.no + 1,
            split.count,
            split.count
        );
        bad(path, what)
    })?;
    if base.no != split.no + 1 || base.count != split.count {
        let what = format!(
            "is part {} of {} by its metadata, {} of {} by its name",
            split.no + 1,
            split.count,
            base.no,
            base.count
        );
        return Err(bad(path, what));
    }

    let total = opened.header.metadata.u64("split.tensors.count")?;
    let mut opened = Some(opened);
    let mut parts = Vec::new();
    for no in 0..split.count {
        let file = base.sibling(no + 1);
        let part =
            match opened.take_if(|p| p.header.metadata.u32("split.no").ok() == Some(Some(no))) {
                Some(mut p) => {
                    p.header
                        .tensors
                        .iter_mut()
                        .for_each(|t| t.file = no as usize);
                    p
                }
                None => open_part(&file, no as usize, options)?,
            };
        match split_of(&part.header.metadata)? {
            Some(s) if s.no == no && s.count == split.count => {}
            Some(s) => {
                let what = format!("is part {} of {} by its metadata", s.no + 1, s.count);
                return Err(bad(&file, what));
            }
            None => return Err(bad(&file, "has no split.count".to_owned())),
        }
        parts.push(part);
    }
    let found: u64 = parts.iter().map(|p| p.header.tensors.len() as u64).sum();
    if let Some(total) = total.filter(|&t| t != found) {
        let what = format!("the parts have {found} tensors, split.tensors.count says {total}");
        return Err(bad(path, what));
    }
    Ok(parts)
}

/// A file name of the form `NAME-00002-of-00005.gguf`, taken apart.
struct SplitName<'a> {
    dir: &'a Path,
    stem: &'a str,
    no: u32,
    count: u32,
}

impl<'a> SplitName<'a> {
    fn parse(path: &'a Path) -> Option<Self> {
        let number = |s: &str| match s.len() {
            5 if s.bytes().all(|b| b.is_ascii_digit()) => s.parse().ok(),
            _ => None,
        };
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, no) = rest.rsplit_once('-')?;
        Some(SplitName {
            dir: path.parent()?,
            stem,
            no: number(no)?,
            count: number(count)?,
        })
    }

    fn sibling(&self, no: u32) -> PathBuf {
        self.dir
            .join(format!("{}-{no:05}-of-{:05}.gguf", self.stem, self.count))
    }
}
