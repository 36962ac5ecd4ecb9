"""Reads the tables that our programs read once and never change, so that forks of this process have them already."""

from engine.core import problems
from engine.importer import table
from engine.spec.run_spec import fields
from webui.words import Words

problems.sentences()
problems.reasons()
fields()
table.reasons()
for program in ("llamafactory", "launchers", "axolotl"):
    table.entries(program)
Words("en")("title")
Words("zh").label("training.learning_rate")
