//! Virtual tokens in front of every model: they are where they belong, and shift nothing else.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use peft_core::{
    Ahead, Ctx, Model, ModelExt, Params, PromptAdapter, Slot, State, Visit, files, tensors,
};
use peft_models::{
    Cache, Decoder, HeadOptions, Input, Labels, Memory, Network, OpenOptions, Problem, Sampling,
    Source, Task, converse, generate, generate_seq2seq, open, open_task,
};
use tch::{Device, Kind, Tensor};

const TOLERANCE: f64 = 1e-5;
const TOKENS: i64 = 3;

/// Virtual tokens that are parameters.
#[derive(Debug)]
struct Fixed {
    embeds: Option<Tensor>,
    kv: Vec<(Tensor, Tensor)>,
    /// The one parameter that the others are views of.
    leaf: Option<Tensor>,
    tokens: i64,
}

impl Params for Fixed {
    fn params(&self, visit: Visit<'_>) {
        if let Some(leaf) = &self.leaf {
            return visit("all", leaf);
        }
        if let Some(embeds) = &self.embeds {
            visit("prompt", embeds);
        }
        for (i, (key, value)) in self.kv.iter().enumerate() {
            visit(&format!("key.{i}"), key);
            visit(&format!("value.{i}"), value);
        }
    }
}

impl PromptAdapter for Fixed {
    fn ahead(&self, _: Ctx) -> Ahead {
        match &self.embeds {
            Some(embeds) => Ahead::Embeds(embeds.shallow_clone()),
            None => {
                let pair = |(k, v): &(Tensor, Tensor)| (k.shallow_clone(), v.shallow_clone());
                Ahead::Kv(self.kv.iter().map(pair).collect())
            }
        }
    }
    fn tokens(&self) -> i64 {
        self.tokens
    }
}

/// Parameters of their own.
fn fixed(embeds: Option<Tensor>, kv: Vec<(Tensor, Tensor)>) -> Fixed {
    Fixed {
        embeds,
        kv,
        leaf: None,
        tokens: TOKENS,
    }
}

fn leaf(size: &[i64]) -> Tensor {
    let fresh = Tensor::randn(size, (Kind::Float, Device::Cpu)) * 0.5;
    fresh.set_requires_grad(true)
}

fn attach(model: &mut (impl Model + ?Sized), adapter: Fixed) {
    let mut adapter = Some(adapter);
    let mut first = true;
    model.slots(&mut |at, slot| {
        if let Slot::Prompt(slot) = slot {
            assert!(first && at.is_empty(), "the first place, without a name");
            slot.attach("virtual", Box::new(adapter.take().expect("one place")));
        }
        first = false;
    });
    assert!(adapter.is_none(), "there is a place for virtual tokens");
}

fn embeds(model: &mut (impl Model + ?Sized)) {
    let embeds = Some(leaf(&[TOKENS, model.spec().hidden]));
    attach(model, fixed(embeds, vec![]));
}

fn kv(model: &mut (impl Model + ?Sized)) {
    let spec = model.spec();
    let one = || leaf(&[spec.kv_heads, TOKENS, spec.head_dim]);
    let kv = (0..spec.layers).map(|_| (one(), one())).collect();
    attach(model, fixed(None, kv));
}

fn folder(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let own = root.join("tasks").join(name);
    if own.exists() {
        own
    } else {
        root.join("models").join(name)
    }
}

fn options() -> OpenOptions {
    tch::set_num_threads(1); // tiny tensors gain nothing by more
    tch::manual_seed(5);
    OpenOptions {
        kind: Some(Kind::Float),
        ..OpenOptions::default()
    }
}

fn decoder(name: &str) -> Box<dyn Decoder> {
    open(folder(name).to_str().expect("a path"), options()).expect("a model")
}

fn network(name: &str, task: Task) -> Box<dyn Network> {
    let source = Source::Folder(folder(name));
    open_task(&source, task, options(), &HeadOptions::default()).expect("a model")
}

fn ids(rows: i64, len: i64) -> Tensor {
    Tensor::randint_low(3, 61, [rows, len], (Kind::Int64, Device::Cpu))
}

fn close(got: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(got.size(), expected.size(), "{what}");
    let off = ((got - expected).abs().max() / expected.abs().max()).double_value(&[]);
    assert!(off < TOLERANCE, "{what}: off by {off:e}");
}

const DECODERS: [&str; 5] = ["gpt2", "llama", "mistral", "qwen2-window", "qwen3"];

/// What real tokens would do in the place of virtual ones, since these can be told exactly.
#[test]
fn embeddings_of_real_tokens_are_those_tokens() {
    for name in DECODERS {
        let mut model = decoder(name);
        let (front, rest) = (ids(1, TOKENS), ids(1, 6));
        let whole = Tensor::cat(&[&front, &rest], 1);
        let expected = tch::no_grad(|| model.forward(&Input::new(whole), Ctx::EVAL));
        let mut words = None;
        model.slots(&mut |_, slot| {
            if let Slot::Prompt(slot) = slot {
                words = Some(slot.words().shallow_clone());
            }
        });
        let table = words.expect("a table");
        let embeds = table
            .index_select(0, &front.view([-1]))
            .set_requires_grad(true);
        attach(&mut *model, fixed(Some(embeds), vec![]));
        // Positions that are given do not count.
        let odd = Tensor::from_slice2(&[[9i64, 9, 9, 9, 9, 9]]);
        for position_ids in [None, Some(odd)] {
            let input = Input {
                position_ids,
                ..Input::new(rest.shallow_clone())
            };
            let got = tch::no_grad(|| model.forward(&input, Ctx::EVAL));
            close(&got, &expected, name);
        }
        // Switched off, they are gone.
        model.switch("virtual", false).expect("known");
        let got = tch::no_grad(|| model.forward(&Input::new(rest.shallow_clone()), Ctx::EVAL));
        assert_eq!(got.size()[1], 6);
    }
}

/// The same for keys and values: those that real tokens leave in a cache are virtual ones of another model.
#[test]
fn keys_of_real_tokens_are_those_tokens() {
    for name in ["gpt2", "llama", "qwen3", "mistral"] {
        let mut model = decoder(name);
        let (front, rest) = (ids(1, TOKENS), ids(2, 6));
        let both = front.expand([2, TOKENS], false);
        let whole = Input::new(Tensor::cat(&[&both, &rest], 1));
        let expected = tch::no_grad(|| model.forward(&whole, Ctx::EVAL)).narrow(1, TOKENS, 6);
        let mut cache = Cache::new();
        let _ = tch::no_grad(|| model.hidden(&Input::new(front), Some(&mut cache), Ctx::EVAL));
        let kv = cache.keys_and_values();
        let kv = kv.into_iter().map(|(k, v)| {
            let one = |t: Tensor| t.squeeze_dim(0).transpose(0, 1).copy(); // [heads, n, d]
            (one(k), one(v))
        });
        let kv = kv.collect();
        attach(&mut *model, fixed(None, kv));
        let line = Tensor::arange(6, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        for position_ids in [None, Some(line)] {
            let input = Input {
                position_ids,
                ..Input::new(rest.shallow_clone())
            };
            let got = tch::no_grad(|| model.forward(&input, Ctx::EVAL));
            close(&got, &expected, name);
        }
    }
}

fn dress(model: &mut (impl Model + ?Sized), which: &str) {
    match which {
        "embeddings" => embeds(model),
        _ => kv(model),
    }
}

const KINDS: [&str; 2] = ["embeddings", "keys and values"];

#[test]
fn the_cache_holds_virtual_tokens_and_changes_nothing() {
    for (name, which) in DECODERS.iter().flat_map(|it| KINDS.map(|kind| (it, kind))) {
        let mut model = decoder(name);
        dress(&mut *model, which);
        let what = format!("{name} {which}");
        let all = ids(2, 8);
        let mask = Tensor::from_slice2(&[[0i64, 0, 1, 1, 1, 1, 1, 1], [1; 8]]);
        let masked = Input {
            attention_mask: Some(mask.shallow_clone()),
            ..Input::new(all.shallow_clone())
        };
        let _guard = tch::no_grad_guard();
        let whole = model.hidden(&masked, None, Ctx::EVAL);
        let ahead = whole.size()[1] - 8;
        let mut cache = Cache::new();
        let mut parts = Vec::new();
        for (begin, len) in [(0, 3), (3, 1), (4, 4)] {
            let part = Input {
                attention_mask: Some(mask.narrow(1, 0, begin + len)),
                ..Input::new(all.narrow(1, begin, len))
            };
            parts.push(model.hidden(&part, Some(&mut cache), Ctx::EVAL));
        }
        assert_eq!((cache.len(), cache.ahead()), (8, TOKENS), "{what}");
        let got = Tensor::cat(&parts, 1);
        // Where there is nothing but padding to look at there is nothing to compare.
        let keep = |t: &Tensor| Tensor::cat(&[t.get(0).narrow(0, ahead + 2, 6), t.get(1)], 0);
        close(&keep(&got), &keep(&whole), &what);
        // Forgetting tokens forgets no virtual ones.
        cache.truncate(4);
        let rest = Input {
            attention_mask: Some(mask.shallow_clone()),
            ..Input::new(all.narrow(1, 4, 4))
        };
        let again = model.hidden(&rest, Some(&mut cache), Ctx::EVAL);
        close(&again, &whole.narrow(1, ahead + 4, 4), &what);
    }
}

/// Greedy tokens without a cache, one forward pass each.
fn slowly(model: &dyn Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut all: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
    for _ in 0..count {
        let input = Input::new(Tensor::from_slice(&all).unsqueeze(0));
        let logits = tch::no_grad(|| model.forward(&input, Ctx::EVAL));
        let last = logits.select(1, logits.size()[1] - 1);
        all.push(last.argmax(-1, false).int64_value(&[0]));
    }
    all.drain(prompt.len()..).map(|id| id as u32).collect()
}

#[test]
fn text_is_the_same_with_and_without_the_cache() {
    for (name, which) in DECODERS.iter().flat_map(|it| KINDS.map(|kind| (it, kind))) {
        let mut model = decoder(name);
        dress(&mut *model, which);
        let what = format!("{name} {which}");
        let sampling = Sampling {
            max_new_tokens: 6,
            ..Sampling::default()
        };
        let mut quiet = |_: usize, _: u32| ControlFlow::Continue(());
        let mut memory = Memory::new();
        let mut talk = vec![5, 6, 7, 11];
        for turn in 0..3 {
            let expected = slowly(&*model, &talk, 6);
            let fresh = generate(&*model, &[talk.clone()], &sampling, &mut quiet).expect("text");
            assert_eq!(fresh[0].tokens, expected, "{what} turn {turn}");
            let kept = converse(&*model, &mut memory, &talk, &sampling, &mut |_| {
                ControlFlow::Continue(())
            });
            assert_eq!(kept.expect("text").tokens, expected, "{what} turn {turn}");
            talk.extend(&expected[..2]);
            talk.push(20 + turn);
        }
        // A table of positions has room for the virtual ones, too.
        if *name == "gpt2" {
            assert_eq!(model.max_positions(), 32 - TOKENS);
            let long = vec![7; 30];
            let refused = generate(&*model, &[long], &sampling, &mut quiet);
            assert!(refused.is_err(), "{what}");
        }
    }
}

#[test]
fn rows_padded_on_the_left_are_written_as_alone_behind_keys_and_values() {
    // Not those that look back through a window: padding lies in it between a text and what is in front of it.
    for name in ["gpt2", "llama", "qwen3"] {
        let mut model = decoder(name);
        kv(&mut *model);
        let sampling = Sampling {
            max_new_tokens: 6,
            ..Sampling::default()
        };
        let mut quiet = |_: usize, _: u32| ControlFlow::Continue(());
        let prompts = [vec![5, 6, 7, 8, 9], vec![11, 12]];
        let both = generate(&*model, &prompts, &sampling, &mut quiet).expect("text");
        for (prompt, answer) in prompts.iter().zip(&both) {
            let alone = generate(&*model, std::slice::from_ref(prompt), &sampling, &mut quiet);
            assert_eq!(&alone.expect("text")[0], answer, "{name}");
        }
    }
}

/// Positions are counted over padding there, and a table of them ends.
#[test]
fn a_short_row_behind_embeddings_ends_with_the_table_of_positions() {
    let mut model = decoder("gpt2");
    embeds(&mut *model);
    let sampling = Sampling {
        max_new_tokens: 100,
        ..Sampling::default()
    };
    let mut quiet = |_: usize, _: u32| ControlFlow::Continue(());
    let prompts = [vec![7; 20], vec![5]];
    let answers = generate(&*model, &prompts, &sampling, &mut quiet).expect("text");
    for answer in answers {
        assert_eq!(answer.stop, peft_models::Stop::Context);
        assert_eq!(answer.tokens.len() as i64, 32 - TOKENS - 20 + 1); // the last one needs no position of its own
    }
}

const NETWORKS: [(&str, Task); 14] = [
    ("bert", Task::FeatureExtraction),
    ("bert-classes", Task::SeqCls),
    ("bert-tokens", Task::TokenCls),
    ("bert-answers", Task::QuestionAns),
    ("bert-masked", Task::MaskedLm),
    ("roberta", Task::FeatureExtraction),
    ("roberta-classes", Task::SeqCls),
    ("roberta-tokens", Task::TokenCls),
    ("roberta-masked", Task::MaskedLm),
    ("gpt2-classes", Task::SeqCls),
    ("llama-classes", Task::SeqCls),
    ("mistral-answers", Task::QuestionAns),
    ("gpt2-tokens", Task::TokenCls),
    ("t5", Task::Seq2SeqLm),
];

fn labels(task: Task, rows: i64, len: i64) -> Option<Labels> {
    let one = |values: &[i64]| Tensor::from_slice(values).narrow(0, 0, rows);
    Some(match task {
        Task::FeatureExtraction => return None,
        Task::SeqCls => Labels::Classes(one(&[2, 0])),
        Task::QuestionAns => Labels::Spans {
            start: one(&[1, 0]),
            end: one(&[2, 3]),
        },
        _ => Labels::Tokens(
            Tensor::from_slice2(&[[1i64, -100, 4, 2, 3], [2, 4, -100, -100, 1]])
                .narrow(0, 0, rows)
                .narrow(1, 0, len),
        ),
    })
}

fn padding(name: &str) -> i64 {
    i64::from(name.starts_with("roberta"))
}

/// A row with padding behind it says what it says alone, its loss too, and the loss reaches every virtual token.
#[test]
fn padding_does_not_matter_behind_virtual_tokens() {
    for ((name, task), which) in NETWORKS.iter().flat_map(|it| KINDS.map(|kind| (it, kind))) {
        let mut model = network(name, *task);
        dress(&mut *model, which);
        let what = format!("{name} {which}");
        let row = ids(1, 5);
        let padded = Tensor::cat(
            &[
                &row,
                &Tensor::full([1, 3], padding(name), (Kind::Int64, Device::Cpu)),
            ],
            1,
        );
        let mask = Tensor::from_slice2(&[[1i64, 1, 1, 1, 1, 0, 0, 0]]);
        let input = |ids: &Tensor, mask: Option<&Tensor>| Input {
            attention_mask: mask.map(Tensor::shallow_clone),
            decoder_ids: (*task == Task::Seq2SeqLm)
                .then(|| Tensor::from_slice2(&[[0i64, 7, 8, 9]])),
            ..Input::new(ids.shallow_clone())
        };
        let outputs = |input: &Input| {
            tch::no_grad(|| model.outputs(input, Ctx::EVAL))
                .unwrap_or_else(|e| panic!("{what}: {e}"))
        };
        let alone = outputs(&input(&row, None));
        let company = outputs(&input(&padded, Some(&mask)));
        for (key, expected) in &alone {
            let got = &company[key];
            let got = match got.size() == expected.size() {
                true => got.shallow_clone(),
                false => got.narrow(1, 0, expected.size()[1]),
            };
            close(&got, expected, &format!("{what} {key}"));
        }
        let Some(labels) = labels(*task, 1, 5) else {
            continue;
        };
        let input = Input {
            decoder_ids: None,
            ..input(&row, None)
        };
        let (sum, count) = model.loss(&input, &labels, Ctx::EVAL).expect("a loss");
        assert!(count > 0, "{what}");
        sum.backward();
        for param in model.params("virtual") {
            let grad = param.tensor.grad();
            assert!(grad.defined(), "{what} {}", param.name);
            let size = grad.abs().max().double_value(&[]);
            let name = &param.name;
            assert!(size.is_finite() && size > 0.0, "{what} {name}: {size}");
        }
    }
}

/// The loss of one answer does not know of virtual tokens: labels stay where their tokens are.
#[test]
fn labels_stay_with_their_tokens() {
    for (name, task) in NETWORKS {
        if !matches!(task, Task::TokenCls | Task::MaskedLm | Task::QuestionAns) {
            continue;
        }
        let mut model = network(name, task);
        embeds(&mut *model);
        let input = Input::new(ids(1, 5));
        let labels = labels(task, 1, 5).expect("labels");
        let _guard = tch::no_grad_guard();
        let outputs = model.outputs(&input, Ctx::EVAL).expect("outputs");
        let (sum, count) = model.loss(&input, &labels, Ctx::EVAL).expect("a loss");
        let nll = |scores: &Tensor, class: i64| -> f64 {
            -scores.log_softmax(-1, Kind::Float).double_value(&[class])
        };
        let expected = match &labels {
            Labels::Tokens(tokens) => {
                let logits = outputs["logits"].get(0).narrow(0, TOKENS, 5);
                let tokens = Vec::<i64>::try_from(tokens.get(0)).expect("labels");
                let counted = (0i64..).zip(tokens).filter(|(_, it)| *it >= 0);
                counted.map(|(i, it)| nll(&logits.get(i), it)).sum::<f64>()
            }
            _ => {
                let place = |name: &str, at: i64| nll(&outputs[name].get(0), TOKENS + at);
                (place("start_logits", 1) + place("end_logits", 2)) / 2.0
            }
        };
        assert!(count > 0);
        let off = (sum.double_value(&[]) - expected).abs() / expected;
        assert!(off < TOLERANCE, "{name}: {sum} {expected}");
    }
}

/// T5's decoder has keys and values in front, its encoder embeddings; both are kept through generation.
#[test]
fn t5_writes_the_same_with_and_without_the_cache() {
    for which in KINDS {
        let mut model = network("t5", Task::Seq2SeqLm);
        dress(&mut *model, which);
        let model = model.seq2seq().expect("an encoder and a decoder");
        let sampling = Sampling {
            max_new_tokens: 6,
            ..Sampling::default()
        };
        let mut quiet = |_: usize, _: u32| ControlFlow::Continue(());
        let sources = [vec![5, 6, 7, 8, 9], vec![11, 12]];
        let both = generate_seq2seq(model, &sources, &sampling, &mut quiet).expect("text");
        for (source, answer) in sources.iter().zip(&both) {
            let ids: Vec<i64> = source.iter().map(|&id: &u32| i64::from(id)).collect();
            let input = Input::new(Tensor::from_slice(&ids).unsqueeze(0));
            let _guard = tch::no_grad_guard();
            let read = model.encode(&input, Ctx::EVAL);
            let mut written = vec![model.start()];
            for _ in 0..6 {
                let target = Tensor::from_slice(&written).unsqueeze(0);
                let hidden = model.decode(&target, None, &read, None, Ctx::EVAL);
                let last = hidden.select(1, hidden.size()[1] - 1);
                let scores = model.head().forward(&last, Ctx::EVAL);
                written.push(scores.argmax(-1, false).int64_value(&[0]));
            }
            let expected: Vec<u32> = written[1..].iter().map(|&id| id as u32).collect();
            assert_eq!(answer.tokens, expected, "{which}");
        }
    }
}

/// One adapter of virtual tokens as Python wrote it, on its model with the head that was trained beside it.
struct Case {
    name: String,
    io: State,
    model: Box<dyn Network>,
    /// What was trained has its gradient in `io`.
    plain: bool,
    /// How many virtual tokens stand among the outputs.
    ahead: i64,
}

fn case(dir: &Path, method: &str) -> Case {
    let json = |name: &str| files::read_json(&dir.join(name)).expect("JSON");
    let read = |dir: &Path, name: &str| tensors::read(&dir.join(name)).expect("tensors");
    let (config, meta) = (json("adapter_config.json"), json("meta.json"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let base = root.join(meta["base"].as_str().expect("a folder"));
    let adapter = read(dir, "adapter_model.safetensors");
    // A head that was trained is that of the model.
    let mut weights = read(&base, "model.safetensors");
    for (key, tensor) in &adapter {
        if let Some(key) = key.strip_prefix("base_model.") {
            let old = weights.insert(key.to_owned(), tensor.shallow_clone());
            assert!(old.is_some(), "{key} is a tensor of the base");
        }
    }
    let made = tempfile::tempdir().expect("a folder");
    tensors::write(&made.path().join("model.safetensors"), &weights).expect("written");
    std::fs::copy(base.join("config.json"), made.path().join("config.json")).expect("copied");
    let task = meta["task"]
        .as_str()
        .expect("a task")
        .parse()
        .expect("a task");
    let source = Source::Folder(made.path().to_owned());
    let mut model = open_task(&source, task, options(), &HeadOptions::default()).expect("a model");
    let number = |key: &str| config[key].as_i64().expect("a number");
    let (n, heads) = (number("num_virtual_tokens"), number("num_attention_heads"));
    let width = number("token_dim") / heads;
    let flat = &adapter["prompt_embeddings"];
    let flat = flat.copy().set_requires_grad(true);
    let (embeds, kv) = match method {
        "prefix" => {
            let all = flat.view([n, -1, heads, width]).permute([1, 2, 0, 3]); // [2 · layers, heads, n, d]
            let count = all.size()[0];
            // Python doubles the list for an encoder-decoder and gives each layer every second pair of it.
            let step = if task == Task::Seq2SeqLm { 4 } else { 2 };
            let pair = |layer: i64| {
                let at = step * layer % count;
                (all.get(at), all.get(at + 1))
            };
            (None, (0..number("num_layers")).map(pair).collect())
        }
        // Only the first half of an encoder-decoder's is used.
        _ => (Some(flat.narrow(0, 0, n)), vec![]),
    };
    let ahead = if embeds.is_some() && task != Task::Seq2SeqLm {
        n
    } else {
        0
    };
    attach(
        &mut *model,
        Fixed {
            embeds,
            kv,
            leaf: Some(flat),
            tokens: n,
        },
    );
    Case {
        name: format!(
            "{method}/{}",
            dir.file_name().expect("a name").to_string_lossy()
        ),
        io: read(dir, "io.safetensors"),
        model,
        plain: !dir.join("state.safetensors").exists(),
        ahead,
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/methods");
    ["prefix", "prompt", "p-tuning"]
        .into_iter()
        .flat_map(move |method| {
            let entries = std::fs::read_dir(root.join(method)).expect("fixtures");
            let mut dirs: Vec<PathBuf> = entries.map(|it| it.expect("an entry").path()).collect();
            dirs.sort();
            assert!(dirs.len() > 10, "the fixtures are there");
            dirs.into_iter().map(move |dir| case(&dir, method))
        })
}

fn python_input(io: &State, batch: &str) -> Input {
    let get = |name: &str| {
        io.get(&format!("{batch}.{name}"))
            .map(Tensor::shallow_clone)
    };
    Input {
        attention_mask: get("attention_mask"),
        position_ids: get("position_ids"),
        token_type_ids: get("token_type_ids"),
        decoder_ids: get("decoder_input_ids"),
        decoder_mask: get("decoder_attention_mask"),
        ..Input::new(get("input_ids").expect("ids"))
    }
}

fn python_labels(model: &dyn Network, io: &State, batch: &str) -> Option<Labels> {
    let get = |name: &str| {
        io.get(&format!("{batch}.{name}"))
            .map(Tensor::shallow_clone)
    };
    if let (Some(start), Some(end)) = (get("start_positions"), get("end_positions")) {
        return Some(Labels::Spans { start, end });
    }
    let labels = get("labels")?;
    let problem = model.classes().and_then(|it| it.problem);
    Some(match (model.task(), labels.kind()) {
        (Task::SeqCls, Kind::Int64) => Labels::Classes(labels),
        (Task::SeqCls, _) if problem == Some(Problem::MultiLabel) => Labels::MultiLabel(labels),
        (Task::SeqCls, _) => Labels::Values(labels),
        _ => Labels::Tokens(labels),
    })
}

/// The method crates compute the virtual tokens; what a model does with them is Python's for every task.
#[test]
fn outputs_losses_and_gradients_are_pythons() {
    let mut gradients = 0;
    for mut case in cases() {
        let what = case.name.clone();
        for batch in ["right", "left"] {
            let mut input = python_input(&case.io, batch);
            let labels = python_labels(&*case.model, &case.io, batch);
            if let Some(labels) = &labels {
                let (sum, count) = case.model.loss(&input, labels, Ctx::EVAL).expect("a loss");
                let loss = sum.double_value(&[]) / count as f64;
                let expected = case.io[&format!("{batch}.loss")].double_value(&[]);
                let off = (loss - expected).abs() / expected.abs();
                assert!(off < TOLERANCE, "{what} {batch}: {loss} {expected}");
                if let (true, "right", Some(expected)) =
                    (case.plain, batch, case.io.get("grad.prompt_embeddings"))
                {
                    (sum / count as f64).backward();
                    let leaf = case.model.params("virtual").remove(0).tensor;
                    close(&leaf.grad(), expected, &format!("{what} gradient"));
                    gradients += 1;
                }
            }
            if let (Task::Seq2SeqLm, None, Some(Labels::Tokens(labels))) =
                (case.model.task(), &input.decoder_ids, &labels)
            {
                let start = Tensor::zeros([2, 1], (Kind::Int64, Device::Cpu));
                let last = labels.size()[1] - 1;
                let ids = Tensor::cat(&[&start, &labels.narrow(1, 0, last)], 1);
                input.decoder_ids = Some(ids.masked_fill(&ids.eq(-100), 0));
            }
            let got = tch::no_grad(|| case.model.outputs(&input, Ctx::EVAL).expect("outputs"));
            let real = match case.model.task() {
                Task::Seq2SeqLm => input.decoder_mask,
                _ => input.attention_mask,
            };
            let real = real.map(|it| it.pad([case.ahead, 0], "constant", 1.0));
            for (name, got) in got {
                let Some(expected) = case.io.get(&format!("{batch}.{name}")) else {
                    assert_eq!(name, "pooler_output", "{what}");
                    continue;
                };
                let keep = |t: &Tensor| match &real {
                    Some(mask) if t.size().starts_with(&mask.size()) => t
                        .flatten(0, 1)
                        .index_select(0, &mask.reshape([-1]).nonzero().view([-1])),
                    _ => t.shallow_clone(),
                };
                close(
                    &keep(&got),
                    &keep(expected),
                    &format!("{what} {batch} {name}"),
                );
            }
        }
    }
    assert!(gradients > 10, "only {gradients} gradients to compare");
}

#[test]
fn text_is_pythons() {
    let mut compared = 0;
    for case in cases() {
        let Some(tokens) = case.io.get("greedy.tokens") else {
            continue;
        };
        let rows =
            |t: &Tensor| -> Vec<Vec<i64>> { t.to_kind(Kind::Int64).try_into().expect("rows") };
        let (ids, mask) = (
            &case.io["greedy.input_ids"],
            &case.io["greedy.attention_mask"],
        );
        let kept = |(ids, mask): (Vec<i64>, Vec<i64>)| -> Vec<u32> {
            let real = ids.into_iter().zip(mask).filter(|(_, m)| *m == 1);
            real.map(|(id, _)| id as u32).collect()
        };
        let prompts: Vec<Vec<u32>> = rows(ids).into_iter().zip(rows(mask)).map(kept).collect();
        let sampling = Sampling {
            max_new_tokens: tokens.size()[1] as usize,
            ..Sampling::default()
        };
        let mut quiet = |_: usize, _: u32| ControlFlow::Continue(());
        let answers = match (case.model.decoder(), case.model.seq2seq()) {
            (Some(model), _) => generate(model, &prompts, &sampling, &mut quiet),
            (_, Some(model)) => generate_seq2seq(model, &prompts, &sampling, &mut quiet),
            _ => panic!("{}: a model that does not write", case.name),
        };
        let got: Vec<Vec<i64>> = answers
            .expect("text")
            .into_iter()
            .map(|it| it.tokens.into_iter().map(i64::from).collect())
            .collect();
        assert_eq!(got, rows(tokens), "{}", case.name);
        compared += 1;
    }
    assert!(compared > 10, "only {compared} texts to compare");
}
