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
