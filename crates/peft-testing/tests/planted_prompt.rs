//! The laws of virtual tokens at work: a small correct method keeps them, and with one mistake planted it does not.

use std::cell::RefCell;

use peft_core::{
    Ahead, Common, Config, Ctx, Form, Injection, Outline, Params, PromptAdapter, Result, Site,
    Slot, Start, Tuner, Unmodelled, VirtualTokens, Visit, save_whole,
};
use peft_testing::{broken_prompt, conforms_prompt};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// Rows of a table times a trained number for each column, with a mistake by name.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Planted {
    bug: String,
    /// Keys and values instead of embeddings.
    kv: bool,
    #[serde(flatten)]
    tokens: VirtualTokens,
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    rest: Unmodelled,
}

impl Planted {
    fn has(&self, bug: &str) -> bool {
        self.bug == bug
    }
}

impl Config for Planted {
    const PEFT_TYPE: &'static str = "PLANTED";
    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }
}

thread_local! {
    static SHARED: RefCell<Option<Tensor>> = const { RefCell::new(None) };
}

impl Tuner for Planted {
    fn peft_type(&self) -> &'static str {
        Planted::PEFT_TYPE
    }
    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        let form = if self.kv { Form::Kv } else { Form::Embeds };
        let mut resolved = self.clone();
        resolved.tokens = self
            .tokens
            .resolved("PLANTED", form, &self.common, outline)?;
        Ok(Box::new(resolved))
    }
    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        Ok(self.tokens.wants(site))
    }
    fn attach(&self, _: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let Slot::Prompt(slot) = slot else {
            save_whole(injection.name, slot);
            return Ok(());
        };
        let spec = &injection.outline.spec;
        let row = match self.kv {
            true => 2 * spec.layers as i64 * spec.kv_heads * spec.head_dim,
            false => spec.hidden,
        };
        let mut table = Tensor::randn([self.tokens.tokens(), row], (Kind::Float, tch::Device::Cpu));
        if self.has("the tokens are put into the table of words") {
            let words = slot.words().shallow_clone();
            tch::no_grad(|| words.narrow(0, 0, 1).copy_(&table.narrow(0, 0, 1)));
        }
        if self.has("all adapters share one table") {
            table = SHARED.with_borrow_mut(|it| it.get_or_insert(table).shallow_clone());
        }
        let saved = injection.start == Start::Saved;
        let another = self.has("a resumed encoder is another");
        let trained = !saved || self.has("what an encoder computed is trained without it");
        slot.attach(
            injection.name,
            Box::new(Rows {
                config: self.clone(),
                heads: (spec.kv_heads, spec.head_dim),
                table: table.set_requires_grad(trained),
                scale: match saved {
                    true => None,
                    false => Some(
                        (Tensor::rand([row], (Kind::Float, tch::Device::Cpu)) + 1.0)
                            .set_requires_grad(true),
                    ),
                },
                another: another && injection.start == Start::Resumed,
            }),
        );
        Ok(())
    }
    fn to_json(&self) -> Value {
        let mut json = serde_json::to_value(self).unwrap();
        json["peft_type"] = Planted::PEFT_TYPE.into();
        json
    }
    fn key(&self, at: &str, param: &str) -> String {
        VirtualTokens::key(at, param)
    }
    fn live_key(&self, at: &str, param: &str) -> String {
        VirtualTokens::live_key(at, param)
    }
}

#[derive(Debug)]
struct Rows {
    config: Planted,
    heads: (i64, i64),
    table: Tensor,
    /// None: the rows are what a file holds.
    scale: Option<Tensor>,
    /// Another scale than the file's is at work.
    another: bool,
}

impl Rows {
    fn rows(&self) -> Tensor {
        match &self.scale {
            None => self.table.shallow_clone(),
            Some(scale) if self.another => &self.table * (scale * 1.5),
            Some(scale) => &self.table * scale,
        }
    }
}

impl PromptAdapter for Rows {
    fn ahead(&self, _: Ctx<'_>) -> Ahead {
        let mut rows = self.rows();
        if self.config.has("the tokens are others at each call") {
            rows = &rows + rows.randn_like() * 0.01;
        }
        if !self.config.kv {
            return Ahead::Embeds(rows);
        }
        let (heads, dim) = self.heads;
        let slots = rows.view([self.table.size()[0], -1, heads, dim]);
        let slots = slots.permute([1, 2, 0, 3]).unbind(0); // [kv_heads, n, head_dim] each
        let pairs = slots
            .chunks(2)
            .map(|it| (it[0].shallow_clone(), it[1].shallow_clone()));
        let layers = match self.config.has("keys and values for one layer of two") {
            true => 1,
            false => 2,
        };
        Ahead::Kv(pairs.take(layers).collect())
    }
    fn tokens(&self) -> i64 {
        self.table.size()[0] + i64::from(self.config.has("one more is counted than there is"))
    }
}

impl Params for Rows {
    fn params(&self, visit: Visit<'_>) {
        match &self.scale {
            None => visit(VirtualTokens::TABLE, &self.table),
            Some(scale) => {
                visit("embedding.weight", &self.table);
                if !self.config.has("a part of the encoder is not kept") {
                    visit("scale", scale);
                }
            }
        }
    }
    fn saved(&self, visit: Visit<'_>) {
        match self
            .config
            .has("the encoder's input is saved instead of its output")
        {
            true => visit(VirtualTokens::TABLE, &self.table),
            false => visit(VirtualTokens::TABLE, &self.rows()),
        }
    }
}

fn config(bug: &str, kv: bool) -> Value {
    json!({"peft_type": "PLANTED", "num_virtual_tokens": 3, "kv": kv, "bug": bug})
}

#[test]
fn without_a_mistake_it_passes() {
    conforms_prompt::<Planted>(&[config("", false), config("", true)]);
}

#[test]
fn every_mistake_is_caught() {
    for (bug, kv, law) in [
        ("one more is counted than there is", false, "ahead"),
        ("keys and values for one layer of two", true, "ahead"),
        ("the tokens are others at each call", false, "dropout"),
        ("the tokens are others at each call", true, "in front"),
        (
            "the tokens are put into the table of words",
            false,
            "base frozen",
        ),
        (
            "the encoder's input is saved instead of its output",
            false,
            "save",
        ),
        ("a part of the encoder is not kept", true, "resumed"),
        ("a resumed encoder is another", false, "resumed"),
        (
            "what an encoder computed is trained without it",
            false,
            "file",
        ),
        ("all adapters share one table", false, "second"),
    ] {
        let found = broken_prompt::<Planted>(&config(bug, kv));
        let laws: Vec<&str> = found.iter().map(|(law, _)| *law).collect();
        assert!(
            laws.contains(&law),
            "`{bug}` should break `{law}`, breaks {laws:?}"
        );
    }
}
