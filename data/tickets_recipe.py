"""Make `tickets.json` and `tickets_test.json`: messages to a shop, each with the ticket that its answer should be.

    python data/tickets_recipe.py

The shop, its goods and its customers are made up. A model has to read a message and write one line of JSON: the order
number or null, the product in the customer's words, which of four problems it is, and which of four things is wanted.
The first two have to be copied and the others understood, so what was learned shows on messages that it never saw:
`tickets_test.json` is about other products under other numbers, and half of its sentences are in no training message.

The same seed, the same rows. Only the standard library is needed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED, TRAINING, HELD_OUT = 7, 200, 60
INSTRUCTION = "Write this message as a ticket: JSON with order, product, problem, wants."

# Of each list of sentences the last two stand in held-out messages only.
KEPT_BACK = 2

PRODUCTS = [
    "rain jacket", "camp stove", "sleeping bag", "head torch", "hiking boots", "water filter", "down vest", "tent pegs",
    "climbing rope", "trail map", "folding chair", "wool socks", "cook set", "bike pump", "ski gloves", "dry bag",
]  # fmt: skip
OTHER_PRODUCTS = [
    "rope bag", "bread oven", "kayak paddle", "snow shovel", "gas lantern", "tarp", "child carrier", "storm kettle",
]  # fmt: skip

GREETINGS = ["", "Hello, ", "Hi there, ", "Good morning, ", "Dear team, ", "Hey, "]
PROBLEMS: dict[str, list[str]] = {
    "broken": [
        "the {product} I bought from you has stopped working.",
        "the {product} arrived with a crack in it.",
        "after one weekend the {product} fell apart.",
        "my new {product} is torn along the side.",
        "the {product} broke the first time I used it.",
        "the {product} was damaged when I opened the box.",
        "the {product} snapped in my hands on day two.",
        "my {product} came out of the parcel with a big dent.",
    ],
    "late": [
        "the {product} should have been here last week and it is not.",
        "I am still waiting for the {product} I ordered.",
        "my {product} has not arrived yet.",
        "the {product} is ten days overdue.",
        "there is no sign of the {product} that you promised for Monday.",
        "your page says the {product} was sent, but nothing came.",
        "I expected the {product} on Friday and it never turned up.",
        "how long does a {product} take? It is still on its way after three weeks.",
    ],
    "wrong item": [
        "I ordered the {product} and you sent me something else.",
        "this is not the {product} I asked for.",
        "instead of the {product} there was another thing in the box.",
        "you sent the {product} in the wrong size.",
        "the {product} I got is the wrong colour.",
        "I wanted the {product}, but got somebody else's order.",
        "the label says {product}, but that is not what is inside.",
        "you mixed something up: my {product} is a different model.",
    ],
    "missing part": [
        "the {product} came without its strap.",
        "one piece of the {product} is not in the box.",
        "the {product} has no instructions with it.",
        "a screw is missing from the {product}.",
        "the lid of the {product} was not in the parcel.",
        "the {product} arrived, but its cover did not.",
        "I cannot find the clips that belong to the {product}.",
        "the {product} is incomplete: the small bag that goes with it is not there.",
    ],
}
WISHES: dict[str, list[str]] = {
    "refund": [
        "Please give me my money back.",
        "I would like a refund.",
        "Can you pay me back?",
        "Please return what I paid.",
        "I want my money back, please.",
        "Kindly refund me.",
    ],
    "replacement": [
        "Please send me a new one.",
        "Can I have another one instead?",
        "I would like a replacement.",
        "Could you exchange it?",
        "Please swap it for a good one.",
        "A fresh one would make me happy.",
    ],
    "repair": [
        "Can you fix it?",
        "I would like to have it repaired.",
        "Please mend it for me.",
        "Could your workshop repair it?",
        "Is it possible to get it mended?",
        "Tell me where to send it for repair.",
    ],
    "answer": [
        "What should I do now?",
        "Please tell me what happened.",
        "Can you let me know?",
        "Could somebody call me about it?",
        "I would be glad to hear from you.",
        "Please explain.",
    ],
}
ORDERS = [
    "My order is {order}.",
    "Order number {order}.",
    "It is order {order}.",
    "The number on the bill is {order}.",
    "(order {order})",
    "For your files: {order}.",
]
WITHOUT_ORDER = 0.15  # share of messages that name none
THANKS = ["", "", " Thank you.", " Thanks, Mira", " Best wishes, Jon", " Regards, A. Okafor"]


def sentences(every: Sequence[str], held_out: bool, rng: random.Random) -> str:
    """One of them; for a held-out message half of the time one that no training message has."""
    new = held_out and rng.random() < 0.5
    return rng.choice(every[-KEPT_BACK:] if new else every[:-KEPT_BACK])


def row(number: int, held_out: bool, rng: random.Random) -> dict[str, str]:
    """One message, and the ticket that it should become. Products take turns; everything else is drawn."""
    product = (OTHER_PRODUCTS if held_out else PRODUCTS)[number % (len(OTHER_PRODUCTS if held_out else PRODUCTS))]
    problem = list(PROBLEMS)[rng.randrange(len(PROBLEMS))]
    wants = list(WISHES)[rng.randrange(len(WISHES))]
    order = f"{'T' if held_out else 'B'}W-{rng.randrange(1000, 10_000)}" if rng.random() > WITHOUT_ORDER else None
    greeting = rng.choice(GREETINGS)
    complaint = sentences(PROBLEMS[problem], held_out, rng).format(product=product)
    complaint = greeting + complaint if greeting else complaint[0].upper() + complaint[1:]
    parts = [complaint, sentences(WISHES[wants], held_out, rng)]
    if order:
        parts.insert(rng.randrange(1, 3), sentences(ORDERS, held_out, rng).format(order=order))
    ticket = {"order": order, "product": product, "problem": problem, "wants": wants}
    return {"instruction": INSTRUCTION, "input": " ".join(parts) + rng.choice(THANKS), "output": json.dumps(ticket)}


def rows(count: int, held_out: bool) -> list[dict[str, str]]:
    """As many different messages."""
    rng, made = random.Random(f"{SEED} {held_out}"), {}
    while len(made) < count:
        one = row(len(made), held_out, rng)
        made.setdefault(one["input"], one)
    return list(made.values())


FILES = {
    "tickets.json": lambda: rows(TRAINING, held_out=False),
    "tickets_test.json": lambda: rows(HELD_OUT, held_out=True),
}

if __name__ == "__main__":
    for file, make in FILES.items():
        (HERE / file).write_text(json.dumps(make(), indent=2) + "\n", encoding="utf-8")
