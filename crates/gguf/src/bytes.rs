//! Shared, immutable bytes: what tensor data is handed around as.

use std::{
    fmt,
    fs::File,
    io,
    ops::{Deref, Range},
    sync::Arc,
};

use crate::mmap::{Advice, Mapping};

/// A range of immutable bytes that keeps its storage (mapping, buffer or static) alive.
///
/// Cloning copies a pointer.
#[derive(Clone)]
pub struct Bytes {
    store: Store,
    start: usize,
    len: usize,
}

#[derive(Clone)]
enum Store {
    Static(&'static [u8]),
    Vec(Arc<Vec<u8>>),
    Mapping(Arc<Mapping>),
}

impl Bytes {
    /// Takes over a vector.
    pub fn from_vec(bytes: Vec<u8>) -> Bytes {
        Bytes {
            start: 0,
            len: bytes.len(),
            store: Store::Vec(Arc::new(bytes)),
        }
    }

    /// Refers to bytes that live for ever, such as an embedded file.
    pub const fn from_static(bytes: &'static [u8]) -> Bytes {
        Bytes {
            start: 0,
            len: bytes.len(),
            store: Store::Static(bytes),
        }
    }

    /// Maps all of `file`, which must not be empty. As with models, nobody may write to it or
    /// cut it off while it is in use; replacing it under its name is fine.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn map(file: &File) -> io::Result<Bytes> {
        Mapping::file(file, false).map(Bytes::from_mapping)
    }

    pub(crate) fn from_mapping(mapping: Mapping) -> Bytes {
        Bytes {
            start: 0,
            len: mapping.as_slice().len(),
            store: Store::Mapping(Arc::new(mapping)),
        }
    }

    /// The sub-range `range`, sharing the storage.
    ///
    /// # Panics
    /// When `range` does not lie within `0..self.len()`, as slicing does.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {range:?} outside {} bytes",
            self.len
        );
        Bytes {
            store: self.store.clone(),
            start: self.start + range.start,
            len: range.len(),
        }
    }

    /// True when the bytes are pages of a file, which [`Bytes::release`] can drop.
    pub fn is_mapped(&self) -> bool {
        matches!(&self.store, Store::Mapping(m) if m.is_file())
    }

    /// Tells the kernel that these bytes won't be needed soon: whole pages of a mapped file
    /// leave memory (and return from the file if read again). Call it after repacking a
    /// tensor. Returns false where there is nothing to drop: for buffers, static data,
    /// locked memory and ranges under a page.
    pub fn release(&self) -> bool {
        match &self.store {
            Store::Mapping(m) => m.release(self.start..self.start + self.len),
            Store::Static(_) | Store::Vec(_) => false,
        }
    }

    /// The same for all of the file that these bytes are a part of.
    pub(crate) fn release_file(&self) {
        if let Store::Mapping(m) = &self.store {
            m.release(0..m.as_slice().len());
        }
    }

    /// Whether these bytes and the others are parts of one mapped file.
    pub(crate) fn is_of_file(&self, other: &Bytes) -> bool {
        match (&self.store, &other.store) {
            (Store::Mapping(a), Store::Mapping(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Locks the storage in memory.
    pub(crate) fn lock(&self) -> io::Result<()> {
        match &self.store {
            Store::Mapping(m) => m.lock(),
            Store::Static(_) | Store::Vec(_) => Ok(()),
        }
    }

    /// Gives the kernel a hint about how these bytes will be read; false when it can't take
    /// it.
    pub fn advise(&self, advice: Advice) -> bool {
        match &self.store {
            Store::Mapping(m) => m.advise(self.start..self.start + self.len, advice),
            Store::Static(_) | Store::Vec(_) => false,
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all = match &self.store {
            Store::Static(s) => s,
            Store::Vec(v) => v.as_slice(),
            Store::Mapping(m) => m.as_slice(),
        };
        &all[self.start..self.start + self.len]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Bytes {
        Bytes::from_vec(v)
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.store {
            Store::Static(_) => "static",
            Store::Vec(_) => "heap",
            Store::Mapping(_) => "mapped",
        };
        write!(f, "Bytes({} {kind})", self.len)
    }
}
