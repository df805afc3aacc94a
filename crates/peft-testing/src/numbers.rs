//! Comparing tensors so that a failure says what, where and by how much.

use tch::{Kind, Tensor};

/// The largest difference over the largest number expected; infinite where shapes differ or a number is not finite.
pub fn distance(actual: &Tensor, expected: &Tensor) -> f64 {
    if actual.size() != expected.size() {
        return f64::INFINITY;
    }
    if actual.numel() == 0 {
        return 0.0;
    }
    let [a, e] = [actual, expected].map(|t| t.detach().to_kind(Kind::Double));
    let largest = e.abs().max().double_value(&[]).max(1e-12);
    let off = (a - e).abs().max().double_value(&[]);
    if off.is_finite() {
        off / largest
    } else {
        f64::INFINITY
    }
}

/// Whether they agree within `tolerance`, relative to the largest; the error says by how much not.
pub fn agree(actual: &Tensor, expected: &Tensor, tolerance: f64, what: &str) -> Result<(), String> {
    let off = distance(actual, expected);
    if off <= tolerance {
        return Ok(());
    }
    let (a, e) = (actual.size(), expected.size());
    Err(format!(
        "{what}: off by {off:.1e} of the largest, allowed {tolerance:.0e}; {a:?} against {e:?}"
    ))
}

/// [`agree`], or a panic.
///
/// # Panics
/// If they do not agree.
pub fn close(actual: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    if let Err(message) = agree(actual, expected, tolerance, what) {
        panic!("{message}");
    }
}

/// Whether they hold the very same bits.
pub fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    a.size() == b.size() && a.kind() == b.kind() && a.equal(b)
}
