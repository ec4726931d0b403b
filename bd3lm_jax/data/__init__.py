"""From text to batches: corpora -> tokenizers -> packing -> prepare -> loader."""
