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
pub(crate) struct Stack<A: ?Sized> {
    all: Vec<Attached<A>>,
    /// Those set aside while others come in their place, and where they stood.
    aside: Vec<(usize, Attached<A>)>,
}

impl<A: ?Sized + Params> Stack<A> {
    pub(crate) fn new() -> Stack<A> {
        Stack {
            all: Vec::new(),
            aside: Vec::new(),
        }
    }
    pub(crate) fn push(&mut self, name: &str, adapter: Box<A>) {
        self.all.push(Attached {
            name: name.to_owned(),
            on: true,
            adapter,
        });
    }
    pub(crate) fn all(&self) -> &[Attached<A>] {
        &self.all
    }
    pub(crate) fn active(&self) -> impl Iterator<Item = &A> {
        self.all.iter().filter(|it| it.on).map(|it| &*it.adapter)
    }
    pub(crate) fn switch(&mut self, name: &str, on: bool) {
        for it in self.all.iter_mut().filter(|it| it.name == name) {
            it.on = on;
        }
    }
    pub(crate) fn delete(&mut self, name: &str) {
        self.all.retain(|it| it.name != name);
    }
    pub(crate) fn clear(&mut self) {
        self.all.clear();
    }
    /// Sets the adapters of one name aside: until they are put back or replaced it is as if they were deleted.
    pub(crate) fn set_aside(&mut self, name: &str) {
        for (i, it) in std::mem::take(&mut self.all).into_iter().enumerate() {
            match it.name == name {
                true => self.aside.push((i, it)),
                false => self.all.push(it),
            }
        }
    }
    /// Puts what was set aside back to where it stood.
    pub(crate) fn put_back(&mut self) {
        for (i, it) in self.aside.drain(..) {
            self.all.insert(i, it);
        }
    }
    /// Moves the adapters of one name to where those set aside stood, which are dropped.
    pub(crate) fn settle(&mut self, name: &str) {
        let Some((from, _)) = self.aside.first() else {
            return;
        };
        let from = *from;
        let taken = std::mem::take(&mut self.all).into_iter();
        let (fresh, mut rest): (Vec<_>, Vec<_>) = taken.partition(|it| it.name == name);
        rest.splice(from..from, fresh);
        self.all = rest;
        self.aside.clear();
    }
}

/// What every place can do with its adapters, whatever their kind.
pub(crate) trait Place {
    fn names(&self) -> Vec<(String, bool)>;
    fn switch(&mut self, name: &str, on: bool);
    fn delete(&mut self, name: &str);
    fn set_aside(&mut self, name: &str);
    fn put_back(&mut self);
    fn settle(&mut self, name: &str);
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
            fn set_aside(&mut self, name: &str) {
                self.adapters.set_aside(name);
            }
            fn put_back(&mut self) {
                self.adapters.put_back();
            }
            fn settle(&mut self, name: &str) {
                self.adapters.settle(name);
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
