"""The operations of the paper, one a file: X_forward, and X_backward right below it.

What the caller passes in is never written to; a backward leaves its cache as it was.
"""
