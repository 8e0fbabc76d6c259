//! A kernel that refuses the permission for tile data, for the real program on a real AMX CPU.
//! Elsewhere the CPU's refusal comes first, and the test is listed as ignored.

use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    fs, io,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode, Output},
};

const ARCH_REQ_XCOMP_PERM: u32 = 0x1023;

/// From now on this process and its children are refused the permission with `EPERM`.
fn refuse() -> io::Result<()> {
    use libc::{
        BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
        SECCOMP_RET_ERRNO,
    };
    let op = |code: u32, k: u32, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let equals = |k, jf| op(BPF_JMP | BPF_JEQ | BPF_K, k, 0, jf);
    // Of the kernel's `seccomp_data`: the call's number, and the low half of its first argument.
    let load = |offset| op(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
    let mut filter = [
        load(0),
        equals(libc::SYS_arch_prctl as u32, 3),
        load(16),
        equals(ARCH_REQ_XCOMP_PERM, 1),
        op(
            BPF_RET | BPF_K,
            SECCOMP_RET_ERRNO | libc::EPERM as u32,
            0,
            0,
        ),
        op(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the filter, which lives until then.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
    };
    match refused {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

fn without_permission(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tegula"));
    // SAFETY: between fork and exec it only makes system calls.
    unsafe { command.args(args).pre_exec(refuse) };
    command.output().expect("the program starts")
}

/// It ends with 4, names the cause and prints nothing else; without `--amx` nobody asks.
fn refused() -> Result<(), Failed> {
    for args in [
        &["run", "--amx", "-p", "x", "-n", "1"][..],
        &["bench", "--amx", "-p", "1", "-n", "0"],
        &["explain", "--amx"],
    ] {
        let out = without_permission(args);
        let said = String::from_utf8_lossy(&out.stderr);
        let cause = "the kernel refuses the permission for tile data: Operation not permitted";
        if out.status.code() != Some(4) || !said.contains(cause) || !out.stdout.is_empty() {
            return Err(format!("{args:?}: {}\n{said}", out.status).into());
        }
    }
    for args in [
        &["run", "-p", "x", "-n", "1", "--temp", "0"][..],
        &["run", "-p", "x", "-n", "1", "--temp", "0", "--amx=auto"],
    ] {
        let out = without_permission(args);
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            return Err(format!("{args:?}: {}\n{said}", out.status).into());
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let amx = ["amx_tile", "amx_bf16"].iter().all(|f| cpus.contains(f));
    let name = match amx {
        true => "a_kernel_that_refuses_tile_data",
        false => "a_kernel_that_refuses_tile_data (ignored: no AMX here)",
    };
    let trial = Trial::test(name, refused).with_ignored_flag(!amx);
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}
