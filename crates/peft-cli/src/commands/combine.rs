//! `peft combine`: one LoRA that does what several do together, each times its weight.
//!
//! Python calls it `add_weighted_adapter`; the types and settings have its names. What runs is exact unless its
//! own mathematics is asked for, which in some types leaves a factor out.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use console::style;
use peft::{
    core::Adapter,
    lora::{Combination, Rules, combine},
};

use super::check::finite;
use crate::{
    args::fresh_folder,
    error::{of_settings, usage},
    quantization::say_what_is_left,
    sources::{adapter_folder, base_of},
    terminal::{bytes, grouped},
};

/// Flags of `peft combine`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Adapter folders or runs, all LoRAs for one base
    #[arg(value_name = "ADAPTER", required = true, num_args = 1..)]
    adapters: Vec<PathBuf>,
    /// What each counts, in their order [default: 1 each]
    #[arg(
        long,
        value_name = "X,X",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    weights: Vec<f64>,
    /// linear, cat, svd, ties, ties_svd, dare_linear, dare_linear_svd, dare_ties, dare_ties_svd,
    /// magnitude_prune, magnitude_prune_svd
    #[arg(long, value_name = "TYPE", default_value = "cat")]
    combination_type: String,
    /// Rank of the result, for types with `svd` [default: the largest of the adapters]
    #[arg(long, value_name = "N")]
    svd_rank: Option<i64>,
    /// Cut entries off at this quantile, 0.5 to 1, for types with `svd`
    #[arg(long, value_name = "Q")]
    svd_clamp: Option<f64>,
    /// The share of entries that stays, for types with `ties`, `dare` or `prune`
    #[arg(long, value_name = "X")]
    density: Option<f64>,
    /// total or frequency, for types with `ties` [default: total]
    #[arg(long, value_name = "HOW")]
    majority_sign_method: Option<String>,
    /// Of what `dare` draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Whose mathematics: exact, peft (as Python's 0.21 computes it), or peft-0.20
    #[arg(long, value_name = "WHOSE", default_value = "exact")]
    rules: String,
    /// The adapters name their base differently, and it is the same one
    #[arg(long)]
    same_base: bool,
    /// The adapter folder to write; it must be empty or not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  peft combine poems recipes --weights 0.7,0.3 --out both
  peft combine a b c --combination-type ties_svd --density 0.3 --svd-rank 16 --out abc

`cat` is exact, and as wide as all ranks together; types with `svd` have the rank that you want.";

/// Combines and writes.
pub(crate) fn run(args: Args) -> Result<()> {
    fresh_folder(&args.out)?;
    let how = args.how()?;
    let count = args.adapters.len();
    let weights = match args.weights.len() {
        0 => vec![1.0; count],
        n if n == count => args.weights.clone(),
        n => {
            return Err(usage(format!(
                "`--weights` has {n} numbers for {count} adapters"
            )));
        }
    };
    if let Some(bad) = weights.iter().find(|it| !it.is_finite()) {
        return Err(usage(format!("`--weights`: {bad} is no weight")));
    }
    if weights.iter().all(|it| *it == 0.0) {
        return Err(usage("`--weights` are all 0: nothing would be left"));
    }
    let registry = peft::builtin();
    let (mut parts, mut bases) = (Vec::new(), Vec::new());
    for path in &args.adapters {
        let dir = adapter_folder(path)?;
        let base = base_of(&dir).ok();
        bases.extend(base.map(|it| (it, dir.clone())));
        let adapter = Adapter::load(&dir, &registry)
            .with_context(|| format!("adapter `{}`", dir.display()))?;
        parts.push(adapter);
    }
    if let Some(((first, of), (other, but))) = different(&bases).filter(|_| !args.same_base) {
        return Err(usage(format!(
            "`{}` is for the base `{first}`, `{}` for `{other}`; if these are the same, say `--same-base`",
            of.display(),
            but.display()
        )));
    }
    let weighted: Vec<(&Adapter, f64)> = parts.iter().zip(weights).collect();
    let both = combine(&weighted, &how).map_err(of_settings)?;
    if let Some((name, _)) = both.state.iter().find(|(_, it)| !finite(it)) {
        bail!("with these weights `{name}` has numbers that are not finite; nothing was written");
    }
    both.save(&args.out)?;
    let numbers: i64 = both.state.values().map(|it| it.numel() as i64).sum();
    let size: usize = both
        .state
        .values()
        .map(|it| it.numel() * it.kind().elt_size_in_bytes())
        .sum();
    println!(
        "{} {} ({count} adapters, {}, {} parameters, {})",
        style("combined into").green(),
        args.out.display(),
        how.combination_type,
        grouped(numbers),
        bytes(size as u64),
    );
    for path in &args.adapters {
        say_what_is_left(path)?;
    }
    println!("\nNext:\n  peft check {}", args.out.display());
    Ok(())
}

/// An adapter's base as it names it, and its folder.
type Based = (String, PathBuf);

/// Two adapters that name different bases.
fn different(bases: &[Based]) -> Option<(&Based, &Based)> {
    let place = |name: &str| std::fs::canonicalize(name).unwrap_or_else(|_| name.into());
    let first = bases.first()?;
    let other = bases.iter().find(|it| place(&it.0) != place(&first.0))?;
    Some((first, other))
}

impl Args {
    fn how(&self) -> Result<Combination> {
        let rules = match self.rules.as_str() {
            "exact" => Rules::Exact,
            "peft" => Rules::Peft,
            "peft-0.20" => Rules::Peft020,
            other => {
                return Err(usage(format!(
                    "`--rules {other}`: known are exact, peft and peft-0.20"
                )));
            }
        };
        let sign = self.majority_sign_method.as_deref().map(str::parse);
        Ok(Combination {
            svd_rank: self.svd_rank,
            svd_clamp: self.svd_clamp,
            density: self.density,
            majority_sign_method: sign.transpose().map_err(usage)?,
            seed: self.seed,
            rules,
            ..Combination::of(self.combination_type.parse().map_err(usage)?)
        })
    }
}
