//! What no law says: several adapters on one norm, names on disk, dtypes, and what is refused.

use peft_core::{Adapter, Affine, Ctx, Model, ModelExt, Norm, NormKind, Slot, Spec, Tuner, parse};
use peft_norm::NormConfig;
use peft_testing::toy::{Kit, Toy};
use peft_testing::{close, same_bits};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

struct One(Norm);

impl One {
    fn new(kind: Kind) -> One {
        tch::manual_seed(2);
        let random = || Tensor::randn([9], (Kind::Float, Device::Cpu)).to_kind(kind);
        One(Norm::new(NormKind::Layer, random(), Some(random()), 1e-5))
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.0.forward(x, Ctx::TRAIN)
    }
}

impl Model for One {
    fn spec(&self) -> Spec {
        Spec {
            model_type: "gpt2".to_owned(),
            ..Spec::default()
        }
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("transformer.ln_f", Slot::Norm(&mut self.0));
    }
}

fn shake(model: &mut dyn Model, name: &str, seed: i64) -> Vec<Tensor> {
    tch::manual_seed(seed);
    let all = model.trainable(name).into_iter();
    all.map(|mut it| {
        let _off = tch::no_grad_guard();
        let noise = it.tensor.randn_like() * 0.3;
        let _ = it.tensor.g_add_(&noise);
        it.tensor
    })
    .collect()
}

#[test]
fn effects_of_several_add_up_and_one_alone_is_itself() {
    let x = Tensor::randn([3, 9], (Kind::Float, Device::Cpu));
    let mut model = One::new(Kind::Float);
    let Affine { weight, bias } = model.0.base().clone();
    let bias = bias.unwrap();
    model.inject("a", &NormConfig::default()).unwrap();
    let a = shake(&mut model, "a", 5);
    let alone = x.layer_norm([9], Some(&a[0]), Some(&a[1]), 1e-5, false);
    assert!(same_bits(&model.forward(&x), &alone));
    model.inject("b", &NormConfig::default()).unwrap();
    let b = shake(&mut model, "b", 6);
    let (w, c) = (&a[0] + &b[0] - &weight, &a[1] + &b[1] - &bias);
    let both = x.layer_norm([9], Some(&w), Some(&c), 1e-5, false);
    close(&model.forward(&x), &both, 1e-6, "both");
    model.activate("a").unwrap();
    assert!(same_bits(&model.forward(&x), &alone));
}

/// As Python: what is a copy of a part of the base is kept in its dtype.
#[test]
fn names_and_dtype_are_pythons() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut model = One::new(kind);
        let config = NormConfig::default();
        model.inject("default", &config).unwrap();
        let adapter = Adapter::of("default", &config, &mut model).unwrap();
        let keys: Vec<&str> = adapter.state.keys().map(String::as_str).collect();
        let at = "base_model.model.transformer.ln_f.ln_tuning_layers";
        assert_eq!(keys, [format!("{at}.bias"), format!("{at}.weight")]);
        assert!(adapter.state.values().all(|it| it.kind() == kind));
        let json = adapter.tuner.to_json();
        assert_eq!(json["target_modules"], json!(["ln_1", "ln_2", "ln_f"]));

        let x = Tensor::randn([2, 9], (Kind::Float, Device::Cpu)).to_kind(kind);
        model.forward(&x).square().sum(Kind::Float).backward();
        assert!(
            model
                .trainable("default")
                .iter()
                .all(|it| it.tensor.grad().kind() == kind)
        );
    }
}

fn refused(more: Value, words: &[&str]) {
    let mut json = json!({"peft_type": "LN_TUNING", "target_modules": ["norm"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    let mut model = Toy::new(kit, 1);
    let result = parse::<NormConfig>(json.clone()).and_then(|it| model.inject("default", &it));
    let message = result
        .err()
        .unwrap_or_else(|| panic!("{json} is accepted"))
        .to_string();
    for word in words {
        assert!(message.contains(word), "{json}: `{message}` lacks `{word}`");
    }
    assert!(model.adapters().is_empty());
}

#[test]
fn what_does_not_fit() {
    refused(
        json!({"target_modules": ["nrom"]}),
        &["nrom", "blocks.0.norm"],
    );
    refused(json!({"target_modules": "(("}), &["(("]);
    refused(json!({"exclude_modules": ["norm"]}), &["exclude_modules"]);
    refused(json!({"modules_to_save": ["norm"]}), &["modules_to_save"]);
    refused(
        json!({"modules_to_save": ["lm_haed"]}),
        &["lm_haed", "lm_head"],
    );
    refused(
        json!({"layers_to_transform": [1]}),
        &["layers_to_transform"],
    );
    refused(
        json!({"taget_modules": ["norm"]}),
        &["nearest is `target_modules`"],
    );

    let mut model = One::new(Kind::Float);
    let mut outline = model.outline();
    outline.spec.model_type = "mlp".to_owned();
    let error = NormConfig::default()
        .resolve(&outline)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`mlp`") && error.contains("target_modules"),
        "{error}"
    );
}
