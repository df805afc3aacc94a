//! The adapters at one place, bottom to top, each with a name and a switch.

use crate::{Params, Visit};

#[derive(Debug)]
pub(crate) struct Attached<A: ?Sized> {
    pub(crate) name: String,
    pub(crate) on: bool,
    pub(crate) adapter: Box<A>,
}

impl<A: ?Sized> Attached<A> {
    /// Whether it is at work: switched on, or the one that a row of a mixed batch names.
    pub(crate) fn works(&self, only: Option<&str>) -> bool {
        only.map_or(self.on, |name| self.name == name)
    }
}

#[derive(Debug)]
pub(crate) struct Stack<A: ?Sized>(Vec<Attached<A>>);

impl<A: ?Sized + Params> Stack<A> {
    pub(crate) fn new() -> Stack<A> {
        Stack(Vec::new())
    }
    pub(crate) fn push(&mut self, name: &str, adapter: Box<A>) {
        self.0.push(Attached {
            name: name.to_owned(),
            on: true,
            adapter,
        });
    }
    pub(crate) fn all(&self) -> &[Attached<A>] {
        &self.0
    }
    pub(crate) fn active(&self) -> impl Iterator<Item = &A> {
        self.0.iter().filter(|it| it.on).map(|it| &*it.adapter)
    }
    pub(crate) fn switch(&mut self, name: &str, on: bool) {
        for it in self.0.iter_mut().filter(|it| it.name == name) {
            it.on = on;
        }
    }
    pub(crate) fn delete(&mut self, name: &str) {
        self.0.retain(|it| it.name != name);
    }
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

/// What every place can do with its adapters, whatever their kind.
pub(crate) trait Place {
    fn names(&self) -> Vec<(String, bool)>;
    fn switch(&mut self, name: &str, on: bool);
    fn delete(&mut self, name: &str);
    fn merge(&mut self, at: &str) -> crate::Result<()>;
    fn unmerge(&mut self);
    fn merged(&self) -> bool;
    /// Drops the adapters; what is merged stays in the base.
    fn bare(&mut self);
    fn params(&self, name: &str, visit: Visit<'_>);
    fn derived(&self, name: &str, visit: Visit<'_>);
    fn saved(&self, name: &str, visit: Visit<'_>);
}

/// [`Place`] for a struct with fields `base`, `original: Option<base>` and `adapters: Stack`, and a method `baked`.
macro_rules! place {
    ($place:ty) => {
        impl $crate::stack::Place for $place {
            fn names(&self) -> Vec<(String, bool)> {
                let all = self.adapters.all().iter();
                all.map(|it| (it.name.clone(), it.on)).collect()
            }
            fn switch(&mut self, name: &str, on: bool) {
                self.adapters.switch(name, on);
            }
            fn delete(&mut self, name: &str) {
                self.adapters.delete(name);
            }
            fn merge(&mut self, at: &str) -> $crate::Result<()> {
                if self.original.is_none() && self.adapters.active().next().is_some() {
                    let baked = self.baked(at)?;
                    self.original = Some(std::mem::replace(&mut self.base, baked));
                }
                Ok(())
            }
            fn unmerge(&mut self) {
                if let Some(original) = self.original.take() {
                    self.base = original;
                }
            }
            fn merged(&self) -> bool {
                self.original.is_some()
            }
            fn bare(&mut self) {
                self.adapters.clear();
                self.original = None;
            }
            fn params(&self, name: &str, visit: $crate::Visit<'_>) {
                for it in self.adapters.all().iter().filter(|it| it.name == name) {
                    it.adapter.params(visit);
                }
            }
            fn derived(&self, name: &str, visit: $crate::Visit<'_>) {
                for it in self.adapters.all().iter().filter(|it| it.name == name) {
                    it.adapter.derived(visit);
                }
            }
            fn saved(&self, name: &str, visit: $crate::Visit<'_>) {
                for it in self.adapters.all().iter().filter(|it| it.name == name) {
                    it.adapter.saved(visit);
                }
            }
        }
    };
}
pub(crate) use place;

/// Whether every number is finite; a merged weight must be.
///
/// A sum is finite only if all of its terms are; where it is not, it may have overflown, and each is looked at.
pub(crate) fn finite(tensor: &tch::Tensor) -> bool {
    let finite = |t: tch::Tensor| t.isfinite().all().int64_value(&[]) != 0;
    finite(tensor.sum(tch::Kind::Float)) || finite(tensor.shallow_clone())
}
