//! What the tests of adapters against Python's numbers share.

use peft::{AdamW, tch::Tensor, torch::Moments};
use peft_testing::{distance, fixtures::Case};

/// What a case found wrong.
pub(crate) type Check = Result<(), String>;

/// Any error as text.
pub(crate) fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Runs each check on each case; tells of all that fail.
///
/// # Panics
/// If there is no case, or if a check fails.
pub(crate) fn all_hold(what: &str, cases: &[&Case], checks: &[fn(&Case) -> Check]) {
    tch::set_num_threads(1);
    assert!(!cases.is_empty(), "no fixtures for {what}");
    let each = cases
        .iter()
        .flat_map(|case| checks.iter().map(move |check| (case, check)));
    let failures: Vec<String> = each
        .filter_map(|(case, check)| Some(format!("{}: {}", case.name, check(case).err()?)))
        .collect();
    assert!(
        failures.is_empty(),
        "{} failures\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// One trained tensor, under the key that Python's gradients have.
pub(crate) struct Trained {
    pub(crate) key: String,
    pub(crate) tensor: Tensor,
    pub(crate) decays: bool,
}

/// `loss` before and after each of `count` steps of AdamW, as the fixtures do them; `first` is called once the first
/// gradients are there.
pub(crate) fn descend(
    trained: &mut [Trained],
    count: usize,
    loss: &dyn Fn() -> Result<Tensor, String>,
    first: &dyn Fn(&[Trained]) -> Check,
) -> Result<Tensor, String> {
    let mut moments: Vec<Moments> = trained.iter().map(|it| Moments::new(&it.tensor)).collect();
    let mut losses = Vec::new();
    for step in 0..=count {
        let value = loss()?;
        losses.push(value.double_value(&[]) as f32);
        for it in &mut *trained {
            it.tensor.zero_grad();
        }
        value.backward();
        if step == 0 {
            first(trained)?;
        }
        if step == count {
            break;
        }
        let each = trained.iter_mut().zip(&mut moments);
        let (decaying, plain): (Vec<_>, Vec<_>) = each.partition(|(it, _)| it.decays);
        for (group, decay) in [(decaying, 0.1), (plain, 0.0)] {
            let group = group
                .into_iter()
                .filter(|(it, _)| it.tensor.grad().defined());
            let mut group: Vec<_> = group.map(|(it, m)| (&mut it.tensor, m)).collect();
            AdamW::default()
                .step(&mut group, 1e-2, decay)
                .map_err(said)?;
        }
    }
    Ok(Tensor::from_slice(&losses))
}

/// Every gradient against Python's, relative to the largest number of its own, but no finer than a tenth of the
/// largest of `all` allows.
///
/// Of an ill-conditioned case Python's fp32 is one rounding among many, and another on each processor. There the
/// fixture has the gradients in fp64 too, under `exact.`, and these decide: ours may be `tolerance` from them, or as far as
/// Python's fp32 gets (`spread.`) on bases whose numbers are neighbours of these.
pub(crate) fn gradients(
    trained: &[Trained],
    all: &[&Tensor],
    python: &dyn Fn(&str) -> Option<Tensor>,
    tolerance: f64,
) -> Check {
    let largest = |t: &Tensor| match t.numel() {
        0 => 0.0,
        _ => t.abs().max().double_value(&[]),
    };
    let scale = all.iter().map(|it| largest(it)).fold(0.0, f64::max);
    for it in trained {
        let Some(expected) = python(&it.key) else {
            return Err(format!("Python has no `{}`", it.key));
        };
        let grad = it.tensor.grad();
        if !grad.defined() {
            if largest(&expected) > 0.0 {
                return Err(format!("no gradient reaches `{}`", it.key));
            }
            continue;
        }
        let apart = |found: &Tensor, from: &Tensor| {
            let own = largest(from).max(0.1 * scale);
            distance(found, from) * largest(from).max(1e-12) / own
        };
        let (off, allowed) = match python(&format!("exact.{}", it.key)) {
            Some(exact) => {
                let spread = python(&format!("spread.{}", it.key)).map(|it| it.double_value(&[]));
                (apart(&grad, &exact), tolerance.max(spread.unwrap_or(0.0)))
            }
            None => (apart(&grad, &expected), tolerance),
        };
        if off > allowed {
            return Err(format!(
                "`{}` is off by {off:.1e}, allowed {allowed:.1e}",
                it.key
            ));
        }
    }
    Ok(())
}
