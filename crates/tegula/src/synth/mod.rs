//! Models of random weights: the exact shapes and types of real ones, for measurements and
//! tests.
//!
//! Every matrix has weights of mean about 0 and standard deviation `1/sqrt(k)`, so that
//! activations neither vanish nor overflow; norms are 1, biases 0. The same seed gives the
//! same file on every machine and with every number of threads.

mod blocks;
mod shape;
mod vocab;

pub use shape::{PRESETS, Shape};

use crate::exit::Refusal;
use blocks::Filler;
use std::{
    collections::HashMap,
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};
use tegula_gguf::{
    GgmlType, Metadata, TensorInfo,
    quantize::{FileType, QuantizeOptions, choose},
    writer::GgufWriter,
};

/// Bytes that are made and written at once, about.
const CHUNK: usize = 4 << 20;

/// The types of a model's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// As the quantiser mixes them.
    File(FileType),
    /// All matrices that are quantised get this type.
    Pure(GgmlType),
}

impl Mix {
    /// The mix of a name: a file type's or, where there is none of that name, a tensor
    /// type's. `pure` looks for the tensor type first.
    pub fn parse(name: &str, pure: bool) -> Result<Mix, Refusal> {
        let tensor = name.parse().ok().filter(|&ty| blocks::can_fill(ty));
        let file: Option<FileType> = name.parse().ok();
        let found = match (pure, file, tensor) {
            (true, Some(file), None) => Some(Mix::Pure(file.base())),
            (false, Some(file), _) => Some(Mix::File(file)),
            (_, _, Some(tensor)) => Some(Mix::Pure(tensor)),
            (_, None, None) => None,
        };
        found.ok_or_else(|| {
            let files = FileType::ALL.iter().map(|t| t.name());
            let tensors = GgmlType::ALL
                .iter()
                .copied()
                .filter(|&t| blocks::can_fill(t));
            let mut names: Vec<&str> = files.chain(tensors.map(GgmlType::name)).collect();
            names.sort_unstable();
            names.dedup();
            Refusal::Usage(format!("unknown type `{name}`; known: {}", names.join(" ")))
        })
    }

    /// Rules that say which tensors are quantised, and the type to note in the file.
    fn options(self) -> (QuantizeOptions, Option<FileType>) {
        match self {
            Mix::File(file) => (QuantizeOptions::new(file), Some(file)),
            Mix::Pure(ty) => {
                // BF16 takes rows of any length.
                let rules = QuantizeOptions {
                    pure: true,
                    ..QuantizeOptions::new(FileType::BF16)
                };
                let file = FileType::ALL.iter().copied().find(|f| f.base() == ty);
                (rules, file)
            }
        }
    }
}

/// A model that can be written.
pub struct Synth {
    metadata: Metadata,
    tensors: Vec<Tensor>,
    seed: u64,
}

/// A tensor of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    /// ggml order: row length first.
    pub shape: Vec<u64>,
    pub ty: GgmlType,
    fill: Fill,
}

/// What a tensor holds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Constant(f32),
    Random,
}

/// How far the writing is.
pub struct Written {
    pub done: u64,
    pub total: u64,
}

impl Synth {
    /// Lays out a model of `shape` with the types of `mix`.
    ///
    /// # Errors
    /// A shape that can't be, or rows that the type's blocks don't divide.
    pub fn new(shape: &Shape, mix: Mix, seed: u64) -> anyhow::Result<Synth> {
        shape.check()?;
        let (options, file) = mix.options();
        let mut metadata = shape.metadata();
        metadata.set("general.quantization_version", 2u32);
        if let Some(file) = file {
            metadata.set("general.file_type", file.id());
        }
        vocab::describe(shape, &mut metadata);
        let mut tensors = shape.tensors();
        let infos: Vec<TensorInfo> = tensors.iter().map(info).collect();
        let choices = choose(&metadata, &infos, &options)?;
        for (tensor, choice) in tensors.iter_mut().zip(choices) {
            tensor.ty = match mix {
                Mix::File(_) => choice.ty,
                Mix::Pure(ty) if choice.ty != GgmlType::F32 => ty,
                Mix::Pure(_) => GgmlType::F32,
            };
        }
        Ok(Synth {
            metadata,
            tensors,
            seed,
        })
    }

    /// The tensors.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Writes the file at `path`, which appears when it is complete, and returns its size.
    ///
    /// # Errors
    /// The file can't be written, or `cancel` was set; nothing is left behind then.
    pub fn write(
        &self,
        path: &Path,
        threads: usize,
        cancel: &AtomicBool,
        progress: &mut dyn FnMut(Written),
    ) -> anyhow::Result<u64> {
        let mut writer = GgufWriter::new(self.metadata.clone());
        for t in &self.tensors {
            writer.add_tensor(&t.name, t.ty, &t.shape)?;
        }
        let total = writer.file_bytes()?;
        let chunks = self.chunks(writer.tensors());
        let mut out = writer.create(path)?;
        let contents = &self.contents();
        let threads = threads.max(1);
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|worker| {
                    let (full, filled) = mpsc::sync_channel::<Vec<u8>>(1);
                    let (empty, emptied) = mpsc::channel::<Vec<u8>>();
                    let mine = chunks.iter().skip(worker).step_by(threads);
                    scope.spawn(move || {
                        for chunk in mine {
                            let mut buffer = emptied.try_recv().unwrap_or_default();
                            buffer.resize(chunk.len, 0);
                            self.fill(chunk, &contents[chunk.tensor], &mut buffer);
                            if full.send(buffer).is_err() {
                                // The writer gave up and says why.
                                return;
                            }
                        }
                    });
                    (filled, empty)
                })
                .collect();
            for i in 0..chunks.len() {
                if cancel.load(Ordering::Relaxed) {
                    anyhow::bail!(Refusal::Input(format!("{}: cancelled", path.display())));
                }
                let (filled, empty) = &workers[i % threads];
                let buffer = filled.recv()?;
                out.write(&buffer)?;
                progress(Written {
                    done: out.position(),
                    total,
                });
                // The worker may have made its last chunk already.
                let _ = empty.send(buffer);
            }
            Ok(())
        })?;
        out.finish()?;
        Ok(total)
    }

    /// The work, in file order.
    fn chunks(&self, tensors: &[TensorInfo]) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        for (tensor, info) in tensors.iter().enumerate() {
            let block = info.ty.block_bytes();
            let step = CHUNK / block * block;
            let mut at = 0;
            while at < info.bytes {
                let len = (info.bytes - at).min(step as u64);
                chunks.push(Chunk {
                    tensor,
                    at,
                    len: len as usize,
                });
                at += len;
            }
        }
        chunks
    }

    /// What fills each tensor.
    fn contents(&self) -> Vec<Content> {
        let mut fillers = HashMap::new();
        let mut content = |t: &Tensor| match t.fill {
            Fill::Constant(x) => Content::Constant(x),
            Fill::Random => {
                let make = || Filler::new(t.ty, 1.0 / (t.shape[0] as f32).sqrt());
                Content::Random(*fillers.entry((t.ty, t.shape[0])).or_insert_with(make))
            }
        };
        self.tensors.iter().map(&mut content).collect()
    }

    fn fill(&self, chunk: &Chunk, content: &Content, out: &mut [u8]) {
        match content {
            Content::Constant(x) => {
                let (out, _) = out.as_chunks_mut::<4>();
                out.fill(x.to_le_bytes());
            }
            Content::Random(filler) => {
                let place = (chunk.tensor as u64) << 40 ^ chunk.at;
                filler.fill(self.seed ^ blocks::mix(place), out);
            }
        }
    }
}

/// What makes a tensor's bytes.
enum Content {
    Constant(f32),
    Random(Filler),
}

/// A part of a tensor.
struct Chunk {
    tensor: usize,
    /// First byte within the tensor.
    at: u64,
    len: usize,
}

/// The tensor as the quantiser's rules take it.
fn info(t: &Tensor) -> TensorInfo {
    TensorInfo {
        name: t.name.clone(),
        ty: t.ty,
        shape: t.shape.clone(),
        bytes: 0,
        file: 0,
        offset: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Synth {
        let shape = Shape::preset("qwen3moe").unwrap();
        Synth::new(&shape, Mix::parse("Q4_K_M", false).unwrap(), 5).unwrap()
    }

    #[test]
    fn files_do_not_depend_on_threads() {
        let dir = tempfile::tempdir().unwrap();
        let write = |threads: usize| {
            let path = dir.path().join(threads.to_string());
            let never = AtomicBool::new(false);
            let mut last = 0;
            let bytes = tiny()
                .write(&path, threads, &never, &mut |w| last = w.done)
                .unwrap();
            assert_eq!(last, bytes);
            std::fs::read(path).unwrap()
        };
        let one = write(1);
        assert!(one == write(2) && one == write(5));
    }

    #[test]
    fn a_cancelled_file_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        let error = tiny().write(&path, 2, &AtomicBool::new(true), &mut |_| {});
        assert!(error.unwrap_err().to_string().contains("cancelled"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn names_mean_mixes_or_types() {
        let mix = |name, pure| Mix::parse(name, pure);
        assert_eq!(mix("q4_k", false), Ok(Mix::File(FileType::Q4_K_M)));
        assert_eq!(mix("Q4_K", true), Ok(Mix::Pure(GgmlType::Q4_K)));
        assert_eq!(mix("Q4_K_M", true), Ok(Mix::Pure(GgmlType::Q4_K)));
        assert_eq!(mix("MXFP4", false), Ok(Mix::Pure(GgmlType::MXFP4)));
        assert!(mix("I32", false).is_err() && mix("Q9", true).is_err());
    }
}
