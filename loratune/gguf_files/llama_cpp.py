"""llama.cpp through llama-cpp-python, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.errors import MergeError

PACKAGE = "llama-cpp-python"
_ERROR = 4
"""``GGML_LOG_LEVEL_ERROR``."""
_CALLBACKS: list[Any] = []


def is_installed() -> bool:
    """Whether llama.cpp can be asked."""
    return find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF model in llama.cpp, with an adapter or without."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def ids(self, text: str, *, special: bool) -> list[int]:
        """A text's token ids; ``special`` reads special tokens spelt in it as such."""
        return list(self._model.tokenize(text.encode(), add_bos=False, special=special))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits behind every one of ``ids``, (tokens, vocabulary) in fp32."""
        self._model.reset()
        self._model.eval(list(ids))
        scores: Tensor = torch.from_numpy(self._model.scores[: len(ids)].copy())
        return scores

    def ends(self, token: int) -> bool:
        """Whether llama.cpp stops at a token."""
        from llama_cpp import llama_cpp as api

        return bool(api.llama_vocab_is_eog(self._model._model.vocab, token))


@contextmanager
def running(path: Path, positions: int, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """A GGUF file in llama.cpp, on the CPU.

    Args:
        path: the model.
        positions: most tokens that are asked for at once.
        adapter: an adapter's GGUF file to run with it.

    Raises:
        MergeError: if llama.cpp does not load it.
    """
    from llama_cpp import Llama

    threads, complaints = torch.get_num_threads(), list[str]()
    _collect(complaints)
    try:
        model = Llama(
            str(path),
            n_ctx=positions,
            n_batch=positions,
            n_ubatch=positions,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            logits_all=True,
            lora_path=None if adapter is None else str(adapter),
            verbose=False,
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        what = path.name if adapter is None else f"{adapter.name} on {path.name}"
        cause = complaints[0] if complaints else str(error)
        raise MergeError(f"llama.cpp does not load it: {cause}", where=what) from error
    try:
        yield LlamaCpp(model)
    finally:
        model.close()


def _collect(complaints: list[str]) -> None:
    """From now on llama.cpp's errors go into a list, and its advice nowhere."""
    from llama_cpp import llama_cpp as api

    @api.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def callback(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            complaints.append(text.decode(errors="replace").strip())

    api.llama_log_set(callback, None)
    _CALLBACKS.append(callback)  # llama.cpp calls it for as long as the process lives


def version() -> str:
    """Of the package that holds llama.cpp."""
    from importlib.metadata import version as package_version

    return f"{PACKAGE} {package_version(PACKAGE)}"
