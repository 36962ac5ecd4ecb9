"""The real studio behind a real nginx with `docs/nginx.conf`: TLS, below a sub-path and on a host of its own."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from gradio_client import Client

from engine.core import users
from engine.core.sockets import KEEP_ALIVE_SECONDS
from engine.data.uploads import MAX_UPLOAD_BYTES
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from tests.conftest import start_studio, wait_until
from tests.find_nginx import nginx
from tests.ports import reserved_ports
from webui.body_limit import MAX_BODY_BYTES, MULTIPART_BYTES

pytestmark = pytest.mark.usefixtures("forked")

CONFIGURATION = (PROJECT / "docs" / "nginx.conf").read_text(encoding="utf-8")
UVICORN_KEEP_ALIVE_SECONDS = 5  # its own default
BROWSER = {"Accept": "text/html"}
MAIN = """
daemon off; {user} worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    access_log off; keepalive_timeout 2s;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/athanor.conf;
}}
"""


def configured(name: str) -> list[str]:
    return re.findall(rf"^\s*{name}\s+(\S+);", CONFIGURATION, re.MULTILINE)


def test_nginx_takes_what_the_studio_takes() -> None:
    limits = [f"{limit >> 20}m" for limit in (MAX_BODY_BYTES, MAX_UPLOAD_BYTES + MULTIPART_BYTES)]
    assert configured("client_max_body_size") == limits


def test_nginx_hangs_up_before_the_studio() -> None:
    (seconds,) = configured("keepalive_timeout")
    assert int(seconds.removesuffix("s")) < KEEP_ALIVE_SECONDS


@dataclass
class Site:
    """A studio behind nginx. `root`: the sub-path, or nothing."""

    root: str
    plain: int  # port of http://
    port: int  # port of https://
    saves: Path
    trust: ssl.SSLContext
    studio: subprocess.Popen[str]

    @property
    def origin(self) -> str:
        return f"https://localhost:{self.port}"

    def client(self) -> httpx.Client:
        """Somebody's browser before the login."""
        return httpx.Client(base_url=self.origin + self.root, verify=self.trust, trust_env=False, timeout=60)

    @contextmanager
    def login(self) -> Iterator[httpx.Client]:
        form = {"name": "ada", "password": "correct horse"}
        with self.client() as browser:
            answer = browser.post("/login", data=form, headers={"Origin": self.origin})
            assert (answer.status_code, answer.headers["location"]) == (303, f"{self.root}/")
            yield browser

    def upstream(self) -> set[int]:
        """The studio's open connections, by the port at nginx's end."""
        sockets = psutil.Process(self.studio.pid).net_connections("tcp")
        return {connection.raddr.port for connection in sockets if connection.status == "ESTABLISHED"}


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed one for localhost, and its key."""
    files = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


def start_nginx(folder: Path, root: str, studio: int, plain: int, port: int) -> subprocess.Popen[bytes]:
    """With the configuration of the documentation, changed as it says that one should."""
    public, key = certificate(folder)
    changes = {
        "server 127.0.0.1:7860": f"server 127.0.0.1:{studio}",
        "listen 80": f"listen 127.0.0.1:{plain}",
        "listen 443": f"listen 127.0.0.1:{port}",
        "server_name ai.example": "server_name localhost",
        "/etc/ssl/ai.example.pem": str(public),
        "/etc/ssl/ai.example.key": str(key),
    }
    text = CONFIGURATION if root else CONFIGURATION.replace("/studio/", "/")
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    (folder / "athanor.conf").write_text(text)
    (folder / "main.conf").write_text(MAIN.format(folder=folder, user="" if os.geteuid() else "user root;"))
    command = [nginx(), "-e", "stderr", "-p", folder, "-c", folder / "main.conf"]
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr
    assert "warn" not in tried.stderr.replace('"listen ... http2" directive is deprecated', "")
    return subprocess.Popen(command)


def start_site(folder: Path, root: str, plain: int, secure: int) -> tuple[Site, subprocess.Popen[bytes]]:
    folder.mkdir()
    (folder / "saves").mkdir()
    users.add_user(folder / "users.txt", "ada", "correct horse")
    workplace = Workplace(models=(DEMO_MODEL,), data=PROJECT / "data", saves=folder / "saves")
    flags = ["--trusted-proxy", "127.0.0.1", "--auth", str(folder / "users.txt")]
    studio, address = start_studio(workplace, *flags, *(["--root-path", root] if root else []))
    proxy = start_nginx(folder, root, urlsplit(address).port, plain, secure)
    trust = ssl.create_default_context(cafile=str(folder / "certificate.pem"))
    return Site(root, plain, secure, workplace.saves, trust, studio), proxy


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    if not nginx():
        pytest.skip("nginx is not there, and python -m tests.find_nginx could not fetch it")
    if not shutil.which("openssl"):
        pytest.skip("openssl is not there: it makes the certificate of the test")
    folder = tmp_path_factory.mktemp("sites")
    roots = {"own": "", "sub": "/studio"}
    with reserved_ports(2 * len(roots)) as ports:
        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(start_site, folder / name, root, ports.pop(), ports.pop()) for name, root in roots.items()
            ]
        started = [job.result() for job in jobs]
        try:
            wait_until(lambda: all((folder / name / "pid").exists() for name in roots))
            yield {site.root: site for site, _ in started}
        finally:
            for site, proxy in started:
                for process in (proxy, site.studio):
                    process.terminate()
                    process.wait(120)


@pytest.fixture(params=["", "/studio"])
def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Site:
    return sites[request.param]


@pytest.mark.slow
def test_plain_http_is_sent_to_tls(site: Site) -> None:
    answer = httpx.get(f"http://localhost:{site.plain}{site.root}/?run=a/b", trust_env=False, timeout=60)
    assert (answer.status_code, answer.headers["location"]) == (301, f"https://localhost{site.root}/?run=a/b")
    if site.root:
        answer = httpx.get(f"{site.origin}/studio", verify=site.trust, trust_env=False, timeout=60)
        assert (answer.status_code, answer.headers["location"]) == (301, "/studio/")


@pytest.mark.slow
def test_a_stranger_logs_in_and_sees_a_page_of_right_links(site: Site) -> None:
    with site.client() as stranger:
        answer = stranger.get("/", headers=BROWSER)
        assert (answer.status_code, answer.headers["location"]) == (303, f"{site.root}/login")
        elsewhere = stranger.post("/login", data={"name": "ada"}, headers={"Origin": "https://evil.example"})
        assert elsewhere.status_code == 403
        assert stranger.get("/config").status_code == 401
        assert stranger.get("/healthz").text == "ok"
    with site.login() as browser:
        cookie = next(iter(browser.cookies.jar))
        assert (cookie.secure, cookie.path) == (True, site.root or "/")
        page = browser.get("/", headers=BROWSER)
        assert page.status_code == 200
        assert f'"root":"{site.origin}{site.root}"' in page.text
        assert browser.get("/config").json()["root"] == site.origin + site.root
        links = set(re.findall(r'(?:src|href)="((?!data:|https?://(?!localhost))[^"#]+\.(?:js|css|svg))"', page.text))
        assert len(links) >= 2  # gradio's script and style sheet
        base = f"{site.origin}{site.root}/"
        for link in links:
            assert browser.get(str(httpx.URL(base).join(link))).status_code == 200, link


@pytest.mark.slow
def test_an_event_is_answered(site: Site) -> None:
    with site.login() as browser:
        cookies = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    program = Client(
        f"{site.origin}{site.root}/",
        headers={"Cookie": cookies},
        ssl_verify=site.trust,
        verbose=False,
        analytics_enabled=False,
        httpx_kwargs={"timeout": 60},
    )
    assert program.predict(api_name="/runs") == []


@pytest.mark.slow
def test_a_stream_is_passed_on_as_it_comes(site: Site) -> None:
    with site.login() as browser, browser.stream("GET", "/gradio_api/heartbeat/abc", timeout=30) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "ALIVE" in next(stream.iter_text())


@pytest.mark.slow
def test_an_upload_arrives_and_one_that_is_too_large_is_refused(site: Site) -> None:
    content = b"0123456789abcdef" * (5 << 16)  # 5 MiB, more than any buffer on the way
    with site.login() as browser:
        answer = browser.post("/gradio_api/upload", files={"files": ("a.txt", content)})
        assert Path(answer.json()[0]).read_bytes() == content
        assert Path(answer.json()[0]).is_relative_to(site.saves)
        form = b'{"data": []}'.ljust(MAX_BODY_BYTES)
        browser.headers["Content-Type"] = "application/json"
        assert browser.post("/gradio_api/call/runs", content=form).status_code == 200
        assert browser.post("/gradio_api/call/runs", content=form + b" ").status_code == 413
    request = http.client.HTTPSConnection("localhost", site.port, context=site.trust, timeout=60)
    request.putrequest("POST", f"{site.root}/gradio_api/upload")
    request.putheader("Content-Length", str(MAX_UPLOAD_BYTES + MULTIPART_BYTES + 1))
    request.endheaders()
    assert request.getresponse().status == 413
    request.close()


@pytest.mark.slow
def test_a_request_after_a_pause_finds_an_open_connection(sites: dict[str, Site]) -> None:
    site = sites[""]
    with site.login() as browser:
        before = site.upstream()
        assert before
        time.sleep(UVICORN_KEEP_ALIVE_SECONDS + 0.5)  # more than nginx keeps the browser's connection, too
        assert before & site.upstream(), "the studio hung up first"
        assert browser.post("/gradio_api/call/runs", json={"data": []}).status_code == 200
