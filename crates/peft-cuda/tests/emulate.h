// The kernels on a processor: what they take from CUDA, as far as they take it.
//
// The threads of a block are contexts that take turns on one thread. One that waits for its block, or for its warp in a shuffle, lets
// the next run; when all have come, they go on. So indices, tails, barriers and the order of sums are tested as they will be; what
// is not are the instructions themselves, and the races that a barrier left out would make. A barrier that not all reach, and a
// shuffle without its whole warp, end the process.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static // blocks run one after another
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
template <class T> static inline T __ldcs(const T *from) { return *from; }
// Compiled without contraction, so each is rounded once, to the nearest.
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

static inline float of_half(uint16_t half) {
    const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    const float value = exponent ? ldexpf((float)(fraction | 0x400u), (int)exponent - 25) : ldexpf((float)fraction, -24);
    return __uint_as_float(sign | __float_as_uint(value));
}
static inline uint16_t to_half(float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); // 65520 and beyond
    if (magnitude < 0x38800000u) // below 2^-14: multiples of 2^-24, which this sum rounds to
        return (uint16_t)(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

enum State { READY, BLOCK, WARP, DONE };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned current;
static void (*entry)(void **);
static void **arguments;

static void wait(State state) {
    const unsigned self = current;
    fibers[self].state = state;
    swapcontext(&fibers[self].context, &scheduler);
}
static void __syncthreads() { wait(BLOCK); }

static uint32_t slots[1024];
template <class T> static T __shfl_xor_sync(unsigned mask, T value, unsigned apart) {
    if (mask != 0xffffffffu || apart >= 32) abort();
    const unsigned self = threadIdx.x;
    memcpy(&slots[self], &value, 4);
    wait(WARP);
    T other;
    memcpy(&other, &slots[self ^ apart], 4);
    wait(WARP);
    return other;
}

static void body() {
    entry(arguments);
    wait(DONE);
}

// Lets those go on that have all come to the same barrier; says whether any has.
static bool release(unsigned from, unsigned to, State barrier) {
    for (unsigned i = from; i < to; i++)
        if (fibers[i].state != barrier) return false;
    for (unsigned i = from; i < to; i++) fibers[i].state = READY;
    return true;
}

static void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; i++) {
        Fiber &it = fibers[i];
        getcontext(&it.context);
        it.stack.resize(128 << 10);
        it.context.uc_stack.ss_sp = it.stack.data();
        it.context.uc_stack.ss_size = it.stack.size();
        it.context.uc_link = nullptr;
        makecontext(&it.context, body, 0);
        it.state = READY;
    }
    for (;;) {
        bool ran = false, left = false;
        for (unsigned i = 0; i < threads; i++) {
            left |= fibers[i].state != DONE;
            if (fibers[i].state != READY) continue;
            ran = true;
            current = threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i].context);
        }
        if (!left) return;
        bool freed = release(0, threads, BLOCK);
        for (unsigned i = 0; i < threads; i += 32) freed |= release(i, i + 32, WARP);
        if (!ran && !freed) {
            fprintf(stderr, "threads wait for others that never come\n");
            abort();
        }
    }
}

template <class... A, size_t... I> static void spread(void (*kernel)(A...), void **args, std::index_sequence<I...>) {
    kernel(*(std::remove_cv_t<A> *)args[I]...);
}
template <class... A> static void call(void (*kernel)(A...), void **args) {
    spread(kernel, args, std::index_sequence_for<A...>{});
}

struct Named {
    const char *name;
    void (*entry)(void **);
};
#define NAMED(name) {#name, [](void **args) { call(name, args); }},
extern const Named KERNELS[];
extern const size_t COUNT;

// As cuLaunchKernel: 1 if there is no such kernel.
extern "C" int launch(const char *name, unsigned grid, unsigned threads, void **args) {
    for (size_t k = 0; k < COUNT; k++) {
        if (strcmp(KERNELS[k].name, name)) continue;
        entry = KERNELS[k].entry, arguments = args;
        fibers.resize(threads);
        gridDim.x = grid, blockDim.x = threads;
        for (unsigned block = 0; block < grid; block++) {
            blockIdx.x = block;
            run_block(threads);
        }
        return 0;
    }
    return 1;
}
