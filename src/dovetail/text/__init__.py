"""Text to tokens: documents, the tokenizer, token stores, and batches."""
