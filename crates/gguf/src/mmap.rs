//! Memory mappings: the crate's only unsafe code.
#![allow(unsafe_code)]

use std::{fs::File, io, ops::Range};

use memmap2::{Mmap, MmapMut, MmapOptions};

/// How a mapping will be read, for the kernel's read-ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// No particular order.
    Normal,
    /// From front to back, once.
    Sequential,
    /// In no order; read-ahead is useless.
    Random,
    /// Soon, all of it: start reading now.
    WillNeed,
    /// Back it by huge pages where the kernel can.
    HugePages,
}

/// Read-only memory: a file's pages, or anonymous pages that a file was read into.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: Mmap,
    /// True when the kernel can fetch dropped pages again from the file.
    from_file: bool,
}

impl Mapping {
    /// Maps all of `file`, which must not be empty.
    pub(crate) fn file(file: &File, populate: bool) -> io::Result<Mapping> {
        let mut options = MmapOptions::new();
        if populate {
            options.populate();
        }
        // SAFETY: the mapping is read-only and is only handed out as `&[u8]`. As with every
        // reader of mapped models, nobody may write to the file or cut it off while it is in
        // use; the user who opens it upholds that (documented at `OpenOptions::mmap`, which
        // turned off reads a private copy). Every byte value is a valid `u8`.
        let map = unsafe { options.map(file)? };
        Ok(Mapping {
            map,
            from_file: true,
        })
    }

    /// `len` bytes of anonymous, page-aligned memory, filled by `fill`.
    pub(crate) fn anonymous(
        len: usize,
        huge_pages: bool,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<Mapping> {
        let mut map = MmapMut::map_anon(len)?;
        #[cfg(target_os = "linux")]
        if huge_pages {
            // Only a hint: without transparent huge pages it fails and nothing is lost.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = huge_pages;
        fill(&mut map)?;
        Ok(Mapping {
            map: map.make_read_only()?,
            from_file: false,
        })
    }

    /// All bytes of the mapping.
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.map
    }

    /// True when these are pages of a file, not a private copy.
    pub(crate) fn is_file(&self) -> bool {
        self.from_file
    }

    /// Gives the kernel a hint about `range`; false where it can't take it.
    pub(crate) fn advise(&self, range: Range<usize>, advice: Advice) -> bool {
        #[cfg(unix)]
        {
            let advice = match advice {
                Advice::Normal => memmap2::Advice::Normal,
                Advice::Sequential => memmap2::Advice::Sequential,
                Advice::Random => memmap2::Advice::Random,
                Advice::WillNeed => memmap2::Advice::WillNeed,
                #[cfg(target_os = "linux")]
                Advice::HugePages => memmap2::Advice::HugePage,
                #[cfg(not(target_os = "linux"))]
                Advice::HugePages => return false,
            };
            self.map
                .advise_range(advice, range.start, range.len())
                .is_ok()
        }
        #[cfg(not(unix))]
        {
            let _ = (range, advice);
            false
        }
    }

    /// Drops the whole pages within `range` from this process's memory; they are read from
    /// the file again on the next access. Does nothing, and returns false, for anonymous or
    /// locked memory.
    pub(crate) fn release(&self, range: Range<usize>) -> bool {
        // Page sizes other than 4 KiB divide 64 KiB on every system we run on.
        const PAGE: usize = 64 << 10;
        let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        if !self.from_file || start >= end || end > self.map.len() {
            return false;
        }
        #[cfg(unix)]
        {
            // SAFETY: the pages belong to a read-only mapping of a file, so dropping them
            // loses nothing: the next access finds the same bytes (see `Mapping::file` for
            // who keeps the file unchanged). The range was checked to lie within the map.
            unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    start,
                    end - start,
                )
            }
            .is_ok()
        }
        #[cfg(not(unix))]
        false
    }

    /// Keeps the pages in memory; they are read first.
    pub(crate) fn lock(&self) -> io::Result<()> {
        #[cfg(unix)]
        return self.map.lock();
        #[cfg(not(unix))]
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "locking memory needs a Unix system",
        ))
    }
}
