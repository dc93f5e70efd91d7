"""Which kernel `backend="auto"` takes: written out by arch, precision and head dim, and what a call may ask besides."""
import pytest

from lowbit_video.kernels.variants import VARIANTS, Request
from lowbit_video.precision import EXACT_SPECS, Precision, precision_specs

ARCHS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
INTEGERS = ("int8/int4", "int8/int2", "int4", "int2")
BOTH, OTHERS = (64, 128), (32, 72, 96, 256)
"""Head dims that the Hopper kernel has, and some that it has not."""
[HOPPER_EXACT] = [one for one in VARIANTS if one.name == "hopper-exact"]
EXACT = "hopper-exact" if HOPPER_EXACT.automatic else "exact"
"""What 16-bit exact attention gets on Hopper without asking for it."""
CHOSEN = {
    # sm_75, 80, 86, 89, 90, 100, 120
    ("int8+fp16", BOTH): "- int-fp16 int-fp16 int-fp16 hopper-int8 int-fp16 int-fp16",
    ("int8+fp16", OTHERS): "- int-fp16 int-fp16 int-fp16 int-fp16 int-fp16 int-fp16",
    ("int8+fp8", BOTH): "- - - int-fp8 hopper-int8 int-fp8 int-fp8",
    ("int8+fp8", OTHERS): "- - - int-fp8 int-fp8 int-fp8 int-fp8",
    ("fp8+fp8", BOTH): "- - - fp8 hopper-fp8 fp8 fp8",
    ("fp8+fp8", OTHERS): "- - - fp8 fp8 fp8 fp8",
    ("fp8+fp16", BOTH + OTHERS): "- - - fp8 fp8 fp8 fp8",
    **{(f"{qk}+fp16", BOTH + OTHERS): "- int-fp16 int-fp16 int-fp16 int-fp16 int-fp16 int-fp16" for qk in INTEGERS},
    **{(f"{qk}+fp8", BOTH + OTHERS): "- - - int-fp8 int-fp8 int-fp8 int-fp8" for qk in INTEGERS},
    **{(name, BOTH): f"- exact exact exact {EXACT} exact exact" for name in ("fp16", "bf16")},
    **{(name, OTHERS): "- exact exact exact exact exact exact" for name in ("fp16", "bf16")},
    ("fp32", BOTH + OTHERS): "- exact exact exact exact exact exact",
}


def request(spec, arch, head_dim=64, **more):
    precision = Precision(spec)
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(spec, "float16")
    return Request(**(dict(device="cuda", arch=arch, q=precision.q, k=precision.k, pv=precision.pv, head_dim=head_dim,
                           granularity=precision.granularity, dtype=dtype, q_len=1000, kv_len=1000,
                           smooth_q=precision.smooth_q) | more))


def chosen(asked):
    """The name of the first variant without a reason against it; "-" for none."""
    return next((v.name.removeprefix("triton-") for v in VARIANTS if v.automatic and v.why_not(asked) is None), "-")


@pytest.fixture(autouse=True)
def with_gluon(monkeypatch):
    from lowbit_video.kernels import variants

    monkeypatch.setitem(variants.NEEDS, "gluon", lambda asked: None)


@pytest.mark.parametrize("spec, head_dims", CHOSEN, ids=str)
def test_every_arch_and_head_dim(spec, head_dims):
    for head_dim in head_dims:
        assert " ".join(chosen(request(spec, arch, head_dim)) for arch in ARCHS) == CHOSEN[spec, head_dims], head_dim


def test_every_precision_is_in_the_table():
    assert {spec for spec, _ in CHOSEN} == set(precision_specs()) - (set(EXACT_SPECS) - {"fp16", "bf16", "fp32"})


@pytest.mark.parametrize("spec, asked, wanted", [
    ("int8+fp8", dict(causal=True, lse=True, heads=6, kv_heads=2), "hopper-int8"),
    ("int8+fp8", dict(dtype="bfloat16"), "hopper-int8"),
    ("int8+fp8", dict(v_aligned=False), "hopper-int8"),  # whose codes of V are its own
    ("int8+fp16", dict(v_aligned=False), "int-fp16"),
    ("int8+fp8", dict(dtype="float32"), "int-fp8"),
    ("int8+fp8", dict(granularity="token"), "int-fp8"),
    ("int8+fp8", dict(varlen=True), "int-fp8"),
    ("int8+fp8", dict(smooth_q=True), "int-fp8"),
    ("fp8+fp8", dict(varlen=True), "fp8"),
    ("fp16", dict(kv_len=7, only_if_faster=True), EXACT),
    ("bf16", dict(head_dim=128, causal=True, lse=True, heads=6, kv_heads=2), EXACT),
    ("fp16", dict(v_aligned=False), "exact"),
    ("fp16", dict(negative=True), "exact"),
    ("bf16", dict(varlen=True), "exact"),
    ("fp16", dict(dtype="bfloat16"), "-"),
    ("bf16", dict(dtype="float16"), "-"),
    ("int8+fp8", dict(head_dim=264), "-"),
    ("int8+fp8", dict(head_dim=24), "-"),
    ("int8+fp8", dict(head_dim=68), "-"),
    ("int8+fp8", dict(kv_len=500, only_if_faster=True), "-"),
    ("int8+fp8", dict(kv_len=17776, only_if_faster=True), "hopper-int8"),
    ("int8+fp8", dict(kv_len=17776, only_if_faster=True, head_dim=72), "-"),
    ("int8+fp8", dict(kv_len=17776, head_dim=72), "int-fp8"),
    ("int8+fp8", dict(kv_len=17776, only_if_faster=True, head_dim=80), "int-fp8"),
    ("int4+fp8", dict(kv_len=17776, only_if_faster=True, head_dim=80), "-"),
    ("int4+fp8", dict(kv_len=17776, only_if_faster=True, head_dim=96), "int-fp8"),
])
def test_what_else_a_call_asks_for_on_hopper(spec, asked, wanted):
    assert chosen(request(spec, (9, 0), **asked)) == wanted


@pytest.mark.parametrize("spec, asked, reason", [
    ("fp16", {}, None), ("bf16", dict(head_dim=128, causal=True, lse=True, heads=6, kv_heads=2), None),
    ("fp16", dict(kv_len=7), None), ("fp32", {}, "Q.K in fp32"), ("fp16", dict(dtype="bfloat16"), "takes float16 tensors"),
    ("fp16", dict(head_dim=96), "head_dim 96"), ("fp16", dict(varlen=True), "varlen"), ("fp16", dict(pooled=True), "pooled"),
    ("fp16", dict(qk_aligned=False), "16 bytes"), ("fp16", dict(v_aligned=False), "16 bytes"),
    ("fp16", dict(negative=True), "negative"), ("fp16", dict(arch=(10, 0)), "needs sm_90")])
def test_what_the_exact_hopper_kernel_serves(spec, asked, reason):
    found = HOPPER_EXACT.why_not(request(spec, **dict(arch=(9, 0)) | asked))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("arch, slow", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_rows_that_tma_cannot_read_are_slow_where_kernels_read_by_it(arch, slow):
    asked = request("int8+fp16", arch, kv_len=17776, head_dim=72, only_if_faster=True)
    assert chosen(asked) == ("-" if slow else "int-fp16")
    [variant] = [one for one in VARIANTS if one.name == "triton-int-fp16"]
    assert variant.why_not(asked) == (None if not slow else (
        "exact attention is faster at head dim 72, where a key's int8 codes take 72 bytes, no multiple of 16, and TMA cannot "
        "read them"))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pooling_is_offered_from_the_length_on_from_which_it_pays(head_dim):
    [hopper] = [one for one in VARIANTS if one.name == "hopper-int8"]
    asked = [request("int8+fp8", (9, 0), kv_len=tokens, head_dim=head_dim, pooled=True, only_if_faster=True)
             for tokens in (4095, 4096)]
    assert "choosing what to pool costs more than it saves below 4096 tokens (4095 given)" in hopper.why_not(asked[0])
    assert chosen(asked[1]) == "hopper-int8"


def test_a_cpu_takes_the_reference():
    for spec, _ in CHOSEN:
        assert chosen(request(spec, None, device="cpu")) == ("reference-lowbit" if "+" in spec else "reference-exact"), spec


def test_without_gluon_hopper_takes_the_portable_kernel(monkeypatch):
    from lowbit_video.kernels import variants

    monkeypatch.setitem(variants.NEEDS, "gluon", lambda asked: "no gluon")
    assert chosen(request("int8+fp8", (9, 0))) == "int-fp8" and chosen(request("fp16", (9, 0))) == "exact"
