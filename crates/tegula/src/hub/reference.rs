//! What `hf:OWNER/REPO[@REVISION][:QUANT]` and `hf:OWNER/REPO/FILE.gguf` mean.

use super::HubError;
use std::{collections::BTreeMap, fmt, str::FromStr};

/// Without a QUANT, the first of these that the repository has.
const PREFERRED: &[&str] = &[
    "Q4_K_M", "Q4_0", "Q4_K_S", "IQ4_XS", "MXFP4", "Q5_K_M", "Q8_0", "BF16", "F16",
];

/// A model of a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// `OWNER/REPO`.
    pub repo: String,
    /// A branch, tag or commit; `main` unless said otherwise.
    pub revision: String,
    /// Which of its files.
    pub wanted: Wanted,
}

/// Which files of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The first of a list of usual types, or the only one.
    Any,
    /// The one whose name ends with this type.
    Quant(String),
    /// This one.
    File(String),
}

/// The files of one model: one, or all parts in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub files: Vec<String>,
}

impl Reference {
    /// The name without its prefix, if this is meant to be a model of a hub.
    pub fn strip_prefix(name: &str) -> Option<&str> {
        name.strip_prefix("hf:")
            .or_else(|| name.strip_prefix("hf://"))
    }

    /// The files that this means among a repository's; otherwise what was wanted.
    pub fn choose(&self, names: &[&str]) -> Result<Choice, String> {
        let models = models(names);
        let of = |quant: &str| -> Vec<&Vec<String>> {
            let hit = |name: &str| variant(name).is_some_and(|v| v.eq_ignore_ascii_case(quant));
            let all = models.iter().filter(|(name, _)| hit(name));
            all.map(|(_, files)| files).collect()
        };
        let files = match &self.wanted {
            Wanted::File(file) => models.iter().find(|(_, files)| files.contains(file)),
            Wanted::Quant(quant) => match of(quant)[..] {
                [files] => return Ok(Choice::new(files)),
                [] => None,
                _ => return Err(format!("single file of type {quant} (name the file)")),
            },
            Wanted::Any => {
                let usual = PREFERRED.iter().find_map(|quant| match of(quant)[..] {
                    [files] => Some(files),
                    _ => None,
                });
                if let Some(files) = usual {
                    return Ok(Choice::new(files));
                }
                match models.len() {
                    1 => models.iter().next(),
                    _ => None,
                }
            }
        };
        let files = files.ok_or_else(|| match &self.wanted {
            Wanted::File(file) => format!("complete model {file}"),
            Wanted::Quant(quant) => format!("GGUF file of type {quant}"),
            Wanted::Any if models.is_empty() => "complete GGUF file".to_owned(),
            Wanted::Any => "GGUF file of a usual type (name one behind a colon)".to_owned(),
        })?;
        Ok(Choice::new(files.1))
    }
}

impl Choice {
    fn new(files: &[String]) -> Choice {
        Choice {
            files: files.to_vec(),
        }
    }
}

/// Whether a file is a model, or a part of one, and no projector or the like.
pub fn is_model(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let lower = file.to_ascii_lowercase();
    lower.ends_with(".gguf") && !["mmproj", "imatrix"].iter().any(|no| lower.starts_with(no))
}

/// The complete models among files, by the name without `-0000M-of-0000N.gguf`, with their
/// parts in order.
pub fn models(names: &[&str]) -> BTreeMap<String, Vec<String>> {
    let mut whole = BTreeMap::new();
    let mut parts: BTreeMap<(String, u32), Vec<(u32, String)>> = BTreeMap::new();
    for name in names.iter().filter(|name| is_model(name)) {
        let stem = &name[..name.len() - ".gguf".len()];
        match part(stem) {
            Some((base, number, count)) => parts
                .entry((base.to_owned(), count))
                .or_default()
                .push((number, (*name).to_owned())),
            None => {
                whole.insert(stem.to_owned(), vec![(*name).to_owned()]);
            }
        }
    }
    for ((base, count), mut files) in parts {
        files.sort();
        files.dedup_by_key(|(number, _)| *number);
        if files.iter().map(|(number, _)| *number).eq(1..=count) {
            whole.insert(base, files.into_iter().map(|(_, name)| name).collect());
        }
    }
    whole
}

/// `base`, part and parts of `base-00001-of-00003`.
fn part(stem: &str) -> Option<(&str, u32, u32)> {
    let five = |s: &str| -> Option<u32> {
        (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit()))
            .then(|| s.parse().ok())
            .flatten()
    };
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (base, number) = rest.rsplit_once('-')?;
    Some((base, five(number)?, five(count)?))
}

/// The type at the end of a model's name: `Q4_K_M` of `dir/model-Q4_K_M`.
fn variant(name: &str) -> Option<&str> {
    let file = name.rsplit('/').next()?;
    let tail = file.rsplit(['-', '.']).next()?;
    let upper = tail.to_ascii_uppercase();
    let known = [
        "Q", "IQ", "TQ", "F16", "BF16", "F32", "MXFP4", "NVFP4", "UD",
    ];
    let typed =
        known.iter().any(|k| upper.starts_with(k)) && upper.bytes().any(|b| b.is_ascii_digit());
    typed.then_some(tail)
}

/// What there is to choose from, for messages.
pub fn variants(names: &[&str]) -> String {
    let models = models(names);
    let mut all: Vec<String> = models
        .iter()
        .map(|(name, files)| variant(name).map_or_else(|| files[0].clone(), str::to_owned))
        .collect();
    all.sort();
    all.dedup();
    match all.is_empty() {
        true => "no GGUF files".to_owned(),
        false => all.join(", "),
    }
}

/// Names that can become parts of paths and of addresses without changing their meaning.
fn is_name(s: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !s.is_empty() && s.len() <= 96 && s.bytes().all(fits) && !s.starts_with('.') && !s.contains("..")
        // The cache writes it for `/`.
        && !s.contains("--")
}

/// Whether a file's name, which comes from the hub, stays inside the directory that it is for.
pub fn is_inside(name: &str) -> bool {
    let part = |p: &str| !p.is_empty() && p != "." && p != "..";
    name.len() <= 512 && name.split('/').all(part) && !name.contains(['\\', '\0', '\n'])
}

impl FromStr for Reference {
    type Err = HubError;

    fn from_str(name: &str) -> Result<Reference, HubError> {
        let bad = || HubError::Name(name.to_owned());
        let text = Reference::strip_prefix(name).unwrap_or(name);
        let text = text.trim_start_matches('/');
        let (place, quant) = match text.split_once(':') {
            Some((place, quant)) => (place, Some(quant)),
            None => (text, None),
        };
        let mut parts = place.splitn(3, '/');
        let owner = parts.next().unwrap_or_default();
        let repo = parts.next().unwrap_or_default();
        let file = parts.next();
        let (repo, revision) = repo.split_once('@').unwrap_or((repo, "main"));
        let wanted = match (file, quant) {
            (None, None) => Wanted::Any,
            (None, Some(quant)) if is_name(quant) => Wanted::Quant(quant.to_owned()),
            (Some(file), None) if is_inside(file) && is_model(file) => {
                Wanted::File(file.to_owned())
            }
            _ => return Err(bad()),
        };
        if ![owner, repo, revision].into_iter().all(is_name) {
            return Err(bad());
        }
        Ok(Reference {
            repo: format!("{owner}/{repo}"),
            revision: revision.to_owned(),
            wanted,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        match &self.wanted {
            Wanted::Any => Ok(()),
            Wanted::Quant(quant) => write!(f, ":{quant}"),
            Wanted::File(file) => write!(f, "/{file}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str, files: &[&str]) -> Result<Vec<String>, String> {
        let reference: Reference = name.parse().map_err(|e: HubError| e.to_string())?;
        assert_eq!(reference.to_string(), name);
        reference.choose(files).map(|c| c.files)
    }

    const FILES: &[&str] = &[
        "README.md",
        "m-Q4_K_M.gguf",
        "m-q8_0.gguf",
        "mmproj-F16.gguf",
        "BF16/m-BF16-00002-of-00002.gguf",
        "BF16/m-BF16-00001-of-00002.gguf",
        "F32/m-F32-00001-of-00002.gguf",
    ];

    #[test]
    fn names_choose_files() {
        let one = |name, file: &str| assert_eq!(chosen(name, FILES), Ok(vec![file.to_owned()]));
        one("hf:o/r", "m-Q4_K_M.gguf");
        one("hf:o/r:Q8_0", "m-q8_0.gguf");
        one("hf:o/r@v1.0:q4_k_m", "m-Q4_K_M.gguf");
        one("hf:o/r/m-q8_0.gguf", "m-q8_0.gguf");
        let parts = [
            "BF16/m-BF16-00001-of-00002.gguf",
            "BF16/m-BF16-00002-of-00002.gguf",
        ];
        assert_eq!(chosen("hf:o/r:BF16", FILES).unwrap(), parts);
        assert_eq!(
            chosen("hf:o/r/BF16/m-BF16-00002-of-00002.gguf", FILES).unwrap(),
            parts
        );
        // One part of two is no model, and a projector is none either.
        assert!(chosen("hf:o/r:F32", FILES).is_err());
        assert!(chosen("hf:o/r:F16", FILES).is_err());
        assert_eq!(chosen("hf:o/r", &["any.gguf"]).unwrap(), ["any.gguf"]);
        assert!(chosen("hf:o/r", &["a.gguf", "b.gguf"]).is_err());
        assert!(
            chosen("hf:o/r:Q8_0", &["a-Q8_0.gguf", "b-Q8_0.gguf"])
                .unwrap_err()
                .contains("name")
        );
        assert_eq!(variants(FILES), "BF16, Q4_K_M, q8_0");
    }

    #[test]
    fn names_that_would_leave_their_place_are_refused() {
        for bad in [
            "hf:",
            "hf:o",
            "hf:o/",
            "hf:/",
            "hf:o/..",
            "hf:../r",
            "hf:o/r:",
            "hf:o/r:a/b",
            "hf:o/r@..",
            "hf:o/r/../x.gguf",
            "hf:o/r/x.txt",
            "hf:o/r?x",
            "hf:o--p/r",
            "hf:o/r /x.gguf",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
        for bad in ["", "/a", "a//b", "../a", "a/..", "a\\b", "a\0", "./a"] {
            assert!(!is_inside(bad), "{bad:?}");
        }
    }
}
