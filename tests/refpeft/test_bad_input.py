"""Files and folders that are not what they should be: one sentence, nothing changed on disk, no other exception."""

import errno
import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refpeft
from refpeft.checkpoint import safetensors
from refpeft.checkpoint.families import plan
from refpeft.checkpoint.safetensors import Malformed
from refpeft.methods import METHODS
from tests.export.adapters import made

CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_head": 2, "n_layer": 1,
    "n_positions": 12, "vocab_size": 20, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
    "num_hidden_layers": 1, "intermediate_size": 12, "vocab_size": 20, "max_position_embeddings": 12,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def numbers(config):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan(config).shapes.items()}


def write_model(where, config=CONFIG, tensors=None):
    where.mkdir(exist_ok=True)
    safetensors.write_json(where / "config.json", config)
    safetensors.write(where / "model.safetensors", numbers(config) if tensors is None else tensors)
    return where


@pytest.fixture
def gpt2(tmp_path):
    return write_model(tmp_path / "gpt2")


@pytest.fixture
def adapter(gpt2):
    model = refpeft.load(gpt2)
    where = gpt2.parent / "adapter"
    refpeft.save_adapter(
        refpeft.init("dora", {"r": 2, "rank_pattern": {"c_fc": 3}, "target_modules": ["c_attn", "c_fc"]}, model), where
    )
    return where


def one_sentence(e):
    assert str(e)
    assert "\n" not in str(e)
    assert len(str(e)) < 700


def loads_or_refuses(f):
    try:
        return f()
    except Malformed as e:
        one_sentence(e)
        return None


# ── the format ───────────────────────────────────────────────────────────────────────────────────────────────────────


def file_of(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_FILES = {
    "empty": (b"", "0 bytes"),
    "no header": (b"\0" * 7, "7 bytes"),
    "a huge header": (struct.pack("<Q", 2**63) + b"{}", "header should be"),
    "a header past the end": (struct.pack("<Q", 3) + b"{}", "header should be 3"),
    "not JSON": (file_of(b"{"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not JSON in UTF-8"),
    "a list": (file_of([]), "expected a JSON object"),
    "deep": (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested"),
    "a key twice": (file_of(b'{"a": 1, "a": 2}'), "occurs twice"),
    "NaN": (file_of(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"0000"), "NaN"),
    "digits": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "an entry that is a number": (file_of({"a": 1}), "expected dtype, shape"),
    "an unknown dtype": (file_of({"a": entry([1], 0, 4, "F8_E4M3")}, b"0000"), "dtype must be"),
    "a negative shape": (file_of({"a": entry([-1], 0, 4)}, b"0000"), "natural numbers"),
    "a huge shape": (file_of({"a": entry([2**62, 2**62], 0, 4)}, b"0000"), "data_offsets give"),
    "a fractional shape": (file_of({"a": entry([1.0], 0, 4)}, b"0000"), "natural numbers"),
    "a true shape": (file_of({"a": entry([True], 0, 4)}, b"0000"), "natural numbers"),
    "33 axes": (file_of({"a": entry([1] * 33, 0, 4)}, b"0000"), "natural numbers"),
    "offsets backwards": (file_of({"a": entry([1], 4, 0)}, b"0000"), "data_offsets give"),
    "an overlap": (file_of({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"000000"), "overlaps"),
    "a hole": (file_of({"a": entry([1], 4, 8)}, b"00000000"), "does not follow"),
    "truncated": (file_of({"a": entry([2], 0, 8)}, b"0000"), "take 8 bytes"),
    "bytes behind": (file_of({"a": entry([1], 0, 4)}, b"00000000"), "take 4 bytes"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_malformed_file_is_refused(name, tmp_path):
    raw, words = BAD_FILES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(Malformed, match=words) as e:
        safetensors.read(path)
    one_sentence(e.value)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from([*safetensors.DTYPES, "F8", ""]) | JSONS,
    "shape": st.lists(st.integers(-2, 4), max_size=3) | JSONS,
    "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2) | JSONS,
})  # fmt: skip
SETTINGS = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(st.dictionaries(st.text(max_size=4), ENTRIES | JSONS, max_size=3), st.binary(max_size=40))
def test_any_header_is_read_as_the_library_does_or_refused(tmp_path, header, data):
    from safetensors.numpy import load

    raw = file_of(header, data)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    found = loads_or_refuses(lambda: safetensors.read(path))
    if found is not None:
        want = load(raw)
        assert found.keys() == want.keys()
        assert all(found[k].tobytes() == want[k].tobytes() and found[k].shape == want[k].shape for k in want)


@SETTINGS
@given(st.data())
def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    safetensors.write(path, {"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float16)})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    for a in (loads_or_refuses(lambda: safetensors.read(path)) or {}).values():
        assert a.tobytes() is not None


@pytest.mark.parametrize("shift", range(8))
def test_misaligned_tensors_are_read(shift, tmp_path):
    a = np.arange(3.0)
    path = tmp_path / "x.safetensors"
    pad = {"p": entry([shift], 0, shift, "U8")}
    path.write_bytes(file_of(pad | {"a": entry([3], shift, shift + 24, "F64")}, bytes(shift) + a.tobytes()))
    got = safetensors.read(path)["a"]
    assert got.flags.aligned
    assert np.array_equal(got, a)


def test_arrays_are_written_in_c_order_however_they_lie(tmp_path):
    from safetensors.numpy import load_file

    a = np.arange(12.0).reshape(3, 4)
    odd = {
        "T": a.T,
        "step": a[:, ::2],
        "back": a[::-1],
        "wide": np.broadcast_to(a[0], (2, 4)),
        "none": a[:0],
        "one": np.float32(3) * np.ones(()),
    }
    safetensors.write(tmp_path / "x.safetensors", odd)
    for found in (load_file(tmp_path / "x.safetensors"), safetensors.read(tmp_path / "x.safetensors")):
        assert found.keys() == odd.keys()
        assert all(np.array_equal(found[k], odd[k]) and found[k].shape == odd[k].shape for k in odd)


def test_loading_maps_and_copies_nothing(gpt2):
    model = refpeft.load(gpt2)
    for a in model.params.values():
        assert not a.flags.owndata
        assert not a.flags.writeable


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_CONFIGS = {
    "model_type": [None, "t5", 3, ["gpt2"]],
    "architectures": [None, [], "GPT2LMHeadModel", ["GPT2DoubleHeadsModel"], [3], {}],
    "n_embd": [None, "8", 0, -8, 8.0, True, 10**30, 7, 10],
    "n_head": [None, 3, 0, []],
    "n_layer": [None, 0, 2, "1"],
    "n_positions": [0, 11, "12"],
    "n_inner": [5, "a", -1],
    "vocab_size": [None, 19, 1.5],
    "layer_norm_epsilon": ["x", -1, 0, []],
    "activation_function": ["swishy", 3, []],
    "tie_word_embeddings": ["yes", 1, False],
    "add_cross_attention": [True],
    "quantization_config": [{"bits": 4}],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in BAD_CONFIGS.items() for v in vs])
def test_a_wrong_config_is_refused(field, value, tmp_path):
    where = write_model(tmp_path / "m")
    safetensors.write_json(where / "config.json", CONFIG | {field: value})
    with pytest.raises(Malformed) as e:
        refpeft.load(where)
    one_sentence(e.value)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (CONFIG, {"n_layer": 18265518}, "n_layer must be a positive integer, 10000 at most, found 18265518"),
        (LLAMA, {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be"),
        (LLAMA, {"head_dim": 2**31 - 2}, "heads must be of width 65536 at most, found 2147483646"),
        (LLAMA, {"hidden_size": 2**31 - 2, "num_attention_heads": 1, "num_key_value_heads": 1}, "heads must be"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_before_any_is_taken(config, changes, words, tmp_path):
    where = write_model(tmp_path / "m", config)
    safetensors.write_json(where / "config.json", config | changes)
    with pytest.raises(Malformed, match=words) as e:
        refpeft.load(where)
    one_sentence(e.value)


@SETTINGS
@given(st.data())
def test_any_config_is_read_or_refused(tmp_path, data):
    config = data.draw(st.sampled_from([CONFIG, LLAMA]))
    where = write_model(tmp_path / "m", config)
    field = data.draw(
        st.sampled_from([*config, "head_dim", "num_key_value_heads", "rope_theta", "id2label", "pad_token_id"])
    )
    safetensors.write_json(where / "config.json", config | {field: data.draw(JSONS)})
    loads_or_refuses(lambda: refpeft.load(where))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    good = numbers(CONFIG)
    name = "transformer.h.0.attn.c_attn.weight"
    changes = {
        "is missing": {k: v for k, v in good.items() if k != name},
        "expected shape": good | {name: good[name].T},
        "not one that": good | {"transformer.h.1.attn.c_attn.weight": good[name]},
        "float dtype": good | {name: good[name].astype(np.int32)},
        "differs from": good | {"lm_head.weight": good["transformer.wte.weight"] + 1},
    }
    for words, tensors in changes.items():
        with pytest.raises(Malformed, match=words) as e:
            refpeft.load(write_model(tmp_path / "m", CONFIG, tensors))
        one_sentence(e.value)
        assert "c_attn" in str(e.value) or "lm_head" in str(e.value)


def test_buffers_prefixes_and_tied_copies_are_understood(tmp_path):
    good = numbers(CONFIG)
    want = refpeft.load(write_model(tmp_path / "m")).params
    files = [
        {k.removeprefix("transformer."): v for k, v in good.items()} | {"h.0.attn.bias": np.ones((1, 1, 12, 12), bool)},
        good
        | {
            "lm_head.weight": good["transformer.wte.weight"],
            "transformer.h.0.attn.masked_bias": np.float32(-1e4) * np.ones(()),
        },
    ]
    for n, tensors in enumerate(files):
        got = refpeft.load(write_model(tmp_path / str(n), CONFIG, tensors)).params
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[k], want[k]) for k in want)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    where = write_model(tmp_path / "m")
    (where / "model.safetensors").rename(where / "pytorch_model.bin")
    with pytest.raises(Malformed, match="safe_serialization"):
        refpeft.load(where)


@pytest.mark.parametrize(
    "file",
    ["../m/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "gone.safetensors", 3, "a\\b.safetensors"],
)
def test_an_index_leads_nowhere_else(file, tmp_path):
    where = write_model(tmp_path / "m")
    (where / "model.safetensors").unlink()
    safetensors.write_json(where / "model.safetensors.index.json", {"weight_map": {"a": file}})
    with pytest.raises(Malformed) as e:
        refpeft.load(where)
    one_sentence(e.value)


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def change_config(where, **fields):
    safetensors.write_json(where / "adapter_config.json", safetensors.read_json(where / "adapter_config.json") | fields)


REFUSED = {
    "peft_type": ["LOHA", None, 3], "r": ["2", 0, 3, None, 2.0], "lora_alpha": ["8", [], True],
    "use_dora": [False, "yes"],
    "target_modules": [["gone"], "(", 3, ["attn"], ["ln_1"], []],
    "rank_pattern": [{"c_fc": "3"}, {"(": 3}, [], {"c_fc": 4}],
    "bias": ["some", 3, "all", "lora_only"], "lora_dropout": [1.5, "0"], "modules_to_save": [["gone"], "wte", ["wte"]],
    "init_lora_weights": ["pissa_niter_4", "loftq", "corda", "lora_ga", 3], "lora_bias": [True],
    "layers_to_transform": [[1], "0"],
    "layers_pattern": ["h"], "exclude_modules": [["c_fc"], "("], "use_qalora": [True], "alora_invocation_tokens": [[1]],
    "trainable_token_indices": [[1]],
    "target_parameters": [["w"]], "layer_replication": [[[0, 1]]], "use_bdlora": [{"n": 1}],
    "kasa_config": [{"a": 1}], "megatron_config": [{"a": 1}], "arrow_config": [{"k": 1}], "velora_config": [{"k": 1}],
    "monteclora_config": [{"k": 1}], "ensure_weight_tying": [True], "something_new": [1, "x", [1]],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in REFUSED.items() for v in vs])
def test_a_config_that_cannot_be_followed_is_refused(field, value, gpt2, adapter):
    change_config(adapter, **{field: value})
    if (field, value) == ("r", None):
        change_config(adapter, rank_pattern={})  # null means 8
    with pytest.raises(Malformed) as e:
        refpeft.load_adapter(adapter, refpeft.load(gpt2))
    one_sentence(e.value)


def test_unset_fields_of_other_versions_are_accepted(gpt2, adapter):
    change_config(adapter, something_new=None, another=False, third={}, peft_version="9", runtime_config={"a": True})
    assert refpeft.load_adapter(adapter, refpeft.load(gpt2)).method == "dora"


@SETTINGS
@given(field=st.sampled_from([*REFUSED, "alpha_pattern", "fan_in_fan_out", "use_rslora", "task_type"]), value=JSONS)
def test_any_adapter_config_is_read_or_refused(gpt2, adapter, field, value):
    before = (adapter / "adapter_config.json").read_bytes()
    change_config(adapter, **{field: value})
    loads_or_refuses(lambda: refpeft.load_adapter(adapter, refpeft.load(gpt2)))
    (adapter / "adapter_config.json").write_bytes(before)


AWKWARD = [None, True, -1, 0, 10**9, 2**70, 1.5, "x", "(", [], [0], [[1]], {}, {"c_attn": 10**9}]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, {"task_type": "SEQ_CLS"}])
def test_any_field_of_any_method_is_read_or_refused(method, changes, tmp_path):
    """Every field that the folder of an adapter has, with every value; no field makes it take time or memory."""
    model, adapter = made(method, "gpt2")
    refpeft.save_adapter(adapter, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    good = json.loads(config.read_text())
    for field in good:
        for value in AWKWARD:
            safetensors.write_json(config, good | changes | {field: value})
            loads_or_refuses(lambda: refpeft.load_adapter(tmp_path / "a", model))


def test_adapter_tensors_are_all_accounted_for(gpt2, adapter):
    model, path = refpeft.load(gpt2), adapter / "adapter_model.safetensors"
    good = {k: v.copy() for k, v in safetensors.read(path).items()}
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    cases = {
        "is missing": {k: v for k, v in good.items() if k != name},
        "expected shape": good | {name: good[name][:1]},
        "float dtype": good | {name: good[name].astype(np.int32)},
        "not one that": good | {name.replace("h.0", "h.1"): good[name]},
        "another base": {k.replace("transformer.h.0", "model.layers.0"): v for k, v in good.items()},
        "must begin": {k.removeprefix("base_model."): v for k, v in good.items()},
        "differs from the model's": good | {"base_model.model.transformer.wte.weight": np.zeros((20, 8), np.float32)},
    }
    for words, tensors in cases.items():
        safetensors.write(path, tensors)
        with pytest.raises(Malformed, match=words) as e:
            refpeft.load_adapter(adapter, model)
        one_sentence(e.value)


def test_16_bit_adapters_become_float32(gpt2, adapter):
    path = adapter / "adapter_model.safetensors"
    half = {k: v.astype(np.float16) for k, v in safetensors.read(path).items()}
    path.unlink()
    safetensors.write(path, half)
    loaded = refpeft.load_adapter(adapter, refpeft.load(gpt2, dtype="float16"))
    assert {v.dtype for v in loaded.params.values()} == {np.dtype(np.float32)}


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_overwritten(gpt2, tmp_path):
    model, before = refpeft.load(gpt2), sorted(tmp_path.rglob("*"))
    (tmp_path / "file").write_text("mine")
    for target in (gpt2, tmp_path / "file", tmp_path / "no" / "such"):
        with pytest.raises(ValueError, match="exist") as e:
            refpeft.save(model, target)
        one_sentence(e.value)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "file"])
    (tmp_path / "empty").mkdir()
    refpeft.save(model, tmp_path / "empty")
    assert refpeft.load(tmp_path / "empty").params.keys() == model.params.keys()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_save_leaves_nothing(error, gpt2, tmp_path, monkeypatch):
    model, before = refpeft.load(gpt2), sorted(tmp_path.rglob("*"))

    def fail(path, tensors):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors, "write", fail)
    with pytest.raises(type(error)) as e:
        refpeft.save(model, tmp_path / "new")
    if isinstance(error, OSError):
        assert "no space" in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_hf_cannot_hold_is_not_saved(gpt2, tmp_path):
    model = refpeft.load(gpt2)
    adapter = refpeft.init("lora", {"target_modules": ["lm_head"], "lora_bias": True}, model)
    with pytest.raises(ValueError, match=r"lm_head\.bias"):
        refpeft.save(refpeft.merge(model, adapter), tmp_path / "new")
    with pytest.raises(ValueError, match=r"config\.json"):
        refpeft.save(refpeft.Model(model.config, model.sites, model.params), tmp_path / "new")
    assert not (tmp_path / "new").exists()
