//! How factors begin, against what Python's begin as: exactly where no random number decides, in distribution elsewhere.

use peft_core::{
    Ctx, Dense, Embedding, Linear, Model, ModelExt, Slot, Spec, State, files, tensors,
};
use peft_lora::LoraConfig;
use peft_testing::{agree, close, fixtures};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// The layers of `fixtures/init`.
struct Layers {
    layers: Vec<(&'static str, Linear)>,
    embedding: Embedding,
}

impl Model for Layers {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("embedding", Slot::Embedding(&mut self.embedding));
        for (name, layer) in &mut self.layers {
            visit(name, Slot::Linear(layer));
        }
    }
}

fn fixture() -> (Value, State) {
    let folder = fixtures::root().join("init");
    let facts = files::read_json(&folder.join("init.json")).unwrap();
    (
        facts,
        tensors::read(&folder.join("init.safetensors")).unwrap(),
    )
}

fn layers(state: &State) -> Layers {
    let get = |name: &str| state[&format!("base.{name}")].copy();
    let dense = |name: &str, weight: Tensor| {
        Linear::new(Dense::new(weight, Some(get(&format!("{name}.bias")))))
    };
    Layers {
        layers: vec![
            ("tall", dense("tall", get("tall.weight"))),
            ("wide", dense("wide", get("wide.weight"))),
            (
                "transposed",
                dense("transposed", get("transposed.weight").tr()),
            ),
        ],
        embedding: Embedding::new(get("embedding.weight")),
    }
}

fn config(init: &str, rslora: bool, targets: &[&str]) -> LoraConfig {
    let init = match init {
        "kaiming" => json!(true),
        "false" => json!(false),
        word => json!(word),
    };
    let json = json!({
        "r": 4, "lora_alpha": 7, "init_lora_weights": init, "use_rslora": rslora, "target_modules": targets,
    });
    peft_core::parse(json).unwrap()
}

/// B A of one layer.
fn product(model: &mut Layers, at: &str) -> Tensor {
    let params = model.params("default");
    let get = |name: &str| {
        &params
            .iter()
            .find(|it| it.at == at && it.name.contains(name))
            .unwrap()
            .tensor
    };
    get("_B").matmul(get("_A")).detach()
}

#[test]
fn directions_of_the_base_are_pythons() {
    let (_, state) = fixture();
    for (init, rslora) in [
        ("pissa", false),
        ("pissa", true),
        ("olora", false),
        ("olora", true),
    ] {
        let case = format!("{init}{}", if rslora { "-rslora" } else { "" });
        let scale = if rslora { 7.0 / 2.0 } else { 7.0 / 4.0 };
        for at in ["tall", "wide", "transposed"] {
            let mut model = layers(&state);
            let x = Tensor::randn(
                [
                    5,
                    state[&format!("base.{at}.weight")].size()[usize::from(at != "transposed")],
                ],
                (Kind::Float, tch::Device::Cpu),
            );
            let run = |model: &Layers| {
                let layer = &model.layers.iter().find(|(name, _)| *name == at).unwrap().1;
                tch::no_grad(|| layer.forward(&x, Ctx::EVAL))
            };
            let before = run(&model);
            model
                .inject("default", &config(init, rslora, &[at]))
                .unwrap();
            close(&run(&model), &before, 1e-5, &format!("{case} {at}: output"));
            if (init, at) == ("olora", "transposed") {
                continue; // Python takes QR of the transposed weight there, and its factors do not fit the layer.
            }
            let expected = &state[&format!("{case}.{at}.product")];
            close(
                &(product(&mut model, at) * scale),
                expected,
                1e-5,
                &format!("{case} {at}: product"),
            );
        }
    }
}

#[test]
fn a_randomised_decomposition_comes_near() {
    let (_, state) = fixture();
    let mut model = layers(&state);
    model
        .inject("default", &config("pissa_niter_400", false, &["tall"]))
        .unwrap();
    close(
        &(product(&mut model, "tall") * 1.75),
        &state["pissa.tall.product"],
        2e-2,
        "pissa_niter_400",
    );
}

#[test]
fn random_factors_have_pythons_distribution() {
    let (facts, state) = fixture();
    for init in ["kaiming", "gaussian", "orthogonal", "false"] {
        for at in ["tall", "wide", "transposed", "embedding"] {
            let facts = &facts["inits"][init][at];
            let (mut samples, mut products) = ([Vec::new(), Vec::new()], 0f64);
            for seed in 0..64 {
                tch::manual_seed(seed);
                let mut model = layers(&state);
                model
                    .inject("default", &config(init, false, &[at]))
                    .unwrap();
                products = products.max(product(&mut model, at).abs().max().double_value(&[]));
                for (sample, param) in samples.iter_mut().zip(model.params("default")) {
                    sample.push(param.tensor.detach());
                }
            }
            for (sample, name) in samples.iter().zip(["a", "b"]) {
                let all = Tensor::stack(sample, 0);
                let what = format!("{init} {at} {name}");
                let std = all.std(true).double_value(&[]);
                let wanted = facts[name]["std"].as_f64().unwrap();
                assert!(
                    (std - wanted).abs() <= 0.05 * wanted,
                    "{what}: deviation {std}, Python's {wanted}"
                );
                let mean = all.mean(Kind::Float).double_value(&[]);
                assert!(mean.abs() <= 0.05 * std.max(1e-9), "{what}: mean {mean}");
                let largest = all.abs().max().double_value(&[]);
                let bound = facts[name]["largest"].as_f64().unwrap();
                assert!(
                    largest <= 1.4 * bound,
                    "{what}: largest {largest}, Python's {bound}"
                );
            }
            let wanted = facts["product_largest"].as_f64().unwrap();
            assert!(
                products <= 3.0 * wanted + 1e-6,
                "{init} {at}: product {products}, Python's {wanted}"
            );
        }
    }
}

#[test]
fn two_loras_on_one_layer_add_up() {
    let (_, state) = fixture();
    let x = Tensor::randn([5, 24], (Kind::Float, tch::Device::Cpu));
    let run = |adapters: &[i64]| {
        let mut model = layers(&state);
        for seed in adapters {
            tch::manual_seed(*seed);
            let name = seed.to_string();
            model
                .inject(&name, &config("false", false, &["tall"]))
                .unwrap();
        }
        tch::no_grad(|| model.layers[0].1.forward(&x, Ctx::EVAL))
    };
    let (none, one, two, both) = (run(&[]), run(&[1]), run(&[2]), run(&[1, 2]));
    agree(&both, &(&one + &two - &none), 1e-5, "both").unwrap();
}
