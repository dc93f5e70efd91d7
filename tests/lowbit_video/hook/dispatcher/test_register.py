"""Our names in diffusers' tables: all or none, twice is once, and out again without a trace."""
import os
import pathlib
import subprocess
import sys
from enum import Enum
from types import SimpleNamespace

import pytest

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from diffusers.models import attention_dispatch as dispatch  # noqa: E402

import dispatch_models  # noqa: E402
from lowbit_video import UnsupportedError, register_diffusers, unregister_diffusers  # noqa: E402
from lowbit_video.hook.dispatcher import registry  # noqa: E402
from lowbit_video.precision import EXACT_SPECS, precision_specs  # noqa: E402

pytestmark = pytest.mark.parity
Registry = dispatch._AttentionBackendRegistry


def test_every_low_bit_precision_has_a_name_and_a_strict_one():
    names = register_diffusers()
    low_bit = [spec for spec in precision_specs() if spec not in EXACT_SPECS]
    assert {"lowbit_int8_fp8", "lowbit_int8_fp16", "lowbit_int4_fp8", "lowbit_int8_int4_fp16"} < set(names)
    assert len(set(names)) == len(names) == 2 * len(low_bit)
    assert {name + "_strict" for name in names if not name.endswith("_strict")} == {n for n in names if n.endswith("_strict")}
    for name in names:
        member = dispatch.AttentionBackendName(name)
        assert member is dispatch.AttentionBackendName[name.upper()] is getattr(dispatch.AttentionBackendName, name.upper())
        assert member.value == name and member == name and member in list(dispatch.AttentionBackendName)
        assert callable(Registry._backends[name]) and Registry._is_context_parallel_available(member)
        assert Registry._supported_arg_names[member] >= {"query", "key", "value", "attn_mask", "dropout_p", "is_causal",
                                                         "scale", "enable_gqa", "return_lse", "_parallel_config"}


def test_twice_is_once_and_undone_is_undone():
    before = dispatch_models.state()
    assert register_diffusers() == register_diffusers()
    once = dispatch_models.state()
    assert once != before and len(once[3]) == len(set(once[3]))
    unregister_diffusers()
    assert dispatch_models.state() == before
    unregister_diffusers()
    with pytest.raises(ValueError, match="lowbit_int8_fp8"):
        dispatch_models.wan().set_attention_backend("lowbit_int8_fp8")
    register_diffusers()
    assert dispatch_models.state()[3] == once[3]


def stand_in(last_table, **changed):
    """A module with the parts of diffusers' dispatcher, its tables empty."""
    class Name(str, Enum):
        NATIVE = "native"

    class Table:
        _backends, _constraints, _supported_arg_names, _supports_context_parallel = {}, {}, {}, last_table
        _active_backend = Name.NATIVE

        @classmethod
        def register(cls, backend, constraints=None, supports_context_parallel=False):
            def decorator(function):
                for table in (cls._backends, cls._constraints, cls._supported_arg_names):
                    table[backend] = function
                if isinstance(cls._supports_context_parallel, dict):
                    cls._supports_context_parallel[backend] = supports_context_parallel
                else:
                    cls._supports_context_parallel.add(backend.value)
                return function
            return decorator

    parts = dict(AttentionBackendName=Name, _AttentionBackendRegistry=Table,
                 dispatch_attention_fn=dispatch.dispatch_attention_fn,
                 _templated_context_parallel_attention=dispatch._templated_context_parallel_attention)
    return SimpleNamespace(**{**parts, **changed})


@pytest.mark.parametrize("last_table", [{}, set()], ids=["dict", "set"])
def test_the_last_table_may_be_a_dictionary_or_a_set(last_table):
    module = stand_in(last_table)
    registry.check_layout(module)
    registry.add(module, {"lowbit_a": print, "lowbit_b": print})
    assert set(last_table) == {"lowbit_a", "lowbit_b"} == set(module._AttentionBackendRegistry._backends)
    assert [name.value for name in module.AttentionBackendName] == ["native", "lowbit_a", "lowbit_b"]
    registry.discard(module, ["lowbit_a", "lowbit_b"])
    assert not last_table and not module._AttentionBackendRegistry._backends
    assert [name.value for name in module.AttentionBackendName] == ["native"]
    assert not hasattr(module.AttentionBackendName, "LOWBIT_A")


def with_another_argument(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
                          attention_kwargs=None, *, backend=None, parallel_config=None, sink=None):
    """A dispatcher that hands over what nobody here has heard of."""


@pytest.mark.parametrize("change, named", [
    (lambda m: setattr(m._AttentionBackendRegistry, "_supports_context_parallel", []), "_supports_context_parallel"),
    (lambda m: delattr(m._AttentionBackendRegistry, "_constraints"), "_constraints"),
    (lambda m: setattr(m._AttentionBackendRegistry, "_active_backend", "native"), "_active_backend"),
    (lambda m: delattr(m._AttentionBackendRegistry, "register"), "_AttentionBackendRegistry.register"),
    (lambda m: delattr(m, "_AttentionBackendRegistry"), "_AttentionBackendRegistry._backends"),
    (lambda m: setattr(m, "AttentionBackendName", {"native"}), "AttentionBackendName"),
    (lambda m: setattr(m, "_templated_context_parallel_attention", None), "_templated_context_parallel_attention"),
    (lambda m: setattr(m, "dispatch_attention_fn", with_another_argument), r"dispatch_attention_fn\(sink=\)")])
def test_an_unknown_layout_is_refused_by_name_and_nothing_is_registered(change, named, monkeypatch):
    module = stand_in(set())
    change(module)
    monkeypatch.setitem(sys.modules, registry.DISPATCH, module)
    with pytest.raises(UnsupportedError, match=f"diffusers {diffusers.__version__} .*{named}.*nothing was registered"):
        register_diffusers()
    assert not hasattr(module, "_AttentionBackendRegistry") or not module._AttentionBackendRegistry._backends


def test_an_error_half_way_leaves_nothing(monkeypatch):
    before, register, calls = dispatch_models.state(), Registry.register, []

    def failing(backend, **more):
        calls.append(backend)
        if len(calls) == 3:
            raise RuntimeError("full")
        return register(backend, **more)

    monkeypatch.setattr(Registry, "register", failing)
    with pytest.raises(RuntimeError, match="full"):
        register_diffusers()
    monkeypatch.undo()
    assert len(calls) == 3 and dispatch_models.state() == before


def run(code, **environment):
    root = pathlib.Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = ['{root}', '{root / 'tests'}']; {code}"],
                          capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_environment_variable_may_name_a_backend_before_diffusers_knows_it():
    code = ("import lowbit_video; lowbit_video.register_diffusers(); from diffusers.models import attention_dispatch as d; "
            "import diffusers.utils.constants as c; active = d._AttentionBackendRegistry.get_active_backend; "
            "print(active()[0].value, c.DIFFUSERS_ATTN_BACKEND); lowbit_video.unregister_diffusers(); print(active()[0].value)")
    assert run(code, DIFFUSERS_ATTN_BACKEND="lowbit_int8_fp8") == ["lowbit_int8_fp8", "lowbit_int8_fp8", "native"]


@pytest.mark.parametrize("named, active", [("lowbit_int8_fp8", "lowbit_int8_fp8"), ("_native_math", "native")])
def test_the_environment_variable_is_followed_where_it_names_ours(named, active, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", named)
    register_diffusers()
    assert Registry._active_backend.value == active
    Registry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
    register_diffusers()
    assert Registry._active_backend.value == "native"  # followed once, not against who chose another since
    Registry.set_active_backend(dispatch.AttentionBackendName(active))
    unregister_diffusers()
    assert Registry._active_backend.value == "native"


def test_importing_the_package_touches_nothing():
    code = ("import lowbit_video; lowbit_video.register_diffusers; assert not {'torch', 'diffusers'} & set(sys.modules); "
            "import dispatch_models; print(any(name.startswith('LOWBIT') for name in dispatch_models.state()[3]))")
    assert run(code) == ["False"]
