// One step of AdamW over many tensors, whose moments are kept in 8 bits, 256 sharing a scale.
//
//   m = m·β₁ + (1-β₁)·g        v = v·β₂ + (1-β₂)·g²        p = (p + step · m / (√v + eps)) · decay
//
// A warp takes a block: eight numbers a lane, 32 apart, so that all reads and writes of the warp lie together. The tensors are found by the
// number of their first block.

// As `Tensor` in `adamw.rs` lays it out.
struct Tensor {
    void *parameter;
    const void *gradient;
    u8 *first, *second;           // codes of the moments
    float *first_absmax, *second_absmax;
    u64 len, begin;               // numbers; blocks of the tensors before it
    float step, eps, decay, none; // -lr·√(1-β₂ᵗ)/(1-β₁ᵗ); ε·√(1-β₂ᵗ); 1-lr·λ
};

// Which tensor has a block: the last that begins at or before it.
INLINE const Tensor *holder(const Tensor *tensors, u32 count, u64 block) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = low + (high - low) / 2;
        if (tensors[middle].begin <= block) low = middle;
        else high = middle;
    }
    return tensors + low;
}

// The code of a first moment. Its sign is that of the moment, or small ones would go the wrong way.
INLINE u8 signed_code(const float *map, float moment, float absmax) {
    const u32 code = nearest(map, __fdiv_rn(moment, absmax));
    const bool below = (__float_as_uint(map[code]) >> 31) != 0;
    if (moment > 0.0f && below) return (u8)(code + 1);
    if (moment < 0.0f && !below) return (u8)(code - 1);
    return (u8)code;
}

template <class T>
INLINE void adamw(const Tensor *tensors, u32 count, u64 blocks, const float *signed_map, const float *unsigned_map, float beta1,
                  float rest1, float beta2, float rest2) {
    __shared__ float one[256];
    __shared__ float two[256];
    one[threadIdx.x] = signed_map[threadIdx.x];
    two[threadIdx.x] = unsigned_map[threadIdx.x];
    __syncthreads();
    const u32 lane = threadIdx.x % 32;
    const u64 warps = (u64)gridDim.x * (THREADS / 32);
    for (u64 block = (u64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; block < blocks; block += warps) {
        const Tensor it = *holder(tensors, count, block);
        const u64 own = block - it.begin, begin = own * 256 + lane;
        typename T::Raw *parameter = (typename T::Raw *)it.parameter;
        const typename T::Raw *gradient = (const typename T::Raw *)it.gradient;
        const float a1 = it.first_absmax[own], a2 = it.second_absmax[own];
        float m[8], v[8], most1 = 0.0f, most2 = 0.0f;
        u32 moves = 0; // a bit a number: there, and its gradient finite
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const u64 at = begin + k * 32;
            m[k] = 0.0f, v[k] = 0.0f;
            if (at >= it.len) continue;
            const float g = T::wide(gradient[at]);
            if ((__float_as_uint(g) & 0x7f800000u) == 0x7f800000u) continue;
            moves |= 1u << k;
            m[k] = __fadd_rn(__fmul_rn(__fmul_rn(one[it.first[at]], a1), beta1), __fmul_rn(rest1, g));
            v[k] = __fadd_rn(__fmul_rn(__fmul_rn(two[it.second[at]], a2), beta2), __fmul_rn(__fmul_rn(rest2, g), g));
            most1 = fmaxf(most1, fabsf(m[k]));
            most2 = fmaxf(most2, fabsf(v[k]));
        }
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) {
            most1 = fmaxf(most1, __shfl_xor_sync(ALL, most1, apart));
            most2 = fmaxf(most2, __shfl_xor_sync(ALL, most2, apart));
        }
        if (lane == 0) it.first_absmax[own] = most1, it.second_absmax[own] = most2;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const u64 at = begin + k * 32;
            if (at >= it.len) continue;
            if (moves >> k & 1) {
                const float far = __fdiv_rn(m[k], __fadd_rn(__fsqrt_rn(v[k]), it.eps));
                const float moved = T::wide(T::round(__fadd_rn(T::wide(parameter[at]), __fmul_rn(it.step, far))));
                parameter[at] = T::round(__fmul_rn(moved, it.decay));
            }
            it.first[at] = signed_code(one, m[k], most1);
            it.second[at] = (u8)nearest(two, __fdiv_rn(v[k], most2));
        }
    }
}

#define ADAMW(NAME, T)                                                                                                 \
    KERNEL NAME(const Tensor *tensors, u32 count, u64 blocks, const float *signed_map, const float *unsigned_map,      \
                float beta1, float rest1, float beta2, float rest2) {                                                  \
        adamw<T>(tensors, count, blocks, signed_map, unsigned_map, beta1, rest1, beta2, rest2);                        \
    }
ADAMW(adamw_f32, Single)
ADAMW(adamw_bf16, Brain)
ADAMW(adamw_f16, Half)
