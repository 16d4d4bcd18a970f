"""Table of predicted signals of every scheme: `python -m model.weights --layers 192`."""

from __future__ import annotations

import argparse

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.weights.prediction import predict

COLUMNS = (
    "scheme",
    "options",
    "base init",
    "variance, first layer",
    "variance, last",
    "token correlation, last",
    "late gradient, first / last",
)
# Options worth a row of their own beside the defaults.
VARIANTS: dict[str, list[dict[str, float | bool]]] = {
    "post_ln": [{}, {"rescale": True}],
    "b2t": [{}, {"rescale": False}],
    "deepscalelm_pre_ln": [{}, {"k": 4.0}],
}


def signal_table(
    layers: int,
    hidden: int = 512,
    heads: int = 8,
    vocab: int = 32000,
    seq_length: int = 1024,
    dropout: float = 0.0,
) -> str:
    """Markdown table of `predict` for every scheme at its own initialisation.

    The models have a GELU feed-forward, learned positions and Zipf tokens.
    """
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for name, scheme in SCHEMES.items():
        for options in VARIANTS.get(name, [{}]):
            config = ModelConfig(
                scheme=name,
                scheme_options=options,
                num_layers=layers,
                hidden_size=hidden,
                num_attention_heads=heads,
                vocab_size=vocab,
                hidden_dropout=dropout,
                attention_dropout=dropout,
            )
            signals = predict(config, seq_length)
            first, last = signals[0], signals[-1]
            chosen = ", ".join(f"{key}={value}" for key, value in {**scheme.options, **options}.items())
            numbers = (
                first.forward_variance,
                last.forward_variance,
                last.token_correlation,
                first.grad_variance_late,
            )
            rows.append((name, chosen or "-", scheme.base, *(f"{number:.3g}" for number in numbers)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> None:
    """Prints the table for the sizes on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("layers", 192),
        ("hidden", 512),
        ("heads", 8),
        ("vocab", 32000),
        ("seq-length", 1024),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    print(signal_table(**vars(parser.parse_args())), end="")


if __name__ == "__main__":
    main()
