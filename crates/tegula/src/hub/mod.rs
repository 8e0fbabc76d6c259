//! Models of a Hugging Face hub: `hf:OWNER/REPO[@REVISION][:QUANT]`.
//!
//! [`reference`] says what a name means, [`cache`] where files are (in `huggingface_hub`'s own
//! layout, so that other programs find them, too), [`client`] how they get there.

pub mod cache;
mod client;
pub mod reference;

pub use cache::Cache;
pub use client::Client;
pub use reference::Reference;

use reference::Choice;
use std::{io, path::PathBuf};

/// Why there is no model. Messages are lower-case fragments.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Not a name of a model.
    #[error(
        "{0}: not a model of the hub: expected hf:OWNER/REPO, and perhaps :QUANT, such as hf:Qwen/Qwen3-0.6B-GGUF:Q8_0"
    )]
    Name(String),
    /// Nothing in the cache, and no leave to ask the hub.
    #[error("{0}: not in the cache ({1}), and --offline forbids to fetch it")]
    Offline(String, PathBuf),
    /// The repository has no file of that kind.
    #[error("{repo}: no {wanted}; there are: {there}")]
    NoFile {
        repo: String,
        wanted: String,
        there: String,
    },
    /// 401 and 403.
    #[error(
        "{0}: access denied ({1}): the repository does not exist, is private, or its licence must be accepted first; a token is taken from HF_TOKEN or `hf auth login`"
    )]
    Denied(String, u16),
    /// 404.
    #[error("{0}: not found on the hub")]
    NotFound(String),
    /// Another status that trying again didn't change.
    #[error("{url}: the hub answered with status {status}")]
    Status { url: String, status: u16 },
    /// No answer, or one that broke off, again and again.
    #[error("{url}: {why}; what has arrived is kept and the next try goes on from there")]
    Broken { url: String, why: String },
    /// An answer that can't be right.
    #[error("{url}: not what a hub answers: {why}")]
    Answer { url: String, why: String },
    /// The bytes aren't those that the hub lists.
    #[error(
        "{file}: the SHA-256 sum is {found}, the hub lists {listed}: damaged on the way or on the server; nothing was kept"
    )]
    Checksum {
        file: String,
        found: String,
        listed: String,
    },
    /// Ctrl-C.
    #[error("{0}: interrupted; the next try goes on from there")]
    Interrupted(String),
    /// The cache can't be read or written.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        path: PathBuf,
        action: &'static str,
        source: io::Error,
    },
}

impl HubError {
    fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> HubError {
        let path = path.into();
        move |source| HubError::Io {
            path,
            action,
            source,
        }
    }
}

/// The model's file (of a split model, the first part): from the cache if it is complete there,
/// otherwise fetched.
pub fn resolve(reference: &Reference, offline: bool) -> anyhow::Result<PathBuf> {
    let cache = Cache::from_env()?;
    if let Some(found) = cache.find(reference)? {
        return Ok(found.first);
    }
    if offline {
        return Err(HubError::Offline(reference.to_string(), cache.root().to_owned()).into());
    }
    Ok(Client::from_env(cache)?.pull(reference)?.first)
}

/// A model in the cache.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The first (or only) file.
    pub first: PathBuf,
    /// Names within the repository.
    pub files: Vec<String>,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes that were fetched for it now.
    pub fetched: u64,
}

/// Chooses among a repository's files, by name.
fn choose(reference: &Reference, names: &[&str]) -> Result<Choice, HubError> {
    reference.choose(names).map_err(|wanted| HubError::NoFile {
        repo: reference.repo.clone(),
        wanted,
        there: reference::variants(names),
    })
}
