//! Every kernel of the GPU against the scalar definition, on the simulated device: seeded
//! inputs, poisoned outputs, odd shapes. Without a GPU the trials are ignored by name.

mod choice;

use half::f16;
use libtest_mimic::{Arguments, Failed, Trial};
use std::sync::Arc;
use tegula_cuda::{CudaDevice, UNITS, Unit};
use tegula_gguf::{Bytes, GgmlType, blocks};
use tegula_kernels::{
    Tier,
    device::{
        Buffer, Device, DeviceRouting, Ended, HeadOptions, Heads, LIBRARY_FROM, Matrix, Network,
        Places, Product, RawMatrix, Recording, matrix_bytes, sim::SimDevice, stream::Feeder,
    },
    kv::{KvShape, KvType},
    ops::RopeStyle,
};

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn float(&mut self) -> f32 {
        (self.next() % 20_001) as f32 / 10_000.0 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Weights of any type with scales of about a hundredth.
fn raw(rng: &mut Rng, ty: GgmlType, n: usize, k: usize, experts: usize) -> RawMatrix {
    let rows = n * experts;
    let mut bytes = vec![0; ty.bytes_for(k as u64).unwrap() as usize * rows];
    if blocks::can_quantize(ty) {
        let values = rng.floats(rows * k);
        let row = bytes.len() / rows;
        for (values, bytes) in values.chunks(k).zip(bytes.chunks_mut(row)) {
            blocks::quantize(ty, values, None, bytes).unwrap();
        }
    } else {
        bytes.iter_mut().for_each(|b| *b = rng.next() as u8);
        for block in bytes.chunks_mut(ty.block_bytes()) {
            let d = f16::from_f32(0.01 + 0.001 * rng.float()).to_bits();
            if ty == GgmlType::IQ1_M {
                for i in 0..4 {
                    let high = &mut block[48 + 2 * i + 1];
                    *high = (*high & 15) | ((((d >> (4 * i)) & 15) as u8) * 16);
                }
            } else {
                block[..2].copy_from_slice(&d.to_le_bytes());
            }
        }
    }
    RawMatrix::new(ty, n, k, experts, Bytes::from_vec(bytes)).unwrap()
}

/// The same work on a device, and what came out.
struct Bench<'a>(&'a dyn Device);

impl Bench<'_> {
    fn put(&self, values: &[f32]) -> Buffer {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let buffer = self.0.alloc(bytes.len()).unwrap();
        self.0.write(&buffer, 0, &bytes).unwrap();
        buffer
    }

    fn words(&self, values: &[u32]) -> Buffer {
        self.put(
            &values
                .iter()
                .map(|v| f32::from_bits(*v))
                .collect::<Vec<_>>(),
        )
    }

    fn poisoned(&self, n: usize) -> Buffer {
        self.put(&vec![f32::NAN; n])
    }

    fn get(&self, buffer: &Buffer, n: usize) -> Vec<f32> {
        let mut bytes = vec![0; 4 * n];
        self.0.read(buffer, 0, &mut bytes).unwrap();
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    }

    /// Places for choices of experts.
    fn routing(&self, m: usize, used: usize) -> DeviceRouting {
        let [ids, weights] = [0, 1].map(|_| self.poisoned(m * used));
        DeviceRouting { ids, weights, used }
    }

    fn load(&self, m: &RawMatrix) -> Matrix {
        self.0.load(m).unwrap()
    }

    fn places(&self, tokens: &[(u32, u32)], pages: &[u32], pairs: usize) -> Places {
        let at: Vec<u32> = tokens.iter().flat_map(|t| [t.0, t.1]).collect();
        let angle = |t: usize, i: usize| (tokens[t].1 as f32) / (1.0 + i as f32);
        let all = (0..tokens.len()).flat_map(|t| (0..pairs).map(move |i| (t, i)));
        let angles: Vec<f32> = all.map(|(t, i)| angle(t, i)).collect();
        let longest = tokens.iter().map(|t| t.1 as usize + 1).max().unwrap_or(0);
        Places {
            tokens: self.words(&at),
            pages: self.words(pages),
            cos: self.put(&angles.iter().map(|a| a.cos()).collect::<Vec<_>>()),
            sin: self.put(&angles.iter().map(|a| a.sin()).collect::<Vec<_>>()),
            m: tokens.len(),
            pairs,
            longest: longest.next_power_of_two().max(256),
            runs: tokens.chunk_by(|a, b| a.0 == b.0).count(),
        }
    }
}

/// `|got - want| <= bound * max |want|`, and no NaN.
fn close(what: &str, got: &[f32], want: &[f32], bound: f32) -> Result<(), Failed> {
    let largest = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs() / largest;
        if error.is_nan() || error > bound {
            return Err(format!("{what}: value {i} is {g} and not {w} (largest {largest})").into());
        }
    }
    Ok(())
}

/// Runs `work` on the GPU and on scalar kernels and compares.
fn both(
    gpu: &CudaDevice,
    what: &str,
    bound: f32,
    work: impl Fn(&Bench<'_>) -> Vec<f32>,
) -> Result<(), Failed> {
    let sim = SimDevice::new("SIM0", 8 << 30, Tier::Scalar);
    close(what, &work(&Bench(gpu)), &work(&Bench(&sim)), bound)
}

/// Tensor cores round to bf16 what the CPU rounds to eight bits.
const ROUNDED: f32 = 0.03;
const EXACT: f32 = 2e-5;

fn products(gpu: &CudaDevice, ty: GgmlType) -> Result<(), Failed> {
    let block = ty.block_len().max(32);
    for (n, k) in [(1, block), (130, 3 * block), (67, 512)] {
        for m in [1, 2, 8, 9, 33, 150] {
            let what = format!("{ty} {n}x{k}, {m} tokens");
            let bound = if m > 8 && ty != GgmlType::F32 {
                ROUNDED
            } else {
                EXACT
            };
            both(gpu, &what, bound, |d| {
                let rng = &mut Rng(7);
                let w: Vec<_> = (0..3).map(|i| d.load(&raw(rng, ty, n + i, k, 1))).collect();
                let (x, bias) = (d.put(&rng.floats(m * k)), d.put(&rng.floats(n)));
                let out: Vec<_> = (0..3).map(|i| d.poisoned(m * (n + i))).collect();
                let sum = d.put(&rng.floats(m * n));
                let product = |i: usize| Product {
                    w: &w[i],
                    out: &out[i],
                    bias: (i == 0).then_some(&bias),
                    add: false,
                };
                d.0.matmul(&[product(0), product(1), product(2)], &x, m)
                    .unwrap();
                let add = Product {
                    w: &w[0],
                    out: &sum,
                    bias: None,
                    add: true,
                };
                d.0.matmul(&[add], &x, m).unwrap();
                let mut all = d.get(&sum, m * n);
                (0..3).for_each(|i| all.extend(d.get(&out[i], m * (n + i))));
                all
            })?;
        }
    }
    let ff = block * 2;
    for m in [1, 3, 8, 20, 70] {
        let bound = if m > 8 && ty != GgmlType::F32 {
            ROUNDED
        } else {
            2e-3
        };
        both(gpu, &format!("{ty} network, {m} tokens"), bound, |d| {
            let rng = &mut Rng(8);
            let [gate, up] = [0, 1].map(|_| d.load(&raw(rng, ty, ff, 256, 1)));
            let down = d.load(&raw(rng, ty, 256, ff, 1));
            let (input, x) = (d.put(&rng.floats(m * 256)), d.put(&rng.floats(m * 256)));
            let network = Network {
                gate: &gate,
                up: &up,
                down: &down,
            };
            d.0.ffn(&network, &input, m, &x).unwrap();
            d.get(&x, m * 256)
        })?;
        both(gpu, &format!("{ty} experts, {m} tokens"), bound, |d| {
            let rng = &mut Rng(9);
            let (experts, used) = (7, 3);
            let [gate, up] = [0, 1].map(|_| d.load(&raw(rng, ty, ff, 256, experts)));
            let down = d.load(&raw(rng, ty, 256, ff, experts));
            let (input, x) = (d.put(&rng.floats(m * 256)), d.put(&rng.floats(m * 256)));
            let ids: Vec<u32> = (0..m as u32)
                .flat_map(|t| [t % 7, (t + 2) % 7, (t * 3 + 4) % 7])
                .collect();
            let routing = DeviceRouting {
                ids: d.words(&ids),
                weights: d.put(&rng.floats(m * used)),
                used,
            };
            let network = Network {
                gate: &gate,
                up: &up,
                down: &down,
            };
            d.0.experts(&network, &input, &routing, m, &x).unwrap();
            d.get(&x, m * 256)
        })?;
    }
    Ok(())
}

/// Matrices that stay in pinned memory, parts of one buffer, with inputs that come along: again
/// and again, since these go through the same memory, and of types that share a product.
fn pinned(gpu: &CudaDevice) -> Result<(), Failed> {
    use GgmlType as T;
    let (n, k) = (67, 4096);
    for types in [
        [T::Q4_0; 3],
        [T::Q8_0; 3],
        [T::Q4_K, T::Q4_K, T::Q6_K],
        [T::BF16; 3],
        [T::F32, T::Q4_0, T::F32],
    ] {
        both(gpu, &format!("{types:?}, pinned"), EXACT, |d| {
            let rng = &mut Rng(16);
            let all: Vec<_> = (0..3)
                .map(|i| raw(rng, types[i], n + 16 * i, k, 1))
                .collect();
            let bytes = all.iter().map(RawMatrix::device_bytes).sum();
            let (whole, mut at) = (Arc::new(d.0.pin(bytes).unwrap()), 0);
            let mut load = |m: &RawMatrix| {
                let part = Buffer::part(&whole, at, m.device_bytes());
                at += m.device_bytes();
                d.0.load_to(m, part).unwrap()
            };
            let w: Vec<_> = all.iter().map(&mut load).collect();
            let out: Vec<_> = w.iter().map(|w| d.0.pin(4 * w.n).unwrap()).collect();
            let mut results = Vec::new();
            for _ in 0..20 {
                let x = rng.floats(k);
                let x: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
                let product = |(w, out)| Product {
                    w,
                    out,
                    bias: None,
                    add: false,
                };
                let products: Vec<_> = w.iter().zip(&out).map(product).collect();
                d.0.matmul_from(&products, &x, 1).unwrap();
                let mut here: Vec<_> = w.iter().map(|w| vec![0; 4 * w.n]).collect();
                let parts = out.iter().zip(&mut here);
                let mut parts: Vec<_> = parts.map(|(o, h)| (o, h.as_mut_slice())).collect();
                d.0.collect(&mut parts).unwrap();
                let here = here.concat();
                let values = here.as_chunks().0.iter();
                results.extend(values.map(|b| f32::from_le_bytes(*b)));
            }
            results
        })?;
    }
    Ok(())
}

/// So many tokens that a library multiplies dense matrices, if it is installed.
fn many(gpu: &CudaDevice) -> Result<(), Failed> {
    let (m, n, k) = (LIBRARY_FROM + 5, 70, 96);
    for ty in [GgmlType::Q4_0, GgmlType::BF16, GgmlType::F16] {
        both(gpu, &format!("{ty}, {m} tokens"), ROUNDED, |d| {
            let rng = &mut Rng(13);
            let w: Vec<_> = (0..2).map(|i| d.load(&raw(rng, ty, n + i, k, 1))).collect();
            let x = d.put(&rng.floats(m * k));
            let (out, sum) = (d.poisoned(m * (n + 1)), d.put(&rng.floats(m * n)));
            let product = |w, out, add| Product {
                w,
                out,
                bias: None,
                add,
            };
            let two = [product(&w[0], &sum, true), product(&w[1], &out, false)];
            d.0.matmul(&two, &x, m).unwrap();
            let mut all = d.get(&sum, m * n);
            all.extend(d.get(&out, m * (n + 1)));
            all
        })?;
    }
    Ok(())
}

/// Fills pieces, and finds nothing else to do a few times.
struct Plain(usize);

impl Feeder for Plain {
    fn fill(&mut self, to: &mut [u8], parts: &[&[u8]]) {
        to.copy_from_slice(&parts.concat());
    }

    fn meanwhile(&mut self) -> bool {
        self.0 = self.0.saturating_sub(1);
        self.0 > 0
    }
}

/// Matrices that are brought to slots while others there are multiplied: more pieces than there
/// are, and slots that are filled again at once.
fn streaming(gpu: &CudaDevice) -> Result<(), Failed> {
    let (n, k) = (4600, 4096);
    both(gpu, "large matrices, one behind another", EXACT, |d| {
        let rng = &mut Rng(14);
        let all: Vec<_> = (0..2)
            .map(|i| raw(rng, GgmlType::Q8_0, n + i, k, 1))
            .collect();
        let bytes = matrix_bytes(GgmlType::Q8_0, n as u64 + 1, k as u64, 1).unwrap();
        let mut slot = d.0.slot(bytes as usize).unwrap();
        let x = d.put(&rng.floats(k));
        let out: Vec<_> = (0..6).map(|i| d.poisoned(n + i % 2)).collect();
        for (i, out) in out.iter().enumerate() {
            let feeder = &mut Plain(if i % 2 == 0 { 0 } else { 100 });
            d.0.stream(&all[i % 2], None, feeder, &mut slot).unwrap();
            let product = Product {
                w: &slot,
                out,
                bias: None,
                add: false,
            };
            d.0.matmul(&[product], &x, 1).unwrap();
        }
        let each = out.iter().enumerate();
        each.flat_map(|(i, out)| d.get(out, n + i % 2)).collect()
    })?;
    for ty in [
        GgmlType::Q4_0,
        GgmlType::Q4_K,
        GgmlType::Q6_K,
        GgmlType::BF16,
    ] {
        for m in [3, 40] {
            let bound = if m > 8 { ROUNDED } else { 2e-3 };
            both(
                gpu,
                &format!("{ty} experts that stream, {m} tokens"),
                bound,
                |d| {
                    let rng = &mut Rng(15);
                    let (experts, used, ff) = (9, 3, 512);
                    let [gate, up] = [0, 1].map(|_| raw(rng, ty, ff, 256, experts));
                    let down = raw(rng, ty, 256, ff, experts);
                    let bytes = matrix_bytes(ty, ff as u64, 256, 5).unwrap() as usize;
                    let mut slots = [0, 1, 2].map(|_| d.0.slot(bytes).unwrap());
                    let (input, x) = (d.put(&rng.floats(m * 256)), d.put(&rng.floats(m * 256)));
                    let ids: Vec<u32> = (0..m as u32)
                        .flat_map(|t| [t % 5, (t + 2) % 5, (t * 3 + 4) % 5])
                        .collect();
                    let routing = DeviceRouting {
                        ids: d.words(&ids),
                        weights: d.put(&rng.floats(m * used)),
                        used,
                    };
                    for chosen in [[0, 2, 3, 7, 8], [1, 2, 4, 5, 6]] {
                        for (raw, slot) in [&gate, &up, &down].into_iter().zip(&mut slots) {
                            d.0.stream(raw, Some(&chosen), &mut Plain(0), slot).unwrap();
                        }
                        let network = Network {
                            gate: &slots[0],
                            up: &slots[1],
                            down: &slots[2],
                        };
                        d.0.experts(&network, &input, &routing, m, &x).unwrap();
                    }
                    d.get(&x, m * 256)
                },
            )?;
        }
    }
    // Several buffers, read at once.
    both(gpu, "reading at once", 0.0, |d| {
        let rng = &mut Rng(16);
        let (a, b) = (d.put(&rng.floats(1000)), d.put(&rng.floats(77)));
        let (mut x, mut y) = (vec![0; 4 * 999], vec![0; 4 * 77]);
        d.0.read_all(&mut [(&a, &mut x[..]), (&b, &mut y[..])])
            .unwrap();
        x.extend(y);
        let values = x.as_chunks().0.iter();
        values.map(|v| f32::from_le_bytes(*v)).collect()
    })
}

/// The largest of many: ties, NaNs, both zeros, all alike, and rows that share nothing.
fn largest(gpu: &CudaDevice) -> Result<(), Failed> {
    for (m, n, k) in [
        (1, 1, 1),
        (1, 7, 7),
        (3, 1023, 40),
        (2, 1025, 64),
        (2, 5000, 512),
        (2, 151_937, 40),
        (64, 3001, 1),
    ] {
        for kind in ["any", "few", "alike", "odd"] {
            both(gpu, &format!("the {k} largest of {n}, {kind}"), 0.0, |d| {
                let rng = &mut Rng(18);
                let mut x = rng.floats(m * n);
                match kind {
                    "few" => x.iter_mut().for_each(|v| *v = (*v * 4.0).round()),
                    "alike" => x.fill(-3.5),
                    "odd" => x.iter_mut().enumerate().for_each(|(i, v)| match i % 5 {
                        0 => *v = f32::NAN,
                        1 => *v = f32::NEG_INFINITY,
                        2 => *v = 0.0 * v.signum(),
                        3 => *v = -v.abs(),
                        _ => *v *= 1e-39,
                    }),
                    _ => {}
                }
                let x = d.put(&x);
                let (ids, values) = (d.poisoned(m * k), d.poisoned(m * k));
                d.0.top_k(&x, m, n, k, &ids, &values).unwrap();
                let wanted: Vec<u32> = (0..n as u32).rev().step_by(n.div_ceil(9)).collect();
                let picked = d.poisoned(m * wanted.len());
                let (at, count) = (d.words(&wanted), wanted.len());
                d.0.pick(&x, m, n, &at, count, &picked).unwrap();
                // Exact up to 2^24; -inf and NaN as numbers, since nothing equals them.
                let number = |v: f32| match v {
                    v if v.is_nan() => 2e9,
                    f32::NEG_INFINITY => 1e9,
                    v => v,
                };
                let ids = d.get(&ids, m * k);
                let mut all: Vec<f32> = ids.iter().map(|v| v.to_bits() as f32).collect();
                all.extend(d.get(&values, m * k).into_iter().map(number));
                all.extend(d.get(&picked, m * count).into_iter().map(number));
                all
            })?;
        }
    }
    Ok(())
}

/// Copies of every size that goes another way, and sums with what comes from here.
fn copies(gpu: &CudaDevice) -> Result<(), Failed> {
    for n in [1, 77, 5000, 16_384, 16_385, 300_000, 600_001, 9_000_001] {
        both(gpu, &format!("copies of {n} values"), 0.0, |d| {
            let rng = &mut Rng(17);
            let values: Vec<[f32; 3]> = (0..n).map(|_| [0; 3].map(|_| rng.float())).collect();
            let bytes = |i: usize, n: usize| -> Vec<u8> {
                let values = values[..n].iter();
                values.flat_map(|v| v[i].to_le_bytes()).collect()
            };
            let [a, b, c] = [n, n, n + 3].map(|n| d.poisoned(n));
            let feeder = &mut Plain(0);
            d.0.write_all(&[
                (&a, &bytes(0, n)[..]),
                (&b, &bytes(1, n / 2)[..]),
                (&c, &[][..]),
            ])
            .unwrap();
            d.0.upload(&b, &bytes(1, n), feeder).unwrap();
            // Twice: what lies in the memory that copies go through is another's the second time.
            for i in [2, 1] {
                d.0.add_from(&a, &c, &bytes(i, n), feeder).unwrap();
            }
            let (mut x, mut y) = (vec![0; 4 * n], vec![0; 4 * n.min(13)]);
            d.0.download(&mut [(&a, &mut x[..]), (&b, &mut y[..])], feeder)
                .unwrap();
            x.extend(y);
            let values = x.as_chunks().0.iter();
            values.map(|v| f32::from_le_bytes(*v)).collect()
        })?;
    }
    Ok(())
}

fn rows(gpu: &CudaDevice) -> Result<(), Failed> {
    for (m, k) in [(1, 1), (3, 33), (2, 4097)] {
        both(gpu, &format!("rms_norm {m}x{k}"), EXACT, |d| {
            let rng = &mut Rng(1);
            let (x, w, out) = (
                d.put(&rng.floats(m * k)),
                d.put(&rng.floats(k)),
                d.poisoned(m * k),
            );
            d.0.rms_norm(&x, &w, 1e-6, m, k, &out).unwrap();
            d.get(&out, m * k)
        })?;
        both(gpu, "add and gather", 0.0, |d| {
            let rng = &mut Rng(2);
            let (x, y, out) = (
                d.put(&rng.floats(m * k)),
                d.put(&rng.floats(m * k)),
                d.poisoned(m * k),
            );
            d.0.add(&x, &y, m * k).unwrap();
            let back: Vec<u32> = (0..m as u32).rev().collect();
            d.0.gather(&x, &d.words(&back), m, k, &out).unwrap();
            d.get(&out, m * k)
        })?;
    }
    for (heads, dim, pairs) in [(1, 2, 1), (3, 64, 32), (2, 128, 40), (4, 256, 128)] {
        for (style, norm) in [
            (RopeStyle::Neox, true),
            (RopeStyle::Normal, false),
            (RopeStyle::Normal, true),
        ] {
            both(
                gpu,
                &format!("heads of {dim}, {pairs} pairs, {style:?}"),
                EXACT,
                |d| {
                    let rng = &mut Rng(3);
                    let (x, w) = (d.put(&rng.floats(2 * heads * dim)), d.put(&rng.floats(dim)));
                    let y = d.put(&rng.floats(2 * 2 * dim));
                    let places = d.places(&[(0, 5), (0, 6)], &[0], pairs);
                    let options = HeadOptions {
                        dim,
                        style,
                        eps: 1e-6,
                    };
                    let of = |x, norm, heads| Heads { x, norm, heads };
                    let two = [of(&x, norm.then_some(&w), heads), of(&y, None, 2)];
                    d.0.heads(two, &options, &places).unwrap();
                    let mut all = d.get(&x, 2 * heads * dim);
                    all.extend(d.get(&y, 2 * 2 * dim));
                    all
                },
            )?;
        }
    }
    Ok(())
}

/// Forms that an operation makes along with its output are those of the output as it is when
/// it is multiplied.
fn forms(gpu: &CudaDevice) -> Result<(), Failed> {
    let (n, k) = (40, 96);
    for m in [1, 8, 12] {
        let bound = if m > 8 { ROUNDED } else { EXACT };
        both(gpu, &format!("norm and product, {m} tokens"), bound, |d| {
            let rng = &mut Rng(12);
            let w = d.load(&raw(rng, GgmlType::Q8_0, n, k, 1));
            let (x, norm) = (d.put(&rng.floats(m * k)), d.put(&rng.floats(k)));
            let (input, out) = (d.poisoned(m * k), d.poisoned(m * n));
            let mut all = Vec::new();
            let mut product = || {
                let one = Product {
                    w: &w,
                    out: &out,
                    bias: None,
                    add: false,
                };
                d.0.matmul(&[one], &input, m).unwrap();
                all.extend(d.get(&out, m * n));
            };
            d.0.rms_norm(&x, &norm, 1e-6, m, k, &input).unwrap();
            product();
            // Each of these changes what has been made.
            d.0.add(&input, &x, m * k).unwrap();
            product();
            d.0.write(&input, 0, &[0; 64]).unwrap();
            product();
            let rows: Vec<u32> = (0..m as u32).rev().collect();
            d.0.gather(&x, &d.words(&rows), m, k, &input).unwrap();
            product();
            d.0.rms_norm(&input, &norm, 1e-6, m, k, &x).unwrap();
            product();
            all
        })?;
    }
    Ok(())
}

fn attention(gpu: &CudaDevice, k: KvType, v: KvType) -> Result<(), Failed> {
    for (kv_heads, heads, dim) in [
        (1, 1, 32),
        (2, 8, 64),
        (2, 8, 128),
        (2, 32, 128),
        (1, 3, 96),
        (1, 2, 256),
    ] {
        let shape = KvShape {
            layers: 1,
            heads: kv_heads,
            dim,
            k,
            v,
        };
        for (seen, m) in [
            (0usize, 1usize),
            (63, 3),
            (130, 1),
            (300, 2),
            (5, 40),
            (70, 130),
        ] {
            // Tensor cores round queries and weights of positions to f16.
            let bound = if m > 8 { 2e-3 } else { 2e-4 };
            both(
                gpu,
                &format!("{heads}/{kv_heads} heads of {dim}, {m} behind {seen}"),
                bound,
                |d| {
                    let rng = &mut Rng(6);
                    let pages = 8;
                    let cache = d.0.alloc(shape.bytes(pages)).unwrap();
                    d.0.zero(&cache).unwrap();
                    let table: Vec<u32> = vec![99, 3, 1, 7, 0, 5, 2];
                    let run = |from: usize, count: usize, rng: &mut Rng| {
                        let tokens: Vec<_> = (from..from + count).map(|p| (1, p as u32)).collect();
                        let places = d.places(&tokens, &table, 1);
                        let len = count * kv_heads * dim;
                        let (k, v) = (d.put(&rng.floats(len)), d.put(&rng.floats(len)));
                        d.0.kv_store(&cache, &shape, &places, &k, &v).unwrap();
                        places
                    };
                    if seen > 0 {
                        run(0, seen, rng);
                    }
                    let places = run(seen, m, rng);
                    let q = d.put(&rng.floats(m * heads * dim));
                    let out = d.poisoned(m * heads * dim);
                    d.0.attention(&cache, &shape, &places, &q, heads, &out)
                        .unwrap();
                    let first = d.get(&out, m * heads * dim);
                    // A page moves and the table with it.
                    d.0.kv_copy(&cache, &shape, 3, 6).unwrap();
                    d.0.attention(&cache, &shape, &places, &q, heads, &out)
                        .unwrap();
                    let mut all = d.get(&out, m * heads * dim);
                    all.extend(first);
                    all
                },
            )?;
        }
    }
    // Heads are rotated and stored at once.
    for (dim, norm) in [(32, false), (64, true), (128, true)] {
        let shape = KvShape {
            layers: 1,
            heads: 2,
            dim,
            k,
            v,
        };
        both(gpu, &format!("heads of {dim} to the cache"), 2e-3, |d| {
            let (rng, m) = (&mut Rng(14), 12);
            let cache = d.0.alloc(shape.bytes(3)).unwrap();
            d.0.zero(&cache).unwrap();
            let tokens: Vec<_> = (58..58 + m as u32).map(|p| (0, p)).collect();
            let places = d.places(&tokens, &[2, 0], dim / 2);
            let q = d.put(&rng.floats(m * 4 * dim));
            let (k, v) = (
                d.put(&rng.floats(m * 2 * dim)),
                d.put(&rng.floats(m * 2 * dim)),
            );
            let w = d.put(&rng.floats(dim));
            let options = HeadOptions {
                dim,
                style: RopeStyle::Neox,
                eps: 1e-6,
            };
            let of = |x, heads| Heads {
                x,
                norm: norm.then_some(&w),
                heads,
            };
            let two = [of(&q, 4), of(&k, 2)];
            d.0.heads_and_store(two, &v, &options, &places, &cache, &shape)
                .unwrap();
            let out = d.poisoned(m * 4 * dim);
            d.0.attention(&cache, &shape, &places, &q, 4, &out).unwrap();
            let mut all = d.get(&out, m * 4 * dim);
            all.extend(d.get(&k, m * 2 * dim));
            all
        })?;
    }
    // Several sequences among many tokens, in runs and one by one.
    let shape = KvShape {
        layers: 1,
        heads: 2,
        dim: 64,
        k,
        v,
    };
    let runs: Vec<(u32, u32)> = (0..20).map(|i| (0, 70 + i)).collect();
    let second = (0..21).map(|i| (3, 3 + i));
    let runs: Vec<_> = runs.into_iter().chain(second).chain([(6, 64)]).collect();
    let mixed: Vec<(u32, u32)> = (0..24).map(|i| (3 * (i % 2), 40 + i)).collect();
    for tokens in [runs, mixed] {
        both(
            gpu,
            &format!("{} tokens of several", tokens.len()),
            2e-3,
            |d| {
                let rng = &mut Rng(11);
                let cache = d.0.alloc(shape.bytes(9)).unwrap();
                d.0.zero(&cache).unwrap();
                let table: Vec<u32> = vec![3, 1, 8, 0, 5, 2, 4, 7];
                for first in [0u32, 3, 6] {
                    let all: Vec<_> = (0..100).map(|p| (first, p)).collect();
                    let places = d.places(&all, &table, 1);
                    let len = all.len() * shape.heads * shape.dim;
                    let (k, v) = (d.put(&rng.floats(len)), d.put(&rng.floats(len)));
                    d.0.kv_store(&cache, &shape, &places, &k, &v).unwrap();
                }
                let places = d.places(&tokens, &table, 1);
                let len = tokens.len() * 4 * shape.dim;
                let (q, out) = (d.put(&rng.floats(len)), d.poisoned(len));
                d.0.attention(&cache, &shape, &places, &q, 4, &out).unwrap();
                d.get(&out, len)
            },
        )?;
    }
    Ok(())
}

fn recordings(gpu: &CudaDevice) -> Result<(), Failed> {
    let d = Bench(gpu);
    let rng = &mut Rng(10);
    let w = d.load(&raw(rng, GgmlType::Q4_0, 64, 64, 1));
    let (x, out) = (d.poisoned(64), d.poisoned(64));
    let product = || Product {
        w: &w,
        out: &out,
        bias: None,
        add: false,
    };
    let change = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        gpu.write(&x, 0, &bytes)
    };
    // The first pass allocates, which forgets that it was the first; the third records.
    let mut results = Vec::new();
    for pass in 0..6 {
        change(&rng.floats(64))?;
        let recording = gpu.begin(&[1, 2, 3])?;
        if recording == Recording::Issue {
            gpu.matmul(&[product()], &x, 1)?;
            if gpu.end()? == Ended::Again {
                return Err(format!("pass {pass}: {:?}", gpu.notes()).into());
            }
        } else if pass < 2 {
            return Err("replayed what nobody recorded".into());
        }
        let recorded = d.get(&out, 64);
        gpu.matmul(&[product()], &x, 1)?;
        close("recorded", &recorded, &d.get(&out, 64), 0.0)?;
        results.push((recording, recorded));
    }
    let replayed: Vec<_> = results
        .iter()
        .filter(|(r, _)| *r == Recording::Replayed)
        .collect();
    if replayed.len() < 3 || replayed[0].1 == replayed[1].1 {
        return Err(format!("{} replays, or not of new inputs", replayed.len()).into());
    }
    // Somebody fails and never comes to the end: the next finds the device as it was.
    let values = rng.floats(64);
    let record = |key: &[u64]| -> Result<(), Failed> {
        for _ in 0..2 {
            gpu.begin(key)?;
            gpu.matmul(&[product()], &x, 1)?;
        }
        Ok(())
    };
    record(&[4])?;
    change(&values)?;
    gpu.matmul(&[product()], &x, 1)?;
    let want = d.get(&out, 64);
    record(&[4])?;
    if gpu.begin(&[5])? != Recording::Issue || gpu.end()? != Ended::Done {
        return Err("an open recording is in the next one's way".into());
    }
    close("behind an open recording", &d.get(&out, 64), &want, 0.0)?;
    // Reading can't be recorded: that is said once, and everything is done one by one.
    for pass in 0..4 {
        change(&rng.floats(64))?;
        gpu.begin(&[6])?;
        gpu.matmul(&[product()], &x, 1)?;
        d.get(&out, 64);
        if gpu.end()? == Ended::Again {
            let notes = gpu.notes();
            if pass == 0 || notes.len() != 1 || !notes[0].contains("one by one") {
                return Err(format!("pass {pass}: {notes:?}").into());
            }
            gpu.begin(&[6])?;
            gpu.matmul(&[product()], &x, 1)?;
            if gpu.end()? != Ended::Done {
                return Err("fails again".into());
            }
        }
        let issued = d.get(&out, 64);
        gpu.matmul(&[product()], &x, 1)?;
        close("issued again", &issued, &d.get(&out, 64), 0.0)?;
    }
    gpu.forget();
    match gpu.notes().is_empty() {
        true => Ok(()),
        false => Err("said twice".into()),
    }
}

fn memory(gpu: &CudaDevice) -> Result<(), Failed> {
    let d = Bench(gpu);
    let values: Vec<f32> = (0..12_000_001).map(|i| i as f32).collect();
    close(
        "a long copy",
        &d.get(&d.put(&values), values.len()),
        &values,
        0.0,
    )?;
    match gpu.alloc(1 << 46) {
        Err(tegula_kernels::device::DeviceError::OutOfMemory { .. }) => Ok(()),
        other => Err(format!("64 TiB: {other:?}").into()),
    }
}

/// A test that wants a device.
type OnGpu = Box<dyn Fn(&CudaDevice) -> Result<(), Failed> + Send>;

fn main() {
    let arguments = Arguments::from_args();
    let (gpu, why) = match tegula_cuda::detect(1) {
        Ok(found) => (found.into_iter().next(), None),
        Err(error) => (None, Some(error)),
    };
    if let Some(why) = why {
        eprintln!("no GPU: {why}");
    }
    let mut trials = vec![Trial::test("shipped_ptx_is_of_these_sources", || {
        for unit in UNITS {
            let ptx = unit.shipped()?;
            if !ptx.starts_with(&unit.stamp()) {
                return Err(format!("{}: made from other sources", unit.name()).into());
            }
        }
        Ok(())
    })];
    let mut add = |name: String, f: OnGpu| {
        let gpu = gpu.clone();
        let absent = gpu.is_none();
        let run = move || gpu.as_ref().map_or(Ok(()), |gpu: &Arc<CudaDevice>| f(gpu));
        trials.push(Trial::test(format!("gpu::{name}"), run).with_ignored_flag(absent));
    };
    add(
        "kernels_load".to_owned(),
        Box::new(|gpu| Ok(gpu.load_all()?)),
    );
    add("memory".to_owned(), Box::new(memory));
    add("copies".to_owned(), Box::new(copies));
    add("largest".to_owned(), Box::new(largest));
    add("rows".to_owned(), Box::new(rows));
    add("routing".to_owned(), Box::new(choice::routing));
    add("routers".to_owned(), Box::new(choice::routers));
    add("forms".to_owned(), Box::new(forms));
    add("many_tokens".to_owned(), Box::new(many));
    add("pinned".to_owned(), Box::new(pinned));
    add("streaming".to_owned(), Box::new(streaming));
    add("recordings".to_owned(), Box::new(recordings));
    for (k, v) in [
        (KvType::F16, KvType::F16),
        (KvType::BF16, KvType::BF16),
        (KvType::Q8_0, KvType::Q8_0),
        (KvType::BF16, KvType::Q8_0),
        (KvType::Q8_0, KvType::BF16),
    ] {
        let name = format!("attention_{}_{}", k.name(), v.name());
        add(name, Box::new(move |gpu| attention(gpu, k, v)));
    }
    for &unit in UNITS {
        if let Unit::Mul(ty) = unit {
            add(
                format!("products_{ty}"),
                Box::new(move |gpu| products(gpu, ty)),
            );
        }
    }
    libtest_mimic::run(
        &Arguments {
            test_threads: Some(1),
            ..arguments
        },
        trials,
    )
    .exit();
}
