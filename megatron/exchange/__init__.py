"""Models in other programs' files: Hugging Face folders and DeepSpeed's GPT-NeoX checkpoints."""
