//! A block of a model: what is computed again in the backward pass, with [`Ctx::checkpoint`], instead of being kept.
//!
//! Then the graph must own the block, and the model shows its places to methods all the same. So both hold a handle, and
//! whoever uses the block locks it: a loss that somebody keeps for later is nobody's loan. While places are visited a
//! backward pass cannot have the block, and fails instead of waiting, since it may run in the very visit. One that
//! finds other adapters at work than the forward pass had fails as well: its gradients would be those of another model.

use std::{
    fmt::Debug,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use peft_core::Ctx;
use peft_torch::Pass;
use tch::{TchError, Tensor};

use crate::{Cache, attention::Before, body::Visitor};

/// The places of one block.
pub(crate) trait Block: Debug + Send + 'static {
    /// Visits every place; names begin with `at`.
    fn slots(&mut self, at: &str, visit: Visitor<'_>);
}

/// A handle to a block.
#[derive(Debug)]
pub(crate) struct Shared<B>(Arc<Inner<B>>);

#[derive(Debug)]
struct Inner<B> {
    block: Mutex<B>,
    visited: AtomicBool,
}

impl<B> Inner<B> {
    /// The block; a panic of another user has changed nothing in it.
    fn lock(&self) -> MutexGuard<'_, B> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Block> Shared<B> {
    pub(crate) fn new(block: B) -> Shared<B> {
        Shared(Arc::new(Inner {
            block: Mutex::new(block),
            visited: AtomicBool::new(false),
        }))
    }

    /// Lets `body` visit the block, which no backward pass can have meanwhile.
    pub(crate) fn visit<T>(&mut self, body: impl FnOnce(&mut B) -> T) -> T {
        struct Visit<'a>(&'a AtomicBool);
        impl Drop for Visit<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::SeqCst);
            }
        }
        self.0.visited.store(true, Ordering::SeqCst);
        let _visit = Visit(&self.0.visited);
        body(&mut self.0.lock())
    }

    /// The output of the block for `inputs` and what stands before them; `forward` computes it.
    ///
    /// Whatever may take a gradient is in `inputs` or in `before`, and comes back to `forward` in the same order.
    pub(crate) fn run<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        before: Before<'_>,
        ctx: Ctx,
        forward: impl Fn(&B, [&Tensor; N], Before<'_>, Ctx) -> Tensor + Send + 'static,
    ) -> Tensor {
        let again = ctx.checkpoint && ctx.train && ctx.rows.is_none() && before.cache.is_none();
        if !again {
            return forward(&self.0.lock(), inputs, before, ctx);
        }
        let kv = before.kv.into_iter().flat_map(|(key, value)| [key, value]);
        let all: Vec<&Tensor> = inputs.into_iter().chain(kv).collect();
        let (params, worn) = {
            let mut block = self.0.lock();
            (leaves(&mut *block), worn(&mut *block))
        };
        let inner = Arc::clone(&self.0);
        let run = move |all: &[Tensor], pass| {
            if inner.visited.load(Ordering::SeqCst) {
                return Err(refused("while its places are being visited"));
            }
            let mut block = inner.lock();
            if self::worn(&mut *block) != worn {
                return Err(refused(
                    "with other adapters at work than in the forward pass",
                ));
            }
            let before = Before {
                kv: all.get(N).zip(all.get(N + 1)),
                cache: None::<(&mut Cache, usize)>,
            };
            Ok(forward(
                &block,
                std::array::from_fn(|i| &all[i]),
                before,
                Ctx {
                    checkpoint: true,
                    again: pass == Pass::Again,
                    ..Ctx::TRAIN
                },
            ))
        };
        let params: Vec<&Tensor> = params.iter().collect();
        peft_torch::checkpoint(&all, &params, run).expect("a block that nobody visits")
    }
}

/// How block `i` of `n` is run. The backward pass begins with the last one: if it were dropped it would be computed again at once,
/// and be held all the same.
pub(crate) fn kept_if_last(ctx: Ctx<'_>, i: usize, n: usize) -> Ctx<'_> {
    Ctx {
        checkpoint: ctx.checkpoint && i + 1 < n,
        ..ctx
    }
}

fn refused(when: &str) -> TchError {
    TchError::Torch(format!(
        "a block cannot be computed again for its gradients {when}"
    ))
}

/// What takes gradients in a block.
fn leaves<B: Block>(block: &mut B) -> Vec<Tensor> {
    let mut all = Vec::new();
    block.slots("", &mut |_, mut slot| {
        slot.leaves(&mut |it| all.push(it.shallow_clone()));
    });
    all
}

/// Which adapters are at work at each place of a block.
fn worn<B: Block>(block: &mut B) -> Vec<(Vec<String>, bool)> {
    let mut all = Vec::new();
    block.slots("", &mut |_, mut slot| all.push(slot.worn()));
    all
}
