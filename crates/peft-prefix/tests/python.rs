//! The projection and the layout of the table against Python's: `python.safetensors`, which `python.py` makes.

use std::path::Path;

use peft_core::{Adapter, Common, Ctx, Model, ModelExt, PromptSlot, Slot, Spec, State, tensors};
use peft_prefix::{PrefixConfig, begin_with_kv, prefix_from_kv};
use peft_testing::{close, same_bits};
use tch::{Kind, Tensor};

/// A model of three layers with two heads of keys and values that is nothing but a place for virtual tokens.
struct Place {
    slot: PromptSlot,
    encoder_decoder: bool,
}

impl Place {
    fn new() -> Place {
        Place {
            slot: PromptSlot::new(&Tensor::randn([23, 12], (Kind::Float, tch::Device::Cpu))),
            encoder_decoder: false,
        }
    }
}

impl Model for Place {
    fn spec(&self) -> Spec {
        Spec {
            hidden: 12,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            head_dim: 3,
            encoder_decoder: self.encoder_decoder,
            ..Spec::default()
        }
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("", Slot::Prompt(&mut self.slot));
    }
}

fn python() -> State {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python.safetensors");
    tensors::read(&file).unwrap()
}

fn task(task: &str) -> Common {
    Common {
        task_type: Some(task.to_owned()),
        ..Common::default()
    }
}

fn projected(tokens: i64) -> PrefixConfig {
    PrefixConfig {
        prefix_projection: true,
        encoder_hidden_size: Some(7),
        ..PrefixConfig::of(tokens)
    }
}

/// Keys and values of a case of the file, and each against `kv`.
fn layers(state: &State, case: &str) -> Vec<(Tensor, Tensor)> {
    let get = |what: &str, layer: usize| state[&format!("{case}.{what}.{layer}")].shallow_clone();
    (0..3)
        .map(|it| (get("keys", it), get("values", it)))
        .collect()
}

#[test]
fn a_projection_computes_pythons_table_and_gradients() {
    let python = python();
    let mut model = Place::new();
    tch::manual_seed(7);
    model.inject("default", &projected(4)).unwrap();
    let params = model.trainable("default");
    assert_eq!(params.len(), 5);
    for param in &params {
        // Bounds of uniform numbers differ in the last bit of a double.
        let key = format!("projected.fresh.{}", param.name);
        close(&param.tensor, &python[&key], 1e-6, &key);
        let value = &python[&format!("projected.{}", param.name)];
        tch::no_grad(|| param.tensor.shallow_clone().copy_(value));
    }
    let adapter = Adapter::of("default", &projected(4), &mut model).unwrap();
    let rows = &adapter.state["prompt_embeddings"];
    close(rows, &python["projected.rows"], 1e-5, "the table");

    let weights =
        (Tensor::arange(rows.numel() as i64, (Kind::Float, tch::Device::Cpu)) * 1.3).sin();
    let weights = weights.view([4, 6, 2, 3]).permute([1, 2, 0, 3]).unbind(0);
    let kv = model.slot.kv(Ctx::EVAL).unwrap();
    let slots = kv.iter().flat_map(|(k, v)| [k, v]);
    let sum = slots
        .zip(&weights)
        .map(|(slot, w)| (slot * w).sum(Kind::Float));
    let sum = sum.reduce(|a, b| a + b).unwrap();
    sum.backward();
    for param in &params {
        let key = format!("projected.grad.{}", param.name);
        close(&param.tensor.grad(), &python[&key], 1e-5, &key);
    }
}

/// What Python deals out of its table, dealt out of the same.
fn dealt(case: &str, task_type: &str, encoder_decoder: bool) {
    let python = python();
    let mut model = Place::new();
    model.encoder_decoder = encoder_decoder;
    let config = PrefixConfig {
        common: task(task_type),
        ..PrefixConfig::of(4)
    };
    model.inject("default", &config).unwrap();
    let [table] = &model.trainable("default")[..] else {
        panic!("one table");
    };
    assert_eq!(table.name, "prompt_embeddings");
    let value = &python[&format!("{case}.table")];
    tch::no_grad(|| table.tensor.shallow_clone().copy_(value));
    let kv = model.slot.kv(Ctx::EVAL).unwrap();
    for (layer, (ours, theirs)) in kv.iter().zip(layers(&python, case)).enumerate() {
        assert!(
            same_bits(&ours.0, &theirs.0),
            "{case}: keys of layer {layer}"
        );
        assert!(
            same_bits(&ours.1, &theirs.1),
            "{case}: values of layer {layer}"
        );
    }
}

#[test]
fn a_table_is_laid_out_as_in_python() {
    dealt("llama", "CAUSAL_LM", false);
}

#[test]
fn a_decoder_behind_an_encoder_gets_the_layers_that_python_gives_it() {
    dealt("t5", "SEQ_2_SEQ_LM", true);
}

#[test]
fn a_cache_becomes_pythons_table() {
    let python = python();
    let kv = layers(&python, "kv");
    let table = prefix_from_kv(&kv).unwrap();
    assert!(same_bits(&table.narrow(0, 0, 3), &python["kv.table"]));

    let mut model = Place::new();
    let config = PrefixConfig::of(3);
    model.inject("default", &config).unwrap();
    begin_with_kv(&mut model, "default", &kv).unwrap();
    for ((k, v), (text_k, text_v)) in model.slot.kv(Ctx::EVAL).unwrap().iter().zip(&kv) {
        assert!(same_bits(k, &text_k.narrow(1, 0, 3)));
        assert!(same_bits(v, &text_v.narrow(1, 0, 3)));
    }
    assert!(model.trainable("default")[0].tensor.requires_grad());
    let adapter = Adapter::of("default", &config, &mut model).unwrap();
    assert!(same_bits(
        &adapter.state["prompt_embeddings"],
        &python["kv.table"]
    ));
}

#[test]
fn what_the_model_knows_is_saved() {
    let mut model = Place::new();
    model.inject("default", &PrefixConfig::of(4)).unwrap();
    let adapter = Adapter::of("default", &PrefixConfig::of(4), &mut model).unwrap();
    let json = adapter.tuner.to_json();
    for (key, value) in [
        ("token_dim", 6),
        ("num_transformer_submodules", 1),
        ("num_attention_heads", 2),
        ("num_layers", 3),
        ("encoder_hidden_size", 6),
    ] {
        assert_eq!(json[key], value, "{key}");
    }
    assert!(adapter.trained.is_empty());
    assert_eq!(adapter.state["prompt_embeddings"].size(), [4, 36]);
}

#[test]
fn zero_is_zero_and_can_be_trained() {
    for projection in [false, true] {
        let config = PrefixConfig {
            init_weights: Some(peft_prefix::InitWeights::Zero),
            prefix_projection: projection,
            ..PrefixConfig::of(4)
        };
        let mut model = Place::new();
        model.inject("default", &config).unwrap();
        let kv = model.slot.kv(Ctx::EVAL).unwrap();
        let sum = kv
            .iter()
            .map(|(k, v)| (k.abs() + v.abs()).sum(Kind::Double));
        assert_eq!(sum.map(|it| it.double_value(&[])).sum::<f64>(), 0.0);
        (&kv[2].1 + 1.0).square().sum(Kind::Float).backward();
        let mut grads = model.trainable("default").into_iter();
        assert!(
            grads.any(|it| it.tensor.grad().defined()
                && it.tensor.grad().abs().max().double_value(&[]) > 0.0)
        );
    }
}
