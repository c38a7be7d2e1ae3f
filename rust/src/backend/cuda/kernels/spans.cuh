// The spans of a step, as kv.rs writes them.
#pragma once
#include "device.cuh"

/// For each span `first row, positions, first position, place of its page table`, then the tables, then for each row its
/// span.
struct Spans {
    u64 words;
    u32 tables, of_row;
};
