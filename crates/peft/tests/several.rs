//! Several adapters on one model, against Python's numbers in `fixtures/methods/combine`.

use std::path::PathBuf;

use peft::{
    Adapter, BitfitConfig, Ctx, Decoder, HeadOptions, Input, Model, ModelExt, Network, OpenOptions,
    Task,
    core::{State, files, tensors},
    lora::{Rank, hotswap, to_lora},
    models::Source,
    open, open_task,
    tch::{self, Kind, Tensor},
};
use peft_testing::{close, fixtures, same_bits};

fn folder() -> PathBuf {
    fixtures::root().join("methods/combine")
}

fn adapter(name: &str) -> Adapter {
    Adapter::load(&folder().join(name), &peft::builtin()).unwrap()
}

fn llama() -> Box<dyn Decoder> {
    let path = fixtures::root().join("models/llama");
    open(path.to_str().unwrap(), OpenOptions::default()).unwrap()
}

/// Logits where there is something to attend to.
fn logits(model: &dyn Decoder, io: &State) -> Tensor {
    let mask = &io["swapped.attention_mask"];
    let input = Input {
        attention_mask: Some(mask.shallow_clone()),
        ..Input::new(io["swapped.input_ids"].shallow_clone())
    };
    tch::no_grad(|| model.forward(&input, Ctx::EVAL)) * mask.unsqueeze(-1)
}

/// Python refuses the last two, whose scales it cannot change, and swaps `b` under the scale of the first unless
/// the model has been prepared; here each is what it is alone.
#[test]
fn a_swapped_adapter_is_what_it_is_alone() {
    let io = tensors::read(&folder().join("combine.safetensors")).unwrap();
    let mut model = llama();
    adapter("a").apply("style", &mut *model).unwrap();
    for name in ["b", "patterned", "rooted"] {
        hotswap(&mut *model, "style", &adapter(name)).unwrap();
        let expected = &io[&format!("alone.{name}.logits")];
        let mask = io["swapped.attention_mask"].unsqueeze(-1);
        close(&logits(&*model, &io), &(expected * mask), 1e-5, name);
    }
    let before = logits(&*model, &io);
    let message = hotswap(&mut *model, "style", &adapter("c"))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("o_proj") || message.contains("v_proj"),
        "{message}"
    );
    assert!(same_bits(&logits(&*model, &io), &before));
    adapter("c").replace("style", &mut *model).unwrap();
    let mask = io["swapped.attention_mask"].unsqueeze(-1);
    close(
        &logits(&*model, &io),
        &(&io["alone.c.logits"] * mask),
        1e-5,
        "c",
    );
}

fn bert() -> Box<dyn Network> {
    let path = fixtures::root().join("methods/bases/bert-classes");
    let head = HeadOptions::default();
    open_task(
        &Source::Folder(path),
        Task::SeqCls,
        OpenOptions::default(),
        &head,
    )
    .unwrap()
}

/// A model for any case of `fixtures/methods`.
fn decoder(case: &str) -> Box<dyn Decoder> {
    let base = case.split("__").next().unwrap_or_default();
    let path = fixtures::root().join("models").join(base);
    open(path.to_str().unwrap(), OpenOptions::default()).unwrap()
}

fn method(what: &str) -> Adapter {
    let path = fixtures::root().join("methods").join(what);
    Adapter::load(&path, &peft::builtin()).unwrap()
}

/// Python's `convert_to_lora`: the same products, ranks and whole modules.
fn check_converted(adapter: &Adapter, model: &mut dyn Model, what: &str) {
    let io = tensors::read(&folder().join("combine.safetensors")).unwrap();
    let facts = files::read_json(&folder().join("combine.json")).unwrap();
    for (rank, word) in [(Rank::Number(2), "2"), (Rank::Energy(0.9), "0.9")] {
        let made = to_lora(model, "a", &*adapter.tuner, rank).unwrap();
        let what = format!("{what}/{word}");
        let facts = &facts["converted"][&what];
        let ranks = facts["ranks"].as_object().unwrap();
        assert_eq!(made.layers.len(), ranks.len());
        for layer in &made.layers {
            assert_eq!(ranks[&layer.at], layer.rank, "{}", layer.at);
            let half = |name: &str| {
                let key = format!("base_model.model.{}.lora_{name}.weight", layer.at);
                made.adapter.state[&key].shallow_clone()
            };
            let theirs = &io[&format!("converted.{what}.{}", layer.at)];
            close(&half("B").matmul(&half("A")), theirs, 1e-5, &layer.at);
        }
        for key in facts["heads"].as_array().unwrap() {
            let key = key.as_str().unwrap();
            close(&made.adapter.state[key], &adapter.state[key], 1e-9, key);
        }
    }
}

#[test]
fn converted_adapters_are_pythons() {
    let (what, mut model) = ("lora/bert-classes__default", bert());
    let lora = method(what);
    lora.apply("a", &mut *model).unwrap();
    check_converted(&lora, &mut *model, what);
    let input = || Input::new(Tensor::from_slice(&[3i64, 14, 15, 9, 26, 5]).view([2, 3]));
    let outputs =
        |model: &dyn Network| tch::no_grad(|| model.outputs(&input(), Ctx::EVAL)).unwrap();
    let made = to_lora(&mut *model, "a", &*lora.tuner, Rank::Number(3)).unwrap();
    let mut plain = bert();
    made.adapter.apply("a", &mut *plain).unwrap();
    let [expected, found] =
        [&model, &plain].map(|it| outputs(&**it)["logits"].to_kind(Kind::Float));
    close(&found, &expected, 1e-6, "logits");

    let (what, mut model) = ("vera/llama__default", llama());
    let vera = method(what);
    vera.apply("a", &mut *model).unwrap();
    check_converted(&vera, &mut *model, what);
}

/// Python converts none of these. Here each is what it was, as plain LoRA that is saved and loaded again.
#[test]
fn other_methods_are_what_they_were() {
    let io = tensors::read(&folder().join("combine.safetensors")).unwrap();
    let out = tempfile::tempdir().unwrap();
    for (kind, case, bias) in [
        ("ia3", "llama__default", "none"),
        ("ia3", "gpt2__default", "lora_only"),
        ("adalora", "llama__default", "none"),
        ("adalora", "gpt2__schedule", "none"),
        ("bitfit", "gpt2__bias-all", "all"), // what Python can load: a LoRA on one layer
    ] {
        let what = format!("{kind}/{case}");
        let (adapter, mut model) = (method(&what), decoder(case));
        adapter.apply("a", &mut *model).unwrap();
        let everything = Rank::Energy(1.0 - 1e-13);
        let made = to_lora(&mut *model, "a", &*adapter.tuner, everything).unwrap();
        assert_eq!(made.adapter.tuner.to_json()["bias"], bias, "{what}");
        assert_eq!(made.adapter.tuner.to_json()["task_type"], "CAUSAL_LM");
        let dir = out.path().join(kind).join(case);
        made.adapter.save(&dir).unwrap();
        let mut plain = decoder(case);
        let read = Adapter::load(&dir, &peft::builtin()).unwrap();
        read.apply("a", &mut *plain).unwrap();
        let (expected, found) = (logits(&*model, &io), logits(&*plain, &io));
        assert!(
            !expected.equal(&logits(&*decoder(case), &io)),
            "{what} does nothing"
        );
        close(&found, &expected, 1e-5, &what);
    }
}

/// Biases alone, those of norms among them: with one update of zero there is a LoRA that has them.
#[test]
fn biases_of_a_whole_model_are_carried() {
    let io = tensors::read(&folder().join("combine.safetensors")).unwrap();
    let (bitfit, mut model) = (BitfitConfig::default(), decoder("gpt2"));
    model.inject("a", &bitfit).unwrap();
    tch::manual_seed(3);
    for param in model.params("a") {
        let shift = param.tensor.randn_like() * 0.2;
        tch::no_grad(|| drop(param.tensor.shallow_clone().g_add_(&shift)));
    }
    let made = to_lora(&mut *model, "a", &bitfit, Rank::Number(2)).unwrap();
    assert_eq!(made.layers.len(), 1);
    let mut plain = decoder("gpt2");
    made.adapter.apply("a", &mut *plain).unwrap();
    close(&logits(&*plain, &io), &logits(&*model, &io), 1e-6, "biases");
}

#[test]
fn methods_without_a_form_as_lora_are_named() {
    for (what, words) in [
        ("ln/llama__default", ["norm", "plain LoRA"]),
        ("prompt/llama__random", ["the input", "virtual tokens"]),
        ("prefix/llama__plain", ["the input", "virtual tokens"]),
    ] {
        let (adapter, mut model) = (method(what), llama());
        adapter.apply("a", &mut *model).unwrap();
        let made = to_lora(&mut *model, "a", &*adapter.tuner, Rank::Number(2));
        let message = made.map(|_| ()).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{what}: {message}");
        }
    }
}
