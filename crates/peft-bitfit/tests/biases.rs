//! What no law says: which biases, the form for Python and back, bf16, and what is refused.

use peft_bitfit::{BitfitConfig, Part, for_python, load_from_python, save_for_python};
use peft_core::{
    Adapter, Config, Ctx, Dense, Linear, Model, ModelExt, Outline, Slot, Spec, Tuner, parse,
    write_folder,
};
use peft_testing::toy::{Kit, Toy};
use peft_testing::{close, same_bits};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn toy() -> Toy {
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    Toy::new(kit, 1)
}

fn bitfit(json: Value) -> BitfitConfig {
    let mut all = json!({"peft_type": "BITFIT"});
    for (key, value) in json.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    parse::<BitfitConfig>(all).unwrap()
}

fn shaken(config: &BitfitConfig) -> (Toy, Adapter) {
    let mut model = toy();
    model.inject("default", config).unwrap();
    tch::manual_seed(4);
    for mut it in model.trainable("default") {
        let _off = tch::no_grad_guard();
        let noise = it.tensor.randn_like() * 0.3;
        let _ = it.tensor.g_add_(&noise);
    }
    let adapter = Adapter::of("default", config, &mut model).unwrap();
    (model, adapter)
}

fn out(model: &Toy) -> Tensor {
    let ids = Tensor::arange(12, (Kind::Int64, Device::Cpu)).view([2, 6]);
    tch::no_grad(|| model.forward(&ids, Ctx::EVAL))
}

#[test]
fn which_biases() {
    let names = |json: Value| {
        let mut model = toy();
        model.inject("default", &bitfit(json)).unwrap();
        let all = model.trainable("default").into_iter();
        all.map(|it| format!("{}.{}", it.at, it.name))
            .collect::<Vec<_>>()
    };
    let (norm, q, k) = (
        "blocks.0.norm.bias",
        "blocks.0.q_proj.bias",
        "blocks.0.k_proj.bias",
    );
    let (v, o) = ("blocks.1.v_proj.bias", "blocks.1.o_proj.bias");
    assert_eq!(names(json!({})), [norm, q, k]);
    assert_eq!(names(json!({"add_bias": true})), [norm, q, k, v, o]);
    assert_eq!(names(json!({"parts": ["query", "norm"]})), [norm, q]);
    assert_eq!(names(json!({"parts": ["value"], "add_bias": true})), [v]);
    assert_eq!(names(json!({"exclude_modules": ["norm"]})), [q, k]);
    assert_eq!(
        names(json!({"target_modules": ["lm_head"], "add_bias": true})),
        ["lm_head.bias"]
    );
}

/// Real names of each model, by part.
#[test]
fn parts_by_the_type_of_the_model() {
    let site = |model: &str, places: &[&str], parts: &[Part]| {
        let mut outline: Outline = toy().outline();
        outline.spec.model_type = model.to_owned();
        let like = outline.site("blocks.0.q_proj").unwrap().clone();
        outline.sites = places
            .iter()
            .map(|at| peft_core::Site {
                at: (*at).to_owned(),
                ..like.clone()
            })
            .collect();
        let config = BitfitConfig {
            parts: Some(parts.to_vec()),
            ..BitfitConfig::default()
        };
        let resolved = config
            .resolve(&outline)
            .map_err(|error| error.to_string())?;
        let wanted = outline
            .sites
            .iter()
            .filter(|it| resolved.wants(it, &outline).unwrap());
        Ok::<_, String>(wanted.map(|it| it.at.clone()).collect::<Vec<_>>())
    };
    let bert = [
        "bert.encoder.layer.3.attention.self.query",
        "bert.encoder.layer.3.attention.output.dense",
        "bert.encoder.layer.3.intermediate.dense",
        "bert.encoder.layer.3.output.dense",
        "bert.encoder.layer.3.output.LayerNorm",
        "bert.pooler.dense",
    ];
    assert_eq!(site("bert", &bert, &[Part::Query]).unwrap(), [bert[0]]);
    assert_eq!(site("bert", &bert, &[Part::Output]).unwrap(), [bert[1]]);
    assert_eq!(
        site("bert", &bert, &[Part::Mlp]).unwrap(),
        [bert[2], bert[3]]
    );
    assert_eq!(
        site("bert", &bert, &[Part::Norm, Part::Query]).unwrap(),
        [bert[0], bert[4]]
    );
    let gpt2 = [
        "transformer.h.1.ln_1",
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ];
    let all_three = [Part::Query, Part::Key, Part::Value];
    assert_eq!(site("gpt2", &gpt2, &all_three).unwrap(), [gpt2[1]]);
    assert_eq!(
        site("gpt2", &gpt2, &[Part::Mlp]).unwrap(),
        [gpt2[3], gpt2[4]]
    );
    let error = site("gpt2", &gpt2, &[Part::Query]).unwrap_err();
    assert!(
        error.contains("gpt2") && error.contains("all three"),
        "{error}"
    );
    let error = site("mlp", &gpt2, &[Part::Query]).unwrap_err();
    assert!(
        error.contains("`mlp`") && error.contains("target_modules"),
        "{error}"
    );
}

#[test]
fn pythons_form_and_back() {
    for json in [
        json!({}),
        json!({"add_bias": true}),
        json!({"target_modules": ["norm"]}),
        json!({"target_modules": ["v_proj"], "add_bias": true, "modules_to_save": ["lm_head", "k_proj"]}),
    ] {
        let (mut model, adapter) = shaken(&bitfit(json.clone()));
        let dir = tempfile::tempdir().unwrap();
        save_for_python(&adapter, &mut model, dir.path()).unwrap();
        let again = load_from_python(dir.path(), &mut model).unwrap();
        assert_eq!(
            again.state.keys().collect::<Vec<_>>(),
            adapter.state.keys().collect::<Vec<_>>(),
            "{json}"
        );
        for (key, tensor) in &again.state {
            assert!(same_bits(tensor, &adapter.state[key]), "{json} {key}");
        }
        let mut fresh = toy();
        again.apply("another", &mut fresh).unwrap();
        assert!(same_bits(&out(&fresh), &out(&model)), "{json}");
    }
}

#[test]
fn pythons_form_is_a_lora_without_effect() {
    let (mut model, adapter) = shaken(&bitfit(json!({"add_bias": true})));
    let (config, state) = for_python(&adapter, &mut model).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(
        (&config["bias"], &config["lora_bias"]),
        (&json!("all"), &json!(true))
    );
    assert_eq!(
        config["target_modules"],
        json!(["blocks.1.o_proj", "blocks.1.v_proj"])
    );
    let key = |it: &str| format!("base_model.model.{it}");
    assert!(state.contains_key(&key("blocks.0.q_proj.bias")));
    assert_eq!(state[&key("blocks.1.v_proj.lora_A.weight")].size(), [1, 10]);
    assert_eq!(state[&key("blocks.1.v_proj.lora_B.weight")].size(), [13, 1]);
    assert!(state.contains_key(&key("blocks.1.v_proj.lora_B.bias")));

    let (mut model, adapter) = shaken(&BitfitConfig::default());
    let (config, state) = for_python(&adapter, &mut model).unwrap();
    assert_eq!(
        (&config["bias"], &config["lora_bias"]),
        (&json!("all"), &json!(false))
    );
    assert_eq!(config["target_modules"], json!(["blocks.0.q_proj"]));
    assert!(state.contains_key(&key("blocks.0.q_proj.base_layer.bias")));
    assert!(state.contains_key(&key("blocks.0.norm.bias")));
}

#[test]
fn a_lora_that_does_something_is_no_bitfit() {
    let (mut model, adapter) = shaken(&BitfitConfig::default());
    let (config, state) = for_python(&adapter, &mut model).unwrap();
    let said = |config: &Value, state: &peft_core::State| {
        let dir = tempfile::tempdir().unwrap();
        write_folder(dir.path(), config, state).unwrap();
        load_from_python(dir.path(), &mut toy())
            .unwrap_err()
            .to_string()
    };
    let with = |key: &str, tensor: Tensor| {
        let mut more: peft_core::State = state
            .iter()
            .map(|(k, t)| (k.clone(), t.shallow_clone()))
            .collect();
        more.insert(format!("base_model.model.{key}"), tensor);
        more
    };
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let error = said(
        &config,
        &with("blocks.0.q_proj.lora_B.weight", ones(&[13, 1])),
    );
    assert!(
        error.contains("lora_B") && error.contains("not zero"),
        "{error}"
    );
    let error = said(&config, &with("blocks.0.q_porj.bias", ones(&[13])));
    assert!(
        error.contains("q_porj") && error.contains("blocks.0.q_proj"),
        "{error}"
    );
    let error = said(
        &config,
        &with("blocks.0.q_proj.lora_magnitude_vector", ones(&[13])),
    );
    assert!(error.contains("lora_magnitude_vector"), "{error}");
    let error = said(&config, &with("blocks.0.q_proj.bias", ones(&[13])));
    assert!(error.contains("two biases"), "{error}");
    let mut other = config.clone();
    other["peft_type"] = "IA3".into();
    assert!(said(&other, &state).contains("IA3"));
    let mut other = config.clone();
    other["alpha_pattern"] = json!({"q_proj": 4});
    assert!(said(&other, &state).contains("alpha_pattern"));
}

/// A step that is less than the last bit of a bias in bf16 is kept, and is at work.
#[test]
fn small_steps_on_a_base_in_bf16() {
    struct One(Linear);
    impl Model for One {
        fn spec(&self) -> Spec {
            Spec::default()
        }
        fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
            visit("only", Slot::Linear(&mut self.0));
        }
    }
    let half = |t: Tensor| t.to_kind(Kind::BFloat16);
    let bias = half(Tensor::from_slice(&[100f32, -3.0]));
    let weight = half(Tensor::from_slice(&[1f32, 0.5, -1.0, 2.0]).view([2, 2]));
    let mut model = One(Linear::new(Dense::new(weight, Some(bias))));
    model.inject("default", &BitfitConfig::default()).unwrap();
    let mut own = model.trainable("default").remove(0).tensor;
    assert_eq!(own.kind(), Kind::Float);
    let x = half(Tensor::from_slice(&[-100f32, 1.0]).view([1, 2]));
    let y = model.0.forward(&x, Ctx::TRAIN);
    assert_eq!(y.kind(), Kind::BFloat16);
    y.sum(Kind::Float).backward();
    close(
        &own.grad(),
        &Tensor::from_slice(&[1f32, 1.0]),
        0.0,
        "gradient",
    );
    tch::no_grad(|| {
        let _ = own.g_add_scalar_(0.01);
    });
    let moved = model.0.forward(&x, Ctx::EVAL) - y;
    assert!(
        moved.double_value(&[0, 0]) > 0.0,
        "the bias of 100 has not moved"
    );
    model.merge().unwrap();
    assert_eq!(model.0.base().bias().unwrap().kind(), Kind::BFloat16);
}

fn refused(more: Value, words: &[&str]) {
    let mut json = json!({"peft_type": "BITFIT"});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let mut model = toy();
    let result = parse::<BitfitConfig>(json.clone()).and_then(|it| model.inject("default", &it));
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
        json!({"target_modules": ["v_proj"]}),
        &[
            "none of the 1 targets has a bias",
            "blocks.1.v_proj",
            "add_bias",
        ],
    );
    refused(
        json!({"target_modules": ["q_prj"]}),
        &["q_prj", "blocks.0.q_proj"],
    );
    refused(
        json!({"target_modules": ["embed_tokens"]}),
        &["embed_tokens"],
    );
    refused(json!({"target_modules": "(("}), &["(("]);
    refused(
        json!({"parts": ["query"], "target_modules": ["q_proj"]}),
        &["parts", "target_modules"],
    );
    refused(json!({"parts": []}), &["parts"]);
    refused(json!({"parts": ["queries"]}), &["queries", "query"]);
    refused(
        json!({"exclude_modules": ["norm", "q_proj", "k_proj"]}),
        &["exclude_modules", "blocks.0"],
    );
    refused(
        json!({"modules_to_save": ["lm_haed"]}),
        &["lm_haed", "lm_head"],
    );
    refused(json!({"add_biases": true}), &["nearest is `add_bias`"]);
    assert!(BitfitConfig::default().check().is_ok());
}
