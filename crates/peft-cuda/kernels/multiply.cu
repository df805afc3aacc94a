// y[m, o] = Σᵢ x[m, i] · table[code[o · in + i]] · scale[(o · in + i) / block]
//
// A warp makes OUT columns of y for up to ROWS rows of x. A lane decodes eight codes, sums their products with x in fp32, and scales the
// sum: a group of eight lies in one block. Sums of lanes are added in one order, so a result is the same each time. What is read of
// x serves all columns of the warp, what is decoded all rows.

#define WARPS (THREADS / 32)

template <class T, bool NESTED, int ROWS, int OUT, int STEPS>
INLINE void multiply(const typename T::Raw *x, const u8 *codes, const void *scales, const float *absmax, const float *map,
                     float offset, const Table &table, u32 shift, u32 rows, u64 in, u64 out, typename T::Raw *y) {
    __shared__ float values[16];
    __shared__ float places[NESTED ? 256 : 1];
    if (threadIdx.x < 16) values[threadIdx.x] = table.of[threadIdx.x];
    if (NESTED) places[threadIdx.x] = map[threadIdx.x];
    __syncthreads();
    const u32 lane = threadIdx.x % 32;
    const u64 warps = (u64)gridDim.x * WARPS;
    for (u64 first = ((u64)blockIdx.x * WARPS + threadIdx.x / 32) * OUT; first < out; first += warps * OUT) {
        float sum[ROWS][OUT];
#pragma unroll
        for (int m = 0; m < ROWS; m++)
#pragma unroll
            for (int o = 0; o < OUT; o++) sum[m][o] = 0.0f;
        for (u64 begin = 0; begin < in; begin += 256 * STEPS) {
            u32 words[STEPS][OUT];
            float scale[STEPS][OUT];
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int o = 0; o < OUT; o++) {
                    // Beyond the end what is there is read again, and not used: no branch holds the loads up.
                    const u64 own = begin + s * 256 + lane * 8, i = own < in ? own : in - 8;
                    const u64 at = (first + o < out ? first + o : out - 1) * in + i;
                    words[s][o] = ((const u32 *)codes)[at / 8];
                    scale[s][o] = scale_of<NESTED>(at >> shift, scales, absmax, places, offset);
                }
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const u64 i = begin + s * 256 + lane * 8;
                if (i >= in) continue;
                float xs[ROWS][8];
#pragma unroll
                for (int m = 0; m < ROWS; m++) take_eight<T>(x + (m < rows ? m : rows - 1) * in + i, xs[m]);
#pragma unroll
                for (int o = 0; o < OUT; o++) {
                    float v[8];
#pragma unroll
                    for (int k = 0; k < 8; k++) v[k] = values[(words[s][o] >> (8 * (k / 2) + (k % 2 ? 0 : 4))) & 15u];
#pragma unroll
                    for (int m = 0; m < ROWS; m++) {
                        float part = __fmul_rn(v[0], xs[m][0]);
#pragma unroll
                        for (int k = 1; k < 8; k++) part = __fmaf_rn(v[k], xs[m][k], part);
                        sum[m][o] = __fmaf_rn(scale[s][o], part, sum[m][o]);
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < ROWS; m++)
#pragma unroll
            for (int o = 0; o < OUT; o++) {
                float all = sum[m][o];
#pragma unroll
                for (int apart = 16; apart > 0; apart /= 2) all = __fadd_rn(all, __shfl_xor_sync(ALL, all, apart));
                if (lane == 0 && m < rows && first + o < out) y[m * out + first + o] = T::round(all);
            }
    }
}

// For any `in` and any address: a row may begin in the middle of a byte, and a block in the middle of a row.
template <class T, bool NESTED>
INLINE void multiply_any(const typename T::Raw *x, const u8 *codes, const void *scales, const float *absmax, const float *map,
                         float offset, const Table &table, u32 shift, u32 rows, u64 in, u64 out, typename T::Raw *y) {
    __shared__ float values[16];
    __shared__ float places[NESTED ? 256 : 1];
    if (threadIdx.x < 16) values[threadIdx.x] = table.of[threadIdx.x];
    if (NESTED) places[threadIdx.x] = map[threadIdx.x];
    __syncthreads();
    const u32 lane = threadIdx.x % 32;
    const u64 warps = (u64)gridDim.x * WARPS;
    for (u64 o = (u64)blockIdx.x * WARPS + threadIdx.x / 32; o < out; o += warps) {
        float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (u64 i = lane; i < in; i += 32) {
            const u64 at = o * in + i;
            const float value = values[(codes[at / 2] >> (at % 2 ? 0 : 4)) & 15u];
            const float w = __fmul_rn(value, scale_of<NESTED>(at >> shift, scales, absmax, places, offset));
#pragma unroll
            for (int m = 0; m < 8; m++)
                if (m < rows) sum[m] = __fmaf_rn(w, T::wide(x[m * in + i]), sum[m]);
        }
#pragma unroll
        for (int m = 0; m < 8; m++) {
            float all = sum[m];
#pragma unroll
            for (int apart = 16; apart > 0; apart /= 2) all = __fadd_rn(all, __shfl_xor_sync(ALL, all, apart));
            if (lane == 0 && m < rows) y[m * out + o] = T::round(all);
        }
    }
}

#define MULTIPLY(NAME, FORM, T)                                                                                     \
    KERNEL NAME(const T::Raw *x, const u8 *codes, const void *scales, const float *absmax, const float *map,        \
                float offset, const __grid_constant__ Table table, u32 shift, u32 rows, u64 in, u64 out, T::Raw *y) {                       \
        FORM(x, codes, scales, absmax, map, offset, table, shift, rows, in, out, y);                                \
    }
// As many columns a warp and words a lane as keep memory busy with few rows and x out of the way with many.
#define ONE(T, NESTED) multiply<T, NESTED, 1, 1, 4>
#define TWO(T, NESTED) multiply<T, NESTED, 2, 2, 2>
#define FOUR(T, NESTED) multiply<T, NESTED, 4, 2, 2>
#define EIGHT(T, NESTED) multiply<T, NESTED, 8, 4, 1>
#define ANY(T, NESTED) multiply_any<T, NESTED>
#define MULTIPLY_ALL(NAME, T)                              \
    MULTIPLY(multiply_1_##NAME, ONE(T, false), T)          \
    MULTIPLY(multiply_2_##NAME, TWO(T, false), T)          \
    MULTIPLY(multiply_4_##NAME, FOUR(T, false), T)         \
    MULTIPLY(multiply_8_##NAME, EIGHT(T, false), T)        \
    MULTIPLY(multiply_any_##NAME, ANY(T, false), T)        \
    MULTIPLY(multiply_1_nested_##NAME, ONE(T, true), T)    \
    MULTIPLY(multiply_2_nested_##NAME, TWO(T, true), T)    \
    MULTIPLY(multiply_4_nested_##NAME, FOUR(T, true), T)   \
    MULTIPLY(multiply_8_nested_##NAME, EIGHT(T, true), T)  \
    MULTIPLY(multiply_any_nested_##NAME, ANY(T, true), T)

MULTIPLY_ALL(f32, Single)
MULTIPLY_ALL(bf16, Brain)
MULTIPLY_ALL(f16, Half)
