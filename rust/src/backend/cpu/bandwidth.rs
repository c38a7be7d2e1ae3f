//! Reads memory as fast as it goes, for whoever measures it. Has no clock.

use super::Bytes;
use super::pool::{Claims, Pool};
use crate::{Error, Result};
use std::hint::black_box;

/// Bytes that a thread claims at once.
const CLAIM: usize = 256 << 10;

/// Memory, and threads that read it.
pub struct Reader {
    bytes: Bytes,
    pool: Pool,
}

impl Reader {
    /// `len` bytes, each page of them written once.
    pub fn new(threads: usize, len: usize) -> Result<Reader> {
        if threads == 0 || threads > 4096 {
            return Err(Error::parameter("threads", threads, "1 to 4096"));
        }
        let pool = Pool::new(threads).map_err(|e| Error::io("threads", e))?;
        let mut bytes = Bytes::zeroed(len, "memory to measure")?;
        bytes.get_mut().fill(1);
        Ok(Reader { bytes, pool })
    }

    /// Reads every whole line of 64 bytes once.
    pub fn read(&self) {
        let lines = self.bytes.get().as_chunks::<64>().0;
        let claims = Claims::new(lines.len(), self.pool.threads(), CLAIM / 64);
        self.pool.run(&|thread| {
            let mut sums = [0u64; 8];
            claims.each(thread, |run| {
                for line in &lines[run] {
                    for (sum, x) in sums.iter_mut().zip(line.as_chunks().0) {
                        *sum ^= u64::from_ne_bytes(*x);
                    }
                }
            });
            black_box(sums);
        });
    }
}
