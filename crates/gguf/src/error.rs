//! What can go wrong with a GGUF file.

use std::{io, path::PathBuf};

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a GGUF file could not be read, written or understood.
///
/// Messages are lower-case fragments that name the file and, where there is one, the tensor,
/// the key and the byte offset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory in question.
        path: PathBuf,
        /// What was tried, such as `open` or `write`.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },

    /// The first four bytes are not `GGUF`.
    #[error("{file}: not a GGUF file: starts with {found}{hint}")]
    NotGguf {
        /// The file.
        file: String,
        /// Its first bytes, printable.
        found: String,
        /// What it looks like instead, or nothing.
        hint: &'static str,
    },

    /// A GGUF file whose numbers are stored most significant byte first.
    #[error(
        "{file}: big-endian file: only little-endian GGUF is supported; convert it with gguf-py's gguf_convert_endian.py"
    )]
    BigEndian {
        /// The file.
        file: String,
    },

    /// A GGUF version outside 2 and 3.
    #[error("{file}: GGUF version {version} is not supported (supported: 2 and 3)")]
    Version {
        /// The file.
        file: String,
        /// Its version field.
        version: u32,
    },

    /// The file ends before something it promises.
    #[error(
        "{file}: file is truncated: {what} at offset {offset} needs {needed} bytes, {available} are left"
    )]
    Truncated {
        /// The file.
        file: String,
        /// What was being read.
        what: String,
        /// Where it starts.
        offset: u64,
        /// Bytes it needs (a lower bound for counted things).
        needed: u64,
        /// Bytes from there to the end of the file.
        available: u64,
    },

    /// The header says something that can't be.
    #[error("{file}: malformed GGUF at offset {offset}: {what}")]
    Malformed {
        /// The file.
        file: String,
        /// Where the offending field starts.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },

    /// A tensor's type id is none that this build reads.
    #[error("{file}: tensor `{tensor}`: {}; supported: {}", unknown_type(*id), supported_types())]
    UnknownTensorType {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The id found.
        id: u32,
    },

    /// A newer program wrote the model's sparse tensors.
    #[error(
        "{file}: sparse format version {version} is newer than {}, the newest that this build reads; update tegula, or use a dense file of the model",
        crate::sparse::VERSION
    )]
    SparseVersion {
        /// The file.
        file: String,
        /// Its version of the format.
        version: u32,
    },

    /// A tensor's shape, type and place don't fit together or into the file.
    #[error("{file}: tensor `{tensor}`: {what}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },

    /// The parts of a split model don't belong together.
    #[error("{file}: split model: {what}")]
    Split {
        /// The part at fault.
        file: String,
        /// What is wrong with it.
        what: String,
    },

    /// A metadata key that is needed is not there.
    #[error("{file}: metadata key `{key}` is missing")]
    MissingKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },

    /// A metadata value has another type, or lies outside the range, than its key requires.
    #[error("{file}: metadata key `{key}`: expected {expected}, found {found}")]
    WrongType {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// The type asked for.
        expected: &'static str,
        /// The type, and for scalars the value, that is there.
        found: String,
    },

    /// The vocabulary can't be used.
    #[error("{file}: {source}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What is wrong with it.
        source: crate::tokenizer::TokenizerError,
    },

    /// The caller ended the work; nothing was left at `path`.
    #[error("{}: cancelled", path.display())]
    Cancelled {
        /// The file that would have been written.
        path: PathBuf,
    },

    /// The chat template is missing or can't be used.
    #[error("{file}: {source}")]
    Template {
        /// The file.
        file: String,
        /// What is wrong with it.
        source: crate::chat::TemplateError,
    },

    /// Something this crate has no way to do, such as quantising to a read-only type.
    #[error("{0}")]
    Unsupported(String),
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>, action: &'static str, source: io::Error) -> Self {
        Error::Io {
            path: path.into(),
            action,
            source,
        }
    }

    pub(crate) fn malformed(file: &str, offset: u64, what: impl Into<String>) -> Self {
        Error::Malformed {
            file: file.to_owned(),
            offset,
            what: what.into(),
        }
    }

    pub(crate) fn tensor(file: &str, tensor: &str, what: impl Into<String>) -> Self {
        Error::Tensor {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            what: what.into(),
        }
    }
}

/// Says what is known about a type id that can't be read.
fn unknown_type(id: u32) -> String {
    let known = match id {
        4 => "Q4_2, removed from ggml",
        5 => "Q4_3, removed from ggml",
        9 => "Q8_1, which is for activations only",
        15 => "Q8_K, which is for activations only",
        31..=33 => "Q4_0 interleaved for one CPU, removed from ggml",
        36..=38 => "IQ4_NL interleaved for one CPU, removed from ggml",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        _ => return format!("unknown type id {id}"),
    };
    format!("unsupported type id {id} ({known})")
}

fn supported_types() -> String {
    crate::GgmlType::ALL
        .iter()
        .map(|t| t.name())
        .collect::<Vec<_>>()
        .join(" ")
}
