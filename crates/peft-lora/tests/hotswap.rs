//! Another adapter under the same name: what it does is what the new one does alone, and an error changes nothing.

use peft_core::{Adapter, Ctx, Model, ModelExt, Slot, parse};
use peft_lora::{LoraConfig, hotswap};
use peft_testing::{
    close, same_bits,
    toy::{Kit, Toy},
};
use serde_json::{Value, json};
use tch::Tensor;

fn toy() -> Toy {
    Toy::new(
        Kit {
            tied: false,
            lossy: false,
        },
        1,
    )
}

fn forward(model: &Toy) -> Tensor {
    let ids = Tensor::from_slice(&[3i64, 0, 22, 7, 7, 12]).reshape([2, 3]);
    tch::no_grad(|| model.forward(&ids, Ctx::EVAL))
}

fn adapter(seed: i64, more: Value) -> Adapter {
    let mut json = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let config: LoraConfig = parse(json).unwrap();
    let mut model = toy();
    model.inject("a", &config).unwrap();
    tch::manual_seed(seed);
    for param in model.params("a") {
        let shift = param.tensor.randn_like() * 0.3;
        tch::no_grad(|| drop(param.tensor.shallow_clone().g_add_(&shift)));
    }
    Adapter::of("a", &config, &mut model).unwrap()
}

/// Three adapters one on the other; the middle one is to be swapped.
fn stacked(middle: &Adapter) -> Toy {
    let mut model = toy();
    adapter(1, json!({"use_dora": true}))
        .apply("first", &mut model)
        .unwrap();
    middle.apply("style", &mut model).unwrap();
    adapter(3, json!({"use_dora": true, "r": 2}))
        .apply("last", &mut model)
        .unwrap();
    model
}

#[test]
fn the_new_one_stands_where_the_old_one_stood() {
    let old = adapter(2, json!({}));
    for more in [
        json!({}),
        json!({"r": 5, "lora_alpha": 3}),
        json!({"r": 1, "use_rslora": true, "lora_dropout": 0.3}),
        json!({"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 1}}),
    ] {
        let new = adapter(9, more.clone());
        let expected = forward(&stacked(&new)); // DoRA above it: the order counts
        let mut model = stacked(&old);
        let names = model.adapters();
        hotswap(&mut model, "style", &new).unwrap();
        assert!(same_bits(&forward(&model), &expected), "{more}");
        assert_eq!(model.adapters(), names);
        hotswap(&mut model, "style", &old).unwrap();
        assert!(same_bits(&forward(&model), &forward(&stacked(&old))));
    }
}

#[test]
fn what_is_off_stays_off() {
    let (old, new) = (adapter(2, json!({})), adapter(9, json!({"r": 2})));
    let mut model = stacked(&old);
    model.switch("style", false).unwrap();
    let without = forward(&model);
    hotswap(&mut model, "style", &new).unwrap();
    assert!(same_bits(&forward(&model), &without));
    model.switch("style", true).unwrap();
    close(
        &forward(&model),
        &forward(&stacked(&new)),
        1e-9,
        "switched on",
    );
}

/// A trained bias belongs to one adapter; the one that goes must not stand in the way of the one that comes.
#[test]
fn biases_are_swapped_too() {
    let (old, new) = (
        adapter(2, json!({"bias": "all"})),
        adapter(9, json!({"bias": "all"})),
    );
    let mut model = stacked(&old);
    hotswap(&mut model, "style", &new).unwrap();
    assert!(same_bits(&forward(&model), &forward(&stacked(&new))));
}

/// Any adapter can replace any other, at other places, too.
#[test]
fn replaced_by_another_kind() {
    let old = adapter(2, json!({}));
    let new = adapter(
        9,
        json!({"use_dora": true, "target_modules": ["o_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
    );
    let mut model = stacked(&old);
    new.replace("style", &mut model).unwrap();
    let mut places = Vec::new();
    model.slots(&mut |at, slot| {
        if let Slot::Linear(it) = slot
            && it.adapters("style").next().is_some()
        {
            places.push(at.to_owned());
        }
    });
    assert_eq!(places, ["blocks.1.v_proj", "blocks.1.o_proj", "lm_head"]);
    close(&forward(&model), &forward(&stacked(&new)), 1e-9, "replaced");
}

fn refused(model: &mut Toy, name: &str, new: &Adapter, words: &[&str]) {
    let (names, before) = (model.adapters(), forward(model));
    let message = hotswap(model, name, new).unwrap_err().to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
    assert_eq!(model.adapters(), names);
    assert!(
        same_bits(&forward(model), &before),
        "{message}: but the model has changed"
    );
}

#[test]
fn an_error_changes_nothing() {
    let old = adapter(2, json!({}));
    let mut model = stacked(&old);
    let fewer = adapter(9, json!({"target_modules": ["q_proj"]}));
    refused(&mut model, "style", &fewer, &["lacks", "v_proj.lora_A"]);
    let more = adapter(9, json!({"target_modules": ["q_proj", "v_proj", "o_proj"]}));
    refused(&mut model, "style", &more, &["2 tensors", "o_proj.lora_A"]);
    let dora = adapter(9, json!({"use_dora": true}));
    refused(&mut model, "style", &dora, &["lora_magnitude_vector"]);
    refused(
        &mut model,
        "stile",
        &old,
        &["`stile`", "nearest is `style`"],
    );
    let mut wide = adapter(9, json!({}));
    let key = "base_model.model.blocks.1.v_proj.lora_B.weight";
    let wider = wide.state[key].constant_pad_nd([0, 0, 0, 2]);
    wide.state.insert(key.to_owned(), wider);
    refused(&mut model, "style", &wide, &[key, "[13, 3]", "[15, 3]"]);
    let bias = adapter(9, json!({"bias": "all"}));
    adapter(4, json!({"bias": "lora_only"}))
        .apply("biased", &mut model)
        .unwrap();
    refused(&mut model, "style", &bias, &["bias", "blocks.0.q_proj"]);
    model.merge().unwrap();
    refused(&mut model, "style", &adapter(9, json!({})), &["unmerge"]);
}
