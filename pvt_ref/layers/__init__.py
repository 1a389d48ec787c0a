"""The operations of the paper, one a file: X_forward, and X_backward right below it."""
