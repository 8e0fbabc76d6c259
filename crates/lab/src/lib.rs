//! What the phases share: checks with their requirements, and records of what was measured.
//!
//! A [`Check`] is one task of the master task list made executable. Its [`Outcome`] is
//! passed, failed, or blocked with what it lacked; a check whose subject is not built yet
//! carries [`Need::Unbuilt`] and can't pass. A [`Record`] keeps outcomes or raw samples
//! together with the host, the commit and the command line that they come from.
//!
//! Depends on no other crate of this workspace.
#![forbid(unsafe_code)]

mod check;
mod host;
mod record;

pub use check::{
    Bench, Check, CheckResult, Env, Need, Outcome, Phase, Table, lacking, unbuilt, verify,
};
pub use host::Host;
pub use record::{Date, Record, RecordError, SCHEMA_VERSION, Series, without_places};
