//! Adapters of any kind as LoRA: the nearest of its rank, and the model does what it did.

use peft_core::{
    Adapter, Affine, Beneath, Ctx, LinearAdapter, LinearOp, Model, ModelExt, NormAdapter, Params,
    Plain, Slot, Visit, parse,
};
use peft_lora::{Converted, LoraConfig, Rank, to_lora};
use peft_testing::{
    close, same_bits,
    toy::{Kit, Toy},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn toy(lossy: bool) -> Toy {
    Toy::new(Kit { tied: false, lossy }, 1)
}

fn ids() -> Tensor {
    Tensor::from_slice(&[3i64, 0, 22, 7, 7, 12]).reshape([2, 3])
}

/// A toy with an adapter whose parameters are away from their start.
fn dressed(config: &LoraConfig, lossy: bool) -> Toy {
    let mut model = toy(lossy);
    model.inject("a", config).unwrap();
    tch::manual_seed(5);
    for param in model.params("a") {
        let shift = param.tensor.randn_like() * 0.3;
        tch::no_grad(|| drop(param.tensor.shallow_clone().g_add_(&shift)));
    }
    model
}

fn lora(more: Value) -> LoraConfig {
    let mut json = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    parse(json).unwrap()
}

fn forward(model: &Toy) -> Tensor {
    tch::no_grad(|| model.forward(&ids(), Ctx::EVAL))
}

/// Converts, puts the result on a fresh toy, and compares what both compute.
fn convert(config: &LoraConfig, rank: Rank, tolerance: f64) -> Converted {
    let mut model = dressed(config, false);
    let expected = forward(&model);
    let made = to_lora(&mut model, "a", config, rank).unwrap();
    assert!(
        same_bits(&forward(&model), &expected),
        "the model is touched"
    );
    let mut plain = toy(false);
    made.adapter.apply("b", &mut plain).unwrap();
    close(&forward(&plain), &expected, tolerance, "as LoRA");
    made
}

#[test]
fn a_lora_is_taken_over() {
    for more in [
        json!({}),
        json!({"use_rslora": true, "rank_pattern": {"q_proj": 2}}),
        json!({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        json!({"init_lora_weights": "pissa", "r": 2}),
        json!({"bias": "lora_only"}),
        json!({"bias": "all"}),
        json!({"modules_to_save": ["lm_head"]}),
    ] {
        let config = lora(more.clone());
        let made = convert(&config, Rank::Number(4), 2e-6);
        let worst = made.layers.iter().map(|it| it.error).fold(0.0, f64::max);
        assert!(worst < 1e-6, "{more}: {worst:.1e}");
        let json = made.adapter.tuner.to_json();
        assert_eq!(json["lora_alpha"], json["r"], "{more}");
        assert_eq!(json["alpha_pattern"], json["rank_pattern"], "{more}");
    }
    let config = lora(json!({}));
    let mut model = dressed(&config, false);
    let before = Adapter::of("a", &config, &mut model).unwrap();
    let made = to_lora(&mut model, "a", &config, Rank::Number(3)).unwrap();
    for (key, tensor) in &before.state {
        let s = if key.contains("lora_B") {
            7.0 / 3.0
        } else {
            1.0
        };
        close(&made.adapter.state[key], &(tensor * s), 1e-7, key);
    }
}

#[test]
fn full_rank_is_exact_for_what_is_no_lora() {
    for more in [
        json!({"use_dora": true}),
        json!({"use_dora": true, "target_modules": ["embed_tokens", "v_proj"]}),
        json!({"trainable_token_indices": [4, 0, 22], "target_modules": ["q_proj"]}),
    ] {
        let made = convert(&lora(more.clone()), Rank::Number(10), 1e-5);
        for layer in &made.layers {
            assert!(layer.error < 1e-5, "{more}: {layer:?}");
        }
    }
}

#[test]
fn a_lower_rank_leaves_the_tail_and_energy_chooses_the_rank() {
    let config = lora(json!({"use_dora": true}));
    let mut model = dressed(&config, false);
    let full = to_lora(&mut model, "a", &config, Rank::Number(10)).unwrap();
    let cut = to_lora(&mut model, "a", &config, Rank::Number(4)).unwrap();
    let shared = to_lora(&mut model, "a", &config, Rank::Energy(0.95)).unwrap();
    let mut ranks = Vec::new();
    for ((full, cut), shared) in full.layers.iter().zip(&cut.layers).zip(&shared.layers) {
        let at = &full.at;
        let get = |it: &Converted, half: &str| {
            it.adapter.state[&format!("base_model.model.{at}.lora_{half}.weight")]
                .to_kind(Kind::Double)
        };
        let all = |it: &Converted| get(it, "B").matmul(&get(it, "A"));
        let whole = all(&to_lora(&mut model, "a", &config, Rank::Number(10)).unwrap());
        let (_, s, _) = whole.svd(true, true);
        let energy: Vec<f64> = s.square().try_into().unwrap();
        let total: f64 = energy.iter().sum();
        let tail = |r: i64| (energy[r as usize..].iter().sum::<f64>() / total).sqrt();
        assert!(
            (cut.error - tail(4)).abs() < 1e-5,
            "{at}: {} {}",
            cut.error,
            tail(4)
        );
        assert!((shared.error - tail(shared.rank)).abs() < 1e-5);
        assert!(tail(shared.rank).powi(2) <= 0.05 + 1e-9, "{at}");
        assert!(
            tail(shared.rank - 1).powi(2) > 0.05,
            "{at}: {} is more than it needs",
            shared.rank
        );
        ranks.push(shared.rank);
    }
    let json = shared.adapter.tuner.to_json();
    assert_eq!(json["r"], json!(ranks.iter().max()));
    shared.adapter.apply("b", &mut toy(false)).unwrap();
}

#[test]
fn a_lossy_base_and_a_stack_are_no_matter() {
    let config = lora(json!({"use_dora": true}));
    let mut model = dressed(&config, true);
    let expected = forward(&model);
    model
        .inject("other", &lora(json!({"init_lora_weights": false})))
        .unwrap();
    model.switch("a", false).unwrap();
    let made = to_lora(&mut model, "a", &config, Rank::Number(10)).unwrap();
    let mut plain = toy(true);
    made.adapter.apply("b", &mut plain).unwrap();
    close(&forward(&plain), &expected, 1e-5, "as LoRA");
}

/// y = l∘(W x + b): a method with a form as a weight that is no sum, and that changes the bias.
#[derive(Debug)]
struct Stretch(Tensor);

impl LinearAdapter for Stretch {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _: Ctx) -> Tensor {
        beneath.forward(x) * &self.0
    }
    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        Some(Plain {
            weight: plain.weight * self.0.unsqueeze(1),
            bias: plain.bias.map(|it| it * &self.0),
        })
    }
}

impl Params for Stretch {
    fn params(&self, visit: Visit<'_>) {
        visit("stretch", &self.0);
    }
}

/// What has no merged form at all.
#[derive(Debug)]
struct Tanh;

impl LinearAdapter for Tanh {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _: Ctx) -> Tensor {
        beneath.forward(x).tanh()
    }
    fn merge(&self, _: Plain, _: &dyn LinearOp) -> Option<Plain> {
        None
    }
}

impl Params for Tanh {
    fn params(&self, _: Visit<'_>) {}
}

/// A new weight or a new bias of a norm.
#[derive(Debug)]
struct Other(f64, f64);

impl NormAdapter for Other {
    fn affine(&self, beneath: Affine) -> Affine {
        Affine {
            weight: beneath.weight + self.0,
            bias: beneath.bias.map(|it| it + self.1),
        }
    }
}

impl Params for Other {
    fn params(&self, _: Visit<'_>) {}
}

/// A new bias, and nothing else.
#[derive(Debug)]
struct Bias(f64);

impl LinearAdapter for Bias {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _: Ctx) -> Tensor {
        beneath.forward(x) + self.0
    }
    fn merge(&self, plain: Plain, base: &dyn LinearOp) -> Option<Plain> {
        let bias = plain
            .bias
            .unwrap_or_else(|| Tensor::zeros([base.shape().0], (Kind::Float, Device::Cpu)));
        Some(Plain {
            weight: plain.weight,
            bias: Some(bias + self.0),
        })
    }
}

impl Params for Bias {
    fn params(&self, _: Visit<'_>) {}
}

fn with(attach: &dyn Fn(&str, Slot<'_>)) -> Toy {
    let mut model = toy(false);
    model.slots(&mut |at, slot| attach(at, slot));
    model
}

fn stretched(at: &str, slot: Slot<'_>) {
    if let Slot::Linear(it) = slot {
        let out = it.base().shape().0;
        let l = Tensor::arange(out, (Kind::Float, Device::Cpu)) * 0.05 + 0.6;
        if at.ends_with("q_proj") || at.ends_with("k_proj") {
            it.attach("a", Box::new(Stretch(l)));
        }
    }
}

#[test]
fn a_foreign_method_with_its_biases() {
    for norm in [false, true] {
        let mut model = with(&|at, mut slot| {
            if let Slot::Norm(it) = &mut slot
                && norm
                && it.base().bias.is_some()
            {
                it.attach("a", Box::new(Other(0.0, 0.25)));
            }
            stretched(at, slot);
        });
        let expected = forward(&model);
        let made = to_lora(
            &mut model,
            "a",
            &lora(json!({"task_type": "CAUSAL_LM"})),
            Rank::Number(10),
        )
        .unwrap();
        let json = made.adapter.tuner.to_json();
        assert_eq!(json["bias"], if norm { "all" } else { "lora_only" });
        assert_eq!(json["target_modules"], json!(["q_proj", "k_proj"]));
        assert_eq!(json["task_type"], "CAUSAL_LM");
        let mut plain = toy(false);
        made.adapter.apply("b", &mut plain).unwrap();
        close(&forward(&plain), &expected, 1e-5, "as LoRA");
    }
}

#[test]
fn biases_alone_are_carried_by_an_update_of_zero() {
    let mut model = with(&|at, slot| match slot {
        Slot::Linear(it) if it.base().bias().is_some() => {
            it.attach(
                "a",
                Box::new(Bias(if at.contains('0') { 0.5 } else { 0.1 })),
            );
        }
        _ => {}
    });
    let expected = forward(&model);
    let made = to_lora(&mut model, "a", &lora(json!({})), Rank::Energy(0.9)).unwrap();
    let mut plain = toy(false);
    made.adapter.apply("b", &mut plain).unwrap();
    close(&forward(&plain), &expected, 1e-6, "as LoRA");
    assert_eq!(made.layers.len(), 1);
    assert_eq!((made.layers[0].rank, made.layers[0].error), (1, 0.0));
}

fn refused(model: &mut Toy, name: &str, rank: Rank, words: &[&str]) {
    let message = to_lora(model, name, &lora(json!({})), rank)
        .map(|_| ())
        .unwrap_err()
        .to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

#[test]
fn what_has_no_form_as_lora() {
    let mut norm = with(&|_, slot| {
        if let Slot::Norm(it) = slot {
            it.attach("a", Box::new(Other(0.1, 0.0)));
        }
    });
    refused(
        &mut norm,
        "a",
        Rank::Number(2),
        &["`blocks.0.norm`", "norm"],
    );
    let mut tanh = with(&|at, slot| match slot {
        Slot::Linear(it) if at.ends_with("v_proj") => it.attach("a", Box::new(Tanh)),
        _ => {}
    });
    refused(
        &mut tanh,
        "a",
        Rank::Number(2),
        &["`blocks.1.v_proj`", "no form"],
    );
    let mut bias = with(&|at, slot| match slot {
        Slot::Linear(it) if at.ends_with("v_proj") => it.attach("a", Box::new(Bias(0.5))),
        _ => {}
    });
    refused(
        &mut bias,
        "a",
        Rank::Number(2),
        &["`blocks.1.v_proj`", "bias"],
    );
    let mut none = with(&|at, slot| match slot {
        Slot::Linear(it) if at.ends_with("q_proj") => {
            it.attach(
                "a",
                Box::new(Stretch(Tensor::ones([13], (Kind::Float, Device::Cpu)))),
            );
        }
        _ => {}
    });
    refused(
        &mut none,
        "a",
        Rank::Number(2),
        &["`a`", "changes no layer"],
    );
}

#[test]
fn ranks_and_names() {
    let mut model = with(&stretched);
    refused(&mut model, "a", Rank::Number(0), &["rank 0"]);
    refused(
        &mut model,
        "a",
        Rank::Number(11),
        &["rank 11", "blocks.0.q_proj", "10"],
    );
    for share in [0.0, 1.0, -0.5, f64::NAN] {
        refused(&mut model, "a", Rank::Energy(share), &["share"]);
    }
    refused(
        &mut model,
        "b",
        Rank::Number(2),
        &["`b`", "not on this model"],
    );
    model.merge().unwrap();
    refused(&mut model, "a", Rank::Number(2), &["unmerge"]);
}
