//! The KV cache: pages of 64 positions, reference-counted, in layouts that attention reads
//! as a stream.
//!
//! A sequence is a list of pages ([`PageTable`]); sequences with a common prefix share its
//! pages until one of them writes (copy on write). Per page, layer and KV head:
//!
//! | type | K | V |
//! |---|---|---|
//! | F16 | `[dim][64]` | `[64][dim]` |
//! | BF16 | `[dim/2][64][2]` | `[32][dim][2]` |
//! | Q8_0 | codes `[dim][64]`, f32 scales `[dim/32][64]` | codes `[64][dim]`, scales `[64][dim/32]` |
//!
//! K is transposed so that the scores of 64 positions are vertical sums; the bf16 pairs are
//! what bf16 dot products (`vdpbf16ps`, AMX) take.
//!
//! A cache may [prune](KvCache::pruned) its pages: a full one is packed without its smallest
//! values, see [`pruned`], and its dense memory is free again. A position attends to its own
//! page as it is and to those before it as they were packed, whatever else is in a batch.

pub mod pruned;
pub(crate) mod write;

use crate::mem::AlignedBuf;
use pruned::{Halves, KvSparsity};
use write::LayerMut;

/// Positions per page.
pub const KV_PAGE: usize = 64;

/// Element type of K or V in the cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KvType {
    F16,
    BF16,
    /// 8-bit codes, one scale per 32 along the head dimension.
    Q8_0,
}

impl KvType {
    /// Every type.
    pub const ALL: [KvType; 3] = [KvType::F16, KvType::BF16, KvType::Q8_0];

    /// As `-ctk` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::BF16 => "bf16",
            KvType::Q8_0 => "q8_0",
        }
    }

    /// The type that users know by `name`.
    pub fn parse(name: &str) -> Option<KvType> {
        KvType::ALL
            .into_iter()
            .find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// Bytes of a page of one head.
    pub const fn page_bytes(self, dim: usize) -> usize {
        match self {
            KvType::F16 | KvType::BF16 => dim * KV_PAGE * 2,
            KvType::Q8_0 => dim * KV_PAGE + dim / 32 * KV_PAGE * 4,
        }
    }
}

/// Geometry of a cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvShape {
    pub layers: usize,
    /// KV heads.
    pub heads: usize,
    /// Head dimension: even, and a multiple of 32 where a type is Q8_0.
    pub dim: usize,
    pub k: KvType,
    pub v: KvType,
}

impl KvShape {
    /// Bytes of one head's K and V in one page of one layer, whole cache lines.
    fn head_bytes(&self) -> usize {
        (self.k.page_bytes(self.dim) + self.v.page_bytes(self.dim)).next_multiple_of(64)
    }

    /// Bytes of one page in one layer.
    pub fn layer_page_bytes(&self) -> usize {
        self.head_bytes() * self.heads
    }

    /// Bytes of a cache of `pages` pages.
    pub fn bytes(&self, pages: usize) -> usize {
        self.layer_page_bytes() * self.layers * pages
    }

    /// The same of pages that are pruned.
    ///
    /// # Errors
    /// For types that can't be pruned.
    pub fn pruned_bytes(&self, sparsity: KvSparsity, pages: usize) -> Result<usize, KvError> {
        let head = Halves::new(self, sparsity)?.head_bytes();
        Ok(head * self.heads * self.layers * pages)
    }
}

/// Why a cache can't be made or can't take more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    #[error("the KV cache is full: {pages} pages of {KV_PAGE} positions are in use")]
    Full { pages: usize },
    #[error("head dimension {dim} does not suit a {ty} KV cache: {needs}")]
    Dimension {
        dim: usize,
        ty: &'static str,
        needs: &'static str,
    },
    #[error("a {ty} KV cache can't be pruned: use f16 or bf16")]
    Pruned { ty: &'static str },
    #[error("saved KV state is damaged: the bitmaps of a page count other values than it has")]
    Damaged,
    #[error("saved KV state has {got} bytes where {want} were expected")]
    StateSize { got: usize, want: usize },
}

/// One sequence: its pages in order and how many positions are filled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageTable {
    pages: Vec<u32>,
    /// In a cache that prunes, where each page is packed, or will be.
    packed: Vec<u32>,
    len: usize,
}

/// In [`PageTable::pages`]: the page is packed, and its dense memory somebody else's.
const GONE: u32 = u32::MAX;

impl PageTable {
    /// Positions filled or reserved.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without positions.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The page of `position`.
    pub fn page(&self, position: usize) -> u32 {
        self.pages[position / KV_PAGE]
    }

    /// The pages in order.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// A table of given pages.
    pub(crate) fn of_pages(pages: Vec<u32>, len: usize) -> PageTable {
        PageTable {
            pages,
            packed: Vec::new(),
            len,
        }
    }

    /// Where page `i` is packed, or will be, in a cache that prunes.
    pub(crate) fn packed(&self, i: usize) -> u32 {
        self.packed[i]
    }

    /// How many of the first `len` positions can be kept: the dense values of finished pages
    /// are gone, so these are kept whole or not at all.
    fn keepable(&self, len: usize) -> usize {
        let gone = self.pages.get(len / KV_PAGE) == Some(&GONE);
        if gone { len / KV_PAGE * KV_PAGE } else { len }
    }
}

/// The packed pages of a cache.
struct Packed {
    sparsity: KvSparsity,
    halves: Halves,
    /// Per layer `[page][head][K | V]`.
    layers: Vec<AlignedBuf>,
    references: Vec<u32>,
    free: Vec<u32>,
}

/// Pages of K and V for all layers.
pub struct KvCache {
    shape: KvShape,
    /// Per layer `[page][head][K | V]`.
    layers: Vec<AlignedBuf>,
    references: Vec<u32>,
    free: Vec<u32>,
    /// Pages copied since [`KvCache::take_copies`], for layers that lie elsewhere.
    copies: Vec<(u32, u32)>,
    packed: Option<Packed>,
}

impl KvCache {
    /// A cache of `pages` pages. The memory is reserved and becomes resident as it is used.
    pub fn new(shape: KvShape, pages: usize) -> Result<KvCache, KvError> {
        KvCache::with_layers(shape, pages, |_| true)
    }

    /// The same with memory for those layers only that `here` names: the others lie on a
    /// device, and this cache keeps the books for them.
    pub fn with_layers(
        shape: KvShape,
        pages: usize,
        here: impl Fn(usize) -> bool,
    ) -> Result<KvCache, KvError> {
        for ty in [shape.k, shape.v] {
            let (unit, needs) = match ty {
                KvType::Q8_0 => (32, "it must be a multiple of 32"),
                _ => (2, "it must be even"),
            };
            if !shape.dim.is_multiple_of(unit) || shape.dim == 0 {
                return Err(KvError::Dimension {
                    dim: shape.dim,
                    ty: ty.name(),
                    needs,
                });
            }
        }
        let bytes = shape.layer_page_bytes() * pages;
        Ok(KvCache {
            shape,
            layers: (0..shape.layers)
                .map(|layer| AlignedBuf::zeroed(if here(layer) { bytes } else { 0 }))
                .collect(),
            references: vec![0; pages],
            free: (0..pages as u32).rev().collect(),
            copies: Vec::new(),
            packed: None,
        })
    }

    /// A cache of `pages` pages that are packed without their smallest values when they are
    /// full, and of `dense` others for those that are not: one for every sequence, and those
    /// that positions of one step are written to.
    ///
    /// # Errors
    /// As [`KvCache::new`], and for types that can't be pruned.
    pub fn pruned(
        shape: KvShape,
        sparsity: KvSparsity,
        pages: usize,
        dense: usize,
    ) -> Result<KvCache, KvError> {
        let halves = Halves::new(&shape, sparsity)?;
        let mut cache = KvCache::new(shape, dense)?;
        let bytes = halves.head_bytes() * shape.heads * pages;
        cache.packed = Some(Packed {
            sparsity,
            halves,
            layers: (0..shape.layers)
                .map(|_| AlignedBuf::zeroed(bytes))
                .collect(),
            references: vec![0; pages],
            free: (0..pages as u32).rev().collect(),
        });
        Ok(cache)
    }

    /// What finished pages lose, if they do.
    pub fn sparsity(&self) -> Option<KvSparsity> {
        self.packed.as_ref().map(|p| p.sparsity)
    }

    /// The geometry of packed pages, if there are any.
    pub(crate) fn halves(&self) -> Option<&Halves> {
        self.packed.as_ref().map(|p| &p.halves)
    }

    /// A cache whose only layer holds the given bytes.
    pub(crate) fn of_layer(shape: KvShape, bytes: &[u8]) -> KvCache {
        let pages = bytes.len() / shape.layer_page_bytes();
        let mut layer = AlignedBuf::zeroed(bytes.len());
        layer.copy_from_slice(bytes);
        KvCache {
            shape,
            layers: vec![layer],
            references: vec![1; pages],
            free: Vec::new(),
            copies: Vec::new(),
            packed: None,
        }
    }

    pub(crate) fn layer_bytes(&self, layer: usize) -> &[u8] {
        &self.layers[layer]
    }

    /// Pages copied, `(from, to)`, since the last call, because a sequence wrote to a page
    /// that it shared: layers that lie on devices must be copied likewise.
    pub fn take_copies(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.copies)
    }

    /// The geometry.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// All pages, free or not.
    pub fn pages(&self) -> usize {
        let packed = self.packed.as_ref().map(|p| p.references.len());
        packed.unwrap_or(self.references.len())
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        let packed = self.packed.as_ref().map(|p| p.free.len());
        packed.unwrap_or(self.free.len())
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().map(AlignedBuf::len);
        let packed = self.packed.iter().flat_map(|p| &p.layers);
        layers.sum::<usize>() + packed.map(AlignedBuf::len).sum::<usize>()
    }

    fn take_page(&mut self) -> Result<u32, KvError> {
        let page = self.free.pop().ok_or(KvError::Full {
            pages: self.pages(),
        })?;
        self.references[page as usize] = 1;
        Ok(page)
    }

    /// Takes a page, and where it will be packed.
    fn take_both(&mut self) -> Result<(u32, Option<u32>), KvError> {
        let full = KvError::Full {
            pages: self.pages(),
        };
        let packed = match &mut self.packed {
            Some(p) => {
                let page = p.free.pop().ok_or(full)?;
                p.references[page as usize] = 1;
                Some(page)
            }
            None => None,
        };
        Ok((self.take_page()?, packed))
    }

    fn drop_packed(&mut self, page: u32) {
        if let Some(p) = &mut self.packed {
            let count = &mut p.references[page as usize];
            *count -= 1;
            if *count == 0 {
                p.free.push(page);
            }
        }
    }

    fn drop_page(&mut self, page: u32) {
        if page == GONE {
            return;
        }
        let count = &mut self.references[page as usize];
        *count -= 1;
        if *count == 0 {
            self.free.push(page);
        }
    }

    /// Pages that [`KvCache::extend`] would take from the free ones.
    pub fn pages_to_extend(&self, table: &PageTable, tokens: usize) -> usize {
        if tokens == 0 {
            return 0;
        }
        let needed = (table.len + tokens).div_ceil(KV_PAGE) - table.pages.len();
        needed + usize::from(self.last_is_shared(table))
    }

    /// Whether the next position falls in a page that other sequences hold too.
    fn last_is_shared(&self, table: &PageTable) -> bool {
        let partial = !table.len.is_multiple_of(KV_PAGE);
        // A page that is not full is dense.
        partial && self.references[table.page(table.len) as usize] > 1
    }

    /// Makes room for `tokens` more positions and counts them as filled. On error nothing
    /// changes.
    pub fn extend(&mut self, table: &mut PageTable, tokens: usize) -> Result<(), KvError> {
        if tokens == 0 {
            return Ok(());
        }
        let needed = (table.len + tokens).div_ceil(KV_PAGE) - table.pages.len();
        let shared = self.last_is_shared(table);
        let wanted = needed + usize::from(shared);
        if wanted > self.free.len().min(self.free_pages()) {
            return Err(KvError::Full {
                pages: self.pages(),
            });
        }
        if shared {
            let (from, i) = (table.page(table.len), table.len / KV_PAGE);
            let (to, packed) = self.take_both()?;
            self.copy_page(from, to);
            self.drop_page(from);
            table.pages[i] = to;
            if let Some(packed) = packed {
                self.drop_packed(table.packed[i]);
                table.packed[i] = packed;
            }
        }
        for _ in 0..needed {
            let (page, packed) = self.take_both()?;
            table.pages.push(page);
            table.packed.extend(packed);
        }
        table.len += tokens;
        Ok(())
    }

    /// Gives the dense memory of finished pages back, behind a step that has packed them in
    /// all layers. Does nothing in a cache that doesn't prune.
    pub fn settle(&mut self, table: &mut PageTable) {
        if self.packed.is_none() {
            return;
        }
        let finished = &mut table.pages[..table.len / KV_PAGE];
        for page in finished.iter_mut().rev().take_while(|page| **page != GONE) {
            self.drop_page(std::mem::replace(page, GONE));
        }
    }

    /// Forgets all positions from `len` on; of a page that was packed, all positions.
    /// [`PageTable::len`] then says what is left.
    pub fn truncate(&mut self, table: &mut PageTable, len: usize) {
        if len >= table.len {
            return;
        }
        let len = table.keepable(len);
        let keep = len.div_ceil(KV_PAGE);
        while table.pages.len() > keep {
            if let Some(page) = table.pages.pop() {
                self.drop_page(page);
            }
            if let Some(page) = table.packed.pop() {
                self.drop_packed(page);
            }
        }
        table.len = len;
    }

    /// A second sequence with the first `len` positions of this one, sharing its pages; with
    /// fewer where `len` is inside of a page that was packed.
    pub fn share(&mut self, table: &PageTable, len: usize) -> PageTable {
        let len = table.keepable(len.min(table.len));
        let pages = table.pages[..len.div_ceil(KV_PAGE)].to_vec();
        for &page in pages.iter().filter(|page| **page != GONE) {
            self.references[page as usize] += 1;
        }
        let packed = match &mut self.packed {
            Some(p) => {
                let packed = table.packed[..pages.len()].to_vec();
                for &page in &packed {
                    p.references[page as usize] += 1;
                }
                packed
            }
            None => Vec::new(),
        };
        PageTable { pages, packed, len }
    }

    fn copy_page(&mut self, from: u32, to: u32) {
        let bytes = self.shape.layer_page_bytes();
        self.copies.push((from, to));
        for layer in self.layers.iter_mut().filter(|layer| !layer.is_empty()) {
            layer.copy_within(
                from as usize * bytes..(from as usize + 1) * bytes,
                to as usize * bytes,
            );
        }
    }

    /// K and V of a head in a page.
    pub(crate) fn head(&self, layer: usize, page: u32, head: usize) -> (&[u8], &[u8]) {
        let at = page as usize * self.shape.layer_page_bytes() + head * self.shape.head_bytes();
        let bytes = &self.layers[layer][at..at + self.shape.head_bytes()];
        bytes.split_at(self.shape.k.page_bytes(self.shape.dim))
    }

    /// K and V of a head in a packed page.
    pub(crate) fn packed_head(&self, layer: usize, page: u32, head: usize) -> (&[u8], &[u8]) {
        let Some(p) = &self.packed else {
            return (&[], &[]);
        };
        let bytes = p.halves.head_bytes();
        let at = (page as usize * self.shape.heads + head) * bytes;
        p.halves.split(&p.layers[layer][at..at + bytes])
    }

    /// Dense pages of a layer for reading, and its packed ones for writing.
    pub(crate) fn packing(&mut self, layer: usize) -> Option<Packing<'_>> {
        let p = self.packed.as_mut()?;
        Some(Packing {
            shape: self.shape,
            halves: p.halves,
            dense: &self.layers[layer],
            packed: crate::disjoint::DisjointMut::new(&mut p.layers[layer]),
        })
    }

    /// The same for writing, of a whole layer at once.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> LayerMut<'_> {
        LayerMut {
            bytes: &mut self.layers[layer],
            shape: self.shape,
        }
    }

    /// Bytes of one page in one layer.
    pub fn page_bytes(&self) -> usize {
        self.shape.layer_page_bytes()
    }

    /// Bytes of one page of a sequence in one layer: finished ones are packed, in a cache that
    /// prunes.
    fn state_bytes(&self, finished: bool) -> usize {
        match &self.packed {
            Some(p) if finished => p.halves.head_bytes() * self.shape.heads,
            _ => self.shape.layer_page_bytes(),
        }
    }

    /// The pages of a sequence as bytes: page after page, layer after layer, the whole page
    /// in the cache's own layout. [`KvCache::import`] reads it into a cache of equal shape
    /// that prunes as much.
    /// Pages of layers that lie elsewhere are read by `elsewhere(layer, page, bytes)`.
    pub fn export<E>(
        &self,
        table: &PageTable,
        mut elsewhere: impl FnMut(usize, u32, &mut [u8]) -> Result<(), E>,
    ) -> Result<Vec<u8>, E> {
        let bytes = self.shape.layer_page_bytes();
        let mut out = Vec::with_capacity(bytes * self.layers.len() * table.pages.len());
        for (at, &page) in table.pages.iter().enumerate() {
            for (i, layer) in self.layers.iter().enumerate() {
                if let (GONE, Some(p)) = (page, &self.packed) {
                    let bytes = self.state_bytes(true);
                    let page = table.packed[at] as usize;
                    out.extend_from_slice(&p.layers[i][page * bytes..(page + 1) * bytes]);
                    continue;
                }
                match layer.get(page as usize * bytes..(page as usize + 1) * bytes) {
                    Some(part) => out.extend_from_slice(part),
                    None => {
                        let at = out.len();
                        out.resize(at + bytes, 0);
                        elsewhere(i, page, &mut out[at..])?;
                    }
                }
            }
        }
        Ok(out)
    }

    /// A new sequence of `len` positions from exported bytes. Pages of layers that lie
    /// elsewhere are written by `elsewhere(layer, page, bytes)`.
    pub fn import<E: From<KvError>>(
        &mut self,
        data: &[u8],
        len: usize,
        mut elsewhere: impl FnMut(usize, u32, &[u8]) -> Result<(), E>,
    ) -> Result<PageTable, E> {
        let finished = len / KV_PAGE;
        let pages = len.div_ceil(KV_PAGE);
        let sizes = (0..pages).map(|i| self.state_bytes(i < finished));
        let want = sizes.sum::<usize>() * self.layers.len();
        if data.len() != want {
            return Err(E::from(KvError::StateSize {
                got: data.len(),
                want,
            }));
        }
        let mut table = PageTable::default();
        let mut rest = data;
        for i in 0..pages {
            // One page at a time: a cache that prunes has few dense ones.
            let result = self
                .extend(&mut table, KV_PAGE.min(len - i * KV_PAGE))
                .map_err(E::from)
                .and_then(|()| {
                    self.import_page(&table, i, i < finished, &mut rest, &mut elsewhere)
                });
            if let Err(error) = result {
                self.truncate(&mut table, 0);
                return Err(error);
            }
            self.settle(&mut table);
        }
        Ok(table)
    }

    /// Reads page `i` of a sequence in all layers from the front of `rest`.
    fn import_page<E: From<KvError>>(
        &mut self,
        table: &PageTable,
        i: usize,
        finished: bool,
        rest: &mut &[u8],
        elsewhere: &mut impl FnMut(usize, u32, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let bytes = self.state_bytes(finished);
        for layer in 0..self.layers.len() {
            let (part, behind) = rest.split_at(bytes);
            *rest = behind;
            if let (true, Some(p)) = (finished, &mut self.packed) {
                if !p.halves.are_whole(part) {
                    return Err(E::from(KvError::Damaged));
                }
                let at = table.packed[i] as usize * bytes;
                p.layers[layer][at..at + bytes].copy_from_slice(part);
                continue;
            }
            let page = table.pages[i];
            let at = page as usize * bytes;
            match self.layers[layer].get_mut(at..at + bytes) {
                Some(here) => here.copy_from_slice(part),
                None => elsewhere(layer, page, part)?,
            }
        }
        Ok(())
    }
}

/// Packs finished pages of a layer, heads from several threads.
pub(crate) struct Packing<'a> {
    shape: KvShape,
    halves: Halves,
    dense: &'a [u8],
    packed: crate::disjoint::DisjointMut<'a, u8>,
}

impl Packing<'_> {
    /// Packs one head of the dense page `from` to the packed page `to`.
    ///
    /// # Safety
    /// No other thread packs this head of `to` at the same time.
    pub(crate) unsafe fn pack(
        &self,
        from: u32,
        to: u32,
        head: usize,
        scratch: &mut pruned::PackScratch,
    ) {
        let at = from as usize * self.shape.layer_page_bytes() + head * self.shape.head_bytes();
        let dense = &self.dense[at..at + self.shape.head_bytes()];
        let (k, v) = dense.split_at(self.shape.k.page_bytes(self.shape.dim));
        let bytes = self.halves.head_bytes();
        let at = (to as usize * self.shape.heads + head) * bytes;
        // SAFETY: heads are disjoint parts; the caller keeps other threads from this one.
        let out = unsafe { self.packed.slice(at..at + bytes) };
        let (k_out, v_out) = out.split_at_mut(self.halves.k.bytes());
        self.halves.k.pack(k, scratch, k_out);
        self.halves.v.pack(v, scratch, v_out);
    }
}
