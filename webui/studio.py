"""The studio: the tabs put together into one page, the page built in each language, and both behind one address.

Two pages and not one that translates itself, because every word, the server's included, must be in the reader's
language. Both come from the same function, so that a handler has the same number in both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from html import escape
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.core.problems import Refusal
from engine.data import preview_client, uploads
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.runs import kinds, progress, runs
from engine.runs.results import next_spec
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from webui import (
    chat_tab,
    compare_tab,
    data_tab,
    downloads,
    evaluate_tab,
    export_tab,
    notices,
    runs_tab,
    theme,
    train_tab,
)
from webui.body_limit import BodyLimit
from webui.events import QUIET
from webui.panels import Updates
from webui.reader_language import language_of
from webui.runs_tab import head_html
from webui.same_origin import SameOrigin
from webui.train_tab.choices import model_choices, models_and_results
from webui.words import LANGUAGES, Words

# The open run is in the page's address, so that a reload or a link shows the same.
ARRIVE_JS = "() => athanorArrive()"
RUNS_JS = "(run, ...rest) => { athanorAddress(run, 'runs'); return [run, ...rest]; }"
TRAIN_JS = "() => { athanorAddress('', 'train'); return []; }"
CHAT_JS = "(...held) => { athanorAddress('', 'chat'); return held; }"
COMPARE_JS = "(...held) => { athanorAddress('', 'compare'); return athanorCompare(held); }"
EXPORT_JS = "(...held) => { athanorAddress('', 'export'); return held; }"
EVALUATE_JS = "(...held) => { athanorAddress('', 'evaluate'); athanorReport(held[0]); return held; }"
DATA_JS = "(set) => { athanorAddress('', 'data'); return [set]; }"


def user(request: gr.Request) -> str:
    """Who asks: the name that the login put into the request; "" where there is no login."""
    return getattr(request.state, "user", "") or ""


def page(workplace: Workplace, language: str, root: str = "") -> gr.Blocks:
    """The whole page in one language."""
    words = Words(language)
    with gr.Blocks(title=words("title"), analytics_enabled=False, fill_width=True) as blocks:
        head = gr.HTML(header(words, "", root), elem_id="head")
        selected, address_tab, address_query = (
            gr.Textbox(elem_classes="unseen", container=False) for _ in range(3)
        )
        message_html = gr.HTML(elem_id="told")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(words("tab-train"), id="train") as train_item:
                train = train_tab.build(words, workplace, message_html, user, selected)
            with gr.Tab(words("tab-runs"), id="runs", render_children=True) as runs_item:
                runs_page = runs_tab.build(words, workplace, root, selected, message_html, user)
            with gr.Tab(words("tab-data"), id="data") as data_item:
                data = data_tab.build(
                    words,
                    workplace,
                    root,
                    message_html,
                    train.inputs,
                    train.read,
                    lambda: model_choices(workplace),
                )
            with gr.Tab(words("tab-chat"), id="chat") as chat_item:
                chat = chat_tab.build(
                    words,
                    workplace,
                    message_html,
                    user,
                    lambda: models_and_results(workplace, words),
                )
            with gr.Tab(words("tab-evaluate"), id="evaluate") as evaluate_item:
                evaluate = evaluate_tab.build(
                    words, workplace, root, message_html, user, lambda: models_and_results(workplace, words),
                    lambda run: head_html.status(run, words),
                )  # fmt: skip
            with gr.Tab(words("tab-compare"), id="compare", render_children=True) as compare_item:
                compare = compare_tab.build(words, workplace, root)
            with gr.Tab(words("tab-export"), id="export") as export_item:
                export = export_tab.build(words, workplace, root, message_html, user)

        items = [train_item, runs_item, data_item, chat_item, evaluate_item, compare_item, export_item]

        def arrive(
            request: gr.Request, run_id: str, tab: str, chosen: str, query: str, report: str
        ) -> Updates:
            """The page as its address says: the form with the default spec, a run, some runs, a data set, or a report."""
            tab = "runs" if run_id else tab
            updates: Updates = {
                head: header(words, user(request), root), selected: run_id, data.chosen: chosen,
                evaluate.opened: report,
            }  # fmt: skip
            updates |= train.begin() | compare.from_address(query)
            known = tab in ("runs", "compare", "chat", "data", "export", "evaluate")
            return updates | ({tabs: gr.Tabs(selected=tab)} if known else {})

        def open_run(run_id: str, *view: Any) -> Updates:
            return ({tabs: gr.Tabs(selected="runs")} if run_id else {}) | runs_page.open(run_id, *view)

        def into_form(make: Callable[[Run], RunSpec], run_id: str, message_key: str) -> Updates:
            """The Train tab with a spec made from a run."""
            try:
                run = runs.get(workplace.saves, run_id)
                spec = make(run)
            except Refusal as refusal:
                return {message_html: notices.refused(refusal.problems, words)}
            return in_form(spec, words(message_key, run=run.title))

        def in_form(spec: RunSpec, message: str) -> Updates:
            return {message_html: notices.toast(message), tabs: gr.Tabs(selected="train")} | train.fill(spec)

        def clone(run_id: str) -> Updates:
            return into_form(lambda run: run.spec, run_id, "cloned")

        def follow(run_id: str, stage: str) -> Updates:
            if not stage:
                return gr.skip()
            return into_form(lambda run: next_spec(run, stage, workplace), run_id, "followed")

        def open_data(chosen: str) -> list[Any]:
            preview_client.start_child()  # whoever comes here will want to see tokens
            return data.arrive(chosen)

        def train_on_set(chosen: str, *held: Any) -> Updates:
            try:
                spec = data.use_in(chosen, train.read(held))
            except Refusal as refusal:
                return {message_html: notices.refused(refusal.problems, words)}
            return in_form(spec, words("set-used", name=next(iter(spec.data.datasets))))

        def chat_with(
            request: gr.Request, run_id: str, kept: Any, earlier: Any, _base: Any, _adapters: Any, engine: str
        ) -> Updates:
            """The Chat tab with the run and its base chosen."""
            try:
                base, adapters = chat.pick(runs.get(workplace.saves, run_id))
            except Refusal as refusal:
                return {message_html: notices.refused(refusal.problems, words)}
            arrived = chat.arrive(request, kept, earlier, base, adapters, engine)
            return {tabs: gr.Tabs(selected="chat")} | arrived

        def compare_with(run_id: str) -> Updates:
            """The Compare tab with the run and those like it chosen."""
            try:
                chosen = compare.siblings(runs.get(workplace.saves, run_id))
            except Refusal as refusal:
                return {message_html: notices.refused(refusal.problems, words)}
            return {tabs: gr.Tabs(selected="compare")} | chosen

        def export_it(run_id: str, _chosen: Any, *held: Any) -> Updates:
            """The Export tab with the run chosen."""
            return {tabs: gr.Tabs(selected="export")} | export.arrive([run_id], *held)

        def use_export(event: gr.EventData, *held: Any) -> Updates:
            """The Train tab with an export in place of its model."""
            id = event._data.get("run")
            if not id:  # a click that asks for something else
                return gr.skip()
            try:
                spec = export.use(str(id), train.read(held))
            except Refusal as refusal:
                return {message_html: notices.refused(refusal.problems, words)}
            return in_form(spec, words("export-used", name=runs.get(workplace.saves, str(id)).title))

        def evaluate_it(run_id: str, id: str, _base: Any, _results: Any, *rest: Any) -> list[Any]:
            """The Evaluate tab with the run and its base chosen."""
            try:
                base, chosen = evaluate.pick(runs.get(workplace.saves, run_id))
            except Refusal as refusal:
                return [notices.refused(refusal.problems, words), *[gr.skip()] * (1 + len(evaluate.outputs))]
            return [gr.skip(), gr.Tabs(selected="evaluate"), *evaluate.arrive(id, base, chosen, *rest)]

        def open_pasted(text: str) -> Updates:
            """An evaluation or an export that was pasted into the Train tab, in the form of its own tab."""
            spec = kinds.read(text) if text else None
            if isinstance(spec, EvaluationSpec):
                filled = dict(zip(evaluate.form, evaluate.fill(spec), strict=True))
                return {tabs: gr.Tabs(selected="evaluate")} | filled
            if isinstance(spec, ExportSpec) and (filled := export.fill(spec)):
                return {tabs: gr.Tabs(selected="export")} | filled
            return gr.skip()

        def pause_timers(count: int) -> list[Any]:
            return [gr.Timer(active=False)] * count

        blocks.load(train.list_choices, None, train.lists, **QUIET).then(
            arrive,
            [selected, address_tab, data.chosen, address_query, evaluate.opened],
            [head, selected, data.chosen, evaluate.opened, *train.begins, *compare.chosen, tabs],
            js=ARRIVE_JS,
            **QUIET,
        )
        selected.change(
            open_run, [selected, *runs_page.view], [tabs, *runs_page.outputs], js=RUNS_JS,
            **QUIET,
        )  # fmt: skip
        train.other.change(open_pasted, train.other, [tabs, *evaluate.form, *export.filled], **QUIET)
        runs_page.clone.click(clone, selected, [message_html, tabs, *train.filled], **QUIET)
        runs_page.follow.input(train.list_choices, None, train.lists, **QUIET).then(
            follow, [selected, runs_page.follow], [message_html, tabs, *train.filled], **QUIET
        )
        runs_page.chat.click(
            chat_with, [selected, *chat.inputs], [message_html, tabs, *chat.outputs], **QUIET
        )
        runs_page.compare.click(compare_with, selected, [message_html, tabs, *compare.chosen], **QUIET)
        compare_item.select(compare.arrive, compare.chosen, compare.outputs, js=COMPARE_JS, **QUIET)
        runs_page.export.click(export_it, [selected, *export.inputs], [tabs, *export.outputs], **QUIET)
        export_item.select(export.arrive, export.inputs, export.outputs, js=EXPORT_JS, **QUIET)
        export.exports.select(use_export, train.inputs, [message_html, tabs, *train.filled], **QUIET)
        runs_page.evaluate.click(
            evaluate_it, [selected, *evaluate.inputs], [message_html, tabs, *evaluate.outputs], **QUIET
        )
        evaluate_item.select(evaluate.arrive, evaluate.inputs, evaluate.outputs, js=EVALUATE_JS, **QUIET)
        chat_item.select(chat.arrive, chat.inputs, chat.outputs, js=CHAT_JS, **QUIET)
        runs_item.select(runs_page.open, [selected, *runs_page.view], runs_page.outputs, js=RUNS_JS, **QUIET)
        data_item.select(open_data, data.chosen, data.listed, js=DATA_JS, **QUIET)
        data.use.click(train.list_choices, None, train.lists, **QUIET).then(
            train_on_set, [data.chosen, *train.inputs], [message_html, tabs, *train.filled], **QUIET
        )
        train_item.select(
            partial(pause_timers, len(runs_page.timers)), None, runs_page.timers, js=TRAIN_JS, **QUIET
        ).then(train.list_choices, None, train.lists, **QUIET)
        timers = {
            chat_item: chat.timer, compare_item: compare.timer, export_item: export.timer, evaluate_item: evaluate.timer,
        }  # fmt: skip
        for item in items:  # only what is looked at is asked about
            others = [timer for tab, timer in timers.items() if tab is not item]
            item.select(partial(pause_timers, len(others)), None, others, **QUIET)
        _endpoints(workplace)
    return blocks


def header(words: Words, name: str, root: str) -> str:
    """Name of the studio, language, light or dark, and who is logged in."""
    languages = "".join(
        f'<a href="#" data-language="{code}" lang="{code}"{" class=on" if code == words.language else ""}>{label}</a>'
        for code, label in (("en", "EN"), ("zh", "中文"))
    )
    out = ""
    if name:
        out = (
            f'<span class="who">{escape(name)}</span><form method="post" action="{escape(root)}/logout">'
            f"<button>{escape(words('sign-out'))}</button></form>"
        )
    return (
        f'<header><div class="brand">{MARK}<b>{escape(words("title"))}</b><span>{escape(words("subtitle"))}</span></div>'
        f'<nav>{out}<span class="switch">{languages}</span>'
        f'<button class="theme" data-theme-switch title="{escape(words("theme"))}" aria-label="{escape(words("theme"))}">◐</button>'
        "</nav></header>"
    )


MARK = (theme.FOLDER / "favicon.svg").read_text(encoding="utf-8").strip()


def _endpoints(workplace: Workplace) -> None:
    """What other programs may call: the same few actions as the page, checked by the same code."""

    def start(spec: str, request: gr.Request) -> str:
        """Start a run from its spec as YAML. Returns the run's id."""
        return _or_gradio_error(lambda: runs.submit(kinds.read(spec), workplace, by=user(request)).id)

    def list_runs() -> list[dict[str, Any]]:
        """All runs, newest first."""
        return [
            {"id": run.id, "state": run.state, "by": run.by, "submitted": run.submitted}
            for run in runs.find(workplace.saves)
        ]

    def show_run(run: str) -> dict[str, Any]:
        """State and progress of one run."""
        selected_run = _or_gradio_error(lambda: runs.get(workplace.saves, run))
        return {"id": selected_run.id, "state": selected_run.state, **vars(progress.progress(selected_run))}

    def stop_run(run: str, how: str, request: gr.Request) -> str:
        """Stop a run: how = "save" writes a checkpoint first, "kill" does not."""
        _or_gradio_error(
            lambda: runs.stop(
                runs.get(workplace.saves, run), "kill" if how == "kill" else "save", user(request)
            )
        )
        return _or_gradio_error(lambda: runs.get(workplace.saves, run)).state

    for name, action in {"start": start, "runs": list_runs, "run": show_run, "stop": stop_run}.items():
        gr.api(action, api_name=name, queue=False)


def _or_gradio_error(act: Callable[[], Any]) -> Any:
    """The action's answer; what it is refused for as the endpoint's error."""
    try:
        return act()
    except Refusal as refusal:
        raise gr.Error(str(refusal)) from None


# ------------------------------------------------------------------------------------------ one address


def application(
    workplace: Workplace,
    *,
    auth: Callable[[ASGIApp], ASGIApp] | None = None,
    root_path: str = "",
    hosts: Collection[str] | None = None,
) -> ASGIApp:
    """The studio as an ASGI app. `auth` wraps it in a login; `root_path` is the path it has for the outside; `hosts` are names
    that it goes by, as `SameOrigin` means them; None: any name."""
    root = root_path.rstrip("/")
    pages = {language: _mounted(page(workplace, language, root), root) for language in LANGUAGES}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        async with AsyncExitStack() as stack:
            for page_app in pages.values():
                await stack.enter_async_context(page_app.router.lifespan_context(page_app))
            yield

    healthy = Route("/healthz", lambda _: PlainTextResponse("ok"))
    routes = [healthy, *downloads.routes(workplace), Mount("/", _ByLanguage(pages))]
    inner = Starlette(routes=routes, lifespan=lifespan)
    whole = _WithoutPrefix(inner, urlsplit(root).path)
    guarded = auth(whole) if auth else whole
    return SameOrigin(BodyLimit(guarded), hosts or (), any_host=hosts is None or auth is not None)


def _mounted(blocks: gr.Blocks, root: str) -> FastAPI:
    # Only of a page that was launched does gradio look whether a file that a request names was uploaded; of a mounted
    # one it would hand any file of this machine to a handler.
    blocks.has_launched = True
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None), blocks, "/", root_path=root or None, theme=theme.theme(), css=theme.css(),
        head=theme.head(), footer_links=[], max_file_size=uploads.MAX_UPLOAD_BYTES, run_history=False, favicon_path=str(theme.FOLDER / "favicon.svg"),
        app_kwargs={"openapi_url": None}, ssr_mode=False,
    )  # fmt: skip


class _ByLanguage:
    """Hands each request to the page in the reader's language."""

    def __init__(self, pages: dict[str, ASGIApp]):
        self.pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.pages[language_of(HTTPConnection(scope))](scope, receive, send)


class _WithoutPrefix:
    """Cuts off the outer path where a proxy has left it on."""

    def __init__(self, app: ASGIApp, prefix: str):
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prefix and scope["type"] != "lifespan" and scope["path"].startswith(f"{self.prefix}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self.prefix)}
        await self.app(scope, receive, send)
