"""The image, as far as it can be known without a Docker: what is copied into it runs as its last line says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from engine.core import users
from engine.launch.workspace import PROJECT
from tests.conftest import wait_until
from tests.ports import reserved_ports

DOCKERFILE = (PROJECT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
IGNORED = [
    line
    for line in (PROJECT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name}\s+(.*)$", DOCKERFILE, re.MULTILINE)


def ignored(path: Path) -> bool:
    """Docker's rule: a pattern is of the whole path, or of any part of it after **/."""
    name = path.relative_to(PROJECT).as_posix()
    return any(
        fnmatch(path.name, one.removeprefix("**/")) if one.startswith("**/") else fnmatch(name, one) for one in IGNORED
    )


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What `docker build .` would see of a clone in which people have worked."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if ignored(Path(folder, name))}

    return shutil.copytree(PROJECT, tmp_path / "app", ignore=left_out)


def test_what_is_copied_is_there_and_what_is_private_or_large_is_not(context: Path) -> None:
    for sources in instructions("COPY"):
        assert all((context / source).exists() for source in sources.split()[:-1])
    inside = {path.name for path in context.iterdir()}
    assert {"app.py", "engine", "webui", "data", "requirements.txt"} <= inside
    assert not inside & {".git", ".venv", "saves", "models", "tests", "bench", "users.txt", "users.secret"}
    for name in (
        "users.txt",
        "users.secret",
        "deep/a.secret",
        "deep/.env",
        "deep/__pycache__",
        "models",
        "saves",
    ):
        assert ignored(PROJECT / name), name


@pytest.fixture
def port() -> Iterator[str]:
    with reserved_ports(1) as [number]:
        yield str(number)


@pytest.mark.slow
def test_the_image_starts_and_its_health_check_tells_a_studio_from_none(
    context: Path, port: str, tmp_path: Path
) -> None:
    places = {name: str(tmp_path / name.strip("/")) for name in ("/models", "/data", "/saves", "/config")}
    shutil.copytree(context / "data", places["/data"])  # as the image does, for a new volume
    for folder in ("/models", "/saves", "/config"):
        Path(places[folder]).mkdir()
    users.add_user(Path(places["/config"], "users.txt"), "ada", "correct horse")

    def here(text: str) -> str:
        return re.sub(r"^/(models|data|saves|config)\b", lambda found: places[found[0]], text)

    settings = dict(one.split("=", 1) for one in " ".join(instructions("ENV")).split())
    environment = {name: here(value) for name, value in settings.items() if name != "PATH"}
    command = [port if word == "7860" else here(word) for word in json.loads(instructions("CMD")[-1])]
    # HEALTHCHECK's own CMD stands behind its flags.
    check = json.loads(instructions("HEALTHCHECK")[0].split("CMD", 1)[1])
    check = [word.replace("7860", port) for word in check]
    assert check[0] == command[0] == "python"

    def healthy() -> bool:
        return subprocess.run([sys.executable, *check[1:]], capture_output=True, check=False).returncode == 0

    assert not healthy()
    studio = subprocess.Popen([sys.executable, *command[1:]], cwd=context, env=os.environ | environment)
    try:
        wait_until(healthy, every=0.5)
    finally:
        studio.kill()
        studio.wait()


def test_compose_says_what_the_image_and_the_documentation_say() -> None:
    compose = yaml.safe_load((PROJECT / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = compose["services"].values()
    (port,), (check,) = instructions("EXPOSE"), instructions("HEALTHCHECK")
    flags, test = check.split("CMD", 1)
    assert service["ports"] == [f"{port}:{port}"]
    assert service["healthcheck"]["test"] == ["CMD", *json.loads(test)]
    for name, value in re.findall(r"--(\S+)=(\S+)", flags):
        assert service["healthcheck"][name.replace("-", "_")] == value
    documented = (PROJECT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"docker run -d (.*?)athanor\n\n", documented, re.DOTALL)
    assert re.findall(r"-v (\S+)", command) == service["volumes"]
    assert [volume.split(":")[1] for volume in service["volumes"]] == json.loads(instructions("VOLUME")[0])
    assert re.search(r"--shm-size (\S+)", command)[1] == service["shm_size"].removesuffix("b")
    assert re.search(r"--restart (\S+)", command)[1] == service["restart"]
    limits = dict(re.findall(r"--log-opt (\S+?)=(\S+)", command))
    assert service["logging"] == {"driver": "json-file", "options": limits}
    (cards,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert cards == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    named = {volume.split(":")[0] for volume in service["volumes"] if not volume.startswith("/")}
    assert {volume["name"] for volume in compose["volumes"].values()} == named == set(compose["volumes"])


def test_whoever_ends_orphans_is_a_package_and_an_entry_of_the_image() -> None:
    (entry,) = instructions("ENTRYPOINT")
    program = json.loads(entry)[0]
    assert re.search(rf"apt-get install [^&]*\b{program}\b", DOCKERFILE)
    assert instructions("USER") == ["athanor"]
    assert json.loads(instructions("VOLUME")[0]) == ["/models", "/data", "/saves", "/config"]
