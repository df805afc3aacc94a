//! GPT-2 and the Llama family, built from any source of weights
