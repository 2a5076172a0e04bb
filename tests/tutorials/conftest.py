"""Puts the tutorials, which are scripts and not a package, on the import path."""

from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "tutorials"


@pytest.fixture(autouse=True)
def tutorials_importable(monkeypatch):
    """Lets tests import the tutorials' modules by name."""
    monkeypatch.syspath_prepend(str(TUTORIALS))
