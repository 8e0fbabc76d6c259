//! Which part of the dense matrices on the CPU a device multiplies for single tokens.
//!
//! Such a product takes as long as its matrix is read, and while the CPU reads from memory as fast
//! as it can, the link to a device is idle. So the last rows of each matrix lie in pinned memory
//! besides, as devices take them; the device reads them over the link and multiplies them while
//! the CPU multiplies the others. The CPU keeps all rows, for batches of more tokens.
//!
//! Decided behind the placement and without any say in it: devices hold the same weights with and
//! without shares. Who multiplies which rows follows from shapes and constants alone, neither from
//! the tier nor from AMX.

use crate::offload::{Device, Offload, OffloadFlags, Unit};
use serde::Serialize;
use std::str::FromStr;
use tegula_gguf::TensorInfo;
use tegula_kernels::{
    device::{
        self,
        stream::{DECODE_SHARE, LEAST_SHARE},
    },
    strip,
};

/// `--decode-share`
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum DecodeShare {
    /// [`DECODE_SHARE`] of matrices of which that is enough to be worth it, unless weights are to
    /// stay on the CPU.
    #[default]
    Auto,
    /// This part of all of them, from 0 to less than 1.
    Fraction(f64),
}

impl FromStr for DecodeShare {
    type Err = String;

    fn from_str(s: &str) -> Result<DecodeShare, String> {
        match (s, s.parse()) {
            ("auto", _) => Ok(DecodeShare::Auto),
            (_, Ok(part @ 0.0..1.0)) => Ok(DecodeShare::Fraction(part)),
            _ => Err("expected a fraction from 0 to less than 1, or auto".to_owned()),
        }
    }
}

/// The last rows of a matrix, which a device multiplies for single tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Share {
    pub device: Device,
    pub rows: usize,
    /// Of pinned memory.
    pub bytes: u64,
}

/// All shares of a model.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shares {
    /// The device's number.
    pub device: usize,
    pub fraction: f64,
    pub matrices: usize,
    /// Pinned memory for them.
    pub bytes: u64,
    /// The most rows of the first, second and third matrix that are multiplied together.
    pub(crate) rows: [usize; 3],
}

/// Where a matrix stands among those that are multiplied together; `None` for what has no shares.
fn place(unit: Unit, name: &str) -> Option<usize> {
    let part = name.splitn(3, '.').nth(2).unwrap_or("");
    match (unit, part.strip_suffix(".weight").unwrap_or("")) {
        (Unit::Output, _) => Some(0),
        (Unit::Attention(_), "attn_q" | "attn_output") => Some(0),
        (Unit::Attention(_), "attn_k") => Some(1),
        (Unit::Attention(_), "attn_v") => Some(2),
        (Unit::Ffn(_), "ffn_gate" | "ffn_down") => Some(0),
        (Unit::Ffn(_), "ffn_up") => Some(1),
        _ => None,
    }
}

/// Hands out shares, and counts them.
pub(crate) struct Sharing {
    fraction: f64,
    /// Bytes of a share that is worth it.
    least: u64,
    all: Option<Shares>,
}

impl Sharing {
    /// Shares for matrices on the CPU, if there is a device that holds weights.
    pub fn new(flags: &OffloadFlags, offload: &Offload) -> Sharing {
        let (fraction, least) = match flags.decode_share {
            DecodeShare::Auto if !flags.op_offload => (0.0, 0),
            DecodeShare::Auto => (DECODE_SHARE, LEAST_SHARE),
            DecodeShare::Fraction(fraction) => (fraction, 0),
        };
        let holds = |d: &usize| offload.devices.get(*d).is_some_and(|d| d.weights > 0);
        let mut devices = [flags.main].into_iter().chain(0..flags.devices.len());
        let device = devices.find(holds).filter(|_| offload.refused.is_none());
        Sharing {
            fraction,
            least,
            all: device.map(|device| Shares {
                device,
                fraction,
                matrices: 0,
                bytes: 0,
                rows: [0; 3],
            }),
        }
    }

    /// The share of a dense matrix on the CPU that is multiplied as a whole.
    pub fn of(&mut self, unit: Unit, tensor: &TensorInfo) -> Option<Share> {
        let all = self.all.as_mut()?;
        let at = place(unit, &tensor.name).filter(|_| !tensor.ty.is_sparse())?;
        let n = usize::try_from(*tensor.shape.get(1)?).ok()?;
        // The CPU has whole strips.
        let here = (n as f64 * (1.0 - self.fraction)).ceil() as usize;
        let rows = n - here.next_multiple_of(strip::ROWS).min(n);
        let bytes = device::matrix_bytes(tensor.ty, rows as u64, tensor.row_len(), 1)?;
        if rows == 0 || bytes < self.least {
            return None;
        }
        all.matrices += 1;
        all.bytes += bytes;
        all.rows[at] = all.rows[at].max(rows);
        Some(Share {
            device: Device::Gpu(all.device),
            rows,
            bytes,
        })
    }

    /// Notes all of them.
    pub fn finish(self, flags: &OffloadFlags, offload: &mut Offload) {
        let Some(all) = self.all.filter(|all| all.matrices > 0) else {
            return;
        };
        offload.summary += &format!(
            "; for single tokens {} multiplies {} of the rows of {} matrices on the CPU, from {:.2} \
             GiB of pinned memory",
            flags.devices[all.device].name,
            all.fraction,
            all.matrices,
            all.bytes as f64 / f64::from(1 << 30),
        );
        offload.shares = Some(all);
    }
}
