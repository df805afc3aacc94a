//! `adapter_config.json` of a LoRA: every key of Python's `LoraConfig`, with its default.
//!
//! A key is either a field here, or it is one of those that must be off (the
//! variants that this crate does not have), or it is inert. There is no fourth
//! kind: a setting that would change the numbers and is not understood is an
//! error that names it.

use indexmap::IndexMap;
use peft_core::{Common, Config, Error, Layers, Names, Pattern, Result, Unmodelled};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

/// Low-rank adaptation (2106.09685), as it is configured and saved.
///
/// ```
/// use peft_lora::LoraConfig;
/// let lora = LoraConfig { r: 16, lora_alpha: 32.0, ..LoraConfig::on(["q_proj", "v_proj"]) };
/// assert_eq!(lora.scale(16, 32.0), 2.0);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank of the update.
    pub r: i64,
    /// α; the update is scaled by α / r.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Probability with which an element of the input is dropped on its way into A, in training.
    pub lora_dropout: f64,
    /// The layers: names, one expression, or `all-linear`. `None`: what fits the model's type.
    pub target_modules: Option<Names>,
    /// Layers that are left out, whatever else says.
    pub exclude_modules: Option<Names>,
    /// Blocks by number; the others are left out.
    pub layers_to_transform: Option<Layers>,
    /// The name of the list of blocks, where the first number in a layer's name is not the block's.
    pub layers_pattern: Option<Names>,
    /// Ranks of single layers, by pattern; the first that matches wins.
    #[serde(deserialize_with = "or_default")]
    pub rank_pattern: IndexMap<String, i64>,
    /// α of single layers, by pattern; the first that matches wins.
    #[serde(serialize_with = "numbers", deserialize_with = "or_default")]
    pub alpha_pattern: IndexMap<String, f64>,
    /// Biases of the base that are trained too.
    pub bias: Bias,
    /// B has a bias.
    pub lora_bias: bool,
    /// Scale by α / √r (2312.03732).
    pub use_rslora: bool,
    /// Magnitude and direction apart (2402.09353).
    pub use_dora: bool,
    /// The targets are kept `[in, out]`. Corrected when the model is known; nothing here depends on it.
    pub fan_in_fan_out: bool,
    /// Modules of which a whole copy is trained and saved.
    pub modules_to_save: Option<Vec<String>>,
    /// Single rows of embeddings that are trained.
    pub trainable_token_indices: Option<Tokens>,
    /// Input and output embedding that share a table also share what is trained on it.
    pub ensure_weight_tying: bool,
    /// How A and B begin.
    pub init_lora_weights: Init,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

impl Default for LoraConfig {
    fn default() -> LoraConfig {
        LoraConfig {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            bias: Bias::None,
            lora_bias: false,
            use_rslora: false,
            use_dora: false,
            fan_in_fan_out: false,
            modules_to_save: None,
            trainable_token_indices: None,
            ensure_weight_tying: false,
            init_lora_weights: Init::Kaiming,
            common: Common::default(),
            rest: Unmodelled::default(),
        }
    }
}

impl LoraConfig {
    /// The defaults of Python's `peft` on these targets.
    pub fn on(targets: impl Into<Names>) -> LoraConfig {
        LoraConfig {
            target_modules: Some(targets.into()),
            ..LoraConfig::default()
        }
    }

    /// What the update is scaled by: α / r, or α / √r.
    pub fn scale(&self, r: i64, alpha: f64) -> f64 {
        match self.use_rslora {
            true => alpha / (r as f64).sqrt(),
            false => alpha / r as f64,
        }
    }

    pub(crate) fn fault(reason: impl Into<String>) -> Error {
        Error::Config {
            peft_type: LoraConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Config for LoraConfig {
    const PEFT_TYPE: &'static str = "LORA";
    // The first two say something only where `megatron_config` or `use_qalora` is on, which is refused.
    const INERT: &'static [&'static str] =
        &["megatron_core", "qalora_group_size", "runtime_config"];

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        let must = |fine: bool, reason: &dyn Fn() -> String| match fine {
            true => Ok(()),
            false => Err(LoraConfig::fault(reason())),
        };
        // Beyond any layer's width: a typing error, which would otherwise ask for terabytes.
        let ranks = || self.rank_pattern.iter().map(|(key, &r)| (key.as_str(), r));
        for (key, r) in ranks().chain([("r", self.r)]) {
            must((1..=65536).contains(&r), &|| {
                format!("rank {r} of `{key}` is not in 1..=65536")
            })?;
            let even = self.init_lora_weights != Init::Orthogonal || r % 2 == 0;
            must(even, &|| {
                format!("init_lora_weights `orthogonal` wants even ranks, and `{key}` is {r}")
            })?;
        }
        let alphas = || self.alpha_pattern.iter().map(|(key, &a)| (key.as_str(), a));
        for (key, alpha) in alphas().chain([("lora_alpha", self.lora_alpha)]) {
            must(alpha.is_finite(), &|| {
                format!("alpha {alpha} of `{key}` is not finite")
            })?;
        }
        must((0.0..1.0).contains(&self.lora_dropout), &|| {
            format!("lora_dropout is {} and not in 0..1", self.lora_dropout)
        })?;
        self.selection().check(LoraConfig::PEFT_TYPE)?;
        let plain = matches!(self.init_lora_weights, Init::Kaiming | Init::Random);
        must(!self.lora_bias || plain, &|| {
            "lora_bias goes with init_lora_weights true or false only".to_owned()
        })?;
        must(!(self.lora_bias && self.use_dora), &|| {
            "lora_bias does not go with use_dora".to_owned()
        })?;
        self.check_expressions()
    }
}

impl LoraConfig {
    /// Compiles every regular expression once, so that a bad one is found before a model is there.
    fn check_expressions(&self) -> Result<()> {
        for key in self.rank_pattern.keys().chain(self.alpha_pattern.keys()) {
            Pattern::new(&format!("(?:{key})"), key)?;
        }
        Ok(())
    }
}

/// Which biases of the base are trained: `bias`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the target layers.
    LoraOnly,
}

/// Rows of embeddings: `trainable_token_indices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Tokens {
    /// Of the input embedding.
    Input(Vec<i64>),
    /// Of named places.
    At(IndexMap<String, Vec<i64>>),
}

/// How A and B begin: `init_lora_weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Init {
    /// `true`: A uniform in ±1/√in, B zero.
    #[default]
    Kaiming,
    /// `false`: both as a fresh linear layer begins; the update is not zero. For tests.
    Random,
    /// `gaussian`: A normal with deviation 1/r, B zero.
    Gaussian,
    /// `orthogonal`: A and B on orthogonal subspaces, so that BA = 0 with neither zero; even ranks.
    Orthogonal,
    /// `pissa` (2404.02948): the largest singular directions of W.
    Pissa,
    /// `pissa_niter_N`: the same by a randomised decomposition with N power iterations.
    PissaFast(i64),
    /// `olora` (2406.01775): the first columns of Q and rows of R of W = QR.
    Olora,
}

const INITS: &str = "true, false, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N` and `olora`";

impl Serialize for Init {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Init::Kaiming => to.serialize_bool(true),
            Init::Random => to.serialize_bool(false),
            Init::Gaussian => to.serialize_str("gaussian"),
            Init::Orthogonal => to.serialize_str("orthogonal"),
            Init::Pissa => to.serialize_str("pissa"),
            Init::PissaFast(n) => to.serialize_str(&format!("pissa_niter_{n}")),
            Init::Olora => to.serialize_str("olora"),
        }
    }
}

impl<'de> Deserialize<'de> for Init {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Init, D::Error> {
        let value = Value::deserialize(from)?;
        let word = match &value {
            Value::Bool(true) => return Ok(Init::Kaiming),
            Value::Bool(false) => return Ok(Init::Random),
            Value::String(word) => word.to_lowercase(),
            _ => String::new(),
        };
        let iterations = word
            .strip_prefix("pissa_niter_")
            .and_then(|n| n.parse().ok());
        match (word.as_str(), iterations) {
            ("gaussian", _) => Ok(Init::Gaussian),
            ("orthogonal", _) => Ok(Init::Orthogonal),
            ("pissa", _) => Ok(Init::Pissa),
            ("olora", _) => Ok(Init::Olora),
            (_, Some(n)) if (0..=1000).contains(&n) => Ok(Init::PissaFast(n)),
            _ => Err(de::Error::custom(format!(
                "init_lora_weights is {value}; this build offers {INITS}"
            ))),
        }
    }
}

/// Whole numbers as Python's integers.
pub(crate) fn number<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => to.serialize_i64(*value as i64),
        false => to.serialize_f64(*value),
    }
}

fn numbers<S: Serializer>(values: &IndexMap<String, f64>, to: S) -> Result<S::Ok, S::Error> {
    struct Number<'a>(&'a f64);
    impl Serialize for Number<'_> {
        fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
            number(self.0, to)
        }
    }
    to.collect_map(values.iter().map(|(key, value)| (key, Number(value))))
}

/// `null` where Python also writes it for "none".
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}
