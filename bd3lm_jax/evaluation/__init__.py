"""What a model is worth: likelihood bounds and their estimators, comparisons, and the quality of its texts."""
