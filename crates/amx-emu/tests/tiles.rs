//! The tile model against products written the obvious way, and its faults.

use amx_emu::{Fault, Op, TileConfig, TileState};

fn state(rows: u8, depth_bytes: u16, columns: u16) -> TileState {
    let mut state = TileState::new();
    let shapes = [
        (rows, 4 * columns),
        (rows, depth_bytes),
        ((depth_bytes / 4) as u8, 4 * columns),
    ];
    let mut all = [(0, 0); 8];
    all[..3].copy_from_slice(&shapes);
    state.configure(TileConfig::new(all)).unwrap();
    state
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as u8
        })
        .collect()
}

fn fill(state: &mut TileState, tile: usize, from: &[u8], stride: usize) {
    state
        .load(tile, |row, line| {
            line.copy_from_slice(&from[row * stride..][..line.len()])
        })
        .unwrap();
}

#[test]
fn integer_products_equal_the_definition_for_all_signs_and_shapes() {
    for (rows, depth, columns) in [
        (16u8, 64u16, 16u16),
        (1, 4, 1),
        (7, 28, 5),
        (16, 32, 16),
        (3, 64, 2),
    ] {
        for op in [Op::TdpBssd, Op::TdpBsud, Op::TdpBusd, Op::TdpBuud] {
            let mut tiles = state(rows, depth, columns);
            let (a, b) = (bytes(1, 1024), bytes(2, 1024));
            let c = bytes(3, 1024);
            fill(&mut tiles, 0, &c, 64);
            fill(&mut tiles, 1, &a, 64);
            fill(&mut tiles, 2, &b, 64);
            tiles.dot(op, 0, 1, 2).unwrap();
            let signed_a = matches!(op, Op::TdpBssd | Op::TdpBsud);
            let signed_b = matches!(op, Op::TdpBssd | Op::TdpBusd);
            let widen = |x: u8, signed: bool| {
                if signed {
                    i64::from(x as i8)
                } else {
                    i64::from(x)
                }
            };
            for m in 0..usize::from(rows) {
                for n in 0..usize::from(columns) {
                    let old = i32::from_le_bytes(c[64 * m + 4 * n..][..4].try_into().unwrap());
                    let mut want = i64::from(old);
                    for k in 0..usize::from(depth) {
                        let x = widen(a[64 * m + k], signed_a);
                        // B holds groups of four k side by side in each dword.
                        let y = widen(b[64 * (k / 4) + 4 * n + k % 4], signed_b);
                        want += x * y;
                    }
                    let got = i32::from_le_bytes(tiles.row(0, m)[4 * n..][..4].try_into().unwrap());
                    assert_eq!(
                        got, want as i32,
                        "{op:?} {rows}x{depth}x{columns} at {m},{n}"
                    );
                }
            }
            for m in 0..16 {
                let used = if m < usize::from(rows) {
                    4 * usize::from(columns)
                } else {
                    0
                };
                assert!(
                    tiles.row(0, m)[used..].iter().all(|&x| x == 0),
                    "upper part is zeroed"
                );
            }
        }
    }
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes())
        .collect()
}

fn dot_one(c: f32, a: [f32; 2], b: [f32; 2]) -> f32 {
    let mut tiles = state(1, 4, 1);
    fill(&mut tiles, 0, &f32s(&[c]), 64);
    fill(&mut tiles, 1, &bf16s(&a), 64);
    fill(&mut tiles, 2, &bf16s(&b), 64);
    tiles.dot(Op::TdpBf16Ps, 0, 1, 2).unwrap();
    f32::from_le_bytes(tiles.row(0, 0)[..4].try_into().unwrap())
}

#[test]
fn bf16_rounds_to_even_and_flushes_subnormals() {
    assert_eq!(dot_one(1.0, [2.0, 3.0], [5.0, 7.0]), 32.0);
    // Half an ulp of 1.0 ties to even: up only when something lies below the tie.
    let half_ulp = f32::EPSILON / 2.0;
    assert_eq!(dot_one(1.0, [half_ulp, 0.0], [1.0, 0.0]), 1.0);
    assert_eq!(
        dot_one(1.0 + f32::EPSILON, [half_ulp, 0.0], [1.0, 0.0]),
        1.0 + 2.0 * f32::EPSILON
    );
    // Subnormal inputs and results count as zero, and the sign survives.
    assert_eq!(dot_one(0.0, [1e-40, 0.0], [1e30, 0.0]), 0.0);
    assert_eq!(dot_one(1e-40, [0.0, 0.0], [0.0, 0.0]), 0.0);
    let tiny = f32::MIN_POSITIVE;
    assert_eq!(dot_one(0.0, [tiny, 0.0], [0.5, 0.0]), 0.0);
    assert!(dot_one(0.0, [f32::NAN, 0.0], [1.0, 0.0]).is_nan());
    assert_eq!(
        dot_one(0.0, [f32::INFINITY, 0.0], [1.0, 0.0]),
        f32::INFINITY
    );
}

#[test]
fn configurations_are_checked_as_the_processor_does() {
    let good = TileConfig::new([(16, 64); 8]);
    let mut state = TileState::new();
    state.configure(good).unwrap();
    assert_eq!(state.config(), good);
    type Damage = fn(&mut [u8; 64]);
    let broken: [(&str, Damage); 7] = [
        ("palette 2", |c| c[0] = 2),
        ("reserved byte 2", |c| c[2] = 1),
        ("reserved byte 15", |c| c[15] = 1),
        ("row length of tile 8", |c| c[32] = 4),
        ("rows of tile 8", |c| c[56] = 1),
        ("17 rows", |c| c[48] = 17),
        ("rows without columns", |c| c[16] = 0),
    ];
    for (what, damage) in broken {
        let mut bytes = good.0;
        damage(&mut bytes);
        assert_eq!(
            state.configure(TileConfig(bytes)),
            Err(Fault::GeneralProtection),
            "{what}"
        );
        assert_eq!(
            state.config(),
            good,
            "{what}: a refused configuration changes nothing"
        );
    }
    let mut wide = good.0;
    wide[16] = 65;
    assert_eq!(
        state.configure(TileConfig(wide)),
        Err(Fault::GeneralProtection)
    );
    state.release();
    assert_eq!(state.config(), TileConfig::INIT);
    assert_eq!(
        state.zero(0),
        Err(Fault::UndefinedOpcode),
        "nothing is configured"
    );
}

#[test]
fn products_refuse_shapes_that_do_not_fit() {
    let mut state = TileState::new();
    let mut shapes = [(16, 64); 8];
    shapes[3] = (8, 64);
    shapes[4] = (16, 62);
    shapes[5] = (0, 0);
    state.configure(TileConfig::new(shapes)).unwrap();
    assert_eq!(state.dot(Op::TdpBssd, 0, 1, 2), Ok(()));
    for (dest, a, b) in [
        (0, 0, 1),
        (0, 1, 1),
        (0, 1, 0),
        (0, 3, 1),
        (0, 1, 3),
        (3, 1, 2),
        (4, 1, 2),
        (5, 1, 2),
    ] {
        assert_eq!(
            state.dot(Op::TdpBssd, dest, a, b),
            Err(Fault::UndefinedOpcode),
            "{dest} {a} {b}"
        );
    }
    assert_eq!(
        state.dot(Op::TileZero, 0, 1, 2),
        Err(Fault::UndefinedOpcode)
    );
}

#[test]
fn loads_restart_at_the_start_row_and_clear_it() {
    let mut config = TileConfig::new([(4, 8); 8]);
    config.0[1] = 2;
    let mut state = TileState::new();
    state.configure(config).unwrap();
    let mut rows = Vec::new();
    state
        .load(1, |row, line| {
            rows.push(row);
            line.fill(9);
        })
        .unwrap();
    assert_eq!(rows, [2, 3]);
    assert_eq!(state.config().0[1], 0);
    assert_eq!(state.row(1, 1)[0], 0);
    assert_eq!(state.row(1, 3)[..9], [9, 9, 9, 9, 9, 9, 9, 9, 0]);
}
