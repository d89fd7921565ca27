"""Rules: how the gradient of one token, or of a window of tokens, changes the weights.

For every weight matrix with layer input `x_t` and local error `E_t` (gradient `E_t x_t^T` at the
anchor, the weights at the start of the chunk; spec C6.5):

    W_t = W_{t-1} (decay_t I - erase_t x_t x_t^T) + S_t
    S_t = momentum_t S_{t-1} - write_t E_t x_t^T

with eta the learning rate of the token:

| function | erase | write |
|---|---|---|
| `gradient` | 0 | eta |
| `delta` | `eta / max(1, eta |x|^2)` | eta |
| `explicit_delta` | eta | eta |
| `implicit_delta` | `eta / (1 + eta |x|^2)` | eta |
| `closed_form_delta` | `eta / (1 + eta |x|^2)` | the same |
| `diagonal_closed_form_delta` | the same, of `x^2` in place of `x x^T` | the same |
| `coupled_delta` | decay eta | eta |
| `input_delta` | as `delta`, only on matrices that read the key (reading R2) | eta |
| `functional_delta` | 0; the error is `error + body(k)` (reading R4) | eta |
| `with_momentum(rule)` | as the rule | as the rule |
| `omega(window)` | 0 | sum of the gradients of the last `window` tokens |
| `mean_gradient` | 0 | mean of the gradients since the chunk's start, from its weights |
| `implicit_omega(window)` | exact minimiser over the window (linear, l2) | |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.errors import require_range

Gate = Float[Array, "*t"]  # one number for each token


class Rule(NamedTuple):
    """How gradients change weights.

    Attributes:
      name: what tables and errors call it.
      erase: `erase(learning_rate, decay, square) -> erase`, arrays over tokens, `square = |x|^2` of
        the layer input; None: nothing is erased.
      write: `write(learning_rate, square) -> learning_rate` of the gradient; None: as it is given.
      momentum: whether the gradients go through a momentum S (needs `Tokens.momentum`).
      window: tokens whose gradients enter one update, the present one included.
      input_only: erase only on the matrices whose layer input is the key.
      functional: adds the gradient of `1/2 |body(k)|^2` to the objective's.
      solve: the update is the exact minimiser over the window, not a gradient step.
      diagonal: `x_t x_t^T` is replaced by its diagonal in the erasure.
      mean: the weights are those of the chunk's start, less the mean of its gradients up to the
        token.
    """

    name: str
    erase: Callable[[Gate, Gate, Gate], Gate] | None = None
    write: Callable[[Gate, Gate], Gate] | None = None
    momentum: bool = False
    window: int = 1
    input_only: bool = False
    functional: bool = False
    solve: bool = False
    diagonal: bool = False
    mean: bool = False


def gradient() -> Rule:
    """Gradient descent: `W_t = decay_t W_{t-1} - learning_rate_t E_t x_t^T` (reading R3)."""
    return Rule("gradient")


def with_momentum(rule: Rule) -> Rule:
    """The rule with its gradients accumulated: `S_t = momentum_t S_{t-1} - write_t E_t x_t^T`.

    Raises:
      ValueError: the rule sums the gradients of a window already.
    """
    if rule.window > 1 or rule.solve or rule.mean:
        raise ValueError(f"with_momentum: {rule.name} sums a window of gradients; drop one of them")
    return rule._replace(name=f"{rule.name}+momentum", momentum=True)


def momentum() -> Rule:
    """Gradient descent with momentum (Titans, spec C4)."""
    return with_momentum(gradient())._replace(name="momentum")


def _bounded(learning_rate: Gate, decay: Gate, square: Gate) -> Gate:
    return learning_rate / jnp.maximum(1.0, learning_rate * square)


def _implicit(learning_rate: Gate, decay: Gate, square: Gate) -> Gate:
    return learning_rate / (1.0 + learning_rate * square)


def delta() -> Rule:
    """Delta gradient descent, layer by layer (reading R1): `erase = eta / max(1, eta |x|^2)`.

    Equal to `explicit_delta` while `eta |x|^2 <= 1`. Beyond that the bound keeps the transition's
    eigenvalue along x in [decay - 1, decay], so that no input makes the memory grow.
    """
    return Rule("delta", erase=_bounded)


def explicit_delta() -> Rule:
    """Delta gradient descent with `erase = eta`, unbounded: eta = 2 on a unit key reflects."""
    return Rule("explicit_delta", erase=lambda learning_rate, decay, square: learning_rate)


def implicit_delta() -> Rule:
    """Delta gradient descent with `erase = eta / (1 + eta |x|^2)` and gradients written at eta."""
    return Rule("implicit_delta", erase=_implicit)


def closed_form_delta() -> Rule:
    """The exact minimiser of the DGD step: erase and write both `eta / (1 + eta |x|^2)` (B9).

    With the dot objective on a linear memory this is Longhorn as its theorem states it.
    """
    return Rule(
        "closed_form_delta",
        erase=_implicit,
        write=lambda learning_rate, square: learning_rate / (1.0 + learning_rate * square),
    )


def diagonal_closed_form_delta() -> Rule:
    """`closed_form_delta` with `x x^T` replaced by its diagonal: `W_mn (1 - eta' x_n^2)`.

    `eta' = eta / (1 + eta |x|^2)` as there, so that every factor is in (0, 1]. With the dot
    objective on a linear memory this is what Longhorn computes. Every feature of the key decays on
    its own, and nothing is erased across features: for keys with one non-zero feature the two rules
    are the same.

    Reference: Longhorn (arXiv 2407.14207), section 3.3 and its code (Cranial-XIX/longhorn,
    `models/longhorn.py`, `Longhorn.step`).
    """
    return closed_form_delta()._replace(name="diagonal_closed_form_delta", diagonal=True)


def coupled_delta() -> Rule:
    """The decay outside the erasure, `decay_t W_{t-1} (I - eta_t x x^T)`: `erase = decay eta`.

    With the dot objective on a linear memory this is Gated DeltaNet.
    """
    return Rule("coupled_delta", erase=lambda learning_rate, decay, square: decay * learning_rate)


def input_delta() -> Rule:
    """Delta gradient descent on the matrices that read the key, plain decay on the others (R2)."""
    return Rule("input_delta", erase=_bounded, input_only=True)


def functional_delta() -> Rule:
    """Delta gradient descent of the whole function (reading R4).

    `W k k^T` is the gradient of `1/2 |W k|^2`; for a memory `M(k) = [k +] body(k)` the gradient of
    `1/2 |body(k)|^2` at the anchor is added to the objective's.
    """
    return Rule("functional_delta", functional=True)


def mean_gradient() -> Rule:
    """TTT's mini-batch descent: `W_t = W_a - rate_j sum_{i = a+1..t} eta_i g_i`, `rate_j = 1/j`.

    `W_a` are the weights at the start of the chunk, `j = t - a` is the token's place in it, counted
    from 1, and `g_i` the gradient of token i at `W_a`. The weights at the chunk's end, with
    `rate_C = 1/C`, start the next one. So the weights of a token follow the mean of the gradients
    so far, and the write of one token shrinks as the chunk goes on. `Tokens.rate_offset`, if it is
    given, is added: `rate_j = max(0, 1/j + rate_offset_t)`, TTT's learnable `token_idx`.

    It is defined with `none()` retention, as there is no running weight to decay.

    Reference: TTT (arXiv 2407.04620) and its code (test-time-training/ttt-lm-pytorch, `ttt.py`,
    `TTTBase.get_eta`: eta_ti is `token_idx_t lr_i`, whose `lr` has the factor `base_lr/head_dim`).
    """
    return Rule("mean_gradient", mean=True)


def omega(window: int) -> Rule:
    """Omega rule: `W_t = decay_t W_{t-1} - sum_{i = t-window+1..t} learning_rate_i g_i`.

    `g_i` is the gradient of token i at the anchor of token t, and the learning rates are the
    paper's weights `gamma_i`. A window of 1 is `gradient()`.

    Args:
      window: tokens, at least 1.

    Raises:
      ValueError: window < 1.

    Reference: ATLAS (arXiv 2505.23735); signs of spec C2.
    """
    return Rule("omega", window=_check_window(window))


def implicit_omega(window: int) -> Rule:
    """Exact minimiser over the window, for linear memories with the l2 objective.

    `W_t = argmin_W 1/2 sum_i eta_i |W k_i - v_i|^2 + 1/2 |W - decay_t W_{t-1}|^2`, solved with a
    window x window system. Window 1 is Longhorn; a window over the whole context from W_0 = 0 with
    decay 1 is a ridge regression when the first window is full. The update starts from the running
    weights, not from the anchor: the chunk size changes nothing but reads at the anchor.

    Args:
      window: tokens, at least 1.

    Raises:
      ValueError: window < 1.
    """
    return Rule("implicit_omega", window=_check_window(window), solve=True)


def _check_window(window: int) -> int:
    require_range("omega: window", window, 1, integer=True)
    return window
