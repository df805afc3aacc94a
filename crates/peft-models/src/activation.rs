//! Activations by the names of `transformers`.

use tch::Tensor;

/// One activation function, elementwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x)
    Silu,
    /// x · Φ(x)
    Gelu,
    /// GELU through tanh.
    GeluTanh,
    /// x · σ(1.702 x)
    QuickGelu,
    /// max(x, 0)
    Relu,
    /// max(x, 0)²
    Relu2,
    /// min(max(x, 0), 6)
    Relu6,
    /// tanh x
    Tanh,
    /// σ(x)
    Sigmoid,
    /// x · tanh(softplus x)
    Mish,
    /// x · relu6(x + 3) / 6
    HardSwish,
    /// x
    Linear,
}

impl Activation {
    /// Every name on disk.
    pub const NAMES: &'static [(&'static str, Activation)] = &[
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_python", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("gelu_python_tanh", Activation::GeluTanh),
        ("gelu_fast", Activation::GeluTanh),
        ("gelu_accurate", Activation::GeluTanh),
        ("quick_gelu", Activation::QuickGelu),
        ("relu", Activation::Relu),
        ("relu2", Activation::Relu2),
        ("relu6", Activation::Relu6),
        ("tanh", Activation::Tanh),
        ("sigmoid", Activation::Sigmoid),
        ("mish", Activation::Mish),
        ("hardswish", Activation::HardSwish),
        ("linear", Activation::Linear),
    ];

    /// The activation of this name.
    pub fn named(name: &str) -> Option<Activation> {
        let found = Activation::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, it)| *it)
    }

    /// Any shape.
    pub fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Activation::Silu => x.silu(),
            Activation::Gelu => x.gelu("none"),
            Activation::GeluTanh => peft_torch::gelu_tanh(x),
            Activation::QuickGelu => x * (x * 1.702).sigmoid(),
            Activation::Relu => x.relu(),
            Activation::Relu2 => x.relu().square(),
            Activation::Relu6 => x.relu6(),
            Activation::Tanh => x.tanh(),
            Activation::Sigmoid => x.sigmoid(),
            Activation::Mish => x.mish(),
            Activation::HardSwish => x.hardswish(),
            Activation::Linear => x.shallow_clone(),
        }
    }

    /// `act(gate) · up`, the inside of a gated MLP.
    pub fn gated(self, gate: &Tensor, up: &Tensor) -> Tensor {
        match self {
            Activation::Silu => peft_torch::swiglu(gate, up),
            other => other.forward(gate) * up,
        }
    }
}
