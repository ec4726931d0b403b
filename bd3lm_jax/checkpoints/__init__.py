"""From foreign weights to a block diffusion model: where a run starts, and what differs while it learns."""
