//! Exit codes, which error means which, and how errors are shown.
//!
//! 0 ok, 2 usage, 3 bad model or input, 4 requirement not met, 70 internal error.

use crate::hub::HubError;
use phase2_perf::{plot::PlotError, record::BenchRecordError};
use phase4_parity::oracle::OracleError;
use phase5_sparamx::prune::PruneError;
use std::{fmt::Write as _, io, process::ExitCode};
use tegula_gguf::TemplateError;
use tegula_kernels::device::DeviceError;
use tegula_lab::RecordError;

const USAGE: u8 = 2;
const INPUT: u8 = 3;
const REQUIREMENT: u8 = 4;
const INTERNAL: u8 = 70;

/// What this program itself refuses; the libraries' errors are about models and input.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Flags that contradict each other or ask for what there is not.
    #[error("{0}")]
    Usage(String),
    /// A prompt or a text that can't be used.
    #[error("{0}")]
    Input(String),
    /// The machine lacks something.
    #[error("{0}")]
    Requirement(String),
}

/// The exit code that belongs to an error.
pub fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        match cause.downcast_ref() {
            Some(Refusal::Usage(_)) => return USAGE,
            Some(Refusal::Input(_)) => return INPUT,
            Some(Refusal::Requirement(_)) => return REQUIREMENT,
            None => {}
        }
        match cause.downcast_ref() {
            Some(tegula_engine::Error::Placement(_)) => return USAGE,
            Some(tegula_engine::Error::Device(DeviceError::Failed { .. })) => return INTERNAL,
            Some(
                tegula_engine::Error::Memory { .. }
                | tegula_engine::Error::DeviceMemory { .. }
                | tegula_engine::Error::Device(_),
            ) => return REQUIREMENT,
            _ => {}
        }
        if let Some(BenchRecordError::Refused(_)) = cause.downcast_ref() {
            return REQUIREMENT;
        }
        match cause.downcast_ref() {
            Some(PruneError::Sparsity(_) | PruneError::Nothing(_)) => return USAGE,
            Some(PruneError::Observed) => return INTERNAL,
            Some(PruneError::Engine(tegula_engine::Error::Memory { .. })) => return REQUIREMENT,
            Some(_) => return INPUT,
            None => {}
        }
        if cause.is::<tegula_engine::Error>()
            || cause.is::<tegula_gguf::Error>()
            || cause.is::<TemplateError>()
            || cause.is::<OracleError>()
            || cause.is::<RecordError>()
            || cause.is::<BenchRecordError>()
            || cause.is::<PlotError>()
            || cause.is::<HubError>()
            || cause.is::<io::Error>()
        {
            return INPUT;
        }
    }
    INTERNAL
}

/// The error with its causes, as shown: a cause that its consequence already quotes is left
/// out.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            // Writing to a String can't fail.
            let _ = write!(text, "\n  caused by: {cause}");
        }
    }
    text
}

/// True where a device failed in the middle of its work.
fn lost(error: &anyhow::Error) -> bool {
    let failed = |e: &tegula_engine::Error| {
        matches!(e, tegula_engine::Error::Device(DeviceError::Failed { .. }))
    };
    error.chain().any(|e| e.downcast_ref().is_some_and(failed))
}

/// Shows what went wrong, if anything, and gives the process its exit code. A reader that
/// has closed the pipe is content with what it got.
pub fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let closed = |cause: &(dyn std::error::Error + 'static)| {
        let io = cause.downcast_ref::<io::Error>();
        io.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(closed) {
        return ExitCode::SUCCESS;
    }
    let code = code(&error);
    say!("{}", describe(&error));
    if lost(&error) {
        say!("  the GPU may be lost; the system's log and nvidia-smi may say why");
    } else if code == INTERNAL {
        say!("  this is a defect in tegula: please report it with the command line");
    }
    ExitCode::from(code)
}

/// Runs the program; a panic is an internal error.
pub fn guard(run: impl FnOnce() -> anyhow::Result<()> + std::panic::UnwindSafe) -> ExitCode {
    match std::panic::catch_unwind(run) {
        Ok(result) => report(result),
        Err(_) => {
            say!("error: internal error; please report it with the command line");
            ExitCode::from(INTERNAL)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn every_kind_of_error_has_its_code() {
        let of = |e: anyhow::Error| code(&e.context("while testing"));
        assert_eq!(of(Refusal::Usage(String::new()).into()), 2);
        assert_eq!(of(Refusal::Input(String::new()).into()), 3);
        assert_eq!(of(tegula_engine::Error::Empty("prompt").into()), 3);
        assert_eq!(of(io::Error::from(io::ErrorKind::NotFound).into()), 3);
        assert_eq!(of(Refusal::Requirement(String::new()).into()), 4);
        assert_eq!(of(anyhow::anyhow!("what is this?")), 70);
    }

    #[test]
    fn faults_of_devices_are_requirements_or_internal() {
        use tegula_engine::{Error, LoadOptions, Model, OffloadFlags, offload::Split};
        use tegula_kernels::{
            Tier,
            device::{Device, sim::SimDevice},
        };
        let of = |e: Error| code(&anyhow::Error::from(e).context("while testing"));
        let unusable = DeviceError::Unusable("the driver is too old".into());
        assert_eq!(of(unusable.into()), 4);
        let device = std::sync::Arc::new(SimDevice::new("SIM0", 1 << 20, Tier::Scalar));
        let full = device.alloc(2 << 20).unwrap_err();
        assert_eq!(of(full.into()), 4);
        let load = |set: &dyn Fn(&mut OffloadFlags)| {
            let options = LoadOptions::new(crate::args::embedded());
            let devices = vec![std::sync::Arc::clone(&device) as _];
            let mut options = options.with_devices(devices).unwrap();
            options.threads = 1;
            set(&mut options.offload);
            Model::load(&options, &mut |_| {}).unwrap_err()
        };
        let all = tegula_engine::offload::GpuLayers::Count(99);
        let too_large = load(&|f| f.layers = all);
        assert!(too_large.to_string().contains("-ngl"), "{too_large}");
        assert_eq!(of(too_large), 4);
        let shares = load(&|f| f.shares = Some(vec![1.0, 2.0]));
        assert!(
            shares.to_string().contains("-ts has 2 shares for 1"),
            "{shares}"
        );
        assert_eq!(of(shares), 2);
        let main = load(&|f| (f.split, f.main) = (Split::None, 3));
        assert_eq!(of(main), 2);
        device.fail_after(0);
        let error = anyhow::Error::from(Error::from(device.sync().unwrap_err()));
        assert!(lost(&error));
        assert_eq!(code(&error), 70);
        assert!(!lost(&anyhow::anyhow!("what is this?")));
    }

    #[test]
    fn causes_are_shown_once() {
        let io = io::Error::from(io::ErrorKind::NotFound);
        let quoted = tegula_engine::Error::Io {
            path: "a".into(),
            action: "read",
            source: io,
        };
        assert_eq!(
            describe(&quoted.into()),
            "error: a: cannot read: entity not found"
        );
        let inner: anyhow::Result<()> = Err(Refusal::Input("too long".into()).into());
        let outer = inner.context("the prompt").unwrap_err();
        assert_eq!(describe(&outer), "error: the prompt\n  caused by: too long");
    }
}
