//! Memory of packed weights and KV pages: page-aligned, zero at first, private or a part of a mapped file; and a
//! way to let threads write disjoint parts of one slice.

use crate::{Error, Result};
use memmap2::{Mmap, MmapMut};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that start at a multiple of 64. A copy is the same memory, which nobody can change then.
#[derive(Clone)]
pub enum Bytes {
    /// Private memory.
    Owned(Arc<MmapMut>, usize),
    /// A range of a mapped file, starting at a multiple of 64.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl Bytes {
    /// `len` zero bytes. Pages are given by the system when they are first written.
    pub fn zeroed(len: usize, what: &str) -> Result<Bytes> {
        let map = MmapMut::map_anon(len.max(1)).map_err(|_| Error::OutOfMemory {
            what: what.to_owned(),
            requested: len as u64,
            available: super::memory().available,
        })?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // speed only: fewer TLB misses
        Ok(Bytes::Owned(Arc::new(map), len))
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        match self {
            Bytes::Owned(map, len) => &map[..*len],
            Bytes::Mapped(map, range) => &map[range.clone()],
        }
    }

    /// The bytes, if they are private memory without a copy.
    pub fn get_mut(&mut self) -> &mut [u8] {
        match self {
            Bytes::Owned(map, len) => Arc::get_mut(map).map_or(&mut [], |map| &mut map[..*len]),
            Bytes::Mapped(..) => &mut [],
        }
    }

    /// Gives the pages of a mapped file back to the system. They come back when they are read.
    #[cfg(feature = "cuda")]
    pub(super) fn release(&self) {
        #[cfg(unix)]
        if let Bytes::Mapped(map, range) = self {
            // SAFETY: the map is of a file and read-only: dropped pages come back unchanged from it.
            let _ = unsafe {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                map.unchecked_advise_range(advice, range.start, range.len())
            };
        }
    }

    /// The bytes as f32, if they are private memory.
    pub(super) fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: any four bytes are an f32, and the memory starts at a page.
        unsafe { self.get_mut().align_to_mut().1 }
    }
}

/// A number of each of 16 rows: what a packed float matrix consists of.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [f32; 16]);

impl Line {
    pub(super) const ZERO: Line = Line([0.0; 16]);

    /// The numbers of lines.
    pub(super) fn floats_mut(lines: &mut [Line]) -> &mut [f32] {
        // SAFETY: 16 numbers fill a line without padding.
        unsafe { lines.align_to_mut().1 }
    }

    /// Lines as the kernels take them.
    pub(super) fn bytes(lines: &[Line]) -> &[u8] {
        // SAFETY: 16 numbers fill a line without padding, and any number is four bytes.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
    }
}

/// A slice of which several threads write disjoint parts.
pub(super) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the threads only get disjoint parts (the promise made to `part`), each of which is a `&mut [T]`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Disjoint<'a, T> {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// While it is used, no other thread has a part that overlaps it.
    #[allow(clippy::mut_from_ref)] // that is the point
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range is inside the slice, which is borrowed mutably for 'a; the caller promises that
        // parts in use do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// A part of the slice, to be read.
    ///
    /// # Safety
    /// While it is used, nobody has a part that overlaps it.
    pub(super) unsafe fn shared(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range is inside the slice; the caller promises that nobody writes it.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }
}

#[cfg(all(test, feature = "cuda", target_os = "linux"))]
mod tests {
    use super::Bytes;
    use std::sync::Arc;

    /// KiB of this process's memory that are pages of `name`.
    fn resident(name: &str) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.ends_with(name));
        let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn released_pages_leave_memory_and_come_back() {
        let name = format!("ferrule-released-{}", std::process::id());
        let path = std::env::temp_dir().join(&name);
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        // SAFETY: nobody else writes the file.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        let bytes = Bytes::Mapped(Arc::new(map), 64..4 << 20);
        let sum = || bytes.get().iter().map(|&b| u64::from(b)).sum::<u64>();
        let before = sum();
        assert!(resident(&name) >= 4096);
        bytes.release();
        assert!(resident(&name) <= 64);
        assert_eq!(sum(), before);
        std::fs::remove_file(path).unwrap();
    }
}
