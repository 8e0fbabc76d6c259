//! The isolation probe: runs a model and reports what of AMX was touched, and what a run
//! that touches nothing of it must have in common with one that can't.
//!
//! AMX instructions are counted by trapping them. Without the kernel's permission for tile
//! data they raise SIGILL on every machine, with AMX or without, and the handler of `amx-emu`
//! executes and counts them. So the probe sees everything as long as nothing in this process
//! has asked for the permission, and says so if something has.

use std::{path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tegula_engine::{Batch, Context, ContextOptions, LoadOptions, Model, Plan, Source};
use tegula_kernels::{Amx, Tier, amx::has_permission, mem::allocated};

/// Tokens of prompt: more than any format's least for tiles.
pub const TOKENS: usize = 48;

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Seen {
    /// AMX instructions trapped while loading and running.
    pub instructions: u64,
    /// Whether the process has the kernel's permission for tile data afterwards (XCOMP bit
    /// 18).
    pub permission: bool,
    /// Logits behind the last token, `[vocab]`.
    pub logits: Vec<f32>,
    /// Where everything was put.
    pub plan: Plan,
    /// Buffers allocated while loading and running, and their bytes.
    pub allocated: [u64; 2],
    /// Jobs that the pool ran, their tasks, and a hash of how many each had.
    pub dispatched: [u64; 3],
}

/// The same for another process to compare.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub instructions: u64,
    pub permission: bool,
    /// Bits of the logits.
    pub logits: Vec<u32>,
    /// As `explain --json` has the tensors.
    pub plan: Value,
    pub allocated: [u64; 2],
    pub dispatched: [u64; 3],
}

impl Seen {
    /// What can be handed on as JSON.
    ///
    /// # Errors
    /// Never for the plans that there are; says what can't be written.
    pub fn facts(&self) -> Result<Facts, String> {
        Ok(Facts {
            instructions: self.instructions,
            permission: self.permission,
            logits: self.bits(),
            plan: serde_json::to_value(&self.plan).map_err(|e| e.to_string())?,
            allocated: self.allocated,
            dispatched: self.dispatched,
        })
    }

    /// Bits of the logits.
    pub fn bits(&self) -> Vec<u32> {
        self.logits.iter().map(|l| l.to_bits()).collect()
    }
}

impl Facts {
    /// What differs between two runs, by name; nothing if they are the same.
    pub fn differences(&self, other: &Facts) -> Vec<&'static str> {
        let parts = [
            ("AMX instructions", self.instructions == other.instructions),
            ("the permission", self.permission == other.permission),
            ("logits", self.logits == other.logits),
            ("the plan", self.plan == other.plan),
            ("allocations", self.allocated == other.allocated),
            (
                "the tasks of the pool's jobs",
                self.dispatched == other.dispatched,
            ),
        ];
        let differ = parts.into_iter().filter(|(_, same)| !same);
        differ.map(|(name, _)| name).collect()
    }
}

/// The options of a probe of `model`.
pub fn options(model: &Path, tier: Tier, amx: Option<Amx>, threads: usize) -> LoadOptions {
    LoadOptions {
        tier,
        amx,
        threads,
        ..LoadOptions::new(Source::Path(model.to_owned()))
    }
}

/// Makes AMX instructions trap, so that [`run`] counts them.
///
/// # Errors
/// When they can't be trapped: the process has the permission for tile data, or no handler
/// can be installed.
pub fn trap() -> Result<(), String> {
    if has_permission() {
        return Err("this process has the permission for tile data: AMX can't be trapped".into());
    }
    amx_emu::install().map_err(|e| e.to_string())
}

/// Loads a model and runs a prompt of [`TOKENS`] tokens through it.
///
/// # Errors
/// When the model can't be run.
pub fn run(load: &LoadOptions) -> Result<Seen, String> {
    let before = (amx_emu::total(), allocated());
    let model = Arc::new(Model::load(load, &mut |_| {}).map_err(|e| e.to_string())?);
    let options = ContextOptions {
        context: TOKENS,
        ..ContextOptions::default()
    };
    let mut context = Context::new(Arc::clone(&model), &options).map_err(|e| e.to_string())?;
    let ids: Vec<u32> = (1..=TOKENS as u32).collect();
    let outputs = context
        .decode(&Batch::prompt(0, &ids))
        .map_err(|e| e.to_string())?;
    let (after, jobs) = (allocated(), model.compute().pool.dispatched());
    Ok(Seen {
        instructions: amx_emu::total() - before.0,
        permission: has_permission(),
        logits: outputs.logits(0).to_vec(),
        plan: model.plan().clone(),
        allocated: [
            after.buffers - before.1.buffers,
            after.bytes - before.1.bytes,
        ],
        dispatched: [jobs.jobs, jobs.tasks, jobs.order],
    })
}

/// [`trap`], then [`run`] with two threads.
///
/// # Errors
/// As those.
pub fn probe(model: &Path, tier: Tier, amx: Option<Amx>) -> Result<Seen, String> {
    trap()?;
    run(&options(model, tier, amx, 2))
}
