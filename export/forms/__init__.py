"""The forms of an export. Each is one module (see `refpeft.export.form`); to add one, write it and name it here."""

from collections.abc import Mapping
from typing import cast

from refpeft.export.form import Form
from refpeft.export.forms import inputs, merged, multi, prefix, prompt, training, unmerged

FORMS: Mapping[str, Form] = cast(
    Mapping[str, Form],
    {
        "merged": merged,
        "unmerged": unmerged,
        "inputs": inputs,
        "prompt": prompt,
        "prefix": prefix,
        "multi": multi,
        "training": training,
    },
)
