"""What a run costs: operations, memory and communication, counted before and traced during it."""
