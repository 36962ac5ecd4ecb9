"""The one mapping between the fields of a RunSpec and the controls of the page, both ways.

    settings   which control a setting needs, and its label on the page
    controls   the controls themselves
    reading    control → value
    writing    value → control
    kept       a form as it was left

A setting gets its control from its type, so a new field of `engine/spec/run_spec.py` appears on the page automatically.
A control holds text, a tick or a list; whether that is a valid value is decided by RunSpec alone. Nothing is clamped or
guessed here, and whatever cannot be parsed comes back as a Problem at its field.
"""
