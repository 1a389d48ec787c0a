"""Faster twins of the operations: the same mathematics, cut into tiles.

Nothing here is needed to understand the model: layers/ says what is computed. ``*_rows`` functions
compute a tile of rows, writing where they are told; ``*_forward`` and ``*_backward`` have the
signatures of the readable operations, whose docstrings hold for them too. In cpu/ all arrays are
NumPy's, float32 or float64; results have the dtype of what came in. Nothing is checked.
"""
