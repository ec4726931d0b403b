"""Intervals by matrices, to hold the closed forms to."""

import math

import numpy as np


def bell_mccaffrey(y_N, d_N):
    """Ratio, standard error and degrees of freedom by matrices: CR2 of a regression through the origin, weights 1/d,
    and the eigenvalues of its quadratic form where residuals vary like d (Bell and McCaffrey 2002; Imbens and Kolesar
    2016)."""
    n, x = len(d_N), d_N[:, None]
    hat = x @ np.linalg.inv(x.T @ np.diag(1 / d_N) @ x) @ x.T @ np.diag(1 / d_N)
    ratio, residuals = (hat @ y_N)[0] / d_N[0], y_N - hat @ y_N
    se = math.sqrt(np.sum(residuals**2 / (1 - np.diag(hat)))) / d_N.sum()
    half = np.diag((1 - np.diag(hat)) ** -0.5) @ (np.eye(n) - hat) @ np.diag(np.sqrt(d_N))
    eigenvalues = np.linalg.eigvalsh(half @ half.T)
    return ratio, se, eigenvalues.sum() ** 2 / np.sum(eigenvalues**2)
