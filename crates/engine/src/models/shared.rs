//! Products of single tokens that the CPU shares with a device: see [`crate::share`].

use super::Lane;
use crate::Result;
use tegula_kernels::{Acts, Compute, Weights, device::Matrix};

/// The last rows of matrices that are multiplied together, in pinned memory; of some there may be
/// none.
pub(crate) struct SharedRows {
    pub device: usize,
    pub matrices: Vec<Option<Matrix>>,
}

/// The shares of a layer's matrices on the CPU.
#[derive(Default)]
pub(crate) struct LayerShares {
    /// q, k and v.
    pub qkv: Option<SharedRows>,
    pub out: Option<SharedRows>,
    /// Of a dense network.
    pub gate_up: Option<SharedRows>,
    pub down: Option<SharedRows>,
}

/// Rows that a device multiplies now.
#[derive(Clone, Copy)]
pub(crate) struct Sharing<'a> {
    lane: &'a Lane,
    rows: &'a [Option<Matrix>],
}

impl SharedRows {
    /// Those of the rows that are there, by the devices' lanes.
    pub fn on<'a>(rows: &'a Option<SharedRows>, lanes: &'a [Lane]) -> Option<Sharing<'a>> {
        let SharedRows { device, matrices } = rows.as_ref()?;
        Some(Sharing {
            lane: &lanes[*device],
            rows: matrices,
        })
    }
}

/// `y = x · wᵀ` of each product, or `y += …`. With a share `x` is one token: what `acts` are made
/// of. `next` are the products behind these, in one dispatch.
#[allow(clippy::too_many_arguments)]
pub(crate) fn multiply(
    compute: &Compute,
    sharing: Option<Sharing<'_>>,
    products: &mut [(&Weights, &mut [f32])],
    acts: &Acts,
    x: &[f32],
    adds: bool,
    next: &[&Weights],
) -> Result<()> {
    let ahead = || compute.ahead(next.iter().copied(), acts.m());
    let Some(Sharing { lane, rows }) = sharing else {
        compute.matmul_beside(products, acts, adds, ahead);
        return Ok(());
    };
    let (mut here, mut there) = (Vec::with_capacity(3), Vec::with_capacity(3));
    for ((w, y), rows) in products.iter_mut().zip(rows) {
        let first = w.n() - rows.as_ref().map_or(0, |rows| rows.n);
        let (own, others) = y.split_at_mut(first);
        here.push((*w, own));
        there.push(others);
    }
    let mut sent = Ok(());
    compute.matmul_beside(&mut here, acts, adds, || {
        sent = lane.send(rows, x);
        ahead();
    });
    sent?;
    if !adds {
        return lane.collect(&mut there);
    }
    let mut sums: Vec<Vec<f32>> = there.iter().map(|y| vec![0.0; y.len()]).collect();
    lane.collect(&mut sums.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())?;
    for (y, sums) in there.iter_mut().zip(&sums) {
        compute.add_assign(y, sums);
    }
    Ok(())
}
