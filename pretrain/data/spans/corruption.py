"""Which spans of a text are hidden, and what is read and predicted instead.

Pure functions of the run's seed and the sample's number, which counts over all passes: every pass
hides other spans, and any of them can be computed again.
"""

from __future__ import annotations

import numpy as np

from pretrain.config.sections.spans import SpanCounts


def parts(raw: np.ndarray, count: int) -> np.ndarray:
    """Returns the lengths of `count` parts of at least one item, int64 [count].

    Every way to cut the items is equally likely.
    raw: random bits of each place between two items, one less than there are items.
    """
    cuts = np.sort(np.argsort(raw, kind="stable")[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [len(raw) + 1]]))


def span_lengths(counts: SpanCounts, key: int) -> np.ndarray:
    """Returns [k, 2] int64: tokens seen before each span, and tokens of the span.

    As in T5's code a text begins with tokens that are seen, and ends with a span.
    key: of `sample_key`.
    """
    # Raw output of the bit generator: numpy promises never to change it.
    raw = np.random.Philox(key=key).random_raw(counts.tokens - 2)
    hidden = parts(raw[: counts.hidden - 1], counts.spans)
    return np.stack([parts(raw[counts.hidden - 1 :], counts.spans), hidden], axis=1)


def corrupted(
    tokens: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns source and target of a text.

    The source has a sentinel in place of each span, the target each span after its sentinel. Both
    end with the end mark.
    tokens: [n] int64. lengths: of `span_lengths`, n in all. sentinels: [k] ids, in order.
    """
    seen, hidden = lengths.T
    inside = np.repeat(np.tile([False, True], len(lengths)), lengths.ravel())
    source = np.insert(tokens[~inside], np.cumsum(seen), sentinels)
    target = np.insert(tokens[inside], np.cumsum(hidden) - hidden, sentinels)
    return np.append(source, end), np.append(target, end)
