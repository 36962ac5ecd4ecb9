"""Prepared rows are kept under a version: it rises whenever the same rows become other ids, labels or weights."""

from engine.worker.data.cache import PREPARATION_VERSION
from tests.mask_fingerprints import fingerprints, recorded, unversioned


def test_the_version_of_prepared_data_rises_with_the_mask() -> None:
    names = unversioned()
    assert not names, (
        f"the same rows become something else with {', '.join(names)}: raise PREPARATION_VERSION in "
        "engine/worker/data/cache.py, then run python -m tests.mask_fingerprints"
    )


def test_the_recorded_fingerprints_are_of_this_version_and_these_templates() -> None:
    assert recorded() == (PREPARATION_VERSION, fingerprints()), "run python -m tests.mask_fingerprints"
