//! Models of random weights: the exact shapes and types of real ones, for measurements and
//! tests.
//!
//! Every matrix has weights of mean about 0 and standard deviation `1/sqrt(k)`, so that
//! activations neither vanish nor overflow; norms are 1, biases 0. The same seed gives the
//! same file on every machine and with every number of threads.

mod blocks;
mod sparse;

use crate::exit::Refusal;
use anyhow::Context as _;
use blocks::Filler;
use phase5_sparamx::prune::{PruneError, Target, usual};
use rayon::prelude::*;
use sparse::Strips;
use std::{
    collections::HashMap,
    ops::Range,
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};
use tegula_engine::{
    Shape,
    shape::{Fill, ShapedTensor},
};
use tegula_gguf::{
    GgmlType, Metadata, TensorInfo,
    quantize::{FileType, QuantizeOptions, choose},
    sparse::{ALIGN, Header},
    writer::GgufWriter,
};

/// Bytes that are made and written at once, about.
const CHUNK: usize = 4 << 20;

/// The types of a model's tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Types {
    mix: Mix,
    /// The sparse type of the layers' matrices, and how many of their weights are zero.
    sparse: Option<(GgmlType, Target)>,
}

/// The types of dense tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mix {
    /// As the quantiser mixes them.
    File(FileType),
    /// All matrices that are quantised get this type.
    Pure(GgmlType),
}

impl Types {
    /// The types of a name, a sparse one's with its zeros. The pruner's matrices are sparse then,
    /// all else is as with the name of the dense twin.
    ///
    /// # Errors
    /// A name that means nothing, a sparse type without zeros or a dense one with them, a share of
    /// zeros that can't be.
    pub fn parse(name: &str, pure: bool, zeros: Option<Target>) -> Result<Types, Refusal> {
        let usage = |what: String| Err(Refusal::Usage(what));
        let sparse: Option<GgmlType> = name.parse().ok().filter(|ty: &GgmlType| ty.is_sparse());
        let dense = sparse.map_or(name, |ty| ty.dense().name());
        let types = Types {
            mix: Mix::parse(dense, pure)?,
            sparse: sparse.zip(zeros),
        };
        match (sparse, zeros) {
            (Some(ty), None) => usage(format!(
                "{ty} is sparse: say how many weights are zero, by --sparsity X or --nm N:M"
            )),
            (None, Some(_)) => usage(format!(
                "{name} is dense: zeros are for the sparse types {}",
                names(GgmlType::SPARSE).join(" ")
            )),
            (_, Some(Target::Sparsity(s))) if !(0.0..1.0).contains(&s) => {
                usage(PruneError::Sparsity(s).to_string())
            }
            _ => Ok(types),
        }
    }

    /// The type of a tensor for which the quantiser's rules choose `choice`.
    fn of(&self, name: &str, choice: GgmlType) -> GgmlType {
        match (self.sparse, self.mix) {
            (Some((ty, _)), _) if usual(name) => ty,
            (_, Mix::Pure(ty)) if choice != GgmlType::F32 => ty,
            _ => choice,
        }
    }
}

fn names(types: &[GgmlType]) -> Vec<&'static str> {
    types.iter().map(|t| t.name()).collect()
}

impl Mix {
    /// The mix of a name: a file type's or, where there is none of that name, a tensor
    /// type's. `pure` looks for the tensor type first.
    fn parse(name: &str, pure: bool) -> Result<Mix, Refusal> {
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
                .filter(|&t| blocks::can_fill(t) || t.is_sparse());
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
    zeros: Option<Target>,
    seed: u64,
}

/// A tensor of it.
struct Tensor {
    of: ShapedTensor,
    ty: GgmlType,
}

/// How far the writing is.
pub struct Written {
    pub done: u64,
    pub total: u64,
}

impl Synth {
    /// Lays out a model of `shape` with these types.
    ///
    /// # Errors
    /// A shape that can't be, or rows that the type's blocks don't divide.
    pub fn new(shape: &Shape, types: Types, seed: u64) -> anyhow::Result<Synth> {
        shape.check().map_err(|e| Refusal::Usage(e.to_string()))?;
        let (options, file) = types.mix.options();
        let mut metadata = shape.metadata();
        metadata.set("general.quantization_version", 2u32);
        if let Some(file) = file {
            metadata.set("general.file_type", file.id());
        }
        let tensors = shape.tensors();
        let infos: Vec<TensorInfo> = tensors.iter().map(info).collect();
        let choices = choose(&metadata, &infos, &options)?;
        let typed = |(of, ty): (ShapedTensor, GgmlType)| Tensor {
            ty: types.of(&of.name, ty),
            of,
        };
        let choices = choices.into_iter().map(|choice| choice.ty);
        Ok(Synth {
            metadata,
            tensors: tensors.into_iter().zip(choices).map(typed).collect(),
            zeros: types.sparse.map(|(_, zeros)| zeros),
            seed,
        })
    }

    /// Weights of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|t| t.of.weights()).sum()
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
        let go_on = || match cancel.load(Ordering::Relaxed) {
            true => Err(Refusal::Input(format!("{}: cancelled", path.display()))),
            false => Ok(()),
        };
        let threads = threads.max(1);
        let contents = &self.contents(threads, &go_on)?;
        let mut writer = GgufWriter::new(self.metadata.clone());
        for (t, content) in self.tensors.iter().zip(contents) {
            match content {
                Content::Sparse(s) => {
                    writer.add_sparse(&t.of.name, t.ty, &t.of.shape, s.bytes())?;
                }
                _ => writer.add_tensor(&t.of.name, t.ty, &t.of.shape)?,
            }
        }
        let total = writer.file_bytes()?;
        let chunks = chunks(writer.tensors(), contents);
        let mut out = writer.create(path)?;
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|worker| {
                    let (full, filled) = mpsc::sync_channel::<Vec<u8>>(1);
                    let (empty, emptied) = mpsc::channel::<Vec<u8>>();
                    let mine = chunks.iter().skip(worker).step_by(threads);
                    scope.spawn(move || {
                        for chunk in mine {
                            let mut buffer = emptied.try_recv().unwrap_or_default();
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
                go_on()?;
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
            anyhow::Ok(())
        })?;
        out.finish()?;
        Ok(total)
    }

    /// What fills each tensor. How long sparse strips are, only their bitmaps tell: these are made
    /// here for the first time, and again with the values.
    fn contents(
        &self,
        threads: usize,
        go_on: &dyn Fn() -> Result<(), Refusal>,
    ) -> anyhow::Result<Vec<Content>> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .context("cannot start threads")?;
        let mut fillers = HashMap::new();
        let mut content = |(i, t): (usize, &Tensor)| {
            let deviation = 1.0 / (t.of.shape[0] as f32).sqrt();
            Ok(match (t.of.fill, self.zeros) {
                (Fill::Constant(x), _) => Content::Constant(x),
                (_, Some(zeros)) if t.ty.is_sparse() => {
                    go_on()?;
                    let seed = |strip| self.place(i, strip as u64);
                    let sparse = pool.install(|| SparseTensor::new(t, zeros, deviation, seed));
                    Content::Sparse(
                        sparse
                            .map_err(|e| Refusal::Input(format!("tensor `{}`: {e}", t.of.name)))?,
                    )
                }
                _ => {
                    let make = || Filler::new(t.ty, deviation);
                    Content::Random(*fillers.entry((t.ty, t.of.shape[0])).or_insert_with(make))
                }
            })
        };
        self.tensors.iter().enumerate().map(&mut content).collect()
    }

    /// The seed of what begins at `at` within a tensor.
    fn place(&self, tensor: usize, at: u64) -> u64 {
        self.seed ^ blocks::mix((tensor as u64) << 40 ^ at)
    }

    fn fill(&self, chunk: &Chunk, content: &Content, out: &mut Vec<u8>) {
        out.clear();
        match (content, &chunk.part) {
            (Content::Constant(x), Part::Bytes(bytes)) => {
                out.resize((bytes.end - bytes.start) as usize, 0);
                out.as_chunks_mut::<4>().0.fill(x.to_le_bytes());
            }
            (Content::Random(filler), Part::Bytes(bytes)) => {
                out.resize((bytes.end - bytes.start) as usize, 0);
                filler.fill(self.place(chunk.tensor, bytes.start), out);
            }
            (Content::Sparse(s), Part::Strips(strips)) => {
                if strips.start == 0 {
                    out.extend(&s.head);
                }
                for strip in strips.clone() {
                    let seed = self.place(chunk.tensor, strip as u64);
                    s.strips.append(strip, seed, out);
                }
                if strips.end == s.lengths.len() {
                    out.resize(out.len() + ALIGN, 0);
                }
            }
            (Content::Sparse(_), _) | (_, Part::Strips(_)) => {
                unreachable!("sparse tensors alone have strips")
            }
        }
    }
}

/// What makes a tensor's bytes.
enum Content {
    Constant(f32),
    Random(Filler),
    Sparse(SparseTensor),
}

/// A sparse tensor to be.
struct SparseTensor {
    strips: Strips,
    /// Header and table of strips.
    head: Vec<u8>,
    /// Bytes of each strip.
    lengths: Vec<usize>,
}

impl SparseTensor {
    /// Strip `i` is made from `seed(i)`.
    fn new(
        t: &Tensor,
        zeros: Target,
        deviation: f32,
        seed: impl Fn(usize) -> u64 + Sync,
    ) -> Result<SparseTensor, tegula_gguf::sparse::SparseError> {
        let pattern = match zeros {
            Target::Sparsity(_) => None,
            Target::Pattern(pattern) => Some(pattern),
        };
        let header = Header::new(t.ty, &t.of.shape, pattern)?;
        let strips = Strips::new(&header, zeros, deviation);
        // With a pattern one is as long as another.
        let different = match pattern {
            Some(_) => 1,
            None => header.strips(),
        };
        let mut measured: Vec<(usize, u64)> = (0..different)
            .into_par_iter()
            .map_init(Vec::new, |scratch, i| strips.measure(i, seed(i), scratch))
            .collect();
        measured.resize(header.strips(), measured[0]);
        let lengths: Vec<usize> = measured.iter().map(|m| m.0).collect();
        let header = Header {
            values: measured.iter().map(|m| m.1).sum(),
            ..header
        };
        Ok(SparseTensor {
            strips,
            head: header.encode(&lengths)?,
            lengths,
        })
    }

    fn bytes(&self) -> u64 {
        let strips: u64 = self.lengths.iter().map(|&l| l as u64).sum();
        (self.head.len() + ALIGN) as u64 + strips
    }
}

/// A part of a tensor.
struct Chunk {
    tensor: usize,
    part: Part,
}

enum Part {
    /// Whole blocks.
    Bytes(Range<u64>),
    /// With the tensor's head before the first and its end behind the last.
    Strips(Range<usize>),
}

/// The work, in file order.
fn chunks(tensors: &[TensorInfo], contents: &[Content]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (tensor, (info, content)) in tensors.iter().zip(contents).enumerate() {
        if let Content::Sparse(s) = content {
            let (mut first, mut bytes) = (0, 0);
            for (i, len) in s.lengths.iter().enumerate() {
                bytes += len;
                if bytes >= CHUNK || i + 1 == s.lengths.len() {
                    let part = Part::Strips(first..i + 1);
                    chunks.push(Chunk { tensor, part });
                    (first, bytes) = (i + 1, 0);
                }
            }
            continue;
        }
        let block = info.ty.block_bytes();
        let step = (CHUNK / block * block) as u64;
        let mut at = 0;
        while at < info.bytes {
            let end = info.bytes.min(at + step);
            let part = Part::Bytes(at..end);
            chunks.push(Chunk { tensor, part });
            at = end;
        }
    }
    chunks
}

/// The tensor as the quantiser's rules take it.
fn info(t: &ShapedTensor) -> TensorInfo {
    TensorInfo {
        name: t.name.clone(),
        ty: GgmlType::F32,
        shape: t.shape.clone(),
        bytes: 0,
        file: 0,
        offset: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(ty: &str, zeros: Option<Target>) -> Synth {
        let shape = Shape::preset("qwen3moe").unwrap();
        Synth::new(&shape, Types::parse(ty, false, zeros).unwrap(), 5).unwrap()
    }

    #[test]
    fn files_do_not_depend_on_threads() {
        let dir = tempfile::tempdir().unwrap();
        for (ty, zeros) in [("Q4_K_M", None), ("S4", Some(Target::Sparsity(0.7)))] {
            let write = |threads: usize| {
                let path = dir.path().join(threads.to_string());
                let never = AtomicBool::new(false);
                let mut last = 0;
                let bytes = tiny(ty, zeros)
                    .write(&path, threads, &never, &mut |w| last = w.done)
                    .unwrap();
                assert_eq!(last, bytes);
                std::fs::read(path).unwrap()
            };
            let one = write(1);
            assert!(one == write(2) && one == write(5), "{ty}");
        }
    }

    #[test]
    fn a_cancelled_file_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        for (ty, zeros) in [("Q4_K_M", None), ("S8", Some(Target::Sparsity(0.5)))] {
            let model = tiny(ty, zeros);
            let error = model.write(&path, 2, &AtomicBool::new(true), &mut |_| {});
            assert!(error.unwrap_err().to_string().contains("cancelled"));
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn names_mean_mixes_or_types() {
        let mix = |name, pure| Mix::parse(name, pure);
        assert_eq!(mix("q4_k", false), Ok(Mix::File(FileType::Q4_K_M)));
        assert_eq!(mix("Q4_K", true), Ok(Mix::Pure(GgmlType::Q4_K)));
        assert_eq!(mix("Q4_K_M", true), Ok(Mix::Pure(GgmlType::Q4_K)));
        assert_eq!(mix("MXFP4", false), Ok(Mix::Pure(GgmlType::MXFP4)));
        assert!(mix("I32", false).is_err() && mix("Q9", true).is_err());
        let half = Some(Target::Sparsity(0.5));
        let types = Types::parse("s8", false, half).unwrap();
        assert_eq!(types.mix, Mix::File(FileType::Q8_0));
        assert_eq!(
            types.of("blk.0.attn_q.weight", GgmlType::Q8_0),
            GgmlType::S8
        );
        assert_eq!(types.of("output.weight", GgmlType::Q8_0), GgmlType::Q8_0);
    }
}
