// The grouped forms of rust/src/quant/grouped.rs in tiles (pack.rs): codes of 4 to 6 bits, a scale and perhaps an offset
// for each unit of 32 inputs, or 16. What a matrix has, `how` says; it is the same for every thread.
#pragma once
#include "product.cuh"

/// Fields of `how`, as pack.rs writes them: bits beyond 4 | table | offset | scales | log2 of the group.
#define HIGH(how) ((how) & 3)
#define TABLE(how) (((how) >> 2) & 3)
#define OFFSET(how) (((how) >> 4) & 3)
#define SCALES(how) (((how) >> 6) & 3)
#define GROUP(how) (1u << (((how) >> 8) & 15))
#define UNEVEN 1
#define FP4 2
#define SIGNED 1
#define ZERO 2
#define MIN 3
#define BF16 1
#define INTEGER 2
#define POWER 3

/// A grouped matrix in tiles of 32 rows, a lane each. Of each 256 inputs: words of the header, one of each lane beside
/// that of the next; then 16 bytes a lane for each 32 inputs as in int4; then for each 32 inputs as many words a lane as
/// codes have bits beyond 4: with one, bit 8 b + j is that of byte b of word j of the eight (the low nibbles of the 16
/// bytes, then the high ones); with two, bits 8 b + 2 j of the first word are those of the low nibbles, of the second those
/// of the high ones. The last 256 inputs have only the groups of 32 that are needed; the header is whole.
struct Grouped {
    Matrix m;
    /// `how`; words of the header; in it the first byte of scales, that of offsets, and bytes of each.
    u32 how, header, scales, offsets, scale_bytes, offset_bytes;
};
DEVICE u32 grouped_lines(const Grouped& w) { return 512 + 128 * HIGH(w.how); }
/// Block of a tile of the matrix at `at`.
DEVICE u64 block_grouped(const Grouped& w, u64 at, u32 tile, u32 block) {
    u32 header = 128 * w.header, lines = grouped_lines(w);
    return at + (u64)tile * ((u64)header * w.m.blocks + (u64)lines * w.m.groups) + (u64)block * (header + 8 * lines);
}
/// Byte `i` of a row's header, which begins at `at`, and so many as a field has: 1 or 2.
DEVICE u32 field(u64 at, u32 i, u32 bytes) {
    u32 word = read4((const void*)(at + (u64)(i / 4) * 128)) >> (8 * (i % 4));
    return bytes == 2 ? word & 0xffffu : word & 0xffu;
}
/// A scale or an offset from its bits; `d` is what integers are times.
DEVICE float number(u32 scales, u32 bits, float d) {
    if (scales == INTEGER) return d * (float)(int)(i8)bits;
    if (scales == BF16) return bf16_to_f32((u16)bits);
    if (scales == POWER) return as_float(bits < 2 ? 0x00200000u << bits : (bits - 1) << 23); // 2^(bits - 128)
    return f16_to_f32((u16)bits);
}
/// Scale and offset of unit `u` of a row whose header begins at `at`; `unit`: its inputs.
struct Step {
    float s, o;
};
DEVICE Step step_of(const Grouped& w, u64 at, u32 u, u32 unit) {
    u32 kind = SCALES(w.how), g = u * unit / GROUP(w.how), de = kind == INTEGER ? read4((const void*)at) : 0;
    Step step;
    step.s = number(kind, field(at, w.scales + g * w.scale_bytes, w.scale_bytes), f16_to_f32((u16)de));
    step.o = 0.0f;
    switch (OFFSET(w.how)) {
        case SIGNED: step.o = -(float)(8 << HIGH(w.how)) * step.s; break;
        case ZERO: step.o = (float)(int)(i8)field(at, w.offsets + g, 1) * step.s; break;
        case MIN:
            step.o = number(kind, field(at, w.offsets + g * w.offset_bytes, w.offset_bytes), f16_to_f32((u16)(de >> 16)));
            break;
    }
    return step;
}
/// What the eight nibbles of a word stand for: the low ones of its bytes, then the high ones.
DEVICE void look_up(u32 table, u32 q, u32& low, u32& high) {
    u32 v[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 n = q >> (16 * i), part = n & 0x7777u, which = 0x3210u | ((n & 0x8888u) >> 1);
        // UNEVEN: -127 -104 -83 -65 -49 -35 -22 -10 | 1 13 25 38 53 69 89 113. FP4, twice the value: 0 1 2 3 4 6 8 12 |
        // the same, negative.
        u32 below = table == UNEVEN ? permute(0xbfad9881u, 0xf6eaddcfu, part) : permute(0x03020100u, 0x0c080604u, part);
        u32 above = table == UNEVEN ? permute(0x26190d01u, 0x71594535u, part) : permute(0xfdfeff00u, 0xf4f8fafcu, part);
        v[i] = permute(below, above, which);
    }
    low = permute(v[0], v[1], 0x6420);
    high = permute(v[0], v[1], 0x7531);
}
/// Words `j` (low nibbles) and `j + 4` (high ones) of the values of 32 codes; `more`: the words of bits beyond 4.
DEVICE void values(u32 high, u32 table, u32 q, u32 first, u32 second, int j, u32& low, u32& top) {
    if (table) return look_up(table, q, low, top);
    low = q & 0x0f0f0f0fu;
    top = (q >> 4) & 0x0f0f0f0fu;
    if (high == 1) {
        low |= ((first >> j) & 0x01010101u) << 4;
        top |= ((first >> (j + 4)) & 0x01010101u) << 4;
    } else if (high == 2) {
        low |= ((first >> (2 * j)) & 0x03030303u) << 4;
        top |= ((second >> (2 * j)) & 0x03030303u) << 4;
    }
}
