//! Ctrl-C.

use anyhow::Context as _;
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

/// A flag that the first Ctrl-C (or SIGTERM) sets; the second ends the program. To be called
/// when there is work that heeds the flag; it is the same one each time.
pub fn flag() -> anyhow::Result<Arc<AtomicBool>> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    let mut new = false;
    let flag = FLAG.get_or_init(|| {
        new = true;
        Arc::default()
    });
    if new {
        let set = Arc::clone(flag);
        ctrlc::set_handler(move || {
            if set.swap(true, Ordering::Relaxed) {
                // 128 and the number of SIGINT, as shells do.
                std::process::exit(130);
            }
        })
        .context("cannot handle Ctrl-C")?;
    }
    Ok(Arc::clone(flag))
}
