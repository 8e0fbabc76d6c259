//! A kernel that refuses the permission for tile data, for the real program on a real AMX CPU.
//! Elsewhere the CPU's refusal comes first, and the test is listed as ignored.

use libtest_mimic::{Arguments, Failed, Trial};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::{
    collections::BTreeMap,
    fs,
    process::{Command, ExitCode, Output},
};

const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;

/// From now on this thread and its children are refused the permission with `EPERM`.
fn refuse() -> Result<(), Failed> {
    let asks = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        ARCH_REQ_XCOMP_PERM,
    )?;
    let rules = BTreeMap::from([(libc::SYS_arch_prctl, vec![SeccompRule::new(vec![asks])?])]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into()?,
    )?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

fn tegula(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tegula"));
    command.args(args).output().expect("the program starts")
}

/// It ends with 4, names the cause and prints nothing else; without `--amx` nobody asks.
fn refused() -> Result<(), Failed> {
    refuse()?;
    for args in [
        &["run", "--amx", "-p", "x", "-n", "1"][..],
        &["bench", "--amx", "-p", "1", "-n", "0"],
        &["explain", "--amx"],
    ] {
        let out = tegula(args);
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
        let out = tegula(args);
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
