"""The operations of the paper, one a file: X_forward, and X_backward right below it.

Every forward returns ``(y, cache)`` and every backward takes that cache with dL/dy. What the caller
passes in is never written to; a backward leaves its cache as it was.
"""
