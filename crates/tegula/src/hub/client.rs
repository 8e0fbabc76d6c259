//! Fetches files: lists a repository, then resumes, checks and links each file.

use super::{
    Cache, HubError, Pulled, Reference, cache, choose,
    reference::{self},
};
use crate::{
    interrupt,
    progress::{Progress, Unit},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::{
    env,
    fs::{self, File},
    io::{Read, Seek as _, SeekFrom, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use ureq::{Agent, Body, http::Response};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Tries in a row that bring nothing, before it is an error.
const TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Also for what a server asks for by `Retry-After`.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A request's body is read for so long, then another one goes on: so a connection over which
/// nothing comes any more ends, too.
const PER_REQUEST: Duration = Duration::from_secs(60);
/// More is no listing.
const LISTING_BYTES: u64 = 64 << 20;

/// A hub, with the cache that its files go to.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    cache: Cache,
    cancel: Arc<AtomicBool>,
}

/// What the hub says of a repository at a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// Why a try failed.
enum Failure {
    /// Trying again won't help.
    Final(HubError),
    /// It may; perhaps after the pause that the server asks for.
    Passing(HubError, Option<Duration>),
}

impl Client {
    /// Asks `HF_ENDPOINT`, with the token of `HF_TOKEN` or of `hf auth login`.
    pub fn from_env(cache: Cache) -> anyhow::Result<Client> {
        let text = |name| env::var(name).ok().filter(|v: &String| !v.is_empty());
        let stored = || {
            let path = match text("HF_TOKEN_PATH") {
                Some(path) => path.into(),
                None => cache::home().ok()?.join("token"),
            };
            fs::read_to_string(path).ok()
        };
        let token = text("HF_TOKEN").or_else(stored);
        let token = token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .user_agent(concat!("tegula/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Client {
            agent: config.into(),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            cache,
            cancel: interrupt::flag()?,
        })
    }

    /// Fetches what is missing of the model at the revision's newest commit.
    pub fn pull(&self, reference: &Reference) -> Result<Pulled, HubError> {
        let repo = &reference.repo;
        let url = format!(
            "{}/api/models/{repo}/revision/{}?blobs=true",
            self.endpoint, reference.revision
        );
        let listing = self.retry(|| self.listing(&url, repo))?;
        let names: Vec<&str> = listing
            .siblings
            .iter()
            .map(|s| s.rfilename.as_str())
            .collect();
        let choice = choose(reference, &names)?;
        let mut files = Vec::new();
        for name in &choice.files {
            let of_name = |s: &&Sibling| s.rfilename == *name;
            let lfs = listing
                .siblings
                .iter()
                .find(of_name)
                .and_then(|s| s.lfs.as_ref());
            let lfs = lfs.ok_or_else(|| HubError::Answer {
                url: url.clone(),
                why: format!("{name} is listed without a checksum"),
            })?;
            files.push((name, lfs));
        }
        let bytes: u64 = files.iter().map(|(_, lfs)| lfs.size).sum();
        let (mut done, mut fetched) = (0, 0);
        let mut progress = Progress::new("fetching", Unit::Bytes);
        let mut first = None;
        for (name, lfs) in files {
            progress.message(name.as_str());
            let from = format!(
                "{}/{repo}/resolve/{}/{}",
                self.endpoint,
                listing.sha,
                escape(name)
            );
            let mut show = |at: u64| progress.done(done + at, bytes);
            fetched += self.blob(repo, &from, lfs, &mut show)?;
            done += lfs.size;
            let path = self.cache.link(repo, &listing.sha, name, &lfs.sha256)?;
            first.get_or_insert(path);
        }
        drop(progress);
        // Only now: a revision points to what is complete.
        self.cache.set_ref(reference, &listing.sha)?;
        let first = first.ok_or_else(|| HubError::NotFound(reference.to_string()))?;
        Ok(Pulled {
            first,
            files: choice.files,
            bytes,
            fetched,
        })
    }

    /// Runs `work` until it succeeds, fails for good, or has failed too often.
    fn retry<T>(&self, mut work: impl FnMut() -> Result<T, Failure>) -> Result<T, HubError> {
        let mut tries = 0;
        loop {
            match work() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(e)) => return Err(e),
                Err(Failure::Passing(e, after)) => {
                    tries += 1;
                    if tries >= TRIES {
                        return Err(e);
                    }
                    self.pause(tries, after, &e)?;
                }
            }
        }
    }

    /// Waits before the next try, each time longer, and heeds Ctrl-C meanwhile.
    fn pause(&self, tries: u32, after: Option<Duration>, why: &HubError) -> Result<(), HubError> {
        let pause = after
            .unwrap_or(FIRST_PAUSE * 2u32.pow(tries.min(12) - 1))
            .min(LONGEST_PAUSE);
        say!("{why}: trying again in {:.1} s", pause.as_secs_f64());
        let until = Instant::now() + pause;
        while Instant::now() < until {
            self.check_cancelled(&why.to_string())?;
            thread::sleep(Duration::from_millis(50).min(pause));
        }
        Ok(())
    }

    fn check_cancelled(&self, what: &str) -> Result<(), HubError> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(HubError::Interrupted(what.to_owned())),
            false => Ok(()),
        }
    }

    /// Sends a request; the answer, if its status is a good one or 416.
    fn get(
        &self,
        url: &str,
        what: &str,
        from: u64,
        limit: Option<Duration>,
    ) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            // Not sent on to where the hub redirects: that is the agent's default.
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let answer = request.config().timeout_recv_body(limit).build().call();
        let broken = |why: String| HubError::Broken {
            url: url.to_owned(),
            why,
        };
        let answer = answer.map_err(|e| match e {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::TooManyRedirects => {
                Failure::Final(broken(e.to_string()))
            }
            e => Failure::Passing(broken(e.to_string()), None),
        })?;
        let status = answer.status().as_u16();
        let other = HubError::Status {
            url: url.to_owned(),
            status,
        };
        match status {
            200 | 206 | 416 => Ok(answer),
            401 | 403 => Err(Failure::Final(HubError::Denied(what.to_owned(), status))),
            404 => Err(Failure::Final(HubError::NotFound(what.to_owned()))),
            408 | 425 | 429 | 500.. => {
                let after = answer.headers().get("retry-after");
                let seconds = after.and_then(|v| v.to_str().ok()?.trim().parse().ok());
                Err(Failure::Passing(other, seconds.map(Duration::from_secs)))
            }
            _ => Err(Failure::Final(other)),
        }
    }

    fn listing(&self, url: &str, repo: &str) -> Result<Listing, Failure> {
        let answer = |why: String| HubError::Answer {
            url: url.to_owned(),
            why,
        };
        let body = self.get(url, repo, 0, Some(PER_REQUEST))?.into_body();
        let mut bytes = Vec::new();
        let read = body
            .into_reader()
            .take(LISTING_BYTES)
            .read_to_end(&mut bytes);
        if let Err(e) = read {
            let (url, why) = (url.to_owned(), e.to_string());
            return Err(Failure::Passing(HubError::Broken { url, why }, None));
        }
        let listing: Listing =
            serde_json::from_slice(&bytes).map_err(|e| Failure::Final(answer(e.to_string())))?;
        let hex = |s: &str, len: usize| s.len() == len && s.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex(&listing.sha, 40) {
            return Err(Failure::Final(answer("the commit is no hash".to_owned())));
        }
        for file in &listing.siblings {
            if !reference::is_inside(&file.rfilename) {
                let why = format!("{:?} is no file's name", file.rfilename);
                return Err(Failure::Final(answer(why)));
            }
            if file.lfs.as_ref().is_some_and(|lfs| !hex(&lfs.sha256, 64)) {
                let why = format!("the checksum of {} is none", file.rfilename);
                return Err(Failure::Final(answer(why)));
            }
        }
        Ok(listing)
    }

    /// Makes the cache have a blob. Returns the bytes that were fetched for it.
    fn blob(
        &self,
        repo: &str,
        url: &str,
        lfs: &Lfs,
        show: &mut dyn FnMut(u64),
    ) -> Result<u64, HubError> {
        let path = self.cache.blob(repo, &lfs.sha256);
        let there = || fs::metadata(&path).is_ok_and(|m| m.len() == lfs.size);
        if there() {
            return Ok(0);
        }
        let dir = path.parent().unwrap_or(&path);
        fs::create_dir_all(dir).map_err(HubError::io(dir, "create"))?;
        let _lock = self.cache.lock(repo, &lfs.sha256)?;
        if there() {
            return Ok(0);
        }
        let incomplete = dir.join(format!("{}.incomplete", lfs.sha256));
        let mut part = Part::open(incomplete, lfs.size)?;
        let mut fetched = 0;
        let mut tries = 0;
        let mut damaged = false;
        // Whether the server goes on where it is asked to; one that doesn't gets all the time.
        let mut ranges = true;
        loop {
            let before = part.len;
            let result = self.go_on(url, &mut part, &mut ranges, show);
            fetched += part.len.saturating_sub(before);
            if let Err(Failure::Final(e)) = result {
                return Err(e);
            }
            self.check_cancelled(url)?;
            if part.len == lfs.size {
                let found = part.sum();
                if found.eq_ignore_ascii_case(&lfs.sha256) {
                    return part.keep(&path).map(|()| fetched);
                }
                part.restart()?;
                // What an earlier run left may be at fault: once more from the beginning.
                if std::mem::replace(&mut damaged, true) {
                    fs::remove_file(&part.path).map_err(HubError::io(&part.path, "remove"))?;
                    return Err(HubError::Checksum {
                        file: url.to_owned(),
                        found,
                        listed: lfs.sha256.clone(),
                    });
                }
                say!("{url}: the checksum is wrong: fetching it anew");
                continue;
            }
            if part.len > before {
                tries = 0;
                continue;
            }
            tries += 1;
            let (why, after) = match result {
                Err(Failure::Passing(e, after)) => (e, after),
                _ => {
                    let (url, why) = (url.to_owned(), "the file is shorter than listed".to_owned());
                    (HubError::Broken { url, why }, None)
                }
            };
            if tries >= TRIES {
                return Err(why);
            }
            self.pause(tries, after, &why)?;
        }
    }

    /// One request for the rest of a file.
    fn go_on(
        &self,
        url: &str,
        part: &mut Part,
        ranges: &mut bool,
        show: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let limit = ranges.then_some(PER_REQUEST);
        let answer = self.get(url, url, part.len, limit)?;
        let header = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok());
        let status = answer.status().as_u16();
        let starts = format!("bytes {}-", part.len);
        let resumes =
            status == 206 && header("content-range").is_some_and(|r| r.starts_with(&starts));
        if part.len > 0 && !resumes {
            *ranges = status == 416;
            part.restart().map_err(Failure::Final)?;
        }
        if status == 416 || (status == 206 && !resumes) {
            let (url, why) = (url.to_owned(), "the server sent another part".to_owned());
            return Err(Failure::Passing(HubError::Broken { url, why }, None));
        }
        let mut body = answer.into_body().into_reader().take(part.size - part.len);
        let mut buffer = vec![0; 1 << 18];
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                part.flush().map_err(Failure::Final)?;
                return Err(Failure::Final(HubError::Interrupted(url.to_owned())));
            }
            match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => part.write(&buffer[..n]).map_err(Failure::Final)?,
                Err(e) => {
                    let (url, why) = (url.to_owned(), e.to_string());
                    return Err(Failure::Passing(HubError::Broken { url, why }, None));
                }
            }
            show(part.len);
        }
    }
}

/// A file that is arriving, and the sum of what has arrived.
struct Part {
    path: std::path::PathBuf,
    file: File,
    sum: Sha256,
    len: u64,
    size: u64,
}

impl Part {
    /// Goes on with what an earlier run has left.
    fn open(path: std::path::PathBuf, size: u64) -> Result<Part, HubError> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(HubError::io(&path, "open"))?;
        let mut part = Part {
            path,
            file,
            sum: Sha256::new(),
            len: 0,
            size,
        };
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n = part
                .file
                .read(&mut buffer)
                .map_err(HubError::io(&part.path, "read"))?;
            part.sum.update(&buffer[..n]);
            part.len += n as u64;
            if part.len > size {
                part.restart()?;
            }
            if n == 0 {
                return Ok(part);
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file
            .write_all(bytes)
            .map_err(HubError::io(&self.path, "write"))?;
        self.sum.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Forgets everything.
    fn restart(&mut self) -> Result<(), HubError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(HubError::io(&self.path, "truncate"))?;
        self.sum = Sha256::new();
        self.len = 0;
        Ok(())
    }

    fn sum(&self) -> String {
        let bytes = self.sum.clone().finalize();
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn flush(&self) -> Result<(), HubError> {
        self.file
            .sync_all()
            .map_err(HubError::io(&self.path, "sync"))
    }

    /// Gives the complete file its name.
    fn keep(&self, to: &std::path::Path) -> Result<(), HubError> {
        self.flush()?;
        fs::rename(&self.path, to).map_err(HubError::io(to, "rename to"))
    }
}

/// A file's name within an address.
fn escape(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    let mut out = String::with_capacity(name.len());
    for b in name.bytes() {
        match plain(b) {
            true => out.push(char::from(b)),
            false => out.push_str(&format!("%{b:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_escaped_for_addresses() {
        assert_eq!(super::escape("a/b c#ü.gguf"), "a/b%20c%23%C3%BC.gguf");
    }
}
