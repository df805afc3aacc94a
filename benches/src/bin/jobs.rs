//! Whole jobs, one a process, each printing one line of JSON: what `compare.py` runs beside Python.

use std::{path::PathBuf, time::Instant};

use anyhow::{Result, bail};
use benches::ffi::{Line, fill_past_caches};
use clap::{Parser, Subcommand, ValueEnum};
use peft::open_in;
use peft::quant::{Block, Compat, Format, Four, QuantisedLinear, Scheme, Type};
use peft_core::{
    Adapter, Ctx, Dense, LinearOp, Model, ModelExt, Param, Plain, Rows, Schedule, Slot, Tuner,
};
use peft_models::{
    Cache, Decoder, IGNORE, Input, MadeUp, OpenOptions, Task, build, causal_loss, save,
};
use peft_torch::{AdamW, Moments, drop_grad, for_each_chunk, linear, memory};
use peft_train::{Optim, Optimizer, Settings};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    job: Job,
    /// Threads of libtorch
    #[arg(long, global = true, default_value_t = 2)]
    threads: i32,
}

#[derive(Subcommand)]
enum Job {
    /// Rates of matrix products and of memory
    Floor,
    /// Training steps with one method
    Step {
        #[arg(long)]
        model: PathBuf,
        /// What `adapter_config.json` would hold; without one the whole model is trained
        #[arg(long)]
        adapter: Option<String>,
        #[arg(long, default_value = "fp32")]
        dtype: Dtype,
        #[arg(long, default_value_t = 4)]
        batch: i64,
        #[arg(long, default_value_t = 128)]
        seq: i64,
        /// The share of positions without a label
        #[arg(long, default_value_t = 0.0)]
        masked: f64,
        #[command(flatten)]
        bits: Bits,
        /// Blocks are computed again in the backward pass
        #[arg(long)]
        gradient_checkpointing: bool,
        #[arg(long, default_value_t = 10)]
        steps: usize,
        #[arg(long, default_value_t = 2)]
        warmup: usize,
    },
    /// Greedy generation through the cache
    Generate {
        #[arg(long)]
        model: PathBuf,
        #[arg(long, default_value = "bf16")]
        dtype: Dtype,
        #[command(flatten)]
        bits: Bits,
        #[arg(long, default_value_t = 64)]
        new: usize,
        #[arg(long, default_value_t = 16)]
        prompt: i64,
        #[arg(long, default_value_t = 3)]
        repeats: usize,
    },
    /// Merges a LoRA on all linear layers and saves the model
    Merge {
        #[arg(long)]
        model: PathBuf,
        #[arg(long)]
        out: PathBuf,
    },
    /// A batch whose rows go through as many adapters, beside the same batch through one of them
    Mixed {
        #[arg(long)]
        model: PathBuf,
        #[arg(long, default_value_t = 8)]
        adapters: usize,
        #[arg(long, default_value_t = 128)]
        seq: i64,
        #[arg(long, default_value_t = 5)]
        repeats: usize,
    },
    /// Loads one adapter's file under many names onto one model
    Load {
        #[arg(long)]
        model: PathBuf,
        /// The adapter's folder
        #[arg(long)]
        file: PathBuf,
        #[arg(long, default_value_t = 100)]
        adapters: usize,
    },
    /// Loads a model in 4 bits: one that is stored so, or with `--quantise` a dense one
    Open4bit {
        #[arg(long)]
        model: PathBuf,
        #[arg(long, default_value = "bf16")]
        dtype: Dtype,
        #[command(flatten)]
        bits: Bits,
    },
    /// [rows, columns] to NF4
    Quantise(Weight),
    /// NF4 to [rows, columns], into memory that is used again
    Dequantise(Weight),
    /// x: [tokens, columns] through NF4 [rows, columns], one layer after the other
    Linear4bit {
        #[command(flatten)]
        weight: Weight,
        #[arg(long, default_value_t = 512)]
        tokens: i64,
        #[arg(long, default_value_t = 1)]
        copies: usize,
        /// Dense layers besides, in turn
        #[arg(long)]
        dense: bool,
    },
    /// One step of QLoRA on a model with made-up weights of the shape that a config.json describes
    Scale {
        /// The folder of config.json
        #[arg(long)]
        model: PathBuf,
        #[arg(long)]
        adapter: String,
        #[arg(long, default_value = "bf16")]
        dtype: Dtype,
        #[command(flatten)]
        bits: Bits,
        #[arg(long, default_value_t = 1)]
        batch: i64,
        #[arg(long, default_value_t = 512)]
        seq: i64,
    },
    /// Rounds the linear layers of a model but the head to 15 even steps a block of 64, and writes it dense: the Int4 that 4-bit
    /// types are compared with
    Int4 {
        #[arg(long)]
        model: PathBuf,
        #[arg(long)]
        out: PathBuf,
    },
    /// One step of AdamW with states in 8 bits
    Adamw8bit {
        #[arg(long, default_value_t = 1 << 24)]
        size: usize,
        #[arg(long, default_value_t = 20)]
        repeats: usize,
    },
    /// Tokenises a file of conversations into a cold cache
    Tokenise {
        #[arg(long)]
        tokenizer: PathBuf,
        #[arg(long)]
        data: PathBuf,
        #[arg(long)]
        cache: PathBuf,
    },
}

/// In which bits linear layers are kept.
#[derive(Clone, Copy, Default, clap::Args)]
struct Bits {
    /// The linear layers of a dense model, as it is loaded
    #[arg(long)]
    quantise: Option<FourBits>,
    /// The scales, too
    #[arg(long)]
    double_quant: bool,
    /// What is not quantised is in fp32, as Python's `prepare_model_for_kbit_training` leaves it
    #[arg(long)]
    keep_in_fp32: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum FourBits {
    Nf4,
    Fp4,
}

impl Bits {
    fn scheme(self) -> Scheme {
        Scheme::Four(Four {
            kind: match self.quantise {
                Some(FourBits::Fp4) => Type::Fp4,
                _ => Type::Nf4,
            },
            block: Block::USUAL,
            double_quant: self.double_quant,
            compat: Compat::Cuda,
        })
    }
}

impl Bits {
    /// How layers are kept, and the dtype of the rest.
    fn format(self, dtype: Dtype) -> (Format, Kind) {
        let format = match self.quantise {
            Some(_) => Format::of(self.scheme()),
            None => Format::as_stored(),
        };
        match self.keep_in_fp32 {
            false => (format, dtype.kind()),
            true => {
                let compute = Some(dtype.kind());
                (Format { compute, ..format }, Kind::Float)
            }
        }
    }
}

/// A weight of the micro jobs.
#[derive(Clone, Copy, clap::Args)]
struct Weight {
    #[arg(long, default_value_t = 4096)]
    rows: i64,
    #[arg(long, default_value_t = 4096)]
    columns: i64,
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    #[command(flatten)]
    bits: Bits,
    #[arg(long, default_value_t = 20)]
    repeats: usize,
}

impl Weight {
    fn dense(self) -> Tensor {
        Tensor::randn([self.rows, self.columns], (Kind::Float, Device::Cpu))
            .to_kind(self.dtype.kind())
    }

    fn layer(self) -> Result<QuantisedLinear> {
        let (weight, bias) = (self.dense(), None);
        Ok(QuantisedLinear::new(
            &self.bits.scheme(),
            Plain { weight, bias },
        )?)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    Fp32,
    Bf16,
}

impl Dtype {
    fn kind(self) -> Kind {
        match self {
            Dtype::Fp32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
        }
    }
}

fn main() -> Result<()> {
    let started = Instant::now();
    let args = Args::parse();
    memory::keep_freed_blocks();
    tch::set_num_threads(args.threads);
    tch::manual_seed(0);
    let mut result = match args.job {
        Job::Floor => floor(),
        Job::Step {
            model,
            adapter,
            dtype,
            batch,
            seq,
            masked,
            bits,
            gradient_checkpointing,
            steps,
            warmup,
        } => {
            let ctx = Ctx {
                checkpoint: gradient_checkpointing,
                ..Ctx::TRAIN
            };
            let mut model = load(&model, dtype, bits)?;
            let total = warmup + steps;
            let mut trained = dress(&mut *model, adapter.as_deref(), total)?;
            let batch = random_batch(&*model, batch, seq, masked);
            step(&*model, &mut trained, &batch, ctx, (steps, warmup))?
        }
        Job::Generate {
            model,
            dtype,
            bits,
            new,
            prompt,
            repeats,
        } => generate(&*load(&model, dtype, bits)?, new, prompt, repeats)?,
        Job::Adamw8bit { size, repeats } => adamw8bit(size, repeats)?,
        Job::Int4 { model, out } => int4(&model, &out)?,
        Job::Scale {
            model,
            adapter,
            dtype,
            bits,
            batch,
            seq,
        } => {
            let (format, kind) = bits.format(dtype);
            let begun = Instant::now();
            let mut weights = MadeUp::normal(kind);
            let config = model.join("config.json");
            let mut model = build(&config, Task::CausalLm, &mut weights, &format)?;
            let built = begun.elapsed().as_secs_f64();
            let bytes = memory::usage(Device::Cpu).map_or(0, |it| it.now);
            let mut trained = dress(&mut *model, Some(&adapter), 1)?;
            memory::reset_peak(Device::Cpu); // of the step
            let model = model
                .decoder()
                .ok_or_else(|| anyhow::anyhow!("no decoder"))?;
            let batch = random_batch(model, batch, seq, 0.0);
            let ctx = Ctx {
                checkpoint: true,
                ..Ctx::TRAIN
            };
            let (result, tensors) =
                memory::counted(|| step(model, &mut trained, &batch, ctx, (1, 0)))?;
            let mut result = result?;
            result["bytes_of_tensors"] = tensors.peak.into(); // made in the step, at most
            memory::give_back();
            let after = memory::usage(Device::Cpu).map_or(0, |it| it.now);
            result["bytes_after"] = after.into(); // without what the step alone needed
            result["built_s"] = built.into();
            result["bytes_of_model"] = bytes.into();
            result
        }
        Job::Open4bit { model, dtype, bits } => open4bit(&model, dtype, bits)?,
        Job::Quantise(weight) => {
            let dense = weight.dense();
            let scheme = weight.bits.scheme();
            let samples = timed(weight.repeats, || {
                let (weight, bias) = (dense.shallow_clone(), None);
                QuantisedLinear::new(&scheme, Plain { weight, bias }).map(drop)
            })?;
            json!({"samples": samples})
        }
        Job::Dequantise(weight) => {
            let (layer, kind) = (weight.layer()?, weight.dtype.kind());
            let samples = timed(weight.repeats, || {
                layer.with_weight(kind, |_| ());
                Ok(())
            })?;
            json!({"samples": samples})
        }
        Job::Linear4bit {
            weight,
            tokens,
            copies,
            dense,
        } => linear4bit(weight, tokens, copies, dense)?,
        Job::Merge { model, out } => merge(&model, &out)?,
        Job::Mixed {
            model,
            adapters,
            seq,
            repeats,
        } => mixed(
            &mut *load(&model, Dtype::Fp32, Bits::default())?,
            adapters,
            seq,
            repeats,
        )?,
        Job::Load {
            model,
            file,
            adapters,
        } => load_many(
            &mut *load(&model, Dtype::Fp32, Bits::default())?,
            &file,
            adapters,
        )?,
        Job::Tokenise {
            tokenizer,
            data,
            cache,
        } => tokenise(&tokenizer, data, cache)?,
    };
    result["process_s"] = json!(started.elapsed().as_secs_f64());
    if let Some(usage) = memory::usage(Device::Cpu) {
        result["peak_bytes"] = json!(usage.peak);
    }
    println!("{result}");
    Ok(())
}

fn load(dir: &std::path::Path, dtype: Dtype, bits: Bits) -> Result<Box<dyn Decoder>> {
    let (format, kind) = bits.format(dtype);
    let options = OpenOptions {
        kind: Some(kind),
        ..OpenOptions::default()
    };
    Ok(open_in(&dir.to_string_lossy(), options, &format)?)
}

/// Waits for this program's turn, where several give each other turns: it asks with a line and is answered with one.
fn turn() -> Result<()> {
    if std::env::var_os("PEFT_BENCH_TURNS").is_some() {
        println!("turn");
        std::io::stdin().read_line(&mut String::new())?;
    }
    Ok(())
}

/// Timed in a turn are at least so many calls, and at least so many seconds of them.
const A_TURN: (usize, f64) = (5, 0.06);

/// So long nothing is timed in a turn: the caches hold what the program before needed.
const WARM: f64 = 0.03;

/// What is timed.
type Body<'a> = &'a mut dyn FnMut() -> peft_core::Result<()>;

/// Seconds of each call.
fn timed(repeats: usize, mut body: impl FnMut() -> peft_core::Result<()>) -> Result<Vec<f64>> {
    let [samples] = in_turn(repeats, [&mut body])?;
    Ok(samples)
}

/// The same of several things, one call of each after the other: a machine whose clock changes is as slow for all.
fn in_turn<const N: usize>(repeats: usize, mut bodies: [Body<'_>; N]) -> Result<[Vec<f64>; N]> {
    let mut samples = [(); N].map(|()| Vec::new());
    let mut call = |bodies: &mut [Body<'_>; N], keep: bool| -> Result<()> {
        for (body, samples) in bodies.iter_mut().zip(&mut samples) {
            let begun = Instant::now();
            body()?;
            if keep {
                samples.push(begun.elapsed().as_secs_f64());
            }
        }
        Ok(())
    };
    call(&mut bodies, false)?;
    for _ in 0..repeats.div_ceil(A_TURN.0) {
        turn()?;
        let begun = Instant::now();
        call(&mut bodies, false)?;
        while begun.elapsed().as_secs_f64() < WARM {
            call(&mut bodies, false)?;
        }
        let (begun, mut calls) = (Instant::now(), 0);
        while calls < A_TURN.0 || begun.elapsed().as_secs_f64() < A_TURN.1 {
            call(&mut bodies, true)?;
            calls += 1;
        }
    }
    Ok(samples)
}

fn adamw8bit(size: usize, repeats: usize) -> Result<Value> {
    let random = || Tensor::randn([size as i64], (Kind::Float, Device::Cpu));
    let mut tensor = random().set_requires_grad(true);
    (&tensor * random()).sum(Kind::Float).backward();
    let params = [Param {
        adapter: "default".into(),
        at: "weight".into(),
        name: "weight".into(),
        norm: false,
        tensor: tensor.shallow_clone(),
    }];
    let optimizer = |optim| {
        let settings = Settings {
            optim,
            weight_decay: 0.01,
            ..Settings::default()
        };
        Optimizer::new(&params, &settings)
    };
    let mut eight = optimizer(Optim::Adamw8bit)?;
    let mut whole = optimizer(Optim::AdamwTorch)?;
    let [eight, whole] = in_turn(
        repeats,
        [
            &mut || {
                eight.step(1e-4).expect("a step");
                Ok(())
            },
            &mut || {
                whole.step(1e-4).expect("a step");
                Ok(())
            },
        ],
    )?;
    tensor.zero_grad();
    Ok(json!({"samples": eight, "fused_fp32": whole}))
}

fn int4(dir: &std::path::Path, out: &std::path::Path) -> Result<Value> {
    let mut model = load(dir, Dtype::Fp32, Bits::default())?;
    let head = model.spec().output_embedding;
    let (mut layers, mut result) = (0, Ok(()));
    model.slots(&mut |at, slot| {
        let Slot::Linear(it) = slot else { return };
        if head.as_deref() == Some(at) || result.is_err() {
            return;
        }
        let weight = it.base().weight();
        let blocks = weight.reshape([-1, 64]);
        let absmax = blocks.abs().amax([1i64].as_slice(), true).clamp_min(1e-30);
        let rounded = (&blocks / &absmax * 7.0).round() * &absmax / 7.0;
        let bias = it.base().bias().map(Tensor::shallow_clone);
        let weight = rounded.view_as(&weight);
        result = it.encode(Plain { weight, bias });
        layers += 1;
    });
    result?;
    let names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ];
    let besides = names.map(|name| dir.join(name));
    save(&mut *model, out, &besides)?;
    Ok(json!({"layers": layers}))
}

fn open4bit(dir: &std::path::Path, dtype: Dtype, bits: Bits) -> Result<Value> {
    let now = || memory::usage(Device::Cpu).map_or(0, |it| it.now);
    let (before, begun) = (now(), Instant::now());
    let mut model = load(dir, dtype, bits)?;
    let seconds = begun.elapsed().as_secs_f64();
    let bytes = now().saturating_sub(before);
    let mut layers = 0;
    model.slots(&mut |_, _| layers += 1);
    Ok(json!({"samples": [seconds], "bytes": bytes, "layers": layers}))
}

fn linear4bit(weight: Weight, tokens: i64, copies: usize, beside: bool) -> Result<Value> {
    let mut layers = Vec::new();
    let mut dense: Vec<Box<dyn LinearOp>> = Vec::new();
    for _ in 0..copies {
        layers.push(weight.layer()?);
        if beside {
            dense.push(Box::new(Dense::new(weight.dense(), None)));
        }
    }
    let x = Tensor::randn([tokens, weight.columns], (Kind::Float, Device::Cpu))
        .to_kind(weight.dtype.kind());
    let [samples, dense] = tch::no_grad(|| {
        in_turn(
            weight.repeats,
            [
                &mut || {
                    layers.iter().for_each(|it| drop(it.forward(&x)));
                    Ok(())
                },
                &mut || {
                    dense.iter().for_each(|it| drop(it.forward(&x)));
                    Ok(())
                },
            ],
        )
    })?;
    let each =
        |samples: Vec<f64>| -> Vec<f64> { samples.iter().map(|it| it / copies as f64).collect() };
    Ok(json!({"samples": each(samples), "dense": each(dense)}))
}

/// What is trained, and what the method does besides being stepped.
struct Trained {
    params: Vec<Param>,
    schedule: Option<Box<dyn Schedule>>,
}

/// Puts the method that a configuration means on the model; without one all of the model is trained.
fn dress(
    model: &mut (impl Model + ?Sized),
    adapter: Option<&str>,
    steps: usize,
) -> Result<Trained> {
    let Some(config) = adapter else {
        return Ok(Trained {
            params: model.thaw(None)?,
            schedule: None,
        });
    };
    let mut config: Value = serde_json::from_str(config)?;
    if config["peft_type"] == "ADALORA" {
        config["total_step"] = json!(steps);
    }
    let tuner = method(&config.to_string())?;
    model.inject("default", &*tuner)?;
    Ok(Trained {
        params: model.params("default"),
        schedule: tuner.schedule(),
    })
}

/// The method that a configuration means.
fn method(config: &str) -> Result<Box<dyn Tuner>> {
    Ok(peft::builtin().parse(serde_json::from_str(config)?)?)
}

const LORA: &str =
    r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}"#;

fn random_batch(model: &dyn Decoder, batch: i64, seq: i64, masked: f64) -> (Input, Tensor) {
    let ids = Tensor::randint(model.vocab(), [batch, seq], (Kind::Int64, Device::Cpu));
    let labels = ids.copy();
    let hidden = (seq as f64 * masked) as i64;
    let _ = labels.narrow(1, 0, hidden).fill_(IGNORE);
    (Input::new(ids), labels)
}

fn step(
    model: &dyn Decoder,
    trained: &mut Trained,
    (input, labels): &(Input, Tensor),
    ctx: Ctx,
    (steps, warmup): (usize, usize),
) -> Result<Value> {
    let leaves = trained.params.iter().map(|it| it.tensor.shallow_clone());
    let mut params: Vec<Tensor> = leaves.filter(Tensor::requires_grad).collect();
    let mut moments: Vec<Moments> = params.iter().map(Moments::new).collect();
    let (mut times, mut losses, mut parts) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..warmup + steps {
        turn()?;
        let begin = Instant::now();
        let (sum, count) = causal_loss(model, input, labels, ctx);
        let loss = sum / count;
        let forward = begin.elapsed().as_secs_f64();
        loss.f_backward()?;
        let penalty = trained.schedule.as_ref();
        if let Some(term) = penalty.and_then(|it| it.penalty(&trained.params)) {
            term.f_backward()?;
        }
        let backward = begin.elapsed().as_secs_f64() - forward;
        let mut pairs: Vec<_> = params.iter_mut().zip(&mut moments).collect();
        AdamW::default().step(&mut pairs, 1e-4, 0.0)?;
        if let Some(schedule) = &mut trained.schedule {
            schedule.after_step(&trained.params, i + 1)?;
        }
        params.iter_mut().for_each(drop_grad);
        let total = begin.elapsed().as_secs_f64();
        losses.push(loss.double_value(&[]));
        if i >= warmup {
            times.push(total);
            parts.push([forward, backward, total - forward - backward]);
        }
    }
    Ok(json!({"samples": times, "parts": parts, "losses": losses}))
}

fn generate(model: &dyn Decoder, new: usize, prompt: i64, repeats: usize) -> Result<Value> {
    let _off = tch::no_grad_guard();
    let prompt = Tensor::randint(model.vocab(), [1, prompt], (Kind::Int64, Device::Cpu));
    let mut times = Vec::new();
    let mut tokens = Vec::new();
    for _ in 0..=repeats {
        tokens.clear();
        turn()?;
        let begin = Instant::now();
        let (mut cache, mut ids) = (Cache::new(), prompt.shallow_clone());
        for _ in 0..new {
            let hidden = model.hidden(&Input::new(ids), Some(&mut cache), Ctx::EVAL);
            let last = hidden.narrow(1, hidden.size()[1] - 1, 1);
            ids = model.head().forward(&last, Ctx::EVAL).argmax(-1, false);
            tokens.push(ids.int64_value(&[0, 0]));
        }
        times.push(begin.elapsed().as_secs_f64());
    }
    Ok(json!({"samples": &times[1..], "tokens": tokens}))
}

fn merge(dir: &std::path::Path, out: &std::path::Path) -> Result<Value> {
    let begin = Instant::now();
    let mut model = load(dir, Dtype::Fp32, Bits::default())?;
    model.inject("default", &*method(LORA)?)?;
    let loaded = begin.elapsed().as_secs_f64();
    model.merge_and_unload()?;
    let merged = begin.elapsed().as_secs_f64();
    save(&mut *model, out, &[])?;
    let saved = begin.elapsed().as_secs_f64();
    Ok(
        json!({"samples": [saved - loaded], "load_s": loaded, "merge_s": merged - loaded, "save_s": saved - merged}),
    )
}

/// Both kinds of batch in turn, since times drift; the blocks alone besides, which the head cannot hide.
fn mixed(model: &mut dyn Decoder, adapters: usize, seq: i64, repeats: usize) -> Result<Value> {
    let names: Vec<String> = (0..adapters).map(|i| i.to_string()).collect();
    let lora = method(LORA)?;
    for name in &names {
        model.inject(name, &*lora)?;
        for mut param in model.trainable(name) {
            let _ = tch::no_grad(|| param.tensor.normal_(0.0, 0.01));
        }
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let rows = Rows::new(model, &names)?;
    model.activate(names[0])?;
    let ids = Tensor::randint(
        model.vocab(),
        [adapters as i64, seq],
        (Kind::Int64, Device::Cpu),
    );
    let input = Input::new(ids);
    let _off = tch::no_grad_guard();
    let time = |ctx: Ctx| {
        let begin = Instant::now();
        let hidden = model.hidden(&input, None, ctx);
        let blocks = begin.elapsed().as_secs_f64();
        drop(model.head().forward(&hidden, ctx));
        (begin.elapsed().as_secs_f64(), blocks)
    };
    let (mut one, mut all) = (Vec::new(), Vec::new());
    for _ in 0..=repeats {
        one.push(time(Ctx::EVAL));
        all.push(time(Ctx::mixed(&rows)));
    }
    let part = |times: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| -> Vec<f64> {
        times[1..].iter().map(of).collect()
    };
    Ok(json!({
        "samples": part(&all, |it| it.0), "one": part(&one, |it| it.0),
        "blocks": part(&all, |it| it.1), "blocks_one": part(&one, |it| it.1),
    }))
}

fn load_many(model: &mut dyn Decoder, file: &std::path::Path, adapters: usize) -> Result<Value> {
    let known = peft::builtin();
    let memory = || memory::usage(Device::Cpu).map_or(0, |it| it.now);
    let (before, begin) = (memory(), Instant::now());
    for i in 0..adapters {
        Adapter::load(file, &known)?.apply(&i.to_string(), model)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    Ok(json!({"samples": [seconds], "bytes": memory().saturating_sub(before)}))
}

fn tokenise(tokenizer: &std::path::Path, data: PathBuf, cache: PathBuf) -> Result<Value> {
    let begin = Instant::now();
    let tokenizer = peft_data::Tokenizer::open(tokenizer)?;
    let options = peft_data::Options {
        cache_dir: Some(cache),
        ..peft_data::Options::default()
    };
    let rows = peft_data::prepare(&[data], &tokenizer, &options, &|_| {})?;
    if rows.is_empty() {
        bail!("no rows");
    }
    let tokens: usize = rows.lengths().iter().sum();
    Ok(json!({"samples": [begin.elapsed().as_secs_f64()], "rows": rows.len(), "tokens": tokens}))
}

/// The best of several runs of `body`, in seconds.
fn best(repeats: usize, mut body: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let begin = Instant::now();
        body();
        best = best.min(begin.elapsed().as_secs_f64());
    }
    best
}

fn floor() -> Value {
    let _off = tch::no_grad_guard();
    let mut rates = serde_json::Map::new();
    for (name, kind) in [("fp32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let mut rate: f64 = 0.0;
        for (m, k, n) in [
            (512, 768, 3072),
            (512, 768, 768),
            (512, 2048, 768),
            (512, 4096, 4096),
        ] {
            let random =
                |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (x, w) = (random([m, k]), random([n, k]));
            let time = best(30, || drop(linear(&x, &w, None)));
            rate = rate.max(2.0 * (m * k * n) as f64 / time);
        }
        rates.insert(format!("gemm_{name}_flops"), json!(rate));
    }
    // Of what no cache holds, and of a matrix that the last one does.
    for (name, bytes, repeats) in [("", 1i64 << 30, 5), ("cached_", 32 << 20, 50)] {
        let ones = Tensor::ones([bytes / 4], (Kind::Float, Device::Cpu));
        let time = best(repeats, || drop(ones.sum(Kind::Float)));
        rates.insert(
            format!("{name}read_bytes_per_s"),
            json!(bytes as f64 / time),
        );
        // The same written: into the caches or past them, whichever is sooner.
        let mut lines = vec![Line([1.0; 4]); bytes as usize / 16];
        let mut fill = |how: fn(&mut [Line], Line)| {
            best(repeats, || {
                for_each_chunk(&mut lines, 1 << 12, |_, part| how(part, Line([2.0; 4])));
            })
        };
        let time = fill(<[Line]>::fill).min(fill(fill_past_caches));
        let name = format!("{name}written_bytes_per_s");
        rates.insert(name, json!(bytes as f64 / time));
    }
    Value::Object(rates)
}
