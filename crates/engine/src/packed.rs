//! The packed file: strips kept beside the model, so that the next load maps them instead of
//! packing again.
//!
//! It is `MAGIC`, a fixed part, then three tables and the strips, all numbers little-endian:
//!
//! | part | contents |
//! |---|---|
//! | fixed | u32 each: format, strip layout, bytes of `identity`, matrices, CRC-32 of the tables |
//! | identity | of each file of the model: size, time of change, CRC-32 of its header |
//! | matrices | of each: name, type, rows, weights per row, experts, offset and length of its strips |
//! | sums | of each: CRC-32 of its strips |
//! | strips | each matrix at a multiple of [`ALIGN`] |
//!
//! Everything but the sums follows from the model and the plan, so a file fits if it begins
//! with exactly the bytes that would be written now, and if its sums hold. A file that does
//! not fit is written anew, under a temporary name that is then changed.

use std::{
    fmt,
    fs::{self, File},
    io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    time::UNIX_EPOCH,
};

use crc32fast::Hasher;
use tegula_gguf::{Bytes, Gguf};
use tegula_kernels::{Pool, Weights, strip::LAYOUT_VERSION};

use crate::{LoadEvent, Plan, plan::Buffer};

const MAGIC: &[u8; 8] = b"TEGPACK\n";
const FORMAT: u32 = 1;
/// Fixed part: the magic and five numbers.
const FIXED: usize = 8 + 5 * 4;
/// Strips of a matrix begin at a page, also where pages are large.
const ALIGN: u64 = 64 << 10;
/// Bytes of which a thread makes a sum at a time.
const PIECE: usize = 8 << 20;

/// What became of the packed file that was asked for. `Display` is a line for users.
#[derive(Debug)]
pub enum PackedFile {
    /// It fits: matrices are mapped from it.
    Used { path: PathBuf, bytes: u64 },
    /// It was written, then mapped. What was there did not fit.
    Written {
        path: PathBuf,
        bytes: u64,
        replaced: Option<Unfit>,
    },
    /// Matrices are packed into memory, as without it.
    Unused { path: PathBuf, why: String },
}

impl fmt::Display for PackedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PackedFile::Used { path, .. } => write!(f, "{}: used", path.display()),
            PackedFile::Written { path, replaced, .. } => {
                write!(f, "{}: written", path.display())?;
                match replaced {
                    None => Ok(()),
                    Some(why) => write!(f, "; the one that was there {why}"),
                }
            }
            PackedFile::Unused { path, why } => write!(f, "{}: not used: {why}", path.display()),
        }
    }
}

/// Why a packed file can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unfit {
    /// It does not begin like one.
    #[error("is no packed file")]
    Foreign,
    /// Another version of this program wrote it.
    #[error("was written by another version of tegula")]
    Version,
    /// Size, time or header of a file of the model differ.
    #[error("is stale: the model has changed")]
    Stale,
    /// The plan packs other matrices now.
    #[error("holds other matrices than are wanted")]
    Plan,
    /// Bytes are missing or not those that were written.
    #[error("is damaged: {0}")]
    Damaged(String),
}

/// Strips mapped from a packed file.
#[derive(Debug)]
pub(crate) struct Cache {
    matrices: Vec<(String, Bytes)>,
}

impl Cache {
    /// The strips of a matrix.
    pub fn strips(&self, name: &str) -> Option<Bytes> {
        let found = self.matrices.iter().find(|(n, _)| n == name);
        found.map(|(_, bytes)| bytes.clone())
    }
}

/// A matrix of the plan, and where its strips lie.
struct Matrix<'a> {
    name: &'a str,
    offset: u64,
    bytes: u64,
}

/// What a packed file for this model and plan holds.
struct Contents<'a> {
    identity: Vec<u8>,
    matrices: Vec<Matrix<'a>>,
    table: Vec<u8>,
    /// Of the whole file.
    bytes: u64,
}

impl<'a> Contents<'a> {
    fn new(gguf: &Gguf, plan: &'a Plan) -> Result<Contents<'a>, String> {
        let mut identity = Vec::new();
        for file in gguf.files() {
            let fail = |e: io::Error| format!("{}: {e}", file.name);
            let model = File::open(&file.name).map_err(fail)?;
            let metadata = model.metadata().map_err(fail)?;
            let changed = metadata.modified().map_err(fail)?;
            let changed = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
            let mut header = Vec::new();
            let mut start = model.take(file.data_offset);
            start.read_to_end(&mut header).map_err(fail)?;
            identity.extend(metadata.len().to_le_bytes());
            identity.extend(changed.as_secs().to_le_bytes());
            identity.extend(changed.subsec_nanos().to_le_bytes());
            identity.extend(crc32fast::hash(&header).to_le_bytes());
        }
        let packed = || {
            let placements = plan.placements.iter();
            placements.filter(|p| p.buffer == Buffer::Cache)
        };
        // Names are as long as they are; the rest of an entry, and its sum, have fixed lengths.
        let tables: usize = packed().map(|p| 2 + p.tensor.len() + 44 + 4).sum();
        let mut at = (FIXED + identity.len() + tables) as u64;
        let (mut matrices, mut table) = (Vec::new(), Vec::new());
        for p in packed() {
            let offset = at.next_multiple_of(ALIGN);
            let ty = gguf.tensor(&p.tensor).map_or(0, |t| t.ty.id());
            let name = u16::try_from(p.tensor.len()).map_err(|_| "a name is too long")?;
            let extent = |i: usize| p.shape.get(i).copied().unwrap_or(1);
            table.extend(name.to_le_bytes());
            table.extend(p.tensor.as_bytes());
            table.extend(ty.to_le_bytes());
            for number in [extent(1), extent(0), extent(2), offset, p.bytes] {
                table.extend(number.to_le_bytes());
            }
            matrices.push(Matrix {
                name: &p.tensor,
                offset,
                bytes: p.bytes,
            });
            at = offset + p.bytes;
        }
        match matrices.is_empty() {
            true => Err("there is nothing to pack for this instruction set".to_owned()),
            false => Ok(Contents {
                identity,
                matrices,
                table,
                bytes: at,
            }),
        }
    }

    /// Everything before the strips.
    fn head(&self, sums: &[u8]) -> Vec<u8> {
        let tables = [&self.identity[..], &self.table, sums].concat();
        let numbers = [
            FORMAT,
            LAYOUT_VERSION,
            self.identity.len() as u32,
            self.matrices.len() as u32,
            crc32fast::hash(&tables),
        ];
        let numbers = numbers.into_iter().flat_map(u32::to_le_bytes);
        MAGIC.iter().copied().chain(numbers).chain(tables).collect()
    }

    /// Maps a file if it fits.
    fn map(&self, file: &File, pool: &Pool) -> Result<Cache, Unfit> {
        let damaged = |what: &str| Unfit::Damaged(what.to_owned());
        // Nothing is lost with an empty one.
        let data = Bytes::map(file).map_err(|e| Unfit::Damaged(e.to_string()))?;
        if data.is_empty() {
            return Err(damaged("it is empty"));
        }
        let number = |i: usize| {
            let at = MAGIC.len() + 4 * i;
            let bytes = data.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        if !data.starts_with(MAGIC) {
            return Err(Unfit::Foreign);
        }
        if number(0) != Some(FORMAT) || number(1) != Some(LAYOUT_VERSION) {
            return Err(Unfit::Version);
        }
        let sums_at = FIXED + self.identity.len() + self.table.len();
        let strips_at = sums_at + 4 * self.matrices.len();
        let sums = data.get(sums_at..strips_at);
        if number(2) != Some(self.identity.len() as u32)
            || data.get(FIXED..FIXED + self.identity.len()) != Some(&self.identity[..])
        {
            return Err(Unfit::Stale);
        }
        if number(3) != Some(self.matrices.len() as u32)
            || data.get(FIXED + self.identity.len()..sums_at) != Some(&self.table[..])
        {
            return Err(Unfit::Plan);
        }
        let sums = sums.ok_or_else(|| damaged("it ends too early"))?;
        if data.get(..strips_at) != Some(&self.head(sums)[..]) {
            return Err(damaged("the sum of its tables is wrong"));
        }
        if data.len() as u64 != self.bytes {
            return Err(damaged("it has not the right length"));
        }
        let mut matrices = Vec::new();
        for (matrix, sum) in self.matrices.iter().zip(sums.chunks_exact(4)) {
            // Inside the file, which is mapped: they fit a usize.
            let range = matrix.offset as usize..(matrix.offset + matrix.bytes) as usize;
            let strips = data.slice(range);
            if crc(&strips, pool).to_le_bytes() != sum {
                return Err(Unfit::Damaged(format!(
                    "the sum of {} is wrong",
                    matrix.name
                )));
            }
            matrices.push((matrix.name.to_owned(), strips));
        }
        Ok(Cache { matrices })
    }

    /// Packs every matrix into a file of this name.
    fn write(
        &self,
        path: &Path,
        gguf: &Gguf,
        pool: &Pool,
        progress: &mut dyn FnMut(LoadEvent<'_>),
    ) -> io::Result<()> {
        let temporary = Temporary::beside(path);
        let mut out = BufWriter::new(File::create_new(&temporary.0)?);
        let mut sums = Vec::new();
        let total = self.matrices.iter().map(|m| m.bytes).sum();
        let mut done = 0;
        for matrix in &self.matrices {
            out.seek(SeekFrom::Start(matrix.offset))?;
            let mut out = Summed {
                out: &mut out,
                sum: Hasher::new(),
            };
            let raw = gguf.require_tensor(matrix.name).map_err(io::Error::other)?;
            let bytes = gguf.bytes(raw);
            let extent = |i: usize| raw.shape.get(i).copied().unwrap_or(1) as usize;
            Weights::raw(raw.ty, extent(1), extent(0), extent(2), bytes.clone())
                .map_err(io::Error::other)?
                .pack(pool)
                .write_strips(&mut out)?;
            bytes.release();
            sums.extend(out.sum.finalize().to_le_bytes());
            done += matrix.bytes;
            progress(LoadEvent::Packed {
                name: matrix.name,
                done,
                total,
            });
        }
        out.rewind()?;
        out.write_all(&self.head(&sums))?;
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_all()?;
        fs::rename(&temporary.0, path)
    }
}

/// Maps the packed file at `path`, after writing it if it is not there or does not fit; says
/// what became of it. `None`: go on without.
pub(crate) fn open(
    path: &Path,
    gguf: &Gguf,
    plan: &Plan,
    pool: &Pool,
    progress: &mut dyn FnMut(LoadEvent<'_>),
) -> Option<Cache> {
    let (cache, became) = match open_or_write(path, gguf, plan, pool, progress) {
        Ok((cache, became)) => (Some(cache), became),
        Err(why) => {
            let path = path.to_owned();
            (None, PackedFile::Unused { path, why })
        }
    };
    progress(LoadEvent::PackedFile(&became));
    cache
}

fn open_or_write(
    path: &Path,
    gguf: &Gguf,
    plan: &Plan,
    pool: &Pool,
    progress: &mut dyn FnMut(LoadEvent<'_>),
) -> Result<(Cache, PackedFile), String> {
    let contents = Contents::new(gguf, plan)?;
    let (path, bytes) = (path.to_owned(), contents.bytes);
    let replaced = match File::open(&path) {
        Ok(file) => match contents.map(&file, pool) {
            Ok(cache) => return Ok((cache, PackedFile::Used { path, bytes })),
            // Somebody's own file is not to be lost to a slip in a command line.
            Err(Unfit::Foreign) => return Err(format!("it {}", Unfit::Foreign)),
            Err(why) => Some(why),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e.to_string()),
    };
    let written = contents.write(&path, gguf, pool, progress);
    written.map_err(|e| format!("it can't be written: {e}"))?;
    let file = File::open(&path).map_err(|e| e.to_string())?;
    let cache = contents.map(&file, pool);
    let cache = cache.map_err(|why| format!("just written, it {why}"))?;
    let became = PackedFile::Written {
        path,
        bytes,
        replaced,
    };
    Ok((cache, became))
}

/// CRC-32 by all threads.
fn crc(bytes: &[u8], pool: &Pool) -> u32 {
    let pieces = bytes.len().div_ceil(PIECE);
    let sums = Mutex::new(vec![Hasher::new(); pieces]);
    pool.run(pieces, &|i| {
        let mut sum = Hasher::new();
        sum.update(&bytes[i * PIECE..bytes.len().min((i + 1) * PIECE)]);
        let mut sums = sums.lock().unwrap_or_else(|e| e.into_inner());
        sums[i] = sum;
    });
    let mut all = Hasher::new();
    let sums = sums.into_inner().unwrap_or_else(|e| e.into_inner());
    sums.iter().for_each(|sum| all.combine(sum));
    all.finalize()
}

/// Sums up what it writes.
struct Summed<'a> {
    out: &'a mut dyn Write,
    sum: Hasher,
}

impl Write for Summed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.sum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A temporary name, which is removed if it is still there in the end.
struct Temporary(PathBuf);

impl Temporary {
    fn beside(path: &Path) -> Temporary {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        Temporary(name.into())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Renamed if all went well; else there is nothing better to do about it.
        let _ = fs::remove_file(&self.0);
    }
}
