//! An earlier SIGILL handler keeps receiving what is not ours. A file of its own because
//! the disposition belongs to the whole process.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::arch::asm;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

static SEEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn skip_ud2(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    SEEN.fetch_add(1, Relaxed);
    // SAFETY: the kernel's ucontext; `ud2` is two bytes long.
    unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] += 2 };
}

#[test]
fn other_illegal_instructions_reach_the_earlier_handler() {
    // SAFETY: installs a handler with the signature that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = skip_ud2 as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()),
            0
        );
    }
    amx_emu::install().unwrap();
    amx_emu::install().unwrap();
    let before = amx_emu::total();
    // SAFETY: both handlers return behind their instruction.
    unsafe { asm!("ud2", "tilerelease", "ud2") };
    assert_eq!(SEEN.load(Relaxed), 2);
    // A processor with AMX releases its tiles itself.
    let ours = u64::from(!amx_emu::configures_natively());
    assert_eq!(amx_emu::total() - before, ours);
}
