"""Reading and writing weight folders: layout, types, streaming, atomic writes, and what is said about damaged ones."""
import json
import os
import textwrap

import ml_dtypes
import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file, save_file

from lowbit_video.pipelines.shared import weights
from lowbit_video.pipelines.shared.config import ConfigError, keep_config
from lowbit_video.pipelines.shared.weights import Model, WeightsError, dtype_name, read_header
from ranks import run_processes

STEM = "diffusion_pytorch_model"


class Small(Model):
    """A model with a Linear, a Conv, a norm, an embedding and a persistable buffer."""

    ignored_keys = ("irrelevant",)
    ignored_tensors = (r"^decoder\.",)
    tied_tensors = {"other.weight": "table.weight"}
    float32_tensors = (r"^linear\.",)

    @keep_config
    def __init__(self, inside: int = 3, outside: int = 5, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(inside, outside, bias_attr=None if bias else False)
        self.conv = nn.Conv2D(inside, 4, 2)
        self.norm = nn.LayerNorm(outside)
        self.table = nn.Embedding(7, inside)
        self.register_buffer("positions", paddle.randn([1, outside]))
        self.register_buffer("scratch", paddle.zeros([2]), persistable=False)


@pytest.fixture
def model():
    paddle.seed(0)
    return Small(3, outside=5)


def state(model):
    return {name: tensor.astype("float32").numpy() for name, tensor in model.state_dict().items()}


def assert_same(got, want, rtol=0.0):
    got, want = state(got), state(want)
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=0, err_msg=name)


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", f"{STEM}.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"_class_name": "Small", "_diffusers_version": "0.42.0", "inside": 3, "outside": 5, "bias": True}
    again = Small.from_pretrained(tmp_path)
    assert_same(again, model)
    assert again.config == model.config and again.config.outside == 5
    assert again.dtype == paddle.float32 and not again.training
    assert all(parameter.stop_gradient for parameter in again.parameters())
    x = paddle.randn([2, 3])
    np.testing.assert_array_equal(again.linear(x).numpy(), model.linear(x).numpy())


def test_files_are_in_torchs_order_of_axes(model, tmp_path):
    """Read back by safetensors' own library: Linear transposed, Conv, Embedding and buffers not."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / f"{STEM}.safetensors")
    assert tensors["linear.weight"].shape == (5, 3)
    np.testing.assert_array_equal(tensors["linear.weight"], model.linear.weight.numpy().T)
    for name in ("conv.weight", "table.weight", "positions", "norm.weight", "linear.bias"):
        np.testing.assert_array_equal(tensors[name], model.state_dict()[name].numpy())
    assert "scratch" not in tensors


@pytest.mark.parametrize("written, names", [
    ("pd", ["diffusion_paddle_model.safetensors"]), ("np", ["model.safetensors"]),
    ("pd", ["diffusion_paddle_model-00001-of-00002.safetensors", "diffusion_paddle_model-00002-of-00002.safetensors"]),
], ids=["ppdiffusers", "PaddleNLP", "shards"])
def test_files_in_paddles_order_of_axes_are_read_as_they_are(tmp_path, written, names):
    """The Linear is square: nothing but the file's own word tells its order."""
    model = Small(4, outside=4)
    model.save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").unlink()
    arrays = state(model)
    shards = [list(arrays)[shard::len(names)] for shard in range(len(names))]
    for name, keys in zip(names, shards):
        save_file({key: arrays[key] for key in keys}, tmp_path / name, metadata={"format": written})
    if len(names) > 1:
        index = {"weight_map": {key: name for name, keys in zip(names, shards) for key in keys}}
        (tmp_path / "diffusion_paddle_model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(Small.from_pretrained(tmp_path), model)


def test_bfloat16_bits_are_read_where_paddle_wrote_them_and_refused_elsewhere(tmp_path):
    model = Small(4, outside=4)
    model.save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").unlink()
    bits = {name: array.astype(ml_dtypes.bfloat16).view(np.uint16) for name, array in state(model).items()}
    for written in ("pt", "pd"):
        save_file(bits, tmp_path / "diffusion_paddle_model.safetensors", metadata={"format": written})
        if written == "pt":
            with pytest.raises(WeightsError, match="has type U16"):
                Small.from_pretrained(tmp_path)
    assert_same(Small.from_pretrained(tmp_path), model, rtol=2**-8)


@pytest.mark.parametrize("limit", [1, 60, "100B", "0.1KB", "1KiB"])
def test_shards(model, tmp_path, limit):
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert_same(Small.from_pretrained(tmp_path), model)
    count = sum(name.endswith(".safetensors") for name in os.listdir(tmp_path))
    index = tmp_path / f"{STEM}.safetensors.index.json"
    assert index.exists() == (count > 1)
    if limit == 1:
        content = json.loads(index.read_text())
        assert count == len(content["weight_map"]) == len(model.state_dict())
        assert content["metadata"]["total_size"] == sum(array.nbytes for array in state(model).values())
        assert f"{STEM}-00001-of-{count:05d}.safetensors" in content["weight_map"].values()


def test_saving_again_leaves_no_stale_shards(model, tmp_path):
    other = Small(3, 5)
    model.save_pretrained(tmp_path, max_shard_size=60)
    other.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", f"{STEM}.safetensors"]
    assert_same(Small.from_pretrained(tmp_path), other)
    model.save_pretrained(tmp_path, max_shard_size=60)
    assert f"{STEM}.safetensors" not in os.listdir(tmp_path)
    assert_same(Small.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype, numpy_type, rtol", [
    ("float16", np.float16, 2**-11), ("bfloat16", ml_dtypes.bfloat16, 2**-8), ("float32", np.float32, 0),
])
def test_types_on_disk(model, tmp_path, dtype, numpy_type, rtol):
    model.save_pretrained(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / f"{STEM}.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(numpy_type)}
    want = model.linear.weight.numpy().T.astype(numpy_type).astype(np.float32)
    np.testing.assert_array_equal(tensors["linear.weight"].astype(np.float32), want)
    assert_same(Small.from_pretrained(tmp_path), model, rtol)


def test_float64_on_disk(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    save_file({name: array.astype(np.float64) for name, array in load_file(path).items()}, path)
    assert_same(Small.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", paddle.bfloat16])
def test_half_types_on_a_cpu_are_held_in_float32(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="held in float32"):
        again = Small.from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == paddle.float32
    assert_same(again, model)


def test_half_types_elsewhere(model, tmp_path, monkeypatch):
    """On a GPU the weights have the type asked for, but those that overflow float16 stay float32."""
    monkeypatch.setattr(weights.paddle, "get_device", lambda: "gpu:0")
    model.save_pretrained(tmp_path)
    half = Small.from_pretrained(tmp_path, "float16").state_dict()
    assert half["linear.weight"].dtype == paddle.float32 and half["conv.weight"].dtype == paddle.float16
    brain = Small.from_pretrained(tmp_path, "bfloat16")
    assert {tensor.dtype for tensor in brain.state_dict().values()} == {paddle.bfloat16}
    assert_same(brain, model, 2**-8)
    brain.save_pretrained(tmp_path / "again")
    assert {entry.file_type for entry in read_header(tmp_path / "again" / f"{STEM}.safetensors").values()} == {"BF16"}


def test_variant(model, tmp_path):
    model.save_pretrained(tmp_path, dtype="float16")
    os.rename(tmp_path / f"{STEM}.safetensors", tmp_path / f"{STEM}.fp16.safetensors")
    assert_same(Small.from_pretrained(tmp_path, variant="fp16"), model, 2**-11)
    with pytest.raises(WeightsError, match="Is a `variant` needed"):
        Small.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="no weights in .*int8.safetensors"):
        Small.from_pretrained(tmp_path, variant="int8")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no weights of variant 'bf16'; reading diffusion_pytorch_model.safetensors"):
        assert_same(Small.from_pretrained(tmp_path, variant="bf16"), model)


def test_ignored_and_tied_tensors(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    tensors = load_file(path)
    tensors["other.weight"] = tensors.pop("table.weight")
    tensors["decoder.weight"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    assert_same(Small.from_pretrained(tmp_path), model)


def test_loading_into_a_model_that_has_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = Small(3, 5)
    weights.load_weights(other, tmp_path)
    assert_same(other, model)


def test_peak_memory_while_loading(tmp_path):
    """Loading 240 MB takes at most 1.2 times that, in float32 shards or in float16."""
    script = textwrap.dedent("""
        import json, os, sys, threading, time
        import numpy as np, paddle
        from paddle import nn
        from lowbit_video.pipelines.shared.config import keep_config
        from lowbit_video.pipelines.shared.weights import Model

        class Large(Model):
            @keep_config
            def __init__(self, layers=60, width=1024):
                super().__init__()
                self.layers = nn.LayerList([nn.Linear(width, width, nn.initializer.Constant(0.5)) for _ in range(layers)])

        def rss():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        folder, shards = os.environ["FOLDER"], json.loads(os.environ["SAVE"])
        if shards:
            model = Large()
            for dtype, shard in shards.items():
                model.save_pretrained(os.path.join(folder, dtype), dtype=dtype, max_shard_size=shard)
            sys.exit()
        Large(1, 64).state_dict()
        paddle.ones([1024, 1024]).t().contiguous().cast("float16").cast("float32").numpy()  # what is loaded once
        before, peak, done = rss(), [0], threading.Event()

        def watch():
            while not done.wait(0.0005):
                peak[0] = max(peak[0], rss())

        thread = threading.Thread(target=watch)
        thread.start()
        model = Large.from_pretrained(folder)
        done.set()
        thread.join()
        held = sum(parameter.numel().item() * 4 for parameter in model.parameters())
        with open(os.path.join(os.environ["RANK_OUT"], "0.json"), "w") as file:
            json.dump(dict(held=held, peak=max(peak[0], rss()) - before), file)
    """)
    path = tmp_path / "script.py"
    path.write_text(script)
    shards = {"float32": "50MB", "float16": "10GB"}
    run = lambda folder, save: run_processes(path, 1, tmp_path, environment={"FOLDER": str(folder), "SAVE": json.dumps(save)})
    run(tmp_path, shards)
    for dtype, shard in shards.items():
        _, (result,) = run(tmp_path / dtype, {})
        assert result["held"] > 200e6
        assert 0.9 < result["peak"] / result["held"] <= 1.2, (dtype, shard, result)


# ---------------------------------------------------------------------------------------------------------- damaged folders


def damaged(model, tmp_path, change):
    """Saves a model, changes its tensors, saves those, and returns the error that loading raises."""
    model.save_pretrained(tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        Small.from_pretrained(tmp_path)
    return str(caught.value)


def test_missing_unexpected_and_misshaped_tensors_are_all_named(model, tmp_path):
    def change(tensors):
        del tensors["norm.weight"], tensors["positions"]
        tensors["lora.down"] = np.zeros(2, np.float32)
        tensors["linear.weight"] = tensors["linear.weight"].T.copy()

    message = damaged(model, tmp_path, change)
    for words in ("do not fit Small", "2 tensors missing: positions, norm.weight", "1 tensor unexpected: lora.down",
                  "linear.weight is [3, 5], the configuration needs [5, 3]"):
        assert words in message


def test_unsupported_type(model, tmp_path):
    message = damaged(model, tmp_path, lambda tensors: tensors.update({"norm.bias": np.zeros(5, np.int64)}))
    assert "norm.bias has type I64; supported: F64, F32, F16, BF16" in message


@pytest.mark.parametrize("cut, words", [
    (10, "is truncated: tensor"), (-100, "is damaged: its header should take"), (-3, "is damaged"),
])
def test_truncated_file(model, tmp_path, cut, words):
    """cut: bytes taken off the end, or (negative) bytes left."""
    model.save_pretrained(tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    os.truncate(path, path.stat().st_size - cut if cut > 0 else -cut)
    with pytest.raises(WeightsError, match=words) as caught:
        Small.from_pretrained(tmp_path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (b"", "is damaged"),
    (b"\xff" * 200, "is damaged: its header should take"),
    ((20).to_bytes(8, "little") + b"{" + b" " * 30, "header cannot be read"),
    ((2).to_bytes(8, "little") + b"[]", "header cannot be read"),
    ((90000).to_bytes(8, "little") + b"[" * 90000, "header cannot be read"),
    *[(len(header).to_bytes(8, "little") + header + b"\0" * 8, "the entry of a is") for header in (
        b'{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}',
    )],
    ((12).to_bytes(8, "little") + b'{"a": {"x":1}}', "header cannot be read"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
])
def test_corrupt_file(model, tmp_path, content, words):
    model.save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        Small.from_pretrained(tmp_path)


def test_table_that_does_not_fit_its_shapes(model, tmp_path):
    model.save_pretrained(tmp_path)
    header = b'{"linear.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,4]}}'
    (tmp_path / f"{STEM}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 20)
    with pytest.raises(WeightsError, match="linear.bias should take 20 bytes, its table says 4"):
        Small.from_pretrained(tmp_path)


@pytest.mark.parametrize("first, second, words", [
    ((2, 6), (6, 14), r"tensor a begins at byte \d+ of the file, and what lies before it ends at \d+"),
    ((0, 4), (2, 10), "tensor b begins"), ((0, 4), (6, 14), "tensor b begins"), ((4, 8), (0, 8), "tensor a begins"),
])
def test_tensors_that_share_bytes_or_leave_some_out(tmp_path, first, second, words):
    """As the format's own reader: there each begins where the one before ends, in any order of the table."""
    path = tmp_path / "some.safetensors"

    def write(first, second):
        header = json.dumps({name: dict(dtype="F16", shape=[(end - begin) // 2], data_offsets=[begin, end])
                             for name, (begin, end) in (("a", first), ("b", second))}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
        return read_header(str(path))

    for whole in (((0, 4), (4, 12)), ((8, 12), (0, 8)), ((0, 0), (0, 8))):
        assert set(write(*whole)) == {"a", "b"}
    with pytest.raises(WeightsError, match=words):
        write(first, second)


def test_missing_shard(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=60)
    shard = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(WeightsError, match=f"1 of [0-9]+ shards missing: {shard.name}"):
        Small.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, words", [
    ("{}", "is damaged"), ("{", "is damaged"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "outside its folder: ../b.safetensors"),
])
def test_bad_index(model, tmp_path, content, words):
    model.save_pretrained(tmp_path, max_shard_size=60)
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=words):
        Small.from_pretrained(tmp_path)


def test_no_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").unlink()
    with pytest.raises(WeightsError, match=f"looked for {STEM}.safetensors.*found none"):
        Small.from_pretrained(tmp_path)
    (tmp_path / f"{STEM}.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=f"found {STEM}.bin.*safe_serialization=True.*in diffusers"):
        Small.from_pretrained(tmp_path)
    (tmp_path / f"{STEM}.bin").rename(tmp_path / "model_state.pdparams")
    with pytest.raises(WeightsError, match="found model_state.pdparams.*safe_serialization=True.*in ppdiffusers"):
        Small.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ configuration


def test_config_errors(model, tmp_path):
    with pytest.raises(ConfigError, match="no such file: .*config.json"):
        Small.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    path.write_text(json.dumps(config | {"irrelevant": 1, "_private": 2}))
    assert_same(Small.from_pretrained(tmp_path), model)
    path.write_text(json.dumps(config | {"widht": 1, "depth": 2}))
    with pytest.raises(ConfigError, match="Small does not know: depth, widht. Known: inside, outside, bias"):
        Small.from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ConfigError, match="describes a UNet2DConditionModel, expected a Small"):
        Small.from_pretrained(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="holds list, expected a JSON object"):
        Small.from_pretrained(tmp_path)
    path.write_text('{"inside": ')
    with pytest.raises(ConfigError, match="not valid JSON"):
        Small.from_pretrained(tmp_path)


def test_config_is_read_only(model):
    with pytest.raises(TypeError, match="read-only"):
        model.config.inside = 4
    with pytest.raises(AttributeError, match="no config key 'width'; known: bias, inside, outside"):
        _ = model.config.width


# ----------------------------------------------------------------------------------------------------------- atomic writing


def test_an_interrupted_save_loses_nothing(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    calls = []

    def interrupted(tensor, original=paddle.Tensor.numpy):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(tensor)

    monkeypatch.setattr(paddle.Tensor, "numpy", interrupted)
    for limit in ("10GB", 60):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            Small(3, 5).save_pretrained(tmp_path, max_shard_size=limit)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_arguments(model, tmp_path):
    with pytest.raises(ValueError, match="'int8' is not supported for weights; use one of float32, float16, bfloat16"):
        Small.from_pretrained(tmp_path / "x", dtype=dtype_name("int8"))
    for size in ("many", 0, "0GB", "-1GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            model.save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["fp16", "float16", np.float16, np.dtype(np.float16), paddle.float16])
def test_dtype_names(given):
    assert dtype_name(given) == "float16"
