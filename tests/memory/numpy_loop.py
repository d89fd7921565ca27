"""Every memory of the menus token by token in numpy float64: the oracle that shares no code.

Names are those of `tests.memory.points`; what they mean is written down here a second time.
"""

import numpy as np


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def slope(z):
    """By a complex step: exact to rounding."""
    return np.imag(gelu(z + 1e-30j)) / 1e-30


def forward(architecture, weights, x):
    """The output, the input of each matrix, and dout -> the local error of each matrix."""
    if architecture == "gated":
        gate, line, out = weights
        a, b = gate @ x, line @ x
        h = gelu(a) * b

        def pull(dout):
            dh = out.T @ dout
            return dh * b * slope(a), dh * gelu(a), dout

        return x + out @ h, (x, x, h), pull
    inputs, sums = [x], []
    for m, weight in enumerate(weights):
        sums.append(weight @ inputs[-1])
        if m < len(weights) - 1:
            inputs.append(gelu(sums[-1]))

    def pull(dout):
        errors = [dout]
        for m in range(len(weights) - 1, 0, -1):
            errors.append((weights[m].T @ errors[-1]) * slope(sums[m - 1]))
        return tuple(reversed(errors))

    output = sums[-1] + (x if architecture == "deep" else 0)
    return output, tuple(inputs), pull


def output_error(objective, output, value, threshold):
    r = output - value
    norm = np.linalg.norm(r)
    return {
        "dot": lambda: -value,
        "oja": lambda: -value,
        "l2": lambda: r,
        "lp": lambda: np.sign(r) * np.abs(r) ** 2,  # p = 3
        "smooth_lp": lambda: np.tanh(10 * r) * (r**2 + 1e-6) ** 0.25,  # p = 1.5
        "huber": lambda: np.clip(r, -threshold, threshold),
        "huber_norm": lambda: r * min(1.0, 0.7 / norm),
        "huber_mixture": lambda: r if norm <= 0.7 else 0.7 * np.sign(r),
        "robust": lambda: r + 0.3 * r / norm,
    }[objective]()


def link(retention, a):
    if retention == "kl":
        e = np.exp(a - a.max(-1, keepdims=True))
        return 2.0 * e / e.sum(-1, keepdims=True)
    if retention == "lq":
        p = 4 / 3
        return np.sign(a) * np.abs(a) ** (p - 1) / np.sum(np.abs(a) ** p) ** ((p - 2) / p)
    if retention == "lq_printed":
        return a / np.sum(a**4) ** (2 / 4)
    if retention == "bregman_sigmoid":
        return 1 / (1 + np.exp(-a))
    return a


def erase_rate(rule, learning_rate, decay, square, reads_key):
    bounded = learning_rate / max(1.0, learning_rate * square)
    return {
        "delta": bounded,
        "delta+momentum": bounded,
        "explicit_delta": learning_rate,
        "implicit_delta": learning_rate / (1 + learning_rate * square),
        "closed_form_delta": learning_rate / (1 + learning_rate * square),
        "diagonal_closed_form_delta": learning_rate / (1 + learning_rate * square),
        "coupled_delta": decay * learning_rate,
        "input_delta": bounded if reads_key else 0.0,
    }.get(rule, 0.0)


def gradients(names, weights, token):
    """The learning rate times the gradient of one token at `weights`, and the matrices' inputs."""
    architecture, objective, _, rule = names
    output, inputs, pull = forward(architecture, weights, token["keys"])
    error = output_error(objective, output, token["values"], token.get("threshold"))
    if rule == "functional_delta":
        residual = architecture in ("deep", "gated")
        error = error + output - (token["keys"] if residual else 0)
    if objective == "oja":
        inputs = (token["keys"] - weights[0].T @ token["values"],)
    learning_rates = [token["learning_rate"]] * len(weights)
    if rule.endswith("closed_form_delta"):
        learning_rates = [
            learning_rate / (1 + learning_rate * (x @ x))
            for learning_rate, x in zip(learning_rates, inputs, strict=True)
        ]
    errors = pull(error)
    outer = [r * np.outer(e, x) for r, e, x in zip(learning_rates, errors, inputs, strict=True)]
    return outer, inputs


def solve(weight, decay, recent):
    """argmin_W 1/2 sum_i eta_i |W k_i - v_i|^2 + 1/2 |W - decay W'|^2, by its normal equations."""
    system = np.eye(weight.shape[1])
    right = decay * weight
    for token in recent:
        system = system + token["learning_rate"] * np.outer(token["keys"], token["keys"])
        right = right + token["learning_rate"] * np.outer(token["values"], token["keys"])
    return np.linalg.solve(system.T, right.T).T


def run(names, params, tokens, chunk_size):
    """`({read: [T, dv]}, accumulators, momenta)` after all tokens."""
    architecture, _, retention, rule = names
    given = {k: np.asarray(v, np.float64) for k, v in tokens._asdict().items() if v is not None}
    tokens = [{k: v[t] for k, v in given.items()} for t in range(len(given["learning_rate"]))]
    held = [np.asarray(w, np.float64) for w in params]
    momenta = [np.zeros_like(w) for w in held]
    window = int(3 if "omega" in rule else 1)
    reads = {"running_prev": [], "running": [], "anchor": []}

    def linked():
        return [link(retention, w) for w in held]

    def read(name, weights):
        reads[name].append(forward(architecture, weights, token["queries"])[0])

    for t, token in enumerate(tokens):
        if t % chunk_size == 0:
            anchor, summed = linked(), [0.0] * len(held)
        read("anchor", anchor)
        read("running_prev", linked())
        learning_rate, decay = token["learning_rate"], token.get("decay", 1.0)
        recent = tokens[max(0, t - window + 1) : t + 1]
        if rule == "implicit_omega":
            held = [solve(held[0], decay, recent)]
        elif rule == "mean_gradient":
            found, _ = gradients(names, anchor, token)
            summed = [s + g for s, g in zip(summed, found, strict=True)]
            rate = max(0.0, 1 / (t % chunk_size + 1) + token.get("rate_offset", 0.0))
            held = [a - rate * s for a, s in zip(anchor, summed, strict=True)]
        else:
            each = [gradients(names, anchor, past)[0] for past in recent]
            total = [sum(parts) for parts in zip(*each, strict=True)]
            _, inputs = gradients(names, anchor, token)
            reads_key = [True, architecture == "gated", False]
            for m, x in enumerate(inputs):
                momenta[m] = token.get("momentum", 0.0) * momenta[m] - total[m]
                erase = erase_rate(rule, learning_rate, decay, x @ x, reads_key[m])
                erased = np.outer(held[m] @ x, x)
                if rule == "diagonal_closed_form_delta":
                    erased = held[m] * x**2
                held[m] = decay * held[m] - erase * erased + momenta[m]
                if retention == "elastic_net":
                    held[m] = np.sign(held[m]) * np.maximum(
                        np.abs(held[m]) - learning_rate * 0.1, 0
                    )
        read("running", linked())
    return {name: np.array(rows) for name, rows in reads.items()}, held, momenta
