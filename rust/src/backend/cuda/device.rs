//! A device: its context and stream, its memory, and the launches of a step, which are collected and sent together.
//! Knows no operation.
//!
//! An operation has no way to fail, so the first failure is kept, whatever follows is dropped, and [`Device::finish`]
//! tells it. A step whose launches are, byte for byte, those of an earlier one is sent as a graph: nothing
//! else decides what a graph stands for, so a replay cannot differ from the launches it replaces.

use super::launch::Params;
use super::modules::Modules;
use super::probe::{DeviceInfo, Unavailable, probe};
use crate::{Error, Result};
use cudarc::driver::{result, sys};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};

/// Graphs that are kept; the one longest unused goes first.
const GRAPHS: usize = 64;

/// Words that the driver may still read, as lists, before the host waits for it.
const LENT: usize = 64;

/// One device, shared by everything that lies on it.
pub(super) struct Device {
    pub(super) info: DeviceInfo,
    modules: Arc<Modules>,
    stream: sys::CUstream,
    state: Mutex<State>,
}

// SAFETY: contexts, streams and functions are the driver's handles, which any thread may use once it has made the
// context current, as every function below does; the state is behind a lock.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

#[derive(Default)]
struct State {
    /// Launches not yet sent, each as in `Launch`.
    words: Vec<u64>,
    /// What the host gives to the kernels of this step: slots in the order of their first use.
    inputs: Vec<Input>,
    /// Slots that this step uses.
    used: usize,
    /// Words of earlier steps. Where a device reads the host's pageable memory itself (Grace, HMM), a copy may be on its way
    /// after its call has returned, so they stay until the stream has been waited for.
    lent: Vec<Vec<u32>>,
    graphs: Vec<Graph>,
    /// Making a graph has failed: all is launched one by one.
    no_graphs: bool,
    steps: u64,
    fault: Option<Fault>,
}

#[derive(Default)]
struct Input {
    words: Vec<u32>,
    at: u64,
    bytes: usize,
}

struct Graph {
    words: Vec<u64>,
    hash: u64,
    last: u64,
    /// `None`: seen once, sent launch by launch.
    exec: Option<sys::CUgraphExec>,
}

#[derive(Clone)]
enum Fault {
    Memory {
        requested: u64,
        available: u64,
    },
    Unsupported(String),
    /// The device's state is unknown from here on.
    Device(String),
}

impl Fault {
    fn error(&self) -> Error {
        match self {
            &Fault::Memory { requested, available } => Error::OutOfMemory {
                what: "memory of the CUDA device".into(),
                requested,
                available,
            },
            Fault::Unsupported(what) => Error::Unsupported(what.clone()),
            Fault::Device(what) => Error::Device(what.clone()),
        }
    }
}

/// Bytes on a device.
pub(super) struct Memory {
    device: Option<Arc<Device>>,
    pub(super) at: u64,
    pub(super) bytes: usize,
}

impl Memory {
    /// None.
    pub(super) fn none() -> Memory {
        Memory { device: None, at: 0, bytes: 0 }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(device) = &self.device else { return };
        device.flush(&mut device.state()); // launches that have not been sent may use it
        device.free(self.at);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let state = std::mem::take(self.state.get_mut().unwrap_or_else(|e| e.into_inner()));
        state.inputs.iter().for_each(|input| self.free(input.at));
        if self.enter().is_err() {
            return;
        }
        state.graphs.into_iter().for_each(destroy);
        // SAFETY: made by `open`; everything that lay on the device is gone, as it held this.
        unsafe {
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// A launch as words: the function, the grid, the block, the number of words of the parameter, the parameter.
const HEAD: usize = 5;

impl Device {
    /// Device `ordinal` of the driver, or the first that kernels run on.
    pub(super) fn open(ordinal: Option<usize>) -> Result<Arc<Device>> {
        let unavailable = |why: &Unavailable| Error::CudaUnavailable(why.to_string());
        let driver = probe().map_err(unavailable)?;
        let found = driver
            .devices
            .iter()
            .find(|d| ordinal.is_none_or(|ordinal| usize::try_from(d.ordinal) == Ok(ordinal)));
        let Some(info) = found.cloned() else {
            let known: Vec<_> =
                driver.devices.iter().map(|d| format!("cuda:{}", d.ordinal)).collect();
            let found = format!("cuda:{}", ordinal.unwrap_or(0));
            return Err(Error::parameter("device", found, known.join(" or ")));
        };
        let modules = Modules::open(&info, driver.version)?;
        // SAFETY: `modules` retains the context.
        unsafe { result::ctx::set_current(modules.context) }.map_err(failed("context"))?;
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = result::stream::create(kind).map_err(failed("stream"))?;
        Ok(Arc::new(Device { info, modules, stream, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> std::result::Result<(), result::DriverError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.modules.context) }
    }

    /// Free bytes, and all.
    pub(super) fn memory(&self) -> (u64, u64) {
        let asked = self.enter().and_then(|()| result::mem_get_info());
        asked.map_or((0, self.info.memory), |(free, total)| (free as u64, total as u64))
    }

    /// Loads kernels that are going to be needed, so that no step waits for it.
    pub(super) fn load(&self, modules: &[&str]) -> Result<()> {
        self.modules.load(modules)
    }

    /// Memory, not initialized.
    pub(super) fn alloc(self: &Arc<Device>, bytes: usize) -> Result<Memory> {
        self.allocate(bytes).map_err(|fault| fault.error())
    }

    fn allocate(self: &Arc<Device>, bytes: usize) -> std::result::Result<Memory, Fault> {
        let bytes = bytes.max(16);
        Ok(Memory { device: Some(self.clone()), at: self.allocate_raw(bytes)?, bytes })
    }

    fn allocate_raw(&self, bytes: usize) -> std::result::Result<u64, Fault> {
        // SAFETY: plain allocation; what is returned is freed once, by `Memory` or by `free`.
        let at = self.enter().and_then(|()| unsafe { result::malloc_sync(bytes) });
        at.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Fault::Memory { requested: bytes as u64, available: self.memory().0 }
            }
            _ => Fault::Device(format!("allocating: {}", text(error))),
        })
    }

    /// Frees memory once the launches that were sent are done. After a fault of the device it fails, and the memory is
    /// lost with the context.
    fn free(&self, at: u64) {
        if at != 0 && self.enter().is_ok() {
            // SAFETY: allocated by `allocate_raw`, freed once; nothing refers to it any more.
            let _ = unsafe { result::free_sync(at) };
        }
    }

    /// As much memory as asked for, in a step: what was in it before is lost.
    pub(super) fn grow(self: &Arc<Device>, memory: &mut Memory, bytes: usize) {
        if memory.bytes >= bytes {
            return;
        }
        *memory = Memory::none(); // first, so that both are never there at once
        match self.allocate(bytes) {
            Ok(new) => *memory = new,
            Err(fault) => self.state().fail(fault),
        }
    }

    /// Copies to the device, after all that was launched. A failure is one of the step.
    pub(super) fn upload<T: Copy>(&self, to: u64, from: &[T]) {
        let mut state = self.state();
        self.flush(&mut state);
        if state.fault.is_some() {
            return;
        }
        let copied = self.enter().and_then(|()| {
            // SAFETY: callers have allocated the range at `to`; `from` lives until the stream has been waited for.
            unsafe { result::memcpy_htod_async(to, from, self.stream) }
        });
        if let Err(error) = copied.and_then(|()| self.wait(&mut state)) {
            state.fail(Fault::Device(format!("copying to the device: {}", text(error))));
        }
    }

    /// Waits until all that was sent is done.
    fn wait(&self, state: &mut State) -> std::result::Result<(), result::DriverError> {
        // SAFETY: the stream is alive, and callers have entered the context.
        unsafe { result::stream::synchronize(self.stream) }?;
        state.lent.clear();
        Ok(())
    }

    /// Zeros.
    pub(super) fn clear(&self, memory: &Memory) -> Result<()> {
        // SAFETY: the range is the memory's.
        let done = self.enter().and_then(|()| unsafe {
            result::memset_d8_async(memory.at, 0, memory.bytes, self.stream)
        });
        done.map_err(|error| Error::Device(format!("clearing memory: {}", text(error))))
    }

    /// Numbers on the device, after all that was launched. NaN after a fault, which `finish` tells.
    pub(super) fn download(&self, from: u64, count: usize) -> Vec<f32> {
        let mut state = self.state();
        self.flush(&mut state);
        let mut values = vec![f32::NAN; count];
        if state.fault.is_some() || count == 0 {
            return values;
        }
        let copied = self.enter().and_then(|()| {
            // SAFETY: callers pass a range that they own; `values` lives until the stream is done.
            unsafe { result::memcpy_dtoh_async(&mut values, from, self.stream) }
        });
        let copied = copied.and_then(|()| self.wait(&mut state));
        if let Err(error) = copied {
            state.fail(Fault::Device(format!("a step on the device: {}", text(error))));
        }
        values
    }

    /// Where the kernels of this step find `words`.
    pub(super) fn input(&self, words: &[u32]) -> u64 {
        let mut guard = self.state();
        let state = &mut *guard;
        if let Some(known) = state.inputs[..state.used].iter().find(|input| input.words == words) {
            return known.at;
        }
        let slot = state.used;
        state.used += 1;
        if slot == state.inputs.len() {
            state.inputs.push(Input::default());
        }
        let bytes = size_of_val(words).max(16);
        if state.inputs[slot].bytes < bytes {
            // No launch of this step knows the slot.
            let old = std::mem::take(&mut state.inputs[slot]);
            self.free(old.at);
            state.lent.push(old.words);
            let bytes = bytes.next_power_of_two();
            match self.allocate_raw(bytes) {
                Ok(at) => state.inputs[slot] = Input { words: Vec::new(), at, bytes },
                Err(fault) => {
                    state.fail(fault);
                    return 0;
                }
            }
        }
        let input = &mut state.inputs[slot];
        if input.words != words {
            state.lent.push(std::mem::replace(&mut input.words, words.to_vec()));
            let (at, words) = (input.at, input.words.as_slice());
            // SAFETY: the slot has room; launches that read it come later in the stream; the words stay until the stream
            // has been waited for.
            let copied = self
                .enter()
                .and_then(|()| unsafe { result::memcpy_htod_async(at, words, self.stream) });
            if let Err(error) = copied {
                state.fail(Fault::Device(format!("copying to the device: {}", text(error))));
            }
        }
        state.inputs[slot].at
    }

    /// Adds a launch to the step. `params` names only memory of this device.
    pub(super) fn launch<P: Params>(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        block: u32,
        params: &P,
    ) {
        debug_assert!(P::KERNELS.contains(&kernel), "{kernel} takes other parameters");
        let mut state = self.state();
        if state.fault.is_some() || grid.contains(&0) {
            return;
        }
        let limits = grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16;
        let function = match self.modules.kernel(kernel) {
            Ok(Some(function)) if limits => function,
            Ok(_) => {
                return state.fail(Fault::Device(format!("{kernel}: no such launch, {grid:?}")));
            }
            Err(error) => return state.fail(Fault::Device(error.to_string())),
        };
        let words = size_of::<P>().div_ceil(8);
        let head = [
            function as u64,
            grid[0] as u64,
            (grid[1] << 16 | grid[2]) as u64,
            block.into(),
            words as u64,
        ];
        state.words.extend_from_slice(&head);
        let at = state.words.len();
        state.words.resize(at + words, 0);
        // SAFETY: `P` is plain and has no padding, and so many words were added.
        unsafe {
            let to = state.words.as_mut_ptr().add(at).cast::<u8>();
            std::ptr::copy_nonoverlapping((&raw const *params).cast::<u8>(), to, size_of::<P>());
        }
    }

    /// Copies from one memory of the device to another, after all that was launched.
    pub(super) fn copy(&self, to: u64, from: u64, bytes: usize) {
        let mut state = self.state();
        self.flush(&mut state);
        if state.fault.is_some() || bytes == 0 {
            return;
        }
        let done = self.enter().and_then(|()| {
            // SAFETY: callers own both ranges.
            unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
        });
        if let Err(error) = done {
            state.fail(Fault::Device(format!("copying on the device: {}", text(error))));
        }
    }

    /// Milliseconds on the device of a step.
    pub(super) fn timed(&self, step: &mut dyn FnMut()) -> Result<f32> {
        let failed = |error| Error::Device(format!("timing: {}", text(error)));
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let (start, end) = self.enter().and_then(|()| Ok((event()?, event()?))).map_err(failed)?;
        // SAFETY: the events were made above and are destroyed once, after the last use.
        unsafe { result::event::record(start, self.stream) }.map_err(failed)?;
        step();
        self.finish()?;
        // SAFETY: as above.
        let elapsed = unsafe {
            result::event::record(end, self.stream)
                .and_then(|()| result::event::synchronize(end))
                .and_then(|()| result::event::elapsed(start, end))
        };
        // SAFETY: as above.
        unsafe {
            let _ = result::event::destroy(start);
            let _ = result::event::destroy(end);
        }
        elapsed.map_err(failed)
    }

    /// The step asks for something that there is no kernel for. Models that do are refused when they are loaded.
    pub(super) fn refuse(&self, what: &str) {
        let what = format!("{what} does not run on CUDA yet; use device=\"cpu\"");
        self.state().fail(Fault::Unsupported(what));
    }

    /// Ends a step: sends what is left, and tells what has failed.
    pub(super) fn finish(&self) -> Result<()> {
        let mut state = self.state();
        self.flush(&mut state);
        state.used = 0;
        if state.lent.len() > LENT {
            let waited = self.enter().and_then(|()| self.wait(&mut state));
            if let Err(error) = waited {
                state.fail(Fault::Device(format!("a step on the device: {}", text(error))));
            }
        }
        match state.fault.clone() {
            None => Ok(()),
            Some(fault) => {
                if !matches!(fault, Fault::Device(_)) {
                    state.fault = None;
                }
                Err(fault.error())
            }
        }
    }

    /// Sends the launches that were collected.
    fn flush(&self, state: &mut State) {
        if state.words.is_empty() || state.fault.is_some() {
            return state.words.clear();
        }
        state.steps += 1;
        let sent = self.enter().and_then(|()| self.send(state));
        state.words.clear();
        if let Err(error) = sent {
            state.fail(Fault::Device(format!("launching kernels: {}", text(error))));
        }
    }

    fn send(&self, state: &mut State) -> std::result::Result<(), result::DriverError> {
        let fold = |h: u64, w: &u64| (h.rotate_left(5) ^ w).wrapping_mul(0x517c_c1b7_2722_0a95);
        let hash = state.words.iter().fold(0, fold);
        let known = state.graphs.iter().position(|g| g.hash == hash && g.words == state.words);
        let Some(i) = known else {
            if state.graphs.len() == GRAPHS {
                let oldest = (0..GRAPHS).min_by_key(|&i| state.graphs[i].last).unwrap_or(0);
                destroy(state.graphs.swap_remove(oldest));
            }
            let (words, last) = (state.words.clone(), state.steps);
            state.graphs.push(Graph { words, hash, last, exec: None });
            return self.launch_all(&state.words);
        };
        state.graphs[i].last = state.steps;
        if state.graphs[i].exec.is_none() && !state.no_graphs {
            match self.capture(&state.words) {
                Ok(exec) => state.graphs[i].exec = Some(exec),
                Err(error) => {
                    state.no_graphs = true;
                    eprintln!(
                        "ferrule: {}, so each kernel is launched alone, which is slower",
                        text(error)
                    );
                }
            }
        }
        match state.graphs[i].exec {
            // SAFETY: the graph was made below, and what its launches name is what these name.
            Some(exec) => unsafe { result::graph::launch(exec, self.stream) },
            None => self.launch_all(&state.words),
        }
    }

    /// A graph of these launches.
    fn capture(&self, words: &[u64]) -> std::result::Result<sys::CUgraphExec, result::DriverError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not being captured: the state is locked.
        unsafe { result::stream::begin_capture(self.stream, mode) }?;
        let launched = self.launch_all(words);
        // SAFETY: begun above.
        let graph = unsafe { result::stream::end_capture(self.stream) }?;
        launched?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: `graph` was just made; `exec` takes the answer; the graph is not needed after it.
        unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made?;
        }
        Ok(exec)
    }

    fn launch_all(&self, mut words: &[u64]) -> std::result::Result<(), result::DriverError> {
        while let Some((head, rest)) = words.split_first_chunk::<HEAD>() {
            let (params, rest) = rest.split_at(head[4] as usize);
            words = rest;
            let grid = (head[1] as u32, (head[2] >> 16) as u32, head[2] as u32 & 0xffff);
            let mut pointers = [params.as_ptr().cast_mut().cast::<c_void>()];
            // SAFETY: `launch` wrote the function and its one parameter; the driver copies it before it returns.
            unsafe {
                let function = head[0] as sys::CUfunction;
                let block = (head[3] as u32, 1, 1);
                result::launch_kernel(function, grid, block, 0, self.stream, &mut pointers)?;
            }
        }
        Ok(())
    }
}

impl State {
    /// Keeps the first failure.
    fn fail(&mut self, fault: Fault) {
        self.words.clear();
        self.fault.get_or_insert(fault);
    }
}

fn destroy(graph: Graph) {
    if let Some(exec) = graph.exec {
        // SAFETY: made by `capture`, destroyed once; a running one is kept by the driver until it ends.
        let _ = unsafe { result::graph::exec_destroy(exec) };
    }
}

/// A failure of the driver.
pub(super) fn failed(what: &'static str) -> impl Fn(result::DriverError) -> Error {
    move |error| Error::Device(format!("{what}: {}", text(error)))
}

/// A driver's error in words.
pub(super) fn text(error: result::DriverError) -> String {
    let known = |text: std::result::Result<&std::ffi::CStr, _>| {
        text.map(|t| t.to_string_lossy().into_owned())
    };
    match (known(error.error_name()), known(error.error_string())) {
        (Ok(name), Ok(what)) => format!("{name} ({}), {what}", error.0 as u32),
        _ => format!("CUDA error {}", error.0 as u32),
    }
}
