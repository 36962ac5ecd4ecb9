"""Notifications about runs: what is sent to whom, once, and to nobody what is secret. The servers are real."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest
import requests

from engine.__main__ import main
from engine.core import audit, users
from engine.core.locks import try_lock
from engine.core.problems import Problem, Refusal, problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import ALIVE_BYTE, append_lines, read_object, write_json
from engine.launch.workspace import PROJECT, Workplace
from engine.notifications import notice, responses, sender, sending, subscriptions
from engine.notifications.policy import Policy, is_public, read_policy
from engine.notifications.sending import Checked
from engine.notifications.subscriptions import Place
from engine.runs import notification_choice, notification_log, notifier, notify, queue, runs
from engine.runs.notice_text import notice_of
from engine.runs.occurrences import occurrences
from engine.runs.run import Run
from engine.spec.run_spec import RunSpec
from tests import stand_in
from tests.conftest import wait_until
from tests.inbox import Inbox, inbox
from tests.past_runs import falling, past_run, run_maker
from tests.ports import reserved_ports
from webui.runs_tab.head_html import unsent
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

SECRET = "sEcReT8713"
HERE = Policy(internal=["127.0.0.1"], studio="https://ai.example/studio")


@pytest.fixture(scope="module")
def servers() -> Iterator[Inbox]:
    with inbox() as kept:
        yield kept


@pytest.fixture
def got(servers: Inbox) -> Inbox:
    """The servers, with nothing in them yet."""
    servers.posts.clear()
    servers.mails.clear()
    servers.status = 200
    return servers


@pytest.fixture
def saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saves folder without a login, whose notifications may stay on this machine."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    folder = tmp_path / "saves"
    folder.mkdir()
    (folder / "notifications.yaml").write_text("internal: [127.0.0.1]\nstudio: https://ai.example/studio\n")
    return folder


def hook(servers: Inbox, path: str = "ok") -> Checked:
    return Checked(f"http://127.0.0.1:{servers.web}/{path}?key={SECRET}", "webhook", "http://127.0.0.1/…")


def subscribe(saves: Path, *addresses: Checked, since: float = 0.0) -> Place:
    """The one person has these addresses, and every event, as if since then."""
    place = subscriptions.place_of(saves)
    for checked in addresses:
        subscriptions.add_address(place, "", "en", checked)
    subscriptions.choose_events(place, "", "en", subscriptions.EVENTS, 2.0)
    assert stat.S_IMODE(place.path.stat().st_mode) == 0o600
    content = read_object(place.path)
    person = content["people"][""]
    person["events"] = dict.fromkeys(person["events"], since)
    for address in person["addresses"]:
        address["since"] = since
    write_json(place.path, content)
    return place


def ended(saves: Path, name: str = "names", outcome: str = "finished", **changes: Any) -> Run:
    """A run that has just ended."""
    spec = RunSpec.read({"name": name, "model": {"model_name_or_path": "org/base"}, "data": {"datasets": ["names"]}})
    run = past_run(saves, spec, falling(20), outcome, at=time.time() - 90)
    write_json(run.dir.progress, {"phase": "saving", "done": 20, "total": 20, "unit": "steps"})
    write_json(run.dir.request, read_object(run.dir.request) | changes)
    return runs.read(run.path, saves)


def due(saves: Path) -> list[notify.Due]:
    return list(notify.all_due(saves, time.time()))


def start(saves: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "engine.runs.notifier", str(saves)], cwd=PROJECT)


def deliveries(run: Run) -> list[notification_log.Delivery]:
    return [delivery for entries in notification_log.read_log(run.dir).values() for delivery in entries.values()]


# --------------------------------------------------------------------------------------------------- from end to end


def test_an_end_is_sent_once_however_many_notice_it_and_no_address_is_written_anywhere(saves: Path, got: Inbox) -> None:
    mail = f"mailto://ada:{SECRET}@127.0.0.1:{got.mail}?to=ada@mail.example&from=athanor@mail.example"
    checked = sending.check(mail, read_policy(saves))
    assert (checked.service, SECRET in checked.shown) == ("email", False)
    place = subscribe(saves, hook(got), checked)
    run = ended(saves, "Nämen → <b>1")
    both = [start(saves), start(saves)]
    notify.look(saves)
    assert [process.wait() for process in both] == [0, 0]
    wait_until(lambda: try_lock(saves / notify.LOCK_FILE, 0, shared=False))
    assert (len(got.posts), len(got.mails)) == (1, 1)
    [(_, body)] = got.posts
    assert body["run"] | {"kind": "training"} == {
        "id": run.id, "name": "Nämen → <b>1", "kind": "training", "stage": "sft", "base": "org/base",
        "owner": None, "state": "finished",
    }  # fmt: skip
    last = [json.loads(line) for line in run.dir.metrics.read_text().splitlines()]
    assert body["metrics"] == {
        name: [line[name] for line in last if name in line][-1] for name in ("loss", "eval_loss")
    }
    assert (body["version"], body["event"], body["duration_seconds"]) == (1, "finished", 60.0)
    assert body["progress"] == {"done": 20, "total": 20, "unit": "steps"}
    assert body["link"].startswith("https://ai.example/studio/?run=base/")
    assert body["title"] == "Athanor: Nämen → <b>1 has finished"
    letter = message_from_string(got.mails[0])
    assert letter["To"] == "ada@mail.example"
    text = "".join(part.get_payload(decode=True).decode() for part in letter.walk() if not part.is_multipart())
    assert "Duration: 1 min" in text
    assert [delivery.state for delivery in deliveries(run)] == ["sent", "sent"]
    written = b"".join(path.read_bytes() for path in saves.rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert SECRET.encode() in place.path.read_bytes()


def test_whoever_looks_next_sends_what_a_killed_process_has_not(saves: Path, got: Inbox) -> None:
    """The supervisor was killed after it had written exit.json; then, what sends is killed before it has sent."""
    place = subscribe(saves, hook(got, "hang"))  # it cannot have sent before it is killed
    run = ended(saves, outcome="failed")
    sends = start(saves)
    wait_until(run.dir.notifications.exists, every=0.001)
    sends.kill()  # and with it ends its child
    sends.wait()
    assert [(delivery.state, delivery.tries) for delivery in deliveries(run)] == [("trying", 1)]
    [left] = due(saves)
    assert left.delivery.next > time.time()  # not before the first try would be over
    change(run, next=0.0)
    place.path.write_text(place.path.read_text().replace("/hang?", "/ok?"))
    notify.look(saves)
    wait_until(lambda: deliveries(run)[0].state == "sent")
    [body] = [body for path, body in got.posts if path.startswith("/ok")]
    assert body["run"]["state"] == "failed"


def change(run: Run, **values: Any) -> None:
    """Change every delivery of a run."""
    log = read_object(run.dir.notifications)
    write_json(
        run.dir.notifications,
        {key: {id: entry | values for id, entry in entries.items()} for key, entries in log.items()},
    )


def test_the_supervisor_of_a_run_sends_without_a_studio(
    workplace: Workplace, make_spec: Callable[..., RunSpec], got: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workplace.saves.parent / "home"))
    (workplace.saves / "notifications.yaml").write_text("internal: [127.0.0.1]")
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, "finish()"))
    subscribe(workplace.saves, hook(got))
    run = runs.submit(make_spec(), workplace)
    wait_until(lambda: got.posts)
    assert got.posts[0][1]["run"]["state"] == runs.get(workplace.saves, run.id).state == "finished"
    assert got.posts[0][1]["link"] is None


# ------------------------------------------------------------------------------------------------- servers that fail


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port where nobody listens."""
    with reserved_ports(1) as [port]:
        yield port


def test_each_failure_is_explained_and_keeps_no_other_waiting(saves: Path, got: Inbox, refusing: int) -> None:
    message = notice.sample(time.time(), "en", "", HERE)
    got.status = 500
    targets = {
        f"http://127.0.0.1:{got.web}/{SECRET}": "notify-status",
        f"http://127.0.0.1:{got.web}/away": "notify-status",
        f"http://127.0.0.1:{got.web}/hang": "notify-sender-silent",
        f"http://127.0.0.1:{refusing}/{SECRET}": "notify-connection-refused",
        "http://127.0.0.2/": "notify-internal",
        "http://localhost:1/": "notify-internal" if not _is_here() else "notify-connection-refused",
        "http://[::ffff:10.0.0.1]/": "notify-internal",
        "http://169.254.169.254/latest": "notify-internal",
        f"https://127.0.0.1:{got.web}/": "notify-certificate",
        "http://nowhere.invalid/": "notify-host-unknown",
        f"ntfy://127.0.0.1:{got.web}/{SECRET}": "notify-status",
        f"mailto://ada:{SECRET}@127.0.0.1:{refusing}?from=a@b.example": "notify-connection-refused",
        "mailto://ada:x@10.0.0.1?from=a@b.example": "notify-internal",
        f"mailtos://ada:{SECRET}@127.0.0.1:{got.mail}?mode=starttls&from=a@b.example": "notify-certificate",
        "syslog://": "notify-scheme",
        "slack://x": "notify-url-of",
    }
    # The process that sends needs some time to begin, on a busy machine much, and gives up an answer after ten seconds.
    for seconds in (5, 12, 20, 30):
        outcomes = sending.send([(url, message) for url in targets], HERE, seconds)
        if [outcome.code for outcome in outcomes].count("notify-sender-silent") == 1:
            break
    assert [outcome and outcome.code for outcome in outcomes] == list(targets.values())
    for outcome in outcomes:
        assert SECRET not in outcome.text("en") + outcome.text("zh") + repr(outcome)


def _is_here() -> bool:
    return socket.gethostbyname("localhost") == "127.0.0.1"


def test_a_failure_is_retried_given_up_and_shown_on_the_runs_page(saves: Path, got: Inbox) -> None:
    subscribe(saves, hook(got))
    run, words = ended(saves), Words("en")
    got.status = 503
    assert notifier.send_due(saves, due(saves), (0.0,)) == 0.0
    assert "has not reached Webhook yet" in unsent(run, words)
    assert notifier.send_due(saves, due(saves), (0.0,)) == 0.0
    assert due(saves) == []
    assert len(got.posts) == 2
    shown = unsent(run, words)
    assert "could not be sent to Webhook after 2 tries: Webhook answered with status 503" in shown
    assert "127.0.0.1" not in shown + run.dir.notifications.read_text()  # the host, too, is the owner's
    got.status = 200
    again = ended(saves, "second")
    notifier.send_due(saves, due(saves), (0.0,))
    assert unsent(again, words) == ""
    run.dir.notifications.write_text('{"1-ended": {"x": {"service": 3}, "y": []}, "z": 1}')
    assert len(due(saves)) == 1  # a damaged record is none


def test_errors_that_messengers_report_as_a_success_are_errors() -> None:
    def answer(host: str, body: object, status: int = 200) -> Problem | None:
        response = requests.Response()
        response.status_code, response._content = status, json.dumps(body).encode()
        return responses.judged(response, host)

    assert answer("open.feishu.cn", {"code": 0, "msg": "success"}) is None
    assert answer("qyapi.weixin.qq.com", {"errcode": 0, "errmsg": "ok"}) is None
    wrong = answer("oapi.dingtalk.com", {"errcode": 310000, "errmsg": "sign not match"})
    assert wrong.text() == "oapi.dingtalk.com did not take the message (error 310000). It answered: sign not match"
    assert answer("open.feishu.cn", {"code": 19024, "msg": "Key Words Not Found"}).code == "notify-code"
    assert answer("hooks.slack.com", {"code": 5}, 404).code == "notify-status"
    assert answer("hooks.slack.com", ["odd"]) is None


# ---------------------------------------------------------------------------------------------- what is sent, and when


def test_nothing_is_sent_of_what_was_before_of_what_nobody_chose_and_of_a_muted_run(saves: Path) -> None:
    ended(saves, "before")
    place = subscriptions.place_of(saves)
    subscriptions.add_address(place, "", "en", Checked("https://h.example/", "webhook", "…"))
    assert due(saves) == []
    subscribe(saves, since=time.time() - 3600)
    old = run_maker(saves)("old", falling(3))
    assert [each.occurrence.run.title for each in due(saves)] == ["before"]
    assert old.state == "finished"
    run = runs.find(saves)[0]
    notification_choice.choose(run, False, "ada")
    assert due(saves) == []
    notification_choice.choose(run, True, "ada")
    assert due(saves) == []  # what has happened meanwhile is not sent late
    ended(saves, "stops", outcome="stopped")
    assert [each.occurrence.event for each in due(saves)] == ["stopped"]
    subscriptions.choose_events(place, "", "en", ["failed"], 2.0)
    assert due(saves) == []
    (saves / "notifications.yaml").write_text("enabled: false")
    ended(saves, "fails", outcome="failed")
    assert due(saves) == []
    for wrong in ("studio: ai.example", "services: [fax]", "internl: []", "internal: 3", "studio: 'https://u:p@h/'"):
        (saves / "notifications.yaml").write_text(wrong)
        with pytest.raises(Refusal, match=r"notifications\.yaml"):
            due(saves)
        notify.look(saves)  # says nothing: no run, queue or page is to suffer


def test_waits_stalls_and_interruptions_are_noticed(saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()

    def seen(run: Run) -> list[tuple[str, str]]:
        run = runs.read(run.path, saves)
        notices = [notice_of(each, HERE, "en") for each in occurrences(run, 2.0, now)]
        return [(each.event, f"{each.title}\n{each.text}") for each in notices]

    run = ended(saves, outcome=None)
    [(event, text)] = seen(run)
    assert (event, "names was interrupted" in text) == ("failed", True)
    lock = try_lock(run.dir.lock, ALIVE_BYTE, shared=True)
    assert seen(run) == []
    write_warning(run.dir, problem("run-stalled", minutes="11", step=7), 7)
    [(event, text)] = seen(run)
    assert (event, "11 minutes" in text) == ("stalled", True)
    progress = {
        "phase": "waiting for space",
        "done": 9,
        "total": 20,
        "unit": "steps",
        "needed": 2 * 10**9,
        "free": 10**6,
    }
    write_json(run.dir.progress, progress)
    assert [event for event, _ in seen(run)] == ["stalled", "space"]
    assert "the next checkpoint needs 2.00 GB, 0.00 GB is free" in seen(run)[1][1]
    os.close(lock)
    for file in (run.dir.keeper, run.dir.progress):
        file.unlink()
    write_json(run.dir.request, {"submitted": now - 7000, "queued": 1, "attempt": 1, "by": ""})
    assert seen(run) == []
    write_json(run.dir.request, {"submitted": now - 8000, "queued": 1, "attempt": 1, "by": ""})
    [(event, text)] = seen(run)
    assert (event, text.splitlines()[2]) == ("turn", "Duration: 2 h 13 min")
    write_json(run.dir.request, {"submitted": now - 8000, "queued": 1, "attempt": 1, "by": "", "held": True})
    assert seen(run) == []  # somebody wants it to wait


def test_reasons_are_in_the_language_of_the_reader(saves: Path) -> None:
    run = ended(saves, outcome="failed")
    [occurrence] = occurrences(run, 2.0, time.time())
    chinese = notice_of(occurrence, HERE, "zh")
    assert chinese.title == "Athanor：names 失败了"
    assert "用时：1 分钟" in chinese.text
    assert "原因：" in chinese.text
    write_json(run.dir.request, read_object(run.dir.request) | {"stop": {"how": "save", "by": "root"}})
    write_json(run.dir.exit, read_object(run.dir.exit) | {"outcome": "stopped"})
    [stopped] = occurrences(runs.read(run.path, saves), 2.0, time.time())
    assert "Reason: root stopped it." in notice_of(stopped, HERE, "en").text


# ------------------------------------------------------------------------------------------------- people and addresses


def test_each_user_hears_of_their_own_runs_while_they_may_start_some(tmp_path: Path, saves: Path) -> None:
    file = tmp_path / "users.txt"
    for name in ("ada", "bob"):
        users.add_user(file, name, None, "user")
    subscriptions.note_place(saves, file)
    place = subscriptions.place_of(saves)
    assert place.path == tmp_path / "users.notifications.json"
    for name in ("ada", "bob"):
        subscriptions.add_address(place, name, "zh", Checked(f"https://{name}.example/", "webhook", "…"))
    with pytest.raises(Refusal, match="no user"):
        subscriptions.add_address(place, "eve", "en", Checked("https://h.example/", "webhook", "…"))
    with pytest.raises(Refusal, match="already"):
        subscriptions.add_address(place, "bob", "en", Checked("https://bob.example/", "webhook", "…"))
    time.sleep(0.01)
    for name in ("ada", "eve"):
        run = ended(saves, name, by=name)
        write_json(run.dir.exit, read_object(run.dir.exit) | {"ended": time.time()})
    [each] = due(saves)
    assert (each.address.url, each.person.language) == ("https://ada.example/", "zh")
    users.set_role(file, "ada", "viewer")
    assert due(saves) == []
    users.set_role(file, "ada", "user")
    assert len(due(saves)) == 1
    users.remove_user(file, "ada")
    users.add_user(file, "ada", None, "user", take_over=True)
    assert due(saves) == []
    subscriptions.forget(place, "bob")
    assert subscriptions.of_person(place, "bob").addresses == ()


def test_whoever_follows_others_hears_of_their_runs_from_then_on(tmp_path: Path, saves: Path) -> None:
    file = tmp_path / "users.txt"
    for name in ("ada", "bob", "eve"):
        users.add_user(file, name, None, "user")
    subscriptions.note_place(saves, file)
    place = subscriptions.place_of(saves)
    for name in ("bob", "eve"):
        subscriptions.add_address(place, name, "en", Checked(f"https://{name}.example/", "webhook", "…"))

    def happens(name: str, by: str) -> list[str]:
        run = ended(saves, name, by=by)
        write_json(run.dir.exit, read_object(run.dir.exit) | {"ended": time.time()})
        return sorted(each.address.url for each in due(saves) if each.occurrence.run.title == name)

    assert happens("before", "ada") == []
    subscriptions.follow(place, "bob", ["ada", "bob"])
    assert dict(subscriptions.of_person(place, "bob").follows).keys() == {"ada"}  # one's own runs are anyway
    assert [each for each in due(saves) if each.occurrence.run.title == "before"] == []
    assert happens("hers", "ada") == ["https://bob.example/"]
    assert happens("nobody's", "") == []
    subscriptions.follow(place, "eve", [subscriptions.EVERYBODY])
    assert happens("again", "ada") == ["https://bob.example/", "https://eve.example/"]
    assert happens("nobody's again", "") == happens("her own", "eve") == ["https://eve.example/"]
    eve = subscriptions.of_person(place, "eve")
    news = notify.news(saves, "eve", eve, 0.0, time.time())
    assert {each.run.title for each in news} >= {"hers", "again", "her own"}
    subscriptions.follow(place, "bob", [])
    assert happens("later", "ada") == ["https://eve.example/"]
    users.set_role(file, "eve", "viewer")
    assert happens("last", "ada") == []
    for wrong in (["zoe"], ["<script>"], ["ada", ""]):
        with pytest.raises(Refusal, match="no user"):
            subscriptions.follow(place, "bob", wrong)


def test_a_sweep_is_one_message_with_its_best_run_and_an_early_failure_is_not_kept_back(saves: Path) -> None:
    subscribe(saves, Checked("https://h.example/", "webhook", "…"))
    outcomes = {"names r=4": "finished", "names r=8": "failed", "names r=16": "failed", "names r=32": "finished"}
    members = [ended(saves, name, "finished", sweep={"id": "s1"}) for name in outcomes]
    single = ended(saves, "alone", sweep={"id": "s2"})
    for run in members:
        run.dir.exit.unlink()
        run.dir.keeper.unlink()  # they wait
    seen = []
    for number, (run, outcome) in enumerate(zip(members, outcomes.values(), strict=True)):
        write_json(run.dir.keeper, {"started": time.time() - 100})
        end = {"outcome": outcome, "reason": outcome, "ended": time.time() - 10 + number, "attempt": 1}
        write_json(run.dir.exit, end)
        seen.append([(each.occurrence.event, each.occurrence.run.title, each.occurrence.key) for each in due(saves)])
    alone = ("finished", "alone", "1-ended")
    first = ("failed", "names r=8", "1-sweep-failed")
    assert seen[0] == [alone]
    assert [set(each) for each in seen[1:]] == [{alone, first}] * 2 + [
        {alone, first, ("failed", "names r=32", "1-sweep-ended")}
    ]
    [whole] = [each.occurrence for each in due(saves) if each.occurrence.sweep]
    best = {"step": 21, "epoch": 1.0, "time": 11.0, "loss": 0.5, "eval_loss": 0.125}
    append_lines(members[0].dir.metrics, [best])
    notice = notice_of(whole, HERE, "en")
    assert notice.title == "Athanor: all 4 runs of the sweep names have ended: 2 finished, 0 stopped, 2 failed"
    assert "Best: names r=4 (loss 0.5, eval_loss 0.125)" in notice.text
    assert notice.sweep == {
        "id": "s1", "runs": 4, "finished": 2, "failed": 2, "stopped": 0, "best": members[0].id,
    }  # fmt: skip
    assert (notice.run["name"], notice.level) == ("names r=4", "failure")
    assert "最佳：names r=4" in notice_of(whole, HERE, "zh").text
    [other] = [each.occurrence for each in due(saves) if each.occurrence.run.id == single.id]
    assert notice_of(other, HERE, "en").sweep is None


def test_who_has_heard_of_a_sweep_hears_nothing_more_when_its_runs_are_deleted(saves: Path, got: Inbox) -> None:
    subscribe(saves, hook(got))
    members = [ended(saves, f"names r={rank}", sweep={"id": "s1"}) for rank in (1, 2, 4, 8)]
    for run in members:
        run.dir.exit.unlink()
        run.dir.keeper.unlink()  # they wait

    def ends(run: Run, outcome: str, attempt: int = 1) -> None:
        write_json(run.dir.keeper, {"started": time.time() - 100})
        write_json(run.dir.exit, {"outcome": outcome, "reason": outcome, "ended": time.time(), "attempt": attempt})

    def sent() -> list[tuple[str, str]]:
        got.posts.clear()
        while left := due(saves):
            notifier.send_due(saves, left, ())
        return [(body["id"].partition("#")[2], body["run"]["name"]) for _, body in got.posts]

    first, second, third, last = members
    ends(first, "failed")
    assert sent() == [("1-sweep-failed", "names r=1")]
    ends(second, "failed")
    assert sent() == []
    runs.delete(runs.read(first.path, saves))
    assert sent() == []  # the second is the first failure now
    ends(third, "finished")
    got.status = 503
    ends(last, "finished")
    assert [key for key, _ in sent()] == ["1-sweep-ended"]  # tried once, and given up
    got.status = 200
    [shown] = notification_log.failures(last.dir)
    assert (shown.state, [*notification_log.failures(third.dir)]) == ("failed", [])
    ends(last, "finished", attempt=2)  # resumed
    assert [key for key, _ in sent()] == ["2-sweep-ended"]
    ends(third, "finished", attempt=2)
    assert [key for key, _ in sent()] == ["2-sweep-ended"]  # another end, though of the same number
    runs.delete(runs.read(third.path, saves))
    assert sent() == []  # another is the last now
    runs.delete(runs.read(last.path, saves))
    assert sent() == []  # one alone, no sweep any more
    ends(second, "finished", attempt=2)
    assert [each.occurrence.key for each in due(saves)] == ["2-ended"]


@pytest.mark.parametrize(
    "url",
    [
        "", " ", "x" * 3000, "https://", "https://u:p@h.example/", "http://h.example:x/", "https://a b/", "\0",
        "file:///etc/passwd", "syslog://", "dbus://", "gnome://", "windows://", "macosx://", "json://h", "xml://h",
        "mqtt://h", "snmp://h", "tgram://", "mailto://", "slack://T/B", "dingtalk://", "//h", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_ask", in_this_process)
    with pytest.raises(Refusal) as refused:
        sending.check(url, Policy())
    assert refused.value.problems[0].code in ("notify-url", "notify-url-of", "notify-scheme")


def in_this_process(question: dict[str, Any], policy: Policy, _seconds: float) -> list[dict[str, Any]]:
    """What the child would answer to a check, without its start."""
    try:
        return [sender.check(question["check"], policy.services)]
    except Refusal as refusal:
        [issue] = refusal.problems
        return [{"problem": {"code": issue.code, "field": issue.field, "values": issue.values}}]


@pytest.mark.parametrize(
    ("url", "service", "stored"),
    [
        ("https://open.feishu.cn/open-apis/bot/v2/hook/0a1b-2c", "feishu", "feishu://0a1b-2c"),
        ("https://open.larksuite.com/open-apis/bot/v2/hook/0a1b-2c", "lark", "lark://0a1b-2c"),
        ("https://oapi.dingtalk.com/robot/send?access_token=abc1&secret=SECf00", "dingtalk", "dingtalk://SECf00@abc1"),
        ("https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=ab-cd", "wecom", "wecombot://ab-cd/"),
        ("https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ", "slack", "slack://"),
        ("https://discord.com/api/webhooks/123456789012345678/abcdefghijklmnop", "discord", "discord://"),
        ("https://ci.example/hook?key=abcdef", "webhook", "https://ci.example/hook?key=abcdef"),
        ("tgram://123456789:ABCdefghijklmnopqrstuvwxyz123456789/12315544", "telegram", "tgram://"),
    ],
)
def test_an_address_as_its_messenger_shows_it_is_understood(url: str, service: str, stored: str) -> None:
    checked = sender.check(url, None)
    assert (checked["service"], checked["url"].startswith(stored)) == (service, True), checked
    for secret in ("0a1b-2c", "SECf00", "abc1", "ab-cd", "TIiajkdn", "abcdef", "ABCdef"):
        assert secret not in checked["shown"]
    with pytest.raises(Refusal, match="does not permit"):
        sender.check(url, ["email"])


SEALED = """
import os, socket, subprocess, sys, tempfile
from engine.notifications.sealing import seal
import email.mime.text
seal(lambda address: address == "127.0.0.1")
def fails(act):
    try:
        act()
    except PermissionError:
        return True
    return False
attempts = [
    lambda: open("/etc/passwd"), lambda: open(sys.argv[1]), lambda: os.open("/etc/passwd", 0), lambda: open("/x", "w"),
    lambda: subprocess.run(["true"]), lambda: os.system("true"), lambda: os.fork(), lambda: os.remove("/nonexistent"),
    lambda: socket.create_connection(("10.0.0.1", 80), 1), lambda: socket.create_connection(("::1", 80), 1),
    lambda: socket.socket(socket.AF_UNIX).connect("/run/x"),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("10.0.0.1", 514)),
]
print([number for number, act in enumerate(attempts) if not fails(act)])
import xml.dom.minidom  # its own files can still be read
try:
    socket.create_connection(("127.0.0.1", 1), 1)
except ConnectionRefusedError:
    print("reached")
"""


def test_the_process_that_sends_reads_no_files_starts_no_programs_and_reaches_no_internal_address(saves: Path) -> None:
    (saves / "secret.txt").write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", SEALED, str(saves / "secret.txt")], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["[]", "reached"], done.stderr
    public = ("8.8.8.8", "2606:4700::1111")
    internal = (
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1", "fe80::1%eth0",
        "fd00::1", "::ffff:10.0.0.1", "2002:0a00:0001::", "224.0.0.1", "name", "",
    )  # fmt: skip
    assert [is_public(address) for address in public] == [True, True]
    assert [address for address in internal if is_public(address)] == []


def test_the_shell_adds_tests_and_removes_and_asks_for_the_address(
    saves: Path, got: Inbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shell(*words: str, text: str = "") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["engine", "notifications", *words, "--saves", str(saves)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return main(), "".join(capsys.readouterr())

    status, printed = shell("add", text=hook(got).url)
    id = printed.split()[0]
    assert (status, SECRET in printed) == (0, False)
    assert shell("test") == (0, f"{id}  Webhook has accepted the message.\n")
    assert got.posts[0][1]["event"] == "test"
    got.status = 404
    status, printed = shell("test", id)
    assert (status, "answered with status 404" in printed) == (1, True)
    assert id in shell("list")[1]
    assert shell("events", "failed", "--wait-hours", "0")[0] == 2
    assert shell("events", "failed")[0] == 0
    run = ended(saves)
    assert shell("mute", run.id)[0] == 0
    assert not notify.choice_of(runs.read(run.path, saves)).on
    assert shell("remove", id)[0] == 0
    assert "no address" in shell("remove", id)[1]
    recorded = [(entry.action, entry.what, entry.outcome) for entry in audit.read(saves, 9)]
    assert recorded[-1] == ("notify", "add", "done")
    assert SECRET not in str(recorded)
