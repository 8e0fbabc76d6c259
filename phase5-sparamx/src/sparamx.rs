//! SparAMX's own layout: to read its layers, and to see where its positions go wrong.
//!
//! A re-creation after the published code (commit fc29bc7 of its repository). Values of a matrix lie in one array in the order of their tiles (16 outputs by 32 or
//! 64 inputs), and each of the threads that a file was packed for begins at a stored index and
//! counts on from there. Where a thread has more than one row of tiles, the packer puts rows
//! of tiles down in pairs, at every step along k the first one's tile and then the second's,
//! because the kernel loads two tiles at a time.
//!
//! The packer pairs rows over the whole matrix, the kernel within its thread's share: with an
//! odd share they disagree. That, and the quantiser, are what [`misplaced`] and
//! [`int8_scale`] show.

pub mod layer;
pub mod torch;

/// The order in which tiles lie in the file: `(row of tiles, step along k)`.
pub fn packed_order(rows: usize, steps: usize, threads: usize) -> Vec<(usize, usize)> {
    let grouped = rows > threads;
    let per = if grouped { 2 } else { 1 };
    let mut order = Vec::with_capacity(rows * steps);
    for first in (0..rows).step_by(per) {
        for step in 0..steps {
            order.extend((first..rows.min(first + per)).map(|row| (row, step)));
        }
    }
    order
}

/// The order in which the kernel of `thread` takes the values for its tiles.
pub fn read_order(rows: usize, steps: usize, threads: usize, thread: usize) -> Vec<(usize, usize)> {
    let share = rows / threads;
    let own = thread * share..(thread + 1) * share;
    let mut order = Vec::with_capacity(share * steps);
    for first in own.clone().step_by(2) {
        for step in 0..steps {
            order.extend((first..own.end.min(first + 2)).map(|row| (row, step)));
        }
    }
    order
}

/// The share of tiles for which the kernel takes another tile's values. `rows` are rows of
/// tiles, a multiple of `threads`.
pub fn misplaced(rows: usize, steps: usize, threads: usize) -> f64 {
    let packed = packed_order(rows, steps, threads);
    let mut wrong = 0;
    for thread in 0..threads {
        let read = read_order(rows, steps, threads, thread);
        // The stored start: where the thread's first tile lies.
        let start = read
            .first()
            .and_then(|first| packed.iter().position(|t| t == first));
        let Some(start) = start else { continue };
        for (i, tile) in read.iter().enumerate() {
            wrong += usize::from(packed.get(start + i) != Some(tile));
        }
    }
    wrong as f64 / packed.len().max(1) as f64
}

/// The factor by which SparAMX's quantiser multiplies a row before it rounds to 8 bits: never
/// more than 1, so that a row of magnitudes below a half becomes zero.
pub fn int8_scale(largest: f32) -> f32 {
    (127.0 / largest).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_shares_are_right_and_odd_ones_are_not() {
        for (rows, threads) in [(48, 24), (64, 16), (16, 16), (256, 32), (896, 16)] {
            assert_eq!(misplaced(rows, 64, threads), 0.0, "{rows} by {threads}");
        }
        // 768 outputs of 2048 inputs on 16 threads: Qwen3's experts.
        let wrong = misplaced(48, 64, 16);
        assert!(wrong > 0.4 && wrong < 0.75, "{wrong}");
    }

    #[test]
    fn usual_weights_round_to_nothing() {
        let kept = |w: f32| (w * int8_scale(0.1)).round() != 0.0;
        assert!(![0.02, -0.05, 0.1].into_iter().any(kept));
        assert!(kept(0.6));
    }
}
