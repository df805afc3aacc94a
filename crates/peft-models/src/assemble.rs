//! Which class of `transformers` a model type and a task make, and how it is put together.
//!
//! The names of places, the files and the numbers are those of the class that `AutoModelFor…` picks. A head that the
//! checkpoint has must fit; one that it lacks is drawn at random.

use std::collections::BTreeSet;

use peft_core::{Error, Result, Weights};
use serde_json::Value;

use crate::{
    Network, Problem, Task,
    activation::Activation,
    bert::{self, Bert},
    body::{Body, output},
    config::{BertConfig, Gpt2Config, Keys, LlamaConfig, T5Config},
    gpt2::Gpt2,
    head::{Head, Maker},
    headed::{Headed, Origin},
    language_model::{HEAD, LanguageModel},
    llama::Llama,
    t5::T5,
    task::{Classes, label_maps, unnamed},
};

/// What a head should be like, where the checkpoint's configuration is not to decide.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeadOptions {
    /// Number of classes or outputs; `None`: what the configuration says, 2 if it says nothing.
    pub num_labels: Option<i64>,
    /// The names of the classes in order.
    pub id2label: Option<Vec<String>>,
    /// What an output means.
    pub problem_type: Option<Problem>,
    /// The token that pads a row, for classifiers that look at the last token that is none.
    pub pad_token_id: Option<i64>,
    /// Where the random numbers of a fresh head start.
    pub seed: u64,
}

/// The values of `model_type` that can be loaded.
pub const MODEL_TYPES: &[&str] = &[
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "t5",
];

/// What a model of this type can be loaded for.
pub fn tasks(model_type: &str) -> &'static [Task] {
    use Task::*;
    match model_type {
        "gpt2" | "llama" | "mistral" | "qwen2" | "qwen3" => {
            &[CausalLm, SeqCls, TokenCls, QuestionAns, FeatureExtraction]
        }
        "bert" | "roberta" => &[MaskedLm, SeqCls, TokenCls, QuestionAns, FeatureExtraction],
        "t5" => &[Seq2SeqLm, FeatureExtraction],
        _ => &[],
    }
}

/// Checks that the model type is known and can be loaded for the task.
pub(crate) fn offers(keys: &Keys, task: Task) -> Result<()> {
    let found = keys.text("model_type")?.unwrap_or_default();
    let offered = tasks(found);
    if offered.contains(&task) {
        return Ok(());
    }
    let wanted = if offered.is_empty() {
        format!("known are {MODEL_TYPES:?}")
    } else {
        let offered: Vec<&str> = offered.iter().map(|it| it.name()).collect();
        format!("which is not for {task}; known are {offered:?}")
    };
    Err(keys.fault("model_type", &wanted))
}

/// How the names of tensors begin that belong to heads for other tasks.
pub(crate) fn aside(task: Task) -> &'static [&'static str] {
    match task {
        Task::Seq2SeqLm => &[],
        _ => &[
            "lm_head.",
            "score.",
            "classifier.",
            "qa_outputs.",
            "cls.",
            "pooler.",
            "bert.pooler.",
            "roberta.pooler.",
        ],
    }
}

/// The class of `transformers`, as `architectures` names it.
fn class(model_type: &str, task: Task) -> String {
    let family = match model_type {
        "gpt2" => "GPT2",
        "llama" => "Llama",
        "mistral" => "Mistral",
        "qwen2" => "Qwen2",
        "qwen3" => "Qwen3",
        "bert" => "Bert",
        "roberta" => "Roberta",
        _ => "T5",
    };
    let suffix = match task {
        Task::CausalLm if family == "GPT2" => "LMHeadModel",
        Task::CausalLm => "ForCausalLM",
        Task::MaskedLm => "ForMaskedLM",
        Task::SeqCls => "ForSequenceClassification",
        Task::TokenCls => "ForTokenClassification",
        Task::QuestionAns => "ForQuestionAnswering",
        Task::Seq2SeqLm => "ForConditionalGeneration",
        Task::FeatureExtraction => "Model",
    };
    format!("{family}{suffix}")
}

/// What the names of the body begin with in that class.
fn prefix(model_type: &str, task: Task) -> &'static str {
    match (model_type, task) {
        (_, Task::FeatureExtraction) => "",
        ("gpt2", _) => "transformer.",
        // So named in `transformers` for the sake of old checkpoints.
        ("llama" | "qwen2" | "qwen3", Task::QuestionAns) => "transformer.",
        ("bert", _) => "bert.",
        ("roberta", _) => "roberta.",
        _ => "model.",
    }
}

fn model_type(keys: &Keys) -> Result<&str> {
    Ok(keys.text("model_type")?.unwrap_or_default())
}

/// A model and the door to what it does not know yet when it is built.
pub(crate) enum Built {
    LanguageModel(Box<LanguageModel>),
    Headed(Box<Headed>),
    T5(Box<T5>),
}

impl Built {
    pub(crate) fn aside(&mut self) -> &mut Vec<String> {
        match self {
            Built::LanguageModel(it) => &mut it.origin.aside,
            Built::Headed(it) => &mut it.origin.aside,
            Built::T5(it) => &mut it.origin.aside,
        }
    }

    pub(crate) fn network(self) -> Box<dyn Network> {
        match self {
            Built::LanguageModel(it) => it,
            Built::Headed(it) => it,
            Built::T5(it) => it,
        }
    }
}

/// Builds a decoder; its head must be there.
pub(crate) fn decoder(keys: &Keys, weights: &mut dyn Weights) -> Result<LanguageModel> {
    let model_type = model_type(keys)?;
    let tied = keys.flag("tie_word_embeddings", model_type == "gpt2")?;
    let body = body(keys, weights)?;
    let head = output(weights, HEAD, body.table().weight(), tied, None)?;
    let mut config = body.config().clone();
    config["architectures"] = vec![class(model_type, Task::CausalLm)].into();
    Ok(LanguageModel {
        root: prefix(model_type, Task::CausalLm),
        body,
        head,
        tied,
        origin: Origin {
            config,
            fresh: Vec::new(),
            aside: Vec::new(),
        },
    })
}

/// Builds a model for a task.
pub(crate) fn network(
    keys: &Keys,
    weights: &mut dyn Weights,
    task: Task,
    options: &HeadOptions,
) -> Result<Built> {
    let model_type = model_type(keys)?;
    match task {
        Task::CausalLm => return Ok(Built::LanguageModel(Box::new(decoder(keys, weights)?))),
        Task::Seq2SeqLm | Task::FeatureExtraction if model_type == "t5" => {
            let writes = task == Task::Seq2SeqLm;
            let mut model = T5::build(T5Config::read(keys)?, writes, weights)?;
            model.origin.config["architectures"] = vec![class(model_type, task)].into();
            return Ok(Built::T5(Box::new(model)));
        }
        _ => {}
    }
    let classes = match task {
        Task::SeqCls | Task::TokenCls => Some(classes(keys, options)?),
        _ => None,
    };
    // An encoder counts positions, or leaves a row of its table alone, by the token that it was made with.
    let encoder = matches!(model_type, "bert" | "roberta");
    let pad = options.pad_token_id.filter(|_| !encoder);
    let padding = match pad {
        Some(id) => Some(id),
        None => keys.whole("pad_token_id")?,
    };
    let mut config = keys.json.clone();
    config["architectures"] = vec![class(model_type, task)].into();
    if let Some(classes) = &classes {
        describe(&mut config, classes);
    }
    if let Some(id) = pad {
        config["pad_token_id"] = id.into();
    }
    let body = body(keys, weights)?;
    let like = body.table().weight();
    // The adapter begins with the run's seed, too, and must not begin with the numbers of the head.
    let mut maker = Maker::new(weights, like, std(keys)?, options.seed ^ HEAD_SEED);
    let asked = Asked {
        task,
        labels: classes.as_ref().map_or(2, |it| it.names.len() as i64),
        padding,
    };
    let head = match encoder {
        true => bert_head(keys, &asked, like, &mut maker)?,
        false => decoder_head(keys, &asked, like.size()[1], &mut maker)?,
    };
    let fresh = maker.fresh;
    Ok(Built::Headed(Box::new(Headed {
        tied: task == Task::MaskedLm && keys.flag("tie_word_embeddings", true)?,
        body,
        head,
        root: prefix(model_type, task),
        task,
        classes,
        origin: Origin {
            config,
            fresh,
            aside: Vec::new(),
        },
    })))
}

fn body(keys: &Keys, weights: &mut dyn Weights) -> Result<Box<dyn Body>> {
    Ok(match model_type(keys)? {
        "gpt2" => Box::new(Gpt2::build(Gpt2Config::read(keys)?, weights)?),
        "bert" | "roberta" => Box::new(Bert::build(BertConfig::read(keys)?, weights)?),
        _ => Box::new(Llama::build(LlamaConfig::read(keys)?, weights)?),
    })
}

/// What a head is to be.
struct Asked {
    task: Task,
    labels: i64,
    padding: Option<i64>,
}

fn bert_head(
    keys: &Keys,
    asked: &Asked,
    embed: &tch::Tensor,
    maker: &mut Maker<'_>,
) -> Result<Head> {
    let config = BertConfig::read(keys)?;
    let (roberta, h) = (config.model_type == "roberta", config.hidden);
    let p = match keys.get("classifier_dropout") {
        Some(_) => keys.share("classifier_dropout", 0.0)?,
        None => config.hidden_dropout,
    };
    let root = prefix(&config.model_type, asked.task);
    let pooler = |maker: &mut Maker<'_>| {
        let disk = format!("{}pooler.dense", bert::disk_root(maker.weights));
        maker.linear((&format!("{root}pooler.dense"), &disk), (h, h), true)
    };
    let n = asked.labels;
    Ok(match asked.task {
        Task::MaskedLm => {
            let (root, dense, norm) = match roberta {
                true => ("lm_head", "dense", "layer_norm"),
                false => ("cls.predictions", "transform.dense", "transform.LayerNorm"),
            };
            let dense = format!("{root}.{dense}");
            Head::Vocabulary {
                dense: maker.linear((&dense, &dense), (h, h), true)?,
                activation: match roberta {
                    true => Activation::Gelu,
                    false => config.activation,
                },
                norm: maker.norm(&format!("{root}.{norm}"), h, config.eps)?,
                out: maker.vocabulary(
                    &format!("{root}.decoder"),
                    embed,
                    keys.flag("tie_word_embeddings", true)?,
                )?,
            }
        }
        Task::SeqCls if roberta => Head::First {
            dense: maker.linear(("classifier.dense", "classifier.dense"), (h, h), true)?,
            out: maker.linear(("classifier.out_proj", "classifier.out_proj"), (n, h), true)?,
            twice: true,
            dropout: p,
        },
        Task::SeqCls => Head::First {
            dense: pooler(maker)?,
            out: maker.linear(("classifier", "classifier"), (n, h), true)?,
            twice: false,
            dropout: p,
        },
        Task::TokenCls => Head::Each {
            out: maker.linear(("classifier", "classifier"), (n, h), true)?,
            dropout: p,
        },
        Task::QuestionAns => Head::Spans {
            out: maker.linear(("qa_outputs", "qa_outputs"), (2, h), true)?,
        },
        _ => Head::Bare {
            pooler: Some(pooler(maker)?),
        },
    })
}

fn decoder_head(keys: &Keys, asked: &Asked, hidden: i64, maker: &mut Maker<'_>) -> Result<Head> {
    let gpt2 = model_type(keys)? == "gpt2";
    let n = asked.labels;
    Ok(match asked.task {
        Task::SeqCls => Head::Last {
            score: maker.linear(("score", "score"), (n, hidden), false)?,
            padding: asked.padding,
        },
        Task::TokenCls => {
            let name = if gpt2 { "classifier" } else { "score" };
            let bias = gpt2 || keys.flag("token_classification_bias", true)?;
            let p = ["classifier_dropout", "hidden_dropout"]
                .into_iter()
                .find(|key| keys.get(key).is_some());
            Head::Each {
                out: maker.linear((name, name), (n, hidden), bias)?,
                dropout: p.map_or(Ok(0.1), |key| keys.share(key, 0.1))?,
            }
        }
        Task::QuestionAns => Head::Spans {
            out: maker.linear(("qa_outputs", "qa_outputs"), (2, hidden), true)?,
        },
        _ => Head::Bare { pooler: None },
    })
}

/// What tells the random numbers of a head from those of other things with the same seed.
const HEAD_SEED: u64 = 0x6865_6164;

/// The width of the distribution that a fresh head is drawn from.
fn std(keys: &Keys) -> Result<f64> {
    match keys.float("initializer_range")? {
        None => Ok(0.02),
        Some(0.0) => Ok(0.02), // as `transformers` reads it
        Some(std) if std > 0.0 => Ok(std),
        Some(_) => Err(keys.fault("initializer_range", "expected a number from 0 up")),
    }
}

/// What the head tells apart: as asked for, or as the configuration says.
fn classes(keys: &Keys, options: &HeadOptions) -> Result<Classes> {
    let own = names(keys)?;
    let names = match (&options.id2label, options.num_labels) {
        (Some(names), None) => names.clone(),
        (Some(names), Some(n)) if names.len() as i64 == n => names.clone(),
        (Some(names), Some(n)) => {
            return Err(asked(format!(
                "{n} labels, but {} names for them",
                names.len()
            )));
        }
        (None, Some(n)) if own.as_ref().is_some_and(|it| it.len() as i64 == n) => {
            own.unwrap_or_default()
        }
        (None, Some(n)) if (1..=1 << 20).contains(&n) => unnamed(n),
        (None, Some(n)) => return Err(asked(format!("{n} labels, expected one at least"))),
        (None, None) => own.unwrap_or_else(|| unnamed(2)),
    };
    if names.is_empty() {
        return Err(asked("no labels, expected one at least".to_owned()));
    }
    let distinct: BTreeSet<&String> = names.iter().collect();
    if distinct.len() != names.len() {
        return Err(asked(format!(
            "labels {names:?}, of which two are the same"
        )));
    }
    let problem = match (options.problem_type, keys.text("problem_type")?) {
        (Some(problem), _) => Some(problem),
        (None, None) => None,
        (None, Some(name)) => Some(Problem::named(name).ok_or_else(|| {
            let known = Problem::NAMES.map(|(name, _)| name);
            keys.fault("problem_type", &format!("known are {known:?}"))
        })?),
    };
    Ok(Classes { names, problem })
}

fn asked(what: String) -> Error {
    Error::Config {
        peft_type: "head".into(),
        reason: format!("asked for {what}"),
    }
}

/// The names of the classes in `config.json`.
fn names(keys: &Keys) -> Result<Option<Vec<String>>> {
    let count = keys.size("num_labels")?;
    let Some(map) = keys.get("id2label") else {
        return match count {
            Some(n) if n > 1 << 20 => Err(keys.fault("num_labels", "expected fewer")),
            count => Ok(count.map(unnamed)),
        };
    };
    let bad = || {
        keys.fault(
            "id2label",
            "expected an object of \"0\": NAME, \"1\": NAME and so on",
        )
    };
    let map = map.as_object().ok_or_else(bad)?;
    let name = |i: usize| {
        map.get(&i.to_string())
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let names: Option<Vec<String>> = (0..map.len()).map(name).collect();
    let names = names.ok_or_else(bad)?;
    match count {
        Some(n) if n != names.len() as i64 => {
            Err(keys.fault("num_labels", "which is not the number of names in id2label"))
        }
        _ => Ok(Some(names)),
    }
}

/// Writes the classes into a configuration as `transformers` does it.
fn describe(config: &mut Value, classes: &Classes) {
    let [ids, labels] = label_maps(&classes.names);
    if let Some(config) = config.as_object_mut() {
        config.remove("num_labels");
        config.insert("id2label".into(), ids);
        config.insert("label2id".into(), labels);
        if let Some(problem) = classes.problem {
            config.insert("problem_type".into(), problem.name().into());
        }
    }
}
