// What the kernels need of CUDA C++, in plain C++: included before rust/src/backend/cuda/kernels/device.cuh, of which it
// replaces the first part. A block's threads are fibers of one thread; see emulator.cpp.
#pragma once
#define EMULATED
#include <math.h>
#include <stddef.h>
#include <string.h>

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char i8;
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

struct Dim { u32 x, y, z; };
extern Dim threadIdx, blockIdx, blockDim, gridDim;

/// Registers a kernel: name, most threads of a block, bytes of its parameter, what calls it, the shared memory of its source.
struct Kernel {
    const char* name;
    u32 threads;
    size_t bytes;
    void (*call)(const void*);
    u8 *shared, *shared_end;
    Kernel* next;
    Kernel(const char*, u32, size_t, void (*)(const void*), u8*, u8*);
};

/// Shared memory is in a section for each source, UNIT, and is poisoned before each block.
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define SHARED static __attribute__((section(TEXT(JOIN(shared_, UNIT)))))
extern "C" u8 JOIN(__start_shared_, UNIT)[] __attribute__((weak)), JOIN(__stop_shared_, UNIT)[] __attribute__((weak));

#define KERNEL(threads, name, Params)                                         \
    static void name(const Params& p);                                        \
    static void call_##name(const void* p) { name(*(const Params*)p); }       \
    static Kernel kernel_##name(#name, threads, sizeof(Params), call_##name,  \
                                JOIN(__start_shared_, UNIT), JOIN(__stop_shared_, UNIT)); \
    static void name(const Params& p)
#define KERNEL_BLOCKS(threads, blocks, name, Params) KERNEL(threads, name, Params)
#define DEVICE static inline
#define MEMBER inline

void sync_block();
void sync_warp();
/// What all lanes of the warp put in, [32][bytes], until the lane calls it again; all lanes must come.
const void* gather(const void* mine, size_t bytes);

DEVICE int dp4a(u32 a, u32 b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(i8)(a >> (8 * i)) * (int)(i8)(b >> (8 * i));
    return c;
}
DEVICE void mma_i8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    struct Lane { u32 a[4], b[2]; } mine;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    const Lane* all = (const Lane*)gather(&mine, sizeof mine);
    u32 lane = threadIdx.x % 32;
    for (int c = 0; c < 4; c++) {
        u32 row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        // PTX ISA, m16n8k32: the registers of a are (row, k), (row + 8, k), (row, k + 16), (row + 8, k + 16).
        for (u32 half = 0; half < 2; half++) {
            for (u32 j = 0; j < 4; j++) {
                d[c] = dp4a(all[row % 8 * 4 + j].a[row / 8 + half * 2], all[column * 4 + j].b[half], d[c]);
            }
        }
    }
}
#ifdef __aarch64__ // g++ knows _Float16 there from version 13 on
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif
DEVICE float f16_to_f32(u16 x) {
    Half h;
    memcpy(&h, &x, 2);
    return (float)h;
}
DEVICE u16 f32_to_f16(float x) {
    Half h = (Half)x;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}
void aligned(u64 at, u64 to);
DEVICE uint4 stream(const void* at) {
    aligned((u64)at, 16);
    return *(const uint4*)at;
}
DEVICE uint4 stream_if(bool there, const void* at) { return there ? stream(at) : make_uint4(0, 0, 0, 0); }
DEVICE float stream_f32(const float* at) {
    aligned((u64)at, 4);
    return *at;
}
DEVICE uint4 read16(const void* at) { return stream(at); }
DEVICE uint4 reload16(const void* at) { return stream(at); }
DEVICE u32 read4(const void* at) {
    aligned((u64)at, 4);
    return *(const u32*)at;
}
DEVICE u32 permute(u32 a, u32 b, u32 which) {
    u32 d = 0;
    for (int i = 0; i < 4; i++) {
        u32 n = which >> (4 * i) & 15, byte = (n & 4 ? b : a) >> (8 * (n & 3)) & 255;
        if (n & 8) byte = byte & 128 ? 255 : 0; // as the instruction does
        d |= byte << (8 * i);
    }
    return d;
}
DEVICE u32 add(u32* to, u32 x) {
    *to += x;
    return *to - x;
}
DEVICE float as_float(u32 x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
DEVICE u32 as_bits(float x) {
    u32 u;
    memcpy(&u, &x, 4);
    return u;
}
DEVICE double as_double(u64 x) {
    double d;
    memcpy(&d, &x, 8);
    return d;
}
DEVICE u64 as_word(double x) {
    u64 u;
    memcpy(&u, &x, 8);
    return u;
}
DEVICE float shuffle(float x, int lane) { return ((const float*)gather(&x, 4))[lane]; }
DEVICE float shuffle_xor(float x, int lanes) { return shuffle(x, (threadIdx.x % 32) ^ lanes); }
DEVICE int shuffle_xor(int x, int lanes) { return ((const int*)gather(&x, 4))[(threadIdx.x % 32) ^ lanes]; }
