//! Attention: softmax(q kᵀ · scale + mask) v.
//!
//! libtorch's kernel for processors goes through the keys in blocks and never
//! holds all scores, which a long text needs. At the lengths of most
//! fine-tuning (128 positions: 64 KB of scores a head) its many small products
//! run at a third of the processor's rate. Where the scores are small they are
//! held here as one batch: two large products forward, four backward, and one
//! pass for the softmax. Sums are fp32 in either case, also for bf16.

use crate::{Function, apply, ffi, linear::fast_batches};
use tch::{Device, Kind, TchError, Tensor};

/// Scores of one call that may be held, in bytes.
const HELD: i64 = 32 << 20;

/// Queries from which on large products pay.
const MANY: i64 = 64;

/// q: `[batch, new, heads, d]`, k, v: `[batch, keys, kv_heads, d]` -> `[batch, new, heads, d]`.
///
/// `mask`: `[batch or 1, heads or 1, new, keys]`, added to the scores; `causal`: query i sees keys up to i, for
/// `new == keys`. Each head of k and v serves `heads / kv_heads` heads of q. Differentiable in q, k, v and the mask.
///
/// # Panics
/// If the shapes do not fit together.
pub fn attention(
    [q, k, v]: [&Tensor; 3],
    scale: f64,
    causal: bool,
    mask: Option<&Tensor>,
    dropout: f64,
) -> Tensor {
    if let Some(mask) = mask.filter(|it| it.requires_grad()) {
        return learnt([q, k, v], scale, causal, mask, dropout);
    }
    let (heads, keys) = (q.size()[2], k.size()[1]);
    let scores = q.size()[0] * heads * q.size()[1] * keys * 4;
    let held = q.device() == Device::Cpu && dropout == 0.0 && q.size()[1] >= MANY && scores <= HELD;
    if !(held && matches!(q.kind(), Kind::Float | Kind::BFloat16)) {
        return blockwise([q, k, v], scale, causal, mask, dropout);
    }
    let groups = heads / k.size()[2];
    let [y] = apply(&[q, k, v], || {
        let (qf, kf, vf) = (batch(q, 1), batch(k, groups), batch(v, groups));
        let (b, new) = (q.size()[0], q.size()[1]);
        let mut p = product(&qf, &kf.transpose(1, 2)).view([b, heads, new, keys]);
        let mask = mask.map(|it| it.to_kind(Kind::Float).contiguous());
        ffi::softmax(&mut p, mask.as_ref(), scale, causal).expect("scores and mask fit");
        let p = p.view([b * heads, new, keys]);
        let y = unbatch(product(&p, &vf), b, 1, q.kind());
        let saved = Attention {
            inputs: [q, k, v].map(Tensor::detach),
            p,
            scale,
            groups,
        };
        ([y], saved)
    });
    y
}

struct Attention {
    inputs: [Tensor; 3],
    /// `[batch · heads, new, keys]` in fp32
    p: Tensor,
    scale: f64,
    groups: i64,
}

impl Function for Attention {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = &grads[0] else {
            return Ok(vec![None, None, None]);
        };
        let [q, k, v] = &self.inputs;
        let (b, kind) = (q.size()[0], q.kind());
        let g = batch(g, 1);
        let dv = product(&self.p.transpose(1, 2), &g);
        let mut ds = product(&g, &batch(v, self.groups).transpose(1, 2)); // dP
        ffi::softmax_backward(&mut ds, &self.p, self.scale)?;
        let dq = product(&ds, &batch(k, self.groups));
        let dk = product(&ds.transpose(1, 2), &batch(q, 1));
        Ok(vec![
            Some(unbatch(dq, b, 1, kind)),
            Some(unbatch(dk, b, self.groups, kind)),
            Some(unbatch(dv, b, self.groups, kind)),
        ])
    }
}

/// `[batch, n, heads, d] -> [batch · heads · groups, n, d]` in fp32, in one pass.
fn batch(t: &Tensor, groups: i64) -> Tensor {
    let size = t.size();
    let (b, n, h, d) = (size[0], size[1], size[2], size[3]);
    let mut out = Tensor::empty([b, h, groups, n, d], (Kind::Float, t.device()));
    out.copy_(
        &t.transpose(1, 2)
            .unsqueeze(2)
            .expand([b, h, groups, n, d], false),
    );
    out.view([b * h * groups, n, d])
}

/// `[batch · heads · groups, n, d] -> [batch, n, heads, d]`, groups summed.
fn unbatch(t: Tensor, b: i64, groups: i64, kind: Kind) -> Tensor {
    let size = t.size();
    let (h, n, d) = (size[0] / (b * groups), size[1], size[2]);
    let mut t = t.view([b, h, groups, n, d]);
    if groups > 1 {
        t = t.sum_dim_intlist([2i64].as_slice(), true, Kind::Float);
    }
    let mut out = Tensor::empty([b, n, h, d], (kind, t.device()));
    out.copy_(&t.squeeze_dim(2).transpose(1, 2));
    out
}

fn product(a: &Tensor, b: &Tensor) -> Tensor {
    ffi::bmm(a, b, fast_batches()).expect("batches that fit")
}

/// `[batch, n, heads, d] -> [batch, heads, n, d]`, the heads of keys and values repeated to those of the queries.
fn spread(qkv: [&Tensor; 3]) -> [Tensor; 3] {
    let groups = qkv[0].size()[2] / qkv[1].size()[2];
    let [q, k, v] = qkv.map(|t| t.transpose(1, 2));
    let [k, v] = [k, v].map(|t| match groups {
        1 => t,
        _ => {
            let size = t.size();
            let (b, h, n, d) = (size[0], size[1], size[2], size[3]);
            let spread = t.unsqueeze(2).expand([b, h, groups, n, d], false);
            spread.reshape([b, h * groups, n, d])
        }
    });
    [q, k, v]
}

/// In plain operations and fp32, for a mask that is itself trained: the kernels give it no gradient.
fn learnt(qkv: [&Tensor; 3], scale: f64, causal: bool, mask: &Tensor, dropout: f64) -> Tensor {
    let kind = qkv[0].kind();
    let [q, k, v] = spread(qkv).map(|it| it.to_kind(Kind::Float));
    let mut scores = q.matmul(&k.transpose(2, 3)) * scale + mask; // [batch, heads, new, keys]
    if causal {
        let (new, keys) = (scores.size()[2], scores.size()[3]);
        let hidden = Tensor::ones([new, keys], (Kind::Bool, q.device())).triu(1);
        scores = scores.masked_fill(&hidden, f64::NEG_INFINITY);
    }
    let p = scores.softmax(-1, Kind::Float);
    let y = p.dropout(dropout, dropout > 0.0).matmul(&v);
    y.transpose(1, 2).to_kind(kind)
}

/// libtorch's own, in blocks.
fn blockwise(
    qkv: [&Tensor; 3],
    scale: f64,
    causal: bool,
    mask: Option<&Tensor>,
    dropout: f64,
) -> Tensor {
    let [q, k, v] = spread(qkv);
    let mask = mask.map(|it| it.to_kind(q.kind()));
    let y = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, dropout, causal, scale, false);
    y.transpose(1, 2)
}
