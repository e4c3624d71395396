"""Using a model without training it: text from prompts, in whatever layout holds it."""
