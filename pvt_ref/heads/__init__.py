"""Heads turn the maps of a backbone into a map of logits; they are made of layers.

Maps are channels last, (B, H, W, C), and several levels come finest first. A head with batch norms
takes their running statistics as a record of buffers, nested like its weights; beside the operation
stands ``statistics(cache)``, which returns those of the batch, nested likewise.
"""
