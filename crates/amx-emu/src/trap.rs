//! The `SIGILL` handler.
//!
//! Everything it touches is async-signal-safe: plain thread-local state without lazy
//! initialisation or destructor, atomics, the interrupted context, and at most two system
//! calls. It runs on the alternate stack where the thread has one (Rust's threads do).
//!
//! A processor with AMX traps only what touches tile data. It executes `ldtilecfg`,
//! `sttilecfg` and `tilerelease` itself, and the configuration then arrives in the signal's
//! frame. There the handler marks it as seen, in the byte for the start row, so that it can
//! tell the same configuration loaded anew (all tiles are zero) from one that is still in
//! force. So on such a processor `ldtilecfg` counts when its first tile is touched, the
//! other two don't count, and `sttilecfg` may show the mark.

use crate::{
    AddressSize, Counters, Fault, Instruction, Op, Segment, TileConfig, TileState,
    decode::{Address, Decoded, decode},
};
use std::{
    arch::x86_64::{__cpuid, __cpuid_count},
    cell::UnsafeCell,
    mem::MaybeUninit,
    ptr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

static COUNTERS: [AtomicU64; Op::ALL.len()] = [const { AtomicU64::new(0) }; Op::ALL.len()];
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Where in an XSAVE area the processor keeps its tile configuration; 0 on one without AMX.
static NATIVE: AtomicUsize = AtomicUsize::new(0);
/// The tile configuration's number among the components of the extended state.
const TILE_CONFIG: u32 = 17;
/// The start row of a configuration that the handler has seen: past every row, so that no
/// program has it.
const SEEN: u8 = 0xff;

/// The disposition that stood before ours; written once, before `INSTALLED` is set.
struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written once under `INSTALL` before our handler is reachable, only read after.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::uninit()));
static INSTALL: Mutex<()> = Mutex::new(());

thread_local! {
    /// Constant initialiser and no destructor: access is a plain TLS address, fit for a
    /// signal handler.
    static TILES: UnsafeCell<TileState> = const { UnsafeCell::new(TileState::new()) };
}

/// The operating system refused the handler.
#[derive(Debug, thiserror::Error)]
#[error("cannot install the SIGILL handler: {0}")]
pub struct InstallError(#[from] std::io::Error);

/// Executes AMX instructions in software from now on, process-wide and for good. A second
/// call does nothing.
///
/// Other illegal instructions go to the handler that was installed before, or end the
/// process as they would have.
pub fn install() -> Result<(), InstallError> {
    let _guard = INSTALL
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if INSTALLED.load(Relaxed) {
        return Ok(());
    }
    NATIVE.store(native_offset(), Relaxed);
    // SAFETY: both structures are plain data for which all-zero is a valid value; the
    // handler has the signature that SA_SIGINFO asks for and is async-signal-safe (module
    // comment). PREVIOUS is not read before the second sigaction call makes `handle`
    // reachable.
    unsafe {
        let mut previous: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGILL, ptr::null(), &mut previous) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        (*PREVIOUS.0.get()).write(previous);
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = handle as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        libc::sigemptyset(&mut ours.sa_mask);
        if libc::sigaction(libc::SIGILL, &ours, ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    INSTALLED.store(true, Relaxed);
    Ok(())
}

/// True on a processor that has AMX switched on: it loads, stores and releases
/// configurations itself, so that only loads that a tile follows are counted.
pub fn configures_natively() -> bool {
    native_offset() != 0
}

/// See [`NATIVE`].
fn native_offset() -> usize {
    const AMX_TILE: u32 = 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    #[allow(
        unused_unsafe,
        reason = "whether cpuid is unsafe depends on the compiler"
    )]
    // SAFETY: every x86-64 processor has `cpuid`; leaves past the last one are not asked
    // for, and `xgetbv` exists where the operating system has switched XSAVE on.
    unsafe {
        let has = __cpuid(0).eax >= 0xd
            && __cpuid(1).ecx & OSXSAVE != 0
            && __cpuid_count(7, 0).edx & AMX_TILE != 0;
        if !has {
            return 0;
        }
        let xcr0: u32;
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _, options(nomem, nostack));
        match xcr0 & (1 << TILE_CONFIG) {
            0 => 0,
            _ => __cpuid_count(0xd, TILE_CONFIG).ebx as usize,
        }
    }
}

/// The interrupted thread's tile configuration in a signal's frame, and whether it is in
/// use; nothing where the processor keeps none.
///
/// # Safety
/// `context` is what the kernel passed to the handler.
unsafe fn native_config<'a>(context: *mut libc::c_void) -> Option<(&'a mut [u8; 64], bool)> {
    /// Of `struct _fpx_sw_bytes`, which lies in the legacy area's spare bytes.
    const MAGIC: usize = 464;
    const MAGIC_VALUE: u32 = 0x4650_5853;
    const FEATURES: usize = MAGIC + 8;
    const SIZE: usize = MAGIC + 16;
    /// `xstate_bv`, the header's first word.
    const IN_USE: usize = 512;
    let offset = NATIVE.load(Relaxed);
    // SAFETY: the caller's; fields behind the legacy area are read after its magic number
    // has said that they are there, the configuration after its size has.
    unsafe {
        let area = (*context.cast::<libc::ucontext_t>())
            .uc_mcontext
            .fpregs
            .cast::<u8>();
        if offset == 0 || area.is_null() {
            return None;
        }
        let word = |at: usize| ptr::read_unaligned(area.add(at).cast::<u32>());
        let bit = 1 << TILE_CONFIG;
        if word(MAGIC) != MAGIC_VALUE
            || word(FEATURES) & bit == 0
            || (word(SIZE) as usize) < offset + 64
        {
            return None;
        }
        Some((&mut *area.add(offset).cast(), word(IN_USE) & bit != 0))
    }
}

/// Takes over what the processor did to the configuration since the last trap.
fn follow((config, in_use): (&mut [u8; 64], bool), tiles: &mut TileState) -> Result<(), Fault> {
    if !in_use {
        tiles.release();
    } else if config[1] != SEEN {
        tiles.configure(TileConfig(*config))?;
        config[1] = SEEN;
        COUNTERS[Op::LdTileCfg as usize].fetch_add(1, Relaxed);
    }
    Ok(())
}

/// Whether [`install`] has succeeded in this process.
pub fn is_installed() -> bool {
    INSTALLED.load(Relaxed)
}

/// Executions so far, all threads together.
pub fn counters() -> Counters {
    let mut counts = Counters::default();
    for (count, counter) in counts.0.iter_mut().zip(&COUNTERS) {
        *count = counter.load(Relaxed);
    }
    counts
}

/// Executions so far of all instructions together.
pub fn total() -> u64 {
    counters().total()
}

/// x86-64's register numbers to the kernel's slots in `gregs`.
const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: as below.
    let native = unsafe { native_config(context) };
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as usize;
    // SAFETY: the processor has just fetched the instruction at `rip`; the decoder asks for
    // a byte only while those before it match an AMX encoding, so it stays inside it.
    let decoded = decode(|i| Some(unsafe { ptr::read((rip + i) as *const u8) }));
    let Some(Decoded {
        instruction,
        length,
    }) = decoded
    else {
        return chain(signal, info, context);
    };
    let next = rip + length;
    let machine = Machine { registers, next };
    // SAFETY: TILES belongs to this thread, and the handler can't interrupt itself: it
    // executes no AMX instruction.
    let outcome = TILES.with(|tiles| {
        // SAFETY: as above.
        let tiles = unsafe { &mut *tiles.get() };
        native.map_or(Ok(()), |native| follow(native, tiles))?;
        // SAFETY: the operands are the interrupted program's.
        unsafe { machine.execute(tiles, instruction) }
    });
    match outcome {
        Ok(()) => {
            COUNTERS[instruction.op() as usize].fetch_add(1, Relaxed);
            registers[libc::REG_RIP as usize] = next as i64;
        }
        Err(Fault::UndefinedOpcode) => chain(signal, info, context),
        // What Linux sends for #GP. It becomes pending and is delivered before the
        // instruction would run again.
        Err(Fault::GeneralProtection) => {
            // SAFETY: plain system calls without memory arguments.
            unsafe {
                libc::syscall(
                    libc::SYS_tgkill,
                    libc::getpid(),
                    libc::gettid(),
                    libc::SIGSEGV,
                )
            };
        }
    }
}

/// Hands the signal to whoever handled it before us.
fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: `install` wrote PREVIOUS before this handler became reachable; the pointer in
    // it is the handler that some other code registered for this very signal, called with
    // the arguments that its flags ask for.
    unsafe {
        let previous = (*PREVIOUS.0.get()).assume_init_ref();
        match previous.sa_sigaction {
            // Returning runs the instruction again, now with the default outcome: death by
            // SIGILL. (An ignored SIGILL that the processor raised kills as well.)
            libc::SIG_DFL | libc::SIG_IGN => {
                libc::signal(signal, libc::SIG_DFL);
            }
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                std::mem::transmute::<usize, Handler>(handler)(signal, info, context);
            }
            handler => {
                std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler)(signal);
            }
        }
    }
}

/// The interrupted thread's registers.
struct Machine<'a> {
    registers: &'a [libc::greg_t; 23],
    /// Address of the following instruction.
    next: usize,
}

impl Machine<'_> {
    /// # Safety
    ///
    /// The memory operand is dereferenced exactly as the processor would: a bad address
    /// raises `SIGSEGV` from inside the handler instead of at the instruction.
    unsafe fn execute(&self, tiles: &mut TileState, instruction: Instruction) -> Result<(), Fault> {
        match instruction {
            Instruction::LdTileCfg(address) => {
                // SAFETY: passed on to the caller; unaligned reads are allowed.
                let config =
                    unsafe { ptr::read_unaligned(self.effective(&address) as *const [u8; 64]) };
                tiles.configure(TileConfig(config))
            }
            Instruction::StTileCfg(address) => {
                // SAFETY: as above.
                unsafe {
                    ptr::write_unaligned(
                        self.effective(&address) as *mut [u8; 64],
                        tiles.config().0,
                    )
                };
                Ok(())
            }
            Instruction::TileRelease => {
                tiles.release();
                Ok(())
            }
            Instruction::TileZero { tile } => tiles.zero(tile.into()),
            Instruction::TileLoad { tile, address, .. } => tiles.load(tile.into(), |row, bytes| {
                let from = self.row(&address, row) as *const u8;
                // SAFETY: as above; `bytes` is ours and does not overlap foreign memory.
                unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
            }),
            Instruction::TileStore { tile, address } => tiles.store(tile.into(), |row, bytes| {
                let to = self.row(&address, row) as *mut u8;
                // SAFETY: as above.
                unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            }),
            Instruction::Dot { op, dest, a, b } => tiles.dot(op, dest.into(), a.into(), b.into()),
        }
    }

    fn register(&self, number: u8) -> usize {
        self.registers[GREGS[usize::from(number)] as usize] as usize
    }

    fn index(&self, address: &Address) -> usize {
        address.index.map_or(0, |(register, scale)| {
            self.register(register).wrapping_mul(scale.into())
        })
    }

    /// Base and displacement.
    fn start(&self, address: &Address) -> usize {
        let base = match address.base {
            Some(register) => self.register(register),
            None if address.rip_relative => self.next,
            None => 0,
        };
        base.wrapping_add_signed(address.displacement as isize)
    }

    fn finish(&self, address: &Address, offset: usize) -> usize {
        let offset = match address.size {
            AddressSize::Bits32 => offset & 0xffff_ffff,
            AddressSize::Bits64 => offset,
        };
        address
            .segment
            .map_or(offset, |segment| offset.wrapping_add(segment_base(segment)))
    }

    /// Address of an ordinary memory operand.
    fn effective(&self, address: &Address) -> usize {
        self.finish(
            address,
            self.start(address).wrapping_add(self.index(address)),
        )
    }

    /// Address of a tile's row: the index register is the distance between rows.
    fn row(&self, address: &Address, row: usize) -> usize {
        let offset = self.index(address).wrapping_mul(row);
        self.finish(address, self.start(address).wrapping_add(offset))
    }
}

fn segment_base(segment: Segment) -> usize {
    const ARCH_GET_FS: libc::c_int = 0x1003;
    const ARCH_GET_GS: libc::c_int = 0x1004;
    let code = match segment {
        Segment::Fs => ARCH_GET_FS,
        Segment::Gs => ARCH_GET_GS,
    };
    let mut base = 0usize;
    // SAFETY: writes one word to a local of that size.
    unsafe { libc::syscall(libc::SYS_arch_prctl, code, &mut base) };
    base
}
