"""Weights in diffusers' folder layout: safetensors read tensor by tensor, written atomically.

A model is built without memory for its parameters (`paddle.LazyGuard`), then each tensor is read from its file, put on the
device, converted there and handed over to its parameter, so that host memory peaks at the weights plus a few times the
largest tensor. The safetensors format is short enough to be handled here (8 bytes header length, a JSON header, the bytes),
which keeps one tensor at a time in memory and reports a damaged file in words.

Torch keeps a Linear weight as [out, in], Paddle as [in, out]: these are transposed on the way, in both directions. A file that
ppdiffusers or PaddleNLP wrote says so in its table and is read as it is.

Types: on a GPU the weights are held in the type asked for. Paddle's CPU kernels compute in float32 only, so on a CPU a request
for float16 or bfloat16 gives float32 weights and one warning.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from lowbit_video.arguments import shown
from lowbit_video.files import write_whole

from .config import CONFIG_NAME, DIFFUSERS_VERSION, Config, ConfigError, known_keys, load_config, read_json, write_json
from .folders import PADDLE_STEM, STEMS

__all__ = [
    "Config", "ConfigError", "Model", "TensorEntry", "WeightsError", "dtype_name", "load_config", "load_weights",
    "read_header", "save_weights", "working_dtype",
]

# `format` in a safetensors table of files in Paddle's order of axes: ppdiffusers' and PaddleNLP's.
PADDLE_FORMATS = ("pd", "np")
# safetensors name -> (NumPy type of the raw bytes, bytes); NumPy has no bfloat16, Paddle takes its bits as uint16.
FILE_TYPES = {"F64": (np.float64, 8), "F32": (np.float32, 4), "F16": (np.float16, 2), "BF16": (np.uint16, 2)}
FILE_TYPE_OF = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_SHARD_BYTES = 10 * 1000**3
# A longer header is a damaged length, not a model: a million tensors fit.
MAX_HEADER_BYTES = 100_000_000
MAX_NAMES_IN_MESSAGE = 12


class WeightsError(ValueError):
    """A weights folder that cannot be used: files missing or damaged, tensors missing, unexpected or mis-shaped."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, first byte, bytes, type as safetensors names it, shape on disk, whose order of axes."""

    path: str
    offset: int
    nbytes: int
    file_type: str
    shape: tuple[int, ...]
    paddle_order: bool = False


def dtype_name(dtype: Any) -> str:
    """Returns "float32", "float16" or "bfloat16" for a Paddle, torch or NumPy type or its name.

    Raises:
        ValueError: any other type.
    """
    name = getattr(dtype, "__name__", None) if isinstance(dtype, type) else str(dtype).split(".")[-1]
    name = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "FP32": "float32",
            "FP16": "float16", "BF16": "bfloat16"}.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported for weights; use one of {', '.join(DTYPES)}")
    return name


def working_dtype(dtype: Any) -> str:
    """Returns the type that weights asked for in `dtype` have on the current device: float32 on a CPU."""
    name = dtype_name(dtype)
    if name != "float32" and paddle.get_device() == "cpu":
        warnings.warn(
            f"Paddle computes in float32 on a CPU: the weights asked for in {name} are held in float32", stacklevel=3
        )
        return "float32"
    return name


class Model(nn.Layer):
    """What a model with a diffusers folder has: `config`, `dtype`, `from_pretrained`, `save_pretrained`.

    A subclass decorates its `__init__` with `config.keep_config`; its parameters are then the known config keys.
    """

    class_name: str = ""  # as `_class_name` in config.json; "" means the Python class's own name
    also_reads: tuple[str, ...] = ()  # other classes whose folders hold what this one needs
    weights_stem: str = STEMS[0]
    ignored_keys: tuple[str, ...] = ()  # config keys accepted and dropped
    ignored_tensors: tuple[str, ...] = ()  # regular expressions: tensors on disk that are not used
    tied_tensors: dict[str, str] = {}  # other name on disk -> name of the parameter
    float32_tensors: tuple[str, ...] = ()  # regular expressions: parameters that stay float32 when the rest is float16
    repeated: dict[str, str] = {}  # config key that counts layers -> regular expression: a layer's tensors, its number a group

    config: Config
    stored: StoredWeights | None = None  # where the weights lie, of a model that was built without reading them

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Model:
        """Builds a model whose parameters have no memory yet; `load_weights` fills them."""
        with paddle.LazyGuard():
            model = cls(**config)
        for parameter in model.parameters():
            parameter.stop_gradient = True
        model.eval()
        return model

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, dtype: Any = "float32", variant: str | None = None, read: bool = True):
        """Reads a model from a folder in diffusers' layout, onto the current device.

        Args:
            folder: the component's own folder, such as ".../transformer".
            dtype: "float32", "float16" or "bfloat16"; on a CPU weights are float32 all the same, with a warning.
            variant: the "fp16" of "diffusion_pytorch_model.fp16.safetensors".
            read: False checks everything and leaves the weights without memory, until `model.stored.read(model)`.
        Raises:
            ConfigError: config.json is missing, is of another class, or has unknown keys.
            WeightsError: weight files missing or damaged, or not the ones for this configuration; all before anything is built.
        """
        names = (cls.class_name or cls.__name__, *cls.also_reads)
        config = load_config(folder, names, known_keys(cls), cls.ignored_keys)
        entries = _read_tables(os.fspath(folder), cls.weights_stem, variant)
        cls._check_counts(folder, config, entries)
        try:
            model = cls.from_config(config)
        except Exception as error:  # Paddle's own have any type
            raise ConfigError(f"{os.path.join(folder, CONFIG_NAME)} describes a {cls.__name__} that cannot be built "
                              f"({str(error).strip()}); correct its sizes") from error
        stored = find_weights(model, folder, dtype, variant, entries)
        if read:
            stored.read(model)
        else:
            model.stored = stored
        return model

    @classmethod
    def _check_counts(cls, folder: str | os.PathLike, config: dict[str, Any], entries: dict[str, TensorEntry]) -> None:
        """Raises WeightsError where a configuration asks for more layers than the weights hold: they would all be built."""
        for key, pattern in cls.repeated.items():
            asked = config.get(key, 0)
            if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
                raise ConfigError(f"{os.path.join(folder, CONFIG_NAME)}: {key} is {asked!r}; give a number of layers")
            held = len({match[1] for match in (re.search(pattern, name) for name in entries) if match})
            if asked > held:
                config = os.path.join(folder, CONFIG_NAME)
                raise WeightsError(f"{config} asks for {key} = {asked}, and the weights hold {held}: tensors missing; correct "
                                   "the configuration, or fetch the weights that belong to it")

    def save_pretrained(
        self, folder: str | os.PathLike, dtype: Any = None, max_shard_size: int | str = DEFAULT_SHARD_BYTES
    ) -> None:
        """Writes config.json and safetensors files that diffusers (or transformers) reads."""
        save_weights(self, folder, self.weights_stem, dtype, max_shard_size)

    def config_json(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        return {"_class_name": self.class_name or type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION, **self.config}

    @property
    def dtype(self) -> paddle.dtype:
        """The Paddle type of the weights."""
        return next(iter(self.parameters())).dtype


# ---------------------------------------------------------------------------------------------------------------- reading


def read_header(path: str) -> dict[str, TensorEntry]:
    """Reads the table of a safetensors file and checks it against the file's size.

    Raises:
        WeightsError: no such file, truncated, or not safetensors.
    """
    if not os.path.isfile(path):
        raise WeightsError(f"weights file missing: {path}")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"version"):
            raise WeightsError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository")
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise WeightsError(
                f"{path} is damaged: its header should take {header_bytes} bytes and the file has {size}; fetch it again"
            )
        try:
            header = json.loads(file.read(header_bytes))
            paddle_order = (header.pop("__metadata__", None) or {}).get("format") in PADDLE_FORMATS
            entries = {}
            for name, item in header.items():
                begin, end = item["data_offsets"]
                shape = tuple(item["shape"])
                file_type = item["dtype"]
                if not isinstance(file_type, str) or any(type(n) is not int for n in (begin, end, *shape)):
                    raise TypeError(f"the entry of {name} is {shown(item)}")
                if paddle_order and file_type == "U16":
                    file_type = "BF16"  # Paddle hands NumPy the bits
                entries[name] = TensorEntry(path, 8 + header_bytes + begin, end - begin, file_type, shape, paddle_order)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path} is damaged: its header cannot be read ({error}); fetch it again") from None
    for name, entry in entries.items():
        if entry.file_type not in FILE_TYPES:
            raise WeightsError(
                f"{path}: tensor {name} has type {entry.file_type}; supported: {', '.join(FILE_TYPES)}"
            )
        wanted = math.prod(entry.shape) * FILE_TYPES[entry.file_type][1]
        if entry.offset < 8 + header_bytes or entry.nbytes != wanted:
            raise WeightsError(f"{path} is damaged: tensor {name} should take {wanted} bytes, its table says {entry.nbytes}")
        if entry.offset + entry.nbytes > size:
            raise WeightsError(
                f"{path} is truncated: tensor {name} ends at byte {entry.offset + entry.nbytes}, the file has {size}; "
                f"fetch it again"
            )
    place = 8 + header_bytes
    for name, entry in sorted(entries.items(), key=lambda one: (one[1].offset, one[1].nbytes)):
        if entry.offset != place:  # the format has no gaps and shares no bytes: its own reader refuses both
            raise WeightsError(f"{path} is damaged: tensor {name} begins at byte {entry.offset} of the file, and what lies "
                               f"before it ends at {place}; fetch it again")
        place += entry.nbytes
    return entries


def _find_files(folder: str, stem: str, variant: str | None) -> list[str]:
    """Returns the paths of the weight files in a folder: the shards that an index names, or the single file.

    A folder without the variant is read without it, with a warning: in published pipelines not every component has each.
    """
    infix = f".{variant}" if variant else ""
    tried = []
    for name in dict.fromkeys((stem, *STEMS, PADDLE_STEM)):
        index = os.path.join(folder, f"{name}.safetensors.index{infix}.json")
        single = os.path.join(folder, f"{name}{infix}.safetensors")
        tried += [os.path.basename(single), os.path.basename(index)]
        if os.path.isfile(index):
            try:
                shards = sorted(set(read_json(index)["weight_map"].values()))
            except (ConfigError, KeyError, AttributeError, TypeError) as error:
                raise WeightsError(f"{index} is damaged: {error}") from None
            outside = [shard for shard in shards if not isinstance(shard, str) or os.path.basename(shard) != shard]
            if outside:
                raise WeightsError(f"{index} names files outside its folder: {_listed(map(str, outside))}")
            missing = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
            if missing:
                raise WeightsError(f"{folder}: {len(missing)} of {len(shards)} shards missing: {_listed(missing)}")
            return [os.path.join(folder, shard) for shard in shards]
        if os.path.isfile(single):
            return [single]
    if not os.path.isdir(folder):
        raise WeightsError(f"no such folder: {folder}")
    if variant:
        with contextlib.suppress(WeightsError):
            plain = _find_files(folder, stem, None)
            warnings.warn(f"{folder} has no weights of variant {variant!r}; reading {os.path.basename(plain[0])}", stacklevel=4)
            return plain
    there = sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".pdparams")))
    advice = ""
    if any(name.endswith(".safetensors") for name in there):
        advice = " Is a `variant` needed (such as variant=\"fp16\")?"
    elif there:
        library = "ppdiffusers" if all(name.endswith(".pdparams") for name in there) else "diffusers"
        advice = f" Only safetensors are read: convert with save_pretrained(..., safe_serialization=True) in {library}."
    raise WeightsError(f"no weights in {folder}: looked for {', '.join(tried)}; found {_listed(there) or 'none'}.{advice}")


def _read_tables(folder: str, stem: str, variant: str | None) -> dict[str, TensorEntry]:
    """The tables of all weight files of a folder."""
    entries: dict[str, TensorEntry] = {}
    for path in _find_files(folder, stem, variant):
        entries.update(read_header(path))
    return entries


def load_weights(model: nn.Layer, folder: str | os.PathLike, dtype: Any = "float32", variant: str | None = None,
                 entries: dict[str, TensorEntry] | None = None) -> None:
    """Streams the weights of a folder into a model's parameters and persistable buffers, on the current device.

    Arguments and errors are those of `find_weights`.
    """
    find_weights(model, folder, dtype, variant, entries).read(model)


@dataclass(frozen=True)
class StoredWeights:
    """Where a model's weights lie: the table entry of each tensor's name, and the type that they have in memory."""

    entries: dict[str, TensorEntry]
    dtype: str

    def read(self, model: nn.Layer) -> None:
        """Streams them into the model's parameters and persistable buffers, on the current device, one at a time."""
        state, linear = model.state_dict(), _linear_weights(model)
        in_float32 = getattr(model, "float32_tensors", ()) if self.dtype == "float16" else ()
        open_path, file = None, None
        try:
            for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].path, item[1].offset)):
                if entry.path != open_path:
                    if file is not None:
                        file.close()
                    open_path, file = entry.path, open(entry.path, "rb")
                kept = any(re.search(pattern, name) for pattern in in_float32)
                transposed = name in linear and not entry.paddle_order
                _fill(state[name], _read(file, entry, transposed, "float32" if kept else self.dtype))
        finally:
            if file is not None:
                file.close()


def find_weights(model: nn.Layer, folder: str | os.PathLike, dtype: Any = "float32", variant: str | None = None,
                 entries: dict[str, TensorEntry] | None = None) -> StoredWeights:
    """Checks the weights of a folder against a model, by the files' tables; reads no tensor.

    Args:
        model: a `Model`, built by `from_config` (parameters without memory) or in the ordinary way.
        folder: holds {stem}.safetensors, or {stem}.safetensors.index.json and its shards.
        dtype: of the parameters afterwards; float32 on a CPU (see `working_dtype`).
        variant: infix of the file names, such as "fp16".
        entries: the files' tables, where they are read already.
    Raises:
        WeightsError: files missing or damaged; tensors missing, unexpected, or of another shape (each is named).
    """
    folder = os.fspath(folder)
    target = working_dtype(dtype)
    if entries is None:
        entries = _read_tables(folder, getattr(model, "weights_stem", STEMS[0]), variant)
    state = model.state_dict()
    linear = _linear_weights(model)
    tied = getattr(model, "tied_tensors", {})
    ignored = getattr(model, "ignored_tensors", ())
    plan: dict[str, TensorEntry] = {}
    unexpected = []
    for name, entry in entries.items():
        if name in state:
            plan[name] = entry
        elif name in tied:
            plan.setdefault(tied[name], entry)
        elif not any(re.search(pattern, name) for pattern in ignored):
            unexpected.append(name)
    missing = [name for name in state if name not in plan]
    mismatched = []
    for name, entry in plan.items():
        wanted = _shape_on_disk(state[name], name in linear and not entry.paddle_order)
        if entry.shape != wanted:
            mismatched.append(f"{name} is {list(entry.shape)}, the configuration needs {list(wanted)}")
    problems = [
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    if problems:
        raise WeightsError(f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(problems)}")
    return StoredWeights(plan, target)


def _read(file, entry: TensorEntry, transposed: bool, target: str) -> paddle.Tensor:
    """Reads one tensor onto the current device, in Paddle's order of axes and the target type."""
    file.seek(entry.offset)
    raw = np.fromfile(file, dtype=FILE_TYPES[entry.file_type][0], count=math.prod(entry.shape)).reshape(entry.shape)
    tensor = paddle.to_tensor(raw)
    del raw
    if transposed:
        tensor = tensor.t().contiguous()
    return tensor if dtype_of(tensor) == target else tensor.cast(target)


def _fill(parameter: paddle.Tensor, tensor: paddle.Tensor) -> None:
    """Hands a tensor's memory over to a parameter: no second copy."""
    tensor._share_buffer_to(parameter)


# ---------------------------------------------------------------------------------------------------------------- writing


def save_weights(
    model: nn.Layer,
    folder: str | os.PathLike,
    filename_stem: str = STEMS[0],
    dtype: Any = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a model's safetensors files and config.json, in diffusers' layout and torch's order of axes.

    Files get their names when all are complete; older weight files of the same stem are removed then.

    Args:
        model: with `config_json()`, where config.json is to be written.
        folder: made if need be.
        filename_stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).
        dtype: type on disk; None: as the parameters are.
        max_shard_size: bytes, or such as "5GB"; a tensor larger than that gets a shard of its own.
    """
    folder = os.fspath(folder)
    limit = _bytes_of(max_shard_size)
    on_disk = None if dtype is None else dtype_name(dtype)
    os.makedirs(folder, exist_ok=True)
    state = model.state_dict()
    linear = _linear_weights(model)

    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    used = total = 0
    for name, tensor in state.items():
        file_type = FILE_TYPE_OF[on_disk or dtype_of(tensor)]
        shape = _shape_on_disk(tensor, name in linear)
        nbytes = math.prod(shape) * FILE_TYPES[file_type][1]
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append((name, file_type, shape, nbytes))
        used += nbytes
        total += nbytes

    count = len(shards)
    names = [f"{filename_stem}.safetensors"]
    if count > 1:
        names = [f"{filename_stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with contextlib.ExitStack() as complete:
        for name, shard in zip(names, shards):
            _write_file(complete.enter_context(write_whole(os.path.join(folder, name))), shard, state, linear)
    index_name = f"{filename_stem}.safetensors.index.json"
    if count > 1:
        weight_map = {item[0]: name for name, shard in zip(names, shards) for item in shard}
        write_json(os.path.join(folder, index_name), {"metadata": {"total_size": total}, "weight_map": weight_map})
    stale = re.compile(rf"{re.escape(filename_stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for name in os.listdir(folder):
        if stale.fullmatch(name) and name not in names and not (count > 1 and name == index_name):
            os.remove(os.path.join(folder, name))
    if hasattr(model, "config_json"):
        write_json(os.path.join(folder, CONFIG_NAME), model.config_json())


def _write_file(path: os.PathLike, shard: list, state: dict[str, paddle.Tensor], linear: set[str]) -> None:
    """Writes one safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, file_type, shape, nbytes in shard:
        header[name] = {"dtype": file_type, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes begin at a multiple of 8
    paddle_type = {file_type: name for name, file_type in FILE_TYPE_OF.items()}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, file_type, _, nbytes in shard:
            tensor = state[name]
            if dtype_of(tensor) != paddle_type[file_type]:
                tensor = tensor.cast(paddle_type[file_type])
            if name in linear:
                tensor = tensor.t().contiguous()
            array = np.ascontiguousarray(tensor.numpy())
            assert array.nbytes == nbytes, name
            file.write(array.data)


# ---------------------------------------------------------------------------------------------------------------- helpers


def dtype_of(tensor: paddle.Tensor) -> str:
    """Returns a tensor's type as a plain name, such as "float16"."""
    return str(tensor.dtype).split(".")[-1]


def _linear_weights(model: nn.Layer) -> set[str]:
    """Returns the names of the weights that torch keeps the other way round."""
    names = set()
    for prefix, layer in model.named_sublayers(include_self=True):
        if isinstance(layer, nn.Linear):
            names.add(f"{prefix}.weight" if prefix else "weight")
    return names


def _shape_on_disk(tensor: paddle.Tensor, transposed: bool) -> tuple[int, ...]:
    shape = tuple(int(n) for n in tensor.shape)
    return shape[::-1] if transposed else shape


def _bytes_of(size: int | str) -> int:
    """Turns 5000000 or "5MB" into bytes (decimal units; "MiB" is binary)."""
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", str(size).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size {size!r} is not understood; give bytes or a text such as \"5GB\"")
    return max(1, int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")))


def _listed(names) -> str:
    """Returns the first names and how many more there are."""
    names = list(names)
    more = len(names) - MAX_NAMES_IN_MESSAGE
    return ", ".join(names[:MAX_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
