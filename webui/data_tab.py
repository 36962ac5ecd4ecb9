"""The Data tab: what data sets there are, and one of them: its rows, what is wrong with them, what a model would see.

Handlers translate and hold nothing: which set is open stands in the page, and each look reads the files, or asks an
errand's folder or the preview's child. Names of sets and files are looked up below the data folder, whoever sends them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from engine.core.problems import Problem, Refusal, problem
from engine.core.stages import FITS, STAGES
from engine.data import browse, data_jobs, dataset_info_edits, preview_client, template_losses, uploads
from engine.data.data_jobs import Errand
from engine.data.dataset_info_edits import ROLES, Mapping
from engine.data.datasets import Dataset, count_rows, dataset_of, find, read_catalogue
from engine.data.encodings import known_encoding
from engine.data.mixing import held_out
from engine.data.soundness import flaw, sound_names
from engine.launch.workspace import Workplace
from engine.models.checks import model_problems
from engine.models.facts import inspect
from engine.preflight.checks import chosen_template_problems
from engine.runs import speed
from engine.spec.run_spec import UNIONS, RunSpec
from engine.spec.steps import optimizer_steps
from webui import clicks, notices, rows, sources
from webui.events import QUIET
from webui.numbers import duration, human
from webui.words import Words

PAGE = 10  # rows of one page
SHOWN_AS_TOKENS = 5
SEARCHED = "0"  # where a search goes on that has come to the end of the set
SECONDS = 0.7  # between two looks at an errand
AT_ONCE = 100_000_000  # bytes of a set that is checked as soon as one asks what is wrong with it
ALL_ROLES = (
    "prompt", "query", "response", "chosen", "rejected", "kto_tag", "messages", "history", "system", "tools",
)  # fmt: skip


@dataclass(frozen=True)
class DataTab:
    """The parts of the tab that the rest of the page is wired to."""

    chosen: gr.Textbox  # the open set or file, as `set:NAME` or `file:PATH`; "" = none
    arrive: Callable[[str], list[Any]]  # the list as it is now, answered into `listed`
    listed: list[Any]
    timer: gr.Timer
    use: gr.Button
    use_in: Callable[[str, RunSpec], RunSpec]  # the spec that trains on the open set


def build(
    words: Words,
    workplace: Workplace,
    root: str,
    told: gr.HTML,
    form_inputs: Sequence[Any],
    form_read: Callable[[Sequence[Any]], RunSpec],
    models: Callable[[], list[tuple[str, str]]],
) -> DataTab:
    """The tab in the current context. The form of the Train tab is read for what a model would see."""
    data, saves = workplace.data, workplace.saves
    chosen, first, seen_first, after, errand = (
        gr.Textbox(elem_classes="unseen", container=False) for _ in range(5)
    )
    timer = gr.Timer(SECONDS, active=False)
    with gr.Row(elem_classes="split data", equal_height=False):
        with gr.Column(scale=3, min_width=250, elem_classes="shelf"):
            upload = gr.UploadButton(words("upload"), type="filepath", elem_id="upload", elem_classes="drop")
            gr.HTML(f'<p class="quiet">{escape(words("upload-help"))}</p>', elem_classes="under-drop")
            listing = gr.HTML(elem_id="sets", js_on_load=clicks.kept_rows_of("set"))
            with gr.Accordion(words("hub-set"), open=False, elem_classes="fold", elem_id="hub-set"):
                hub_id = gr.Textbox(
                    label=words("hub-id"), info=words("hub-id-help"), max_lines=1, elem_classes="field"
                )
                hub = gr.Radio(
                    [("Hugging Face", "huggingface"), ("ModelScope", "modelscope")], value="huggingface",
                    label=words("hub-which"), elem_classes="field-union",
                )  # fmt: skip
                subset = gr.Textbox(
                    label=words("hub-subset"),
                    info=words("hub-subset-help"),
                    max_lines=1,
                    elem_classes="field",
                )
                split_of = gr.Textbox("train", label=words("hub-split"), max_lines=1, elem_classes="field")
                fetch = gr.Button(words("hub-fetch"), size="sm", elem_id="hub-fetch")
        with gr.Column(scale=9, min_width=420, elem_classes="one-set"):
            nothing = gr.HTML(
                f'<div class="empty"><b>{escape(words("set-none"))}</b><p>{escape(words("set-none-help"))}</p></div>'
            )
            head = gr.HTML(elem_id="set-head")
            with gr.Row(elem_classes="buttons actions", visible=False) as actions:
                use = gr.Button(words("use-set"), variant="primary", size="sm", elem_id="use-set")
                get = gr.Button(words("hub-fetch"), size="sm", visible=False, elem_id="get-set")
                remove = gr.Button(words("remove-set"), size="sm", elem_classes="hurts", elem_id="remove-set")
            with gr.Row(visible=False, elem_classes="sure") as sure:
                gr.HTML(f"<p>{escape(words('sure-remove'))}</p>")
                yes = gr.Button(words("yes-remove"), variant="stop", size="sm", elem_id="yes-remove", scale=0)
                no = gr.Button(words("cancel"), size="sm", scale=0)
            work = gr.HTML(elem_id="work")
            with gr.Tabs(visible=False, elem_classes="below", elem_id="set-tabs") as parts:
                with gr.Tab(words("part-rows"), id="rows"):
                    with gr.Row(elem_classes="bar-row"):
                        text = gr.Textbox(
                            placeholder=words("rows-search"), show_label=False, container=False, max_lines=1,
                            elem_id="search-rows", scale=1,
                        )  # fmt: skip
                        back = gr.Button("‹", size="sm", scale=0, min_width=40, elem_id="rows-back")
                        where = gr.Textbox(
                            "1", show_label=False, container=False, max_lines=1, scale=0, min_width=110,
                            elem_id="rows-where",
                        )  # fmt: skip
                        on = gr.Button("›", size="sm", scale=0, min_width=40, elem_id="rows-on")
                    shown_rows = gr.HTML(elem_id="rows")
                    further = gr.Button(words("search-on"), size="sm", visible=False, elem_id="search-on")
                with gr.Tab(words("part-check"), id="check") as check_tab:
                    with gr.Row(elem_classes="tools-row"):
                        against = gr.Dropdown(
                            [], value=[], multiselect=True, label=words("against"), info=words("against-help"),
                            elem_classes="field field-names", scale=3, elem_id="against",
                        )  # fmt: skip
                        check = gr.Button(
                            words("check-all"), size="sm", scale=0, min_width=140, elem_id="check-all"
                        )
                    found = gr.HTML(elem_id="found")
                    with gr.Column(elem_classes="derive"):
                        gr.HTML(
                            f"<h2>{escape(words('derive'))}</h2><p class='quiet'>{escape(words('derive-help'))}</p>"
                        )
                        with gr.Row(elem_classes="tools-row"):
                            unique = gr.Button(
                                words("deduplicate"), size="sm", scale=0, min_width=150, elem_id="deduplicate"
                            )
                            share = gr.Textbox(
                                "0.1",
                                label=words("split-share"),
                                max_lines=1,
                                elem_classes="field",
                                scale=0,
                                min_width=150,
                            )
                            seed = gr.Textbox(
                                "42",
                                label=words("split-seed"),
                                max_lines=1,
                                elem_classes="field",
                                scale=0,
                                min_width=110,
                            )
                            halve = gr.Button(
                                words("split-off"), size="sm", scale=0, min_width=150, elem_id="split-off"
                            )
                with gr.Tab(words("part-seen"), id="seen") as seen_tab:
                    with gr.Column(elem_classes="grid grid-4"):
                        about = {"interactive": True, "min_width": 120}
                        model = gr.Dropdown(
                            [], value="", allow_custom_value=True, label=words.label("model.model_name_or_path"),
                            elem_classes="field field-choice", elem_id="seen-model", **about,
                        )  # fmt: skip
                        stage = gr.Dropdown(
                            [],
                            value=None,
                            label=words.label("stage"),
                            elem_classes="field field-choice",
                            **about,
                        )
                        max_length = gr.Textbox(
                            label=words.label("data.max_length"), max_lines=1, elem_classes="field field-number",
                            elem_id="seen-length", **about,
                        )  # fmt: skip
                        template = gr.Textbox(
                            label=words.label("model.chat_template"), placeholder=words("template-own"), max_lines=1,
                            elem_classes="field field-choice", **about,
                        )  # fmt: skip
                    numbers = gr.HTML(elem_id="seen-numbers")
                    with gr.Row(elem_classes="bar-row"):
                        seen_back = gr.Button("‹", size="sm", scale=0, min_width=40)
                        seen_where = gr.Textbox(
                            "1", show_label=False, container=False, max_lines=1, scale=0, min_width=110,
                            elem_id="seen-where",
                        )  # fmt: skip
                        seen_on = gr.Button("›", size="sm", scale=0, min_width=40, elem_id="seen-on")
                    seen = gr.HTML(elem_id="seen")
                with gr.Tab(words("part-columns"), id="columns"):
                    with gr.Column(elem_classes="grid grid-4"):
                        name = gr.Textbox(
                            label=words("set-name"),
                            max_lines=1,
                            elem_classes="field field-choice",
                            elem_id="set-name",
                        )
                        kind = gr.Dropdown(
                            [(words(f"set-{one}"), one) for one in ROLES], value="chat", label=words("set-kind"),
                            elem_classes="field field-choice", elem_id="set-kind", interactive=True,
                        )  # fmt: skip
                        encoding = gr.Dropdown(
                            [("", "")], value="", label=words("encoding"), info=words("encoding-help"), visible=False,
                            elem_classes="field field-choice", elem_id="set-encoding", interactive=True,
                        )  # fmt: skip
                        sheet = gr.Dropdown(
                            [], value=None, label=words("sheet"), info=words("sheet-help"), visible=False,
                            elem_classes="field field-choice", elem_id="set-sheet", interactive=True,
                        )  # fmt: skip
                    with gr.Column(elem_classes="grid grid-4"):
                        roles = [
                            gr.Dropdown(
                                [],
                                value="",
                                label=words(f"role-{role}"),
                                info=words(f"role-{role}-help"),
                                elem_classes="field field-choice",
                                elem_id=f"role-{role.replace('_', '-')}",
                                interactive=True,
                                allow_custom_value=True,
                                min_width=120,
                            )
                            for role in ALL_ROLES
                        ]
                    with gr.Row(elem_classes="buttons"):
                        save = gr.Button(words("save-set"), variant="primary", size="sm", elem_id="save-set")
                    gr.HTML(f"<h2>{escape(words('mapped-rows'))}</h2>", elem_classes="section-title")
                    mapped_rows = gr.HTML(elem_id="mapped")

    in_editor = [name, kind, encoding, *roles]
    in_rows = [first, after, where, shown_rows, further]
    in_seen = [model, stage, max_length, template]
    panel = [nothing, head, actions, get, use, sure, parts, against, found, numbers, seen, text]
    listed = [chosen, listing]

    # ------------------------------------------------------------------------------------ the list

    def list_html(id: str) -> str:
        sets, broken = read_catalogue(data)
        counts = {one.name: None if flaw(one) else _count(one) for one in sets}
        return rows.listed(sets, counts, broken, uploads.unregistered(data, sets), id, words)

    def arrive(id: str) -> list[Any]:
        sets, _ = read_catalogue(data)
        usable = sound_names(sets)
        id = id or (f"set:{usable[0]}" if usable else "")
        return [id, list_html(id)]

    def opened(id: str, encoding: str = "") -> Dataset:
        """The set that an id of the page names; a file as it is in this encoding. Raises Refusal."""
        what, _, name = (id or "").partition(":")
        if what == "set":
            return find(data, name)
        if what != "file" or name not in uploads.unregistered(data, read_catalogue(data)[0]):
            raise Refusal(problem("set-unknown", name=name or "—"))
        encoding = known_encoding(encoding) if encoding else ""
        rows_there = dataset_info_edits.first_rows(data / name, encoding)
        title = Path(name).stem
        try:
            entry = dataset_info_edits.described(name, dataset_info_edits.propose(rows_there), rows_there)
        except Refusal:
            entry = {"file_name": name}
        return dataset_of(data, title, entry | {"encoding": encoding})

    def saved(id: str) -> Dataset:
        """The set that an id names. Raises Refusal also for a file: what asks by name would get a set of its name."""
        one = opened(id)
        if not id.startswith("set:"):
            raise Refusal(problem("set-unsaved", file=id.partition(":")[2]))
        return one

    def open(id: str) -> list[Any]:
        """Everything about one set; nothing where there is none."""
        hidden, skipped = gr.update(visible=False), [gr.skip()] * len(in_editor)
        nothing_open = [
            gr.update(visible=True), "", hidden, hidden, hidden, hidden, hidden, gr.skip(), "", "", "", "",
            *[gr.skip()] * len(in_rows), *skipped, hidden, "", list_html(""), gr.skip(),
        ]  # fmt: skip
        if not id:
            return nothing_open
        try:
            one = opened(id)
        except Refusal as refusal:
            nothing_open[-1] = notices.refused(refusal.problems, words)
            return nothing_open
        is_set, usable = id.startswith("set:"), bool(one.files) and not one.problem
        others = [other for other in sound_names(read_catalogue(data)[0]) if other != one.name]
        title = (
            rows.head(one, _count(one), words) if is_set else rows.file_head(id.partition(":")[2], one, words)
        )
        return [
            hidden, title, gr.update(visible=is_set), gr.update(visible=bool(one.hub)), gr.update(visible=usable),
            hidden, gr.Tabs(visible=bool(one.files), selected="rows" if is_set and usable else "columns"),
            gr.update(choices=others, value=[]), checked(one) if is_set else unsaved(id), "", "", "",
            *(page(one, 1, "") if usable else [gr.skip(), "", "1", "", hidden]),
            *(editor(one) if one.files else skipped), sheet_update(id), mapped_html(one), list_html(id), gr.skip(),
        ]  # fmt: skip

    def unsaved(id: str) -> str:
        return notices.listed([problem("set-unsaved", file=id.partition(":")[2])], words)

    def checked(one: Dataset) -> str:
        """What a check of this very data has found before; else what one could find."""
        before = data_jobs.known(saves, "check", {"data": str(data), "name": one.name, **check_given([])})
        return check_html(before) if before else f'<p class="quiet">{escape(words("check-help"))}</p>'

    # ------------------------------------------------------------------------------------ rows

    def page(one: Dataset, number: int, text: str) -> list[Any]:
        """Rows from a number on, or those from there on that hold a text."""
        if text.strip():
            hits, go_on = browse.search(one, text, number - 1, PAGE)
            html = rows.page(hits, words, text)
            if not hits:
                said = words("rows-no-match" if number == 1 else "rows-no-more", text=text.strip())
                if go_on:
                    said = words("rows-not-yet", count=f"{go_on:,}")
                html = f'<p class="empty">{escape(said)}</p>'
            more = gr.update(visible=go_on is not None)
            return [str(number), str(go_on or SEARCHED), str(number), html, more]
        shown = browse.page(one, number, PAGE)
        html = rows.page(shown, words) if shown else f'<p class="empty">{escape(words("rows-end"))}</p>'
        return [str(number), "", str(number), html, gr.update(visible=False)]

    def turn(by: int) -> Callable[..., list[Any]]:
        """A page on or back; while a text is searched for, on to further hits or back to the first."""

        def handler(id: str, at: str, after: str, text: str) -> list[Any]:
            if not (text or "").strip():
                return rows_of(id, str(max(whole(at) + by * PAGE, 1)), "")
            if by > 0 and after == SEARCHED:
                return [gr.skip()] * (1 + len(in_rows))
            return rows_of(id, str(whole(after) + 1) if by > 0 and after else "1", text)

        return handler

    def rows_of(id: str, number: str, text: str) -> list[Any]:
        return tell(lambda: page(opened(id), whole(number), text or ""), len(in_rows))

    # ------------------------------------------------------------------------------------ errands

    def begin(what: str, given: Callable[..., dict[str, Any]]) -> Callable[..., list[Any]]:
        """A handler that starts an errand about the open set."""

        def handler(id: str, *held: Any) -> list[Any]:
            def start() -> list[Any]:
                asked = {"data": str(data), "name": saved(id).name, **given(*held)}
                return watching(data_jobs.start(saves, what, asked))

            return tell(start, 3)

        return handler

    def watching(one: Errand) -> list[Any]:
        return [one.id, gr.Timer(active=True), rows.working(one.progress, words)]

    def check_given(against: Sequence[str] | None) -> dict[str, Any]:
        return {"against": list(against or []), "language": words.language}

    def check_at_once(id: str, against: Sequence[str]) -> list[Any]:
        """The check of a set that is not large, without being asked."""
        try:
            small = rows.bytes_of(saved(id)) <= AT_ONCE
        except Refusal:
            small = False
        return begin("check", check_given)(id, against) if small else [gr.skip()] * 4

    def watch(errand_id: str, id: str) -> list[Any]:
        """How far the errand is, and what came of it when it is done."""
        one = data_jobs.get(saves, errand_id)
        still = [gr.skip()] * 3  # findings, open set, list
        if one is None:
            return [gr.skip(), gr.Timer(active=False), "", *still]
        if one.state == "working":
            return [gr.skip(), gr.skip(), rows.working(one.progress, words), *still]
        if one.state == "failed":
            return [notices.refused(one.problems, words), gr.Timer(active=False), "", *still]
        # Whoever has gone on to another set meanwhile stays there.
        here = one.asked.get("name") in (None, id.partition(":")[2])
        told, *shown = done[one.id.partition("-")[0]](one, here)
        return [told, gr.Timer(active=False), "", *shown]

    def check_html(one: Errand) -> str:
        return rows.findings(one.result, f"{root}/data/{quote(one.id)}/{data_jobs.BAD_ROWS}", words)

    def check_done(one: Errand, here: bool) -> list[Any]:
        return [gr.skip(), check_html(one) if here else gr.skip(), gr.skip(), gr.skip()]

    def made_done(one: Errand, here: bool) -> list[Any]:
        made, counts = one.result["made"], one.result["counts"]
        sets = ", ".join(f"{name} ({counts[name]:,})" for name in made)
        said = words("sets-made", sets=sets, out=f"{counts.get('left out', 0):,}")
        id = f"set:{made[0]}" if here else gr.skip()
        return [notices.toast(said), gr.skip(), id, list_html(f"set:{made[0]}" if here else "")]

    done = {"check": check_done, "deduplicate": made_done, "split": made_done, "download": made_done}

    # ------------------------------------------------------------------------------------ what is seen

    def spec_for(
        one: Dataset, model: str, stage: str, length: str, template: str, held: Sequence[Any]
    ) -> RunSpec:
        """The form's spec with what is chosen here, on this set. Raises Refusal."""
        spec = form_read(held)
        if stage and stage != spec.stage.kind:
            spec = spec.change("stage", {"kind": stage})
        for path, value in (
            ("model.model_name_or_path", model), ("data.max_length", length.strip()),
            ("model.chat_template", template.strip() or None), ("data.datasets", {one.name: 1.0}),
        ):  # fmt: skip
            spec = spec.change(path, value)
        if one.kind not in FITS[STAGES[spec.stage.kind].form]:
            fitting = [n for n, s in STAGES.items() if one.kind in FITS[s.form]]
            raise Refusal(
                problem(
                    "set-stage", name=one.name, stages=", ".join(words.choice("stage", n) for n in fitting)
                )
            )
        allowed = spec.model.trust_remote_code and workplace.allows_code_of(model)
        spec = workplace.frozen(spec.change("model.trust_remote_code", allowed))
        if wrong := [
            *(workplace.problems(spec) or chosen_template_problems(spec)),
            *model_problems(spec.model.model_name_or_path, workplace.models, allow_remote_code=allowed),
        ]:
            raise Refusal(wrong)
        return spec

    def see_first(id: str, *held: Any) -> list[Any]:
        """The settings of the form that matter here, for the open set; a stage that fits if the form's does not."""
        spec = form_read(held)
        try:
            one = saved(id)
        except Refusal:
            return [gr.skip()] * len(in_seen)
        kinds = [name for name in UNIONS["stage"] if name in STAGES and one.kind in FITS[STAGES[name].form]]
        fits = spec.stage.kind if spec.stage.kind in kinds else (kinds or [""])[0]
        return [
            gr.update(choices=models(), value=spec.model.model_name_or_path),
            gr.update(choices=[(words.choice("stage", one), one) for one in kinds], value=fits),
            str(spec.data.max_length), spec.model.chat_template or "",
        ]  # fmt: skip

    def see_rows(id: str, number: str, *held: Any) -> list[Any]:
        """A page of rows as tokens."""
        view, form_held = held[: len(in_seen)], held[len(in_seen) :]
        at = whole(number)
        try:
            one = saved(id)
            spec = spec_for(one, *map(_said, view), form_held)
            answer = preview_client.ask("page", spec, data, one.name, first=at, size=SHOWN_AS_TOKENS)
        except Refusal as refusal:
            return [str(at), str(at), notices.listed(refusal.problems, words)]
        return [str(at), str(at), rows.tokens(answer, words)]

    def see_numbers(id: str, *held: Any) -> str:
        """Lengths, what is left out, steps and time of the open set alone."""
        view, form_held = held[: len(in_seen)], held[len(in_seen) :]
        try:
            one = saved(id)
            spec = spec_for(one, *map(_said, view), form_held)
            answer = preview_client.ask("statistics", spec, data, one.name)
        except Refusal:
            return ""  # the rows below say why
        lengths = rows.lengths(answer, seen_facts(answer, spec), words)
        notes = [
            *(Problem(reason["code"], reason["field"], reason["values"]) for reason in answer["refused"]),
            *template_losses.notes(answer["lost"], answer["seen"]),
        ]
        return lengths + notices.noted(notes, words)

    def seen_facts(answer: dict[str, Any], spec: RunSpec) -> list[tuple[str, str, str]]:
        grown = answer["total"] / max(answer["seen"], 1)
        about = "{:,}" if grown == 1 else "≈ {:,}"
        fates, examples = answer["fates"], round(answer["examples"] * grown)
        left_out = sum(count for fate, count in fates.items() if fate not in ("kept", "cut"))
        trained_on = max(examples - sum(held_out(spec.data, {"": examples}).values()), 1)
        if spec.data.packing:
            trained_on = max(math.ceil(answer["tokens"] * grown / spec.data.max_length), 1)
        steps = optimizer_steps(spec, trained_on)
        per_step = (
            spec.training.per_device_train_batch_size * spec.training.gradient_accumulation_steps
            * spec.hardware.num_processes
        )  # fmt: skip
        tokens = answer["tokens"] * grown * min(steps * per_step / max(trained_on, 1), 1e6)
        guess = speed.training_time(
            spec, tokens, inspect(spec.model.model_name_or_path).parameters, workplace
        )
        how = (
            "" if guess is None else words("time-like", run=guess.like) if guess.like else words("time-rough")
        )
        share = answer["trained"] / max(answer["tokens"], 1)
        return [
            ("stat-examples", about.format(examples), ""),
            ("stat-cut", about.format(round(fates.get("cut", 0) * grown)), ""),
            ("stat-left-out", about.format(round(left_out * grown)), ""),
            ("stat-trained-share", f"{share:.0%}", ""),
            ("stat-tokens", human(answer["tokens"] * grown), words("stat-per-epoch")),
            ("stat-longest", f"{answer['longest']:,}", words("stat-median", count=f"{answer['median']:,.0f}")),
            ("stat-steps", about.format(steps), ""),
            ("stat-time", duration(guess.seconds, words) if guess else "—", how),
        ]  # fmt: skip

    def see_turn(by: int) -> Callable[..., list[Any]]:
        def handler(id: str, at: str, *held: Any) -> list[Any]:
            return see_rows(id, str(max(whole(at) + by * SHOWN_AS_TOKENS, 1)), *held)

        return handler

    # ------------------------------------------------------------------------------------ columns

    def editor(one: Dataset) -> list[Any]:
        """The mapping of a set, in the controls."""
        there = dataset_info_edits.columns_of(dataset_info_edits.first_rows(one.files[0], one.encoding))
        mapping = dataset_info_edits.mapping_of(one)
        columns = {role: column for role, column in mapping.columns.items() if column in there}
        choices, open_question = sources.encodings(one, words)
        encoding = gr.update(choices=choices, value=one.encoding, visible=open_question)
        return [one.name, mapping.kind, encoding, *role_updates(mapping.kind, there, columns)]

    def sheet_update(id: str) -> Any:
        """The sheets that a file could be made of, if it is in no set yet; hidden where there is nothing to choose."""
        what, _, name = id.partition(":")
        try:
            names, current = uploads.sheets_of(data / name) if what == "file" else ([], "")
        except Refusal:
            names, current = [], ""
        return gr.update(choices=names, value=current or None, visible=len(names) > 1)

    def role_updates(kind: str, there: list[str], columns: dict[str, str]) -> list[Any]:
        choices = [("—", ""), *((column, column) for column in there)]
        return [
            gr.update(choices=choices, value=columns.get(role, ""), visible=role in ROLES[kind])
            for role in ALL_ROLES
        ]

    def mapping_from(kind: str, held: Sequence[Any]) -> Mapping:
        kind = kind if kind in ROLES else "chat"
        return Mapping(kind, {role: str(one) for role, one in zip(ALL_ROLES, held, strict=True) if one})

    def entry_from(id: str, kind: str, encoding: str, held: Sequence[Any]) -> tuple[Dataset, dict[str, Any]]:
        encoding = known_encoding(encoding) if encoding else ""
        one = opened(id, encoding)
        if not one.files:
            raise Refusal(one.problem or problem("dataset-on-hub", name=one.name, hub=one.hub))
        before = dict(dataset_info_edits.entry_of(data, one.name)) if id.startswith("set:") else {}
        before.pop("encoding", None)
        file_name = before.get("file_name") or id.partition(":")[2]
        rows_there = dataset_info_edits.first_rows(one.files[0], encoding)
        try:
            entry = dataset_info_edits.described(file_name, mapping_from(kind, held), rows_there, before)
            return one, entry | ({"encoding": encoding} if encoding else {})
        except Refusal as refusal:
            raise Refusal([called_as_here(one) for one in refusal.problems]) from None

    def called_as_here(found: Problem) -> Problem:
        """The problem with the parts that columns play called by their labels."""
        if "parts" not in found.values:
            return found
        parts = re.sub(r"\w+", lambda role: words(f"role-{role[0]}"), found.values["parts"])
        return replace(found, values=found.values | {"parts": parts})

    def kind_changed(id: str, kind: str, encoding: str, *held: Any) -> list[Any]:
        """Other parts to play; columns that were chosen stay, those that can be guessed are filled in."""
        kind = kind if kind in ROLES else "chat"
        try:
            rows_there = dataset_info_edits.first_rows(opened(id).files[0], encoding or "")
        except (Refusal, IndexError):
            return [gr.skip()] * len(roles)
        there = dataset_info_edits.columns_of(rows_there)
        guessed = dataset_info_edits.propose(rows_there).columns if rows_there else {}
        kept = {role: one for role, one in zip(ALL_ROLES, held, strict=True) if one in there}
        return role_updates(
            kind, there, {role: kept.get(role) or guessed.get(role, "") for role in ALL_ROLES}
        )

    def encoding_changed(id: str, encoding: str) -> list[Any]:
        """The head and what the columns are called in this encoding."""
        try:
            one = replace(opened(id), encoding=known_encoding(encoding) if encoding else "")
            rows_there = dataset_info_edits.first_rows(one.files[0], one.encoding)
        except (Refusal, IndexError) as error:
            wrong = notices.refused(error.problems, words) if isinstance(error, Refusal) else gr.skip()
            return [wrong, gr.skip(), gr.skip(), *[gr.skip()] * len(roles)]
        mapping = dataset_info_edits.propose(rows_there) if rows_there else Mapping("chat")
        there = dataset_info_edits.columns_of(rows_there)
        is_set = id.startswith("set:")
        title = rows.head(one, None, words) if is_set else rows.file_head(id.partition(":")[2], one, words)
        return [gr.skip(), title, mapping.kind, *role_updates(mapping.kind, there, dict(mapping.columns))]

    def sheet_chosen(id: str, sheet: str) -> list[Any]:
        """The file made anew of another sheet, and everything about it."""

        def act() -> list[Any]:
            opened(id)  # a file of this folder
            what, _, name = id.partition(":")
            if what != "file" or not sheet:
                return [gr.skip()] * len(shown)
            notes = uploads.choose_sheet(data / name, sheet)
            said = " ".join(
                [words("sheet-read", sheet=sheet), *(notices.sentence(one, words) for one in notes)]
            )
            *everything, _ = open(id)
            return [*everything, notices.toast(said)]

        return tell(act, len(shown) - 1, told_too=True, told_last=True)

    def mapped(id: str, name: str, kind: str, encoding: str, *held: Any) -> str:
        """The first rows as these columns make them."""
        try:
            _, entry = entry_from(id, kind, encoding, held)
            return mapped_html(dataset_of(data, name or "—", entry))
        except Refusal as refusal:
            return notices.listed(refusal.problems, words)

    def mapped_html(one: Dataset) -> str:
        try:
            return rows.page(browse.page(one, 1, 3), words)
        except Refusal as refusal:
            return notices.listed(refusal.problems, words)

    def save_set(id: str, name: str, kind: str, encoding: str, *held: Any) -> list[Any]:
        def act() -> list[Any]:
            one, entry = entry_from(id, kind, encoding, held)
            kept = dataset_info_edits.save(
                data, name, entry, instead_of=one.name if id.startswith("set:") else ""
            )
            uploads.settle(one.files[0])
            return [notices.toast(words("set-saved", name=kept)), f"set:{kept}", list_html(f"set:{kept}")]

        return tell(act, 2, told_too=True)

    def removed(id: str) -> list[Any]:
        def act() -> list[Any]:
            one = saved(id)
            dataset_info_edits.remove(data, one.name)
            return [notices.toast(words("set-removed", name=one.name)), "", list_html("")]

        return tell(act, 2, told_too=True)

    def uploaded(path: str | None) -> list[Any]:
        """A file that was dropped, taken in and opened for a look at its columns."""

        def act() -> list[Any]:
            given = Path(path or "")
            asked = {
                "data": str(data),
                "source": str(given),
                "called": given.name,
                "at": given.stat().st_mtime_ns,
            }
            told = data_jobs.wait(data_jobs.start(saves, "receive", asked))
            arrived = told["file"]
            wrong, notes = (
                [problem(one["code"], **one["values"]) for one in told[key]] for key in ("problems", "notes")
            )
            said = [words("arrived", file=arrived), *(notices.sentence(one, words) for one in notes)]
            given.unlink(missing_ok=True)
            return [
                notices.refused(wrong, words) if wrong else notices.toast(" ".join(said)),
                f"file:{arrived}",
                list_html(f"file:{arrived}"),
            ]

        return tell(act, 2, told_too=True) if path else [gr.skip()] * 3

    def fetch_given(hub_id: str, hub: str, subset: str, split: str) -> list[Any]:
        def act() -> list[Any]:
            asked = {
                "data": str(data), "id": hub_id.strip(), "hub": hub, "subset": subset.strip(),
                "split": split.strip() or "train", "into": "",
            }  # fmt: skip
            return watching(data_jobs.start(saves, "download", asked))

        return tell(act, 3)

    def fetch_known(id: str) -> list[Any]:
        def act() -> list[Any]:
            one = saved(id)
            entry = dataset_info_edits.entry_of(data, one.name)
            asked = {
                "data": str(data), "id": one.hub, "hub": "modelscope" if entry.get("ms_hub_url") else "huggingface",
                "folder": one.folder, "subset": one.subset, "split": one.split, "into": one.name,
            }  # fmt: skip
            return watching(data_jobs.start(saves, "download", asked))

        return tell(act, 3)

    def use_in(id: str, spec: RunSpec) -> RunSpec:
        """The form's spec on this set, with a stage that takes it. Raises Refusal."""
        one = saved(id)
        if one.problem or not one.files:
            raise Refusal(one.problem or problem("dataset-on-hub", name=one.name, hub=one.hub))
        if one.kind not in FITS[STAGES[spec.stage.kind].form]:
            fitting = next(
                name for name in UNIONS["stage"] if name in STAGES and one.kind in FITS[STAGES[name].form]
            )
            spec = spec.change("stage", {"kind": fitting})
        return spec.change("data.datasets", {one.name: 1.0})

    def tell(
        act: Callable[[], list[Any]], outputs: int, told_too: bool = False, told_last: bool = False
    ) -> list[Any]:
        """What the action answers; what it is refused for as a message, and nothing else changed."""
        try:
            answer = act()
            return answer if told_too else [gr.skip(), *answer]
        except Refusal as refusal:
            message, unchanged = [notices.refused(refusal.problems, words)], [gr.skip()] * outputs
            return unchanged + message if told_last else message + unchanged

    # ------------------------------------------------------------------------------------ wiring

    shown = [*panel, *in_rows, *in_editor, sheet, mapped_rows, listing, told]
    listing.select(picked, None, chosen, **QUIET)
    chosen.change(open, chosen, shown, js="(id) => athanorSet(id)", trigger_mode="always_last", **QUIET)
    upload.upload(
        uploaded, upload, [told, *listed], **QUIET | {"show_progress": "minimal", "show_progress_on": listing}
    )

    in_turn = [chosen, first, after, text]
    text.submit(lambda id, text: rows_of(id, "1", text), [chosen, text], [told, *in_rows], **QUIET)
    where.submit(rows_of, [chosen, where, text], [told, *in_rows], **QUIET)
    back.click(turn(-1), in_turn, [told, *in_rows], **QUIET)
    gr.on([on.click, further.click], turn(+1), in_turn, [told, *in_rows], **QUIET)

    working = [told, errand, timer, work]
    check.click(begin("check", check_given), [chosen, against], working, **QUIET)
    check_tab.select(check_at_once, [chosen, against], working, **QUIET)
    unique.click(begin("deduplicate", dict), [chosen], working, **QUIET)
    halve.click(begin("split", split_given), [chosen, share, seed], working, **QUIET)
    timer.tick(watch, [errand, chosen], [told, timer, work, found, *listed], **QUIET)
    fetch.click(fetch_given, [hub_id, hub, subset, split_of], working, **QUIET)
    get.click(fetch_known, chosen, working, **QUIET)

    seen_rows = [seen_first, seen_where, seen]
    asked = [*in_seen, *form_inputs]
    seen_tab.select(see_first, [chosen, *form_inputs], in_seen, **QUIET).then(
        see_rows, [chosen, seen_first, *asked], seen_rows, **QUIET
    ).then(see_numbers, [chosen, *asked], numbers, **QUIET)
    gr.on(
        [model.input, stage.input, max_length.submit, max_length.blur, template.submit, template.blur],
        see_rows, [chosen, seen_first, *asked], seen_rows, trigger_mode="always_last", **QUIET,
    ).then(see_numbers, [chosen, *asked], numbers, **QUIET)  # fmt: skip
    seen_where.submit(see_rows, [chosen, seen_where, *asked], seen_rows, **QUIET)
    seen_back.click(see_turn(-1), [chosen, seen_first, *asked], seen_rows, **QUIET)
    seen_on.click(see_turn(+1), [chosen, seen_first, *asked], seen_rows, **QUIET)

    sheet.input(sheet_chosen, [chosen, sheet], shown, **QUIET)
    encoding.input(encoding_changed, [chosen, encoding], [told, head, kind, *roles], **QUIET).then(
        mapped, [chosen, *in_editor], mapped_rows, **QUIET
    )
    kind.input(kind_changed, [chosen, kind, encoding, *roles], roles, **QUIET).then(
        mapped, [chosen, *in_editor], mapped_rows, **QUIET
    )
    gr.on(
        [one.input for one in roles],
        mapped,
        [chosen, *in_editor],
        mapped_rows,
        trigger_mode="always_last",
        **QUIET,
    )
    save.click(save_set, [chosen, *in_editor], [told, *listed], **QUIET)

    remove.click(lambda: gr.update(visible=True), None, sure, **QUIET)
    no.click(lambda: gr.update(visible=False), None, sure, **QUIET)
    yes.click(removed, chosen, [told, *listed], **QUIET)
    return DataTab(chosen, arrive, listed, timer, use, use_in)


def picked(event: gr.EventData) -> str:
    """The id of the set that was clicked."""
    return str(event._data.get("set", ""))


def whole(number: str) -> int:
    """A row's number as somebody wrote it; 1 if it is none."""
    text = str(number or "").replace(",", "").strip()
    return max(int(text), 1) if text.isdecimal() and len(text) < 12 else 1


def split_given(share: str, seed: str) -> dict[str, Any]:
    """Raises Refusal if the share is no number, or the seed none from 0 on."""
    try:
        wanted = float(str(share).strip().replace("%", "e-2"))
    except ValueError:
        raise Refusal(problem("split-share", share=share or "—")) from None
    if not (str(seed).strip().isdecimal() and len(str(seed)) < 19):
        raise Refusal(problem("split-seed", seed=str(seed)[:40] or "—"))
    return {"share": wanted, "seed": int(seed)}


def _said(value: Any) -> str:
    return "" if value is None else str(value)


def _count(one: Dataset) -> int | None:
    """Rows of a set that can be counted; a very large file is not read through for the sake of a list."""
    try:
        return count_rows(one)
    except (Refusal, OSError):
        return None
