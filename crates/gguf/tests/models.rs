//! Real files: what the reader sees in the models and vocabularies under `../shared`. Marked
//! as ignored where those are absent.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use libtest_mimic::{Arguments, Failed, Trial};
use tegula_gguf::{Gguf, OpenOptions, Value};

/// FNV-1a: the same on every compiler, unlike the standard hasher.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Metadata (long values by a digest), tensor types and places of one file.
fn facts(gguf: &Gguf) -> String {
    let mut out = format!("GGUF version {}\n", gguf.version());
    for (key, value) in gguf.metadata().iter() {
        let text = match value {
            Value::Array(a) => format!(
                "{} x {}, digest {:016x}",
                a.len(),
                a.element_type().name(),
                digest(format!("{a:?}").as_bytes())
            ),
            Value::String(s) if s.len() > 80 => {
                format!("{} bytes, digest {:016x}", s.len(), digest(s.as_bytes()))
            }
            other => format!("{other:?}"),
        };
        writeln!(out, "{key}: {text}").unwrap();
    }
    let mut types = BTreeMap::new();
    for t in gguf.tensors() {
        let (count, bytes) = types.entry(t.ty.name()).or_insert((0, 0));
        *count += 1;
        *bytes += t.bytes;
    }
    for (ty, (count, bytes)) in types {
        writeln!(out, "{count} tensors of {ty}, {bytes} bytes").unwrap();
    }
    for t in gguf
        .tensors()
        .iter()
        .filter(|t| !t.name.starts_with("blk.") || t.name.starts_with("blk.1."))
    {
        let data = digest(gguf.data(t));
        writeln!(
            out,
            "{} {} {:?} at {}, digest {data:016x}",
            t.name, t.ty, t.shape, t.offset
        )
        .unwrap();
    }
    out
}

fn check(path: &Path) -> Result<(), Failed> {
    let mapped = facts(&Gguf::open(path)?);
    let read = Gguf::open_with(
        path,
        &OpenOptions {
            mmap: false,
            ..OpenOptions::default()
        },
    )?;
    if facts(&read) != mapped {
        return Err("mapped and read files differ".into());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    insta::assert_snapshot!(name.as_ref(), mapped);
    Ok(())
}

fn main() {
    let args = Arguments::from_args();
    let mut names = BTreeSet::new();
    let snapshots = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    let mut note = |dir: &Path, prefix: &str, suffix: &str| {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(rest) = name.strip_prefix(prefix)
                && let Some(model) = rest.strip_suffix(suffix)
                && model.ends_with(".gguf")
            {
                names.insert(model.to_owned());
            }
        }
    };
    note(&snapshots, "models__", ".snap");
    // `INSTA_UPDATE=always` takes in files that have no snapshot yet.
    if std::env::var_os("INSTA_UPDATE").is_some() {
        note(&common::shared().join("models"), "", "");
        note(&common::shared().join("vocab"), "", "");
    }
    let trials = names
        .into_iter()
        .map(|name| {
            let paths = ["models", "vocab"].map(|dir| common::shared().join(dir).join(&name));
            let path = paths.into_iter().find(|p| p.exists());
            let absent = path.is_none();
            Trial::test(name, move || {
                path.map_or(Err("absent".into()), |p| check(&p))
            })
            .with_ignored_flag(absent)
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}
