"""Self-modifying Titans token by token in NumPy: shares no code with the library."""

import math

import jax
import numpy as np

GATED = ("learning_rate", "decay")


def gelu(z):
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    return 0.5 * z * (1 + np.tanh(inner))


def gelu_slope(z, step=1e-30):
    """By a complex step: no two values are subtracted, so no digit is lost."""
    return gelu(z + 1j * step).imag / step


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def unit(z):
    return z / np.sqrt(z @ z + 1e-6)


class Memory:
    """One memory of one head: M(z) = z + U gelu(V z) or [z +] U z, its anchor, its own clock."""

    def __init__(self, initial, head, chunk, config, static):
        self.linear, self.residual = config.linear, config.architecture != "linear"
        self.U = np.asarray(initial["outer"][head], np.float64)
        self.V = None if self.linear else np.asarray(initial["inner"][head], np.float64)
        self.SV, self.SU = 0.0 * (0.0 if self.linear else self.V), np.zeros_like(self.U)
        self.chunk, self.count, self.static = chunk, 0, static
        self.anchor = self.start = (self.V, self.U)

    def apply(self, weights, z):
        V, U = weights
        return self.residual * z + U @ (z if self.linear else gelu(V @ z))

    def at_anchor(self, z):
        return self.apply(self.anchor, z)

    def now(self, z):
        return self.apply((self.V, self.U), z)

    def write(self, k, v, learning_rate, decay, momentum, config):
        rule, (V, U) = config.rule, self.anchor
        p = None if self.linear else V @ k
        h = k if self.linear else gelu(p)
        target = v
        if rule.values == "self":
            target = self.at_anchor(v)
            target = unit(target) if rule.targets == "unit" else target
        error = -target if rule.objective == "dot" else self.at_anchor(k) - target
        if rule.dgd == "functional":
            error = error + U @ h
        if rule.inner_clip is not None and rule.clip != "gradient":
            error = error * min(1.0, rule.inner_clip / np.sqrt(error @ error + 1e-12))
        todo = [("U", h, error)]
        if not self.linear and rule.written == "both":
            todo.append(("V", k, (U.T @ error) * gelu_slope(p)))
        for name, x, e in todo if not self.static else []:
            eta, erase = learning_rate, 0.0
            if rule.step == "normalised" and name == "U" and not self.linear:
                eta = eta / (x @ x + 0.01)
            if rule.dgd in ("layerwise", {"V": "input_only", "U": "output_only"}[name]):
                implicit = rule.erase == "implicit"
                erase = eta / (1 + eta * x @ x if implicit else max(1, eta * x @ x))
            gradient = np.outer(e, x)
            if rule.inner_clip is not None and rule.clip != "error":  # of each matrix, too
                norm = np.sqrt((gradient**2).sum() + 1e-12)
                gradient = gradient * min(1.0, rule.inner_clip / norm)
            if rule.objective == "delta" and name == "U":  # of the moment: its part U x is erased
                erase, gradient = eta, np.outer(self.residual * k - target, x)
            velocity = momentum * getattr(self, "S" + name) - eta * gradient
            weight, start = getattr(self, name), self.start[name == "U"]
            kept = decay * weight
            if rule.decay_to == "start":
                kept = start + decay * (weight - start)
            weight = kept - erase * np.outer(weight @ x, x) + velocity
            setattr(self, "S" + name, velocity)
            setattr(self, name, weight)
        self.count += 1
        if self.count % self.chunk == 0:
            self.anchor = (self.V, self.U)


def numpy_loop(config, params, x):
    queried, others = config.chunk_sizes
    length = x.queries.shape[0]
    out = np.zeros(x.queries.shape)
    given = jax.tree.map(lambda a: np.asarray(a, np.float64), x)
    read = {n: np.asarray(v, np.float64) for n, v in params["readout"].items()}
    for head in range(config.heads):
        memories = {
            name: Memory(
                params[name],
                head,
                queried if name == "memory" else others,
                config,
                name in config.static,
            )
            for name in config.memories
        }
        for t in range(length):
            z, zv, q = (
                given.keys[t, head],
                given.values[t, head],
                given.queries[t, head],
            )
            k, v = unit(memories["key"].at_anchor(z)), memories["value"].at_anchor(zv)
            said = {n: config.gate_gain * memories[n].at_anchor(z) for n in GATED}

            def gate(name, of):
                return sigmoid(read[name][head] @ said[of] + read[f"{name}_bias"][head])  # noqa: B023

            decay, rates = gate("decay", "decay"), {"memory": gate("learning_rate", GATED[0])}
            own = config.projection_learning_rate is not None
            rates["others"] = gate(f"projection_{GATED[0]}" if own else GATED[0], GATED[0])
            momentum = given.momentum[t, head] if config.momentum else 0.0
            q = unit(memories["query"].at_anchor(q) if config.adaptive_query else q)
            main = memories["memory"]
            if config.read == "anchor":
                out[t, head] = main.at_anchor(q)
            elif config.read == "running_prev":
                out[t, head] = main.now(q)
            for name, memory in memories.items():
                rate = config.max_learning_rate * rates.get(name, rates["others"])
                memory.write(k, v, rate, decay, momentum, config)
            if config.read == "running":
                out[t, head] = main.now(q)
    return out
