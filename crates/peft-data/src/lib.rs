//! From a file of conversations to batches of token ids: formats, templates, masks, cache
