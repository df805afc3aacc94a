//! The contracts that every fine-tuning method, base format and model agree on
