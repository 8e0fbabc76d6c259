//! Saving a sequence and restoring it: tokens and cache, for one model.
//!
//! The file: magic, version, a fingerprint of the model and the cache's geometry, the
//! tokens, the pages, and a CRC-32 of everything before it. Little-endian.

use crate::{Context, Error, Result, context::Sequence, models::Lane};
use std::{fs, io::Write, path::Path};
use tegula_kernels::device::Buffer;

const MAGIC: &[u8; 8] = b"TEGULAkv";
const VERSION: u32 = 1;

impl Context {
    /// Writes a sequence to `path`, under a temporary name first.
    pub fn save_state(&self, sequence: usize, path: &Path) -> Result<()> {
        self.tokens(sequence)?;
        let Sequence { table, tokens } = &self.sequences[sequence];
        let mut data = Vec::new();
        data.extend_from_slice(MAGIC);
        data.extend_from_slice(&VERSION.to_le_bytes());
        data.extend_from_slice(&self.fingerprint().to_le_bytes());
        data.extend_from_slice(&(tokens.len() as u64).to_le_bytes());
        data.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
        let pages = self.cache.export(table, |layer, page, mut out| {
            device_caches(&self.lanes, layer).try_for_each(|(lane, cache)| {
                let bytes = lane.page_bytes();
                let (part, rest) = std::mem::take(&mut out).split_at_mut(bytes);
                out = rest;
                lane.device.read(cache, page as usize * bytes, part)
            })
        })?;
        data.extend_from_slice(&pages);
        let sum = crc32fast::hash(&data);
        data.extend_from_slice(&sum.to_le_bytes());
        let error = |action| {
            move |source| Error::Io {
                path: path.to_owned(),
                action,
                source,
            }
        };
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        let written = fs::File::create(&temporary)
            .and_then(|mut file| {
                file.write_all(&data)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            // It may not exist; then there is nothing to remove.
            let _ = fs::remove_file(&temporary);
        }
        written.map_err(error("write"))
    }

    /// Reads a saved sequence into `sequence`, in place of what it held.
    pub fn load_state(&mut self, sequence: usize, path: &Path) -> Result<()> {
        self.tokens(sequence)?;
        let io = |source| Error::Io {
            path: path.to_owned(),
            action: "read",
            source,
        };
        let data = fs::read(path).map_err(io)?;
        let wrong = |what: &str| Error::State {
            path: path.to_owned(),
            what: what.to_owned(),
        };
        let header = MAGIC.len() + 4 + 4 + 8;
        if data.len() < header + 4 || &data[..8] != MAGIC {
            return Err(wrong("no such file format"));
        }
        let u32_at =
            |at: usize| u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
        if u32_at(8) != VERSION {
            return Err(wrong("written by another version"));
        }
        let (body, sum) = data.split_at(data.len() - 4);
        if crc32fast::hash(body).to_le_bytes() != sum {
            return Err(wrong("damaged: the checksum differs"));
        }
        if u32_at(12) != self.fingerprint() {
            return Err(wrong(
                "it belongs to another model, other LoRA adapters or another cache type",
            ));
        }
        let count = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
        let end = usize::try_from(count)
            .ok()
            .and_then(|n| n.checked_mul(4)?.checked_add(header));
        let Some(ids) = end.and_then(|end| body.get(header..end)) else {
            return Err(wrong("damaged: it is too short"));
        };
        let tokens: Vec<_> = ids
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let context = self.options().context;
        if tokens.len() > context {
            return Err(Error::ContextFull {
                needed: tokens.len(),
                context,
            });
        }
        self.truncate(sequence, 0)?;
        let lanes = &self.lanes;
        let table = self.cache.import(
            &body[header + ids.len()..],
            tokens.len(),
            |layer, page, mut part| {
                device_caches(lanes, layer).try_for_each(|(lane, cache)| {
                    let bytes = lane.page_bytes();
                    let (here, rest) = part.split_at(bytes);
                    part = rest;
                    Ok::<_, Error>(lane.device.write(cache, page as usize * bytes, here)?)
                })
            },
        )?;
        self.sequences[sequence] = Sequence { table, tokens };
        Ok(())
    }

    /// CRC-32 of what must agree: the tensors' names, types and shapes, and the cache.
    fn fingerprint(&self) -> u32 {
        let mut hash = crc32fast::Hasher::new();
        for t in self.model().gguf().tensors() {
            hash.update(t.name.as_bytes());
            hash.update(&t.ty.id().to_le_bytes());
            t.shape.iter().for_each(|n| hash.update(&n.to_le_bytes()));
        }
        // A sample of the weights tells fine-tunes of one model apart.
        if let Some(t) = self.model().gguf().tensor("output_norm.weight") {
            hash.update(self.model().gguf().data(t));
        }
        hash.update(format!("{:?}", self.cache.shape()).as_bytes());
        if let Some(sparsity) = self.cache.sparsity() {
            hash.update(sparsity.to_string().as_bytes());
        }
        // Adapters are part of the model that has written the cache.
        for adapter in self.model().adapters().iter().filter(|a| a.scale != 0.0) {
            hash.update(&adapter.checksum.to_le_bytes());
        }
        hash.finalize()
    }
}

/// Where the cache of a layer lies that is not on the CPU: on one device, or the heads of each
/// in their order. A page is all heads, one after another.
fn device_caches(lanes: &[Lane], layer: usize) -> impl Iterator<Item = (&Lane, &Buffer)> {
    let there = move |lane| Some((lane, Lane::layer_cache(lane, layer)?));
    lanes.iter().filter_map(there)
}
