"""Presets of users: what one holds, who sees it, and what becomes of one that this version does not understand."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import __main__ as shell
from engine.core import kept_forms, users
from engine.core.problems import Refusal
from engine.core.rights import Person, may
from engine.runs import own_presets
from engine.runs.own_presets import FOLDER, OwnPreset
from engine.runs.plan import changed_settings
from engine.spec.run_spec import RunSpec
from engine.spec.yaml_text import read_yaml

ADA, BOB, ROOT, NOBODY = (
    Person("ada", "user"),
    Person("bob", "user"),
    Person("root", "operator"),
    Person("", "operator"),
)
SPEC = RunSpec.read(
    {
        "name": "mine",
        "stage": {"kind": "dpo", "beta": 0.3},
        "model": {"model_name_or_path": "models/a", "quantization": "4bit"},
        "method": {"kind": "lora", "r": 8},
        "data": {"datasets": {"pairs": 2}, "max_length": 512},
        "training": {"learning_rate": 5e-4},
        "hardware": {"devices": [1]},
        "extra": {"adam_beta2": 0.95},
    }
)


@pytest.fixture
def saves(tmp_path: Path) -> Path:
    return tmp_path


def names(saves: Path, person: Person) -> list[str]:
    return [preset.name for preset in own_presets.find(saves, person)[0]]


def test_what_is_changed_is_kept_without_what_is_on_this_machine(saves: Path) -> None:
    settings = own_presets.settings_of(SPEC, RunSpec())
    assert settings == {
        "stage": {"kind": "dpo", "beta": 0.3},
        "model": {"quantization": {"kind": "4bit"}},
        "method": {"kind": "lora", "r": 8},
        "data": {"max_length": 512},
        "training": {"learning_rate": 5e-4},
        "extra": {"adam_beta2": 0.95},
    }
    with_places = own_presets.settings_of(SPEC, RunSpec(), places=True)
    assert with_places["data"] == {"datasets": {"pairs": 2.0}, "max_length": 512}
    assert (with_places["model"]["model_name_or_path"], with_places["hardware"]) == ("models/a", {"devices": [1]})
    whole = own_presets.settings_of(SPEC)
    assert RunSpec.read(whole) == SPEC.change("name", "").change("model.model_name_or_path", "").change(
        "data.datasets", {}
    ).change("hardware.devices", [])
    preset = OwnPreset("x", "x", "", True, settings)
    applied = own_presets.applied(preset, RunSpec().change("model.model_name_or_path", "mine").change("name", "run"))
    assert (applied.spec.model.model_name_or_path, applied.spec.name, applied.problems) == ("mine", "run", [])
    assert {change.path for change in applied.changes} == {
        "stage", "model.quantization", "method.r", "data.max_length", "training.learning_rate", "extra",
        *(change.path for change in applied.changes if change.path.startswith(("stage.", "model.quantization."))),
    }  # fmt: skip
    assert own_presets.applied(preset, applied.spec).changes == []


def test_a_file_can_be_read_copied_and_replaced(saves: Path, tmp_path: Path) -> None:
    settings = own_presets.settings_of(SPEC, RunSpec())
    preset, replaced = own_presets.save(saves, " 短  回答 / x ", "ada", False, settings)
    file = saves / FOLDER / f"{preset.id}.yaml"
    assert (preset.name, preset.id, replaced) == ("短 回答 / x", "短-回答-x", False)
    assert read_yaml(file.read_text()) == {"name": preset.name, "by": "ada", "shared": False, "settings": settings}
    assert own_presets.save(saves, preset.name, "ada", True, {"training": {"seed": 1}})[1]
    other = own_presets.save(saves, preset.name, "bob", True, {"training": {"seed": 2}})[0]
    assert other.id == "短-回答-x-2"
    (saves / FOLDER / "copied here.yaml").write_text("name: theirs\nsettings: {training: {seed: 3}}\nshared: true\n")
    assert names(saves, ADA) == [preset.name, "theirs", preset.name]
    assert own_presets.get(saves, "copied here", ADA).by == ""
    changed = own_presets.change(saves, other, name="b", shared=False)
    assert (names(saves, ADA), names(saves, BOB)) == ([preset.name, "theirs"], ["b", "theirs", preset.name])
    assert names(saves, ROOT) == ["theirs", preset.name]
    assert len(names(saves, NOBODY)) == 3  # without a login, everybody sees everything
    with pytest.raises(Refusal, match="There is no preset"):
        own_presets.get(saves, changed.id, ADA)
    own_presets.delete(saves, changed)
    for too_late in (own_presets.delete, own_presets.change):
        with pytest.raises(Refusal, match="There is no preset"):
            too_late(saves, changed)
    assert names(saves, BOB) == ["theirs", preset.name]


def test_a_preset_of_another_version_is_used_as_far_as_it_goes() -> None:
    strange = {
        "name": "not this",
        "stage": "sft",
        "method": {"kind": "freeze", "r": 8, "trainable_layers": 3},
        "training": {"learning_rate": "fast", "seed": 7, "warp": 9},
        "data": {"datasets": {"a": -1}, "max_length": 64},
        "logging": 5,
        "nonsense": {"deep": {"deeper": 1}},
        3: 4,
    }
    begun = RunSpec().change("name", "run").change("data.datasets", ["kept"])
    applied = own_presets.applied(OwnPreset("x", "x", "", True, strange), begun)
    assert {problem.field.split(".")[0] for problem in applied.problems} == {
        "method", "training", "data", "logging", "nonsense", "3",
    }  # fmt: skip
    expected = begun.change("method", {"kind": "freeze", "trainable_layers": 3})
    assert applied.spec == expected.change("training.seed", 7).change("data.max_length", 64)
    unusable = own_presets.applied(OwnPreset("x", "x", "", True, {"method": {"kind": "oft", "r": 1}}), begun)
    assert (unusable.spec, len(unusable.problems)) == (begun, 1)


def test_a_file_is_read_again_only_after_a_change(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        own_presets.save(saves, name, "ada", name == "b", {"training": {"seed": 1}})
    (saves / FOLDER / "broken.yaml").write_text("[")
    own_presets.find(saves, ADA)
    reads: list[str] = []
    read = own_presets.read_bytes
    monkeypatch.setattr(own_presets, "read_bytes", lambda path, most: reads.append(path.name) or read(path, most))
    listed = [own_presets.find(saves, person) for person in (ADA, BOB, ROOT, ADA)]
    assert reads == []
    assert listed[0] == listed[3]
    assert [len(presets) for presets, _ in listed[:2]] == [3, 1]
    (saves / FOLDER / "broken.yaml").write_text("name: mended\nsettings: {nonsense: {deep: [1]}}")
    assert names(saves, ROOT) == ["b", "mended"]
    (saves / FOLDER / "b.yaml").unlink()
    assert (names(saves, ROOT), reads) == (["mended"], ["broken.yaml"])


def test_a_change_keeps_what_others_have_changed_meanwhile(saves: Path) -> None:
    seen, _ = own_presets.save(saves, "mine", "ada", True, {"training": {"seed": 1}})
    own_presets.save(saves, "mine", "ada", False, {"training": {"seed": 2}})
    own_presets.change(saves, seen, name="renamed")
    [now] = own_presets.find(saves, ADA)[0]
    assert (now.name, now.shared, now.settings) == ("renamed", False, {"training": {"seed": 2}})
    own_presets.disown(saves, "ada")
    for change in (own_presets.delete, own_presets.change):
        with pytest.raises(Refusal, match="There is no preset"):
            change(saves, now)  # the right to do so was that of its owner
    assert names(saves, ROOT) == ["renamed"]


def test_the_presets_of_a_removed_user_are_not_those_of_the_next_with_that_name(
    saves: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ada", "bob"):
        users.add_user(saves / "users.txt", name, None)
        for shared in (True, False):
            own_presets.save(saves, f"{name}'s {shared}", name, shared, {"training": {"seed": 1}})
    where = ["--auth", str(saves / "users.txt"), "--saves", str(saves)]
    monkeypatch.setattr("sys.argv", ["engine", "user", "remove", "ada", *where])
    assert shell.main() == 0, capsys.readouterr()
    users.add_user(saves / "users.txt", "ada", None, take_over=True)
    assert names(saves, ADA) == ["ada's True", "bob's True"]
    assert names(saves, BOB) == ["bob's False", "bob's True", "ada's True"]
    assert names(saves, ROOT) == ["ada's False", "ada's True", "bob's True"]
    assert may(ADA, "change-preset", own_presets.find(saves, ADA)[0][0].by)


HOSTILE = {
    "empty": "",
    "list": "- 1",
    "alias": "a: &a [1]\nb: *a",
    "deep": "a: " + "[" * 1000,
    "more": "name: x\nsettings: {}\nrun: rm -rf /",
    "types": "name: 1\nsettings: []",
    "code": "!!python/object/apply:os.system ['true']",
    "binary": "\x00\x01",
    "large": "name: x\nsettings: {a: '" + "x" * own_presets.MAX_BYTES + "'}",
}


def test_a_broken_file_is_a_sentence_and_no_more(saves: Path) -> None:
    own_presets.save(saves, "good", "ada", True, {"training": {"seed": 1}})
    for name, text in HOSTILE.items():
        (saves / FOLDER / f"{name}.yaml").write_text(text)
    (saves / FOLDER / "pipe.yaml").symlink_to("/dev/zero")
    (saves / FOLDER / "folder.yaml").mkdir()
    presets, problems = own_presets.find(saves, ADA)
    assert [preset.name for preset in presets] == ["good"]
    assert {problem.values["file"].removesuffix(".yaml") for problem in problems} == HOSTILE.keys()
    for problem in problems:
        for language in ("en", "zh"):
            assert problem.values["file"] in problem.text(language)
            assert len(problem.text(language)) < 400
    for id in ("../../etc/passwd", "", ".", "..", "/etc/passwd", "a\0", "no such", "folder", "x" * 5000):
        with pytest.raises(Refusal):
            own_presets.get(saves, id, ADA)


def test_names_and_numbers_have_limits(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = {"training": {"seed": 1}}
    for name in ("", " \n ", "x" * 61, "a\x1b[2J", "\u202e"):
        with pytest.raises(Refusal):
            own_presets.save(saves, name, "ada", True, seed)
    with pytest.raises(Refusal, match="nothing to save"):
        own_presets.save(saves, "a", "ada", True, own_presets.settings_of(SPEC, SPEC))
    with pytest.raises(Refusal, match="larger than"):
        own_presets.save(saves, "a", "ada", True, {"extra": {"x": "y" * own_presets.MAX_BYTES}})
    monkeypatch.setattr(own_presets, "MAX_PER_OWNER", 2)
    for name in ("a", "b", "a"):
        own_presets.save(saves, name, "ada", True, seed)
    with pytest.raises(Refusal, match="limit"):
        own_presets.save(saves, "c", "ada", True, seed)
    a, b = own_presets.find(saves, ADA)[0]
    with pytest.raises(Refusal, match="already"):
        own_presets.change(saves, b, name=a.name)
    for name, why in {
        " ": "Give the preset a name",
        "demo:  DPO": "comes with Athanor",
        "x" * 61: "at most 60",
    }.items():
        with pytest.raises(Refusal, match=why):
            own_presets.save(saves, name, "bob", True, seed)
    own_presets.save(saves, "c", "bob", True, seed)
    (saves / "file").write_text("")
    with pytest.raises(Refusal, match="cannot be changed"):
        own_presets.save(saves / "file", "d", "ada", True, seed)


def test_what_is_changed_is_told_against_the_kinds_that_are_chosen() -> None:
    start = RunSpec().change("training.learning_rate", 2e-3).change("method.r", 16)
    spec = start.change("stage", "dpo").change("training.learning_rate", 1e-3).change("data.datasets", ["x"])
    assert {change.path: change.values for change in changed_settings(spec, start)} == {
        "stage": ("sft", "dpo"),
        "training.learning_rate": (2e-3, 1e-3),
    }
    spec = spec.change("stage.beta", 0.4).change("method", {"kind": "full"}).change("name", "x")
    changed = [change.path for change in changed_settings(spec, start)]
    assert changed == ["stage", "stage.beta", "method", "training.learning_rate"]
    assert changed_settings(start, start) == []


def test_the_shell_saves_lists_applies_and_deletes(
    saves: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "ada")
    spec = saves / "spec.yaml"
    spec.write_text(SPEC.to_yaml(brief=True))
    other = saves / "other.yaml"
    other.write_text("model: {model_name_or_path: m}\ntraining: {seed: 5}\n")

    def engine(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["engine", "presets", *words, "--saves", str(saves)])
        status = shell.main()
        return status, *capsys.readouterr()

    assert engine("save", "Pairs", str(spec), "--changed", "--private") == (0, "Pairs\n", "")
    assert engine("list")[1] == "Pairs\tada\tprivate\tPairs\n"
    assert "beta: 0.3" in engine("show", "Pairs")[1]
    status, printed, notes = engine("apply", "Pairs", str(other))
    assert status == 0
    assert RunSpec.from_yaml(printed).training.model_dump(include={"seed", "learning_rate"}) == {
        "seed": 5, "learning_rate": 5e-4,
    }  # fmt: skip
    assert "training.learning_rate: 0.0001 → 0.0005" in notes
    assert engine("rename", "Pairs", "Two words")[0] == engine("share", "Two words")[0] == 0
    assert engine("list")[1] == "Pairs\tada\tshared\tTwo words\n"
    (saves / FOLDER / "bad.yaml").write_text("[")
    assert "bad.yaml" in engine("list")[2]
    assert engine("delete", "Pairs")[0] == 0
    for words in (("save", "x"), ("show",), ("apply", "none", str(other)), ("save", "x", str(saves / "gone"))):
        assert engine(*words)[0] == 2


def test_a_form_is_kept_for_its_user_and_for_nobody_else(saves: Path) -> None:
    kept_forms.keep(saves, "ada", "one")
    kept_forms.keep(saves, "ada", "two")
    for user in ("", "../ada", "a/b", "x" * 99):
        kept_forms.keep(saves, user, "evil")
        assert kept_forms.kept(saves, user) == ""
    kept_forms.keep(saves, "ada", "x" * (kept_forms.MAX_BYTES + 1))
    kept_forms.keep(saves, "ada", "half \ud800")
    assert (kept_forms.kept(saves, "ada"), kept_forms.kept(saves, "bob")) == ("two", "")
    [file] = (saves / kept_forms.FOLDER).iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    kept_forms.forget(saves, "ada")
    kept_forms.forget(saves, "ada")
    assert kept_forms.kept(saves, "ada") == ""
