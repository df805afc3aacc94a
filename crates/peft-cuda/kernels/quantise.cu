// absmax = max |x|        code = #{ thresholds < x · (1 / absmax) }
//
// As the CUDA kernels of bitsandbytes decide, but with IEEE's reciprocal: a number that is none is left out of the maximum and has code 0, and
// so has a block of zeros, since 0 · (1 / 0) is no number. A lane takes eight numbers at a time; as many lanes as a block has of
// them, 32 at most, make a block.

template <class T> INLINE void take(const typename T::Raw *x, u64 from, u64 n, bool aligned, float *v) {
    if (aligned && from + 8 <= n) {
        take_eight<T>(x + from, v);
        return;
    }
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = from + k < n ? T::wide(x[from + k]) : 0.0f; // beyond the end lie zeros
}

template <class T, class KIND>
INLINE void quantise(const typename T::Raw *x, u64 n, u32 shift, u8 *codes, float *absmax) {
    const u64 size = 1ull << shift, blocks = (n + size - 1) >> shift;
    const u32 lanes = size < 256 ? (u32)size / 8 : 32; // of a block
    const u32 lane = threadIdx.x % lanes, at_once = 32 / lanes;
    const bool aligned = (u64)x % 16 == 0, words = (u64)codes % 4 == 0;
    const u64 warps = (u64)gridDim.x * (THREADS / 32);
    for (u64 first = ((u64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * at_once; first < blocks; first += warps * at_once) {
        const u64 block = first + threadIdx.x % 32 / lanes;
        const u64 begin = block << shift, end = begin + size < n ? begin + size : n; // with no block: end < begin
        float v[8], most = 0.0f;
        for (u64 from = begin + lane * 8; from < end; from += lanes * 8) {
            take<T>(x, from, n, aligned, v);
#pragma unroll
            for (int k = 0; k < 8; k++) most = fmaxf(most, fabsf(v[k])); // of a number and of what is none it takes the number
        }
        for (u32 apart = lanes / 2; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, apart));
        if (block < blocks && lane == 0) absmax[block] = most;
        const float scale = __frcp_rn(most);
        for (u64 from = begin + lane * 8; from < end; from += lanes * 8) {
            take<T>(x, from, n, aligned, v);
            u32 word = 0; // the first of two in the high half of its byte
#pragma unroll
            for (int k = 0; k < 8; k++) word |= KIND::code(__fmul_rn(v[k], scale)) << (8 * (k / 2) + (k % 2 ? 0 : 4));
            if (words && from + 8 <= n) {
                ((u32 *)codes)[from / 8] = word;
            } else {
                for (u64 k = 0; k < 8 && from + k < n; k += 2) codes[(from + k) / 2] = (u8)(word >> (4 * k));
            }
        }
    }
}

// Scales less their mean in 8 bits, 256 sharing one: a thread a scale.
KERNEL nest(const float *scales, u64 n, float mean, const float *map, u8 *codes, float *absmax) {
    __shared__ float places[256];
    __shared__ float parts[THREADS / 32];
    places[threadIdx.x] = map[threadIdx.x];
    __syncthreads();
    const u64 blocks = (n + 255) / 256;
    for (u64 block = blockIdx.x; block < blocks; block += gridDim.x) {
        const u64 at = block * 256 + threadIdx.x;
        const float v = at < n ? __fsub_rn(scales[at], mean) : 0.0f;
        float most = fmaxf(0.0f, fabsf(v));
        for (int apart = 16; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, apart));
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = most;
        __syncthreads();
        for (int i = 0; i < THREADS / 32; i++) most = fmaxf(most, parts[i]);
        __syncthreads(); // before the next block writes
        if (threadIdx.x == 0) absmax[block] = most;
        if (at < n) codes[at] = (u8)nearest(places, __fmul_rn(v, __frcp_rn(most)));
    }
}

#define QUANTISE(NAME, T, KIND)                                                              \
    KERNEL NAME(const T::Raw *x, u64 n, u32 shift, u8 *codes, float *absmax) {               \
        quantise<T, KIND>(x, n, shift, codes, absmax);                                       \
    }
#define QUANTISE_ALL(NAME, T)              \
    QUANTISE(quantise_nf4_##NAME, T, Nf4)  \
    QUANTISE(quantise_fp4_##NAME, T, Fp4)

QUANTISE_ALL(f32, Single)
QUANTISE_ALL(bf16, Brain)
QUANTISE_ALL(f16, Half)
