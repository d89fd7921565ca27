"""Levels coupled by one gradient: an optax transformation scanned over a sequence's chunks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from nestedjax.levels.level import Level, PerPeriod, PerToken, PyTree
from nestedjax.levels.run import Carry, advance_position, run, run_some, token_count


class Adaptation(NamedTuple):
    """What `adapt` returns.

    Attributes:
      params: the parameters after the last whole chunk's update.
      optimizer: the state of the transformation after it.
      carry: the carry after all tokens.
      outputs: the outputs of every token, [T, ...], each at the weights in force in its chunk.
      losses: [ceil(T / period)], the loss of every chunk at the weights in force in it.
    """

    params: PyTree
    optimizer: PyTree
    carry: PyTree
    outputs: PerToken
    losses: Float[Array, " chunks"]


def adapt(
    loss: Callable[[PyTree, PyTree, PerToken], tuple[Float[Array, ""], tuple[PyTree, PerToken]]],
    tx: optax.GradientTransformation,
    params: PyTree,
    tokens: PerToken,
    *,
    period: int,
    second_order: bool = True,
    carry: PyTree = None,
    optimizer: PyTree = None,
) -> Adaptation:
    """Take one optimizer step after every chunk of one sequence.

    `params_{c+1} = params_c + tx(grad_params loss(params_c, carry_c, chunk_c))`. The gradient is
    that of one chunk: the carry from the past is a constant for it. The result is differentiable
    with respect to `params`, `carry`, `tokens` and anything that `loss` and `tx` close over, such
    as an inner learning rate; so the start of the adaptation can be meta-learned.

    Args:
      loss: `loss(params, carry, chunk) -> (scalar, (carry, outputs))`, outputs [P, ...].
      tx: the inner optimizer; with `optim.by_period` every group of parameters has its own period.
      params: the parameters at the sequence's start.
      tokens: arrays with a leading token axis, [T, ...]; labels, if any, are among them.
      period: tokens in a chunk. A last chunk that is shorter is read and not learned from.
      second_order: whether an outer gradient goes through the inner gradient (MAML) or takes it as
        a constant (first-order MAML).
      carry: what the first chunk starts from.
      optimizer: the state of `tx` to continue from; None for a new one.

    Returns:
      An `Adaptation`.

    Raises:
      ValueError: if the period is not a positive integer or there is no token.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import levels
      >>> def loss(rate, carry, chunk):
      ...     error = chunk - rate
      ...     return (error**2).mean() / 2, (carry, error)
      >>> out = levels.adapt(loss, optax.sgd(0.5), jnp.zeros(()), jnp.ones(5), period=2)
      >>> print(out.outputs, out.params)
      [1.   1.   0.5  0.5  0.25] 0.75

    Reference:
      Nested Learning (arXiv 2512.24695), equation 71, with the gradient of the model's own loss;
      first order as in Finn et al. (arXiv 1703.03400), section 5.2.
    """
    length = token_count(tokens)
    if period < 1 or length < 1:
        raise ValueError(f"adapt needs period >= 1 and at least one token: {period=}, {length=}")
    optimizer = tx.init(params) if optimizer is None else optimizer
    whole = length // period

    @jax.checkpoint
    def body(held, chunk):
        params, optimizer, carry = held
        value = jax.value_and_grad(loss, has_aux=True)
        (scalar, (carry, outputs)), gradient = value(params, carry, chunk)
        params, optimizer = _apply(tx, gradient, optimizer, params, second_order)
        return (params, optimizer, carry), (outputs, scalar)

    def fold(leaf):
        return leaf[: whole * period].reshape(whole, period, *leaf.shape[1:])

    held, losses, outputs = (params, optimizer, carry), [], []
    if whole:
        held, (y, scalars) = jax.lax.scan(body, held, jax.tree.map(fold, tokens))
        outputs.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), y))
        losses.append(scalars)
    params, optimizer, carry = held
    if length % period:
        rest = jax.tree.map(lambda leaf: leaf[whole * period :], tokens)
        scalar, (carry, y) = loss(params, carry, rest)
        outputs.append(y)
        losses.append(scalar[None])
    y = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
    return Adaptation(params, optimizer, carry, y, jnp.concatenate(losses))


class Adapting(NamedTuple):
    """The state of an `adaptive_level` at a chunk's end, before that chunk's write.

    Attributes:
      fast: the fast weights in force in the last chunk.
      optimizer: the state of the inner optimizer.
      carry: the forward pass's carry after the last chunk.
      anchor: the carry before it.
      tokens: the last chunk, [period, ...], whose last label has not been seen yet.
      started: whether the context has had a whole chunk yet.
    """

    fast: PyTree
    optimizer: PyTree
    carry: PyTree
    anchor: PyTree
    tokens: PerPeriod
    started: Bool[Array, ""]


def adaptive_level(
    name: str,
    period: int,
    *,
    forward: Callable[[PyTree, PyTree, PyTree, PerToken], tuple[PerToken, PyTree]],
    loss: Callable[[PyTree, PerToken, PerToken], Float[Array, " T"]],
    tx: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation],
    init_fast: Callable[[PyTree], PyTree],
    init_carry: Callable[[PyTree], PyTree] = lambda params: (),
    token: PyTree = None,
    second_order: bool = True,
    reduction: str = "mean",
) -> Level:
    """A whole model as one level that learns from the text it reads, by its own next-token loss.

    The label of a chunk's last token is the first token of the next chunk, so the write of chunk c
    happens when chunk c + 1 begins:

        labels_c = (x_c[2..P], x_{c+1}[1])
        fast_{c+1} = fast_c + tx(grad_fast reduce loss(forward(fast_c, carry_c, x_c), labels_c))
        y_{c+1}, carry_{c+2} = forward(fast_{c+1}, carry_{c+1}, x_{c+1})

    The first chunk of a context applies no write. The carry from the past is a constant for the
    inner gradient and differentiable for the outer one. Every chunk is rematerialised.

    From a fresh context the labels of a chunk are known, so that its outputs and its inner gradient
    come from one forward pass. From a `Carry` the write evaluates its chunk a second time. Both
    give the same numbers.

    Args:
      name: what the tables and error messages call it.
      period: tokens in a chunk, the period of the fastest fast weights; `optim.by_period` gives
        slower ones their own multiple of it.
      forward: `forward(params, fast, carry, tokens[P]) -> (outputs[P, ...], carry)`, causal;
        `params` are the slow parameters, `fast` the ones that learn in context.
      loss: `loss(params, outputs[P, ...], labels[P]) -> losses[P]`, one per token.
      tx: the inner optimizer, or `tx(params)` that makes it, to learn its hyperparameters.
      init_fast: `init_fast(params) -> fast`, the meta-learned start of a context.
      init_carry: `init_carry(params) -> carry`, the forward pass's own start of a context.
      token: a `jax.ShapeDtypeStruct` (or a tree of them) like one token; None for int32[].
      second_order: whether an outer gradient goes through the inner gradient.
      reduction: "mean" or "sum" of a chunk's losses.

    Returns:
      A `Level` with state `Adapting` and outputs those of `forward`.

    Raises:
      ValueError: if the reduction is unknown.

    Reference:
      Nested Learning (arXiv 2512.24695), equation 71 and section 7.1.
    """
    learner = _Learner(forward, loss, tx, second_order, _reducer(reduction))
    token = jax.ShapeDtypeStruct((), jnp.int32) if token is None else token

    def init(params: PyTree) -> Adapting:
        fast, carry = init_fast(params), init_carry(params)
        nothing = jax.tree.map(lambda like: jnp.zeros((period, *like.shape), like.dtype), token)
        optimizer = learner.transformation(params).init(fast)
        return Adapting(fast, optimizer, carry, carry, nothing, jnp.asarray(False))

    @jax.checkpoint
    def step(params: PyTree, state: Adapting, x: PerPeriod) -> tuple[Adapting, PerPeriod]:
        # Before the first chunk there is nothing to learn from. `where` differentiates both of its
        # branches, so the one that is dropped must be computed from real tokens: it learns from x.
        seen = jax.tree.map(lambda a, b: jnp.where(state.started, a, b), state.tokens, x)
        first = jax.tree.map(lambda leaf: leaf[:1], x)
        learned = learner.learn(params, state.fast, state.optimizer, state.anchor, seen, first)[:2]
        fast, optimizer = jax.tree.map(
            lambda new, old: jnp.where(state.started, new, old),
            learned,
            (state.fast, state.optimizer),
        )
        y, carry = forward(params, fast, state.carry, x)
        # `started | True` rather than a constant True: under vmap on an Explicit mesh the flag
        # then takes its sharding from the state.
        return Adapting(fast, optimizer, carry, state.carry, x, state.started | True), y

    axes = jax.tree.map(lambda like: like.ndim + 1, token)
    level = Level(name, period, init, step, ndim=axes)

    def advance(params, state, x, reset, valid=None):
        if valid is not None:
            return run_some(level, params, state, x, valid)
        if isinstance(state, Carry) or token_count(x) < period:
            return run(level, params, state, x, reset=reset)
        return _run_known_labels(level, learner, params, state, x, reset)

    about = {"objective": "next token", "rule": "optax", "transfer": "init"}
    return level._replace(advance=advance, about=about)


class _Learner(NamedTuple):
    """The write of an adaptive level."""

    forward: Callable[[PyTree, PyTree, PyTree, PerToken], tuple[PerToken, PyTree]]
    loss: Callable[[PyTree, PerToken, PerToken], Float[Array, " T"]]
    tx: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]
    second_order: bool
    reduce: Callable[[Float[Array, " T"]], Float[Array, ""]]

    def transformation(self, params):
        return self.tx if isinstance(self.tx, optax.GradientTransformation) else self.tx(params)

    def learn(self, params, fast, optimizer, anchor, tokens, following):
        """One write: the new `(fast, optimizer)`, then outputs and carry of the pass before it."""

        def objective(fast):
            outputs, carry = self.forward(params, fast, anchor, tokens)
            return self.reduce(self.loss(params, outputs, labels)), (outputs, carry)

        def shift(now, after):
            return jnp.concatenate([now[1:], after])

        labels = jax.tree.map(shift, tokens, following)
        gradient, (outputs, carry) = jax.grad(objective, has_aux=True)(fast)
        tx = self.transformation(params)
        fast, optimizer = _apply(tx, gradient, optimizer, fast, self.second_order)
        return fast, optimizer, outputs, carry


def _run_known_labels(level, learner, params, state, x, resets):
    """From a fresh context: all labels but the last chunk's are known, so one pass a chunk does."""
    period, length = level.period, token_count(x)
    whole = length // period
    begins = None if resets is None else jnp.asarray(resets)[::period]
    grid = jax.tree.map(
        lambda leaf: leaf[: whole * period].reshape(whole, period, *leaf.shape[1:]), x
    )

    def renew(held, begin):
        if begin is None:
            return held
        fresh = level.init(params)
        new = (fresh.fast, fresh.optimizer, fresh.carry)
        return jax.tree.map(lambda a, b: jnp.where(begin, a, b), new, held)

    @jax.checkpoint
    def body(held, inputs):
        tokens, following, begin = inputs
        fast, optimizer, anchor = renew(held, begin)
        after = jax.tree.map(lambda leaf: leaf[:1], following)
        *new, outputs, carry = learner.learn(params, fast, optimizer, anchor, tokens, after)
        return (*new, carry), outputs

    held, outputs = (state.fast, state.optimizer, state.carry), []
    if whole > 1:
        tokens = jax.tree.map(lambda leaf: leaf[:-1], grid)
        following = jax.tree.map(lambda leaf: leaf[1:], grid)
        flags = None if begins is None else begins[: whole - 1]
        held, y = jax.lax.scan(body, held, (tokens, following, flags))
        outputs.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), y))
    # The last whole chunk is read; its write waits for the token behind it.
    fast, optimizer, anchor = renew(held, None if begins is None else begins[whole - 1])
    tokens = jax.tree.map(lambda leaf: leaf[-1], grid)
    y, carry = jax.checkpoint(learner.forward)(params, fast, anchor, tokens)
    outputs.append(y)
    state = Adapting(fast, optimizer, carry, anchor, tokens, state.started | True)
    rest = jax.tree.map(lambda leaf: leaf[whole * period :], x)
    flags = None if resets is None else resets[whole * period :]
    y, carry = run(level, params, state, rest, reset=flags)
    y = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs, y)
    return y, carry._replace(position=advance_position(0, length, resets))


def _apply(tx, gradient, state, params, second_order):
    """One step of a transformation."""
    if not second_order:
        gradient = jax.lax.stop_gradient(gradient)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _reducer(reduction):
    reducers = {"mean": jnp.mean, "sum": jnp.sum}
    if reduction not in reducers:
        raise ValueError(f"reduction must be one of {sorted(reducers)}, got {reduction!r}")
    return reducers[reduction]
