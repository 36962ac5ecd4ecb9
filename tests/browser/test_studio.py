"""The studio as a person meets it: a real browser, a real studio, a real training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from engine.core import users
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.runs import runs
from engine.spec.run_spec import fields
from tests.browser.conftest import Outside
from tests.conftest import end_runs, start_studio, wait_until
from tests.inbox import inbox
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

OpenPage = Callable[..., Page]


def ready(page: Page) -> Page:
    expect(page.locator("#summary .state")).to_be_visible()
    return page


def assert_stages_stand_in_one_row(page: Page) -> None:
    tops = page.locator("#f-stage label").evaluate_all("all => all.map(label => label.getBoundingClientRect().top)")
    assert len(tops) == 9
    assert len(set(tops)) == 1, page.viewport_size


TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
# How often scripts ask for a frame of the screen during ten frames, and what moves by the style sheet.
MOVES = """async () => {
  const ask = window.requestAnimationFrame.bind(window);
  let asked = 0;
  window.requestAnimationFrame = (callback) => { asked += 1; return ask(callback); };
  for (let frame = 0; frame < 10; frame += 1) await new Promise(ask);
  window.requestAnimationFrame = ask;
  const running = document.getAnimations().filter((animation) => animation.playState === 'running');
  return asked + running.length;
}"""


def assert_nothing_moves(page: Page) -> None:
    """Sixty pictures a second of a page that waits for its reader keep a third of a core busy."""
    expect(page.locator(".tour-ring")).to_be_visible()
    wait_until(lambda: page.evaluate(MOVES) == 0)


def place_of(path: str) -> str:
    return f"#f-{path.replace('.', '-')}"


def type_into(page: Page, path: str, text: str) -> None:
    page.locator(f"{place_of(path)} input").first.fill(text)


def test_the_page_is_complete_without_a_network_and_all_chinese_in_a_chinese_browser(
    untouched: tuple[str, Path], open_page: OpenPage, outside: Outside
) -> None:
    errors: list[str] = []
    page = open_page("about:blank", locale="zh-CN")
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(untouched[0])
    ready(page)
    assert_nothing_moves(page)
    assert_stages_stand_in_one_row(page)
    for fold in page.locator("button.label-wrap").all():
        if fold.is_visible():  # some are only for models that also see
            fold.click()
    seen = page.locator("body").inner_text()
    for path, info in fields().items():
        if Words("zh").label(path) != info.title:  # some names are the same in both: DoRA
            assert f"\n{info.title}\n" not in seen, path
        assert info.description not in seen, path
    page.get_by_role("tab").nth(1).click()
    expect(page.locator("#runs .empty")).to_be_visible()
    assert "No runs" not in page.locator("body").inner_text()
    assert outside == []
    assert [one for one in errors if "favicon" not in one] == []


def see_problems_at(links: Locator, paths: Collection[str]) -> None:
    """There is one for each of these settings, and no other."""
    places = sorted(map(place_of, paths))
    wait_until(lambda: sorted(links.evaluate_all("all => all.map(link => link.hash)")) == places)


BAD = {
    "training.learning_rate": ["", "nan", "-1", "1e9", "<script>alert(1)</script>"],
    "training.num_train_epochs": ["", "0", "ten", "1e300"],
    "training.per_device_train_batch_size": ["", "0", "2.5", "; rm -rf /"],
    "training.gradient_accumulation_steps": ["", "-3", "99999999999"],
    "data.max_length": ["", "7", "100000", "../../etc/passwd"],
    "method.r": ["", "0", "'", "999999"],
    "method.lora_alpha": ["", "-1", "𝔸"],
}


def test_bad_values_are_told_at_their_fields_and_start_nothing(
    untouched: tuple[str, Path], open_page: OpenPage
) -> None:
    """In rounds, in which every other field takes its next bad value while its neighbours are good again: whatever is
    told in one was not told in the one before."""
    address, saves = untouched
    page = ready(open_page(address))
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    links = page.locator("#summary .problems a")
    good = {path: page.locator(f"{place_of(path)} input").first.input_value() for path in BAD}
    bad: dict[str, str] = {}
    for turn in range(2 * max(map(len, BAD.values()))):
        now = [path for path in list(BAD)[turn % 2 :: 2] if turn // 2 < len(BAD[path])]
        before, bad = bad, {path: BAD[path][turn // 2] for path in now}
        for path in {**before, **bad}:
            type_into(page, path, bad.get(path, good[path]))
        see_problems_at(links, bad)
    expect(page.locator("#summary .state.right")).to_be_visible()
    type_into(page, "training.learning_rate", "nan")
    type_into(page, "method.r", "-1")
    expect(links).to_have_count(2)
    page.locator("#start").click()
    expect(page.locator("#told")).to_contain_text("2")
    assert runs.find(saves) == []
    assert alerts == []


def test_on_a_narrow_screen_start_stays_in_view_and_in_front(untouched: tuple[str, Path], open_page: OpenPage) -> None:
    page = ready(open_page(untouched[0]))
    assert_stages_stand_in_one_row(page)
    page.set_viewport_size({"width": 800, "height": 900})
    assert_stages_stand_in_one_row(page)
    seen = "([x, y]) => document.elementFromPoint(x, y).closest('#start, .state')?.textContent.trim() ?? ''"
    for offset in range(0, 1800, 150):  # past labels, fields and folds
        page.evaluate("y => scrollTo(0, y)", offset)
        for selector, text in (("#start", "Start training"), ("#summary .state", "Ready to start")):
            box = page.locator(selector).bounding_box()
            middle = [box["x"] + min(box["width"] / 2, 60), box["y"] + box["height"] / 2]
            assert page.evaluate(seen, middle) == text, (selector, offset)
    type_into(page, "training.learning_rate", "nan")
    expect(page.locator("#summary .state")).to_have_text("1 to fix before you can start")
    expect(page.locator("#summary .state")).to_be_in_viewport()
    expect(page.locator("#summary .problems li")).to_be_in_viewport(ratio=1)  # and the reason, not only how many
    for path in ("training.num_train_epochs", "method.r", "method.lora_alpha", "data.max_length"):
        type_into(page, path, "x")
    expect(page.locator("#summary .problems li")).to_have_count(5)
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    folds = page.locator(".side:has(#summary) button.label-wrap").all()
    boxes = [box for fold in folds if (box := fold.bounding_box())]
    bar = page.locator("#summary .problems").bounding_box()
    assert boxes
    assert max(box["y"] + box["height"] for box in boxes) <= bar["y"]  # nothing is covered


def test_any_setting_is_found_by_its_words_and_the_keyboard_is_enough(
    untouched: tuple[str, Path], open_page: OpenPage
) -> None:
    page = ready(open_page(untouched[0]))
    box, first = page.locator("#find-setting"), page.locator("#settings-matching li").first
    page.locator("body").press("/")
    expect(box).to_be_focused()
    for typed, path in {
        "learning rate": "training.learning_rate", "学习率": "training.learning_rate", "lr": "training.learning_rate",
        "--lora_rank": "method.r", "cutoff_len": "cutoff_len → data.max_length",
        "NEFTune": "training.neftune_noise_alpha",
    }.items():  # fmt: skip
        box.fill(typed)
        expect(first.locator("code")).to_have_text(path)
    page.keyboard.press("Enter")
    expect(page.locator("#f-training-neftune_noise_alpha input")).to_be_focused()  # in a part that was closed
    page.evaluate(TWO_FRAMES)  # nobody types sooner into a field that has just been built, and it might be lost
    page.keyboard.type("/")  # text, where text is typed
    expect(page.locator("#summary .problems a")).to_have_count(1)
    box.fill("simpo_gamma")
    expect(first).to_have_attribute("aria-disabled", "true")
    expect(first).to_contain_text("only with Stage SimPO")
    page.keyboard.press("Enter")
    expect(page.locator("#f-stage input:checked")).to_be_focused()
    for typed in ("qqqq", "<img src=x onerror=alert(1)>"):
        box.fill(typed)
        expect(page.locator("#finder")).to_contain_text(f"No setting matches “{typed}”")
    box.fill("rate")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#settings-matching li").last).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Escape")
    expect(first).to_have_count(0)
    box.fill("neftune")
    expect(first).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Control+Enter")  # chooses; nothing is started from a box that is searched
    expect(page.locator("#f-training-neftune_noise_alpha input")).to_be_focused()
    expect(page.locator("#told")).not_to_contain_text("to fix")
    page.keyboard.press("Control+Enter")  # the same as the button, which refuses what cannot be read
    expect(page.locator("#told")).to_contain_text("1 to fix")
    assert runs.find(untouched[1]) == []
    key = page.locator("#search-key")  # a single character must not be a key for everybody (WCAG 2.1.4)
    expect(key).to_have_attribute("aria-pressed", "true")
    key.press("Enter")
    expect(key).to_have_attribute("aria-pressed", "false")
    page.reload()  # without a login, the browser knows how the form was left
    expect(page.locator("#summary .problems a")).to_have_count(1)
    expect(key).to_have_attribute("aria-pressed", "false")
    page.locator("body").press("/")
    expect(box).not_to_be_focused()
    key.click()
    page.locator("body").press("/")
    expect(box).to_be_focused()
    page.locator("#tour li.now button").press("Enter")
    expect(page.locator("#preset input")).to_be_focused()


def test_what_only_other_programs_have_is_found_with_a_reason(untouched: tuple[str, Path], open_page: OpenPage) -> None:
    page = ready(open_page(untouched[0]))
    for typed, text in {
        "default_system": "Not available: put the system message", "system prompt": "default_system",
        "output_dir": "Not needed: every run has its own folder", "梯度检查点": "gradient_checkpointing",
        "export_dir": "Not part of a training", "lora_rank": "method.r",
    }.items():  # fmt: skip
        page.locator("#find-setting").fill(typed)
        expect(page.locator("#settings-matching li").first).to_contain_text(text)


def test_a_list_of_presets_that_is_only_opened_changes_nothing(
    untouched: tuple[str, Path], open_page: OpenPage
) -> None:
    page = ready(open_page(untouched[0]))
    preset, rate = page.locator("#preset input"), page.locator("#f-training-learning_rate input")
    begun, title = rate.input_value(), preset.input_value()
    type_into(page, "training.learning_rate", "0.25")
    expect(page.locator("#summary .changed")).to_contain_text("1 setting differs")
    for leave in ("Escape", "Tab"):
        preset.click()
        expect(page.get_by_role("option").first).to_be_visible()
        page.keyboard.type("zzzz" if leave == "Tab" else "")
        page.keyboard.press(leave)
        page.locator("#find-setting").click()
        expect(preset).to_have_value(title)
    type_into(
        page, "training.num_train_epochs", "7"
    )  # what was sent before this has been answered when its mark is shown
    expect(page.locator("#summary .changed")).to_contain_text("2 settings differ")
    expect(rate).to_have_value("0.25")
    preset.click()
    page.get_by_role("option", name=title, exact=True).click()  # the same again, deliberately
    expect(rate).to_have_value(begun)
    preset.click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#summary .changed")).to_have_count(0)
    expect(preset).not_to_have_value(title)


def test_a_form_is_found_as_it_was_left_by_whom_it_belongs_to(
    guarded: tuple[str, Workplace], open_page: OpenPage
) -> None:
    rate = "#f-training-learning_rate input"

    def as_(name: str) -> Page:
        page = open_page(guarded[0])
        page.locator("input[name=name]").fill(name)
        page.locator("input[name=password]").fill("correct horse")
        page.keyboard.press("Enter")
        return ready(page)

    page = as_("bob")
    type_into(page, "training.learning_rate", "0.5")
    page.locator("#summary [data-reset='training.learning_rate']").click()
    expect(page.locator("#summary .changed")).to_have_count(0)
    expect(page.locator(rate)).to_have_value("0.002")
    type_into(page, "training.learning_rate", "0.25")
    expect(page.locator("#summary .changed")).to_contain_text("1 setting differs")
    page.locator("#own-presets summary").click()
    page.locator("#own-presets .saving input[type=text]").fill("Bob's")
    for box in ("changed", "shared"):
        page.locator(f"#own-presets [name={box}]").check()
    page.keyboard.press("Tab")
    page.locator("#own-presets [data-do=save]").click()
    expect(page.locator("#own-presets li")).to_contain_text("Bob's")
    page.locator("#own-presets .saving input[type=text]").fill(" Bob's ")
    page.locator("#own-presets [data-do=save]").click()
    expect(page.locator("#own-presets .heard")).to_have_text("Replace: Bob's")  # and not at once
    page.keyboard.press("Tab")
    expect(page.locator("#own-presets [data-do=save]")).to_have_text("Save")
    delete, heard = page.locator("#own-presets [data-do=delete]"), page.locator("#own-presets .heard")
    delete.click()
    expect(heard).to_have_text("Really delete: Bob's")
    page.keyboard.press("Shift+Tab")
    expect(delete).to_have_text("Delete")  # another click asks again
    expect(heard).to_have_text("")
    page.evaluate("localStorage.clear()")  # as on another machine
    page.reload()
    expect(page.locator(rate)).to_have_value("0.25")
    ada = as_("ada")
    expect(ada.locator(rate)).to_have_value("0.002")
    ada.locator("#preset input").click()
    ada.get_by_role("option", name="Bob's · bob").click()
    expect(ada.locator(rate)).to_have_value("0.25")
    expect(ada.locator("#told")).to_contain_text("changed 1 setting")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Workplace]]:
    """A studio into which Ada, Bob and Eve may, reachable from everywhere, and its workplace."""
    folder = tmp_path_factory.mktemp("guarded")
    file, saves = folder / "users.txt", folder / "saves"
    for name, role in {"ada": "operator", "bob": "user", "eve": "viewer"}.items():
        users.add_user(file, name, "correct horse", role)
    saves.mkdir()
    workplace = Workplace(models=(DEMO_MODEL,), data=PROJECT / "data", saves=saves)
    studio, address = start_studio(workplace, "--auth", str(file), "--host", "0.0.0.0")
    try:
        yield address.replace("0.0.0.0", "127.0.0.1"), workplace
    finally:
        studio.kill()
        studio.wait()
        end_runs(saves)


# At each frame: whether the form of the Train tab, with which every page is built, can be seen.
NOTES_A_VISIBLE_FORM = """() => {
  window.frames_seen = 0; window.form_seen = false;
  const look = () => {
    const form = document.querySelector('#start');
    window.frames_seen += 1;
    window.form_seen ||= Boolean(form?.checkVisibility({ visibilityProperty: true }));
    requestAnimationFrame(look);
  };
  look();
}"""


def test_after_login_a_link_to_a_run_shows_that_run(guarded: tuple[str, Workplace], open_page: OpenPage) -> None:
    address, workplace = guarded
    run = runs.submit(workplace.default_spec().change("name", "中文 & run"), workplace)
    runs.stop(runs.get(workplace.saves, run.id), "kill")
    page = open_page(f"{address}/?run={quote(run.id)}")
    page.locator("input[name=name]").fill("ada")
    page.locator("input[name=password]").fill("correct horse")
    page.keyboard.press("Enter")
    expect(page.locator("#run-head h1")).to_have_text("中文 & run")
    page.add_init_script(f"({NOTES_A_VISIBLE_FORM})()")
    page.reload()
    expect(page.locator("#run-head h1")).to_have_text("中文 & run")
    assert page.evaluate("[window.frames_seen > 0, window.form_seen]") == [True, False]


# A browser without a screen shows none, and refuses them from the start.
NOTIFICATIONS = """window.Notification = class {
  static permission = 'default';
  static async requestPermission() { return Notification.permission = 'granted'; }
  constructor(title) { window.seen = title; }
};"""


def test_a_page_that_is_left_tells_in_its_title_and_in_the_browser_what_happens(
    guarded: tuple[str, Workplace], open_page: OpenPage
) -> None:
    """After Bob has added an address, tested it, and allowed the browser's notifications with a click."""
    address, workplace = guarded
    page = open_page(f"{address}/login?next=/notifications")
    page.add_init_script(NOTIFICATIONS)
    page.locator("input[name=name]").fill("bob")
    page.locator("input[name=password]").fill("correct horse")
    page.keyboard.press("Enter")
    expect(page.locator("[data-browser=default]").first).to_be_visible()
    page.locator("#browser-allow").click()
    expect(page.locator("[data-browser=granted]")).to_be_visible()
    expect(page.locator("#browser-allow")).to_be_hidden()
    with inbox() as servers:
        page.locator("input[name=url]").fill(f"http://127.0.0.1:{servers.web}/{'secret' * 5}")
        page.get_by_role("button", name="Add address").click()
        expect(page.locator(".error")).to_contain_text("not public")
        (workplace.saves / "notifications.yaml").write_text("internal: [127.0.0.1]")
        page.locator("input[name=url]").fill(f"http://127.0.0.1:{servers.web}/{'secret' * 5}")
        page.get_by_role("button", name="Add address").click()
        expect(page.locator("li small")).to_have_text(f"http://127.0.0.1:{servers.web}/…")
        page.get_by_role("button", name="Send a test").click()
        expect(page.locator(".new")).to_contain_text("Webhook has accepted the message")
        page.get_by_label("A run has been stopped").check()
        page.locator("form", has_text="A run has been stopped").get_by_role("button", name="Save").click()
        expect(page.locator(".new")).to_be_visible()
        page.locator("p.back a").click()
        ready(page)
        run = runs.submit(workplace.default_spec().change("name", "<b>left"), workplace, by="bob", start=False)
        page.clock.install()
        page.evaluate("document.hasFocus = () => false; Notification.permission = 'granted'")
        with page.expect_response(re.compile("/notifications/events$")):
            page.evaluate("dispatchEvent(new Event('blur'))")
        runs.stop(run, "kill", by="ada")
        page.clock.run_for(16_000)
        expect(page).to_have_title("■ <b>left — Athanor")
        assert page.evaluate("window.seen") == "Athanor: <b>left has been stopped"
        page.evaluate("document.hasFocus = () => true; dispatchEvent(new Event('focus'))")
        expect(page).to_have_title("Athanor")
        [(_, body)] = wait_until(lambda: servers.posts[1:])  # the studio has sent it, too
        assert (body["event"], body["reason"]) == ("stopped", "ada stopped it.")


def test_a_button_that_one_may_not_use_is_disabled_and_says_why(
    guarded: tuple[str, Workplace], open_page: OpenPage
) -> None:
    address, workplace = guarded
    run = runs.submit(workplace.default_spec(), workplace, by="carl", start=False)
    runs.stop(run, "kill")
    for name, reason in {"eve": "You are signed in as a viewer", "bob": "This belongs to carl", "ada": ""}.items():
        page = open_page(f"{address}/?run={quote(run.id)}")
        page.locator("input[name=name]").fill(name)
        page.locator("input[name=password]").fill("correct horse")
        page.keyboard.press("Enter")
        for button in ("#resume", "#delete"):
            if reason:
                expect(page.locator(button)).to_be_disabled()
                expect(page.locator(button)).to_have_attribute("title", re.compile(reason))
            else:
                expect(page.locator(button)).to_be_enabled()
        expect(page.locator("#clone")).to_be_enabled()
        expect(page.locator(".denied")).to_have_count(1 if reason else 0)
        if name == "bob":  # what is his own can be used
            page.locator("#run-head a.back").click()
            expect(page.locator("#run-rights")).to_be_hidden()
        start = page.locator("#start")
        page.get_by_role("tab", name="Train").click()
        expect(start).to_be_disabled() if name == "eve" else expect(start).to_be_enabled()


def test_a_studio_with_data_of_its_own_begins_with_a_set_that_is_there(
    workplace: Workplace, open_page: OpenPage
) -> None:
    studio, address = start_studio(dataclasses.replace(workplace, models=(DEMO_MODEL,)))
    try:
        page = ready(open_page(address, locale="zh-CN"))
        expect(page.locator("#f-data-datasets")).to_contain_text("chat")
        expect(page.locator("#summary .state.right")).to_be_visible()
        expect(page.locator("#told")).to_contain_text("alpaca_translate_zh，已改选 chat")
    finally:
        studio.kill()
        studio.wait()


def test_a_stage_that_is_chosen_takes_a_data_set_that_fits_it(untouched: tuple[str, Path], open_page: OpenPage) -> None:
    page = ready(open_page(untouched[0]))
    for stage, name in (("DPO", "translate_pairs_zh"), ("KTO", "translate_thumbs_zh")):
        page.locator("#f-stage").get_by_text(stage, exact=True).click()
        expect(page.locator("#told")).to_contain_text(f"so {name} is chosen")
        expect(page.locator("#f-data-datasets")).to_contain_text(name)
        expect(page.locator("#summary .state.right")).to_be_visible()


def test_a_hostile_name_is_just_a_name_and_a_run_can_be_stopped_resumed_cloned_and_deleted(
    studio: str, open_page: OpenPage, demo_workplace: Workplace
) -> None:
    page = ready(open_page(studio, reduced_motion="no-preference"))
    name = "../../x; rm -rf / '\"<img src=x onerror=alert(1)> 中文"
    type_into(page, "name", name)
    type_into(page, "training.num_train_epochs", "2000")
    expect(page.locator("#summary")).to_contain_text("16,000")
    page.locator("#start").click()
    badge = page.locator("#run-head .badge")
    expect(badge).to_have_text(re.compile("Running"))
    expect(page.locator("#run-head h1")).to_have_text(name)
    page.locator("#stop").click()
    expect(badge).to_have_text(re.compile("Stopped"))
    page.locator("#resume").click()
    expect(badge).to_have_text(re.compile("Running"))
    page.locator("#kill").click()
    page.locator("#yes-kill").click()
    expect(badge).to_have_text(re.compile("Stopped"))
    page.locator("#clone").click()
    expect(page.locator("#told")).to_contain_text("are now in the form")
    expect(page.locator("#f-name input").first).to_have_value(name)
    page.get_by_role("tab").nth(1).click()
    expect(page.locator("#run-head h1")).to_have_text(name)
    page.locator("#delete").click()
    page.locator("#yes-delete").click()
    expect(page.locator("#runs .empty")).to_be_visible()
    assert runs.find(demo_workplace.saves) == []


def test_nobody_gets_in_without_a_name_and_a_password(guarded: tuple[str, Workplace], open_page: OpenPage) -> None:
    address, workplace = guarded
    before = {run.id for run in runs.find(workplace.saves)}
    page = open_page(address)
    for name, password in (("ada", "wrong"), ("", ""), ("' or 1=1", "x")):
        page.locator("input[name=name]").evaluate("(box, text) => { box.value = text }", name)
        page.locator("input[name=password]").evaluate("(box, text) => { box.value = text }", password)
        with page.expect_navigation():
            page.locator("form").first.evaluate("form => form.submit()")
        expect(page.locator("input[name=password]")).to_be_visible()
    page.locator("input[name=name]").fill("ada")
    page.locator("input[name=password]").fill("correct horse")
    page.keyboard.press("Enter")
    ready(page)
    expect(page.locator("#head")).to_contain_text("ada")
    page.locator("#start").click()
    [run] = wait_until(lambda: [run for run in runs.find(workplace.saves) if run.id not in before])
    assert run.by == "ada"
    runs.stop(run, "kill")
    anonymous = page.context.browser.new_context()
    assert anonymous.request.get(f"{address}/gradio_api/info").status == 401
    anonymous.close()


@pytest.mark.parametrize(
    "path", ["/download/a/b/c/../../../../etc/passwd", "/download/x/y/z/spec.yaml", "/file=/etc/passwd"]
)
def test_no_address_leads_out_of_the_runs(untouched: tuple[str, Path], browser: Browser, path: str) -> None:
    visitor = browser.new_context()
    assert visitor.request.get(untouched[0] + path).status in (403, 404)
    visitor.close()
