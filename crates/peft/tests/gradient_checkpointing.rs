//! Gradient checkpointing changes how much is held and nothing else: every method on every architecture, bit by bit.

use std::path::{Path, PathBuf};

use peft::{
    Ctx, HeadOptions, Input, Labels, ModelExt, Network, OpenOptions, Settings, Task, Tuner,
    core::{Param, Slot, files, tensors},
    models::{IGNORE, Source},
    open_task,
    tch::{self, Device, Kind, Tensor},
    torch::{memory, rng},
    train::Optimizer,
};
use peft_testing::{fixtures, same_bits};
use serde_json::{Value, json};

/// A model of the fixtures.
#[derive(Clone, Copy)]
struct Base {
    folder: &'static str,
    task: Task,
    /// What stands before the number of a block in the names of tensors.
    blocks: &'static str,
    /// Tokens of a row: where positions allow it, as many as large products of attention begin with.
    seq: i64,
}

const BASES: [Base; 15] = [
    base("models/gpt2", Task::CausalLm, "h.", 24),
    base("models/llama", Task::CausalLm, "layers.", 64),
    base("models/llama-bf16", Task::CausalLm, "layers.", 24),
    base("models/mistral", Task::CausalLm, "layers.", 24),
    base("models/qwen3", Task::CausalLm, "layers.", 24),
    base("tasks/llama-classes", Task::SeqCls, "layers.", 24),
    base("tasks/bert-classes", Task::SeqCls, "encoder.layer.", 24),
    base("tasks/bert-masked", Task::MaskedLm, "encoder.layer.", 24),
    base("tasks/roberta-classes", Task::SeqCls, "encoder.layer.", 24),
    base("tasks/t5", Task::Seq2SeqLm, "block.", 70),
    base("tasks/t5-gated", Task::Seq2SeqLm, "block.", 24),
    base(
        "quant/models/llama-nf4-double",
        Task::CausalLm,
        "layers.",
        64,
    ),
    base("quant/models/llama-int8", Task::CausalLm, "layers.", 24),
    base("quant/models/qwen2-nf4-bf16", Task::CausalLm, "layers.", 24),
    base("quant/models/gpt2-fp4-double", Task::CausalLm, "h.", 24),
];

const fn base(folder: &'static str, task: Task, blocks: &'static str, seq: i64) -> Base {
    Base {
        folder,
        task,
        blocks,
        seq,
    }
}

type Model = Box<dyn Network>;

const DROPOUTS: [&str; 7] = [
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout_rate",
];

const DEPTHS: [&str; 4] = [
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "num_decoder_layers",
];

/// Changes those of the keys that are there.
fn set(config: &mut Value, keys: &[&str], value: &Value) {
    for key in keys {
        if let Some(old) = config.get_mut(key) {
            *old = value.clone();
        }
    }
}

impl Base {
    fn path(&self) -> PathBuf {
        fixtures::root().join(self.folder)
    }

    fn open_at(&self, dir: &Path) -> Model {
        let options = OpenOptions::default();
        let source = Source::Folder(dir.to_owned());
        open_task(&source, self.task, options, &HeadOptions::default()).unwrap()
    }

    /// The model with every dropout at `p`.
    fn open(&self, p: f64) -> Model {
        let dir = tempfile::tempdir().unwrap();
        let weights = "model.safetensors";
        std::fs::copy(self.path().join(weights), dir.path().join(weights)).unwrap();
        let mut config = files::read_json(&self.path().join("config.json")).unwrap();
        set(&mut config, &DROPOUTS, &json!(p));
        files::write_json(&dir.path().join("config.json"), &config).unwrap();
        self.open_at(dir.path())
    }

    /// The model with as many blocks as that, of which the second is repeated.
    fn deep(&self, layers: usize) -> Model {
        let dir = tempfile::tempdir().unwrap();
        let mut config = files::read_json(&self.path().join("config.json")).unwrap();
        let mut state = tensors::read(&self.path().join("model.safetensors")).unwrap();
        let second = format!("{}1.", self.blocks);
        let mut more = Vec::new();
        for (key, tensor) in &state {
            let Some((before, behind)) = key.split_once(&second) else {
                continue;
            };
            for i in 2..layers {
                let key = format!("{before}{}{i}.{behind}", self.blocks);
                more.push((key, tensor.shallow_clone()));
            }
        }
        assert!(!more.is_empty(), "{}: no block to be repeated", self.folder);
        state.extend(more);
        set(&mut config, &DEPTHS, &json!(layers));
        files::write_json(&dir.path().join("config.json"), &config).unwrap();
        tensors::write(&dir.path().join("model.safetensors"), &state).unwrap();
        self.open_at(dir.path())
    }

    /// A batch of `rows`, the first with `padding` at its beginning.
    fn batch(&self, rows: i64, padding: i64) -> (Input, Labels) {
        let random = |size: [i64; 2]| Tensor::randint_low(3, 61, size, (Kind::Int64, Device::Cpu));
        let ids = random([rows, self.seq]);
        let mask = ids.ones_like();
        let _ = mask.narrow(0, 0, 1).narrow(1, 0, padding).fill_(0);
        let labels = match self.task {
            Task::SeqCls => Labels::Classes(random([1, rows]).remainder(3).view([rows])),
            Task::Seq2SeqLm => Labels::Tokens(random([rows, self.seq - 5])),
            _ => Labels::Tokens(ids.masked_fill(&mask.eq(0), IGNORE)),
        };
        let mask = (padding > 0).then_some(mask);
        let input = Input {
            attention_mask: mask,
            ..Input::new(ids)
        };
        (input, labels)
    }
}

/// How a model is dressed: configurations of methods; none: thawed.
type Dress = &'static [&'static str];

const LORA: &str = r#"{"peft_type": "LORA", "r": 3, "lora_alpha": 7, "lora_dropout": 0.2, "target_modules": "all-linear", "init_lora_weights": false}"#;
const DORA: &str = r#"{"peft_type": "LORA", "r": 3, "lora_alpha": 7, "lora_dropout": 0.2, "target_modules": "all-linear", "init_lora_weights": false, "use_dora": true}"#;
const PREFIX: &str = r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}"#;
const PROMPT: &str = r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}"#;

const DRESSES: [(&str, Dress); 12] = [
    ("LoRA", &[LORA]),
    ("DoRA", &[DORA]),
    ("prefix", &[PREFIX]),
    ("prompt", &[PROMPT]),
    ("LoRA behind a prefix", &[PREFIX, LORA]),
    (
        "P-tuning",
        &[r#"{"peft_type": "P_TUNING", "num_virtual_tokens": 4}"#],
    ),
    (
        "AdaLoRA",
        &[
            r#"{"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "deltaT": 1, "total_step": 5, "lora_dropout": 0.2, "target_modules": "all-linear"}"#,
        ],
    ),
    (
        "VeRA",
        &[
            r#"{"peft_type": "VERA", "r": 8, "vera_dropout": 0.2, "target_modules": ["c_fc", "q_proj", "o_proj", "query", "q", "o"]}"#,
        ],
    ),
    ("(IA)3", &[r#"{"peft_type": "IA3"}"#]),
    ("BitFit", &[r#"{"peft_type": "BITFIT", "add_bias": true}"#]),
    ("LN tuning", &[r#"{"peft_type": "LN_TUNING"}"#]),
    ("full", &[]),
];

/// On what the scores of T5's attention get for a distance, which every block reads.
const DISTANCES: Dress = &[
    r#"{"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["relative_attention_bias", "v"], "init_lora_weights": false}"#,
];

/// What is trained of a model, and the methods that do it.
struct Worn {
    model: Model,
    tuners: Vec<Box<dyn Tuner>>,
    thawed: Vec<Param>,
}

impl Worn {
    fn new(mut model: Model, dress: Dress) -> Worn {
        tch::manual_seed(11);
        let task = model.task();
        let tuner = |json: &str| {
            let mut json: Value = serde_json::from_str(json).unwrap();
            json["task_type"] = task.task_type().into();
            peft::builtin().parse(json).unwrap()
        };
        let tuners: Vec<Box<dyn Tuner>> = dress.iter().map(|it| tuner(it)).collect();
        for (i, tuner) in tuners.iter().enumerate() {
            model.inject(&i.to_string(), &**tuner).unwrap();
        }
        let thawed = match dress.is_empty() {
            true => model.thaw(None).unwrap(),
            false => Vec::new(),
        };
        Worn {
            model,
            tuners,
            thawed,
        }
    }

    fn params(&mut self) -> Vec<Param> {
        let mut all = self.thawed.clone();
        for i in 0..self.tuners.len() {
            all.extend(self.model.params(&i.to_string()));
        }
        all
    }

    fn loss(&self, (input, labels): &(Input, Labels), ctx: Ctx) -> Tensor {
        let (sum, count) = self.model.loss(input, labels, ctx).unwrap();
        sum / count
    }
}

/// Five steps of two batches each: losses, gradients, parameters and the state of the generator, as they come.
fn train(base: &Base, dress: Dress, p: f64, checkpoint: bool) -> Vec<(String, Tensor)> {
    let mut worn = Worn::new(base.open(p), dress);
    let batches = [base.batch(3, 0), base.batch(2, 5)];
    let params = worn.params();
    let schedules: Vec<_> = worn.tuners.iter().map(|it| it.schedule()).collect();
    let mut schedules: Vec<_> = schedules.into_iter().flatten().collect();
    let settings = Settings {
        weight_decay: 0.1,
        ..Settings::default()
    };
    let mut optimizer = Optimizer::new(&params, &settings).unwrap();
    let ctx = Ctx {
        checkpoint,
        ..Ctx::TRAIN
    };
    let mut all = Vec::new();
    for step in 1..=5 {
        optimizer.zero_grad();
        for batch in &batches {
            let loss = worn.loss(batch, ctx);
            loss.backward();
            all.push((format!("loss {step}"), loss.detach()));
        }
        for term in schedules.iter().filter_map(|it| it.penalty(&params)) {
            term.backward();
        }
        for it in params.iter().filter(|it| it.tensor.grad().defined()) {
            let name = format!("gradient {step} of {}.{}", it.at, it.name);
            all.push((name, it.tensor.grad().copy()));
        }
        optimizer.clip(optimizer.grad_norm().double_value(&[]));
        optimizer.step(1e-2).unwrap();
        for it in &mut schedules {
            it.after_step(&params, step).unwrap();
        }
    }
    for it in &params {
        all.push((format!("{}.{}", it.at, it.name), it.tensor.detach().copy()));
    }
    all.push(("random state".into(), rng::state(Device::Cpu).unwrap()));
    all
}

/// A complaint for the first thing that differs.
fn differs(base: &Base, what: &str, dress: Dress, p: f64) -> Option<String> {
    let [plain, twice] = [false, true].map(|it| train(base, dress, p, it));
    let finite = |it: &Tensor| it.isfinite().all().int64_value(&[]) != 0;
    let at = format!("{what} on {}, dropout {p}", base.folder);
    if plain.len() != twice.len() {
        return Some(format!("{at}: {} and {}", plain.len(), twice.len()));
    }
    let gradients = plain.iter().filter(|it| it.0.starts_with("gradient 1"));
    assert!(gradients.count() > 0, "{at}: nothing is trained");
    let mut pairs = plain.iter().zip(&twice);
    let wrong = pairs.find(|(a, b)| a.0 != b.0 || !finite(&a.1) || !same_bits(&a.1, &b.1))?;
    Some(format!("{at}: {} differs", wrong.0.0))
}

/// Every dress on the bases whose folder begins so.
fn all_are_equal(folders: &[&str]) {
    tch::set_num_threads(1);
    let mut wrong = Vec::new();
    let bases = BASES.iter();
    for base in bases.filter(|it| folders.contains(&it.folder)) {
        for (what, dress) in DRESSES {
            if dress.is_empty() && base.folder.starts_with("quant") {
                continue; // there is nothing in it that could be thawed
            }
            for p in [0.0, 0.3] {
                wrong.extend(differs(base, what, dress, p));
            }
        }
        if base.task == Task::Seq2SeqLm {
            for p in [0.0, 0.3] {
                wrong.extend(differs(base, "LoRA on distances", DISTANCES, p));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn gpt2_learns_the_same_bits() {
    all_are_equal(&["models/gpt2"]);
}

#[test]
fn llama_learns_the_same_bits() {
    all_are_equal(&[
        "models/llama",
        "models/llama-bf16",
        "models/mistral",
        "models/qwen3",
        "tasks/llama-classes",
    ]);
}

#[test]
fn bert_learns_the_same_bits() {
    all_are_equal(&[
        "tasks/bert-classes",
        "tasks/bert-masked",
        "tasks/roberta-classes",
    ]);
}

#[test]
fn t5_learns_the_same_bits() {
    all_are_equal(&["tasks/t5", "tasks/t5-gated"]);
}

#[test]
fn quantised_bases_learn_the_same_bits() {
    all_are_equal(&[
        "quant/models/llama-nf4-double",
        "quant/models/llama-int8",
        "quant/models/qwen2-nf4-bf16",
        "quant/models/gpt2-fp4-double",
    ]);
}

/// Of a block more, the input is held and no more; without checkpoints many times that.
#[test]
fn a_deeper_model_holds_inputs_of_blocks_alone() {
    tch::set_num_threads(1);
    for mut base in BASES {
        if !base.folder.ends_with("llama")
            && !["models/gpt2", "tasks/bert-classes", "tasks/t5"].contains(&base.folder)
        {
            continue;
        }
        base.seq = 32;
        let rows = 16;
        let peak = |layers: usize, checkpoint: bool| {
            let worn = Worn::new(base.deep(layers), &[LORA]);
            let batch = base.batch(rows, 0);
            let ctx = Ctx {
                checkpoint,
                ..Ctx::TRAIN
            };
            let step = || worn.loss(&batch, ctx).backward();
            memory::counted(step).unwrap().1.peak as f64
        };
        let each = |checkpoint: bool| (peak(12, checkpoint) - peak(4, checkpoint)) / 8.0;
        let (plain, twice) = (each(false), each(true));
        let mut spec = base.open(0.0);
        let spec = spec.outline().spec;
        let stacks = if spec.encoder_decoder { 2 } else { 1 };
        let input = (rows * base.seq * spec.hidden * 4 * stacks) as f64;
        let of = |bytes: f64| bytes / input;
        println!("{}: {:.2} and {:.2}", base.folder, of(plain), of(twice));
        assert!(of(plain) > 8.0, "{}: {} without", base.folder, of(plain));
        assert!(of(twice) < 1.3, "{}: {} with", base.folder, of(twice));
    }
}

fn llama(dress: Dress) -> (Worn, (Input, Labels)) {
    let base = &BASES[1];
    (Worn::new(base.open(0.1), dress), base.batch(2, 3))
}

const CHECKPOINTED: Ctx<'static> = Ctx {
    checkpoint: true,
    ..Ctx::TRAIN
};

fn grads(worn: &mut Worn) -> Vec<Tensor> {
    let params = worn.params().into_iter();
    params.map(|it| it.tensor.grad()).collect()
}

#[test]
fn a_loss_may_be_kept_while_the_model_is_used_and_dropped() {
    let expected = {
        let (mut worn, batch) = llama(&[LORA]);
        worn.loss(&batch, Ctx::TRAIN).backward();
        grads(&mut worn)
    };
    let (mut worn, batch) = llama(&[LORA]);
    let loss = worn.loss(&batch, CHECKPOINTED);
    // Other batches, and other adapters for a while, are no change.
    worn.model.switch("0", false).unwrap();
    drop(worn.loss(&batch, CHECKPOINTED));
    worn.model.switch("0", true).unwrap();
    drop(tch::no_grad(|| worn.loss(&batch, CHECKPOINTED)));
    let params = worn.params();
    drop(worn);
    loss.backward();
    for (param, expected) in params.iter().zip(&expected) {
        assert!(same_bits(&param.tensor.grad(), expected), "{}", param.at);
    }
}

#[test]
fn gradients_of_another_model_are_refused() {
    let (mut worn, batch) = llama(&[LORA]);
    let loss = worn.loss(&batch, CHECKPOINTED);
    worn.model.switch("0", false).unwrap();
    let error = loss.f_backward().unwrap_err().to_string();
    assert!(error.contains("other adapters at work"), "{error}");

    let (mut worn, batch) = llama(&[LORA]);
    let loss = worn.loss(&batch, CHECKPOINTED);
    worn.model.merge().unwrap();
    let error = loss.f_backward().unwrap_err().to_string();
    assert!(error.contains("other adapters at work"), "{error}");
}

#[test]
fn a_backward_pass_in_a_visit_fails_and_does_not_wait() {
    let (mut worn, batch) = llama(&[LORA]);
    let loss = worn.loss(&batch, CHECKPOINTED);
    let mut errors = Vec::new();
    worn.model.slots(&mut |at, slot| {
        if let (Slot::Linear(_), true) = (slot, at.ends_with("layers.1.self_attn.q_proj")) {
            errors.extend(loss.f_backward().err());
        }
    });
    assert_eq!(errors.len(), 1);
    let error = errors[0].to_string();
    assert!(error.contains("places are being visited"), "{error}");
    worn.loss(&batch, CHECKPOINTED).backward();
    assert!(grads(&mut worn).iter().all(Tensor::defined));
}

#[test]
fn the_graph_of_one_block_can_be_walked_on_another_thread() {
    let (mut worn, batch) = llama(&[LORA]);
    let loss = worn.loss(&batch, CHECKPOINTED);
    let thread = std::thread::spawn(move || loss.backward());
    for _ in 0..20 {
        drop(tch::no_grad(|| worn.loss(&batch, Ctx::EVAL)));
    }
    thread.join().unwrap();
    assert!(grads(&mut worn).iter().all(Tensor::defined));
}
