"""Parity of two implementations: measures of how much their work differs, and tolerances."""

from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
Values = Mapping[str, float]
TINY = 1e-30  # avoids a division by zero
# Maximum difference between a peer and mae_jax, by dtype. Measured on CPUs with transformers and
# the official code, ViT-Ti and ViT-S, f32 and bf16: "flipped" 1e-7 and 3e-3 (unrelated gradients:
# 0.5; a bf16 step that predicts 9 of 10 masked patches: 2e-2); "update" 2e-5 and 8e-6 (no weight
# decay: 1e-3; float32 rounding of parameters near one: 1e-4); "grad_norm" 1e-5 and 1e-3; "tokens"
# in bf16 1e-2.
TOLERANCES = {
    "f32": dict(loss=1e-4, grad_norm=1e-3, flipped=1e-3, update=5e-4, next_loss=1e-3, tokens=1e-4),
    "bf16": dict(loss=5e-3, grad_norm=5e-3, flipped=1e-2, update=5e-4, next_loss=5e-3, tokens=2e-2),
}
DESCRIPTIONS = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "next_loss": "loss after one step",
    "flipped": "signs of the parameter updates",
    "update": "parameter updates",
    "tokens": "encoder tokens",
}


def find_mismatches(dtype: str, ours: Values, theirs: Values, compared: Values) -> list[str]:
    """Return one line for every measure above its tolerance.

    Args:
      dtype: "f32" or "bf16".
      ours, theirs: results of the first steps of the two workers.
      compared: differences of their outputs, by measure.
    """
    lines = []
    if theirs["parameters"] != ours["parameters"]:
        lines.append(f"{theirs['parameters']:,} parameters instead of {ours['parameters']:,}")
    differences = dict(compared)
    for name in ("loss", "grad_norm", "next_loss"):
        if name in ours:
            differences[name] = abs(theirs[name] - ours[name]) / abs(ours[name])
    for name, difference in differences.items():
        tolerance = TOLERANCES[dtype][name]
        if not difference <= tolerance:  # NaN fails too
            values = f" ({theirs[name]:.6g} vs {ours[name]:.6g})" if name in ours else ""
            lines.append(
                f"{DESCRIPTIONS[name]}: relative difference {difference:.2g}{values} exceeds "
                f"{tolerance:g}"
            )
    return lines


def compare_updates(before: Arrays, ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """Return how much two first steps of AdamW differ.

    A first step is the learning rate times the sign of the gradient, plus weight decay. Rounding
    flips the sign where the gradient is near zero: "flipped" is the share of flipped signs over all
    parameters. "update" detects another learning rate, weight decay or set of decayed parameters:
    the median difference over the median update, maximum over the parameters. Biases of attention
    keys are left out, since their true gradient is zero.
    """
    count, flipped, differences = 0, 0, []
    for name, start in before.items():
        one, other = (
            _without_key_bias(name, after[name].astype(np.float32) - start)
            for after in (ours, theirs)
        )
        count += one.size
        flipped += int((np.sign(one) != np.sign(other)).sum())
        one, other = _subsample(one), _subsample(other)
        difference = float(np.median(np.abs(one - other)))
        differences.append(difference / max(float(np.median(np.abs(one))), TINY))
    return {"flipped": flipped / count, "update": float(np.max(differences))}  # keeps NaN


def _without_key_bias(name: str, update: np.ndarray) -> np.ndarray:
    if not name.endswith("attn/qkv/bias"):
        return update
    queries, _, values = np.split(update, 3, axis=-1)
    return np.concatenate([queries, values], axis=-1)


def _subsample(values: np.ndarray) -> np.ndarray:
    """Return about a million evenly spaced values, enough for a median."""
    return values.ravel()[:: max(1, values.size // 2**20)]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
