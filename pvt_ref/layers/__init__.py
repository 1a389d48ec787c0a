"""The operations of the paper, one per file: X_forward, and X_backward right below it."""
