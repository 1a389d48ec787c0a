import numpy as np


def cross_entropy(logits, labels):
    B = len(logits)
    z = logits - np.max(logits, axis=1, keepdims=True)
    log_p = z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))
    loss = -np.mean(log_p[np.arange(B), labels])
    dlogits = np.exp(log_p)
    dlogits[np.arange(B), labels] -= 1
    dlogits = dlogits / B
    return loss, dlogits
