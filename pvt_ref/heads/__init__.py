"""Heads: what turns the maps of a backbone into a map of logits, made of layers.

Maps are channels last, (B, H, W, C), and those of several levels come finest first. A head that has
batch norms takes their running statistics as a record of buffers, which is nested as its weights
are; beside the operation stands ``statistics(cache)``, those of the batch in the same nest.
"""
