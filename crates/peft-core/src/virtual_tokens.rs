//! The settings that all methods of virtual tokens share: how many, and the sizes of the model that they were made for.
//!
//! Python fills the sizes in from the model's `config.json` and saves them, so a file says which model it fits. Here
//! they are filled in from what the model says of itself ([`Outline`]), and a file that says otherwise is
//! refused: virtual tokens of another width cannot be put before the input, and those of as many numbers in another
//! arrangement can, and would be noise.
//!
//! | key | embeddings | keys and values |
//! | --- | --- | --- |
//! | `token_dim` | width of the input embedding | heads of keys and values × their width |
//! | `num_attention_heads` | heads of queries; nothing reads it | heads of keys and values |
//! | `num_layers` | blocks; nothing reads it | blocks |
//! | `num_transformer_submodules` | 2 for an encoder with a decoder, else 1 | the same |
//!
//! What nothing reads is kept as the file has it.

use serde::{Deserialize, Serialize};

use crate::{Common, Error, Outline, Result, Selection, Site, SiteKind, with_heads};

/// On-disk name of the virtual tokens.
const TABLE: &str = "prompt_embeddings";
/// The tag of a model that reads with an encoder and writes with a decoder.
const SEQ_2_SEQ: &str = "SEQ_2_SEQ_LM";
/// More is a typing error, which would otherwise ask for terabytes.
const MOST: i64 = 65536;

/// What stands in front of a row, which decides the sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Embeddings before those of the input.
    Embeds,
    /// Keys and values before those of every layer.
    Kv,
}

/// The settings that all methods of virtual tokens share, under Python's names.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VirtualTokens {
    /// How many tokens stand in front.
    pub num_virtual_tokens: Option<i64>,
    /// Width of one token.
    pub token_dim: Option<i64>,
    /// Stacks of the model that get tokens of their own.
    pub num_transformer_submodules: Option<i64>,
    /// Heads of the model's attention.
    pub num_attention_heads: Option<i64>,
    /// Blocks of the model.
    pub num_layers: Option<i64>,
    /// Modules of which a whole copy is trained and saved.
    pub modules_to_save: Option<Vec<String>>,
}

impl VirtualTokens {
    /// On-disk name of the virtual tokens themselves, where no encoder computes them.
    pub const TABLE: &'static str = TABLE;

    /// This many, with everything else to be filled in.
    pub fn new(tokens: i64) -> VirtualTokens {
        VirtualTokens {
            num_virtual_tokens: Some(tokens),
            ..VirtualTokens::default()
        }
    }

    /// What no model is needed to see.
    pub fn check(&self, peft_type: &str) -> Result<()> {
        for (key, value) in [
            ("num_virtual_tokens", self.num_virtual_tokens),
            ("token_dim", self.token_dim),
            (
                "num_transformer_submodules",
                self.num_transformer_submodules,
            ),
            ("num_attention_heads", self.num_attention_heads),
            ("num_layers", self.num_layers),
        ] {
            in_range(peft_type, key, value)?;
        }
        Ok(())
    }

    /// With the sizes of this model, where they are not given; an error where they are given and others.
    pub fn resolved(
        &self,
        peft_type: &str,
        form: Form,
        common: &Common,
        outline: &Outline,
    ) -> Result<VirtualTokens> {
        let spec = &outline.spec;
        let mut sites = outline.sites.iter();
        let Some(site) = sites.find(|it| it.kind == SiteKind::Prompt) else {
            let reason = "this model has no place for virtual tokens";
            return Err(fault(peft_type, reason.to_owned()));
        };
        let tokens = self.num_virtual_tokens.ok_or_else(|| {
            let reason = "num_virtual_tokens is not set: how many tokens stand in front";
            fault(peft_type, reason.to_owned())
        })?;
        let two = check_task(peft_type, common, spec.encoder_decoder)?;
        let (width, heads) = match form {
            Form::Embeds => (site.shape.last().copied().unwrap_or(0), spec.heads),
            Form::Kv => (spec.head_dim * spec.kv_heads, spec.kv_heads),
        };
        let layers = spec.layers as i64;
        let same = |key: &str, given: Option<i64>, model: i64| {
            let wanted = given.unwrap_or(model);
            if wanted == model && model > 0 {
                return Ok(Some(model));
            }
            Err(fault(
                peft_type,
                format!("{key} is {wanted}, and {model} in this model"),
            ))
        };
        // One table for both stacks of an encoder with a decoder: Python allows it where it is embeddings.
        let both = two && form == Form::Embeds && self.num_transformer_submodules == Some(1);
        let stacks = if two && !both { 2 } else { 1 };
        let (num_attention_heads, num_layers) = match form {
            Form::Embeds => (
                self.num_attention_heads.or(Some(spec.heads)),
                self.num_layers.or(Some(layers)),
            ),
            Form::Kv => (
                same("num_attention_heads", self.num_attention_heads, heads)?,
                same("num_layers", self.num_layers, layers)?,
            ),
        };
        let filled = VirtualTokens {
            num_virtual_tokens: Some(tokens),
            token_dim: same("token_dim", self.token_dim, width)?,
            num_transformer_submodules: same(
                "num_transformer_submodules",
                self.num_transformer_submodules,
                stacks,
            )?,
            num_attention_heads,
            num_layers,
            modules_to_save: with_heads(self.modules_to_save.clone(), common, outline),
        };
        filled.selection().check_saved(outline)?;
        Ok(filled)
    }

    /// Whether something is to be done at a place: virtual tokens go there, or it is trained whole.
    pub fn wants(&self, site: &Site) -> bool {
        site.kind == SiteKind::Prompt || self.selection().saves(&site.at)
    }

    /// Rows of the table: tokens for every stack. Zero before [`VirtualTokens::resolved`].
    pub fn rows(&self) -> i64 {
        self.tokens() * self.num_transformer_submodules.unwrap_or(0)
    }

    /// How many tokens stand in front of a row.
    pub fn tokens(&self) -> i64 {
        self.num_virtual_tokens.unwrap_or(0)
    }

    /// Width of one token. Zero before [`VirtualTokens::resolved`].
    pub fn width(&self) -> i64 {
        self.token_dim.unwrap_or(0)
    }

    /// The key of a parameter on disk: methods of virtual tokens do not wrap the model, so there is no `.model` in it.
    pub fn key(at: &str, param: &str) -> String {
        match (at, param) {
            ("", TABLE) => TABLE.to_owned(),
            ("", _) => format!("prompt_encoder.{param}"),
            _ => format!("base_model.{at}.{param}"),
        }
    }

    /// The name of a parameter in Python's live model.
    pub fn live_key(at: &str, param: &str) -> String {
        match (at, param) {
            ("", TABLE) => "prompt_encoder.embedding.weight".to_owned(),
            _ => VirtualTokens::key(at, param),
        }
    }

    fn selection(&self) -> Selection<'_> {
        Selection {
            save: self.modules_to_save.as_deref(),
            ..Selection::default()
        }
    }
}

/// A size that a file gives, if it gives one.
fn in_range(peft_type: &str, key: &str, value: Option<i64>) -> Result<()> {
    match value {
        Some(value) if !(1..=MOST).contains(&value) => Err(fault(
            peft_type,
            format!("{key} is {value} and not in 1..={MOST}"),
        )),
        _ => Ok(()),
    }
}

/// Whether there are two stacks. The task must say the same as the model.
fn check_task(peft_type: &str, common: &Common, encoder_decoder: bool) -> Result<bool> {
    let task = common.task_type.as_deref().unwrap_or("null");
    match (task == SEQ_2_SEQ, encoder_decoder) {
        (true, false) => Err(fault(
            peft_type,
            format!(
                "task_type is {SEQ_2_SEQ}, for an encoder with a decoder, and this model is one stack"
            ),
        )),
        (false, true) => Err(fault(
            peft_type,
            format!(
                "task_type is {task}, and virtual tokens on an encoder with a decoder want {SEQ_2_SEQ}"
            ),
        )),
        (two, _) => Ok(two),
    }
}

fn fault(peft_type: &str, reason: String) -> Error {
    Error::Config {
        peft_type: peft_type.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Spec;

    fn outline(encoder_decoder: bool) -> Outline {
        let site = |at: &str, kind, shape: &[i64]| Site {
            at: at.to_owned(),
            kind,
            shape: shape.to_vec(),
            bias: false,
            transposed: false,
            groups: 1,
            held: Vec::new(),
        };
        Outline {
            spec: Spec {
                hidden: 12,
                layers: 3,
                heads: 4,
                kv_heads: 2,
                head_dim: 5,
                encoder_decoder,
                ..Spec::default()
            },
            sites: vec![
                site("", SiteKind::Prompt, &[23, 12]),
                site("model.embed", SiteKind::Embedding, &[23, 12]),
                site("score", SiteKind::Linear, &[2, 12]),
            ],
        }
    }

    fn task(task: &str) -> Common {
        Common {
            task_type: Some(task.to_owned()),
            ..Common::default()
        }
    }

    fn resolve(given: &VirtualTokens, form: Form, task_type: &str, two: bool) -> String {
        let result = given.resolved("X", form, &task(task_type), &outline(two));
        match result {
            Ok(it) => format!(
                "{:?} {:?} {:?} {:?}",
                it.token_dim, it.num_transformer_submodules, it.num_attention_heads, it.num_layers
            ),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn sizes_come_from_the_model() {
        let given = VirtualTokens::new(7);
        assert_eq!(
            resolve(&given, Form::Embeds, "CAUSAL_LM", false),
            "Some(12) Some(1) Some(4) Some(3)"
        );
        assert_eq!(
            resolve(&given, Form::Kv, "CAUSAL_LM", false),
            "Some(10) Some(1) Some(2) Some(3)"
        );
        assert_eq!(
            resolve(&given, Form::Embeds, "SEQ_2_SEQ_LM", true),
            "Some(12) Some(2) Some(4) Some(3)"
        );
    }

    #[test]
    fn the_head_of_a_task_is_saved_too() {
        let given = VirtualTokens::new(7);
        let resolved = given.resolved("X", Form::Kv, &task("SEQ_CLS"), &outline(false));
        let resolved = resolved.unwrap();
        assert_eq!(
            resolved.modules_to_save,
            Some(vec!["classifier".to_owned(), "score".to_owned()])
        );
        let outline = outline(false);
        let wanted = outline.sites.iter().map(|it| resolved.wants(it));
        assert_eq!(wanted.collect::<Vec<_>>(), [true, false, true]);
        assert_eq!(
            VirtualTokens::key("score", "weight"),
            "base_model.score.weight"
        );
        assert_eq!(
            VirtualTokens::key("", "prompt_embeddings"),
            "prompt_embeddings"
        );
    }

    #[test]
    fn what_contradicts_the_model_is_refused() {
        let with = |change: &dyn Fn(&mut VirtualTokens)| {
            let mut given = VirtualTokens::new(7);
            change(&mut given);
            given
        };
        let wide = with(&|it| it.token_dim = Some(768));
        assert_eq!(
            resolve(&wide, Form::Embeds, "CAUSAL_LM", false),
            "X configuration: token_dim is 768, and 12 in this model"
        );
        let deep = with(&|it| it.num_layers = Some(4));
        assert_eq!(
            resolve(&deep, Form::Kv, "CAUSAL_LM", false),
            "X configuration: num_layers is 4, and 3 in this model"
        );
        assert!(resolve(&deep, Form::Embeds, "CAUSAL_LM", false).ends_with("Some(4)"));
        let heads = with(&|it| it.num_attention_heads = Some(4));
        assert!(resolve(&heads, Form::Kv, "CAUSAL_LM", false).contains("num_attention_heads is 4"));
        let two = with(&|it| it.num_transformer_submodules = Some(2));
        assert!(
            resolve(&two, Form::Kv, "CAUSAL_LM", false).contains("num_transformer_submodules is 2")
        );
        let one = with(&|it| it.num_transformer_submodules = Some(1));
        assert!(
            resolve(&one, Form::Embeds, "SEQ_2_SEQ_LM", true).starts_with("Some(12) Some(1)"),
            "Python allows one table for both"
        );
        assert!(
            resolve(&one, Form::Kv, "SEQ_2_SEQ_LM", true)
                .contains("num_transformer_submodules is 1")
        );
        assert!(
            resolve(&VirtualTokens::new(7), Form::Kv, "SEQ_2_SEQ_LM", false).contains("one stack")
        );
        assert!(
            resolve(&VirtualTokens::new(7), Form::Kv, "CAUSAL_LM", true)
                .contains("want SEQ_2_SEQ_LM")
        );
        assert!(
            resolve(&VirtualTokens::default(), Form::Kv, "CAUSAL_LM", false)
                .contains("num_virtual_tokens is not set")
        );
        let unknown = with(&|it| it.modules_to_save = Some(vec!["scoer".to_owned()]));
        assert!(resolve(&unknown, Form::Kv, "CAUSAL_LM", false).contains("`scoer`"));
        let zero = with(&|it| it.num_virtual_tokens = Some(0));
        assert_eq!(
            zero.check("X").unwrap_err().to_string(),
            "X configuration: num_virtual_tokens is 0 and not in 1..=65536"
        );
    }
}
