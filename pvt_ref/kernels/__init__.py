"""Faster twins of the operations: the same mathematics, cut into tiles.

Nothing here is needed to understand the model: layers/ defines what is computed. ``*_rows``
functions compute a tile of rows, and write to the arrays they are given. ``*_forward`` and
``*_backward`` have the signatures of the readable operations, whose docstrings also apply to them.
In cpu/ all arrays are NumPy's, float32 or float64; results have the dtype of the inputs. Nothing is
checked.
"""
