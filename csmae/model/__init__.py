"""CSMAE: tensors in, tensors out."""
