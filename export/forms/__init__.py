"""The forms of an export. Each is one module (see `refpeft.export.form`); to add one, write it and name it here."""

from collections.abc import Mapping

from refpeft.export.form import Form
from refpeft.registry import Modules

FORMS: Mapping[str, Form] = Modules(__name__, ("merged", "unmerged", "inputs", "prompt", "prefix", "multi", "training"))
