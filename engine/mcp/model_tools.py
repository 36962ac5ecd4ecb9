"""The tools about models and data: which there are, and an answer of one."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from engine.core.problems import Refusal
from engine.data.dataset_info import read_dataset_info
from engine.mcp.call import ASK, READ, Arguments, Call, NoArguments, Tool
from engine.runs import recent, results
from engine.runs.run import Run
from engine.serving import chat_client, servers


class Question(Arguments):
    """Whom to ask, and what."""

    question: str = Field(min_length=1, description="the message of the user")
    run: str = Field("", description="the run whose result is to answer, by ID or name, in full")
    base: str = Field("", description="the base model that is to answer, if no run is: a path of list_models")
    system: str = Field("", description="a system message")
    max_tokens: int = Field(512, ge=1, le=8192, description="of the answer")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token; default: the model's"
    )


def list_models(call: Call, _arguments: NoArguments) -> dict[str, Any]:
    """The base models that can be trained or asked, and the results of runs, newest first."""
    bases = [
        {
            "name": model.name,
            "path": str(model.path),
            "architecture": model.architecture,
            "parameters": model.parameters,
            "context_length": model.context_length,
        }
        for model in recent.models(call.workplace)
    ]
    left = [
        {
            "run": result.run.id,
            "name": result.run.title,
            "base": result.run.facts.base,
            "stage": result.stage,
            "form": "adapter" if result.adapter else "model",
        }
        for result in results.results(call.workplace.saves)
    ]
    return {"models": bases, "results": left}


def list_datasets(call: Call, _arguments: NoArguments) -> dict[str, Any]:
    """The data sets of this studio, the kind of their rows, and why one cannot be used."""
    datasets, problems = read_dataset_info(call.workplace.data)
    return {
        "datasets": [
            {
                "name": dataset.name,
                "kind": dataset.kind,
                "files": [file.name for file in dataset.files],
                "hub": dataset.hub,
                "problem": dataset.problem.text(call.language) if dataset.problem else None,
            }
            for dataset in datasets
        ],
        "problems": [issue.text(call.language) for issue in problems],
    }


def ask_model(call: Call, arguments: Question) -> dict[str, Any]:
    """An answer of a run's result, or of a base model. The first question loads the model, which may take minutes; it
    is unloaded after a quarter of an hour without one."""
    workplace = call.workplace
    ids = [call.run(arguments.run, _has_result, whole=True).id] if arguments.run else []
    choice = servers.choose_loaded(workplace, "" if ids else arguments.base, ids)
    name = next(iter(choice.adapters), choice.name)
    with call.acting("ask", name):
        server = servers.start(workplace, choice, call.caller.name)
        servers.wait(server)
        if choice.adapters:
            chat_client.add(server, choice.adapters)
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        messages = [*system, {"role": "user", "content": arguments.question}]
        settings = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
        settings = {key: value for key, value in settings.items() if value is not None}
        for snapshot in chat_client.ask(server, {name if choice.adapters else server.name: messages}, settings):
            (answer,) = snapshot
        if answer.problem:
            raise Refusal(answer.problem)
    return {"model": name, "answer": answer.text, "ended_by": answer.finish, "tokens": answer.tokens}


def _has_result(run: Run) -> bool:
    return results.result_of(run) is not None


TOOLS = {
    "list_models": Tool(list_models, NoArguments, (*READ, *ASK), reads=True),
    "list_datasets": Tool(list_datasets, NoArguments, READ, reads=True),
    "ask_model": Tool(ask_model, Question, ASK, waits=True),
}
