"""Models from a config alone: random weights, or none at all on torch's meta device.

Runs no code from a model's folder; torch and transformers are imported only when asked.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import ModelError
from loratune.models.source import read_model_config

if TYPE_CHECKING:
    from torch import nn


GENERATION_CONFIG = "generation_config.json"


def read_transformers_config(source: Path | str, revision: str | None = None) -> Any:
    """``config.json`` as transformers understands it.

    Args:
        source: a model folder, or a hub id, whose ``config.json`` alone is fetched.
        revision: of the hub's model.

    Raises:
        ModelError: an architecture it does not know, one that does not write text, or a value of
            the wrong type.
    """
    from transformers import AutoConfig

    _quiet()
    is_local = isinstance(source, Path)
    try:
        config = AutoConfig.from_pretrained(
            str(source), revision=revision, local_files_only=is_local, trust_remote_code=False
        )
    except Exception as error:  # each architecture validates in its own way
        where = str(source / "config.json") if isinstance(source, Path) else source
        fix = "restore the file that belongs to the weights" if is_local else "check model.path"
        cause = f"unusable config.json: {first_line(error)}"
        raise ModelError(cause, where=where, fix=fix) from error
    auto_class(config, str(source))
    return config


def read_generation_config(folder: Path) -> Any:
    """``generation_config.json`` as transformers understands it; an empty one where there is none.

    Raises:
        ModelError: if it cannot be read.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return GenerationConfig()
    _quiet()
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever its own checks raise
        raise ModelError(
            f"unusable {GENERATION_CONFIG}: {first_line(error)}",
            where=str(folder),
            fix="restore it, or remove it",
        ) from error


def auto_class(config: Any, where: str) -> Any:
    """The automatic class of transformers that loads a checkpoint whole.

    A checkpoint that reads images or sound too is kept whole, so that it can be written again;
    its language model trains on text alone.

    Args:
        config: as transformers understands it; where both classes know it, the architecture that
            it names decides.
        where: named in errors.

    Raises:
        ModelError: if there is none: an encoder, say.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    both = (AutoModelForCausalLM, AutoModelForMultimodalLM)
    able = [auto for auto in both if type(config) in auto._model_mapping]
    able = [auto for auto in able if auto._model_mapping[type(config)].can_generate()]
    if not able:
        raise ModelError(
            f"transformers has no causal language model for checkpoints of type "
            f"'{config.model_type}'",
            where=where,
            fix="choose a checkpoint that AutoModelForCausalLM or AutoModelForMultimodalLM loads",
        )
    names = config.architectures or ()
    named = [auto for auto in able if auto._model_mapping[type(config)].__name__ in names]
    return (named or able)[0]


def _quiet() -> None:
    """No progress bars and no advice from transformers between our own lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def build_model(numbers: Mapping[str, Any]) -> nn.Module:
    """A model of these numbers with random weights, on torch's default device.

    Args:
        numbers: ``model_type`` and the sizes, as in ``config.json``.

    Raises:
        ModelError: if transformers cannot build it.
    """
    from transformers import AutoConfig

    values, where = dict(numbers), "model.architecture"
    with _build_errors(where):
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model: nn.Module = auto_class(config, where).from_config(config, trust_remote_code=False)
    return model


def meta_model(config: Any, where: str) -> nn.Module:
    """A model on the meta device: names and shapes, no memory.

    Args:
        config: as transformers understands it.
        where: named in errors.

    Raises:
        ModelError: if transformers cannot build it.
    """
    import torch

    with _build_errors(where), torch.device("meta"):
        model: nn.Module = auto_class(config, where).from_config(config, trust_remote_code=False)
    return model


def outline(numbers: Mapping[str, Any]) -> nn.Module:
    """The model of a ``config.json``'s numbers without its weights (on the meta device).

    Raises:
        ModelError: if transformers cannot build it.
    """
    import torch

    try:
        with _parameters_without_data():
            return build_model(numbers)
    except ModelError:  # a single tensor may be larger than the memory
        with torch.device("meta"):
            return build_model(numbers)


def empty_model(folder: Path, dtype: Any, attention: str = "auto") -> nn.Module:
    """The model of a folder in evaluation mode, with its buffers and without its weights.

    Args:
        folder: the model's.
        dtype: torch's, of parameters and buffers.
        attention: as ``model.attention``.

    Raises:
        ModelError: if transformers cannot build it.
    """
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    config = read_transformers_config(folder)
    vars(config).pop("quantization_config", None)  # how the files are stored, not the model
    options = {} if attention == "auto" else {"attn_implementation": attention}
    with _build_errors(str(folder)), no_init_weights(), _parameters_without_data():
        model: Any = auto_class(config, str(folder)).from_config(
            config, dtype=dtype, trust_remote_code=False, **options
        )
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(
                str(folder), local_files_only=True
            )
    built: nn.Module = model.eval()
    return built


@contextlib.contextmanager
def _parameters_without_data() -> Iterator[None]:
    """Modules made in the block hold parameters on the meta device, and real buffers.

    Under ``torch.device("meta")`` masks and frequencies would lose their values too.
    """
    import torch
    from torch import nn

    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def meta_base(folder: Path) -> nn.Module:
    """The model of a folder on the meta device.

    Raises:
        LoratuneError: if its config is unusable.
    """
    read_model_config(folder)
    return meta_model(read_transformers_config(folder), str(folder))


@contextlib.contextmanager
def _build_errors(where: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    kinds = (ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError)
    try:
        yield
    except (*kinds, StrictDataclassError) as error:
        raise ModelError(
            f"transformers cannot build this model: {first_line(error)}",
            where=where,
            fix="check model.path; models that need their own code are not supported",
        ) from error


def first_line(error: BaseException) -> str:
    """The first sentence of a library's message, on one line."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return (text or type(error).__name__)[:300].rstrip(". ")
