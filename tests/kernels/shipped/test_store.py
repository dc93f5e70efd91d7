"""Which shipped kernel does for a launch: the one compiled for the most of what is given."""
from lowbit_video.kernels.shipped import cases, store


def of(name, even=True):
    """One sample of a kernel, of tidy tensors or of odd ones."""
    return next(one.described for one in cases.samples() if one.described.name.endswith(name)
                and ("i64" in one.described.kinds) != even)


def test_each_sample_finds_its_own_build():
    for sample in cases.samples():
        build = store.find(sample.described)
        assert (build.kernel, build.constants, build.kinds) == sample.described.key


def test_odd_arguments_find_the_code_that_relies_on_nothing():
    tidy, odd = of("quant_v_kernel"), of("quant_v_kernel", even=False)
    assert tidy.constants == odd.constants and tidy.kinds[0] == "*float16/16" and odd.kinds[0] == "*float16"
    for place, kind in ((0, "*float16"), (4, "i32"), (4, "i64/16"), (6, "=1")):
        kinds = list(tidy.kinds)
        kinds[place] = kind
        assert store.find(tidy._replace(kinds=tuple(kinds))).kinds == odd.kinds
    assert store.find(tidy).kinds == tidy.kinds


def test_what_is_not_shipped_is_not_found():
    described = of("attn_fwd_kernel")
    assert store.find(described._replace(constants=("num_warps=8", *described.constants))) is None
    assert store.find(described._replace(name="attention.portable:attn_fwd_kernel")) is None
    place = described.kinds.index("i32")
    kinds = [*described.kinds[:place], "i64", *described.kinds[place + 1:]]
    assert store.find(described._replace(kinds=tuple(kinds))) is None  # a number of tokens beyond 32 bits
    assert store.find(described._replace(kinds=described.kinds[:-1])) is None
