// A torch::autograd::Function whose backward is a Rust closure, and vector-Jacobian products.
#include "shim.h"
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

using namespace torch::autograd;

extern "C" {
// grads[i] is null where no gradient reached output i; out[i] may stay null: no gradient for input i.
typedef int (*backward_cb)(void* state, at::Tensor** grads, size_t ngrads, const uint8_t* needs, at::Tensor** out,
                           size_t nout, char** err);
typedef void (*drop_cb)(void* state);
}

namespace {
struct Closure : torch::CustomClassHolder {
  void* state;
  backward_cb backward;
  drop_cb drop;
  Closure(void* s, backward_cb b, drop_cb d) : state(s), backward(b), drop(d) {}
  ~Closure() override { drop(state); }
};

// Gradients that carry a node which refuses to be differentiated, as torch's own `once_differentiable`.
variable_list once_differentiable(variable_list grads) {
  variable_list fake;
  for (auto& g : grads) fake.push_back(g.defined() ? g.detach().requires_grad_() : g);
  auto node = std::make_shared<DelayedError>("this function has no second derivative", (int64_t)fake.size());
  return (*node)(std::move(fake));
}

struct RustFunction : Function<RustFunction> {
  // `inputs` must be a TensorList: a variable_list argument would silently not be tracked, which is what `outputs` wants.
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, std::vector<at::Tensor> outputs,
                               c10::intrusive_ptr<Closure> closure) {
    ctx->saved_data["closure"] = c10::IValue::make_capsule(closure);
    ctx->saved_data["inputs"] = (int64_t)inputs.size();
    ctx->set_materialize_grads(false);
    return outputs;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto capsule = ctx->saved_data["closure"].toCapsule();
    auto* closure = static_cast<Closure*>(capsule.get());
    size_t n = ctx->saved_data["inputs"].toInt();
    std::vector<uint8_t> needs(n);
    for (size_t i = 0; i < n; i++) needs[i] = ctx->needs_input_grad(i);
    std::vector<at::Tensor*> in;
    for (auto& g : grads) in.push_back(g.defined() ? &g : nullptr);
    std::vector<at::Tensor*> out(n, nullptr);
    char* err = nullptr;
    int rc = closure->backward(closure->state, in.data(), in.size(), needs.data(), out.data(), n, &err);
    variable_list result;
    for (auto* t : out) {
      result.push_back(t ? *t : at::Tensor());
      delete t;
    }
    std::string message = err ? err : "";
    free(err);
    TORCH_CHECK(rc == 0, message);
    if (at::GradMode::is_enabled()) result = once_differentiable(std::move(result));
    result.emplace_back();  // outputs
    result.emplace_back();  // closure
    return result;
  }
};
}  // namespace

extern "C" int peft_apply(at::Tensor** inputs, size_t nin, at::Tensor** outputs, size_t nout, void* state,
                          backward_cb backward, drop_cb drop, at::Tensor** result, char** err) {
  auto closure = c10::make_intrusive<Closure>(state, backward, drop);
  return guarded(err, [&] {
    std::vector<at::Tensor> ins, outs;
    for (size_t i = 0; i < nin; i++) ins.push_back(*inputs[i]);
    for (size_t i = 0; i < nout; i++) outs.push_back(*outputs[i]);
    auto r = RustFunction::apply(at::TensorList(ins), outs, closure);
    for (size_t i = 0; i < nout; i++) result[i] = new at::Tensor(r[i]);
  });
}

// Gradients of sum(outputs * grads). With inputs: returned. Without: accumulated into the leaves.
extern "C" int peft_vjp(at::Tensor** outputs, at::Tensor** grads, size_t nout, at::Tensor** inputs, size_t nin,
                        at::Tensor** result, char** err) {
  return guarded(err, [&] {
    edge_list roots, targets;
    variable_list seeds;
    for (size_t i = 0; i < nout; i++) {
      if (!outputs[i]->requires_grad()) continue;
      roots.push_back(impl::gradient_edge(*outputs[i]));
      seeds.push_back(*grads[i]);
    }
    for (size_t i = 0; i < nin; i++) targets.push_back(impl::gradient_edge(*inputs[i]));
    auto got = Engine::get_default_engine().execute(roots, seeds, /*keep_graph=*/false, /*create_graph=*/false,
                                                    /*accumulate_grad=*/nin == 0, targets);
    for (size_t i = 0; i < nin; i++) result[i] = got[i].defined() ? new at::Tensor(got[i]) : nullptr;
  });
}

// Forgets the gradient of a leaf; its memory is free once nobody else holds it.
extern "C" void peft_drop_grad(at::Tensor* leaf) { leaf->mutable_grad().reset(); }

// Whether two handles are of one tensor.
extern "C" int peft_same(at::Tensor* a, at::Tensor* b) { return a->is_same(*b); }
