//! Models from the Hugging Face hub, in the cache that every tool shares.

use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use peft_core::{Error, Result};

/// Files that a model may have besides its weights.
const BESIDES: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// Whether `name` looks like an id: `OWNER/NAME`, or one of the few without an owner.
pub(crate) fn is_id(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let fits = |part: &&str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    matches!(parts.len(), 1 | 2) && parts.iter().all(fits) && !name.ends_with(".gguf")
}

/// Fetches what is missing in the cache and returns the folder of the snapshot.
pub(crate) fn fetch(id: &str) -> Result<PathBuf> {
    let fault = |what: &str, error: &dyn std::fmt::Display| {
        let reason =
            format!("{what}: {error}; no folder of this name either, so it was taken for a hub id");
        Error::file(id.as_ref(), reason)
    };
    let api = ApiBuilder::from_env().build();
    let repo = api.map_err(|e| fault("hub", &e))?.model(id.to_owned());
    let info = repo.info().map_err(|e| fault("hub", &e))?;
    let there: Vec<&str> = info
        .siblings
        .iter()
        .map(|it| it.rfilename.as_str())
        .collect();
    let config = repo
        .get("config.json")
        .map_err(|e| fault("config.json", &e))?;
    for name in there
        .iter()
        .filter(|it| BESIDES.contains(it) || is_weights(it))
    {
        get(&repo, name).map_err(|e| fault(name, &e))?;
    }
    Ok(config.parent().unwrap_or(&config).to_owned())
}

fn get(repo: &ApiRepo, name: &str) -> Result<PathBuf, hf_hub::api::sync::ApiError> {
    repo.get(name)
}

fn is_weights(name: &str) -> bool {
    name == super::checkpoint::INDEX
        || (name.starts_with("model") && name.ends_with(".safetensors") && !name.contains('/'))
}
