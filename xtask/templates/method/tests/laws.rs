//! The laws that hold for every method, on a layer with a bias, random weights and random input.

use peft_core::{
    Config, Ctx, Dense, Injection, Linear, LinearOp, Outline, Registry, Site, SiteKind, Slot, Spec,
    State, Tuner,
};
use peft_scale::ScaleConfig;
use tch::{Device, Kind, Tensor, no_grad};

const AT: &str = "model.layers.0.self_attn.q_proj";

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

/// A model of one layer, 7 -> 5.
fn outline() -> Outline {
    let spec = Spec {
        model_type: "llama".to_owned(),
        hidden: 7,
        layers: 1,
        kv_heads: 1,
        head_dim: 7,
        input_embedding: "model.embed_tokens".to_owned(),
        output_embedding: None,
        tied: false,
        transposed: false,
    };
    let site = Site {
        at: AT.to_owned(),
        kind: SiteKind::Linear,
        shape: vec![5, 7],
        bias: true,
    };
    Outline {
        spec,
        sites: vec![site],
    }
}

/// The layer with the method on it, and the parameters that it brought.
fn dressed() -> (Linear, Vec<Tensor>) {
    tch::manual_seed(7);
    let mut layer = Linear::new(Dense::new(random(&[5, 7]), Some(random(&[5]))));
    let outline = outline();
    let mut injection = Injection {
        name: "default",
        outline: &outline,
        shared: State::new(),
    };
    let config = ScaleConfig::on(["q_proj"]).resolve(&outline).unwrap();
    assert!(config.wants(&outline.sites[0], &outline).unwrap());
    config
        .attach(AT, Slot::Linear(&mut layer), &mut injection)
        .unwrap();
    let mut params = Vec::new();
    for adapter in layer.adapters("default") {
        adapter.params(&mut |_, tensor| params.push(tensor.shallow_clone()));
    }
    (layer, params)
}

/// The same, moved away from its start, so that nothing is right by luck.
fn moved() -> (Linear, Vec<Tensor>) {
    let (layer, params) = dressed();
    for param in &params {
        let _ = no_grad(|| param.shallow_clone().g_add_(&(random(&param.size()) * 0.3)));
    }
    (layer, params)
}

fn assert_close(a: &Tensor, b: &Tensor) {
    let off = (a - b).abs().max().double_value(&[]);
    assert!(off < 1e-5, "off by {off:e}");
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    let (layer, _) = dressed();
    let x = random(&[2, 3, 7]);
    assert_close(&layer.forward(&x, Ctx::EVAL), &layer.base().forward(&x));
}

#[test]
fn merged_equals_forward() {
    let (layer, _) = moved();
    let x = random(&[2, 3, 7]);
    let plain = peft_core::Plain {
        weight: layer.base().weight(),
        bias: layer.base().bias().map(Tensor::shallow_clone),
    };
    let adapter = layer.adapters("default").next().unwrap();
    let merged = adapter.merge(plain).expect("this method has a weight form");
    let dense = Dense::new(merged.weight, merged.bias);
    let forward = layer.forward(&x, Ctx::EVAL);
    assert_close(&forward, &dense.forward(&x));
    let moved = (forward - layer.base().forward(&x)).abs().max();
    assert!(moved.double_value(&[]) > 1e-2, "the adapter does nothing");
}

#[test]
fn gradients_reach_the_adapter_and_nothing_else() {
    let (layer, params) = moved();
    let x = random(&[2, 3, 7]);
    let loss = layer.forward(&x, Ctx::TRAIN).square().mean(Kind::Float);
    loss.backward();
    for param in &params {
        assert!(param.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    }
    assert!(!layer.base().weight().requires_grad());
}

#[test]
fn every_key_of_the_configuration_survives() {
    let json = serde_json::json!({
        "peft_type": ScaleConfig::PEFT_TYPE,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "somewhere",
        "unknown_but_off": null,
    });
    let registry = Registry::default().with::<ScaleConfig>();
    let saved = registry.parse(json.clone()).unwrap().to_json();
    for (key, value) in json.as_object().unwrap() {
        assert_eq!(&saved[key], value, "`{key}`");
    }
    let other = serde_json::json!({"peft_type": ScaleConfig::PEFT_TYPE, "target_modules": ["q"], "twist": 3});
    let error = registry.parse(other).unwrap_err().to_string();
    assert!(error.contains("`twist`"), "{error}");
}
