//! The cache of files, in the layout of Python's `huggingface_hub`, shared with all that use it.
//!
//! ```text
//! models--OWNER--REPO/refs/main             the commit that a branch was at
//! models--OWNER--REPO/snapshots/COMMIT/FILE a link to the blob
//! models--OWNER--REPO/blobs/SHA256          the bytes; SHA256.incomplete while they arrive
//! .locks/models--OWNER--REPO/SHA256.lock    held by who writes a blob
//! ```

use super::{HubError, Pulled, Reference, choose, reference};
use std::{
    env,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// A cache's directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// A complete model in the cache.
#[derive(Clone, Debug)]
pub struct Cached {
    pub repo: String,
    pub commit: String,
    /// The first file's path.
    pub first: PathBuf,
    /// Names within the repository.
    pub files: Vec<String>,
    pub bytes: u64,
}

/// A variable of the environment that isn't empty.
fn var(name: &str) -> Option<PathBuf> {
    env::var_os(name)
        .filter(|v| !v.is_empty())
        .map(PathBuf::from)
}

/// `huggingface_hub`'s own directory: `HF_HOME`, or `huggingface` in the user's cache.
pub fn home() -> anyhow::Result<PathBuf> {
    let in_cache = |cache: PathBuf| cache.join("huggingface");
    var("HF_HOME")
        .or_else(|| var("XDG_CACHE_HOME").map(in_cache))
        .or_else(|| env::home_dir().map(|home| in_cache(home.join(".cache"))))
        .ok_or_else(|| {
            let what = "there is no home directory for the cache of models: set HF_HOME";
            crate::exit::Refusal::Requirement(what.to_owned()).into()
        })
}

impl Cache {
    /// The user's: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub fn from_env() -> anyhow::Result<Cache> {
        let root = match var("HF_HUB_CACHE") {
            Some(root) => root,
            None => home()?.join("hub"),
        };
        Ok(Cache { root })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of a repository.
    fn repo(&self, repo: &str) -> PathBuf {
        self.root
            .join(format!("models--{}", repo.replace('/', "--")))
    }

    /// Where a blob's bytes are or will be.
    pub fn blob(&self, repo: &str, name: &str) -> PathBuf {
        self.repo(repo).join("blobs").join(name)
    }

    /// The commit that a revision was at when it was last asked for.
    fn commit(&self, reference: &Reference) -> Option<String> {
        let repo = self.repo(&reference.repo);
        if repo.join("snapshots").join(&reference.revision).is_dir() {
            return Some(reference.revision.clone());
        }
        let commit = fs::read_to_string(repo.join("refs").join(&reference.revision)).ok()?;
        let commit = commit.trim().to_owned();
        reference::is_inside(&commit).then_some(commit)
    }

    /// The model, if all its files are there.
    pub fn find(&self, reference: &Reference) -> Result<Option<Pulled>, HubError> {
        let Some(commit) = self.commit(reference) else {
            return Ok(None);
        };
        let snapshot = self.snapshot(&reference.repo, &commit);
        let names = files_under(&snapshot)?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let Ok(choice) = choose(reference, &names) else {
            return Ok(None);
        };
        let bytes = size_of(&snapshot, &choice.files);
        Ok(Some(Pulled {
            first: snapshot.join(&choice.files[0]),
            files: choice.files,
            bytes,
            fetched: 0,
        }))
    }

    fn snapshot(&self, repo: &str, commit: &str) -> PathBuf {
        self.repo(repo).join("snapshots").join(commit)
    }

    /// Takes the lock that guards a blob, as `huggingface_hub` does; waits for whoever has it.
    pub fn lock(&self, repo: &str, blob: &str) -> Result<File, HubError> {
        let dir = self.repo(repo);
        let name = dir.file_name().unwrap_or_default();
        let locks = self.root.join(".locks").join(name);
        fs::create_dir_all(&locks).map_err(HubError::io(&locks, "create"))?;
        let path = locks.join(format!("{blob}.lock"));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(HubError::io(&path, "open"))?;
        if file.try_lock().is_err() {
            say!("another process is fetching {repo}: waiting for it");
            file.lock().map_err(HubError::io(&path, "lock"))?;
        }
        Ok(file)
    }

    /// Makes a complete blob a file of a snapshot; the path of the file.
    pub fn link(
        &self,
        repo: &str,
        commit: &str,
        name: &str,
        blob: &str,
    ) -> Result<PathBuf, HubError> {
        let path = self.snapshot(repo, commit).join(name);
        let dir = path.parent().unwrap_or(&path);
        fs::create_dir_all(dir).map_err(HubError::io(dir, "create"))?;
        // From the file's directory up to the repository's.
        let up = "../".repeat(2 + name.matches('/').count());
        let target = format!("{up}blobs/{blob}");
        if fs::read_link(&path).is_ok_and(|old| old == Path::new(&target)) {
            return Ok(path);
        }
        let temporary = dir.join(format!(".{blob}.{}", std::process::id()));
        symlink(&target, &temporary)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(HubError::io(&path, "link"))?;
        Ok(path)
    }

    /// Notes the commit that a revision is at.
    pub fn set_ref(&self, reference: &Reference, commit: &str) -> Result<(), HubError> {
        if reference.revision == commit {
            return Ok(());
        }
        let refs = self.repo(&reference.repo).join("refs");
        let path = refs.join(&reference.revision);
        fs::create_dir_all(&refs).map_err(HubError::io(&refs, "create"))?;
        let temporary = refs.join(format!(".{}.{}", reference.revision, std::process::id()));
        File::create(&temporary)
            .and_then(|mut f| f.write_all(commit.as_bytes()))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(HubError::io(&path, "write"))
    }

    /// Every complete model, by repository and name.
    pub fn list(&self) -> Result<Vec<Cached>, HubError> {
        let mut all = Vec::new();
        for dir in entries(&self.root)? {
            let Some(repo) = repo_name(&dir) else {
                continue;
            };
            for snapshot in entries(&dir.join("snapshots"))? {
                let names = files_under(&snapshot)?;
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                for files in reference::models(&names).into_values() {
                    all.push(Cached {
                        repo: repo.clone(),
                        commit: file_name(&snapshot),
                        first: snapshot.join(&files[0]),
                        bytes: size_of(&snapshot, &files),
                        files,
                    });
                }
            }
        }
        Ok(all)
    }

    /// Removes what the reference means, from all snapshots, and blobs that nothing refers to
    /// any more. Without a QUANT these are all models of the repository. Returns the files and
    /// the bytes that were freed.
    pub fn remove(&self, reference: &Reference) -> Result<(Vec<String>, u64), HubError> {
        let repo = self.repo(&reference.repo);
        let mut removed = Vec::new();
        for snapshot in entries(&repo.join("snapshots"))? {
            let names = files_under(&snapshot)?;
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let files = match reference.wanted {
                reference::Wanted::Any => {
                    reference::models(&names).into_values().flatten().collect()
                }
                _ => choose(reference, &names).map_or_else(|_| Vec::new(), |c| c.files),
            };
            for file in files {
                let path = snapshot.join(&file);
                fs::remove_file(&path).map_err(HubError::io(&path, "remove"))?;
                removed.push(file);
            }
            remove_empty(&snapshot);
        }
        let freed = self.remove_orphans(reference)?;
        if removed.is_empty() && freed == 0 {
            return Err(HubError::NoFile {
                repo: reference.repo.clone(),
                wanted: format!("{reference} in the cache ({})", self.root.display()),
                there: self.of_repo(&reference.repo)?,
            });
        }
        removed.sort();
        removed.dedup();
        Ok((removed, freed))
    }

    /// What the cache has of a repository, for messages.
    fn of_repo(&self, repo: &str) -> Result<String, HubError> {
        let all = self.list()?;
        let files: Vec<&str> = all
            .iter()
            .filter(|c| c.repo == repo)
            .flat_map(|c| c.files.iter().map(String::as_str))
            .collect();
        Ok(reference::variants(&files))
    }

    /// Removes blobs without a link, then directories without files. Those that somebody is
    /// writing are locked and stay.
    fn remove_orphans(&self, reference: &Reference) -> Result<u64, HubError> {
        let repo = self.repo(&reference.repo);
        let mut used = Vec::new();
        for snapshot in entries(&repo.join("snapshots"))? {
            for name in files_under(&snapshot)? {
                used.extend(fs::canonicalize(snapshot.join(name)));
            }
        }
        let mut freed = 0;
        for blob in entries(&repo.join("blobs"))? {
            if fs::canonicalize(&blob).is_ok_and(|b| used.contains(&b)) {
                continue;
            }
            let name = file_name(&blob);
            let name = name.strip_suffix(".incomplete").unwrap_or(&name);
            let lock = self.lock(&reference.repo, name)?;
            freed += fs::metadata(&blob).map_or(0, |m| m.len());
            fs::remove_file(&blob).map_err(HubError::io(&blob, "remove"))?;
            drop(lock);
        }
        if entries(&repo.join("snapshots"))?.is_empty() && repo.is_dir() {
            fs::remove_dir_all(&repo).map_err(HubError::io(&repo, "remove"))?;
        }
        Ok(freed)
    }
}

/// `OWNER/REPO` of `…/models--OWNER--REPO`.
fn repo_name(dir: &Path) -> Option<String> {
    Some(
        file_name(dir)
            .strip_prefix("models--")?
            .replacen("--", "/", 1),
    )
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn size_of(dir: &Path, files: &[String]) -> u64 {
    let size = |f: &String| fs::metadata(dir.join(f)).map_or(0, |m| m.len());
    files.iter().map(size).sum()
}

/// What is in a directory, in order; nothing where there is none.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, HubError> {
    let read = match fs::read_dir(dir) {
        Ok(read) => read,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(HubError::io(dir, "list")(e)),
    };
    let mut all = Vec::new();
    for entry in read {
        all.push(entry.map_err(HubError::io(dir, "list"))?.path());
    }
    all.sort();
    Ok(all)
}

/// The files under a directory whose bytes are there, by their names relative to it.
fn files_under(dir: &Path) -> Result<Vec<String>, HubError> {
    let mut names = Vec::new();
    let mut pending = vec![(dir.to_owned(), String::new())];
    while let Some((dir, prefix)) = pending.pop() {
        for path in entries(&dir)? {
            let name = format!("{prefix}{}", file_name(&path));
            let link = path.is_symlink();
            if path.is_dir() && !link {
                pending.push((path, format!("{name}/")));
            } else if path.is_file() {
                names.push(name);
            }
        }
    }
    names.sort();
    Ok(names)
}

/// Removes a directory and those in it as far as they hold no files.
fn remove_empty(dir: &Path) {
    for path in entries(dir).unwrap_or_default() {
        if path.is_dir() && !path.is_symlink() {
            remove_empty(&path);
        }
    }
    // Where files are left it stays.
    let _ = fs::remove_dir(dir);
}
