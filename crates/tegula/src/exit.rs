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
    if code == INTERNAL {
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
