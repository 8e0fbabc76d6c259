//! The isolation probe: runs a model and reports what of AMX was touched.
//!
//! AMX instructions are counted by trapping them. Without the kernel's permission for tile
//! data they raise SIGILL on every machine, with AMX or without, and the handler of `amx-emu`
//! executes and counts them. So the probe sees everything as long as nothing in this process
//! has asked for the permission, and says so if something has.

use std::{path::Path, sync::Arc};

use tegula_engine::{Batch, Context, ContextOptions, LoadOptions, Model, Plan, Source};
use tegula_kernels::{Amx, Tier, amx::has_permission};

/// Tokens of prompt: more than any format's least for tiles.
pub const TOKENS: usize = 48;

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Seen {
    /// AMX instructions executed while loading and running.
    pub instructions: u64,
    /// Whether the process has the kernel's permission for tile data afterwards (XCOMP bit
    /// 18).
    pub permission: bool,
    /// Logits behind the last token, `[vocab]`.
    pub logits: Vec<f32>,
    /// Where everything was put.
    pub plan: Plan,
}

/// Loads the model and runs a prompt of [`TOKENS`] tokens through it, with `amx` or without.
///
/// # Errors
/// When AMX instructions can't be trapped here, or the model can't be run.
pub fn probe(model: &Path, tier: Tier, amx: Option<Amx>) -> Result<Seen, String> {
    if has_permission() {
        return Err("this process has the permission for tile data: AMX can't be trapped".into());
    }
    amx_emu::install().map_err(|e| e.to_string())?;
    let before = amx_emu::total();
    let load = LoadOptions {
        tier,
        amx,
        threads: 2,
        ..LoadOptions::new(Source::Path(model.to_owned()))
    };
    let model = Model::load(&load, &mut |_| {}).map_err(|e| e.to_string())?;
    let plan = model.plan().clone();
    let options = ContextOptions {
        context: TOKENS,
        ..ContextOptions::default()
    };
    let mut context = Context::new(Arc::new(model), &options).map_err(|e| e.to_string())?;
    let ids: Vec<u32> = (1..=TOKENS as u32).collect();
    let outputs = context
        .decode(&Batch::prompt(0, &ids))
        .map_err(|e| e.to_string())?;
    Ok(Seen {
        instructions: amx_emu::total() - before,
        permission: has_permission(),
        logits: outputs.logits(0).to_vec(),
        plan,
    })
}
