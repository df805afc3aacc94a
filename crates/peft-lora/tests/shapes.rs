//! Convolutions, with and without groups, and parts of a merged projection: combined, and as plain LoRA.

use peft_core::{
    Adapter, Conv, Ctx, Dense, Geometry, Linear, Model, ModelExt, Slot, Spec, Tuner, parse,
};
use peft_lora::{Combination, CombinationType, LoraConfig, MergedLora, Rank, combine, to_lora};
use peft_testing::close;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// An image's way through two convolutions, the second in two groups, and a fused projection.
struct Net {
    image: Conv,
    grouped: Conv,
    qkv: Linear,
}

impl Net {
    fn new() -> Net {
        tch::manual_seed(7);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.4;
        let grouped = Geometry {
            groups: 2,
            ..Geometry::plain(2)
        };
        Net {
            image: Conv::new(
                random(&[6, 3, 3, 2]),
                Some(random(&[6])),
                Geometry::plain(2),
            )
            .unwrap(),
            grouped: Conv::new(random(&[4, 3, 2, 1]), None, grouped).unwrap(),
            qkv: Linear::new(Dense::new(random(&[9, 4]), Some(random(&[9])))),
        }
    }

    /// `[2, 3, 7, 6] -> [2, 9]`
    fn forward(&self) -> Tensor {
        tch::manual_seed(8);
        let x = Tensor::randn([2, 3, 7, 6], (Kind::Float, Device::Cpu));
        let h = self
            .grouped
            .forward(&self.image.forward(&x, Ctx::EVAL).tanh(), Ctx::EVAL);
        let h = h
            .flatten(2, -1)
            .mean_dim([2i64].as_slice(), false, Kind::Float);
        self.qkv.forward(&h, Ctx::EVAL).detach()
    }
}

impl Model for Net {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("image", Slot::Conv(&mut self.image));
        visit("grouped", Slot::Conv(&mut self.grouped));
        visit("qkv", Slot::Linear(&mut self.qkv));
    }
}

fn dressed(tuner: &dyn Tuner, seed: i64) -> Net {
    let mut net = Net::new();
    net.inject("a", tuner).unwrap();
    tch::manual_seed(seed);
    for param in net.params("a") {
        let shift = param.tensor.randn_like() * 0.4;
        tch::no_grad(|| drop(param.tensor.shallow_clone().g_add_(&shift)));
    }
    net
}

fn lora(more: Value) -> LoraConfig {
    let mut json =
        json!({"peft_type": "LORA", "r": 2, "lora_alpha": 7, "target_modules": ["image", "qkv"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    parse(json).unwrap()
}

fn adapter(config: &LoraConfig, seed: i64) -> Adapter {
    Adapter::of("a", config, &mut dressed(config, seed)).unwrap()
}

/// ΔW of the convolution, by loading and merging.
fn update(adapter: &Adapter) -> Tensor {
    let mut net = Net::new();
    let before = net.image.base().weight().copy();
    adapter.apply("a", &mut net).unwrap();
    net.merge().unwrap();
    net.image.base().weight() - before
}

#[test]
fn convolutions_are_combined() {
    let (first, second) = (
        adapter(&lora(json!({})), 1),
        adapter(&lora(json!({"r": 3})), 2),
    );
    let expected = update(&first) * 0.7 - update(&second) * 0.4;
    for (kind, rank) in [
        (CombinationType::Cat, None),
        (CombinationType::Svd, Some(5)),
    ] {
        let how = Combination {
            svd_rank: rank,
            ..Combination::of(kind)
        };
        let made = combine(&[(&first, 0.7), (&second, -0.4)], &how).unwrap();
        close(&update(&made), &expected, 2e-6, &kind.to_string());
        assert_eq!(
            made.state["base_model.model.image.lora_A.weight"].size(),
            [5, 3, 3, 2]
        );
        assert_eq!(
            made.state["base_model.model.image.lora_B.weight"].size(),
            [6, 5, 1, 1]
        );
    }
}

/// The factors of a grouped layer have no product of the weight's shape.
#[test]
fn groups_are_refused() {
    let config = lora(json!({"target_modules": ["image", "grouped"]}));
    let parts = adapter(&config, 1);
    let cat = Combination::of(CombinationType::Cat);
    let message = combine(&[(&parts, 1.0)], &cat)
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("`grouped`") && message.contains("2 groups"),
        "{message}"
    );
    let result = to_lora(&mut dressed(&config, 1), "a", &config, Rank::Number(2));
    let message = result.map(|_| ()).unwrap_err().to_string();
    assert!(
        message.contains("`grouped`") && message.contains("no form"),
        "{message}"
    );
}

#[test]
fn whatever_has_a_weight_is_converted() {
    let merged: MergedLora = parse(json!({"peft_type": "MERGED_LORA", "r": 2, "lora_alpha": 7, "target_modules": ["qkv"], "parts": [true, false, true]})).unwrap();
    let dora = lora(json!({"use_dora": true}));
    let tuners: [(&dyn Tuner, Rank, f64); 4] = [
        (&lora(json!({})), Rank::Number(4), 1e-6), // taken over
        (&dora, Rank::Number(4), 1.0),             // cut
        (&dora, Rank::Energy(1.0 - 1e-12), 1e-5),
        (&merged, Rank::Number(4), 1e-5),
    ];
    for (tuner, rank, worst) in tuners {
        let mut net = dressed(tuner, 3);
        let made = to_lora(&mut net, "a", tuner, rank).unwrap();
        let mut plain = Net::new();
        made.adapter.apply("a", &mut plain).unwrap();
        assert!(
            made.layers.iter().all(|it| it.error < worst),
            "{:?}",
            made.layers
        );
        if worst < 1.0 {
            close(&plain.forward(), &net.forward(), 1e-5, tuner.peft_type());
        }
    }
}
