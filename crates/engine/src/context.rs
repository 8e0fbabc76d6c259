//! A context: sequences, their KV cache, and batches that run through the model.

use crate::{
    Error, Model, Result,
    models::{self, Buffers, Graph, Lane, On, Results, Step, Want},
    offload::{Device, TOP_ROWS},
};
use std::sync::Arc;
use tegula_kernels::{
    device::MOST_LARGEST,
    kv::{KV_PAGE, KvCache, KvError, KvShape, KvType, PageTable, pruned::KvSparsity},
    ops::Token,
};

/// Tokens that run through the layers together, unless something else is asked for.
pub const UBATCH: usize = 1024;

/// How to make a [`Context`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ContextOptions {
    /// Positions that one sequence may hold; 0 for what the model was trained with.
    pub context: usize,
    /// Tokens that [`Context::decode`] takes at most at once.
    pub batch: usize,
    /// Tokens that run through the layers together.
    pub ubatch: usize,
    /// Sequences.
    pub sequences: usize,
    /// How many full sequences the cache has room for; 0 for all of them. Sequences beyond
    /// that can be held where others are short or share a prefix.
    pub room: usize,
    pub k_type: KvType,
    pub v_type: KvType,
    /// What finished pages of the cache lose; the whole cache must be on the CPU then.
    pub sparsity: Option<KvSparsity>,
}

impl ContextOptions {
    /// Pages that a pruned cache needs for positions that are not packed yet: the last one of
    /// every sequence, and those that one step fills.
    pub fn dense_pages(&self) -> usize {
        2 * self.sequences + self.ubatch.div_ceil(KV_PAGE)
    }
}

impl Default for ContextOptions {
    fn default() -> Self {
        ContextOptions {
            context: 0,
            batch: 2048,
            ubatch: UBATCH,
            sequences: 1,
            room: 0,
            k_type: KvType::F16,
            v_type: KvType::F16,
            sparsity: None,
        }
    }
}

/// A token to append to a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchToken {
    pub id: u32,
    pub sequence: usize,
    /// Whether logits are wanted behind this token.
    pub logits: bool,
}

/// Tokens for one call of [`Context::decode`], in order per sequence.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub tokens: Vec<BatchToken>,
}

impl Batch {
    /// Tokens of one sequence; logits behind the last one.
    pub fn prompt(sequence: usize, ids: &[u32]) -> Batch {
        let last = ids.len();
        let token = |(i, &id)| BatchToken {
            id,
            sequence,
            logits: i + 1 == last,
        };
        Batch {
            tokens: ids.iter().enumerate().map(token).collect(),
        }
    }

    /// The same with logits behind all of them.
    pub fn all_logits(sequence: usize, ids: &[u32]) -> Batch {
        Batch {
            tokens: ids
                .iter()
                .map(|&id| BatchToken {
                    id,
                    sequence,
                    logits: true,
                })
                .collect(),
        }
    }
}

/// Which logits are wanted where not all of them are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Top {
    /// The largest, so many; of equals those with the lowest tokens.
    pub k: usize,
    /// And those of these tokens, ascending.
    pub ids: Vec<u32>,
}

/// What a batch left, one row per token that wanted logits, in the batch's order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    logits: Vec<f32>,
    hidden: Vec<f32>,
    best: Vec<u32>,
    top: Vec<Vec<(u32, f32)>>,
    rows: usize,
}

impl Outputs {
    /// Rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// True if no token wanted logits.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Logits of the `i`-th row, `[vocab]`; empty after [`Context::decode_hidden`],
    /// [`Context::decode_best`] and, where [`Outputs::top`] has them, [`Context::decode_top`].
    pub fn logits(&self, i: usize) -> &[f32] {
        let vocab = self.logits.len() / self.rows;
        &self.logits[i * vocab..(i + 1) * vocab]
    }

    /// The likeliest token behind the `i`-th row, the lowest of equals: after
    /// [`Context::decode_best`], and only then.
    pub fn best(&self, i: usize) -> Option<u32> {
        self.best.get(i).copied()
    }

    /// The logits of the `i`-th row that [`Context::decode_top`] was asked for, ascending by
    /// token; `None` where it brought all of them.
    pub fn top(&self, i: usize) -> Option<&[(u32, f32)]> {
        self.top.get(i).map(Vec::as_slice)
    }

    /// The normalised last hidden state of the `i`-th row, `[embd]`.
    pub fn hidden(&self, i: usize) -> &[f32] {
        let embd = self.hidden.len() / self.rows;
        &self.hidden[i * embd..(i + 1) * embd]
    }
}

/// One sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequence {
    pub table: PageTable,
    pub tokens: Vec<u32>,
}

/// Sequences of one model with their memory.
pub struct Context {
    model: Arc<Model>,
    options: ContextOptions,
    pub(crate) cache: KvCache,
    pub(crate) sequences: Vec<Sequence>,
    buffers: Buffers,
    /// One per device in use.
    pub(crate) lanes: Vec<Lane>,
}

impl Context {
    /// Reserves the cache; its memory becomes resident as it fills.
    pub fn new(model: Arc<Model>, options: &ContextOptions) -> Result<Context> {
        let c = model.config();
        let mut options = *options;
        if options.context == 0 {
            options.context = c.context;
        }
        options.sequences = options.sequences.max(1);
        options.batch = options.batch.max(1);
        options.ubatch = options.ubatch.clamp(1, options.batch);
        let shape = KvShape {
            layers: c.layers,
            heads: c.kv_heads,
            dim: c.head_dim,
            k: options.k_type,
            v: options.v_type,
        };
        if options.room == 0 {
            options.room = options.sequences;
        }
        let pages = options.context.div_ceil(KV_PAGE) * options.room;
        let offload = &model.plan().offload;
        let here = |i: usize| offload.kv[i] == Device::Cpu;
        let cache = match options.sparsity {
            None => KvCache::with_layers(shape, pages, here)?,
            Some(_) if !(0..c.layers).all(here) => return Err(Error::SparseCacheElsewhere),
            Some(sparsity) => KvCache::pruned(shape, sparsity, pages, options.dense_pages())?,
        };
        let lanes = if offload.is_cpu_only() {
            Vec::new()
        } else {
            let lane = |(d, device): (usize, &Arc<_>)| {
                let tensor = offload.tensor.as_ref();
                let part = tensor.map_or_else(|| c.clone(), |t| t.config(c, d));
                Lane::new(
                    Arc::clone(device),
                    Arc::clone(&model.compute.profile),
                    &part,
                    &KvShape {
                        heads: part.kv_heads,
                        ..shape
                    },
                    pages,
                    options.ubatch,
                    |layer| offload.attends(layer, d),
                    offload.output == Device::Gpu(d),
                    offload.streams.slots[d],
                    offload.shares.filter(|s| s.device == d).map(|s| s.rows),
                )
            };
            let devices = model.devices.iter().enumerate();
            devices.map(lane).collect::<Result<_>>()?
        };
        let sequences = vec![Sequence::default(); options.sequences];
        Ok(Context {
            model,
            options,
            cache,
            sequences,
            buffers: Buffers::default(),
            lanes,
        })
    }

    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The options with all defaults filled in.
    pub fn options(&self) -> &ContextOptions {
        &self.options
    }

    /// Bytes that the cache takes when it is full.
    pub fn kv_bytes(&self) -> usize {
        let devices = self.lanes.iter().map(Lane::cache_bytes).sum::<usize>();
        self.cache.bytes() + devices
    }

    /// Bytes that a dense cache of as many pages would take.
    pub fn dense_kv_bytes(&self) -> usize {
        self.cache.shape().bytes(self.cache.pages())
    }

    /// Pages of the cache, and how many of them no sequence holds.
    pub fn pages(&self) -> (usize, usize) {
        (self.cache.pages(), self.cache.free_pages())
    }

    /// Free pages that appending `tokens` to the sequence would take.
    pub fn pages_needed(&self, sequence: usize, tokens: usize) -> Result<usize> {
        let table = &self.sequence(sequence)?.table;
        Ok(self.cache.pages_to_extend(table, tokens))
    }

    fn sequence(&self, sequence: usize) -> Result<&Sequence> {
        let sequences = self.sequences.len();
        self.sequences.get(sequence).ok_or(Error::Sequence {
            sequence,
            sequences,
        })
    }

    /// The tokens that a sequence holds.
    pub fn tokens(&self, sequence: usize) -> Result<&[u32]> {
        Ok(&self.sequence(sequence)?.tokens)
    }

    /// Forgets a sequence's tokens from position `len` on. A sparse cache has no dense values
    /// of finished pages: of the page that `len` is in all tokens go, if it was finished. What
    /// is left, [`Context::tokens`] says.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.sequence(sequence)?;
        let s = &mut self.sequences[sequence];
        self.cache.truncate(&mut s.table, len);
        s.tokens.truncate(s.table.len());
        Ok(())
    }

    /// Makes `to` a copy of the first `len` tokens of `from`, or of fewer where
    /// [`Context::truncate`] would leave fewer. Memory is shared until one of them writes.
    pub fn copy(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        self.sequence(to)?;
        let source = self.sequence(from)?;
        let mut tokens = source.tokens.clone();
        let table = self.cache.share(&self.sequences[from].table, len);
        tokens.truncate(table.len());
        self.truncate(to, 0)?;
        self.sequences[to] = Sequence { table, tokens };
        Ok(())
    }

    /// Appends the tokens to their sequences and runs them. A token's result depends on its
    /// sequence alone, not on what else is in the batch.
    ///
    /// On error no sequence has changed, but that a sparse cache may have lost tokens, as
    /// [`Context::truncate`] says.
    pub fn decode(&mut self, batch: &Batch) -> Result<Outputs> {
        self.run(batch, Want::Logits, None)
    }

    /// The same, but tokens that want logits get hidden states alone: [`Outputs::hidden`].
    pub fn decode_hidden(&mut self, batch: &Batch) -> Result<Outputs> {
        self.run(batch, Want::Hidden, None)
    }

    /// The same, but tokens that want logits get the likeliest token alone: [`Outputs::best`]. A
    /// device then sends one number instead of a row of logits.
    pub fn decode_best(&mut self, batch: &Batch) -> Result<Outputs> {
        self.run(batch, Want::Best, None)
    }

    /// The same, but of logits only some are wanted: [`Outputs::top`]. A device then finds them
    /// and sends no others; where that can't be done, because the output matrix is on the CPU or
    /// too many are asked for, there are all of them: [`Outputs::logits`].
    pub fn decode_top(&mut self, batch: &Batch, top: &Top) -> Result<Outputs> {
        let vocab = self.model.config().vocab;
        let rows = batch.tokens.iter().filter(|t| t.logits).count();
        let on_device = matches!(self.model.plan().offload.output, Device::Gpu(_));
        if !on_device || rows > TOP_ROWS || top.k.max(top.ids.len()) > MOST_LARGEST {
            return self.decode(batch);
        }
        let known = |id: &u32| (*id as usize) < vocab;
        let mut top = Top {
            k: top.k.min(vocab),
            ids: top.ids.iter().copied().filter(known).collect(),
        };
        top.ids.sort_unstable();
        top.ids.dedup();
        self.run(batch, Want::Logits, Some(&top))
    }

    fn run(&mut self, batch: &Batch, want: Want, top: Option<&Top>) -> Result<Outputs> {
        self.check(batch)?;
        let before: Vec<_> = self.sequences.iter().map(|s| s.tokens.len()).collect();
        let mut outputs = Outputs::default();
        for part in batch.tokens.chunks(self.options.ubatch) {
            if let Err(error) = self.step(part, want, top, &mut outputs) {
                for (s, len) in self.sequences.iter_mut().zip(before) {
                    self.cache.truncate(&mut s.table, len);
                    s.tokens.truncate(s.table.len());
                }
                return Err(error);
            }
        }
        Ok(outputs)
    }

    /// Everything that can be refused, before anything changes.
    fn check(&self, batch: &Batch) -> Result<()> {
        if batch.tokens.is_empty() {
            return Err(Error::Empty("batch"));
        }
        let vocab = self.model.config().vocab;
        let mut added = vec![0; self.sequences.len()];
        for token in &batch.tokens {
            self.sequence(token.sequence)?;
            if token.id as usize >= vocab {
                return Err(Error::Token {
                    id: token.id,
                    vocab,
                });
            }
            added[token.sequence] += 1;
        }
        let lengths = self.sequences.iter().map(|s| s.tokens.len());
        let lengths = lengths.zip(&added).map(|(held, added)| held + added);
        let needed = lengths.max().unwrap_or(0);
        if needed > self.options.context {
            return Err(Error::ContextFull {
                needed,
                context: self.options.context,
            });
        }
        let tables = self.sequences.iter().map(|s| &s.table);
        let pages = tables
            .zip(added)
            .map(|(t, n)| self.cache.pages_to_extend(t, n));
        if pages.sum::<usize>() > self.cache.free_pages() {
            return Err(KvError::Full {
                pages: self.cache.pages(),
            }
            .into());
        }
        Ok(())
    }

    /// One micro-batch.
    fn step(
        &mut self,
        part: &[BatchToken],
        want: Want,
        top: Option<&Top>,
        outputs: &mut Outputs,
    ) -> Result<()> {
        let model = Arc::clone(&self.model);
        let ids: Vec<_> = part.iter().map(|t| t.id).collect();
        outputs.rows += self.with_step(part, |mut step, lanes| {
            let rows = step.outputs.len();
            step.embed(&model.matrices.embedding, &ids);
            let offload = &model.plan().offload;
            let on = On {
                only: offload.only_device(),
                shared: offload.tensor.as_ref().map_or(Vec::new(), |t| t.all()),
            };
            let arch = model.config().arch;
            Graph::new(step, &model.matrices, lanes, on, want).finish(
                |layer, graph| models::layer(arch, layer, graph),
                Results {
                    hidden: &mut outputs.hidden,
                    logits: &mut outputs.logits,
                    best: &mut outputs.best,
                    top: top.map(|top| (top, &mut outputs.top)),
                },
            )?;
            Ok(rows)
        })?;
        Ok(())
    }

    /// Appends the tokens to their sequences and has them run.
    fn with_step<T>(
        &mut self,
        part: &[BatchToken],
        run: impl FnOnce(Step<'_>, &mut [Lane]) -> Result<T>,
    ) -> Result<T> {
        let mut tokens = Vec::with_capacity(part.len());
        for token in part {
            let s = &mut self.sequences[token.sequence];
            self.cache.extend(&mut s.table, 1)?;
            tokens.push(Token {
                sequence: token.sequence,
                position: s.tokens.len(),
            });
            s.tokens.push(token.id);
        }
        for (from, to) in self.cache.take_copies() {
            for lane in &self.lanes {
                lane.copy_page(from, to)?;
            }
        }
        let wanted: Vec<_> = (0..part.len()).filter(|&i| part[i].logits).collect();
        let tables: Vec<_> = self.sequences.iter().map(|s| &s.table).collect();
        let step = Step {
            compute: &self.model.compute,
            config: self.model.config(),
            cache: &mut self.cache,
            tables: &tables,
            tokens: &tokens,
            outputs: &wanted,
            buffers: &mut self.buffers,
            m: part.len(),
        };
        let result = run(step, &mut self.lanes)?;
        for s in &mut self.sequences {
            self.cache.settle(&mut s.table);
        }
        Ok(result)
    }

    /// Runs one layer: of each token of the batch `x`, `[tokens][embd]`, holds what goes into the
    /// layer, and then what comes out. The layer's keys and values go to the cache as
    /// [`Context::decode`] has them there; sequences grow, so [`Context::truncate`] them before the
    /// same tokens go through the next layer. What goes into the first one, [`Model::embed`] says.
    ///
    /// # Errors
    /// As [`Context::decode`], and for a model that is not wholly on the CPU.
    ///
    /// # Panics
    /// When the model has no such layer, `x` has another length, or a token does not want logits:
    /// the last layer would drop it.
    pub fn run_layer(&mut self, layer: usize, batch: &Batch, x: &mut [f32]) -> Result<()> {
        let model = Arc::clone(&self.model);
        let (embd, arch) = (model.config().embd, model.config().arch);
        assert!(layer < model.config().layers && x.len() == batch.tokens.len() * embd);
        assert!(batch.tokens.iter().all(|t| t.logits));
        if !model.plan().offload.is_cpu_only() {
            let what = "a layer by itself runs on the CPU alone".to_owned();
            return Err(Error::Placement(what));
        }
        self.check(batch)?;
        let parts = batch.tokens.chunks(self.options.ubatch);
        for (part, x) in parts.zip(x.chunks_mut(self.options.ubatch * embd)) {
            self.with_step(part, |mut step, lanes| {
                step.begin(x);
                let mut graph =
                    Graph::new(step, &model.matrices, lanes, On::default(), Want::Hidden);
                models::layer(arch, layer, &mut graph);
                graph.experts(layer);
                x.copy_from_slice(&graph.ended()?.buffers.x);
                Ok(())
            })?;
        }
        Ok(())
    }
}
