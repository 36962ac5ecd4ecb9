"""The one mapping between the fields of a RunSpec and the controls of the page, both ways.

    settings   which control a setting needs, and what it is called in the page
    controls   the controls themselves
    reading    control → value
    writing    value → control

A setting gets its control from its type, so a new field of `engine/spec/run_spec.py` appears on the page because it
exists. What a control holds is text, a tick or a list; whether that is a good value is decided by RunSpec alone:
nothing is clamped or guessed here, and whatever cannot be read comes back as a Problem at its field.
"""
