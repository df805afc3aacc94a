//! Keys and values of the positions that a model has seen, so that none is computed twice.
//!
//! Positions grow from left to right; what is behind a mistake can be forgotten ([`Cache::truncate`]). A model with
//! an encoder keeps there, too, what its decoder looks at in the encoder's output: that is computed once for a text.

use tch::Tensor;

/// Keys and values of the positions seen so far, for each layer.
#[derive(Debug, Default)]
pub struct Cache {
    layers: Vec<Option<Kv>>,
    len: i64,
    /// How many virtual positions stand before those of tokens.
    ahead: i64,
    /// Positions are counted, whatever a caller gives.
    counted: bool,
    /// What each layer of a decoder looks at in an encoder's output, each `[batch, source, heads, head_dim]`.
    crossed: Vec<(Tensor, Tensor)>,
}

#[derive(Debug)]
struct Kv {
    /// `[batch, capacity, kv_heads, head_dim]`, filled up to the length of the cache.
    key: Tensor,
    value: Tensor,
}

impl Cache {
    /// An empty cache.
    pub fn new() -> Cache {
        Cache::default()
    }

    /// How many tokens it holds. Virtual ones in front of them do not count.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many virtual tokens it holds before the others.
    pub fn ahead(&self) -> i64 {
        self.ahead
    }

    pub(crate) fn is_counted(&self) -> bool {
        self.counted
    }

    /// Forgets everything; what the decoder took from an encoder stays.
    pub(crate) fn clear(&mut self) {
        (self.len, self.ahead, self.counted) = (0, 0, false);
    }

    /// Keys and values so far of each layer, `[batch, positions, kv_heads, head_dim]`, virtual ones first.
    pub fn keys_and_values(&self) -> Vec<(Tensor, Tensor)> {
        let held = |t: &Tensor| t.narrow(1, 0, self.ahead + self.len);
        let layers = self.layers.iter().flatten();
        layers.map(|it| (held(&it.key), held(&it.value))).collect()
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: i64) {
        self.len = self.len.min(len);
    }

    /// Adds keys and values `[batch, new, kv_heads, head_dim]` of one layer; gives all of them so far.
    ///
    /// Room is doubled when it runs out, so a text of n tokens is copied O(n) times and not O(n²).
    pub(crate) fn append(
        &mut self,
        layer: usize,
        key: &Tensor,
        value: &Tensor,
    ) -> (Tensor, Tensor) {
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, || None);
        }
        let size = key.size();
        let past = self.ahead + self.len;
        let (new, total) = (size[1], past + size[1]);
        let slot = &mut self.layers[layer];
        let room = slot.as_ref().map_or(0, |it| it.key.size()[1]);
        if room < total {
            let capacity = (2 * total).max(64);
            let old = slot.take();
            let grow = |like: &Tensor, old: Option<&Tensor>| {
                let shape = [size[0], capacity, size[2], size[3]];
                let fresh = Tensor::empty(shape, (like.kind(), like.device()));
                if let Some(old) = old {
                    fresh.narrow(1, 0, past).copy_(&old.narrow(1, 0, past));
                }
                fresh
            };
            *slot = Some(Kv {
                key: grow(key, old.as_ref().map(|it| &it.key)),
                value: grow(value, old.as_ref().map(|it| &it.value)),
            });
        }
        let kv = slot.as_ref().expect("made above");
        kv.key.narrow(1, past, new).copy_(key);
        kv.value.narrow(1, past, new).copy_(value);
        (kv.key.narrow(1, 0, total), kv.value.narrow(1, 0, total))
    }

    /// Keys and values of the encoder's output for one layer, made once.
    pub(crate) fn crossed(
        &mut self,
        layer: usize,
        make: impl FnOnce() -> (Tensor, Tensor),
    ) -> (Tensor, Tensor) {
        if self.crossed.len() == layer {
            self.crossed.push(make());
        }
        let (key, value) = &self.crossed[layer];
        (key.shallow_clone(), value.shallow_clone())
    }

    /// Counts the new positions, after every layer has added its own.
    pub(crate) fn advance(&mut self, tokens: i64, ahead: i64, counted: bool) {
        self.len += tokens;
        self.ahead += ahead;
        self.counted = counted;
    }

    /// Keeps and orders the rows `[n]` of the batch, for beams or finished rows.
    pub fn select(&mut self, rows: &Tensor) {
        for kv in self.layers.iter_mut().flatten() {
            kv.key = kv.key.index_select(0, rows);
            kv.value = kv.value.index_select(0, rows);
        }
        for (key, value) in &mut self.crossed {
            *key = key.index_select(0, rows);
            *value = value.index_select(0, rows);
        }
    }
}
