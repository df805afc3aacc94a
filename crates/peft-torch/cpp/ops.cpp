// Operations of libtorch that tch leaves out.
#include "shim.h"
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <algorithm>
#include <atomic>

namespace {
// What the allocator of main memory tells whoever profiles it, added up.
struct Counted : c10::MemoryReportingInfoBase {
  std::atomic<int64_t> now{0}, peak{0};
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    int64_t held = now += size, most = peak;
    while (held > most && !peak.compare_exchange_weak(most, held)) {
    }
  }
  bool memoryProfilingEnabled() const override { return true; }
};

// A count that goes on; backward passes take it along to their threads.
struct Counter {
  std::shared_ptr<Counted> counted = std::make_shared<Counted>();
  c10::DebugInfoGuard guard{c10::DebugInfoKind::PROFILER_STATE, counted};
};
}  // namespace

extern "C" {

// y = x wᵀ + b through oneDNN, any strides.
int peft_linear_onednn(at::Tensor* x, at::Tensor* w, at::Tensor* b, at::Tensor** y, char** err) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                               c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  return guarded(err, [&] {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
    std::optional<at::Tensor> bias;
    if (b) bias = *b;
    *y = new at::Tensor(op.call(*x, *w, bias, "none", c10::List<std::optional<at::Scalar>>(), ""));
  });
}

int peft_grad_enabled() { return at::GradMode::is_enabled(); }

int peft_has_onednn() { return at::globalContext().hasMKLDNN(); }

// a b for fp32 batches [n, m, k], [n, k, l]; through oneDNN if told so, by the switch that libtorch has for it.
int peft_bmm(at::Tensor* a, at::Tensor* b, int onednn, at::Tensor** y, char** err) {
  return guarded(err, [&] {
    auto& context = at::globalContext();
    // Plain fp32 on processors without AMX, and only those are told so.
    bool changed = onednn && context.float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
    struct Restore {
      at::Context& context;
      bool changed;
      ~Restore() {
        if (changed) context.setFloat32MatmulPrecision("highest");
      }
    } restore{context, changed};
    if (changed) context.setFloat32MatmulPrecision("medium");
    *y = new at::Tensor(at::bmm(*a, *b));
  });
}

// y += alpha * a b, in place.
int peft_addmm(at::Tensor* y, at::Tensor* a, at::Tensor* b, double alpha, char** err) {
  return guarded(err, [&] { at::addmm_out(*y, *y, *a, *b, 1, alpha); });
}

int peft_fused_adamw(at::Tensor** params, at::Tensor** grads, at::Tensor** m, at::Tensor** v, at::Tensor** steps,
                     size_t n, double lr, double beta1, double beta2, double weight_decay, double eps, char** err) {
  return guarded(err, [&] {
    auto list = [n](at::Tensor** ts) {
      std::vector<at::Tensor> out;
      for (size_t i = 0; i < n; i++) out.push_back(*ts[i]);
      return out;
    };
    at::NoGradGuard guard;
    at::_fused_adamw_(list(params), list(grads), list(m), list(v), {}, list(steps), lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  });
}

static at::Generator generator(int device) {
  return device < 0 ? at::detail::getDefaultCPUGenerator()
                    : at::globalContext().defaultGenerator(at::Device(at::kCUDA, device));
}

int peft_rng_get(int device, at::Tensor** state, char** err) {
  return guarded(err, [&] {
    auto g = generator(device);
    std::lock_guard<std::mutex> lock(g.mutex());
    *state = new at::Tensor(g.get_state());
  });
}

int peft_rng_set(int device, at::Tensor* state, char** err) {
  return guarded(err, [&] {
    auto g = generator(device);
    std::lock_guard<std::mutex> lock(g.mutex());
    g.set_state(*state);
  });
}

// Bytes that tensors hold on a CUDA device: now and at most.
int peft_cuda_memory(int device, int64_t* now, int64_t* peak, char** err) {
  return guarded(err, [&] {
    auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(device);
    *now = stats.allocated_bytes[0].current;
    *peak = stats.allocated_bytes[0].peak;
  });
}

int peft_cuda_reset_peak(int device, char** err) {
  return guarded(err, [&] { at::getDeviceAllocator(at::kCUDA)->resetPeakStats(device); });
}

// body(state, i) for each i below n, on libtorch's threads. A thread that is done takes what is next: of two cores that others
// use as well, one may be half as fast.
void peft_parallel_for(int64_t n, void (*body)(void*, int64_t), void* state) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(state, i);
  });
}

// Counts bytes of tensors in main memory until the counter is given back on the same thread.
int peft_count_start(void** counter, char** err) {
  return guarded(err, [&] { *counter = new Counter(); });
}

void peft_count_stop(void* counter, int64_t* now, int64_t* peak) {
  auto* it = static_cast<Counter*>(counter);
  *now = it->counted->now;
  *peak = it->counted->peak;
  delete it;
}

// A tensor over memory that `drop(owner)` releases.
int peft_from_blob(void* data, const int64_t* shape, size_t ndim, at::Tensor* like, void* owner, void (*drop)(void*),
                   at::Tensor** out, char** err) {
  return guarded(err, [&] {
    *out = new at::Tensor(at::from_blob(
        data, at::IntArrayRef(shape, ndim), [owner, drop](void*) { drop(owner); },
        like->options()));
  });
}
}
