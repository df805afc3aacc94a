// Kernels for the processor: what libtorch does in several passes over memory, in one.
//
// Plain loops that the compiler turns into vectors, once for each level of x86-64. float or bfloat16 in memory,
// float in registers.
#include "clones.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

namespace {
typedef uint16_t bf16;

INLINE float load(const float* p) { return *p; }
INLINE float load(const bf16* p) {
  uint32_t bits = uint32_t(*p) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE void store(float* p, float v) { *p = v; }
INLINE void store(bf16* p, float v) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &v, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *p = v == v ? rounded : 0x7fc0;
}

// e^x to within one unit in the last place or so, without a branch: e^x = 2^n e^r, |r| <= ln2 / 2, and the series of e^r.
INLINE float exp_(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float n = __builtin_floorf(x * 1.44269504089f + 0.5f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}
INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }
INLINE float tanh_(float x) { return 1.0f - 2.0f / (1.0f + exp_(2.0f * x)); }

// ---- RMSNorm: y = x · rstd · w, rstd = 1/√(mean(x²) + eps) ----

template <class T>
INLINE void rms_forward(const T* x, const T* w, T* y, float* rstd, int64_t d, float eps, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const T* xi = x + i * d;
    float sum = 0;
    for (int64_t j = 0; j < d; j++) sum += load(xi + j) * load(xi + j);
    float s = 1.0f / __builtin_sqrtf(sum / d + eps);
    rstd[i] = s;
    for (int64_t j = 0; j < d; j++) store(y + i * d + j, load(xi + j) * s * load(w + j));
  }
}
// dx = rstd · (g w − x · rstd² · mean(g w x))
template <class T>
INLINE void rms_backward(const T* g, const T* x, const T* w, const float* rstd, T* dx, int64_t d, int64_t begin,
                         int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const T *gi = g + i * d, *xi = x + i * d;
    float dot = 0, s = rstd[i];
    for (int64_t j = 0; j < d; j++) dot += load(gi + j) * load(w + j) * load(xi + j);
    float c = dot * s * s / d;
    for (int64_t j = 0; j < d; j++) store(dx + i * d + j, s * (load(gi + j) * load(w + j) - load(xi + j) * c));
  }
}

// ---- Rotary embedding on [rows, heads, d]: (x1, x2) -> (x1 cos − x2 sin, x2 cos + x1 sin) ----

template <class T>
INLINE void rotate(const T* x, const float* cos, const float* sin, T* y, int64_t heads, int64_t d, int64_t rot,
                   int64_t period, float sign, int64_t begin, int64_t end) {
  int64_t half = rot / 2;
  for (int64_t i = begin; i < end; i++) {
    const float *c = cos + (i % period) * half, *s = sin + (i % period) * half;
    for (int64_t h = 0; h < heads; h++) {
      const T* xi = x + (i * heads + h) * d;
      T* yi = y + (i * heads + h) * d;
      for (int64_t j = 0; j < half; j++) {
        float a = load(xi + j), b = load(xi + half + j), sj = sign * s[j];
        store(yi + j, a * c[j] - b * sj);
        store(yi + half + j, b * c[j] + a * sj);
      }
      for (int64_t j = rot; j < d; j++) yi[j] = xi[j];
    }
  }
}

// ---- SwiGLU: y = silu(a) · b ----

template <class T>
INLINE void swiglu_forward(const T* a, const T* b, T* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    float v = load(a + i);
    store(y + i, v * sigmoid(v) * load(b + i));
  }
}
template <class T>
INLINE void swiglu_backward(const T* g, const T* a, const T* b, T* da, T* db, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    float v = load(a + i), u = load(b + i), gi = load(g + i), s = sigmoid(v);
    store(db + i, gi * v * s);
    store(da + i, gi * u * s * (1.0f + v * (1.0f - s)));
  }
}

// ---- Columns scaled: y = x ∘ s. The sums over rows go by blocks, so that they do not depend on the threads ----

template <class T>
INLINE void scale_forward(const T* x, const float* s, T* y, int64_t n, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    for (int64_t j = 0; j < n; j++) store(y + i * n + j, load(x + i * n + j) * s[j]);
}
const int64_t COLS = 128, ROWS = 64;
// dx = g ∘ s, where it is wanted, and ds = Σ_rows g ∘ x, for the columns of blocks `begin` to `end`.
template <class T>
INLINE void scale_backward(const T* g, const T* x, const float* s, T* dx, float* ds, int64_t m, int64_t n, int64_t begin,
                           int64_t end) {
  for (int64_t c = begin * COLS; c < end * COLS && c < n; c += COLS) {
    int64_t w = n - c < COLS ? n - c : COLS;
    for (int64_t j = 0; j < w; j++) ds[c + j] = 0;
    for (int64_t top = 0; top < m; top += ROWS) {
      int64_t bottom = m - top < ROWS ? m : top + ROWS;
      float part[COLS] = {};
      for (int64_t i = top; i < bottom; i++) {
        const T *gi = g + i * n + c, *xi = x + i * n + c;
        for (int64_t j = 0; j < w; j++) part[j] += load(gi + j) * load(xi + j);
        if (dx) {
          T* di = dx + i * n + c;
          for (int64_t j = 0; j < w; j++) store(di + j, load(gi + j) * s[c + j]);
        }
      }
      for (int64_t j = 0; j < w; j++) ds[c + j] += part[j];
    }
  }
}

// ---- GELU, tanh form: y = x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))) ----

const float GELU_C = 0.7978845608f, GELU_A = 0.044715f;
template <class T>
INLINE void gelu_forward(const T* x, T* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    float v = load(x + i), t = tanh_(GELU_C * (v + GELU_A * v * v * v));
    store(y + i, 0.5f * v * (1.0f + t));
  }
}
template <class T>
INLINE void gelu_backward(const T* g, const T* x, T* dx, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    float v = load(x + i), t = tanh_(GELU_C * (v + GELU_A * v * v * v));
    float slope = 0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * GELU_C * (1.0f + 3.0f * GELU_A * v * v);
    store(dx + i, load(g + i) * slope);
  }
}

// ---- Softmax of scores [rows, n] in place, where row i is query i % queries: z · scale + mask, causal or not ----

INLINE void softmax(float* z, const float* mask, int64_t mask_rows, int64_t n, int64_t queries, float scale, bool causal,
                    int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    float* zi = z + i * n;
    int64_t seen = causal ? i % queries + 1 : n;
    float top = -__builtin_inff(), sum = 0;
    if (mask) {
      const float* mi = mask + (i % mask_rows) * n;
      for (int64_t j = 0; j < seen; j++) zi[j] = zi[j] * scale + mi[j];
    } else {
      for (int64_t j = 0; j < seen; j++) zi[j] *= scale;
    }
    for (int64_t j = 0; j < seen; j++) top = zi[j] > top ? zi[j] : top;
    for (int64_t j = 0; j < seen; j++) {
      // exp_ stops at e^-87: what a mask hides must be nothing, not nearly nothing.
      float e = zi[j] - top < -87.0f ? 0.0f : exp_(zi[j] - top);
      zi[j] = e;
      sum += e;
    }
    float inverse = 1.0f / sum;
    for (int64_t j = 0; j < seen; j++) zi[j] *= inverse;
    for (int64_t j = seen; j < n; j++) zi[j] = 0;
  }
}
// dz = scale · p (dp − Σ p dp), in place of dp
INLINE void softmax_backward(float* dp, const float* p, int64_t n, float scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    float* di = dp + i * n;
    const float* pi = p + i * n;
    float dot = 0;
    for (int64_t j = 0; j < n; j++) dot += di[j] * pi[j];
    for (int64_t j = 0; j < n; j++) di[j] = scale * pi[j] * (di[j] - dot);
  }
}
CLONES void softmax_rows(float* z, const float* mask, int64_t mask_rows, int64_t n, int64_t queries, float scale, bool causal, int64_t b, int64_t e) {
  softmax(z, mask, mask_rows, n, queries, scale, causal, b, e);
}
CLONES void softmax_backward_rows(float* dp, const float* p, int64_t n, float scale, int64_t b, int64_t e) {
  softmax_backward(dp, p, n, scale, b, e);
}

// ---- y[m, n] = x[m, k] w[n, k]ᵀ for few rows: bound by reading w once ----

template <class T>
INLINE void gemv(const float* x, const T* w, const T* bias, T* y, int64_t m, int64_t n, int64_t k, int64_t begin,
                 int64_t end) {
  for (int64_t j = begin; j < end; j++) {
    const T* wj = w + j * k;
    for (int64_t i = 0; i < m; i++) {
      float sum = 0;
      for (int64_t l = 0; l < k; l++) sum += load(wj + l) * x[i * k + l];
      store(y + i * n + j, bias ? sum + load(bias + j) : sum);
    }
  }
}

// ---- Cross-entropy: loss = log Σ e^z − z[y]; z becomes its gradient softmax(z) − onehot(y) ----

template <class T>
INLINE void xent(T* z, const int64_t* target, float* loss, int64_t v, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    T* zi = z + i * v;
    float top = load(zi), sum = 0, at = load(zi + target[i]);
    for (int64_t j = 1; j < v; j++) top = load(zi + j) > top ? load(zi + j) : top;
    for (int64_t j = 0; j < v; j++) sum += exp_(load(zi + j) - top);
    float log_sum = top + __builtin_logf(sum), scale = 1.0f / sum;
    for (int64_t j = 0; j < v; j++) store(zi + j, exp_(load(zi + j) - top) * scale);
    store(zi + target[i], __builtin_expf(at - log_sum) - 1.0f);
    loss[i] = log_sum - at;
  }
}

// One compiled copy per type and processor level: a template cannot carry `target_clones`, nor can a lambda.
#define BOTH(NAME, ARGS_F, ARGS_B, CALL)    \
  CLONES void NAME##_f32 ARGS_F { CALL; }   \
  CLONES void NAME##_bf16 ARGS_B { CALL; }

BOTH(rms_fwd, (const float* x, const float* w, float* y, float* r, int64_t d, float eps, int64_t b, int64_t e),
     (const bf16* x, const bf16* w, bf16* y, float* r, int64_t d, float eps, int64_t b, int64_t e),
     rms_forward(x, w, y, r, d, eps, b, e))
BOTH(rms_bwd, (const float* g, const float* x, const float* w, const float* r, float* dx, int64_t d, int64_t b, int64_t e),
     (const bf16* g, const bf16* x, const bf16* w, const float* r, bf16* dx, int64_t d, int64_t b, int64_t e),
     rms_backward(g, x, w, r, dx, d, b, e))
BOTH(rope, (const float* x, const float* c, const float* s, float* y, int64_t h, int64_t d, int64_t rot, int64_t p, float sign, int64_t b, int64_t e),
     (const bf16* x, const float* c, const float* s, bf16* y, int64_t h, int64_t d, int64_t rot, int64_t p, float sign, int64_t b, int64_t e),
     rotate(x, c, s, y, h, d, rot, p, sign, b, e))
BOTH(swiglu_fwd, (const float* a, const float* u, float* y, int64_t b, int64_t e),
     (const bf16* a, const bf16* u, bf16* y, int64_t b, int64_t e), swiglu_forward(a, u, y, b, e))
BOTH(swiglu_bwd, (const float* g, const float* a, const float* u, float* da, float* du, int64_t b, int64_t e),
     (const bf16* g, const bf16* a, const bf16* u, bf16* da, bf16* du, int64_t b, int64_t e), swiglu_backward(g, a, u, da, du, b, e))
BOTH(scale_fwd, (const float* x, const float* s, float* y, int64_t n, int64_t b, int64_t e),
     (const bf16* x, const float* s, bf16* y, int64_t n, int64_t b, int64_t e), scale_forward(x, s, y, n, b, e))
BOTH(scale_bwd, (const float* g, const float* x, const float* s, float* dx, float* ds, int64_t m, int64_t n, int64_t b, int64_t e),
     (const bf16* g, const bf16* x, const float* s, bf16* dx, float* ds, int64_t m, int64_t n, int64_t b, int64_t e),
     scale_backward(g, x, s, dx, ds, m, n, b, e))
BOTH(gelu_fwd, (const float* x, float* y, int64_t b, int64_t e), (const bf16* x, bf16* y, int64_t b, int64_t e),
     gelu_forward(x, y, b, e))
BOTH(gelu_bwd, (const float* g, const float* x, float* dx, int64_t b, int64_t e),
     (const bf16* g, const bf16* x, bf16* dx, int64_t b, int64_t e), gelu_backward(g, x, dx, b, e))
BOTH(gemv_rows, (const float* x, const float* w, const float* bias, float* y, int64_t m, int64_t n, int64_t k, int64_t b, int64_t e),
     (const float* x, const bf16* w, const bf16* bias, bf16* y, int64_t m, int64_t n, int64_t k, int64_t b, int64_t e),
     gemv(x, w, bias, y, m, n, k, b, e))

BOTH(xent_rows, (float* z, const int64_t* t, float* l, int64_t v, int64_t b, int64_t e),
     (bf16* z, const int64_t* t, float* l, int64_t v, int64_t b, int64_t e), xent(z, t, l, v, b, e))

// Calls f32(float pointers…) or bf16(…) by the dtype of `like`; every tensor must be contiguous.
void check(const at::Tensor& t) {
  TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "kernel wants a contiguous tensor on the processor");
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, "kernel wants float or bfloat16, got ",
              t.scalar_type());
}
void same(const at::Tensor& a, const at::Tensor& b) {
  check(b);
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.numel() == b.numel(), "kernel operands differ: ", a.sizes(), " ",
              a.scalar_type(), " and ", b.sizes(), " ", b.scalar_type());
}
float* f(const at::Tensor& t) { return static_cast<float*>(t.data_ptr()); }
bf16* h(const at::Tensor& t) { return static_cast<bf16*>(t.data_ptr()); }
bool is_f32(const at::Tensor& t) { return t.scalar_type() == at::kFloat; }
const int64_t GRAIN = 16384;  // elements a thread should have at least
int64_t grain(int64_t per_row) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, per_row)); }
}  // namespace

extern "C" {

int peft_rms_norm(at::Tensor* x, at::Tensor* w, double eps, at::Tensor** y, at::Tensor** rstd, char** err) {
  return guarded(err, [&] {
    check(*x), check(*w);
    int64_t d = w->numel(), rows = d ? x->numel() / d : 0;
    TORCH_CHECK(x->size(-1) == d && w->scalar_type() == x->scalar_type(), "rms_norm: weight does not fit ", x->sizes());
    auto out = at::empty_like(*x);
    auto r = at::empty({rows}, x->options().dtype(at::kFloat));
    at::parallel_for(0, rows, grain(d), [&](int64_t b, int64_t e) {
      is_f32(*x) ? rms_fwd_f32(f(*x), f(*w), f(out), f(r), d, eps, b, e) : rms_fwd_bf16(h(*x), h(*w), h(out), f(r), d, eps, b, e);
    });
    *y = new at::Tensor(out), *rstd = new at::Tensor(r);
  });
}

int peft_rms_norm_backward(at::Tensor* g, at::Tensor* x, at::Tensor* w, at::Tensor* rstd, at::Tensor** dx, char** err) {
  return guarded(err, [&] {
    check(*x), same(*x, *g), check(*w);
    int64_t d = w->numel(), rows = x->numel() / d;
    auto out = at::empty_like(*x);
    at::parallel_for(0, rows, grain(d), [&](int64_t b, int64_t e) {
      is_f32(*x) ? rms_bwd_f32(f(*g), f(*x), f(*w), f(*rstd), f(out), d, b, e)
                 : rms_bwd_bf16(h(*g), h(*x), h(*w), f(*rstd), h(out), d, b, e);
    });
    *dx = new at::Tensor(out);
  });
}

// x: [.., seq, heads, d]; cos, sin: [rows, rot/2] float, where rows divides the number of positions in x.
int peft_rope(at::Tensor* x, at::Tensor* cos, at::Tensor* sin, int inverse, at::Tensor** y, char** err) {
  return guarded(err, [&] {
    check(*x), check(*cos), same(*cos, *sin);
    int64_t d = x->size(-1), heads = x->size(-2), rows = x->numel() / (d * heads);
    int64_t period = cos->size(0), rot = 2 * cos->size(1);
    TORCH_CHECK(is_f32(*cos) && rot <= d && period > 0 && rows % period == 0, "rope: tables ", cos->sizes(), " do not fit ", x->sizes());
    auto out = at::empty_like(*x);
    float sign = inverse ? -1 : 1;
    at::parallel_for(0, rows, grain(d * heads), [&](int64_t b, int64_t e) {
      is_f32(*x) ? rope_f32(f(*x), f(*cos), f(*sin), f(out), heads, d, rot, period, sign, b, e)
                 : rope_bf16(h(*x), f(*cos), f(*sin), h(out), heads, d, rot, period, sign, b, e);
    });
    *y = new at::Tensor(out);
  });
}

int peft_swiglu(at::Tensor* a, at::Tensor* u, at::Tensor** y, char** err) {
  return guarded(err, [&] {
    check(*a), same(*a, *u);
    auto out = at::empty_like(*a);
    at::parallel_for(0, a->numel(), GRAIN, [&](int64_t b, int64_t e) {
      is_f32(*a) ? swiglu_fwd_f32(f(*a), f(*u), f(out), b, e) : swiglu_fwd_bf16(h(*a), h(*u), h(out), b, e);
    });
    *y = new at::Tensor(out);
  });
}

int peft_swiglu_backward(at::Tensor* g, at::Tensor* a, at::Tensor* u, at::Tensor** da, at::Tensor** du, char** err) {
  return guarded(err, [&] {
    check(*a), same(*a, *u), same(*a, *g);
    auto oa = at::empty_like(*a), ou = at::empty_like(*u);
    at::parallel_for(0, a->numel(), GRAIN, [&](int64_t b, int64_t e) {
      is_f32(*a) ? swiglu_bwd_f32(f(*g), f(*a), f(*u), f(oa), f(ou), b, e)
                 : swiglu_bwd_bf16(h(*g), h(*a), h(*u), h(oa), h(ou), b, e);
    });
    *da = new at::Tensor(oa), *du = new at::Tensor(ou);
  });
}

// y = x ∘ s; x, y: [.., n], which may be one tensor; s: [n] float.
int peft_scale(at::Tensor* x, at::Tensor* s, at::Tensor* y, char** err) {
  return guarded(err, [&] {
    check(*x), same(*x, *y), check(*s);
    int64_t n = s->numel(), rows = n ? x->numel() / n : 0;
    TORCH_CHECK(is_f32(*s) && x->size(-1) == n, "scale: ", s->sizes(), " does not fit ", x->sizes());
    at::parallel_for(0, rows, grain(n), [&](int64_t b, int64_t e) {
      is_f32(*x) ? scale_fwd_f32(f(*x), f(*s), f(*y), n, b, e) : scale_fwd_bf16(h(*x), f(*s), h(*y), n, b, e);
    });
  });
}

// ds: [n] float; dx, if it is there: as x.
int peft_scale_backward(at::Tensor* g, at::Tensor* x, at::Tensor* s, at::Tensor* dx, at::Tensor** ds, char** err) {
  return guarded(err, [&] {
    check(*x), same(*x, *g), check(*s);
    if (dx) same(*x, *dx);
    int64_t n = s->numel(), m = n ? x->numel() / n : 0, blocks = (n + COLS - 1) / COLS;
    TORCH_CHECK(is_f32(*s) && x->size(-1) == n, "scale: ", s->sizes(), " does not fit ", x->sizes());
    auto out = at::empty({n}, s->options());
    at::parallel_for(0, blocks, grain(m * COLS), [&](int64_t b, int64_t e) {
      is_f32(*x) ? scale_bwd_f32(f(*g), f(*x), f(*s), dx ? f(*dx) : nullptr, f(out), m, n, b, e)
                 : scale_bwd_bf16(h(*g), h(*x), f(*s), dx ? h(*dx) : nullptr, f(out), m, n, b, e);
    });
    *ds = new at::Tensor(out);
  });
}

int peft_gelu_tanh(at::Tensor* x, at::Tensor** y, char** err) {
  return guarded(err, [&] {
    check(*x);
    auto out = at::empty_like(*x);
    at::parallel_for(0, x->numel(), GRAIN, [&](int64_t b, int64_t e) {
      is_f32(*x) ? gelu_fwd_f32(f(*x), f(out), b, e) : gelu_fwd_bf16(h(*x), h(out), b, e);
    });
    *y = new at::Tensor(out);
  });
}

int peft_gelu_tanh_backward(at::Tensor* g, at::Tensor* x, at::Tensor** dx, char** err) {
  return guarded(err, [&] {
    check(*x), same(*x, *g);
    auto out = at::empty_like(*x);
    at::parallel_for(0, x->numel(), GRAIN, [&](int64_t b, int64_t e) {
      is_f32(*x) ? gelu_bwd_f32(f(*g), f(*x), f(out), b, e) : gelu_bwd_bf16(h(*g), h(*x), h(out), b, e);
    });
    *dx = new at::Tensor(out);
  });
}

// x: [m, k] (few rows), w: [n, k] -> [m, n]
int peft_gemv(at::Tensor* x, at::Tensor* w, at::Tensor* bias, at::Tensor** y, char** err) {
  return guarded(err, [&] {
    check(*x), check(*w);
    TORCH_CHECK(x->dim() == 2 && w->dim() == 2 && x->size(1) == w->size(1) && x->scalar_type() == w->scalar_type(),
                "gemv: ", x->sizes(), " does not fit ", w->sizes());
    if (bias) check(*bias);
    int64_t m = x->size(0), n = w->size(0), k = w->size(1);
    auto xf = x->to(at::kFloat);
    auto out = at::empty({m, n}, x->options());
    at::parallel_for(0, n, grain(k), [&](int64_t b, int64_t e) {
      is_f32(*x) ? gemv_rows_f32(f(xf), f(*w), bias ? f(*bias) : nullptr, f(out), m, n, k, b, e)
                 : gemv_rows_bf16(f(xf), h(*w), bias ? h(*bias) : nullptr, h(out), m, n, k, b, e);
    });
    *y = new at::Tensor(out);
  });
}

// z: [n, vocab] becomes its gradient; target: [n], each in 0..vocab; loss: [n]
int peft_cross_entropy(at::Tensor* z, at::Tensor* target, at::Tensor** loss, char** err) {
  return guarded(err, [&] {
    check(*z);
    TORCH_CHECK(z->dim() == 2 && target->dim() == 1 && target->size(0) == z->size(0) && target->is_contiguous() &&
                    target->scalar_type() == at::kLong,
                "cross_entropy: targets ", target->sizes(), " do not fit ", z->sizes());
    int64_t n = z->size(0), v = z->size(1);
    auto* t = static_cast<const int64_t*>(target->data_ptr());
    for (int64_t i = 0; i < n; i++) TORCH_CHECK(t[i] >= 0 && t[i] < v, "cross_entropy: target ", t[i], " of ", v, " tokens");
    auto out = at::empty({n}, z->options().dtype(at::kFloat));
    at::parallel_for(0, n, grain(v), [&](int64_t b, int64_t e) {
      is_f32(*z) ? xent_rows_f32(f(*z), t, f(out), v, b, e) : xent_rows_bf16(h(*z), t, f(out), v, b, e);
    });
    *loss = new at::Tensor(out);
  });
}

// z: [batch, heads, queries, keys] float, in place; mask: [batch or 1, heads or 1, queries, keys] float or null, added
int peft_softmax(at::Tensor* z, at::Tensor* mask, double scale, int causal, char** err) {
  return guarded(err, [&] {
    check(*z);
    TORCH_CHECK(z->dim() == 4 && is_f32(*z), "softmax: scores are ", z->sizes(), " ", z->scalar_type());
    int64_t n = z->size(3), queries = z->size(2);
    if (mask) {
      check(*mask);
      TORCH_CHECK(is_f32(*mask) && mask->dim() == 4 && mask->size(2) == queries && mask->size(3) == n &&
                      (mask->size(0) == 1 || mask->size(0) == z->size(0)) &&
                      (mask->size(1) == 1 || mask->size(1) == z->size(1)),
                  "softmax: mask ", mask->sizes(), " does not fit ", z->sizes());
    }
    bool each = mask && mask->size(0) > 1, split = mask && mask->size(1) > 1;
    at::parallel_for(0, z->size(0) * z->size(1), grain(queries * n), [&](int64_t b, int64_t e) {
      for (int64_t h = b; h < e; h++) {
        int64_t row = each ? h / z->size(1) : 0, head = split ? h % z->size(1) : 0;
        const float* m = mask ? f(*mask) + (row * mask->size(1) + head) * queries * n : nullptr;
        softmax_rows(f(*z) + h * queries * n, m, queries, n, queries, scale, causal, 0, queries);
      }
    });
  });
}

int peft_softmax_backward(at::Tensor* dp, at::Tensor* p, double scale, char** err) {
  return guarded(err, [&] {
    check(*dp), same(*dp, *p);
    TORCH_CHECK(is_f32(*dp), "softmax: gradients are ", dp->scalar_type());
    int64_t n = dp->size(-1);
    at::parallel_for(0, dp->numel() / n, grain(n),
                     [&](int64_t b, int64_t e) { softmax_backward_rows(f(*dp), f(*p), n, scale, b, e); });
  });
}
}
