// x'[i] = round(table[code[i]] · scale[i / block])
//
// A lane takes the codes of 16 bytes of results, so a warp reads 128 bytes that lie together and writes 512 that do. (Loads of 16 bytes would
// make a lane write 64: each store of the warp would fill half of every sector it touches.) The 16 values lie in 16 banks, so no
// two lanes wait for each other.

// Words that a lane has under way at a time.
#define STEPS 4

template <class T, bool NESTED>
INLINE void tables(const Table &table, const float *map, float *values, float *places) {
    if (threadIdx.x < 16) values[threadIdx.x] = table.of[threadIdx.x];
    if (NESTED) places[threadIdx.x] = map[threadIdx.x];
    __syncthreads();
}

// Codes are aligned to the word of a lane, results to 16 bytes.
template <class T, bool NESTED>
INLINE void dequantise(const u8 *codes, const void *scales, const float *absmax, const float *map, float offset,
                       const Table &table, u32 shift, u64 n, typename T::Raw *out) {
    __shared__ float values[16];
    __shared__ float places[NESTED ? 256 : 1];
    tables<T, NESTED>(table, map, values, places);
    const u64 groups = n / T::PER; // whole ones
    const u64 tile = (u64)THREADS * STEPS;
    for (u64 first = blockIdx.x * tile; first < groups; first += gridDim.x * tile) {
        u32 words[STEPS];
        float scale[STEPS];
        // A lane beyond the end reads what the last one does: without a branch, all loads are under way before the first is waited for.
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const u64 own = first + i * THREADS + threadIdx.x, at = own < groups ? own : groups - 1;
            words[i] = T::PER == 8 ? __ldcs((const u32 *)codes + at) : __ldcs((const u16 *)codes + at); // read once
            scale[i] = scale_of<NESTED>((at * T::PER) >> shift, scales, absmax, places, offset);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const u64 at = first + i * THREADS + threadIdx.x;
            float v[T::PER];
#pragma unroll
            for (int k = 0; k < T::PER; k++) {
                const u32 code = (words[i] >> (8 * (k / 2) + (k % 2 ? 0 : 4))) & 15u; // the first in the high half
                v[k] = __fmul_rn(values[code], scale[i]);
            }
            if (at < groups) ((uint4 *)out)[at] = T::pack(v);
        }
    }
    const u64 rest = groups * T::PER + threadIdx.x; // fewer than a group, and in one block
    if (blockIdx.x == 0 && rest < n) {
        const u32 code = (codes[rest / 2] >> (rest % 2 ? 0 : 4)) & 15u;
        const float scale = scale_of<NESTED>(rest >> shift, scales, absmax, places, offset);
        out[rest] = T::round(__fmul_rn(values[code], scale));
    }
}

// However they lie: a byte a lane.
template <class T, bool NESTED>
INLINE void dequantise_any(const u8 *codes, const void *scales, const float *absmax, const float *map, float offset,
                           const Table &table, u32 shift, u64 n, typename T::Raw *out) {
    __shared__ float values[16];
    __shared__ float places[NESTED ? 256 : 1];
    tables<T, NESTED>(table, map, values, places);
    const u64 bytes = n / 2 + n % 2;
    for (u64 at = (u64)blockIdx.x * THREADS + threadIdx.x; at < bytes; at += (u64)gridDim.x * THREADS) {
        const u32 byte = codes[at];
        const float scale = scale_of<NESTED>((at * 2) >> shift, scales, absmax, places, offset);
        out[at * 2] = T::round(__fmul_rn(values[byte >> 4], scale));
        if (at * 2 + 1 < n) out[at * 2 + 1] = T::round(__fmul_rn(values[byte & 15u], scale));
    }
}

#define DEQUANTISE(NAME, FORM, T, NESTED)                                                                             \
    KERNEL NAME(const u8 *codes, const void *scales, const float *absmax, const float *map, float offset, const __grid_constant__ Table table, \
                u32 shift, u64 n, T::Raw *out) {                                                                      \
        FORM<T, NESTED>(codes, scales, absmax, map, offset, table, shift, n, out);                                    \
    }
#define DEQUANTISE_ALL(NAME, T)                                  \
    DEQUANTISE(dequantise_##NAME, dequantise, T, false)          \
    DEQUANTISE(dequantise_nested_##NAME, dequantise, T, true)    \
    DEQUANTISE(dequantise_any_##NAME, dequantise_any, T, false)  \
    DEQUANTISE(dequantise_any_nested_##NAME, dequantise_any, T, true)

DEQUANTISE_ALL(f32, Single)
DEQUANTISE_ALL(bf16, Brain)
DEQUANTISE_ALL(f16, Half)
