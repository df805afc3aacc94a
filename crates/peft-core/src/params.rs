//! The parameters of an adapter, visited by their names on disk.
//!
//! A visitor and not a map: an adapter owns its tensors as fields, which the maths reads, and names them only here.

use tch::Tensor;

/// Called with the on-disk name and the value of each tensor.
pub type Visit<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// Something with parameters: one method's share of one place in a model.
pub trait Params {
    /// Visits what the adapter owns, by its name on disk below the place: `lora_A.weight`.
    ///
    /// Also what it owns and does not train; [`Params::saved`] leaves out what is in no file.
    fn params(&self, visit: Visit<'_>);

    /// Visits what the file holds besides: tensors computed from parameters that another
    /// place owns (the transposed copies that a tied head gets). Written on saving; accepted and
    /// not read on loading.
    fn derived(&self, _visit: Visit<'_>) {}

    /// Visits what a saved file holds. Another thing than the parameters where those mean nothing
    /// without more ([`Tuner::saved`](crate::Tuner::saved) then gives the configuration that fits).
    fn saved(&self, visit: Visit<'_>) {
        self.params(visit);
        self.derived(visit);
    }
}

/// One tensor of an adapter in a model.
#[derive(Debug)]
pub struct Param {
    /// The adapter.
    pub adapter: String,
    /// The place: `model.layers.0.self_attn.q_proj`.
    pub at: String,
    /// The name on disk below the place: `lora_A.weight`.
    pub name: String,
    /// The place is a norm; optimisers leave those without decay.
    pub norm: bool,
    /// The tensor itself (a handle, not a copy).
    pub tensor: Tensor,
}

impl Clone for Param {
    fn clone(&self) -> Param {
        Param {
            adapter: self.adapter.clone(),
            at: self.at.clone(),
            name: self.name.clone(),
            norm: self.norm,
            tensor: self.tensor.shallow_clone(),
        }
    }
}
