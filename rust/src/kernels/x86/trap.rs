//! Tests only: runs the AMX and AVX-VNNI kernels, as they are, on CPUs that lack these instructions. Such
//! a CPU refuses an unknown instruction; the handler of that signal decodes it, computes it as the manual
//! says (Intel SDM vol. 2) and goes on behind it. It handles only the instructions these kernels use, and
//! never touches anything else: any other refusal ends the test process as it would have before.

use super::super::Kernels;
use super::{amx, avx2, avx512vnni, avxvnni};
use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::Once;

/// The sets that this CPU can run only by way of the trap.
pub(in super::super) fn sets() -> Vec<&'static Kernels> {
    static AMX: Kernels = Kernels { needs: avx512vnni::KERNELS.needs, ..amx::KERNELS };
    static AVXVNNI: Kernels = Kernels { needs: avx2::KERNELS.needs, ..avxvnni::KERNELS };
    static INSTALL: Once = Once::new();
    let here = super::super::cpu_features();
    let lacking = |real: &Kernels, trapped: &'static Kernels| {
        (!real.runs_with(&here) && trapped.runs_with(&here) && !cfg!(miri)).then_some(trapped)
    };
    let sets = [lacking(&amx::KERNELS, &AMX), lacking(&avxvnni::KERNELS, &AVXVNNI)];
    let sets: Vec<_> = sets.into_iter().flatten().collect();
    if !sets.is_empty() {
        // SAFETY: the handler only touches the interrupted thread's registers and what its instruction
        // would have touched.
        INSTALL.call_once(|| unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
        });
    }
    sets
}

/// The tile registers and their configuration. Empty rows mean that none is loaded.
struct Tiles {
    rows: [usize; 8],
    bytes: [usize; 8],
    data: [[[u8; 64]; 16]; 8],
}

thread_local! {
    // Initialised at compile time and without a destructor, so that a signal handler may use it.
    static TILES: RefCell<Tiles> = const {
        RefCell::new(Tiles { rows: [0; 8], bytes: [0; 8], data: [[[0; 64]; 16]; 8] })
    };
}

extern "C" fn refused(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid context, and the refused instruction can be read.
    let done = unsafe { run(&mut *context.cast()) };
    if done.is_none() {
        // SAFETY: with the default action restored, the instruction is refused again and ends the process.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
    }
}

/// Decodes and computes one instruction; `None` if it is not one of ours or breaks a rule of the manual.
///
/// # Safety
/// `context` is that of a refused instruction.
unsafe fn run(context: &mut libc::ucontext_t) -> Option<()> {
    use libc::*;
    const ORDER: [c_int; 16] = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
        REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    let gprs = context.uc_mcontext.gregs;
    let gpr = |i: usize| gprs[ORDER[i] as usize] as usize;
    let start = gprs[REG_RIP as usize] as *const u8;
    // SAFETY: an instruction has at most 15 bytes; ours end before the code of their functions does.
    let byte = |i: usize| unsafe { start.add(i).read() };
    // Three-byte VEX: c4 | ~R ~X ~B map(5) | W ~vvvv(4) L pp(2) | opcode | modrm. Map 2 is 0f 38.
    if byte(0) != 0xc4 || byte(1) & 31 != 2 || byte(2) & 0x80 != 0 {
        return None;
    }
    let bit = |shift: u8| usize::from(!byte(1) >> shift & 1) << 3;
    let (r, x, b) = (bit(7), bit(6), bit(5));
    let vvvv = usize::from(!byte(2) >> 3 & 15);
    let (wide, prefix, opcode) = (byte(2) & 4 != 0, byte(2) & 3, byte(3));
    let (mode, reg, rm) = (byte(4) >> 6, r | usize::from(byte(4) >> 3 & 7), byte(4) & 7);
    let direct = mode == 3;
    let mut size = 5;
    // Of a memory operand: where it starts, and its index register's value times its scale.
    let (mut base, mut index) = (0usize, 0usize);
    let sib = !direct && rm == 4;
    if !direct {
        let mut low = rm;
        if sib {
            let sib = byte(5);
            size += 1;
            low = sib & 7;
            let i = x | usize::from(sib >> 3 & 7);
            index = if i == 4 { 0 } else { gpr(i) << (sib >> 6) };
        }
        // SAFETY: as for `byte`.
        let i32_at = |i: usize| unsafe { start.add(i).cast::<i32>().read_unaligned() } as usize;
        let absent = mode == 0 && low == 5;
        base = if absent { 0 } else { gpr(b | usize::from(low)) };
        if mode == 1 {
            base = base.wrapping_add(byte(size) as i8 as usize);
            size += 1;
        } else if mode == 2 || absent {
            base = base.wrapping_add(i32_at(size));
            size += 4;
            if absent && !sib {
                base = base.wrapping_add(start as usize + size);
            }
        }
    }
    let rm = b | usize::from(rm);
    TILES.with_borrow_mut(|tiles| {
        let rows = tiles.rows;
        let loaded = |t: usize| rows.get(t).is_some_and(|&rows| rows > 0);
        match (opcode, prefix, wide, direct) {
            // ldtilecfg [m]
            (0x49, 0, false, false) if reg & 7 == 0 => {
                // SAFETY: the instruction reads these 64 bytes.
                let config = unsafe { &*(base.wrapping_add(index) as *const [u8; 64]) };
                let reserved = config[1..16].iter().chain(&config[32..48]).chain(&config[56..]);
                if config[0] != 1 || reserved.copied().any(|x| x != 0) {
                    return None;
                }
                for t in 0..8 {
                    tiles.bytes[t] = usize::from(config[16 + 2 * t]);
                    tiles.rows[t] = usize::from(config[48 + t]);
                    if config[17 + 2 * t] != 0 || tiles.bytes[t] > 64 || tiles.rows[t] > 16 {
                        return None;
                    }
                }
                tiles.data = [[[0; 64]; 16]; 8];
            }
            // tilerelease
            (0x49, 0, false, true) if byte(4) == 0xc0 => {
                (tiles.rows, tiles.bytes) = ([0; 8], [0; 8]);
                tiles.data = [[[0; 64]; 16]; 8];
            }
            // tilezero t
            (0x49, 3, false, true) if rm == 0 && loaded(reg) => tiles.data[reg] = [[0; 64]; 16],
            // tileloadd, tileloaddt1 t, [base + row * index]
            (0x4b, 1 | 3, false, false) if sib && loaded(reg) => {
                let (rows, bytes) = (tiles.rows[reg], tiles.bytes[reg]);
                tiles.data[reg] = [[0; 64]; 16];
                for (i, row) in tiles.data[reg][..rows].iter_mut().enumerate() {
                    let from = base.wrapping_add(i.wrapping_mul(index)) as *const u8;
                    // SAFETY: the instruction reads these bytes.
                    unsafe { from.copy_to_nonoverlapping(row.as_mut_ptr(), bytes) };
                }
            }
            // tilestored [base + row * index], t
            (0x4b, 2, false, false) if sib && loaded(reg) => {
                for (i, row) in tiles.data[reg][..tiles.rows[reg]].iter().enumerate() {
                    let to = base.wrapping_add(i.wrapping_mul(index)) as *mut u8;
                    // SAFETY: the instruction writes these bytes.
                    unsafe { to.copy_from_nonoverlapping(row.as_ptr(), tiles.bytes[reg]) };
                }
            }
            // tdpbssd c, a, b: reg, rm, vvvv
            (0x5e, 3, false, true) if loaded(reg) && loaded(rm) && loaded(vvvv) => {
                let (c, a, b) = (reg, rm, vvvv);
                if c == a || a == b || b == c {
                    return None;
                }
                let fits = tiles.rows[c] == tiles.rows[a]
                    && tiles.bytes[c] == tiles.bytes[b]
                    && tiles.bytes[a] == 4 * tiles.rows[b];
                if !fits {
                    return None;
                }
                let (x, y) = (tiles.data[a], tiles.data[b]);
                for m in 0..tiles.rows[c] {
                    let sums = tiles.data[c][m].as_chunks_mut().0;
                    for n in 0..tiles.bytes[c] / 4 {
                        let products = (0..tiles.bytes[a]).map(|k| {
                            i32::from(x[m][k] as i8) * i32::from(y[k / 4][4 * n + k % 4] as i8)
                        });
                        let sum = i32::from_le_bytes(sums[n]).wrapping_add(products.sum());
                        sums[n] = sum.to_le_bytes();
                    }
                }
            }
            // vpdpbusd and vpdpwssd c, u, s: reg, vvvv, rm
            (0x50 | 0x52, 1, true, _) => {
                // SAFETY: the kernel wrote the vector registers there, in the order of XSAVE.
                let vectors = unsafe { Vectors::new(context.uc_mcontext.fpregs.cast()) }?;
                let s = if direct {
                    vectors.get(rm)
                } else {
                    // SAFETY: the instruction reads these 32 bytes.
                    unsafe { (base.wrapping_add(index) as *const [u8; 32]).read() }
                };
                let (mut c, u) = (vectors.get(reg), vectors.get(vvvv));
                for (lane, c) in c.as_chunks_mut().0.iter_mut().enumerate() {
                    let (u, s): (&[u8; 4], &[u8; 4]) =
                        (&u.as_chunks().0[lane], &s.as_chunks().0[lane]);
                    let half = |x: &[u8; 4], i: usize| i16::from_le_bytes([x[2 * i], x[2 * i + 1]]);
                    let dot: i32 = if opcode == 0x50 {
                        (0..4).map(|i| i32::from(u[i]) * i32::from(s[i] as i8)).sum()
                    } else {
                        (0..2).map(|i| i32::from(half(u, i)) * i32::from(half(s, i))).sum()
                    };
                    *c = i32::from_le_bytes(*c).wrapping_add(dot).to_le_bytes();
                }
                vectors.set(reg, c);
            }
            _ => return None,
        }
        Some(())
    })?;
    context.uc_mcontext.gregs[REG_RIP as usize] += size as i64;
    Some(())
}

/// The vector registers of an interrupted thread, in XSAVE's standard form (Intel SDM vol. 1, 13.4): the
/// low halves from byte 160 on, the high halves from byte 576 on, and at 512 a bit for each part that is
/// not all zeros (1: low, 2: high).
struct Vectors(*mut u8);

impl Vectors {
    const LOW: usize = 160;
    const HIGH: usize = 576;

    /// # Safety
    /// `area` is the floating-point state of a signal context.
    unsafe fn new(area: *mut u8) -> Option<Vectors> {
        // SAFETY: the state has at least 512 bytes; the kernel's mark at 464 says that XSAVE's follow.
        let marked = unsafe { area.add(464).cast::<u32>().read() } == 0x4650_5853;
        marked.then_some(Vectors(area))
    }
    fn part(&self, part: u32, at: usize, i: usize) -> [u8; 16] {
        // SAFETY: `new` checked that the state is there; `i < 16`.
        unsafe {
            let held = self.0.add(512).cast::<u64>().read() >> part & 1 != 0;
            if held { self.0.add(at + 16 * i).cast::<[u8; 16]>().read() } else { [0; 16] }
        }
    }
    fn get(&self, i: usize) -> [u8; 32] {
        let mut all = [0; 32];
        all[..16].copy_from_slice(&self.part(1, Self::LOW, i));
        all[16..].copy_from_slice(&self.part(2, Self::HIGH, i));
        all
    }
    fn set(&self, i: usize, x: [u8; 32]) {
        let (low, high) = x.split_at(16);
        for (part, at, x) in [(1, Self::LOW, low), (2, Self::HIGH, high)] {
            // SAFETY: as in `part`.
            unsafe {
                let held = self.0.add(512).cast::<u64>();
                if held.read() >> part & 1 == 0 {
                    self.0.add(at).write_bytes(0, 16 * 16);
                    held.write(held.read() | 1 << part);
                }
                self.0.add(at + 16 * i).copy_from_nonoverlapping(x.as_ptr(), 16);
            }
        }
    }
}
