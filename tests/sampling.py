"""Of a test with many cases, a few run by default, spread over all of them; the rest are slow.

Not so of a test that is marked ``whole``: what everything else hangs on.
"""

from __future__ import annotations

import collections

import pytest

DEFAULT = 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[tuple[str, str], list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") is None and item.get_closest_marker("whole") is None:
            cases[str(item.path), getattr(item, "originalname", item.name)].append(item)
    for group in cases.values():
        last = len(group) - 1
        chosen = {round(i * last / (DEFAULT - 1)) for i in range(DEFAULT)}
        for i, item in enumerate(group):
            if i not in chosen:
                item.add_marker(pytest.mark.slow)
