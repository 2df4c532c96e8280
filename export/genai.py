"""genai_config.json, by which onnxruntime-genai finds its way in a graph that decodes.

    og.Model("writer")                  the folder as it is, whichever family the model is of
    adapters.load("writer/adapter.onnx_adapter", "mine")       of the forms inputs and prompt
    generator.set_model_input("adapter_ids", ids)              of the form multi

It says again what the signature and config.json say: names, layers, heads, the ids that begin, end and pad a text. Its
type is `decoder`, genai's word for whatever takes keys and values one by one. By a family's name it expects what is
usual there: of `gpt2`, the keys and values of a layer in one tensor.

genai begins every text with an empty past. A folder of the form prefix, whose past is the adapter, has no such file, so
that genai refuses it: it would run the bare model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refpeft.checkpoint import tokens
from refpeft.export.card import write_json
from refpeft.export.form import Made, Subject
from refpeft.model import Model

FILE = "genai_config.json"
ROOM: Mapping[str, int] = {"llama": 2048, "qwen2": 32768}  # max_position_embeddings that a config.json leaves out
KNOWN = ("input_ids", "attention_mask", "position_ids", "logits")
CACHES = {  # field → how the tensors of layer %d are called
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


def write(folder: Path, form: str, subject: Subject, made: Made) -> None:
    """The file, where genai can run what is in the folder."""
    c = made.model.config
    if subject.decode and form != "prefix" and not c.encoder_decoder:
        write_json(folder / FILE, described(folder, made))


def described(folder: Path, made: Made) -> dict[str, Any]:
    c, room = made.model.config, context(made.model)
    return {
        "model": {
            "type": "decoder",
            **special(folder),
            "context_length": room,
            "vocab_size": made.outputs["logits"].shape[-1],
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "hidden_size": c.hidden_size,
                "head_size": c.head_dim,
                "num_attention_heads": c.num_heads,
                "num_key_value_heads": c.num_kv_heads,
                "num_hidden_layers": c.num_layers,
                "inputs": names(made.inputs),
                "outputs": names(list(made.outputs)),
            },
        },
        "search": {"max_length": room, "do_sample": False, "past_present_share_buffer": False},
    }


def names(values: Sequence[str]) -> dict[str, str]:
    """Of the inputs or outputs those that genai knows: some alone, the caches of all layers by one pattern. Others,
    like adapter_ids, it takes under their own names."""
    return {name: name for name in KNOWN if name in values} | {
        field: name for field, name in CACHES.items() if name % 0 in values
    }


def special(folder: Path) -> dict[str, Any]:
    """The ids that the folder names; a row that has ended is filled with the padding, else with what ends one."""
    stop = tokens.ends(folder)
    found: dict[str, Any] = {name: [*tokens.ids(folder, name), None][0] for name in ("bos_token_id", "pad_token_id")}
    if stop:
        found |= {"eos_token_id": stop[0] if len(stop) == 1 else stop}
        found["pad_token_id"] = stop[0] if found["pad_token_id"] is None else found["pad_token_id"]
    return {name: value for name, value in found.items() if value is not None}


def context(model: Model) -> int:
    """How many positions there are: rows of the table where they are learned, else what config.json says."""
    site = model.sites.get("embed.position")
    if site is not None:
        return int(model.params[site.weight].shape[0]) - model.config.position_offset
    said = model.source.get("max_position_embeddings")
    return said if isinstance(said, int) else ROOM[model.config.family]
