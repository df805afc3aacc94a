//! The encoders and the beginnings of rows against Python's: `python.safetensors`, which `python.py` makes.

use std::path::Path;

use peft_core::{
    Adapter, Common, Ctx, Model, ModelExt, Param, PromptSlot, Slot, Spec, Start, State, tensors,
};
use peft_prompt::{EncoderType, PromptConfig, PromptInit, PtuningConfig};
use peft_testing::{close, same_bits};
use tch::{Kind, Tensor};

/// A model that is nothing but a place for virtual tokens.
struct Place {
    slot: PromptSlot,
    encoder_decoder: bool,
}

impl Place {
    fn new(words: &Tensor) -> Place {
        Place {
            slot: PromptSlot::new(words),
            encoder_decoder: false,
        }
    }

    /// `[tokens, width]`
    fn embeds(&self) -> Tensor {
        self.slot.embeds(Ctx::EVAL).unwrap()
    }
}

impl Model for Place {
    fn spec(&self) -> Spec {
        Spec {
            layers: 2,
            heads: 2,
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

fn ptuning(kind: EncoderType) -> PtuningConfig {
    PtuningConfig {
        encoder_reparameterization_type: kind,
        encoder_hidden_size: Some(7),
        ..PtuningConfig::of(4)
    }
}

/// `of(key)` for every parameter.
fn each(
    params: &[Param],
    what: &str,
    state: &State,
    of: impl Fn(&Param) -> Tensor,
    tolerance: f64,
) {
    for param in params {
        let key = format!("{what}{}", param.name);
        close(&of(param), &state[&key], tolerance, &key);
    }
}

fn encoder(case: &str, kind: EncoderType, count: usize) {
    let python = python();
    let mut model = Place::new(&python["words"]);
    tch::manual_seed(7);
    model.inject("default", &ptuning(kind)).unwrap();
    let params = model.trainable("default");
    assert_eq!(params.len(), count);
    // Bounds of uniform numbers differ in the last bit of a double.
    let fresh = format!("{case}.fresh.");
    each(
        &params,
        &fresh,
        &python,
        |it| it.tensor.shallow_clone(),
        1e-6,
    );

    for param in &params {
        let value = &python[&format!("{case}.{}", param.name)];
        tch::no_grad(|| param.tensor.shallow_clone().copy_(value));
    }
    let rows = model.embeds();
    close(&rows, &python[&format!("{case}.rows")], 1e-5, case);
    let weights = (Tensor::arange(40, (Kind::Float, tch::Device::Cpu)) * 1.3).sin();
    (&rows * weights.view([4, 10])).sum(Kind::Float).backward();
    let grad = format!("{case}.grad.");
    each(&params, &grad, &python, |it| it.tensor.grad(), 1e-5);
}

#[test]
fn an_mlp_computes_pythons_rows_and_gradients() {
    encoder("mlp", EncoderType::Mlp, 7);
}

#[test]
fn an_lstm_computes_pythons_rows_and_gradients() {
    encoder("lstm", EncoderType::Lstm, 1 + 2 * 2 * 4 + 4);
}

#[test]
fn a_seed_begins_the_prompt_as_in_python() {
    let python = python();
    for (init, key) in [
        (PromptInit::Random, "random"),
        (PromptInit::SampleVocab, "sampled"),
    ] {
        let mut model = Place::new(&python["words"]);
        let config = PromptConfig {
            prompt_tuning_init: init,
            ..PromptConfig::of(4)
        };
        tch::manual_seed(7);
        model.inject("default", &config).unwrap();
        assert!(same_bits(&model.embeds(), &python[key]), "{key}");
    }
}

#[test]
fn a_text_is_repeated_or_cut_and_words_are_means() {
    let words = &python()["words"];
    let rows = |config: &PromptConfig| {
        let mut model = Place::new(words);
        model.inject("default", config).unwrap();
        let trained = model.trainable("default");
        assert_eq!(
            (trained.len(), trained[0].name.as_str()),
            (1, "prompt_embeddings")
        );
        model.embeds()
    };
    let at = |ids: &[i64]| words.index_select(0, &Tensor::from_slice(ids));
    let text = |n, ids: &[i64]| rows(&PromptConfig::of(n).with_text("a text", "a tokenizer", ids));
    assert!(same_bits(&text(5, &[4, 0, 22]), &at(&[4, 0, 22, 4, 0])));
    assert!(same_bits(&text(2, &[4, 0, 22]), &at(&[4, 0])));

    let labels = PromptConfig::default().with_labels(&[("good", &[3]), ("not good", &[5, 3])]);
    let mean = (at(&[5]) + at(&[3])) / 2.0;
    let expected = Tensor::cat(&[at(&[3]), mean.shallow_clone()], 0);
    close(&rows(&labels), &expected, 1e-6, "one row a class");
    let mut three = labels;
    three.tokens.num_virtual_tokens = Some(3);
    let expected = Tensor::cat(&[at(&[3]), mean, at(&[3])], 0);
    close(&rows(&three), &expected, 1e-6, "and over again");
}

#[test]
fn a_half_precision_vocabulary_begins_fp32_rows() {
    let words = python()["words"].to_kind(Kind::BFloat16);
    let mut model = Place::new(&words);
    let config = PromptConfig::of(2).with_text("a text", "a tokenizer", &[4, 0]);
    model.inject("default", &config).unwrap();
    assert_eq!(model.embeds().kind(), Kind::Float);
}

#[test]
fn an_encoder_with_a_decoder_has_twice_the_rows_and_gets_the_first() {
    let words = &python()["words"];
    let task = Common {
        task_type: Some("SEQ_2_SEQ_LM".to_owned()),
        ..Common::default()
    };
    let mut plain = Place::new(words);
    plain.encoder_decoder = true;
    let config = PromptConfig {
        common: task.clone(),
        ..PromptConfig::of(3)
    };
    plain.inject("default", &config).unwrap();
    let adapter = Adapter::of("default", &config, &mut plain).unwrap();
    assert_eq!(adapter.state["prompt_embeddings"].size(), [6, 10]);
    assert!(same_bits(
        &plain.embeds(),
        &adapter.state["prompt_embeddings"].narrow(0, 0, 3)
    ));

    let mut computed = Place::new(words);
    computed.encoder_decoder = true;
    let config = PtuningConfig {
        common: task,
        ..PtuningConfig::of(3)
    };
    computed.inject("default", &config).unwrap();
    let adapter = Adapter::of("default", &config, &mut computed).unwrap();
    assert_eq!(adapter.state["prompt_embeddings"].size(), [6, 10]);
    assert_eq!(computed.embeds().size(), [3, 10]);
}

#[test]
fn what_the_model_knows_is_saved() {
    let mut model = Place::new(&python()["words"]);
    model.inject("default", &PtuningConfig::of(3)).unwrap();
    let adapter = Adapter::of("default", &PtuningConfig::of(3), &mut model).unwrap();
    let json = adapter.tuner.to_json();
    for (key, value) in [
        ("token_dim", 10),
        ("num_transformer_submodules", 1),
        ("num_attention_heads", 2),
        ("num_layers", 2),
        ("encoder_hidden_size", 10),
    ] {
        assert_eq!(json[key], value, "{key}");
    }
    let kept: Vec<&str> = adapter.trained.keys().map(String::as_str).collect();
    assert_eq!(kept.len(), 7);
    assert!(kept.contains(&"prompt_encoder.mlp_head.4.bias"), "{kept:?}");
    let keys: Vec<&String> = adapter.state.keys().collect();
    assert_eq!(keys, ["prompt_embeddings"]);
}

#[test]
fn a_loaded_encoder_is_its_rows_and_takes_no_gradient() {
    let words = &python()["words"];
    let config = ptuning(EncoderType::Lstm);
    let mut model = Place::new(words);
    model.inject("default", &config).unwrap();
    let adapter = Adapter::of("default", &config, &mut model).unwrap();
    let mut again = Place::new(words);
    again.dress("default", &config, Start::Saved).unwrap();
    adapter.fill("default", &mut again).unwrap();
    // libtorch has another LSTM where nobody asks for gradients, and files are made with that one.
    assert!(same_bits(&again.embeds(), &tch::no_grad(|| model.embeds())));
    assert!(again.trainable("default").is_empty());
}

#[test]
fn dropout_is_between_the_layers_of_an_lstm_in_training() {
    let words = &python()["words"];
    let config = PtuningConfig {
        encoder_dropout: 0.5,
        ..ptuning(EncoderType::Lstm)
    };
    let mut model = Place::new(words);
    model.inject("default", &config).unwrap();
    let trained = model.slot.embeds(Ctx::TRAIN).unwrap();
    assert!(!same_bits(&trained, &model.embeds()));
    assert!(same_bits(&model.embeds(), &model.embeds()));
}
