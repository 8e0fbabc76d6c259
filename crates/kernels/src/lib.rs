//! Every CPU instruction-set line of Tegula, the threads that run them, and the memory that
//! they work on. Engine code names operations and formats; only this crate knows ISAs.

pub mod acts;
pub mod ahead;
pub mod amx;
pub mod attn;
mod avx2;
mod avx512;
pub mod check;
pub mod device;
mod disjoint;
pub mod float;
mod generic;
pub mod kv;
pub mod lab;
pub mod mem;
pub mod numa;
pub mod ops;
pub mod pool;
pub mod probe;
pub mod profile;
mod scalar;
pub mod sparse;
pub mod strip;
pub mod table;
pub mod tier;
pub mod weights;

pub use acts::{Acts, Forms};
pub use amx::{Amx, AmxFacts, AmxUnavailable};
pub use numa::Numa;
pub use ops::Compute;
pub use pool::{Pool, PoolConfig};
pub use table::Kernels;
pub use tier::{Avx2, Avx512, Features, Tier};
pub use weights::{Encoding, Weights};
