// Products with a matrix of few rows, for low-rank adapters: h = x aᵀ, y += s h a, c = s hᵀ x with r of 1 to 64 or so.
//
// Each number of x or y is read once for all of a tile of ranks. A tile is 4 × 4 vectors of sums in registers; what is
// left over at the edges goes through narrower tiles of the same code. float or bfloat16 in memory, float in registers.
#include "clones.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <vector>

namespace {
typedef uint16_t bf16;
const int W = 16;  // numbers in a vector
typedef float V __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE V load(const bf16* p) {
  H h;
  memcpy(&h, p, sizeof h);
  U bits = __builtin_convertvector(h, U) << 16;
  return (V)bits;
}
INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }
INLINE void store(bf16* p, V v) {  // to nearest, ties to even; a NaN stays one
  U bits = (U)v;
  U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  I number = v == v;
  rounded = (rounded & (U)number) | (0x7fc0 & ~(U)number);
  H h = __builtin_convertvector(rounded, H);
  memcpy(p, &h, sizeof h);
}
// The first `count` numbers, zeros behind.
template <class T>
INLINE V load_part(const T* p, int64_t count) {
  T part[W] = {};
  for (int64_t i = 0; i < count; i++) part[i] = p[i];
  return load(part);
}
template <class T>
INLINE void store_part(T* p, V v, int64_t count) {
  T part[W];
  store(part, v);
  for (int64_t i = 0; i < count; i++) p[i] = part[i];
}

// ---- h[m, r] = x[m, n] a[r, n]ᵀ ----

template <int M, int R, class T>
INLINE void project_tile(const T* x, const float* a, float* h, int64_t n, int64_t r) {
  V sum[M][R] = {};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    V xs[M];
    for (int i = 0; i < M; i++) xs[i] = load(x + i * n + j);
    for (int k = 0; k < R; k++) {
      V ak = load(a + k * n + j);
      for (int i = 0; i < M; i++) sum[i][k] += xs[i] * ak;
    }
  }
  if (j < n)
    for (int k = 0; k < R; k++) {
      V ak = load_part(a + k * n + j, n - j);
      for (int i = 0; i < M; i++) sum[i][k] += load_part(x + i * n + j, n - j) * ak;
    }
  for (int i = 0; i < M; i++)
    for (int k = 0; k < R; k++) {
      float total = 0;
      for (int l = 0; l < W; l++) total += sum[i][k][l];
      h[i * r + k] = total;
    }
}
template <int M, class T>
INLINE void project_rows(const T* x, const float* a, float* h, int64_t n, int64_t r) {
  int64_t k = 0;
  for (; k + 4 <= r; k += 4) project_tile<M, 4>(x, a + k * n, h + k, n, r);
  for (; k < r; k++) project_tile<M, 1>(x, a + k * n, h + k, n, r);
}
template <class T>
INLINE void project(const T* x, const float* a, float* h, int64_t n, int64_t r, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) project_rows<4>(x + i * n, a, h + i * r, n, r);
  for (; i < end; i++) project_rows<1>(x + i * n, a, h + i * r, n, r);
}

// ---- y[m, n] = (y +) h[m, r] a[r, n]; h is scaled already ----

template <int M, int J, bool ADD, class T>
INLINE void expand_tile(T* y, const float* h, const float* a, int64_t n, int64_t r) {
  V sum[M][J];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < J; j++) sum[i][j] = ADD ? load(y + i * n + j * W) : V{};
  for (int64_t k = 0; k < r; k++) {
    V ak[J];
    for (int j = 0; j < J; j++) ak[j] = load(a + k * n + j * W);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < J; j++) sum[i][j] += h[i * r + k] * ak[j];
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < J; j++) store(y + i * n + j * W, sum[i][j]);
}
template <bool ADD, class T>
INLINE void expand_end(T* y, const float* h, const float* a, int64_t n, int64_t r, int64_t count) {
  V sum = ADD ? load_part(y, count) : V{};
  for (int64_t k = 0; k < r; k++) sum += h[k] * load_part(a + k * n, count);
  store_part(y, sum, count);
}
template <int M, bool ADD, class T>
INLINE void expand_rows(T* y, const float* h, const float* a, int64_t n, int64_t r) {
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) expand_tile<M, 4, ADD>(y + j, h, a + j, n, r);
  for (; j + W <= n; j += W) expand_tile<M, 1, ADD>(y + j, h, a + j, n, r);
  if (j < n)
    for (int i = 0; i < M; i++) expand_end<ADD>(y + i * n + j, h + i * r, a + j, n, r, n - j);
}
template <bool ADD, class T>
INLINE void expand(T* y, const float* h, const float* a, int64_t n, int64_t r, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) expand_rows<4, ADD>(y + i * n, h + i * r, a, n, r);
  for (; i < end; i++) expand_rows<1, ADD>(y + i * n, h + i * r, a, n, r);
}

// ---- c[r, n] = s h[m, r]ᵀ x[m, n], for columns begin..end: every thread sees all rows, so the order of sums is fixed ----

template <int R, int J, class T>
INLINE void outer_tile(const float* h, const T* x, float* c, float s, int64_t m, int64_t n, int64_t r) {
  V sum[R][J] = {};
  for (int64_t i = 0; i < m; i++) {
    V xs[J];
    for (int j = 0; j < J; j++) xs[j] = load(x + i * n + j * W);
    for (int k = 0; k < R; k++)
      for (int j = 0; j < J; j++) sum[k][j] += h[i * r + k] * xs[j];
  }
  for (int k = 0; k < R; k++)
    for (int j = 0; j < J; j++) store(c + k * n + j * W, sum[k][j] * s);
}
template <int J, class T>
INLINE void outer_columns(const float* h, const T* x, float* c, float s, int64_t m, int64_t n, int64_t r) {
  int64_t k = 0;
  for (; k + 4 <= r; k += 4) outer_tile<4, J>(h + k, x, c + k * n, s, m, n, r);
  for (; k < r; k++) outer_tile<1, J>(h + k, x, c + k * n, s, m, n, r);
}
template <class T>
INLINE void outer(const float* h, const T* x, float* c, float s, int64_t m, int64_t n, int64_t r, int64_t begin,
                  int64_t end) {
  int64_t j = begin;
  for (; j + 4 * W <= end; j += 4 * W) outer_columns<4>(h, x + j, c + j, s, m, n, r);
  for (; j + W <= end; j += W) outer_columns<1>(h, x + j, c + j, s, m, n, r);
  if (j == end) return;
  for (int64_t k = 0; k < r; k++) {
    V sum = {};
    for (int64_t i = 0; i < m; i++) sum += h[i * r + k] * load_part(x + i * n + j, end - j);
    store_part(c + k * n + j, sum * s, end - j);
  }
}

// One compiled copy per type and processor level: a template cannot carry `target_clones`, nor can a lambda.
#define ROWS const float *a, float *h, int64_t n, int64_t r, int64_t b, int64_t e
CLONES void project_f32(const float* x, ROWS) { project(x, a, h, n, r, b, e); }
CLONES void project_bf16(const bf16* x, ROWS) { project(x, a, h, n, r, b, e); }
#define WIDE const float *h, const float *a, int64_t n, int64_t r, int64_t b, int64_t e
CLONES void add_f32(float* y, WIDE) { expand<true>(y, h, a, n, r, b, e); }
CLONES void add_bf16(bf16* y, WIDE) { expand<true>(y, h, a, n, r, b, e); }
CLONES void expand_f32(float* y, WIDE) { expand<false>(y, h, a, n, r, b, e); }
CLONES void expand_bf16(bf16* y, WIDE) { expand<false>(y, h, a, n, r, b, e); }
#define COLUMNS float *c, float s, int64_t m, int64_t n, int64_t r, int64_t b, int64_t e
CLONES void outer_f32(const float* h, const float* x, COLUMNS) { outer(h, x, c, s, m, n, r, b, e); }
CLONES void outer_bf16(const float* h, const bf16* x, COLUMNS) { outer(h, x, c, s, m, n, r, b, e); }

float* f(const at::Tensor& t) { return static_cast<float*>(t.data_ptr()); }
bf16* h16(const at::Tensor& t) { return static_cast<bf16*>(t.data_ptr()); }
bool is_f32(const at::Tensor& t) { return t.scalar_type() == at::kFloat; }

void dense(const at::Tensor& t) {
  TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.dim() == 2, "thin product wants a dense matrix on the processor");
  TORCH_CHECK(is_f32(t) || t.scalar_type() == at::kBFloat16, "thin product wants float or bfloat16, got ", t.scalar_type());
}
// The small factor, dense: [r, n] in float.
at::Tensor small(const at::Tensor& a) {
  TORCH_CHECK(a.is_cpu() && a.dim() == 2 && is_f32(a), "thin product wants a small matrix of floats");
  return a.contiguous();
}
// Rows for a thread: some 64k multiplications at least, and whole tiles.
int64_t grain(int64_t work) { return (std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)) + 3) / 4 * 4; }

// y: [m, n], h: [m, r], a: [r, n]
template <class F, class B>
void wide(const at::Tensor& y, const at::Tensor& h, const at::Tensor& a, double s, F&& floats, B&& halves) {
  dense(y);
  auto hs = small(h), as = small(a);
  int64_t m = y.size(0), n = y.size(1), r = h.size(1);
  TORCH_CHECK(h.size(0) == m && a.size(0) == r && a.size(1) == n, "thin product: ", h.sizes(), " times ", a.sizes(),
              " does not give ", y.sizes());
  auto scaled = hs * s;
  at::parallel_for(0, m, grain(n * r), [&](int64_t b, int64_t e) {
    is_f32(y) ? floats(f(y), f(scaled), f(as), n, r, b, e) : halves(h16(y), f(scaled), f(as), n, r, b, e);
  });
}
}  // namespace

extern "C" {

// x: [m, n], a: [r, n] -> [m, r] float
int peft_thin_project(at::Tensor* x, at::Tensor* a, at::Tensor** h, char** err) {
  return guarded(err, [&] {
    dense(*x);
    auto as = small(*a);
    int64_t m = x->size(0), n = x->size(1), r = as.size(0);
    TORCH_CHECK(as.size(1) == n, "thin product: ", x->sizes(), " does not fit ", as.sizes());
    auto out = at::empty({m, r}, x->options().dtype(at::kFloat));
    at::parallel_for(0, m, grain(n * r), [&](int64_t b, int64_t e) {
      is_f32(*x) ? project_f32(f(*x), f(as), f(out), n, r, b, e) : project_bf16(h16(*x), f(as), f(out), n, r, b, e);
    });
    *h = new at::Tensor(out);
  });
}

// y: [m, n] += s h a
int peft_thin_add(at::Tensor* y, at::Tensor* h, at::Tensor* a, double s, char** err) {
  return guarded(err, [&] { wide(*y, *h, *a, s, add_f32, add_bf16); });
}

// s h a: [m, n] in float or bfloat16
int peft_thin_expand(at::Tensor* h, at::Tensor* a, double s, int half, at::Tensor** y, char** err) {
  return guarded(err, [&] {
    auto kind = half ? at::kBFloat16 : at::kFloat;
    auto out = at::empty({h->size(0), a->size(1)}, h->options().dtype(kind));
    wide(out, *h, *a, s, expand_f32, expand_bf16);
    *y = new at::Tensor(out);
  });
}

// s hᵀ x: [r, n] float; h: [m, r], x: [m, n]
int peft_thin_outer(at::Tensor* h, at::Tensor* x, double s, at::Tensor** c, char** err) {
  return guarded(err, [&] {
    dense(*x);
    auto hs = small(*h);
    int64_t m = x->size(0), n = x->size(1), r = hs.size(1);
    TORCH_CHECK(hs.size(0) == m, "thin product: ", hs.sizes(), " does not fit ", x->sizes());
    auto out = at::empty({r, n}, hs.options());
    int64_t block = 4 * W, blocks = (n + block - 1) / block;
    at::parallel_for(0, blocks, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, m * r * block)), [&](int64_t b, int64_t e) {
      b *= block, e = std::min(n, e * block);
      is_f32(*x) ? outer_f32(f(hs), f(*x), f(out), s, m, n, r, b, e) : outer_bf16(f(hs), h16(*x), f(out), s, m, n, r, b, e);
    });
    *c = new at::Tensor(out);
  });
}
}
