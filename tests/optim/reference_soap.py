"""SOAP in NumPy, written from the paper and from what its authors' PyTorch code does step by step.

Vyas et al., SOAP (arXiv 2409.11321), algorithm 3; github.com/nikhilvyas/SOAP for what the paper
leaves open: the first step only finds the bases, eigenvectors are in descending order, the columns
of a basis are sorted before an iteration, weights decay after the step, eps stands beside sqrt(V).
"""

import numpy as np


class Soap:
    """One matrix; its momentum is kept in the eigenbasis and rotated when the basis turns."""

    def __init__(self, *, b1, b2, factor_decay, frequency, eps, weight_decay):
        self.b1, self.b2, self.c = b1, b2, factor_decay
        self.frequency, self.eps, self.weight_decay = frequency, eps, weight_decay
        self.steps, self.factors, self.bases = 0, None, None

    def rotated(self, x):
        return self.bases[0].T @ x @ self.bases[1]

    def back(self, x):
        return self.bases[0] @ x @ self.bases[1].T

    def step(self, w, g, rate):
        """The weights after one gradient."""
        outer = (g @ g.T, g.T @ g)
        if self.factors is None:
            self.factors = [(1 - self.c) * one for one in outer]
            self.bases = [np.flip(np.linalg.eigh(one)[1], axis=1) for one in self.factors]
            self.m, self.v = np.zeros_like(w), np.zeros_like(w)
            return w
        self.steps += 1
        seen = self.rotated(g)
        self.m = self.b1 * self.m + (1 - self.b1) * seen
        self.v = self.b2 * self.v + (1 - self.b2) * seen**2
        correction = np.sqrt(1 - self.b2**self.steps) / (1 - self.b1**self.steps)
        w = w - rate * correction * self.back(self.m / (np.sqrt(self.v) + self.eps))
        w = w - rate * self.weight_decay * w
        self.factors = [
            self.c * f + (1 - self.c) * one for f, one in zip(self.factors, outer, strict=True)
        ]
        if self.steps % self.frequency == 0:
            self.turn()
        return w

    def turn(self):
        """One orthogonal iteration of both bases."""
        m = self.back(self.m)
        for axis in (0, 1):
            factor, q = self.factors[axis], self.bases[axis]
            eigenvalues = np.diag(q.T @ factor @ q)
            order = np.argsort(eigenvalues)[::-1]
            self.v = np.take(self.v, order, axis=axis)
            self.bases[axis] = np.linalg.qr(factor @ q[:, order])[0]
        self.m = self.rotated(m)
