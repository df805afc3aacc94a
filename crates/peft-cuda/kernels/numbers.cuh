// What a kernel does with one number. Put before each of the other files.
//
// Every operation is named with its rounding (`__fmul_rn`), and nothing is fused but where it says so (`__fmaf_rn`), so a result
// has the bits of the scalar code in `peft-codec`. NVRTC has no headers for bf16 and fp16: their patterns are integers here.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE static __device__ __forceinline__
#define THREADS 256
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define ALL 0xffffffffu

// The 16 values that codes stand for, as an argument.
struct Table {
    float of[16];
};

// --- formats -------------------------------------------------------------------------------------------------------

// fp32 to bf16, to the nearest, ties to even: the lower of two is the first. sm_80 has an instruction for it.
INLINE u32 two_brains(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    u32 a = __float_as_uint(first), b = __float_as_uint(second);
    a = (a & 0x7fffffffu) > 0x7f800000u ? (a >> 16) | 0x40u : (a + 0x7fffu + ((a >> 16) & 1u)) >> 16;
    b = (b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return a | (b << 16);
#endif
}

#ifdef __CUDA_ARCH__
INLINE u16 to_half(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
INLINE float of_half(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
#endif

// A format: how many of its numbers 16 bytes hold, and the ways to fp32 and back.
struct Single {
    typedef u32 Raw;
    static const int PER = 4;
    INLINE float wide(u32 raw) { return __uint_as_float(raw); }
    INLINE u32 round(float value) { return __float_as_uint(value); }
    INLINE uint4 pack(const float *v) {
        return make_uint4(round(v[0]), round(v[1]), round(v[2]), round(v[3]));
    }
    INLINE void unpack(uint4 raw, float *v) {
        v[0] = wide(raw.x), v[1] = wide(raw.y), v[2] = wide(raw.z), v[3] = wide(raw.w);
    }
};

struct Brain {
    typedef u16 Raw;
    static const int PER = 8;
    INLINE float wide(u16 raw) { return __uint_as_float((u32)raw << 16); }
    INLINE u16 round(float value) { return (u16)two_brains(value, 0.0f); }
    INLINE uint4 pack(const float *v) {
        return make_uint4(two_brains(v[0], v[1]), two_brains(v[2], v[3]), two_brains(v[4], v[5]), two_brains(v[6], v[7]));
    }
    INLINE void two(u32 raw, float *v) { v[0] = __uint_as_float(raw << 16), v[1] = __uint_as_float(raw & 0xffff0000u); }
    INLINE void unpack(uint4 raw, float *v) { two(raw.x, v), two(raw.y, v + 2), two(raw.z, v + 4), two(raw.w, v + 6); }
};

struct Half {
    typedef u16 Raw;
    static const int PER = 8;
    INLINE float wide(u16 raw) { return of_half(raw); }
    INLINE u16 round(float value) { return to_half(value); }
    INLINE u32 both(const float *v) { return (u32)to_half(v[0]) | ((u32)to_half(v[1]) << 16); }
    INLINE uint4 pack(const float *v) { return make_uint4(both(v), both(v + 2), both(v + 4), both(v + 6)); }
    INLINE void two(u32 raw, float *v) { v[0] = of_half((u16)raw), v[1] = of_half((u16)(raw >> 16)); }
    INLINE void unpack(uint4 raw, float *v) { two(raw.x, v), two(raw.y, v + 2), two(raw.z, v + 4), two(raw.w, v + 6); }
};

// Eight numbers from memory that is aligned to 16 bytes.
template <class T> INLINE void take_eight(const typename T::Raw *from, float *v) {
    const uint4 *words = (const uint4 *)from;
#pragma unroll
    for (int i = 0; i < 8 / T::PER; i++) T::unpack(words[i], v + i * T::PER);
}

// --- scales --------------------------------------------------------------------------------------------------------

// The scale of a block: as it is kept, or an index, a product and a sum, each rounded. 256 indices share a scale of their own.
template <bool NESTED>
INLINE float scale_of(u64 block, const void *scales, const float *absmax, const float *map, float offset) {
    if (NESTED) return __fadd_rn(__fmul_rn(map[((const u8 *)scales)[block]], absmax[block >> 8]), offset);
    return ((const float *)scales)[block];
}

// --- codes ---------------------------------------------------------------------------------------------------------

// How many of the 15 thresholds of NF4 lie below: a search of four comparisons. What is no number has code 0.
struct Nf4 {
    INLINE u32 code(float v) {
        const u32 a = v > __uint_as_float(0x3d22faffu);
        const u32 b = v > __uint_as_float(a ? 0x3ec753f9u : 0xbeadea76u);
        const u32 c = v > __uint_as_float(a ? (b ? 0x3f248dafu : 0x3e5067e0u) : (b ? 0xbe0d38bcu : 0xbf1c5270u));
        const u32 low = a ? (b ? (c ? 0x3f5c89dau : 0x3f006d04u) : (c ? 0x3e9582d4u : 0x3df64862u))
                          : (b ? (c ? 0xbd3a7871u : 0xbe703cecu) : (c ? 0xbeeb8480u : 0xbf591cd8u));
        const u32 d = v > __uint_as_float(low);
        return a << 3 | b << 2 | c << 1 | d;
    }
};

// The magnitude by seven thresholds, a tie being the smaller one; codes of rising magnitudes are 0 1 6 7 4 5 2 3. The sign is
// set where the number is below zero.
struct Fp4 {
    INLINE u32 code(float v) {
        const float m = fabsf(v);
        const u32 a = m > __uint_as_float(0x3e955555u);
        const u32 b = m > __uint_as_float(a ? 0x3f155550u : 0x3db00000u);
        const u32 low = a ? (b ? 0x3f555555u : 0x3ed55556u) : (b ? 0x3e555555u : 0x3b2aaab9u);
        const u32 c = m > __uint_as_float(low);
        return ((0x32547610u >> (4 * (a << 2 | b << 1 | c))) & 7u) | (v < 0.0f ? 8u : 0u);
    }
};

// The index of the nearest of 256 values in rising order; between two, the even one. What is no number has index 0.
INLINE u32 nearest(const float *map, float v) {
    if (v != v) return 0;
    u32 above = 0; // how many are below v: the index of the first that is not
#pragma unroll
    for (u32 step = 128; step > 0; step >>= 1) above += map[above + step - 1] < v ? step : 0;
    above += map[above] < v ? 1 : 0; // of 256 as well
    if (above == 0) return 0;
    if (above == 256) return 255;
    const float middle = __fmul_rn(__fadd_rn(map[above - 1], map[above]), 0.5f);
    if (v < middle) return above - 1;
    if (v > middle) return above;
    return above & ~1u;
}
