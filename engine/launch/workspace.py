"""Where this installation keeps its models, data and runs: the root folders that nothing may leave.

`app.py` and `python -m engine` read the same flags and environment variables from here, so that the page and the
command line use the same folders.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.core.problems import Problem, Refusal, problem
from engine.core.project import PROJECT
from engine.core.rundir import RESULT_FILE
from engine.models.adapters import ADAPTER_FILES
from engine.models.discovery import SMOLLM2, identity
from engine.spec.run_spec import RunSpec

PRESETS = Path(__file__).parent / "presets"
# Data sets and the demo models that come with Athanor: in the checkout, or where pip puts files that are not modules.
SHIPPED_DATA = next(
    (folder for folder in (PROJECT / "data", Path(sys.prefix) / "share" / "athanor" / "data") if folder.is_dir()),
    PROJECT / "data",
)
# The folder in which an installation keeps its own files: the checkout or, if installed by pip, the working directory.
HOME = PROJECT if SHIPPED_DATA == PROJECT / "data" else Path.cwd()
DEMO_MODEL = SHIPPED_DATA / "demo_model"
DEMO_VISION_MODEL = SHIPPED_DATA / "demo_vision_model"
DEMO_PICTURES = "shapes"  # the folder next to the data sets with the images of some


@dataclass(frozen=True)
class Workplace:
    """The root folders of one installation; every path is absolute."""

    models: tuple[Path, ...] = tuple(dict.fromkeys((HOME / "models", HOME / "data", SHIPPED_DATA)))
    data: Path = HOME / "data"
    saves: Path = HOME / "saves"
    reward_files: tuple[Path, ...] = ()  # folders whose Python files may run as rewards
    remote_code: tuple[str, ...] = ()  # identities of models whose own Python code the operator allows to run
    import_from: tuple[Path, ...] = ()  # folders with runs of another program, which may be imported

    @property
    def model_roots(self) -> tuple[Path, ...]:
        """The folders that may contain a model: the model folders, and the results of runs."""
        return (*self.models, self.saves)

    def presets(self) -> dict[str, Mapping[str, Any]]:
        """Presets: name → {"title": {"en", "zh"}, "spec": part of a spec}. They are shared, so not to be changed."""
        return _presets()

    def default_spec(self) -> RunSpec:
        """What the form shows at first: the demo, whose model and data are always available."""
        return self.preset("demo")

    def preset(self, name: str) -> RunSpec:
        """A preset as a complete spec, with the paths of this workplace."""
        spec = RunSpec.read(dict(self.presets()[name]["spec"])).change("data.dataset_dir", str(self.data))
        bundled = {"demo": DEMO_MODEL, "demo_vision": DEMO_VISION_MODEL, "smollm2": SMOLLM2}
        shipped = bundled.get(spec.model.model_name_or_path)
        return spec.change("model.model_name_or_path", str(shipped)) if shipped else spec

    def frozen(self, spec: RunSpec) -> RunSpec:
        """The spec with absolute paths, so that it runs unchanged from any folder."""
        paths = {
            "model.model_name_or_path": (spec.model.model_name_or_path, self.model_roots, "config.json"),
            "model.adapter_path": (spec.model.adapter_path, self.model_roots, ADAPTER_FILES[0]),
            "model.chat_template": (template_file(spec), (self.data, *self.models), ""),
            "stage.reward_model": (_stage_setting(spec, "reward_model"), self.model_roots, RESULT_FILE),
            "stage.reward_file": (_stage_setting(spec, "reward_file"), self.reward_files, ""),
        }
        for field, (text, roots, holds) in paths.items():
            if text:
                spec = spec.change(field, absolute_path(text, roots, holds))
        # "data" is the default, and means the data folder of this installation wherever that is.
        data = self.data if Path(spec.data.dataset_dir) == Path("data") else spec.data.dataset_dir
        return spec.change("data.dataset_dir", os.path.abspath(data))

    def allows_code_of(self, model: str) -> bool:
        """Whether the operator allows running this model's own Python code."""
        return identity(model) in self.remote_code

    def problems(self, spec: RunSpec) -> list[Problem]:
        """Paths in the spec that leave the root folders of this installation."""
        problems = []
        roots = {
            "data.dataset_dir": (spec.data.dataset_dir, (self.data,)),
            "model.adapter_path": (spec.model.adapter_path, self.model_roots),
            "model.chat_template": (template_file(spec), (self.data, *self.models)),
            "stage.reward_model": (_stage_setting(spec, "reward_model"), self.model_roots),
            "stage.reward_file": (_stage_setting(spec, "reward_file"), self.reward_files),
        }
        for field, (path, allowed) in roots.items():
            if path and not is_inside(Path(path), allowed):
                code = "reward-file-not-allowed" if field == "stage.reward_file" else "path-outside"
                problems.append(problem(code, field, path=path, roots=", ".join(map(str, allowed)) or "—"))
        return problems


@functools.cache
def _presets() -> dict[str, Mapping[str, Any]]:
    return {
        path.stem: yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        for path in sorted(PRESETS.glob("*.yaml"))
    }


def _stage_setting(spec: RunSpec, name: str) -> str | None:
    """A setting that only some stages have."""
    return getattr(spec.stage, name, None)


def is_inside(path: Path, roots: tuple[Path, ...]) -> bool:
    """Whether `path`, with links resolved, is one of `roots` or inside one."""
    try:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):
        return False
    return any(real.is_relative_to(root.resolve()) for root in roots)


def absolute_path(text: str, roots: Sequence[Path], holds: str = "") -> str:
    """The full path that `text` refers to, here or inside one of `roots`, if it exists and contains the file `holds`;
    otherwise `text` unchanged."""
    candidates = (Path(root, text) for root in (Path(), *roots))
    # os.path.exists returns False for invalid paths, for which Path.exists raises.
    return next((os.path.abspath(path) for path in candidates if os.path.exists(path / holds)), text)


def template_file(spec: RunSpec) -> str | None:
    """The path in `model.chat_template`, if it is a path and not the name of a built-in template."""
    template = spec.model.chat_template
    return template if template and ("/" in template or template.endswith((".jinja", ".j2"))) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags for the folders of an installation, each with its environment variable."""
    parser.add_argument(
        "--models",
        metavar="DIR",
        type=Path,
        nargs="+",
        action="extend",
        help="folders to search for models [ATHANOR_MODELS, separated by ':'; default: models and data]",
    )
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="folder with dataset_info.json [ATHANOR_DATA; default: data]"
    )
    parser.add_argument("--saves", metavar="DIR", type=Path, help="where runs are kept [ATHANOR_SAVES; default: saves]")
    parser.add_argument(
        "--engine",
        metavar="NAME",
        dest="run_engine",
        default=os.environ.get("ATHANOR_ENGINE") or None,
        help=(
            "what starts the runs: local, on this machine, or slurm; kept in engine.yaml of the saves folder "
            "[ATHANOR_ENGINE; default: local]"
        ),
    )
    parser.add_argument(
        "--reward-files",
        metavar="DIR",
        type=Path,
        nargs="+",
        action="extend",
        help=(
            "folders whose Python files may be used as GRPO rewards "
            "[ATHANOR_REWARD_FILES, separated by ':'; default: none]"
        ),
    )
    parser.add_argument(
        "--allow-remote-code",
        metavar="MODEL",
        nargs="+",
        action="extend",
        help="models (paths or hub IDs) whose own Python code may run [ATHANOR_ALLOW_REMOTE_CODE, separated by ',']",
    )
    parser.add_argument(
        "--import-from",
        metavar="DIR",
        type=Path,
        nargs="+",
        action="extend",
        help=(
            "folders with finished trainings of LLaMA-Factory, usually its saves, which users may import on the Runs "
            "tab [ATHANOR_IMPORT_FROM, separated by ':'; default: none]"
        ),
    )


def from_arguments(arguments: argparse.Namespace) -> Workplace:
    """The workplace from flags and environment. Creates nothing: see `make_saves`."""
    environment = os.environ.get
    default = Workplace()

    def folders(paths: list[Path] | None, variable: str) -> list[Path]:
        return paths or [Path(path) for path in environment(variable, "").split(os.pathsep) if path]

    models = folders(arguments.models, "ATHANOR_MODELS")
    remote = arguments.allow_remote_code or environment("ATHANOR_ALLOW_REMOTE_CODE", "").split(",")
    # The demo models and that of `make smollm2` are always available, whatever other folders there are.
    roots = (*(path.resolve() for path in models), DEMO_MODEL, DEMO_VISION_MODEL, SMOLLM2) if models else default.models
    return Workplace(
        models=roots,
        data=Path(arguments.data or environment("ATHANOR_DATA") or default.data).resolve(),
        saves=Path(arguments.saves or environment("ATHANOR_SAVES") or default.saves).resolve(),
        reward_files=tuple(path.resolve() for path in folders(arguments.reward_files, "ATHANOR_REWARD_FILES")),
        import_from=tuple(path.resolve() for path in folders(arguments.import_from, "ATHANOR_IMPORT_FROM")),
        remote_code=tuple(identity(absolute_path(model.strip(), roots)) for model in remote if model.strip()),
    )


def make_saves(workplace: Workplace) -> Problem | None:
    """Create the saves folder if it does not exist, and return a note, because the path may be a typo. Raises
    Refusal."""
    if workplace.saves.is_dir():
        return None
    try:
        workplace.saves.mkdir(parents=True)
    except OSError as error:
        raise Refusal(problem("saves-not-writable", folder=workplace.saves, why=error.strerror)) from error
    return problem("saves-made", folder=workplace.saves)


def make_data(workplace: Workplace) -> Problem | None:
    """Create the data folder with the sample data sets if it does not exist, and return a note, because the path may be
    a typo. Raises Refusal."""
    if workplace.data.is_dir():
        return None
    try:
        workplace.data.mkdir(parents=True)
        for file in SHIPPED_DATA.glob("*.json"):
            shutil.copyfile(file, workplace.data / file.name)
        shutil.copytree(SHIPPED_DATA / DEMO_PICTURES, workplace.data / DEMO_PICTURES)
    except OSError as error:
        raise Refusal(problem("data-not-made", folder=workplace.data, why=error.strerror)) from error
    return problem("data-made", folder=workplace.data)
