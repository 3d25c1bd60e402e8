"""Writes a GGUF file as a Hugging Face folder with fp32 weights, for the peers that read only those.

    python benchmarks/hf_folder.py FILE FOLDER

The weights are the GGUF's own, dequantised. Needs llama-export with its `build` extra, and memory for all of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_export.errors import LlamaExportError
from llama_export.export.source import open_source
from safetensors.numpy import save_file


def write_folder(file: Path, folder: Path) -> None:
    """Write the checkpoint in the GGUF `file` to the new `folder`.

    Raises LlamaExportError when the file cannot be read, OSError when the folder exists or cannot be written.
    """
    source = open_source(str(file))
    folder.mkdir(parents=True)
    for name, content in source.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    weights = {name: tensor.read(0, tensor.shape[0]) for name, tensor in source.tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        write_folder(arguments.file, arguments.folder)
    except (LlamaExportError, OSError) as error:
        print(f"hf_folder.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
