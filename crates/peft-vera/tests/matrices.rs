//! What no law says: Python's bits, who shares what, names on disk, and what is refused.

use peft_core::{Adapter, Ctx, Error, Model, ModelExt, Registry, Slot, Tuner, parse};
use peft_testing::toy::{Kit, Toy};
use peft_testing::{close, same_bits};
use peft_vera::VeraConfig;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn toy() -> Toy {
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    Toy::new(kit, 1)
}

fn config(more: Value) -> VeraConfig {
    let mut json = json!({"peft_type": "VERA", "r": 3, "projection_prng_key": 17, "target_modules": ["q_proj", "o_proj"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    parse::<VeraConfig>(json).unwrap()
}

fn out(model: &Toy) -> Tensor {
    let ids = (Tensor::arange(14, (Kind::Int64, Device::Cpu)) * 3)
        .remainder(23)
        .view([2, 7]);
    tch::no_grad(|| model.forward(&ids, Ctx::EVAL))
}

fn shaken(config: &VeraConfig) -> (Toy, Adapter) {
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

/// What `peft` 0.21.2 draws for `VeraConfig(r=3, projection_prng_key=17)` on layers of 13 → 10 and 10 → 13, by
/// `torch.Generator().manual_seed(17)`.
#[test]
fn the_matrices_are_pythons_bits() {
    let (_, adapter) = shaken(&config(json!({})));
    let (a, b) = (
        &adapter.state["base_model.vera_A"],
        &adapter.state["base_model.vera_B"],
    );
    assert_eq!((a.size(), b.size()), (vec![3, 13], vec![13, 3]));
    let bits = |t: &Tensor| -> Vec<u32> {
        let all = Vec::<f32>::try_from(t.reshape([-1])).unwrap();
        all.into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(a)[..4], A_BITS);
    assert_eq!(bits(&a.narrow(0, 2, 1))[9..], A_LAST_BITS);
    assert_eq!(bits(b)[..4], B_BITS);
    assert_eq!(bits(&b.narrow(0, 12, 1)), B_LAST_BITS);
}

const A_BITS: [u32; 4] = [0xbdb6fc62, 0x3d4365d2, 0x3ee5b775, 0xbf02d567];
const A_LAST_BITS: [u32; 4] = [0x3e8f88b9, 0x3ec51a3a, 0x3ea07321, 0xbd9921f0];
const B_BITS: [u32; 4] = [0xbf19b55d, 0xbf4c58c1, 0xbf23d3e5, 0x3f32534d];
const B_LAST_BITS: [u32; 3] = [0xbf8d63ab, 0x3f97b100, 0x3efd21da];

#[test]
fn drawing_them_leaves_the_generator_alone() {
    let noise = || Tensor::randn([3], (Kind::Float, Device::Cpu));
    tch::manual_seed(8);
    let expected = noise();
    tch::manual_seed(8);
    let mut model = toy(); // which seeds for itself
    tch::manual_seed(8);
    model.inject("default", &config(json!({}))).unwrap();
    assert!(same_bits(&noise(), &expected));
}

#[test]
fn the_file_has_them_once_or_not_at_all() {
    let names = |adapter: &Adapter| adapter.state.keys().cloned().collect::<Vec<_>>();
    let key = |it: &str| format!("base_model.model.blocks.{it}");
    let vectors = [
        key("0.q_proj.vera_lambda_b"),
        key("0.q_proj.vera_lambda_d"),
        key("1.o_proj.vera_lambda_b"),
        key("1.o_proj.vera_lambda_d"),
    ];
    let (model, with) = shaken(&config(json!({})));
    let all: Vec<String> = vectors
        .iter()
        .cloned()
        .chain(["base_model.vera_A".into(), "base_model.vera_B".into()])
        .collect();
    assert_eq!(names(&with), all);
    let (_, without) = shaken(&config(json!({"save_projection": false})));
    assert_eq!(names(&without), vectors);

    // Drawn again they are the same; another key gives others.
    let mut fresh = toy();
    without.apply("a", &mut fresh).unwrap();
    assert!(same_bits(&out(&fresh), &out(&model)));
    let mut other = toy();
    let keyed = config(json!({"save_projection": false, "projection_prng_key": 18}));
    let adapter = Adapter {
        tuner: Box::new(keyed),
        ..without
    };
    adapter.apply("a", &mut other).unwrap();
    assert!(!same_bits(&out(&other), &out(&model)));

    // In the file, they count: with another key it gives the same all the same.
    let keyed = config(json!({"projection_prng_key": 18}));
    let adapter = Adapter {
        tuner: Box::new(keyed),
        ..with
    };
    let mut again = toy();
    adapter.apply("a", &mut again).unwrap();
    assert!(same_bits(&out(&again), &out(&model)));

    // There although the configuration says that they are not: passed over.
    let keyed = config(json!({"save_projection": false}));
    let adapter = Adapter {
        tuner: Box::new(keyed),
        ..adapter
    };
    let mut again = toy();
    adapter.apply("a", &mut again).unwrap();
    assert!(same_bits(&out(&again), &out(&model)));
}

#[test]
fn a_file_without_them_that_should_have_them_is_refused() {
    let (_, mut adapter) = shaken(&config(json!({})));
    drop(adapter.state.remove("base_model.vera_A").unwrap());
    let mut model = toy();
    let error = adapter.apply("a", &mut model).unwrap_err();
    assert!(
        matches!(&error, Error::Missing { key, .. } if key == "base_model.vera_A"),
        "{error}"
    );
    assert!(model.adapters().is_empty());
    let dir = tempfile::tempdir().unwrap();
    adapter.save(dir.path()).unwrap();
    Adapter::load(dir.path(), &Registry::default().with::<VeraConfig>()).unwrap();
}

/// All layers multiply by the same memory.
#[test]
fn layers_share_them() {
    let mut model = toy();
    model
        .inject(
            "default",
            &config(json!({"target_modules": "all-linear", "r": 5})),
        )
        .unwrap();
    let all = model.params("default");
    let matrices: Vec<_> = all
        .iter()
        .filter(|it| it.name == "vera_A" || it.name == "vera_B")
        .collect();
    assert_eq!(matrices.len(), 2);
    assert!(matrices.iter().all(|it| !it.tensor.requires_grad()));
    assert_eq!(model.trainable("default").len(), 2 * 4);
}

#[test]
fn a_layer_is_the_formula() {
    let (mut model, adapter) = shaken(&config(
        json!({"target_modules": ["o_proj"], "d_initial": 0.7}),
    ));
    let of = |name: &str| {
        adapter.state[&format!("base_model.model.blocks.1.o_proj.{name}")].to_kind(Kind::Double)
    };
    let [a, b] = ["base_model.vera_A", "base_model.vera_B"]
        .map(|it| adapter.state[it].to_kind(Kind::Double));
    let delta =
        (b * of("vera_lambda_b").unsqueeze(1)).matmul(&(a * of("vera_lambda_d").unsqueeze(1)));
    let weight = |model: &mut Toy| {
        let mut found = None;
        model.slots(&mut |at, slot| {
            if let ("blocks.1.o_proj", Slot::Linear(layer)) = (at, slot) {
                found = Some(layer.base().weight().to_kind(Kind::Double));
            }
        });
        found.unwrap()
    };
    let before = weight(&mut model);
    model.merge().unwrap();
    close(&(weight(&mut model) - before), &delta, 1e-5, "ΔW");
}

fn refused(more: Value, words: &[&str]) {
    let mut json = json!({"peft_type": "VERA", "target_modules": ["q_proj"], "r": 3});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let mut model = toy();
    let result = parse::<VeraConfig>(json.clone()).and_then(|it| model.inject("default", &it));
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
    refused(json!({"r": 0}), &["r is 0"]);
    refused(json!({"projection_prng_key": -3}), &["-3"]);
    refused(json!({"vera_dropout": 1.0}), &["vera_dropout"]);
    refused(json!({"bias": "lora_only"}), &["lora_only", "vera_only"]);
    refused(json!({"exclude_modules": ["q_proj"]}), &["exclude_modules"]);
    refused(
        json!({"target_modules": ["embed_tokens"]}),
        &["embed_tokens", "an embedding"],
    );
    refused(
        json!({"target_modules": ["q_prj"]}),
        &["q_prj", "blocks.0.q_proj"],
    );
    refused(
        json!({"layers_pattern": "blocks"}),
        &["layers_to_transform"],
    );
    refused(
        json!({"modules_to_save": ["lm_haed"]}),
        &["lm_haed", "lm_head"],
    );
    assert_eq!(config(json!({})).peft_type(), "VERA");
}
