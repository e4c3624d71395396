"""The training engine: the only part of neomix that imports DeepSpeed."""
