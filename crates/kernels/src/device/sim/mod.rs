//! A device without hardware: its own address space, poisoned memory and a byte budget, of which
//! networks take their hidden values' bytes while they run. It
//! executes operations with the CPU's kernels, so that placement, splits, copies and
//! out-of-memory run in ordinary tests.

mod pinned;
mod recordings;

use super::{
    ALIGN, Budget, Buffer, Device, DeviceError, DeviceInfo, DeviceRouting, Ended, HeadOptions,
    Heads, Matrix, Memory, Network, Places, Product, RawMatrix, Recording, Result, largest,
    largest_of, matrix_bytes, rounded, stream,
};
use crate::{
    Acts, Amx, Compute, PoolConfig, Tier, Weights,
    kv::{KV_PAGE, KvCache, KvShape, PageTable},
    ops::{
        self, Attended, RopeTable, Token,
        moe::{MoeScratch, RouteOptions, Routing},
    },
};
use pinned::Pinned;
use recordings::{Open, Operation};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tegula_gguf::Bytes;

/// What fresh memory holds: NaNs, as f32, and indices that are out of any range.
const POISON: u8 = 0xff;

/// Copies that a device has seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Copies {
    /// Copies to the device, weights apart, and their bytes.
    pub writes: usize,
    pub written: u64,
    /// Copies from the device and their bytes.
    pub reads: usize,
    pub read: u64,
    /// Bytes of weights brought to it to stay.
    pub weights: u64,
    /// Bytes of weights brought to pinned memory.
    pub pinned: u64,
    /// Products with an x that came along, and times that pinned results were read.
    pub sent: usize,
    pub collected: usize,
    /// Matrices that were streamed to it, and their bytes.
    pub streams: usize,
    pub streamed: u64,
    /// Times that the caller waited for it.
    pub waits: usize,
}

#[derive(Default)]
struct Heap {
    next: u64,
    blocks: HashMap<u64, Vec<u8>>,
    weights: HashMap<u64, Arc<Weights>>,
    pinned: Pinned,
    copies: Copies,
    /// Operations until one fails.
    fuse: Option<usize>,
    /// Recordings fail.
    recordings_fail: bool,
    seen: HashSet<Vec<u64>>,
    /// Nothing is recorded any more.
    eager: bool,
    open: Option<Open>,
    recordings: HashMap<Vec<u64>, Vec<Operation>>,
    replays: usize,
    notes: Vec<String>,
}

struct Shared {
    name: String,
    budget: Budget,
    heap: Mutex<Heap>,
}

impl Shared {
    fn heap(&self) -> MutexGuard<'_, Heap> {
        self.heap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory for Shared {
    fn free(&self, address: u64, bytes: usize) {
        let mut heap = self.heap();
        if !heap.pinned.give(address) {
            self.budget.give(bytes);
        }
        heap.blocks.remove(&address);
        // Matrices may be parts of it.
        let here = address..address + rounded(bytes).max(ALIGN);
        heap.weights.retain(|at, _| !here.contains(at));
    }
}

/// The simulated device.
pub struct SimDevice {
    shared: Arc<Shared>,
    compute: Compute,
}

impl SimDevice {
    /// A device of `budget` bytes that computes with the kernels of `tier`. Equal names get
    /// disjoint addresses all the same.
    pub fn new(name: &str, budget: u64, tier: Tier) -> SimDevice {
        SimDevice::with(name, budget, Compute::new(tier, PoolConfig::new(1)))
    }

    /// The same with AMX tiles, so that it rounds as a CPU does that uses them: no device has
    /// any, but results that differ from the CPU's by rounding alone must then be the CPU's.
    pub fn with_amx(name: &str, budget: u64, tier: Tier, amx: Amx) -> SimDevice {
        let compute = Compute::with_amx(tier, amx, PoolConfig::new(1));
        SimDevice::with(name, budget, compute)
    }

    fn with(name: &str, budget: u64, compute: Compute) -> SimDevice {
        use std::sync::atomic::{AtomicU64, Ordering};
        static SPACES: AtomicU64 = AtomicU64::new(1);
        // No address here is ever one of the host's: user space ends far below.
        let next = SPACES.fetch_add(1, Ordering::Relaxed) << 48 | 1 << 63;
        SimDevice {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                budget: Budget::new(name, budget),
                heap: Mutex::new(Heap {
                    next,
                    ..Heap::default()
                }),
            }),
            compute,
        }
    }

    /// Copies so far.
    pub fn copies(&self) -> Copies {
        self.shared.heap().copies
    }

    /// Recordings that were replayed so far.
    pub fn replays(&self) -> usize {
        self.shared.heap().replays
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.shared.budget.used()
    }

    /// Makes the operation behind the next `operations` fail, and all that follow, as when a
    /// device is lost.
    pub fn fail_after(&self, operations: usize) {
        self.shared.heap().fuse = Some(operations);
    }

    /// Makes recordings fail, as when something that can't be recorded is among the
    /// operations: those between [`Device::begin`] and [`Device::end`] leave nothing behind.
    pub fn fail_recordings(&self) {
        self.shared.heap().recordings_fail = true;
    }

    /// Undoes [`SimDevice::fail_after`].
    pub fn repair(&self) {
        self.shared.heap().fuse = None;
    }

    /// Counts an operation.
    fn step(&self, operation: &'static str) -> Result<()> {
        match &mut self.shared.heap().fuse {
            None => Ok(()),
            Some(0) => Err(DeviceError::Failed {
                device: self.shared.name.clone(),
                operation,
                cause: "the simulated device is lost".to_owned(),
            }),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    fn copy_out(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        self.not_recorded();
        self.step("copying from it")?;
        dst.copy_from_slice(&self.bytes(src)[at..at + dst.len()]);
        let copies = &mut self.shared.heap().copies;
        copies.reads += 1;
        copies.read += dst.len() as u64;
        Ok(())
    }

    fn bytes(&self, buffer: &Buffer) -> Vec<u8> {
        let heap = self.shared.heap();
        let block = heap.blocks.get(&buffer.address());
        block.expect("a buffer of this device").clone()
    }

    fn floats(&self, buffer: &Buffer, len: usize) -> Vec<f32> {
        let bytes = self.bytes(buffer);
        let value = |b: &[u8; 4]| f32::from_le_bytes(*b);
        bytes[..4 * len].as_chunks().0.iter().map(value).collect()
    }

    fn words(&self, buffer: &Buffer, len: usize) -> Vec<u32> {
        let bytes = self.bytes(buffer);
        let value = |b: &[u8; 4]| u32::from_le_bytes(*b);
        bytes[..4 * len].as_chunks().0.iter().map(value).collect()
    }

    fn put(&self, buffer: &Buffer, values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.put_bytes(buffer, 0, &bytes);
    }

    fn put_bytes(&self, buffer: &Buffer, at: usize, bytes: &[u8]) {
        let mut heap = self.shared.heap();
        let block = heap.blocks.get_mut(&buffer.address());
        let block = block.expect("a buffer of this device");
        block[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn weights(&self, matrix: &Matrix) -> Arc<Weights> {
        let heap = self.shared.heap();
        let weights = heap.weights.get(&matrix.buffer.address());
        Arc::clone(weights.expect("a matrix of this device"))
    }

    fn rows(&self, w: &Weights, x: &[f32], m: usize) -> Vec<f32> {
        let mut acts = Acts::new();
        let forms = self.compute.forms(m, [w]);
        self.compute.prepare(&mut acts, x, m, w.k(), forms);
        let mut out = vec![0.0; m * w.n()];
        self.compute.matmul(w, &acts, &mut out);
        out
    }

    /// What is to be in a product's place.
    fn multiplied(&self, p: &Product<'_>, x: &[f32], m: usize) -> Vec<f32> {
        let mut y = self.rows(&self.weights(p.w), x, m);
        if let Some(bias) = p.bias {
            self.compute.add_bias(&mut y, &self.floats(bias, p.w.n));
        }
        if p.add {
            let mut sum = self.floats(p.out, y.len());
            self.compute.add_assign(&mut sum, &y);
            y = sum;
        }
        y
    }

    /// The cache of one layer and the sequences, as the CPU's operations take them.
    fn cache(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
    ) -> (KvCache, Vec<PageTable>, Vec<Token>) {
        let one = KvShape {
            layers: 1,
            ..*shape
        };
        let kv = KvCache::of_layer(one, &self.bytes(cache));
        let tokens = self.words(&places.tokens, 2 * places.m);
        let pages = self.words(&places.pages, places.pages.bytes() / 4);
        // Each token as a sequence of its own, up to its own position.
        let one = |(i, t): (usize, &[u32; 2])| {
            let (start, position) = (t[0] as usize, t[1] as usize);
            let count = position / KV_PAGE + 1;
            let token = Token {
                sequence: i,
                position,
            };
            let table = PageTable::of_pages(pages[start..start + count].to_vec(), position + 1);
            (table, token)
        };
        let (tables, tokens) = tokens.as_chunks().0.iter().enumerate().map(one).unzip();
        (kv, tables, tokens)
    }
}

impl Device for SimDevice {
    fn info(&self) -> Result<DeviceInfo> {
        Ok(DeviceInfo {
            name: self.shared.name.clone(),
            description: format!("simulated, {}", self.compute.table.tier),
            total: self.shared.budget.total(),
            free: self.shared.budget.free(),
        })
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.shared.budget.take(bytes)?;
        let mut heap = self.shared.heap();
        let address = heap.next;
        heap.next += rounded(bytes).max(ALIGN);
        heap.blocks.insert(address, vec![POISON; bytes]);
        let memory: Arc<dyn Memory> = Arc::clone(&self.shared) as _;
        Ok(Buffer::new(address, bytes, memory))
    }

    fn zero(&self, dst: &Buffer) -> Result<()> {
        self.record_on([dst], |d, [dst]| d.zero(dst));
        self.step("clearing")?;
        self.put_bytes(dst, 0, &vec![0; dst.bytes()]);
        Ok(())
    }

    fn write(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        self.not_recorded();
        self.step("copying to it")?;
        self.put_bytes(dst, at, src);
        let copies = &mut self.shared.heap().copies;
        copies.writes += 1;
        copies.written += src.len() as u64;
        Ok(())
    }

    fn read(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        self.shared.heap().copies.waits += 1;
        self.copy_out(src, at, dst)
    }

    fn read_all(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        self.shared.heap().copies.waits += 1;
        let mut parts = parts.iter_mut();
        parts.try_for_each(|(src, dst)| self.copy_out(src, 0, dst))
    }

    fn sync(&self) -> Result<()> {
        self.shared.heap().copies.waits += 1;
        self.not_recorded();
        self.step("waiting")
    }

    fn pin(&self, bytes: usize) -> Result<Buffer> {
        self.alloc_pinned(bytes)
    }

    fn load_to(&self, matrix: &RawMatrix, buffer: Buffer) -> Result<Matrix> {
        self.not_recorded();
        self.step("loading weights")?;
        let RawMatrix {
            ty, n, k, experts, ..
        } = *matrix;
        assert!(matrix.device_bytes() <= buffer.bytes());
        let copy = Bytes::from_vec(matrix.bytes().to_vec());
        let weights = Weights::raw(ty, n, k, experts, copy)?;
        let mut heap = self.shared.heap();
        match buffer.is_pinned() {
            true => heap.copies.pinned += matrix.bytes().len() as u64,
            false => heap.copies.weights += matrix.bytes().len() as u64,
        }
        heap.weights.insert(buffer.address(), Arc::new(weights));
        Ok(Matrix {
            ty,
            n,
            k,
            experts,
            buffer,
        })
    }

    fn stream(
        &self,
        from: &RawMatrix,
        chosen: Option<&[u32]>,
        feeder: &mut dyn stream::Feeder,
        slot: &mut Matrix,
    ) -> Result<()> {
        self.not_recorded();
        self.step("streaming weights")?;
        let RawMatrix { ty, n, k, .. } = *from;
        let experts = chosen.map_or(from.experts, <[u32]>::len);
        let bytes = matrix_bytes(ty, n as u64, k as u64, experts as u64);
        assert!(bytes.is_some_and(|bytes| bytes <= slot.buffer.bytes() as u64));
        let mut copy = Vec::new();
        // Small pieces, so that small matrices are more than one.
        for piece in stream::pieces(from, chosen, 64 << 10) {
            let mut staged = vec![POISON; piece.len];
            feeder.fill(&mut staged, &piece.parts);
            assert_eq!(copy.len(), piece.first_block as usize * ty.block_bytes());
            copy.extend_from_slice(&staged);
            feeder.meanwhile();
        }
        (slot.ty, slot.n, slot.k, slot.experts) = (ty, n, k, experts);
        let mut heap = self.shared.heap();
        heap.copies.streams += 1;
        heap.copies.streamed += copy.len() as u64;
        let weights = Weights::raw(ty, n, k, experts, Bytes::from_vec(copy))?;
        heap.weights
            .insert(slot.buffer.address(), Arc::new(weights));
        Ok(())
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        w: &Buffer,
        eps: f32,
        m: usize,
        k: usize,
        out: &Buffer,
    ) -> Result<()> {
        self.record_on([x, w, out], move |d, [x, w, out]| {
            d.rms_norm(x, w, eps, m, k, out)
        });
        self.step("rms_norm")?;
        let (x, w) = (self.floats(x, m * k), self.floats(w, k));
        let mut y = vec![0.0; m * k];
        self.compute.rms_norm(&x, &w, eps, &mut y);
        self.put(out, &y);
        Ok(())
    }

    fn matmul(&self, products: &[Product<'_>], x: &Buffer, m: usize) -> Result<()> {
        self.record_products(products, x, m);
        self.step("matmul")?;
        for p in products {
            let y = self.multiplied(p, &self.floats(x, m * p.w.k), m);
            self.put(p.out, &y);
        }
        Ok(())
    }

    fn matmul_from(&self, products: &[Product<'_>], x: &[u8], m: usize) -> Result<()> {
        self.multiply_from(products, x, m)
    }

    fn collect(&self, parts: &mut [(&Buffer, &mut [u8])]) -> Result<()> {
        self.collect_pinned(parts)
    }

    fn heads(&self, both: [Heads<'_>; 2], o: &HeadOptions, places: &Places) -> Result<()> {
        self.record_heads(&both, o, places);
        self.step("heads")?;
        let len = places.m * places.pairs;
        let (cos, sin) = (self.floats(&places.cos, len), self.floats(&places.sin, len));
        let table = RopeTable::from_rows(cos, sin, places.pairs);
        let mut rows = both
            .each_ref()
            .map(|h| self.floats(h.x, places.m * h.heads * o.dim));
        let norms = both
            .each_ref()
            .map(|h| h.norm.map(|w| self.floats(w, o.dim)));
        let [q, k] = &mut rows;
        let of = |x, i: usize| ops::Heads {
            x,
            heads: both[i].heads,
            norm: norms[i].as_deref(),
        };
        self.compute
            .heads([of(q, 0), of(k, 1)], o.dim, o.eps, o.style, &table);
        both.iter()
            .zip(&rows)
            .for_each(|(to, rows)| self.put(to.x, rows));
        Ok(())
    }

    fn kv_store(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        self.record_placed(
            [cache, k, v],
            shape,
            places,
            |d, [cache, k, v], shape, at| d.kv_store(cache, shape, at, k, v),
        );
        self.step("kv_store")?;
        let (mut kv, tables, tokens) = self.cache(cache, shape, places);
        let len = places.m * shape.heads * shape.dim;
        let (k, v) = (self.floats(k, len), self.floats(v, len));
        let tables: Vec<_> = tables.iter().collect();
        self.compute.kv_store(&mut kv, 0, &tables, &tokens, &k, &v);
        self.put_bytes(cache, 0, kv.layer_bytes(0));
        Ok(())
    }

    fn kv_copy(&self, cache: &Buffer, shape: &KvShape, from: u32, to: u32) -> Result<()> {
        let of = *shape;
        self.record_on([cache], move |d, [cache]| d.kv_copy(cache, &of, from, to));
        self.step("kv_copy")?;
        let page = shape.layer_page_bytes();
        let bytes = self.bytes(cache);
        let page_bytes = &bytes[from as usize * page..][..page];
        self.put_bytes(cache, to as usize * page, page_bytes);
        Ok(())
    }

    fn attention(
        &self,
        cache: &Buffer,
        shape: &KvShape,
        places: &Places,
        q: &Buffer,
        heads: usize,
        out: &Buffer,
    ) -> Result<()> {
        self.record_placed(
            [cache, q, out],
            shape,
            places,
            move |d, [cache, q, out], s, at| d.attention(cache, s, at, q, heads, out),
        );
        self.step("attention")?;
        let (kv, tables, tokens) = self.cache(cache, shape, places);
        let q = self.floats(q, places.m * heads * shape.dim);
        let tables: Vec<_> = tables.iter().collect();
        let scale = 1.0 / (shape.dim as f32).sqrt();
        let mut y = vec![0.0; q.len()];
        self.compute.attention(
            &kv,
            0,
            &tables,
            &tokens,
            &q,
            heads,
            scale,
            Attended::Rows(&mut y),
        );
        self.put(out, &y);
        Ok(())
    }

    fn ffn(&self, network: &Network<'_>, input: &Buffer, m: usize, x: &Buffer) -> Result<()> {
        self.record_network(network, input, None, m, x);
        self.step("ffn")?;
        let _hidden = self.alloc(4 * m * network.gate.n)?;
        let [gate, up, down] = [network.gate, network.up, network.down].map(|w| self.weights(w));
        let (mut acts, mut hidden) = (Acts::new(), Acts::new());
        let forms = self.compute.forms(m, [&*gate, &*up]);
        let input = self.floats(input, m * gate.k());
        self.compute.prepare(&mut acts, &input, m, gate.k(), forms);
        self.compute.gate_up(&acts, &gate, &up, &down, &mut hidden);
        let mut y = self.floats(x, m * down.n());
        self.compute.matmul_add(&down, &hidden, &mut y);
        self.put(x, &y);
        Ok(())
    }

    fn route(
        &self,
        logits: &Buffer,
        m: usize,
        experts: usize,
        options: &RouteOptions,
        routing: &DeviceRouting,
    ) -> Result<()> {
        self.record_route(logits, m, experts, options, routing);
        self.step("route")?;
        let logits = self.floats(logits, m * experts);
        let chosen = self.compute.route(&logits, experts, options);
        let ids: Vec<u8> = chosen.ids.iter().flat_map(|i| i.to_le_bytes()).collect();
        self.put_bytes(&routing.ids, 0, &ids);
        self.put(&routing.weights, &chosen.weights);
        Ok(())
    }

    fn experts(
        &self,
        network: &Network<'_>,
        input: &Buffer,
        routing: &DeviceRouting,
        m: usize,
        x: &Buffer,
    ) -> Result<()> {
        self.record_network(network, input, Some(routing), m, x);
        self.step("experts")?;
        let _hidden = self.alloc(4 * m * routing.used * network.gate.n)?;
        let [gate, up, down] = [network.gate, network.up, network.down].map(|w| self.weights(w));
        let routing = Routing {
            used: routing.used,
            ids: self.words(&routing.ids, m * routing.used),
            weights: self.floats(&routing.weights, m * routing.used),
        };
        let input = self.floats(input, m * gate.k());
        let mut y = self.floats(x, m * down.n());
        let scratch = &mut MoeScratch::default();
        self.compute
            .moe_ffn(&input, &routing, &gate, &up, &down, scratch, &mut y);
        self.put(x, &y);
        Ok(())
    }

    fn add(&self, dst: &Buffer, x: &Buffer, len: usize) -> Result<()> {
        self.record_on([dst, x], move |d, [dst, x]| d.add(dst, x, len));
        self.step("add")?;
        let mut sum = self.floats(dst, len);
        self.compute.add_assign(&mut sum, &self.floats(x, len));
        self.put(dst, &sum);
        Ok(())
    }

    fn gather(
        &self,
        x: &Buffer,
        rows: &Buffer,
        count: usize,
        k: usize,
        out: &Buffer,
    ) -> Result<()> {
        self.record_on([x, rows, out], move |d, [x, rows, out]| {
            d.gather(x, rows, count, k, out)
        });
        self.step("gather")?;
        let rows = self.words(rows, count);
        let x = self.floats(x, x.bytes() / 4);
        let row = |&r: &u32| &x[r as usize * k..(r as usize + 1) * k];
        let y: Vec<f32> = rows.iter().flat_map(row).copied().collect();
        self.put(out, &y);
        Ok(())
    }

    fn argmax(&self, x: &Buffer, m: usize, n: usize, out: &Buffer) -> Result<()> {
        self.record_on([x, out], move |d, [x, out]| d.argmax(x, m, n, out));
        self.step("argmax")?;
        let x = self.floats(x, m * n);
        let best = x.chunks(n).flat_map(|row| largest(row).to_le_bytes());
        self.put_bytes(out, 0, &best.collect::<Vec<u8>>());
        Ok(())
    }

    fn top_k(
        &self,
        x: &Buffer,
        m: usize,
        n: usize,
        k: usize,
        ids: &Buffer,
        values: &Buffer,
    ) -> Result<()> {
        self.record_on([x, ids, values], move |d, [x, ids, values]| {
            d.top_k(x, m, n, k, ids, values)
        });
        self.step("top_k")?;
        let x = self.floats(x, m * n);
        let best: Vec<(u32, f32)> = x.chunks(n).flat_map(|row| largest_of(row, k)).collect();
        let numbers = best.iter().flat_map(|b| b.0.to_le_bytes());
        self.put_bytes(ids, 0, &numbers.collect::<Vec<u8>>());
        self.put(values, &best.iter().map(|b| b.1).collect::<Vec<_>>());
        Ok(())
    }

    fn pick(
        &self,
        x: &Buffer,
        m: usize,
        n: usize,
        ids: &Buffer,
        count: usize,
        out: &Buffer,
    ) -> Result<()> {
        self.record_on([x, ids, out], move |d, [x, ids, out]| {
            d.pick(x, m, n, ids, count, out)
        });
        self.step("pick")?;
        let (x, ids) = (self.floats(x, m * n), self.words(ids, count));
        let row = |row: &[f32]| ids.iter().map(|&i| row[i as usize]).collect::<Vec<_>>();
        self.put(out, &x.chunks(n).flat_map(row).collect::<Vec<_>>());
        Ok(())
    }

    fn begin(&self, key: &[u64]) -> Result<Recording> {
        let mut heap = self.shared.heap();
        heap.open = None;
        if let Some(operations) = heap.recordings.get(key).cloned() {
            heap.replays += 1;
            drop(heap);
            operations.iter().try_for_each(|again| again(self))?;
            return Ok(Recording::Replayed);
        }
        if !heap.seen.insert(key.to_vec()) && !heap.eager {
            heap.open = Some(Open {
                key: key.to_vec(),
                operations: Vec::new(),
                before: heap.blocks.clone(),
                broken: heap.recordings_fail,
            });
        }
        Ok(Recording::Issue)
    }

    fn end(&self) -> Result<Ended> {
        let mut heap = self.shared.heap();
        let Some(open) = heap.open.take() else {
            return Ok(Ended::Done);
        };
        if !open.broken {
            heap.recordings.insert(open.key, open.operations);
            return Ok(Ended::Done);
        }
        heap.blocks = open.before;
        heap.eager = true;
        let note = format!(
            "{}: recordings fail; operations are issued one by one",
            self.shared.name
        );
        heap.notes.push(note);
        Ok(Ended::Again)
    }

    fn forget(&self) {
        let mut heap = self.shared.heap();
        heap.recordings.clear();
        heap.seen.clear();
    }

    fn notes(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.heap().notes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_poisoned_budgeted_and_its_own() {
        let device = SimDevice::new("SIM0", 1024, Tier::Scalar);
        let other = SimDevice::new("SIM1", 1024, Tier::Scalar);
        let a = device.alloc(600).unwrap();
        let b = other.alloc(600).unwrap();
        assert_ne!(a.address(), b.address());
        assert!(device.floats(&a, 150).iter().all(|v| v.is_nan()));
        let error = device.alloc(300).unwrap_err();
        assert!(matches!(
            error,
            DeviceError::OutOfMemory {
                needed: 512,
                free: 256,
                total: 1024,
                ..
            }
        ));
        drop(a);
        assert_eq!(device.used(), 0);
        assert!(device.alloc(1024).is_ok());
    }

    #[test]
    fn copies_are_counted_and_a_lost_device_says_so() {
        let device = SimDevice::new("SIM0", 1024, Tier::Scalar);
        let a = device.alloc(8).unwrap();
        device.write(&a, 0, &[1; 8]).unwrap();
        let mut back = [0; 4];
        device.read(&a, 4, &mut back).unwrap();
        assert_eq!(back, [1; 4]);
        let Copies {
            writes,
            written,
            reads,
            read,
            ..
        } = device.copies();
        assert_eq!((writes, written, reads, read), (1, 8, 1, 4));
        device.fail_after(1);
        assert!(device.sync().is_ok());
        let error = device.sync().unwrap_err();
        assert_eq!(
            error.to_string(),
            "SIM0: waiting failed: the simulated device is lost"
        );
    }
}
