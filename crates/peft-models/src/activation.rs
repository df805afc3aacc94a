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
    /// x, or 0.01 x below 0
    LeakyRelu,
    /// x · Φ(x), from -10 to 10.
    Gelu10,
    /// ½ (1 + erf((x - µ) / (σ √2))), with µ and σ of 2209.10655, by which it is near relu(x)².
    Laplace,
    /// √(softplus x)
    SqrtSoftplus,
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
        ("leaky_relu", Activation::LeakyRelu),
        ("gelu_10", Activation::Gelu10),
        ("laplace", Activation::Laplace),
        ("sqrtsoftplus", Activation::SqrtSoftplus),
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
            Activation::LeakyRelu => x.leaky_relu(),
            Activation::Gelu10 => x.gelu("none").clamp(-10.0, 10.0),
            Activation::Laplace => {
                #[expect(clippy::approx_constant, reason = "rounded as transformers has it")]
                let (mean, spread) = (0.707107, 0.282095);
                (((x - mean) / (spread * std::f64::consts::SQRT_2)).erf() + 1.0) * 0.5
            }
            Activation::SqrtSoftplus => x.softplus().sqrt(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use tch::Kind;

    /// Every activation of the fixtures against Python's values and derivatives, which are in fp64.
    #[test]
    fn activations_are_pythons() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../fixtures/activations.json"
        );
        let cases: Vec<Value> =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let mut left: Vec<&str> = Activation::NAMES.iter().map(|it| it.0).collect();
        for case in &cases {
            let name = case["name"].as_str().unwrap();
            left.retain(|it| *it != name);
            let row =
                |key: &str| -> Vec<f64> { serde_json::from_value(case[key].clone()).unwrap() };
            let act = Activation::named(name).unwrap_or_else(|| panic!("`{name}` is not known"));
            for (kind, error) in [(Kind::Double, 1e-7), (Kind::Float, 2e-6)] {
                let x = Tensor::from_slice(&row("x"))
                    .to_kind(kind)
                    .set_requires_grad(true);
                let y = act.forward(&x);
                let slope = Tensor::run_backward(&[y.sum(kind)], &[&x], false, false).remove(0);
                for (got, key) in [(&y, "y"), (&slope, "slope")] {
                    let got = Vec::<f64>::try_from(got.to_kind(Kind::Double)).unwrap();
                    for ((x, got), wanted) in row("x").iter().zip(got).zip(row(key)) {
                        let far = (got - wanted).abs() / wanted.abs().max(1.0);
                        assert!(far < error, "{key} of {name} at {x}: {got}, not {wanted}");
                    }
                }
            }
        }
        assert!(left.is_empty(), "not in the fixture: {left:?}");
    }
}
