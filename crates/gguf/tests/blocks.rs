//! Block formats against ggml's numpy implementation and their own contracts.

use tegula_gguf::{
    GgmlType,
    blocks::{self, BlockError},
};

/// The bytes that `data/blocks_golden.py` feeds to the reference.
fn seeded_bytes(mut seed: u64, n: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(n + 8);
    while out.len() < n {
        seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        out.extend((z ^ (z >> 31)).to_le_bytes());
    }
    out.truncate(n);
    out
}

fn block_seed(ty: GgmlType, index: u64) -> u64 {
    (u64::from(ty.id()) << 32) + index
}

fn fnv1a(bits: &[u32]) -> u64 {
    bits.iter()
        .flat_map(|b| b.to_le_bytes())
        .fold(0xCBF2_9CE4_8422_2325, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3)
        })
}

fn bits(weights: &[f32]) -> Vec<u32> {
    weights
        .iter()
        .map(|w| if w.is_nan() { 0x7FC0_0000 } else { w.to_bits() })
        .collect()
}

fn dequantized(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / ty.block_bytes() * ty.block_len()];
    blocks::dequantize(ty, bytes, &mut out).unwrap();
    out
}

/// Every quantised type that this build reads.
fn quantised_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL.iter().copied().filter(|t| t.is_quantized())
}

#[test]
fn dequantizes_random_blocks_as_the_reference_does() {
    let golden = include_str!("data/blocks_golden.tsv");
    let mut seen = std::collections::BTreeSet::new();
    for line in golden.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [name, index, hash, samples @ ..] = fields.as_slice() else {
            panic!("{line}")
        };
        let ty: GgmlType = name.parse().unwrap();
        let count = if ty.is_quantized() { 1 } else { 32 };
        let bytes = seeded_bytes(
            block_seed(ty, index.parse().unwrap()),
            ty.block_bytes() * count,
        );
        let bits = bits(&dequantized(ty, &bytes));
        let ours: Vec<String> = bits
            .iter()
            .step_by(bits.len() / 8)
            .map(|b| format!("{b:08x}"))
            .collect();
        assert_eq!(ours, samples, "{name} block {index}");
        assert_eq!(
            format!("{:016x}", fnv1a(&bits)),
            *hash,
            "{name} block {index}"
        );
        seen.insert(ty);
    }
    let readable = GgmlType::ALL
        .iter()
        .copied()
        .filter(|&t| blocks::can_dequantize(t));
    assert!(readable.eq(seen), "a readable type has no golden blocks");
}

#[test]
fn every_quantised_type_is_readable() {
    for ty in quantised_types() {
        assert!(blocks::can_dequantize(ty), "{ty}");
        assert!(matches!(blocks::group_len(ty), Some(16 | 32)), "{ty}");
    }
}

#[test]
fn codes_scales_and_mins_make_the_weights() {
    for ty in quantised_types() {
        let (blocks_n, group) = (9, blocks::group_len(ty).unwrap());
        let len = blocks_n * ty.block_len();
        let groups = len / group;
        for seed in 0..20 {
            let bytes = seeded_bytes(block_seed(ty, 1000 + seed), blocks_n * ty.block_bytes());
            let mut codes = vec![0i8; len];
            let mut scales = vec![0f32; groups];
            let mut mins = vec![0f32; if blocks::has_min(ty) { groups } else { 0 }];
            blocks::decode_codes(ty, &bytes, &mut codes, &mut scales, &mut mins).unwrap();
            let rebuilt: Vec<f32> = codes
                .iter()
                .enumerate()
                .map(|(i, &c)| {
                    let w = scales[i / group] * f32::from(c);
                    if mins.is_empty() {
                        w
                    } else {
                        w + mins[i / group]
                    }
                })
                .collect();
            assert_eq!(
                bits(&rebuilt),
                bits(&dequantized(ty, &bytes)),
                "{ty} seed {seed}"
            );
        }
    }
}

#[test]
fn wrong_lengths_and_types_are_errors() {
    let ragged = blocks::dequantize(GgmlType::Q4_0, &[0; 19], &mut [0.0; 32]).unwrap_err();
    assert_eq!(
        ragged.to_string(),
        "Q4_0: 19 bytes are no whole number of blocks of 18"
    );
    let short = blocks::dequantize(GgmlType::Q4_0, &[0; 18], &mut [0.0; 31]).unwrap_err();
    assert_eq!(
        short.to_string(),
        "Q4_0: destination holds 31 elements, not 32"
    );
    let integer = blocks::dequantize(GgmlType::I32, &[0; 4], &mut [0.0]).unwrap_err();
    assert_eq!(integer.to_string(), "I32 cannot be dequantised");
    let plain = blocks::decode_codes(GgmlType::F16, &[0; 2], &mut [0], &mut [0.0], &mut []);
    assert!(matches!(
        plain,
        Err(BlockError::Unsupported {
            ty: GgmlType::F16,
            ..
        })
    ));
    for ty in quantised_types() {
        // No input at all is zero blocks, which is fine.
        blocks::dequantize(ty, &[], &mut []).unwrap();
        let bytes = vec![0; ty.block_bytes()];
        let mut codes = vec![0; ty.block_len()];
        let groups = ty.block_len() / blocks::group_len(ty).unwrap();
        let wrong_mins = if blocks::has_min(ty) { 0 } else { groups };
        let (mut scales, mut mins) = (vec![0.0; groups], vec![0.0; wrong_mins]);
        assert!(
            blocks::decode_codes(ty, &bytes, &mut codes, &mut scales, &mut mins).is_err(),
            "{ty}"
        );
    }
}

/// The weights that `data/blocks_golden.py` feeds to the reference: bell-shaped, spread 0.018.
fn seeded_weights(seed: u64, n: usize) -> Vec<f32> {
    let bytes = seeded_bytes(seed, 8 * n);
    let (words, _) = bytes.as_chunks::<8>();
    words
        .iter()
        .map(|&word| {
            let (halves, _) = word.as_chunks::<2>();
            let sum: i32 = halves
                .iter()
                .map(|&h| i32::from(u16::from_le_bytes(h)))
                .sum();
            (sum - 131_070) as f32 / (1 << 21) as f32
        })
        .collect()
}

fn quantized(ty: GgmlType, weights: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0xA5; weights.len() / ty.block_len() * ty.block_bytes()];
    blocks::quantize(ty, weights, importance, &mut out).unwrap_or_else(|e| panic!("{ty}: {e}"));
    out
}

fn writable_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL
        .iter()
        .copied()
        .filter(|&t| blocks::can_quantize(t))
}

/// Root of the weighted mean square error over that of the weights.
fn relative_error(weights: &[f32], made: &[f32], importance: Option<&[f32]>) -> f64 {
    let (mut error, mut all) = (0.0, 0.0);
    for (i, (&w, &m)) in weights.iter().zip(made).enumerate() {
        let c = importance.map_or(1.0, |f| f64::from(f[i % f.len()]));
        error += c * (f64::from(w) - f64::from(m)).powi(2);
        all += c * f64::from(w).powi(2);
    }
    (error / all).sqrt()
}

#[test]
fn quantizes_as_the_reference_does() {
    let mut seen = std::collections::BTreeSet::new();
    for line in include_str!("data/quantize_golden.tsv").lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [name, row, blocks] = fields.as_slice() else {
            panic!("{line}")
        };
        let ty: GgmlType = name.parse().unwrap();
        let ours = quantized(
            ty,
            &seeded_weights(7 + row.parse::<u64>().unwrap(), 128),
            None,
        );
        let ours: String = ours.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(ours, *blocks, "{name} row {row}");
        seen.insert(ty);
    }
    assert_eq!(seen.len(), 8);
}

#[test]
fn quantizes_nvfp4_as_ggml_does() {
    let golden = include_str!("data/nvfp4_golden.tsv");
    for line in golden.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let ["NVFP4", row, factor, blocks] = fields.as_slice() else {
            panic!("{line}")
        };
        let factor: f32 = factor.parse().unwrap();
        let weights: Vec<f32> = seeded_weights(7 + row.parse::<u64>().unwrap(), 128)
            .iter()
            .map(|w| w * factor)
            .collect();
        let ours = quantized(GgmlType::NVFP4, &weights, None);
        let ours: String = ours.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(ours, *blocks, "row {row} times {factor}");
    }
    assert_eq!(golden.lines().count(), 18);
}

#[test]
fn facts_of_every_type() {
    let weights = seeded_weights(1, 64 * 256);
    // A third of the columns counts not at all, the others very differently.
    let importance: Vec<f32> = seeded_weights(2, 512)
        .iter()
        .map(|w| (w * 100.0).powi(3).max(0.0))
        .collect();
    let mut table = String::new();
    for &ty in GgmlType::ALL {
        let group = blocks::group_len(ty).map_or("-".into(), |g| g.to_string());
        let min = if blocks::has_min(ty) { "min" } else { "-" };
        let readable = if blocks::can_dequantize(ty) {
            "reads"
        } else {
            "-"
        };
        table += &format!(
            "{ty:8}{:4} weights {:4} bytes  G {group:3} {min:4} {readable:6}",
            ty.block_len(),
            ty.block_bytes()
        );
        if blocks::can_quantize(ty) {
            let bytes = quantized(ty, &weights, None);
            let words: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).collect();
            let weighted = quantized(ty, &weights, Some(&importance));
            let plain_error = relative_error(&weights, &dequantized(ty, &bytes), None);
            let [before, after] = [&bytes, &weighted]
                .map(|b| relative_error(&weights, &dequantized(ty, b), Some(&importance)));
            table += &format!(
                " writes {:016x}  error {plain_error:.5}  weighted {before:.5} -> {after:.5}",
                fnv1a(&words)
            );
            assert!(after <= before, "{ty}: importance makes it worse");
        }
        table.truncate(table.trim_end().len());
        table.push('\n');
    }
    insta::assert_snapshot!(table);
}

/// What a type may lose on bell-shaped weights.
fn error_bound(ty: GgmlType) -> f64 {
    match ty {
        GgmlType::F32 => 0.0,
        GgmlType::F16 => 0.0005,
        GgmlType::BF16 => 0.003,
        GgmlType::Q8_0 => 0.0056,
        GgmlType::Q6_K => 0.0185,
        GgmlType::Q5_1 | GgmlType::Q5_K => 0.039,
        GgmlType::Q5_0 => 0.044,
        GgmlType::Q4_1 | GgmlType::Q4_K | GgmlType::IQ4_NL | GgmlType::IQ4_XS => 0.08,
        GgmlType::Q4_0 => 0.09,
        GgmlType::NVFP4 => 0.1,
        GgmlType::MXFP4 => 0.12,
        GgmlType::Q3_K => 0.16,
        GgmlType::Q2_K => 0.31,
        _ => unreachable!("{ty} is not written"),
    }
}

#[test]
fn errors_stay_within_bounds_at_every_magnitude() {
    for ty in writable_types() {
        // Scales that f16 holds as normal numbers, from one end to the other; E4M3 has fewer.
        let exponents: &[i32] = match ty {
            GgmlType::NVFP4 => &[4, 8, 12],
            _ => &[-4, 0, 6, 12],
        };
        for &exponent in exponents {
            let factor = 2f32.powi(exponent);
            let weights: Vec<f32> = seeded_weights(3, 32 * 256)
                .iter()
                .map(|w| w * factor)
                .collect();
            let error = relative_error(
                &weights,
                &dequantized(ty, &quantized(ty, &weights, None)),
                None,
            );
            assert!(error <= error_bound(ty), "{ty} at 2^{exponent}: {error}");
        }
    }
}

#[test]
fn special_rows() {
    let base = seeded_weights(4, 512);
    let row = |f: &dyn Fn(usize) -> f32| (0..512).map(f).collect::<Vec<f32>>();
    let rows = [
        ("zeros", row(&|_| 0.0)),
        ("negative zeros", row(&|_| -0.0)),
        ("ones", row(&|_| 1.0)),
        ("minus ones", row(&|_| -1.0)),
        ("one spike", row(&|i| if i == 77 { -3.0 } else { 0.0 })),
        ("all positive", row(&|i| base[i].abs())),
        ("all negative", row(&|i| -base[i].abs())),
        ("subnormal", row(&|i| base[i] * 1e-38)),
        (
            "a group of zeros",
            row(&|i| if i / 16 % 2 == 0 { 0.0 } else { base[i] }),
        ),
        (
            "five orders",
            row(&|i| base[i] * 10f32.powi(-((i % 6) as i32))),
        ),
        ("alternating", row(&|i| if i % 2 == 0 { 0.5 } else { -0.5 })),
    ];
    for ty in writable_types() {
        for (name, weights) in &rows {
            for importance in [None, Some(vec![0.0; 512]), Some(row(&|i| (i % 3) as f32))] {
                let made = dequantized(ty, &quantized(ty, weights, importance.as_deref()));
                let peak = weights.iter().fold(0f32, |a, w| a.max(w.abs()));
                for (i, (&w, &m)) in weights.iter().zip(&made).enumerate() {
                    // No weight moves by more than the block's span, whatever is asked.
                    assert!(
                        (w - m).abs() <= 1.05 * peak + 1e-7,
                        "{ty} {name} weight {i}: {w} became {m}"
                    );
                }
                // A constant is every format's to hold: half a step at worst, and 0 exactly.
                if matches!(*name, "zeros" | "negative zeros") {
                    assert!(made.iter().all(|&m| m == 0.0), "{ty} {name}");
                } else if importance.is_none() && matches!(*name, "ones" | "minus ones") {
                    let error = relative_error(weights, &made, None);
                    assert!(error < 0.15, "{ty} {name}: {error}");
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_quantised_is_an_error() {
    let mut weights = vec![0.5f32; 512];
    weights[300] = f32::NAN;
    let mut out = vec![0; 2048];
    for ty in writable_types() {
        let out = &mut out[..512 / ty.block_len() * ty.block_bytes()];
        let error = blocks::quantize(ty, &weights, None, out).unwrap_err();
        assert_eq!(error.to_string(), format!("{ty}: weight 300 is NaN"));

        let factors = [1.0, 1.0, -1.0].repeat(86);
        let error = blocks::quantize(ty, &[0.5; 512], Some(&factors[..256]), out).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{ty}: importance of column 2 is -1")
        );
        // A row longer than all the weights.
        assert!(
            blocks::quantize(ty, &[0.5; 512], Some(&[1.0; 1024]), out).is_err(),
            "{ty}"
        );
        assert!(
            blocks::quantize(ty, &[0.5; 512], Some(&[]), out).is_err(),
            "{ty}"
        );
        assert!(
            blocks::quantize(ty, &[0.5; 511], None, out).is_err(),
            "{ty}"
        );
        blocks::quantize(ty, &[], None, &mut []).unwrap();

        let mut large = vec![0.5f32; 512];
        large[400] = f32::MAX;
        match blocks::quantize(ty, &large, None, out) {
            // An exponent of eight bits holds it.
            Ok(()) => assert!(matches!(ty, GgmlType::F32 | GgmlType::MXFP4), "{ty}"),
            Err(BlockError::TooLarge { index, .. }) => {
                assert_eq!(index, 400 / ty.block_len() * ty.block_len(), "{ty}");
            }
            Err(other) => panic!("{ty}: {other}"),
        }
    }
    let read_only = blocks::quantize(GgmlType::IQ2_XS, &[0.0; 256], None, &mut [0; 74]);
    assert_eq!(
        read_only.unwrap_err().to_string(),
        "IQ2_XS cannot be quantised"
    );
}

#[test]
fn only_ratios_of_importance_count() {
    let weights = seeded_weights(8, 1024);
    let importance: Vec<f32> = seeded_weights(9, 512).iter().map(|w| w.abs()).collect();
    for ty in writable_types() {
        let expected = quantized(ty, &weights, Some(&importance));
        for exponent in [-100, 60, 127] {
            let factors: Vec<f32> = importance.iter().map(|f| f * 2f32.powi(exponent)).collect();
            assert_eq!(
                quantized(ty, &weights, Some(&factors)),
                expected,
                "{ty} 2^{exponent}"
            );
        }
    }
}

/// Importance is one row's, whatever the number of rows, and rows do not mix.
#[test]
fn rows_are_quantised_alone() {
    let weights = seeded_weights(5, 4 * 512);
    let importance: Vec<f32> = seeded_weights(6, 512).iter().map(|w| w.abs()).collect();
    for ty in writable_types() {
        for importance in [None, Some(&importance[..])] {
            let rows: Vec<u8> = weights
                .chunks(512)
                .flat_map(|row| quantized(ty, row, importance))
                .collect();
            assert_eq!(quantized(ty, &weights, importance), rows, "{ty}");
        }
    }
}

mod any_input {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// No bytes, no lengths make reading panic, and both readings agree on success.
        #[test]
        fn reads(ty in select(GgmlType::ALL), bytes in vec(any::<u8>(), 0..500), len in 0..600usize) {
            let mut out = vec![0.0; len];
            let _ = blocks::dequantize(ty, &bytes, &mut out);
            let whole = bytes.len() / ty.block_bytes();
            let bytes = &bytes[..whole * ty.block_bytes()];
            let mut out = vec![0.0; whole * ty.block_len()];
            let readable = blocks::dequantize(ty, bytes, &mut out).is_ok();
            prop_assert_eq!(readable, blocks::can_dequantize(ty));
        }

        /// No weights make writing panic; what it accepts comes back finite.
        #[test]
        fn writes(
            ty in select(writable_types().collect::<Vec<_>>()),
            weights in prop_oneof![
                vec(any::<u32>().prop_map(f32::from_bits), 256),
                vec(proptest::num::f32::NORMAL | proptest::num::f32::ZERO, 256),
                (vec(-1f32..1.0, 256), -40i32..40)
                    .prop_map(|(w, e)| w.iter().map(|w| w * 2f32.powi(e)).collect()),
            ],
            importance in prop_oneof![
                Just(None),
                vec(0f32..1e6, 256).prop_map(Some),
                vec(proptest::num::f32::POSITIVE, 256).prop_map(Some),
            ],
        ) {
            let mut out = vec![0; 256 / ty.block_len() * ty.block_bytes()];
            if blocks::quantize(ty, &weights, importance.as_deref(), &mut out).is_ok() {
                let made = dequantized(ty, &out);
                prop_assert!(made.iter().all(|w| w.is_finite()), "{ty}: {made:?}");
            } else {
                let large = if ty == GgmlType::NVFP4 { 2688.0 } else { 1e4 };
                prop_assert!(weights.iter().any(|w| w.abs() > large || !w.is_finite()), "{ty}");
            }
        }
    }
}
