// A driver library without a device, for tests: the functions of libcuda that this crate calls, memory that is the
// host's, and kernels that are their sources compiled as C++. A block's threads run as fibers that change places at
// barriers and shuffles, so what a kernel computes, and in which order, is what its source says; how fast, or whether
// NVIDIA's compiler reads the source alike, it cannot tell.
//
// It is stricter than a device: a barrier that some threads have left behind, a shuffle without all lanes, a launch beyond
// a kernel's bounds, an unaligned access, a write beyond an allocation end the process. Memory is NaN at first.
//
// Environment: FAKE_INIT (what cuInit gives), FAKE_VERSION, FAKE_CAPABILITY (as 75), FAKE_MEMORY (bytes that can be had),
// FAKE_INTEGRATED (1: the device's memory is the computer's), FAKE_FAULT (the launch that fails, and all after it),
// FAKE_DOWN (threads and blocks run in descending order), FAKE_LATE (a stream does nothing before the host waits for it, and
// reads the host's memory no sooner: CUDA allows that where a device reads pageable memory itself), FAKE_GRAPHS (what making
// a graph gives), FAKE_TAKEN (bytes that cannot be had although the driver says so).
#include "emulator.h"
#include <functional>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

Dim threadIdx, blockIdx, blockDim, gridDim;

static Kernel*& kernels() {
    static Kernel* first = nullptr;
    return first;
}
Kernel::Kernel(const char* name, u32 threads, size_t bytes, void (*call)(const void*), u8* shared, u8* shared_end)
    : name(name), threads(threads), bytes(bytes), call(call), shared(shared), shared_end(shared_end), next(kernels()) {
    kernels() = this;
}

static const Kernel* running;
[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulator: %s: %s (block %u %u %u, thread %u)\n", running ? running->name : "driver", what,
            blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    fflush(stderr);
    _exit(70);
}
void aligned(u64 at, u64 to) {
    if (at % to) fail("unaligned access");
}

// Fibers

enum Wait { RUNS, WARP, BLOCK, DONE };
struct Fiber {
    void* at[5];
    bool begun;
};
// Stacks a little more than a power of two apart: else what they have in use would compete for a few lines of the caches.
static const u32 STACK = (128 << 10) + 4096 + 320, MOST = 1024;
static Fiber fibers[MOST];
static u8 waits[MOST];
static void* scheduler[5];
static u32 current;
static const void* params;

/// Of its own, as GCC asks: not where the place to come back to is kept.
[[gnu::noinline]] static void go(void** to) { __builtin_longjmp(to, 1); }
static void yield(Wait wait) {
    waits[current] = wait;
    if (!__builtin_setjmp(fibers[current].at)) go(scheduler);
}
static void fiber() {
    for (;;) {
        running->call(params);
        yield(DONE);
    }
}
static void resume(u32 i) {
    Fiber& f = fibers[i];
    current = i;
    threadIdx = {i, 0, 0};
    if (__builtin_setjmp(scheduler)) return;
    if (f.begun) go(f.at);
    f.begun = true;
    static ucontext_t start;
    getcontext(&start);
    static u8* stacks = (u8*)mmap(nullptr, (size_t)STACK * MOST, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    start.uc_stack.ss_sp = stacks + (size_t)i * STACK;
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, fiber, 0);
    setcontext(&start);
}
void sync_block() { yield(BLOCK); }
void sync_warp() { yield(WARP); }

// Of each warp what its lanes put in, in turns: who puts in the next time may be ahead of who has not yet looked, but by one
// time only.
static u8 lanes[MOST / 32][2][32 * 32];
static bool turn[MOST];
const void* gather(const void* mine, size_t bytes) {
    u8* all = lanes[threadIdx.x / 32][turn[threadIdx.x] ^= 1];
    memcpy(all + threadIdx.x % 32 * bytes, mine, bytes);
    yield(WARP);
    return all;
}

static const bool down = getenv("FAKE_DOWN") != nullptr;
/// Runs a warp until its lanes are done or wait for the block. How many wait.
static u32 run_warp(u32 first) {
    for (;;) {
        u32 count[4] = {0, 0, 0, 0};
        for (u32 j = 0; j < 32; j++) {
            u32 i = first + (down ? 31 - j : j);
            if (waits[i] == RUNS) resume(i);
        }
        for (u32 i = first; i < first + 32; i++) count[waits[i]]++;
        if (count[WARP] == 0) return count[BLOCK];
        if (count[WARP] != 32) fail("a shuffle or warp barrier that not all lanes reach");
        memset(waits + first, RUNS, 32);
    }
}
static void run_block() {
    u32 n = blockDim.x;
    memset(running->shared, 0xff, running->shared_end - running->shared);
    memset(turn, 0, n);
    memset(waits, RUNS, n);
    for (;;) {
        u32 waiting = 0;
        for (u32 w = 0; w < n; w += 32) waiting += run_warp(down ? n - 32 - w : w);
        if (waiting == 0) return;
        if (waiting != n) fail("a barrier that not all threads reach");
        memset(waits, RUNS, n);
    }
}

// Launches, graphs

struct Launch {
    const Kernel* kernel;
    Dim grid;
    u32 block;
    std::vector<u64> params;
};
typedef std::vector<Launch> Graph;
static Graph* capturing;
static u64 launches, graph_launches, late; // late: allocations of a device that has sent a graph
static bool replayed;
static u32 modules, unloaded;

static long setting(const char* name, long otherwise) {
    const char* value = getenv(name);
    return value ? atol(value) : otherwise;
}
static bool faulty() {
    static long at = setting("FAKE_FAULT", -1);
    return at >= 0 && launches > (u64)at;
}
static void run(const Launch& l) {
    launches++;
    if (faulty()) return;
    running = l.kernel;
    params = l.params.data();
    gridDim = l.grid;
    blockDim = {l.block, 1, 1};
    u64 count = (u64)l.grid.x * l.grid.y * l.grid.z;
    for (u64 j = 0; j < count; j++) {
        u64 i = down ? count - 1 - j : j;
        blockIdx = {(u32)(i % l.grid.x), (u32)(i / l.grid.x % l.grid.y), (u32)(i / l.grid.x / l.grid.y)};
        run_block();
    }
    running = nullptr;
}

// Memory

static std::map<u64, size_t> memory;
static size_t taken;
static const size_t GUARD = 256;

/// What the stream has to do.
static std::vector<std::function<void()>> queue;
static void wait() {
    for (size_t i = 0; i < queue.size(); i++) queue[i]();
    queue.clear();
}
static void enqueue(std::function<void()> job) {
    static bool late = getenv("FAKE_LATE") != nullptr;
    if (capturing) fail("not a launch, in a graph");
    queue.push_back(std::move(job));
    if (!late) wait();
}

extern "C" {
typedef int R;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

R cuInit(u32) { return setting("FAKE_INIT", 0); }
R cuDriverGetVersion(int* v) { *v = setting("FAKE_VERSION", 12020); return OK; }
R cuDeviceGetCount(int* n) { *n = 1; return OK; }
R cuDeviceGet(int* d, int i) { *d = i; return i == 0 ? OK : INVALID; }
R cuDeviceGetName(char* name, int n, int) { snprintf(name, n, "Emulated device"); return OK; }
R cuDeviceGetAttribute(int* v, int which, int) {
    long capability = setting("FAKE_CAPABILITY", 80);
    *v = which == 75 ? capability / 10 : which == 76 ? capability % 10 : which == 18 ? setting("FAKE_INTEGRATED", 0) : 0;
    return OK;
}
R cuDeviceGetPCIBusId(char* id, int n, int) { snprintf(id, n, "0000:01:00.0"); return OK; } // benches/gpu.py asks
R cuDeviceTotalMem_v2(size_t* n, int) { *n = setting("FAKE_MEMORY", 4l << 30); return OK; }
R cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)1; return OK; }
R cuDevicePrimaryCtxRelease_v2(int) {
    wait();
    printf("\nemulator: %llu launches of graphs, %zu allocations left, %llu after a graph, %u modules, %u unloaded\n",
           graph_launches, memory.size(), late, modules, unloaded);
    fflush(stdout);
    replayed = false;
    return OK;
}
R cuCtxSetCurrent(void*) { return OK; }
R cuStreamCreate(void** s, u32) { *s = (void*)1; return OK; }
R cuStreamDestroy_v2(void*) { return OK; }
R cuStreamSynchronize(void*) {
    wait();
    return faulty() ? LAUNCH_FAILED : OK;
}
R cuMemGetInfo_v2(size_t* free, size_t* total) {
    cuDeviceTotalMem_v2(total, 0);
    *free = *total - taken;
    return OK;
}
R cuMemAlloc_v2(u64* at, size_t n) {
    if (capturing) fail("allocation in a graph");
    late += replayed;
    if (taken + n + setting("FAKE_TAKEN", 0) > (size_t)setting("FAKE_MEMORY", 4l << 30)) return OUT_OF_MEMORY;
    u8* p = (u8*)aligned_alloc(256, (n + GUARD + 255) / 256 * 256);
    memset(p, 0xff, n);
    memset(p + n, 0xa5, GUARD);
    memory[(u64)p] = n;
    taken += n;
    *at = (u64)p;
    return OK;
}
R cuMemFree_v2(u64 at) {
    wait();
    auto found = memory.find(at);
    if (found == memory.end()) fail("freed what was not allocated");
    for (size_t i = 0; i < GUARD; i++) {
        if (((u8*)at)[found->second + i] != 0xa5) fail("a write beyond an allocation");
    }
    memset((void*)at, 0xee, found->second);
    taken -= found->second;
    memory.erase(found);
    free((void*)at);
    return OK;
}
static void inside(u64 at, size_t n) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) fail("no such memory");
    --next;
    if (at + n > next->first + next->second) fail("a copy beyond an allocation");
}
R cuMemsetD8Async(u64 at, u8 v, size_t n, void*) {
    inside(at, n);
    enqueue([=] { memset((void*)at, v, n); });
    return OK;
}
static R copy(u64 to, u64 from, size_t n) {
    enqueue([=] { memcpy((void*)to, (void*)from, n); });
    return OK;
}
R cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t n, void*) { inside(to, n); return copy(to, (u64)from, n); }
R cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t n, void*) { inside(from, n); return copy((u64)to, from, n); }
R cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t n, void*) { inside(to, n); inside(from, n); return copy(to, from, n); }
R cuModuleLoadData(void** m, const char* ptx) {
    if (!strstr(ptx, ".version 8.2\n.target sm_")) return 218;
    modules++;
    *m = (void*)ptx;
    return OK;
}
R cuModuleUnload(void*) { unloaded++; return OK; }
R cuModuleGetFunction(void** f, void*, const char* name) {
    for (Kernel* k = kernels(); k; k = k->next) {
        if (!strcmp(k->name, name)) {
            *f = k;
            return OK;
        }
    }
    return NOT_FOUND;
}
R cuLaunchKernel(void* f, u32 x, u32 y, u32 z, u32 bx, u32 by, u32 bz, u32, void*, void** args, void**) {
    const Kernel* k = (const Kernel*)f;
    if (!x || !y || !z || y > 65535 || z > 65535 || bx > k->threads || bx % 32 || by != 1 || bz != 1) return INVALID;
    Launch l = {k, {x, y, z}, bx, std::vector<u64>((k->bytes + 7) / 8)};
    memcpy(l.params.data(), args[0], k->bytes);
    if (capturing) capturing->push_back(l);
    else enqueue([=] { run(l); });
    return OK;
}
R cuStreamBeginCapture_v2(void*, int) { capturing = new Graph; return OK; }
R cuStreamEndCapture(void*, void** g) { *g = capturing; capturing = nullptr; return OK; }
R cuGraphInstantiateWithFlags(void** e, void* g, u64) {
    *e = new Graph(*(Graph*)g);
    return setting("FAKE_GRAPHS", OK);
}
R cuGraphDestroy(void* g) { delete (Graph*)g; return OK; }
R cuGraphExecDestroy(void* g) { wait(); delete (Graph*)g; return OK; }
R cuGraphLaunch(void* g, void*) {
    graph_launches++;
    replayed = true;
    enqueue([g] {
        for (const Launch& l : *(Graph*)g) run(l);
    });
    return OK;
}
R cuEventCreate(void** e, u32) { *e = (void*)1; return OK; }
R cuEventRecord(void*, void*) { return OK; }
R cuEventSynchronize(void*) { wait(); return OK; }
R cuEventElapsedTime(float* ms, void*, void*) { *ms = 1.0f; return OK; }
R cuEventDestroy_v2(void*) { return OK; }
R cuGetErrorName(R r, const char** s) { *s = r == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR"; return OK; }
R cuGetErrorString(R, const char** s) { *s = "emulated"; return OK; }
}
