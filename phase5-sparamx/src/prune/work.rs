//! Finished tensors of a run that has not ended yet, in a directory beside its result.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use tegula_gguf::GgmlType;

use super::{PruneError, Result};

/// Bytes that are copied at a time.
const PIECE: usize = 8 << 20;

/// Where the finished tensors of a run with this result wait.
pub fn leftovers(result: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(result.file_name().unwrap_or_default());
    name.push(".prune");
    result.with_file_name(name)
}

/// The directory.
pub(super) struct Work {
    dir: PathBuf,
}

/// A finished tensor.
pub(super) struct Finished {
    path: PathBuf,
    pub ty: GgmlType,
    pub zeros: u64,
    pub bytes: u64,
}

impl Work {
    /// The directory for `result`, without tensors unless it is of a run with the same
    /// `fingerprint`.
    pub fn open(result: &Path, fingerprint: &str) -> Result<Work> {
        let work = Work {
            dir: leftovers(result),
        };
        let run = work.dir.join("run");
        if fs::read(&run).is_ok_and(|found| found == fingerprint.as_bytes()) {
            return Ok(work);
        }
        work.remove()?;
        fs::create_dir_all(&work.dir).map_err(|e| PruneError::io(&work.dir, "create", e))?;
        work.put(&run, fingerprint.as_bytes())?;
        Ok(work)
    }

    /// The directory itself, for what a run keeps besides tensors.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a file that is there wholly or not at all.
    fn put(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let temporary = path.with_extension("tmp");
        let fail = |e| PruneError::io(path, "write", e);
        let mut file = File::create(&temporary).map_err(fail)?;
        file.write_all(bytes).map_err(fail)?;
        file.sync_all().map_err(fail)?;
        fs::rename(&temporary, path).map_err(fail)
    }

    /// Keeps tensor `i`.
    pub fn finish(&self, i: usize, ty: GgmlType, zeros: u64, bytes: &[u8]) -> Result<Finished> {
        let path = self.dir.join(format!("{i}-{zeros}.{}", ty.name()));
        self.put(&path, bytes)?;
        Ok(Finished {
            path,
            ty,
            zeros,
            bytes: bytes.len() as u64,
        })
    }

    /// Tensor `i`, if an earlier run has finished it.
    pub fn finished(&self, i: usize) -> Result<Option<Finished>> {
        let fail = |e| PruneError::io(&self.dir, "read", e);
        for entry in fs::read_dir(&self.dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            let parts = || {
                let ty = path.extension()?.to_str()?.parse().ok()?;
                let (index, zeros) = path.file_stem()?.to_str()?.split_once('-')?;
                let zeros = zeros.parse().ok()?;
                (index.parse() == Ok(i)).then_some((ty, zeros))
            };
            if let Some((ty, zeros)) = parts() {
                let bytes = fs::metadata(&path).map_err(fail)?.len();
                return Ok(Some(Finished {
                    ty,
                    zeros,
                    bytes,
                    path,
                }));
            }
        }
        Ok(None)
    }

    /// Removes all that is there.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(PruneError::io(&self.dir, "remove", e))
            }
            _ => Ok(()),
        }
    }
}

impl Finished {
    /// The bytes.
    pub fn read(&self) -> Result<Vec<u8>> {
        fs::read(&self.path).map_err(|e| PruneError::io(&self.path, "read", e))
    }

    /// Hands the bytes to `write` part by part.
    pub fn copy(&self, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let fail = |e| PruneError::io(&self.path, "read", e);
        let mut file = File::open(&self.path).map_err(fail)?;
        let mut piece = vec![0; PIECE];
        loop {
            match file.read(&mut piece).map_err(fail)? {
                0 => return Ok(()),
                n => write(&piece[..n])?,
            }
        }
    }
}
