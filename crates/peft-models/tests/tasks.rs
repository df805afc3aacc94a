//! Models for every task give Python's numbers, names and files.

use std::{
    collections::BTreeSet,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use peft_core::{Ctx, Slot, State, files, tensors};
use peft_models::{
    Cache, HeadOptions, Input, Labels, Network, OpenOptions, Problem, Sampling, Source, Task,
    generate_seq2seq, open, open_task, save,
};
use serde_json::Value;
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-5;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/tasks")
        .join(name)
}

/// Every model by name.
fn models() -> Vec<String> {
    let entries = std::fs::read_dir(folder("")).expect("fixtures");
    let name = |it: std::io::Result<std::fs::DirEntry>| it.expect("entry").file_name();
    let mut all: Vec<String> = entries
        .map(|it| name(it).to_string_lossy().into_owned())
        .collect();
    all.sort();
    assert!(all.len() > 30, "the fixtures are there");
    all
}

/// What a model is for, by the class that Python saved.
fn task_of(dir: &Path) -> Task {
    let config = files::read_json(&dir.join("config.json")).expect("a configuration");
    let class = config["architectures"][0].as_str().expect("a class");
    let suffixes = [
        ("ForMaskedLM", Task::MaskedLm),
        ("ForSequenceClassification", Task::SeqCls),
        ("ForTokenClassification", Task::TokenCls),
        ("ForQuestionAnswering", Task::QuestionAns),
        ("ForConditionalGeneration", Task::Seq2SeqLm),
        ("Model", Task::FeatureExtraction),
    ];
    let found = suffixes.iter().find(|(suffix, _)| class.ends_with(suffix));
    found.expect("a known class").1
}

fn open_at(dir: &Path, task: Task, head: &HeadOptions) -> peft_core::Result<Box<dyn Network>> {
    tch::set_num_threads(1); // tiny tensors gain nothing by more
    let options = OpenOptions {
        kind: Some(Kind::Float),
        ..OpenOptions::default()
    };
    open_task(&Source::Folder(dir.to_owned()), task, options, head)
}

fn load(name: &str) -> (Box<dyn Network>, State) {
    let dir = folder(name);
    let model = open_at(&dir, task_of(&dir), &HeadOptions::default());
    let model = model.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(model.fresh().is_empty(), "{name}: {:?}", model.fresh());
    assert!(model.aside().is_empty(), "{name}: {:?}", model.aside());
    (
        model,
        tensors::read(&dir.join("base.safetensors")).expect("numbers"),
    )
}

fn input(io: &State, batch: &str) -> Option<Input> {
    let get = |name: &str| {
        io.get(&format!("{batch}.{name}"))
            .map(Tensor::shallow_clone)
    };
    Some(Input {
        attention_mask: get("attention_mask"),
        position_ids: get("position_ids"),
        token_type_ids: get("token_type_ids"),
        decoder_ids: get("decoder_input_ids"),
        decoder_mask: get("decoder_attention_mask"),
        ..Input::new(get("input_ids")?)
    })
}

fn labels(model: &dyn Network, io: &State, batch: &str) -> Option<Labels> {
    let get = |name: &str| {
        io.get(&format!("{batch}.{name}"))
            .map(Tensor::shallow_clone)
    };
    if let (Some(start), Some(end)) = (get("start_positions"), get("end_positions")) {
        return Some(Labels::Spans { start, end });
    }
    let labels = get("labels")?;
    Some(match (model.task(), labels.kind()) {
        (Task::SeqCls, Kind::Int64) => Labels::Classes(labels),
        (Task::SeqCls, _) => match model.classes().expect("classes").problem {
            Some(Problem::MultiLabel) => Labels::MultiLabel(labels),
            _ => Labels::Values(labels),
        },
        _ => Labels::Tokens(labels),
    })
}

/// The largest difference relative to the largest number, where there is no padding.
fn gap(got: &Tensor, expected: &Tensor, mask: Option<&Tensor>) -> f64 {
    assert_eq!(got.size(), expected.size());
    let keep = |t: &Tensor| match mask {
        Some(mask) if t.size().starts_with(&mask.size()) => {
            let at = mask.reshape([-1]).nonzero().view([-1]);
            t.flatten(0, 1).index_select(0, &at)
        }
        _ => t.shallow_clone(),
    };
    let (got, expected) = (keep(got), keep(expected));
    let off = (&got - &expected).abs().max() / expected.abs().max();
    let off = off.double_value(&[]);
    if off.is_nan() { f64::INFINITY } else { off }
}

const RETURNED: [&str; 6] = [
    "logits",
    "start_logits",
    "end_logits",
    "last_hidden_state",
    "encoder_last_hidden_state",
    "pooler_output",
];

/// Checks what a model returns against Python's, and says how many tensors there were.
fn compare(what: &str, model: &dyn Network, io: &State, batch: &str) -> usize {
    let Some(mut input) = input(io, batch) else {
        return 0;
    };
    let labels = labels(model, io, batch);
    if let Some(labels) = &labels {
        let (sum, count) = tch::no_grad(|| model.loss(&input, labels, Ctx::EVAL).expect("a loss"));
        let loss = sum.double_value(&[]) / count as f64;
        let expected = io[&format!("{batch}.loss")].double_value(&[]);
        let off = (loss - expected).abs() / expected.abs();
        assert!(off < TOLERANCE, "{what} {batch}: {loss} {expected}");
    }
    if let (Task::Seq2SeqLm, None, Some(Labels::Tokens(labels))) =
        (model.task(), &input.decoder_ids, &labels)
    {
        input.decoder_ids = Some(shifted(labels));
    }
    let got = tch::no_grad(|| model.outputs(&input, Ctx::EVAL).expect("outputs"));
    let wanted: BTreeSet<&str> = RETURNED
        .into_iter()
        .filter(|name| io.contains_key(&format!("{batch}.{name}")))
        .collect();
    assert_eq!(
        got.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        wanted
    );
    for (name, tensor) in &got {
        // What T5 returns is at the decoder's places, but for the encoder's.
        let mask = match model.task() {
            Task::SeqCls => None,
            _ if input.decoder_ids.is_some() && !name.starts_with("encoder") => {
                input.decoder_mask.as_ref()
            }
            _ => input.attention_mask.as_ref(),
        };
        let off = gap(tensor, &io[&format!("{batch}.{name}")], mask);
        assert!(off < TOLERANCE, "{what} {batch}: {name} off by {off:e}");
    }
    got.len() + usize::from(labels.is_some())
}

/// Labels shifted to the right behind the start token 0, as T5 reads them.
fn shifted(labels: &Tensor) -> Tensor {
    let size = labels.size();
    let ids = Tensor::cat(
        &[
            &Tensor::zeros([size[0], 1], (Kind::Int64, labels.device())),
            &labels.narrow(1, 0, size[1] - 1),
        ],
        1,
    );
    ids.masked_fill(&ids.eq(-100), 0)
}

const BATCHES: [&str; 7] = [
    "plain",
    "right",
    "left",
    "inside",
    "positions",
    "own",
    "long",
];

#[test]
fn outputs_and_losses_are_pythons() {
    for name in models() {
        let (model, io) = load(&name);
        let count: usize = BATCHES
            .iter()
            .map(|batch| compare(&name, &*model, &io, batch))
            .sum();
        assert!(count >= 4, "{name}: only {count} tensors to compare");
    }
}

#[test]
fn places_are_those_of_named_modules_in_that_order() {
    for name in models() {
        let (mut model, _) = load(&name);
        let mut got = Vec::new();
        model.slots(&mut |at, slot| {
            let kind = match slot {
                Slot::Linear(_) => "linear",
                Slot::Embedding(_) => "embedding",
                Slot::Norm(_) => "norm",
                _ => return assert_eq!(at, "", "only the model as a whole is another place"),
            };
            got.push((at.to_owned(), kind.to_owned()));
        });
        let json = files::read_json(&folder(&name).join("sites.json")).expect("names");
        let text = |it: &Value| it.as_str().expect("text").to_owned();
        let pair = |it: &Value| (text(&it[0]), text(&it[1]));
        let wanted: Vec<_> = json.as_array().expect("a list").iter().map(pair).collect();
        // T5's stacks call the shared table by names of their own: one place, visited once.
        let alias = |at: &str| at.ends_with("coder.embed_tokens");
        let wanted: Vec<_> = wanted.into_iter().filter(|(at, _)| !alias(at)).collect();
        let sorted = |all: &[(String, String)]| all.iter().cloned().collect::<BTreeSet<_>>();
        assert_eq!(sorted(&got), sorted(&wanted), "{name}");
        assert_eq!(got.len(), wanted.len(), "{name}");
        let spec = model.spec();
        let there = |at: &str| got.iter().any(|(name, _)| name == at);
        assert!(there(&spec.input_embedding), "{name}");
        assert!(spec.output_embedding.as_deref().is_none_or(there), "{name}");
        let head = spec.task_head.as_deref();
        let within = |head: &str| got.iter().any(|(at, _)| at.starts_with(head));
        assert!(head.is_none_or(within), "{name}");
    }
}

#[test]
fn what_is_saved_is_the_same_model() {
    for name in models() {
        let (mut model, io) = load(&name);
        let dir = tempfile::tempdir().expect("a folder");
        let to = dir.path().join("saved");
        save(&mut *model, &to, &[]).expect("saved");
        assert_eq!(task_of(&to), model.task(), "{name}");
        let again = open_at(&to, model.task(), &HeadOptions::default()).expect("a model");
        assert!(
            again.fresh().is_empty() && again.aside().is_empty(),
            "{name}"
        );
        assert_eq!(again.classes(), model.classes(), "{name}");
        compare(&name, &*again, &io, "plain");
    }
}

fn rows(tensor: &Tensor) -> Vec<Vec<u32>> {
    let rows: Vec<Vec<i64>> = tensor.to_kind(Kind::Int64).try_into().expect("rows");
    let row = |row: Vec<i64>| row.into_iter().map(|id| id as u32).collect();
    rows.into_iter().map(row).collect()
}

fn quiet(_: usize, _: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn greedy_answers_are_pythons_in_a_batch_and_alone() {
    for name in ["t5", "t5-gated", "t5-uneven"] {
        let (model, io) = load(name);
        let model = model.seq2seq().expect("an encoder and a decoder");
        let (ids, mask) = (
            rows(&io["greedy.input_ids"]),
            rows(&io["greedy.attention_mask"]),
        );
        let kept = |(ids, mask): (&Vec<u32>, &Vec<u32>)| -> Vec<u32> {
            let real = ids.iter().zip(mask).filter(|(_, m)| **m == 1);
            real.map(|(id, _)| *id).collect()
        };
        let sources: Vec<Vec<u32>> = ids.iter().zip(&mask).map(kept).collect();
        let expected = rows(&io["greedy.tokens"]);
        let sampling = Sampling {
            max_new_tokens: expected[0].len(),
            ..Sampling::default()
        };
        let write = |sources: &[Vec<u32>]| -> Vec<Vec<u32>> {
            let answers = generate_seq2seq(model, sources, &sampling, &mut quiet);
            answers
                .expect("answers")
                .into_iter()
                .map(|it| it.tokens)
                .collect()
        };
        assert_eq!(write(&sources), expected, "{name}");
        for (source, expected) in sources.iter().zip(&expected) {
            assert_eq!(
                &write(std::slice::from_ref(source))[0],
                expected,
                "{name} alone"
            );
        }
        // Rows that end early leave the others as they are.
        let end = expected[1][1];
        let sampling = Sampling {
            stop_ids: vec![end],
            ..sampling.clone()
        };
        let stopped = generate_seq2seq(model, &sources, &sampling, &mut quiet).expect("answers");
        for (answer, whole) in stopped.iter().zip(&expected) {
            let len = whole
                .iter()
                .position(|it| *it == end)
                .unwrap_or(whole.len());
            assert_eq!(answer.tokens, whole[..len], "{name} stopped");
        }
    }
}

#[test]
fn the_decoders_cache_changes_nothing() {
    for name in ["t5", "t5-gated", "t5-uneven"] {
        let (model, io) = load(name);
        let model = model.seq2seq().expect("an encoder and a decoder");
        let input = input(&io, "own").expect("a batch");
        let ids = input.decoder_ids.as_ref().expect("ids");
        let _guard = tch::no_grad_guard();
        let source = model.encode(&input, Ctx::EVAL);
        let mask = input.decoder_mask.as_ref();
        let whole = model.decode(ids, mask, &source, None, Ctx::EVAL);
        let mut cache = Cache::new();
        let parts: Vec<Tensor> = [(0, 3), (3, 1), (4, 2)]
            .into_iter()
            .map(|(begin, len)| {
                let ids = ids.narrow(1, begin, len);
                let mask = mask.map(|it| it.narrow(1, 0, begin + len));
                model.decode(&ids, mask.as_ref(), &source, Some(&mut cache), Ctx::EVAL)
            })
            .collect();
        let off = gap(&Tensor::cat(&parts, 1), &whole, mask);
        assert!(off < TOLERANCE, "{name}: off by {off:e}");
    }
}

fn options(num_labels: i64) -> HeadOptions {
    HeadOptions {
        num_labels: Some(num_labels),
        seed: 3,
        ..HeadOptions::default()
    }
}

#[test]
fn a_missing_head_is_drawn_at_random_and_told() {
    let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/llama");
    let model = open_at(&llama, Task::SeqCls, &options(7)).expect("a model");
    assert_eq!(model.fresh(), ["score.weight"]);
    assert_eq!(model.aside(), ["lm_head.weight"]);
    let bert = folder("bert");
    let weights = |seed| {
        let head = HeadOptions {
            seed,
            ..options(400)
        };
        let mut model = open_at(&bert, Task::TokenCls, &head).expect("a model");
        assert_eq!(model.fresh(), ["classifier.weight", "classifier.bias"]);
        assert_eq!(model.aside(), ["pooler.dense.bias", "pooler.dense.weight"]);
        let mut found = Vec::new();
        model.slots(&mut |at, slot| {
            if let (Slot::Linear(it), "classifier") = (slot, at) {
                found.push(it.base().weight());
                let bias = it.base().bias().expect("a bias").abs().max();
                assert_eq!(bias.double_value(&[]), 0.0);
            }
        });
        found.pop().expect("a head")
    };
    let (first, second) = (weights(3), weights(4));
    assert_eq!(first, weights(3));
    assert_ne!(first, second);
    let std = first.std(true).double_value(&[]);
    assert!((std - 0.02).abs() < 0.001, "{std}");
    assert!(first.mean(Kind::Float).double_value(&[]).abs() < 0.001);
    let masked = open_at(&bert, Task::MaskedLm, &HeadOptions::default()).expect("a model");
    assert_eq!(
        masked.fresh(),
        [
            "cls.predictions.transform.dense.weight",
            "cls.predictions.transform.dense.bias",
            "cls.predictions.transform.LayerNorm.weight",
            "cls.predictions.transform.LayerNorm.bias",
            "cls.predictions.bias",
        ]
    );
}

#[test]
fn asked_for_classes_are_saved() {
    let head = HeadOptions {
        id2label: Some(vec!["no".into(), "yes".into(), "both".into()]),
        problem_type: Some(Problem::SingleLabel),
        pad_token_id: Some(5),
        ..HeadOptions::default()
    };
    let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/llama");
    let mut model = open_at(&llama, Task::SeqCls, &head).expect("a model");
    let dir = tempfile::tempdir().expect("a folder");
    let to = dir.path().join("saved");
    save(&mut *model, &to, &[]).expect("saved");
    let config = files::read_json(&to.join("config.json")).expect("a configuration");
    assert_eq!(config["architectures"][0], "LlamaForSequenceClassification");
    assert_eq!(config["id2label"]["2"], "both");
    assert_eq!(config["label2id"]["yes"], 1);
    assert_eq!(config["problem_type"], "single_label_classification");
    assert_eq!(config["pad_token_id"], 5);
    let again = open_at(&to, Task::SeqCls, &HeadOptions::default()).expect("a model");
    assert_eq!(again.classes(), model.classes());
    let ids = Tensor::from_slice2(&[[7i64, 8, 5], [9, 5, 5]]);
    let outputs = |model: &dyn Network| {
        let input = Input::new(ids.shallow_clone());
        tch::no_grad(|| model.outputs(&input, Ctx::EVAL).expect("outputs"))["logits"].copy()
    };
    assert_eq!(outputs(&*model), outputs(&*again));
}

#[test]
fn a_head_of_another_shape_is_an_error() {
    let error = |name: &str, task, head: &HeadOptions| match open_at(&folder(name), task, head) {
        Ok(_) => panic!("{name}: accepted"),
        Err(error) => error.to_string(),
    };
    let text = error("bert-classes", Task::SeqCls, &options(4));
    for word in ["classifier.weight", "[4, 20]", "[3, 20]"] {
        assert!(text.contains(word), "{text}");
    }
    let names = HeadOptions {
        id2label: Some(vec!["a".into(), "a".into()]),
        ..HeadOptions::default()
    };
    assert!(error("bert", Task::SeqCls, &names).contains("the same"));
    assert!(error("bert", Task::SeqCls, &options(0)).contains("0 labels"));
    let text = error("bert", Task::Seq2SeqLm, &HeadOptions::default());
    for word in ["model_type", "SEQ_2_SEQ_LM", "MASKED_LM"] {
        assert!(text.contains(word), "{text}");
    }
    let dir = folder("t5");
    let text = match open(dir.to_str().expect("a path"), OpenOptions::default()) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    assert!(
        text.contains("CAUSAL_LM") && text.contains("SEQ_2_SEQ_LM"),
        "{text}"
    );
}

#[test]
fn batches_and_labels_that_do_not_fit_are_errors() {
    let one = |values: &[i64]| Tensor::from_slice(values);
    let ids = || Input::new(Tensor::from_slice2(&[[5i64, 6, 7, 8], [9, 10, 11, 12]]));
    let fault = |name: &str, input: &Input, labels: &Labels| {
        let (model, _) = load(name);
        match model.loss(input, labels, Ctx::EVAL) {
            Ok(_) => panic!("{name}: accepted"),
            Err(error) => error.to_string(),
        }
    };
    let classes = || Labels::Classes(one(&[0, 1]));
    let tokens =
        |id: i64| Labels::Tokens(Tensor::full([2, 4], id, (Kind::Int64, tch::Device::Cpu)));
    for (text, words) in [
        (
            fault("bert-classes", &ids(), &tokens(1)),
            ["one for each token", "for each row"],
        ),
        (
            fault("bert-classes", &ids(), &Labels::Classes(one(&[0, 3]))),
            ["has 3", "0 to 2"],
        ),
        (
            fault("bert-classes", &ids(), &Labels::Classes(one(&[0]))),
            ["[2]", "[1]"],
        ),
        (
            fault("bert-marks", &ids(), &classes()),
            ["one class", "multi_label"],
        ),
        (
            fault("bert-number", &ids(), &classes()),
            ["one class", "regression"],
        ),
        (
            fault("bert-tokens", &ids(), &tokens(5)),
            ["has 5", "0 to 4"],
        ),
        (
            fault("bert-masked", &ids(), &tokens(61)),
            ["has 61", "0 to 60"],
        ),
        (
            fault("bert-answers", &ids(), &classes()),
            ["one class", "QUESTION_ANS"],
        ),
        (
            fault("bert", &ids(), &classes()),
            ["FEATURE_EXTRACTION", "no loss"],
        ),
        (fault("t5", &ids(), &tokens(61)), ["has 61", "0 to 60"]),
        (
            fault(
                "bert-masked",
                &Input::new(Tensor::full([1, 3], 61, (Kind::Int64, tch::Device::Cpu))),
                &tokens(1),
            ),
            ["ids has 61", "0 to 60"],
        ),
        (
            fault(
                "roberta-tokens",
                &Input::new(Tensor::full([1, 31], 7, (Kind::Int64, tch::Device::Cpu))),
                &tokens(1),
            ),
            ["31 tokens", "holds 30"],
        ),
        (
            fault(
                "bert-relu",
                &Input {
                    token_type_ids: Some(Tensor::ones([2, 4], (Kind::Int64, tch::Device::Cpu))),
                    ..ids()
                },
                &classes(),
            ),
            ["token_type_ids", "0 to 0"],
        ),
        (
            fault(
                "bert-relu",
                &Input {
                    attention_mask: Some(Tensor::ones([2, 3], (Kind::Int64, tch::Device::Cpu))),
                    ..ids()
                },
                &classes(),
            ),
            ["attention_mask", "[2, 4]"],
        ),
    ] {
        for word in words {
            assert!(text.contains(word), "`{word}` in: {text}");
        }
    }
    // Several rows, and nothing says where they end.
    let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/llama");
    let model = open_at(&llama, Task::SeqCls, &options(2)).expect("a model");
    let text = model
        .outputs(&ids(), Ctx::EVAL)
        .expect_err("refused")
        .to_string();
    assert!(text.contains("pad_token_id"), "{text}");
    let row = Input::new(Tensor::from_slice2(&[[5i64, 6, 7, 8]]));
    assert!(model.outputs(&row, Ctx::EVAL).is_ok());
}

#[test]
fn names_of_tasks_are_read_in_any_capitals() {
    for (name, task) in Task::NAMES {
        assert_eq!(name.parse::<Task>().expect("a task"), task);
        let other = name.to_lowercase().replace('_', "-");
        assert_eq!(other.parse::<Task>().expect("a task"), task);
        assert_eq!(task.to_string(), name);
    }
    let text = "SEQ_CLASS"
        .parse::<Task>()
        .expect_err("unknown")
        .to_string();
    assert!(text.contains("nearest is `SEQ_CLS`"), "{text}");
    assert_eq!(Task::MaskedLm.task_type(), None);
    assert_eq!(Task::Seq2SeqLm.task_type(), Some("SEQ_2_SEQ_LM"));
}
