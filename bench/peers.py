"""Other exporters to ONNX, each as its own documentation has it, run by the python of an environment that has it.

    python bench/peers.py NAME MODEL OUT                        a causal language model with keys and values, float32
    python bench/peers.py NAME MODEL OUT --adapters ADAPTERS    tuned ones that read whole texts, one for each folder in
                                                                ADAPTERS: a folder of its name in OUT, or NAME.error

An exporter that traces torch is given a PeftModel; one that reads folders, the adapter's folder, where it takes one.
Nothing of refpeft is imported here.
"""

import argparse
import json
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

REQUIRES = {  # what its environment holds, in the versions that were tried; those without run where the benchmark does
    "mobius": ("mobius-onnx==0.1.0", "torch==2.13.0", "transformers>=5", "onnxruntime>=1.29"),
    "genai": ("onnxruntime-genai==0.18.0", "torch==2.13.0", "transformers>=5", "peft>=0.21", "onnx", "onnx-ir"),
    "optimum": ("optimum-onnx==0.1.0", "torch==2.13.0", "transformers==4.57.6", "peft>=0.18", "onnxruntime>=1.29"),
}
MODULES = {"mobius": "mobius", "genai": "onnxruntime_genai", "optimum": "optimum.exporters.onnx"}
TASKS = {False: "text-generation-with-past", True: "text2text-generation-with-past"}  # of an encoder-decoder
HERE = ("torch", "transformers")  # exporters that come with the extra [dev]


def loaded(model: Path, adapter: Path | None) -> Any:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter is None:
        return base
    import peft

    return peft.PeftModel.from_pretrained(base, adapter).eval()


def torch_dynamo(model: Path, adapter: Path | None, out: Path) -> None:
    """torch.onnx.export(dynamo=True) of a wrapper with flat inputs and outputs."""
    import torch
    import transformers

    inner = loaded(model, adapter)
    c = inner.config
    layers, tuned = c.num_hidden_layers, adapter is not None

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Any, mask: Any, places: Any = None, past: Any = ()) -> Any:
            if tuned:
                return self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
            cache = transformers.DynamicCache()
            for n, (k, v) in enumerate(past):
                cache.update(k, v, n)
            y = self.inner(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache)
            return y.logits, [(layer.keys, layer.values) for layer in y.past_key_values.layers]

    ids, auto = torch.arange(14).reshape(2, 7), torch.export.Dim.AUTO
    ones, places = torch.ones_like(ids), torch.arange(5, 12).repeat(2, 1)
    free = {0: auto, 1: auto}
    names = ["input_ids", "attention_mask"]
    args: tuple[Any, ...] = (ids, ones)
    shapes: tuple[Any, ...] = (free, free)
    if not tuned:
        g = getattr(c, "num_key_value_heads", c.num_attention_heads)
        k = torch.zeros((2, g, 5, c.hidden_size // c.num_attention_heads))
        args = (ids, torch.ones((2, 12), dtype=torch.int64), places, [(k, k.clone()) for _ in range(layers)])
        shapes = (free, free, free, [({0: auto, 2: auto}, {0: auto, 2: auto})] * layers)
        names += ["position_ids"] + [f"past_key_values.{n}.{w}" for n in range(layers) for w in ("key", "value")]
    out.mkdir()
    torch.onnx.export(
        Flat(), args, out / "model.onnx", dynamo=True, dynamic_shapes=shapes, input_names=names, external_data=True
    )


def transformers_exporter(model: Path, adapter: Path | None, out: Path) -> None:
    """transformers.exporters.OnnxExporter, with the fusions for onnxruntime's CPU kernels."""
    import torch
    import transformers
    from transformers.exporters import OnnxConfig, OnnxExporter

    inner = loaded(model, adapter)
    c = inner.config
    ids, places = torch.arange(14).reshape(2, 7), torch.arange(5, 12).repeat(2, 1)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if adapter is None:
        cache = transformers.DynamicCache()
        g = getattr(c, "num_key_value_heads", c.num_attention_heads)
        for n in range(c.num_hidden_layers):
            k = torch.zeros((2, g, 5, c.hidden_size // c.num_attention_heads))
            cache.update(k, k.clone(), n)
        inputs = {"input_ids": ids, "attention_mask": torch.ones((2, 12), dtype=torch.int64)}
        inputs |= {"position_ids": places, "past_key_values": cache}
    else:
        inner.config.use_cache = False
    exported = OnnxExporter().export(inner, inputs, config=OnnxConfig(dynamic=True, ort_fusions="cpu"))
    out.mkdir()
    OnnxExporter.save_program(exported.program, out / "model.onnx")


def optimum(model: Path, adapter: Path | None, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    source = adapter or model
    task = TASKS[json.loads((model / "config.json").read_text()).get("is_encoder_decoder", False)]
    main_export(str(source), output=str(out), task=task, library_name="transformers", do_validation=False)


def genai(model: Path, adapter: Path | None, out: Path) -> None:
    words = ["-m", str(model), "-i", str(model), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]
    words += ["--extra_options", f"adapter_path={adapter}"] if adapter else []
    sys.argv = ["builder", *words]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def mobius(model: Path, adapter: Path | None, out: Path) -> None:
    if adapter is not None:
        raise SystemExit("it takes no adapter")
    command = [str(Path(sys.executable).parent / "mobius"), "build", "--config", str(model), "--ep", "cpu", str(out)]
    sys.exit(subprocess.run(command, check=False).returncode)


EXPORTERS = {
    "torch": torch_dynamo, "transformers": transformers_exporter, "optimum": optimum, "genai": genai, "mobius": mobius,
}  # fmt: skip


def each(name: str, model: Path, adapters: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for adapter in sorted(adapters.iterdir()):
        try:
            EXPORTERS[name](model, adapter, out / adapter.name)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            why = said[0].replace(str(adapter), "ADAPTER").replace(str(out), "OUT")
            (out / f"{adapter.name}.error").write_text(f"{type(error).__name__}: {why}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPORTERS)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapters", type=Path)
    options = parser.parse_args()
    if options.adapters:
        each(options.name, options.model, options.adapters, options.out)
    else:
        EXPORTERS[options.name](options.model, None, options.out)
