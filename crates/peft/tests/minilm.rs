//! A real encoder against Python's numbers: names without `bert.` in the file, a tensor of positions that nobody
//! wants, and a tokenizer that asks for rows of exactly 128 tokens.

use std::path::Path;

use peft::core::{Ctx, files, tensors};
use peft::models::{HeadOptions, Input, OpenOptions, Source, Task, open_task};
use peft::tch::{Kind, Tensor};
use peft_testing::fixtures;

#[test]
fn a_real_encoder_reads_what_it_reads_in_python() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/models/minilm");
    if !folder.join("config.json").exists() {
        println!("skipped: no model in target/models/minilm; `cargo xtask test` fetches it");
        return;
    }
    let told = files::read_json(&fixtures::root().join("minilm.json")).unwrap();
    let python = tensors::read(&fixtures::root().join("minilm.safetensors")).unwrap();

    let tokenizer = peft::Tokenizer::open(&folder).unwrap();
    for (sentence, ids) in rows(&told["sentences"]).zip(rows(&told["ids"])) {
        let sentence = sentence.as_str().unwrap();
        let ours = tokenizer.encode(sentence, true).unwrap();
        assert_eq!(serde_json::json!(ours), *ids, "{sentence}");
    }

    let source = Source::Folder(folder);
    let options = OpenOptions::default();
    let head = HeadOptions::default();
    let model = open_task(&source, Task::FeatureExtraction, options, &head).unwrap();
    assert_eq!(model.fresh(), [""; 0], "every tensor is in the file");
    let input = Input {
        attention_mask: Some(python["attention_mask"].shallow_clone()),
        ..Input::new(python["input_ids"].shallow_clone())
    };
    let hidden = model.outputs(&input, Ctx::EVAL).unwrap()["last_hidden_state"].shallow_clone();
    let mask = input.attention_mask.unwrap().unsqueeze(-1);
    let apart = ((&hidden - &python["last_hidden_state"]) * &mask)
        .abs()
        .max();
    let apart = apart.double_value(&[]);
    assert!(apart < 1e-5, "hidden vectors are off by {apart:e}");

    let sum = (&hidden * &mask).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let means = &sum / sum.norm_scalaropt_dim(2.0, [1i64].as_slice(), true);
    let cosines = means.matmul(&means.tr());
    for (i, row) in rows(&told["cosines"]).enumerate() {
        for (j, cosine) in rows(row).enumerate() {
            let ours = cosines.double_value(&[i as i64, j as i64]);
            let off = (ours - cosine.as_f64().unwrap()).abs();
            assert!(off < 1e-5, "sentences {i} and {j}: {ours}");
        }
    }
}

fn rows(list: &serde_json::Value) -> impl Iterator<Item = &serde_json::Value> {
    list.as_array().unwrap().iter()
}

/// What a classifier begins with: the pooler of the file, and an output layer that is made.
#[test]
fn only_the_output_layer_of_a_classifier_is_fresh() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/models/minilm");
    if !folder.join("config.json").exists() {
        println!("skipped: no model in target/models/minilm; `cargo xtask test` fetches it");
        return;
    }
    let head = HeadOptions {
        num_labels: Some(6),
        ..HeadOptions::default()
    };
    let source = Source::Folder(folder);
    let model = open_task(&source, Task::SeqCls, OpenOptions::default(), &head).unwrap();
    let mut fresh = model.fresh().to_vec();
    fresh.sort();
    assert_eq!(fresh, ["classifier.bias", "classifier.weight"]);
    let ids = Tensor::from_slice(&[101i64, 2158, 102]).unsqueeze(0);
    let logits = &model.outputs(&Input::new(ids), Ctx::EVAL).unwrap()["logits"];
    assert_eq!(logits.size(), [1, 6]);
    assert!(logits.abs().max().double_value(&[]) < 1.0, "{logits}");
}
