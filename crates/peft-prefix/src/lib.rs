//! Prefix tuning: trained keys and values before those of every layer (2101.00190).
//!
//! ```text
//! attention(q, [Pₖ; K], [Pᵥ; V])       Pₖ, Pᵥ  [kv_heads, n, head_dim]  for each of L layers
//!
//! E  [n, L·2·D]                         D = kv_heads · head_dim          without projection
//! E = W₂ tanh(W₁ e + b₁) + b₂           e [n, D]   W₁ [h, D]   W₂ [L·2·D, h]      with
//! ```
//!
//! A transformer looks at what came before through keys and values only. So instead of writing an instruction
//! before the input one can train what the layers would have remembered of it: n rows for each layer, and nothing
//! of the model changes. That is more freedom than a trained embedding has
//! (which the model's own layers still have to turn into keys and values), and it costs nothing in the layers
//! below, since no further position is computed: queries are those of the real tokens alone.
//!
//! Such a table is hard to train from a random start. The paper therefore computes it from a smaller one
//! through two layers (`prefix_projection`) and keeps the result. Python's files hold that
//! result only, so it is what other programs read; the encoder lies beside it in a file of our own, and training
//! goes on where it stopped ([`Adapter::resume`](peft_core::Adapter::resume)).
//!
//! # The table
//!
//! A row is one virtual token: for each layer its key and then its value, each head by head.
//!
//! ```text
//! E.view(n, 2L, kv_heads, head_dim).permute(1, 2, 0, 3)      slot 2l: keys of layer l; 2l+1: its values
//! ```
//!
//! Keys are used as they are. In a model with rotary positions they are not rotated, and the input's
//! positions start at n.
//!
//! **An encoder with a decoder.** Only the decoder's attention over itself gets a prefix. Python writes the
//! slots of the table twice behind each other and deals them out by four, of which two are then dropped. So layer i of
//! the decoder reads layer 2i mod L of the table: with an even L half of it is never read. This
//! is done here too, since the files are made for it.
//!
//! # How it begins
//!
//! `init_weights` is null (normal numbers) or `zero`, as in Python. A better start is what the model itself
//! remembers of a text: [`begin_with_kv`] puts the keys and values of a forward pass into an adapter, before
//! training, so that the tuned prefix begins as that text (`peft::begin_prefix_at` computes them, too).
//!
//! # Where this differs from Python
//!
//! - Several adapters may be on: the second stands behind the first. In Python one is active.
//! - Sizes in a file that contradict the model are errors.
//!
//! ```
//! use peft_prefix::PrefixConfig;
//! let prefix = PrefixConfig { prefix_projection: true, ..PrefixConfig::of(20) };
//! assert_eq!(prefix.tokens.num_virtual_tokens, Some(20));
//! ```

mod config;
mod from_kv;
mod prefix;

pub use config::{InitWeights, PrefixConfig};
pub use from_kv::{begin_with_kv, prefix_from_kv};
