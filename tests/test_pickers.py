"""Of thousands of runs a picker offers the newest and what is chosen, and says so."""

from __future__ import annotations

from webui.pickers import MAX_OFFERED, picker
from webui.words import Words

MANY = [(f"run {number}", f"id-{number}") for number in range(2000)]


def test_few_choices_are_all_offered() -> None:
    update = picker(MANY[:10], ["id-3"], "Type to search.", Words("en"))
    assert (update["choices"], update["value"], update["info"]) == (MANY[:10], ["id-3"], "Type to search.")


def test_of_many_the_newest_and_the_chosen_are_offered_and_it_is_said() -> None:
    update = picker(MANY, ["id-1999", "id-3"], "Type to search.", Words("en"))
    assert update["choices"] == [*MANY[:MAX_OFFERED], MANY[1999]]
    assert update["value"] == ["id-1999", "id-3"]
    assert "Only the newest 500 of 2,000 are listed" in update["info"]
    assert "最新的 500 个" in picker(MANY, [], "", Words("zh"))["info"]
