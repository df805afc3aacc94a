//! What no law says: bf16, files of Python's shape, sums of adapters.

use peft_core::{Adapter, Ctx, Dense, Error, Linear, Model, ModelExt, Slot, Spec};
use peft_ia3::{Ia3Config, combine};
use peft_testing::{agree, close};
use tch::{Device, Kind, Tensor};

/// Two layers, the second with a scaled input.
struct Mlp {
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn new(kind: Kind) -> Mlp {
        tch::manual_seed(3);
        let random = |shape: &[i64]| {
            Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16)
        };
        let layer = |out, inp| {
            let (weight, bias) = (random(&[out, inp]), random(&[out]));
            Linear::new(Dense::new(weight.to_kind(kind), Some(bias.to_kind(kind))))
        };
        Mlp {
            up: layer(11, 7),
            down: layer(5, 11),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let inner = self.up.forward(x, Ctx::TRAIN).tanh();
        self.down.forward(&inner, Ctx::TRAIN)
    }
}

impl Model for Mlp {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("up", Slot::Linear(&mut self.up));
        visit("down", Slot::Linear(&mut self.down));
    }
}

fn config() -> Ia3Config {
    Ia3Config {
        feedforward_modules: Some(["down"].into()),
        ..Ia3Config::on(["up", "down"])
    }
}

/// Sets factors of an adapter, by seed.
fn shake(model: &mut dyn Model, name: &str, seed: i64) {
    tch::manual_seed(seed);
    for mut it in model.params(name) {
        let _off = tch::no_grad_guard();
        let noise = it.tensor.randn_like() * 0.3;
        let _ = it.tensor.g_add_(&noise);
    }
}

/// Written out in fp64: the outputs and the gradients of the factors, over a base in fp32 and in bf16.
#[test]
fn outputs_and_gradients_are_the_formula() {
    for (kind, within) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
        let mut model = Mlp::new(kind);
        model.inject("default", &config()).unwrap();
        shake(&mut model, "default", 4);
        let x = Tensor::randn([2, 3, 7], (Kind::Float, Device::Cpu)).to_kind(kind);
        let y = model.forward(&x);
        assert_eq!(y.kind(), kind);
        let seed = Tensor::randn([2, 3, 5], (Kind::Float, Device::Cpu));
        (y.to_kind(Kind::Float) * &seed).sum(Kind::Float).backward();

        let params = model.trainable("default");
        let wide = |t: &Tensor| t.detach().to_kind(Kind::Double).set_requires_grad(true);
        let (up, down) = (wide(&params[0].tensor), wide(&params[1].tensor));
        assert_eq!((up.size(), down.size()), (vec![11, 1], vec![1, 11]));
        let dense = |layer: &Linear, x: &Tensor| {
            let [w, b] = [
                layer.base().weight(),
                layer.base().bias().unwrap().shallow_clone(),
            ];
            x.matmul(&wide(&w).detach().tr()) + wide(&b).detach()
        };
        let inner = (dense(&model.up, &wide(&x).detach()) * up.view([-1])).tanh();
        let expected = dense(&model.down, &(inner * down.view([-1])));
        (&expected * seed.to_kind(Kind::Double))
            .sum(Kind::Double)
            .backward();
        close(&y, &expected, within, "output");
        for (ours, exact) in params.iter().zip([up, down]) {
            assert_eq!(ours.tensor.kind(), Kind::Float);
            close(&ours.tensor.grad(), &exact.grad(), within, &ours.at);
        }
    }
}

fn adapter(model: &mut Mlp, name: &str, seed: i64) -> Adapter {
    model.inject(name, &config()).unwrap();
    shake(model, name, seed);
    Adapter::of(name, &config(), model).unwrap()
}

#[test]
fn a_sum_of_adapters_has_the_sum_of_factors() {
    let mut model = Mlp::new(Kind::Float);
    let (a, b) = (adapter(&mut model, "a", 1), adapter(&mut model, "b", 2));
    let keys: Vec<&str> = a.state.keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        ["base_model.model.down.ia3_l", "base_model.model.up.ia3_l"]
    );
    let both = combine(&[(&a, 0.7), (&b, -1.5)]).unwrap();
    for (key, sum) in &both.state {
        close(sum, &(&a.state[key] * 0.7 - &b.state[key] * 1.5), 1e-6, key);
    }
    model.unload();
    both.apply("both", &mut model).unwrap();
}

#[test]
fn what_cannot_be_summed() {
    let mut model = Mlp::new(Kind::Float);
    let a = adapter(&mut model, "a", 1);
    let said = |parts: &[(&Adapter, f64)]| combine(parts).unwrap_err().to_string();
    assert!(said(&[]).contains("nothing"));
    assert!(said(&[(&a, f64::NAN)]).contains("NaN"));

    let other = |more: Ia3Config| {
        let mut model = Mlp::new(Kind::Float);
        model.inject("b", &more).unwrap();
        Adapter::of("b", &more, &mut model).unwrap()
    };
    let outputs = other(Ia3Config {
        feedforward_modules: Some(peft_core::Names::List(vec![])),
        ..config()
    });
    let error = combine(&[(&a, 1.0), (&outputs, 1.0)]).unwrap_err();
    assert!(
        matches!(&error, Error::Shape { key, .. } if key.contains("down")),
        "{error}"
    );
    let whole = other(Ia3Config {
        modules_to_save: Some(vec!["down".into()]),
        feedforward_modules: Some(peft_core::Names::List(vec![])),
        ..Ia3Config::on(["up"])
    });
    let error = said(&[(&whole, 1.0), (&whole, 1.0)]);
    assert!(
        error.contains("modules_to_save") && error.contains("down"),
        "{error}"
    );
    let expression = other(Ia3Config {
        feedforward_modules: Some(["down"].into()),
        ..Ia3Config::on(peft_core::Names::Regex("up|down".into()))
    });
    assert!(said(&[(&a, 1.0), (&expression, 1.0)]).contains("target_modules"));
}

/// A file as Python writes it, down to the key of the removed adapter name.
#[test]
fn a_file_with_the_adapters_name_in_its_keys_is_read() {
    let mut model = Mlp::new(Kind::Float);
    let mut a = adapter(&mut model, "a", 1);
    let x = Tensor::randn([4, 7], (Kind::Float, Device::Cpu));
    let y = model.forward(&x);
    model.unload();
    a.state = std::mem::take(&mut a.state)
        .into_iter()
        .map(|(key, t)| (format!("{key}.default"), t))
        .collect();
    a.apply("default", &mut model).unwrap();
    agree(&model.forward(&x), &y, 0.0, "loaded").unwrap();
}
