//! The searches behind the quantisers: given weights and how much each one's error counts,
//! the scale (and minimum) whose rounding loses least.
//!
//! Each tries a row of slightly stretched or shrunk grids, solves the weighted least
//! squares problem for the codes that each grid gives, and keeps the best. Sums run in
//! eight lanes so that they vectorise; the order is fixed, so results are reproducible.

use super::grids;

/// Below this magnitude a group counts as all zero.
pub(super) const TINY: f32 = 1e-15;

const LANES: usize = 8;

/// Half to even, for magnitudes below 2^22.
#[inline(always)]
fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// The integer in `low..=high` nearest to `x`; `low` for a NaN.
#[inline(always)]
pub(super) fn to_code(x: f32, low: f32, high: f32) -> f32 {
    // Plain comparisons become one minps and one maxps, unlike f32::clamp.
    let x = if x > low { x } else { low };
    round(if x < high { x } else { high })
}

/// `K` sums over `0..N` at once.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "lanes innermost is what vectorises"
)]
fn sums<const N: usize, const K: usize>(term: impl Fn(usize) -> [f32; K]) -> [f32; K] {
    let mut lanes = [[0f32; LANES]; K];
    for chunk in 0..N / LANES {
        for lane in 0..LANES {
            let terms = term(chunk * LANES + lane);
            for k in 0..K {
                lanes[k][lane] += terms[k];
            }
        }
    }
    lanes.map(|l| ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])))
}

/// The element of the greatest magnitude, the first of equals; 0 for all zeros.
pub(super) fn peak(x: &[f32]) -> f32 {
    x.iter().fold(
        0.0,
        |best: f32, &v| if v.abs() > best.abs() { v } else { best },
    )
}

/// The mean square.
pub(super) fn power(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v * v;
        }
    }
    let sum = lanes.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
    sum / x.len().max(1) as f32
}

/// The better of two fits `(Σwxl, Σwll)`: the one that explains more of `Σwxx`.
///
/// In f64, for the squares of large weights' sums leave f32's range.
#[inline(always)]
fn gain(sxl: f32, sll: f32) -> f64 {
    let (sxl, sll) = (f64::from(sxl), f64::from(sll));
    if sll > 0.0 { sxl * sxl / sll } else { 0.0 }
}

/// The scale `s` of the least `Σ w (x − s·l)²` over codes `l` in `−levels..levels`.
pub(super) fn symmetric<const N: usize>(x: &[f32; N], w: &[f32; N], levels: f32) -> f32 {
    let peak = peak(x);
    if peak.abs() < TINY {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0, 0.0);
    // The unstretched grid comes first, to win among equals.
    for stretch in std::iter::once(0).chain(-9..0).chain(1..10) {
        // The peak gets the most negative code, which has no positive counterpart.
        let inverse = -(levels + 0.1 * stretch as f32) / peak;
        let [sxl, sll] = sums::<N, 2>(|i| {
            let l = to_code(inverse * x[i], -levels, levels - 1.0);
            [w[i] * x[i] * l, w[i] * l * l]
        });
        let gain = gain(sxl, sll);
        if gain > best {
            (best, scale) = (gain, sxl / sll);
        }
    }
    scale
}

/// Moves single codes while that makes `Σ w (x − s·l)²` less for the best `s`, which it
/// returns. Codes stay in `low..=high`.
pub(super) fn descend(x: &[f32], w: &[f32], codes: &mut [f32], low: f32, high: f32) -> f32 {
    let (mut sxl, mut sll) = (0f32, 0f32);
    for ((&x, &w), &l) in x.iter().zip(w).zip(&*codes) {
        sxl += w * x * l;
        sll += w * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((&x, &w), l) in x.iter().zip(w).zip(codes.iter_mut()) {
            // The other weights' sums fix the scale by which this one is rounded anew.
            let (rest_xl, rest_ll) = (sxl - w * x * *l, sll - w * *l * *l);
            if rest_xl <= 0.0 || rest_ll <= 0.0 {
                continue;
            }
            let moved = to_code(x * rest_ll / rest_xl, low, high);
            if moved == *l {
                continue;
            }
            let (new_xl, new_ll) = (rest_xl + w * x * moved, rest_ll + w * moved * moved);
            if gain(new_xl, new_ll) > gain(sxl, sll) {
                (*l, sxl, sll) = (moved, new_xl, new_ll);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    if sll > 0.0 { sxl / sll } else { 0.0 }
}

/// What [`affine`] tries, and how it compares.
pub(super) struct AffineSearch {
    /// The grids have `levels + first + step·i` steps over the range, for `i` in `0..=count`.
    pub first: f32,
    pub step: f32,
    pub count: u16,
    /// Compare by absolute instead of squared error.
    pub absolute: bool,
    /// Allow a positive minimum (K-quants store its negation unsigned).
    pub free_min: bool,
}

/// The `(s, m)` of the least `Σ w |x − (s·l + m)|²` over codes `l` in `0..=levels`.
pub(super) fn affine<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    levels: f32,
    search: &AffineSearch,
) -> (f32, f32) {
    let mut low = x.iter().copied().fold(x[0], f32::min);
    let high = x.iter().copied().fold(x[0], f32::max);
    if !search.free_min {
        low = low.min(0.0);
    }
    if high <= low {
        return (0.0, low);
    }
    let [sw, sx] = sums::<N, 2>(|i| [w[i], w[i] * x[i]]);
    let error = |codes: &[f32; N], scale: f32, min: f32| {
        let [error] = sums::<N, 1>(|i| {
            let off = scale * codes[i] + min - x[i];
            [w[i]
                * if search.absolute {
                    off.abs()
                } else {
                    off * off
                }]
        });
        error
    };
    let codes_of = |steps: f32, low: f32| -> [f32; N] {
        let inverse = steps / (high - low);
        std::array::from_fn(|i| to_code(inverse * (x[i] - low), 0.0, levels))
    };

    let mut best = ((high - low) / levels, low);
    let mut best_error = error(&codes_of(levels, low), best.0, best.1);
    for i in 0..=search.count {
        // Each grid starts at the best minimum so far, so the minimum descends too.
        let codes = codes_of(levels + search.first + search.step * f32::from(i), best.1);
        let [sl, sll, sxl] = sums::<N, 3>(|i| {
            let wl = w[i] * codes[i];
            [wl, wl * codes[i], wl * x[i]]
        });
        let determinant = sw * sll - sl * sl;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (sw * sxl - sx * sl) / determinant;
        let mut min = (sll * sx - sl * sxl) / determinant;
        if min > 0.0 && !search.free_min {
            (scale, min) = (sxl / sll, 0.0);
        }
        let error = error(&codes, scale, min);
        if error < best_error {
            (best_error, best) = (error, (scale, min));
        }
    }
    best
}

/// Codes in `0..=levels` and the scale for values that are not negative (scales, minima).
pub(super) fn positive<const N: usize>(x: &[f32; N], w: &[f32; N], levels: f32) -> (f32, [f32; N]) {
    let high = x.iter().copied().fold(0.0, f32::max);
    if high < TINY {
        return (0.0, [0.0; N]);
    }
    let codes_of = |inverse: f32| x.map(|x| to_code(inverse * x, 0.0, levels));
    let mut best = f32::INFINITY;
    let mut codes = [0.0; N];
    for stretch in [0, -4, -3, -2, -1, 1, 2, 3, 4] {
        let inverse = (levels + 0.1 * stretch as f32) / high;
        let tried = codes_of(inverse);
        let scale = 1.0 / inverse;
        let [error] = sums::<N, 1>(|i| {
            let off = x[i] - scale * tried[i];
            [w[i] * off * off]
        });
        if error < best {
            (best, codes) = (error, tried);
        }
    }
    let scale = descend(x, w, &mut codes, 0.0, levels);
    (scale, codes)
}

/// Values between which [`iq4_value`] changes, and the change: the midpoints of the IQ4
/// values and their differences.
const IQ4_STEPS: [(f32, f32); 15] = {
    let mut steps = [(0.0, 0.0); 15];
    let mut i = 0;
    while i < 15 {
        let (a, b) = (grids::IQ4[i] as f32, grids::IQ4[i + 1] as f32);
        steps[i] = ((a + b) * 0.5, b - a);
        i += 1;
    }
    steps
};

/// The IQ4 value nearest to `x`, the upper of two equally near.
#[inline(always)]
fn iq4_value(x: f32) -> f32 {
    let mut value = f32::from(grids::IQ4[0]);
    for (at, step) in IQ4_STEPS {
        value += if x >= at { step } else { 0.0 };
    }
    value
}

/// The nibble of the IQ4 value nearest to `x`.
#[inline(always)]
pub(super) fn iq4_code(x: f32) -> u8 {
    IQ4_STEPS.iter().map(|&(at, _)| u8::from(x >= at)).sum()
}

/// The scale `s` of the least `Σ w (x − s·v)²` over IQ4 values `v`.
pub(super) fn iq4(x: &[f32; 32], w: &[f32; 32]) -> f32 {
    let peak = peak(x);
    if peak.abs() < TINY {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0, 0.0);
    // The table is lopsided: the peak gets the longer, negative end, stretched this way and
    // that, or once the positive one.
    let ends = std::iter::once(127.0 / peak)
        .chain((-7..=7).map(|stretch| (stretch as f32 - 127.0) / peak));
    for inverse in ends {
        let [sxv, svv] = sums::<32, 2>(|i| {
            let v = iq4_value(inverse * x[i]);
            [w[i] * x[i] * v, w[i] * v * v]
        });
        let gain = gain(sxv, svv);
        if gain > best {
            (best, scale) = (gain, sxv / svv);
        }
    }
    scale
}
