"""Writing texts with a language model: options, prompts, the network as `sampling/` asks it, holes, watching."""
